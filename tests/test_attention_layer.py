"""UnpaddedSelfAttention on its own, beside the layers of torch that it stands in for.

Shapes: T tokens, B sequences, S places in one sequence, C hidden size, H heads.
"""

import pytest
import torch
from torch import nn

from cramfast.layers import UnpaddedSelfAttention, pad, unpad

pytestmark = pytest.mark.usefixtures("reference")

HIDDEN, HEADS = 96, 3
LENGTHS = (5, 0, 1, 17, 9)
CU_SEQLENS = torch.tensor((0, *LENGTHS)).cumsum(0).int()
LONGEST = max(LENGTHS)
# The same fp64 sums in another order, on outputs of size 1 to 10.
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def layer_and_torch(bias=True, **options):
    """The layer and torch's, in fp64 and with the same weights, both as in evaluation."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(HIDDEN, HEADS, bias=bias, batch_first=True).double().eval()
    ours = UnpaddedSelfAttention(HIDDEN, HEADS, bias, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    names = {name: name.replace("in_proj_", "qkv.").replace("out_proj", "out") for name in theirs.state_dict()}
    ours.load_state_dict({names[name]: tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def tokens(total):
    return torch.randn(total, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_padded_callers_get_what_torch_gives_them(bias):
    ours, theirs = layer_and_torch(bias)
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    # torch's layer turns a row without a token into NaN.
    mask[:, 0] = True
    x = tokens(mask.numel()).unflatten(0, mask.shape)
    flat, indices, cu_seqlens, max_seqlen = unpad(x, mask)
    y = pad(ours(flat, cu_seqlens, max_seqlen), indices, *mask.shape)
    expected, _ = theirs(x, x, x, key_padding_mask=~mask, need_weights=False)
    torch.testing.assert_close(y, expected * mask[..., None], **TOLERANCE)


@pytest.mark.parametrize("window", [0, 2, 100])
def test_a_window_is_a_mask_around_each_token(window):
    ours, theirs = layer_and_torch(window=window)
    expected = []
    for part in tokens(sum(LENGTHS)).split(LENGTHS):
        place = torch.arange(len(part))
        far = (place[:, None] - place).abs() > window
        expected.append(theirs(part, part, part, attn_mask=far, need_weights=False)[0])
    torch.testing.assert_close(ours(tokens(sum(LENGTHS)), CU_SEQLENS, LONGEST), torch.cat(expected), **TOLERANCE)


def test_dropout_only_in_training():
    dropping, x = UnpaddedSelfAttention(HIDDEN, HEADS, dropout=0.5), tokens(sum(LENGTHS)).float()
    plain = UnpaddedSelfAttention(HIDDEN, HEADS)
    plain.load_state_dict(dropping.state_dict())
    expected = plain(x, CU_SEQLENS, LONGEST)
    assert torch.equal(plain.eval()(x, CU_SEQLENS, LONGEST), expected)
    assert torch.equal(dropping.eval()(x, CU_SEQLENS, LONGEST), expected)
    first, second = (dropping.train()(x, CU_SEQLENS, LONGEST) for _ in range(2))
    assert not torch.equal(first, expected) and not torch.equal(first, second)


def test_dropout_is_of_the_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, keys, dropout = UnpaddedSelfAttention(8, 1, bias=False, dropout=0.25), 64, 0.25
    # Equal scores and unit values: before the projection a token's output is the number of kept keys, over its mean.
    with torch.no_grad():
        layer.qkv.weight.zero_()[16:, 0] = 1
        layer.out.weight.copy_(torch.eye(8))
    cu_seqlens = torch.arange(0, 64 * keys + 1, keys, dtype=torch.int32)
    kept = layer(torch.ones(64 * keys, 8), cu_seqlens, keys)[:, 0]
    deviation = (dropout / (1 - dropout) / keys) ** 0.5
    assert abs(kept.mean() - 1) < 5 * deviation / kept.numel() ** 0.5
    # A sample's own deviation spreads by about 1/sqrt(2 n).
    assert abs(kept.std() / deviation - 1) < 5 / (2 * kept.numel()) ** 0.5


def test_options_leave_the_state_dict_as_it_was():
    plain, full = UnpaddedSelfAttention(HIDDEN, HEADS), UnpaddedSelfAttention(HIDDEN, HEADS, dropout=0.1, window=3)
    assert [*full.state_dict()] == [*plain.state_dict()] == ["qkv.weight", "qkv.bias", "out.weight", "out.bias"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((96, 7), "UnpaddedSelfAttention: hidden_size 96 is not a multiple of num_heads 7"),
        ((96, 0), "UnpaddedSelfAttention: hidden_size 96 is not a multiple of num_heads 0"),
        ((96, -3), "UnpaddedSelfAttention: hidden_size 96 is not a multiple of num_heads -3"),
        ((96, 3, True, 1.0), "UnpaddedSelfAttention: dropout is 1.0, expected at least 0 and below 1"),
        ((96, 3, True, -0.1), "UnpaddedSelfAttention: dropout is -0.1, expected at least 0 and below 1"),
    ],
)
def test_sizes_and_rates_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        UnpaddedSelfAttention(*arguments)
