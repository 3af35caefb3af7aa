"""What not every model has: token types, dropout, layers that see a window alone.

Shapes: T tokens of an unpadded batch, B sequences, S places in the longest one.
"""

from dataclasses import replace

import pytest
import torch
from test_model import (
    FP32_TOLERANCE,
    LENGTHS,
    batch,
    load_hf,
    logits,
    pad,
    padded_logits,
    random_bert,
    rename,
    small,
    tiny,
    to_hf_bert,
)
from test_model import MODERNBERT_NAMES as NAMES

from cramfast.config import PRESETS, ModelConfig
from cramfast.errors import UserError
from cramfast.model import Bert

pytestmark = pytest.mark.usefixtures("reference")


def local(window=4, every=3, layers=5):
    """A tiny ModernBERT whose local layers turn faster than its global ones."""
    options = {"window": window, "global_every": every, "rope_theta": 160_000.0, "local_rope_theta": 10_000.0}
    return replace(tiny("cramfast-base"), num_layers=layers, **options)


@torch.no_grad()
def test_token_types_are_those_of_transformers():
    model = random_bert(small("bert-mini"))
    ids, *sequences = batch()
    types = torch.randint(2, ids.shape, generator=torch.Generator().manual_seed(1))
    ours = model.predict(model.encode(ids, *sequences, token_types=types))
    ids_BS, mask_BS = pad(ids, LENGTHS)
    types_BS, _ = pad(types, LENGTHS)
    theirs = to_hf_bert(model, "sdpa")(input_ids=ids_BS, attention_mask=mask_BS.long(), token_type_ids=types_BS)
    assert (ours - theirs.logits[mask_BS]).abs().max() <= FP32_TOLERANCE
    assert (ours - logits(model)).abs().max() > 0.01


def test_without_token_types_all_are_0():
    model = random_bert(tiny("bert-base"))
    ids, *sequences = batch()
    assert torch.equal(model.encode(ids, *sequences), model.encode(ids, *sequences, token_types=torch.zeros_like(ids)))


def test_gradients_reach_the_token_types_that_are_there():
    model = random_bert(tiny("bert-base"))
    ids, *sequences = batch()
    types = (torch.arange(len(ids)) % 3 == 0).long()
    model.encode(ids, *sequences, token_types=types).square().sum().backward()
    gradient = model.embeddings.token_types.weight.grad
    assert gradient.any(-1).all()
    assert model.embeddings.positions.weight.grad[: max(LENGTHS)].any(-1).all()


@pytest.mark.parametrize(
    ("preset", "types", "message"),
    [
        ("cramfast-base", torch.zeros(10, dtype=torch.int64), "the model has none"),
        ("bert-base", torch.zeros(9, dtype=torch.int64), r"int64 of \(9,\), expected int64 of \(10,\)"),
        ("bert-base", torch.zeros(10), "torch.float32"),
    ],
)
def test_token_types_that_do_not_fit_are_refused(preset, types, message):
    ids, cu_seqlens, max_seqlen = batch((10,))
    with pytest.raises(ValueError, match=message):
        Bert(tiny(preset)).encode(ids, cu_seqlens, max_seqlen, token_types=types)


def test_token_types_past_the_last_place_are_refused():
    model = Bert(tiny("bert-base"))
    ids, *sequences = batch((65,))
    with pytest.raises(ValueError, match="max_seqlen is 65, the model has 64 places"):
        model.encode(ids, *sequences, token_types=torch.zeros_like(ids))


def test_rotary_models_have_no_token_types():
    with pytest.raises(UserError, match="token types"):
        replace(PRESETS["cramfast-base"], token_types=2)


@pytest.mark.parametrize("name", ["bert-base", "cramfast-base"])
def test_dropout_is_for_training_alone(name):
    model = random_bert(tiny(name))
    ids, *sequences = batch()
    expected = model.encode(ids, *sequences)
    assert torch.equal(model.train().encode(ids, *sequences), expected)
    model.dropout = 0.3
    assert torch.equal(model.eval().encode(ids, *sequences), expected)
    dropped, again = (model.train().encode(ids, *sequences) for _ in range(2))
    assert not torch.equal(dropped, expected) and not torch.equal(dropped, again)


@pytest.mark.parametrize("name", ["bert-base", "cramfast-base"])
def test_dropout_falls_where_bert_has_it(name, monkeypatch):
    model = Bert(tiny(name), dropout=0.25).train()
    assert model.dropout == 0.25
    elsewhere, weights = [], []
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p: elsewhere.append((p, x.shape)) or x)
    attend = "cramfast.layers.varlen_attention"
    monkeypatch.setattr(attend, lambda qkv, *_, dropout_p, **__: weights.append(dropout_p) or qkv[:, 2])
    ids, *sequences = batch()
    rows = torch.arange(0, len(ids), 4)
    model.encode(ids, *sequences, rows)
    # The embedding, then attention's and the network's output of both layers; the last one has the rows alone.
    everywhere, predicted = (0.25, (len(ids), 32)), (0.25, (len(rows), 32))
    assert elsewhere == [*[everywhere] * 3, *[predicted] * 2]
    assert weights == [0.25] * 2


def test_dropout_keeps_the_mean():
    model = random_bert(tiny("bert-base")).train()
    ids, *sequences = batch()
    with torch.no_grad():
        whole = model.embeddings(ids, sequences[0])
        model.dropout = 0.4
        dropped = model.embeddings(ids, sequences[0])
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.6)
    # 3,872 elements: their share is known to 0.008.
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize("name", ["bert-base", "cramfast-base"])
def test_layers_that_are_repeated_drop_the_same_again(name):
    model = random_bert(tiny(name)).train()
    model.dropout = 0.2
    ids, *sequences = batch()
    positions = torch.arange(0, len(ids), 3)
    found = []
    for model.activations in ("keep", "layers"):
        torch.manual_seed(3)
        loss = model(ids, *sequences, positions, ids[positions])
        used = [p for n, p in model.named_parameters() if "token_types" not in n]
        found.append([loss.detach(), *torch.autograd.grad(loss, used)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_dropout_is_a_share(share):
    with pytest.raises(ValueError, match=f"dropout is {share}"):
        Bert(tiny("bert-base"), dropout=share)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [local(), local(window=20, every=2, layers=3), local(every=1)])
def test_local_layers_are_those_of_modernbert(config, attention):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    model = random_bert(config)
    hf_config = ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        decoder_bias=False,
        local_attention=2 * config.window,
        global_attn_every_n_layers=config.global_every,
        pad_token_id=0,
    )
    assert [kind == "sliding_attention" for kind in hf_config.layer_types] == [
        config.is_local(number) for number in range(config.num_layers)
    ]
    state = rename(model.state_dict(), NAMES)
    state["decoder.weight"] = state["model.embeddings.tok_embeddings.weight"]
    theirs = load_hf(ModernBertForMaskedLM, hf_config, state, attention)
    assert (logits(model) - padded_logits(theirs)).abs().max() <= FP32_TOLERANCE


def test_no_preset_has_local_layers():
    assert not any(config.is_local(number) for config in PRESETS.values() for number in range(config.num_layers))


@pytest.mark.parametrize("options", [{"window": -1}, {"window": 4, "global_every": 0}])
def test_windows_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="window"):
        ModelConfig(211, 32, 2, 2, 48, **options)
