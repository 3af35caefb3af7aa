"""Dropout of attention's weights. The kernels drop by random numbers of their own, so what they left out is read from
them: with unit vectors for values the output of a token is its row of weights, as many of them as a head has values.

Shapes: T tokens, S places in one sequence, H heads, D head size.
"""

import pytest
import torch
from test_attention import (
    DEVICE,
    DTYPES,
    HALF,
    MARKS,
    NATIVE,
    assert_alike,
    assert_as_exact,
    batch,
    boundaries,
    results,
    same,
)

from cramfast.kernels import sequence_positions, varlen_attention, varlen_attention_reference

pytestmark = MARKS

SEED = 5
# A batch for each way through the kernels.
PATHS = {
    "tiles": (64, 64),
    "tiles with masks": (64, 20, 0, 40),
    "large tiles": (128,),
    "large tiles with masks": (70, 20, 40),
    "blocks": (192,),
    "blocks with masks": (150, 20),
}
paths = pytest.mark.parametrize("path", PATHS)


def weights_of(qkv, lengths, seed, dropout_p):
    """The weights that multiply the values, for each sequence (H, S, S)."""
    total, _, _, head_size = qkv.shape
    cu_seqlens, longest = boundaries(lengths), max(lengths)
    _, position = sequence_positions(cu_seqlens, total)
    columns = []
    for first in range(0, longest, head_size):
        unit = position[:, None] - first == torch.arange(head_size, device=DEVICE)
        revealing = torch.stack((*qkv.unbind(1)[:2], unit[:, None].expand_as(qkv[:, 2]).to(qkv.dtype)), 1)
        torch.manual_seed(seed)
        columns.append(varlen_attention(revealing, cu_seqlens, longest, dropout_p=dropout_p))
    weights = torch.cat(columns, -1)
    return [part[..., : len(part)].transpose(0, 1) for part in weights.split(lengths)]


def attention_of_kept(kept, lengths, dropout_p):
    """Attention of which only the weights in `kept`, for each sequence (H, S, S), are left."""

    def attend(qkv):
        outputs = []
        for qkv_S3HD, kept_HSS in zip(qkv.split(lengths), kept, strict=True):
            q_HSD, k_HSD, v_HSD = qkv_S3HD.permute(1, 2, 0, 3)
            p_HSS = (q_HSD @ k_HSD.mT * qkv.shape[-1] ** -0.5).softmax(-1)
            outputs.append((p_HSS * kept_HSS / (1 - dropout_p) @ v_HSD).transpose(0, 1))
        return torch.cat(outputs)

    return attend


@paths
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_as_many_weights_are_dropped_as_asked(path, dropout_p):
    lengths, heads = PATHS[path] * (20 if NATIVE else 1), 2
    qkv, _ = batch(lengths, heads)
    qkv[:, 0] = 0
    weights = weights_of(qkv, lengths, SEED, dropout_p)
    dropped = torch.cat([part.flatten() == 0 for part in weights]).double()
    # Five deviations of a mean of independent numbers.
    assert abs(dropped.mean() - dropout_p) <= 5 * (dropout_p * (1 - dropout_p) / len(dropped)) ** 0.5
    for part in weights:
        # Equal scores, so equal weights, made up for those that are dropped.
        kept = part[part > 0]
        expected = torch.full_like(kept, 1 / (part.shape[-1] * (1 - dropout_p)) if part.numel() else 0)
        torch.testing.assert_close(kept, expected, rtol=torch.finfo(HALF).eps, atol=0)


def test_every_weight_has_a_number_of_its_own():
    # Equally long sequences, so that a number used twice, by head, query, key or sequence, shows as equal masks.
    lengths = (64, 64, 64)
    qkv, _ = batch(lengths, 2)
    kept = torch.stack(weights_of(qkv, lengths, SEED, 0.5)) > 0
    rows = torch.cat((kept.flatten(0, 2), kept.mT.flatten(0, 2)))
    # Two of the 768 agree in 57 of 64 places with a probability of 3e-11.
    agreement = (rows.double() @ rows.double().T) + ((~rows).double() @ (~rows).double().T)
    assert agreement.fill_diagonal_(0).max() < 57


@paths
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_drops_what_forward_dropped(path, dtype):
    lengths, dropout_p = PATHS[path], 0.3
    qkv, grad = batch(lengths, 2 if NATIVE else 1, dtype=dtype)
    kept = [part > 0 for part in weights_of(qkv, lengths, SEED, dropout_p)]
    attend = attention_of_kept(kept, lengths, dropout_p)
    torch.manual_seed(SEED)
    ours = results(varlen_attention, qkv, grad, boundaries(lengths), max(lengths), dropout_p=dropout_p)
    assert_as_exact(ours, results(attend, qkv, grad), results(attend, qkv.double(), grad.double()))


@paths
def test_dropout_keeps_the_mean(path):
    lengths, runs = PATHS[path], 200 if NATIVE else 8
    qkv, _ = batch(lengths)
    arguments = boundaries(lengths), max(lengths)
    torch.manual_seed(SEED)
    samples = torch.stack([varlen_attention(qkv, *arguments, dropout_p=0.2) for _ in range(runs)]).double()
    exact = varlen_attention_reference(qkv.double(), *arguments)
    # Over thousands of elements the squares of their errors average out; a bias as large would double them.
    assert (samples.mean(0) - exact).norm() <= 1.2 * (samples.std(0).norm() / runs**0.5)


@paths
def test_dropout_follows_the_seed(path):
    lengths = PATHS[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    torch.manual_seed(SEED)
    first, second = (results(varlen_attention, qkv, grad, *arguments, dropout_p=0.2) for _ in range(2))
    torch.manual_seed(SEED)
    again = results(varlen_attention, qkv, grad, *arguments, dropout_p=0.2)
    assert same(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", ["tiles", "tiles with masks", "blocks with masks"])
def test_dropout_of_nothing_changes_nothing(path):
    lengths = PATHS[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    plain = results(varlen_attention, qkv, grad, *arguments)
    random_state = torch.cuda.get_rng_state if NATIVE else torch.get_rng_state
    before = random_state()
    assert same(plain, results(varlen_attention, qkv, grad, *arguments, dropout_p=0.0))
    assert torch.equal(random_state(), before)
    # So rarely that it does not happen, though numbers are drawn.
    assert_alike(results(varlen_attention, qkv, grad, *arguments, dropout_p=1e-12), plain)
