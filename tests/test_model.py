"""The model is what its presets say: logits against transformers and against a plain PyTorch model written here.

Shapes: T tokens of an unpadded batch, B sequences, S places in the longest one, C hidden size, H heads, D head size,
M predictions, V vocabulary. Weights are random throughout, norms and biases too: nothing is zero or one, so nothing can
be left out or swapped unseen.
"""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from cramfast.config import PRESETS
from cramfast.errors import UserError
from cramfast.layers import FusedAddLayerNorm, FusedGEGLU, FusedGELU, FusedLayerNorm, UnpaddedSelfAttention
from cramfast.model import Bert

pytestmark = pytest.mark.usefixtures("reference")

VOCAB = 211
LENGTHS = (40, 1, 63, 17)
POST_NORM = tuple(name for name, config in PRESETS.items() if config.norm == "post")
ROTARY = tuple(name for name, config in PRESETS.items() if config.positions == "rotary")

# A logit of size 1 to 10 carries up to 1e-6 of rounding in fp32, and a few dozen layers pass it on some ten times.
FP32_TOLERANCE = 1e-4


def small(name):
    """The preset in two layers, a first one and another, over a small vocabulary."""
    return replace(PRESETS[name], vocab_size=VOCAB, num_layers=2)


def tiny(name):
    """The preset's architecture in two layers of 32."""
    return replace(small(name), hidden_size=32, num_heads=2, intermediate_size=48, max_positions=64)


def random_bert(config, seed=0):
    model = Bert(config).eval()
    generator = torch.Generator().manual_seed(seed)
    scales = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05 if parameter.ndim == 2 else 0.2, generator=generator)
            if id(parameter) in scales:
                parameter += 1
    return model


def batch(lengths=LENGTHS, vocab=VOCAB, seed=0):
    ids = torch.randint(vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return ids, torch.tensor((0, *lengths)).cumsum(0).int(), max(lengths)


def pad(ids, lengths):
    """(B, S) ids and the mask of what is not padding."""
    return pad_sequence(ids.split(lengths), batch_first=True), torch.arange(max(lengths)) < torch.tensor(lengths)[
        :, None
    ]


@torch.no_grad()
def logits(model, lengths=LENGTHS):
    return model.predict(model.encode(*batch(lengths)))


@torch.no_grad()
def padded_logits(hf_model, lengths=LENGTHS):
    ids_BS, mask_BS = pad(batch(lengths)[0], lengths)
    return hf_model(input_ids=ids_BS, attention_mask=mask_BS.long()).logits[mask_BS]


def rename(state, names):
    """`state` with the start of every key replaced by the first pattern of `names` that matches it."""
    renamed = {}
    for key, tensor in state.items():
        old, new = next((old, new) for old, new in names.items() if re.match(old, key))
        renamed[re.sub(f"^{old}", new, key)] = tensor
    return renamed


BERT_NAMES = {
    r"embeddings\.tokens": "bert.embeddings.word_embeddings",
    r"embeddings\.positions": "bert.embeddings.position_embeddings",
    r"embeddings\.token_types": "bert.embeddings.token_type_embeddings",
    r"embeddings\.norm": "bert.embeddings.LayerNorm",
    r"layers\.(\d+)\.attention\.out": r"bert.encoder.layer.\1.attention.output.dense",
    r"layers\.(\d+)\.attention_norm": r"bert.encoder.layer.\1.attention.output.LayerNorm",
    r"layers\.(\d+)\.attention\.(query|key|value)": r"bert.encoder.layer.\1.attention.self.\2",
    r"layers\.(\d+)\.mlp\.0": r"bert.encoder.layer.\1.intermediate.dense",
    r"layers\.(\d+)\.mlp\.2": r"bert.encoder.layer.\1.output.dense",
    r"layers\.(\d+)\.mlp_norm": r"bert.encoder.layer.\1.output.LayerNorm",
    r"head\.transform\.0": "cls.predictions.transform.dense",
    r"head\.transform\.2": "cls.predictions.transform.LayerNorm",
    r"head\.bias": "cls.predictions.bias",
}


def to_hf_bert(model, attention):
    """`transformers.BertForMaskedLM` with the weights of `model`."""
    from transformers import BertConfig, BertForMaskedLM

    config = model.config
    assert (config.norm, config.positions, config.norm_bias, config.linear_bias, config.decoder_bias) == (
        "post",
        "learned",
        True,
        True,
        True,
    )
    hf_config = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.activation,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.token_types,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.norm_eps,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    state = {}
    for key, tensor in model.state_dict().items():
        if ".qkv." in key:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[key.replace("qkv", part)] = third
        else:
            state[key] = tensor
    state = rename(state, BERT_NAMES)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    return load_hf(BertForMaskedLM, hf_config, state, attention)


MODERNBERT_NAMES = {
    r"embeddings\.tokens": "model.embeddings.tok_embeddings",
    r"embeddings\.norm": "model.embeddings.norm",
    r"layers\.(\d+)\.attention\.qkv": r"model.layers.\1.attn.Wqkv",
    r"layers\.(\d+)\.attention\.out": r"model.layers.\1.attn.Wo",
    r"layers\.(\d+)\.attention_norm": r"model.layers.\1.attn_norm",
    r"layers\.(\d+)\.mlp\.0": r"model.layers.\1.mlp.Wi",
    r"layers\.(\d+)\.mlp\.2": r"model.layers.\1.mlp.Wo",
    r"layers\.(\d+)\.mlp_norm": r"model.layers.\1.mlp_norm",
    r"final_norm": "model.final_norm",
    r"head\.transform\.0": "head.dense",
    r"head\.transform\.2": "head.norm",
    r"head\.bias": "decoder.bias",
}


def to_modernbert(model, attention):
    """`transformers.ModernBertForMaskedLM`, all layers global, with the weights of `model`."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = model.config
    assert (config.norm, config.first_norm, config.positions, config.activation) == ("pre", False, "rotary", "geglu")
    hf_config = ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        hidden_activation="gelu",
        max_position_embeddings=config.max_positions,
        initializer_range=config.initializer_range,
        norm_eps=config.norm_eps,
        norm_bias=config.norm_bias,
        attention_bias=config.linear_bias,
        mlp_bias=config.linear_bias,
        classifier_bias=config.linear_bias,
        classifier_activation="gelu",
        decoder_bias=config.decoder_bias,
        layer_types=["full_attention"] * config.num_layers,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": config.rope_theta}},
        attention_dropout=0.0,
        embedding_dropout=0.0,
        mlp_dropout=0.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        tie_word_embeddings=True,
    )
    state = rename(model.state_dict(), MODERNBERT_NAMES)
    state["decoder.weight"] = state["model.embeddings.tok_embeddings.weight"]
    return load_hf(ModernBertForMaskedLM, hf_config, state, attention)


def load_hf(cls, hf_config, state, attention):
    # Not cls(hf_config) and load_state_dict: drawing initial weights takes longer than all the rest.
    hf_model, keys = cls.from_pretrained(
        None, config=hf_config, state_dict=state, attn_implementation=attention, output_loading_info=True
    )
    assert not any(keys.values()), keys
    assert hf_model.config._attn_implementation == attention
    return hf_model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", POST_NORM)
def test_bert_is_that_of_transformers(name, attention):
    model = random_bert(small(name))
    assert (logits(model) - padded_logits(to_hf_bert(model, attention))).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ROTARY)
def test_cramfast_is_a_modernbert(name, attention):
    model = random_bert(small(name))
    assert (logits(model) - padded_logits(to_modernbert(model, attention))).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize(("name", "convert"), [("bert-base", to_hf_bert), ("cramfast-base", to_modernbert)])
def test_base_models_at_full_depth_and_width(name, convert):
    model = random_bert(replace(PRESETS[name], vocab_size=VOCAB))
    assert len(model.layers) == PRESETS[name].num_layers
    assert (logits(model) - padded_logits(convert(model, "sdpa"))).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize(("name", "convert"), [("bert-mini", to_hf_bert), ("cramfast-tiny", to_modernbert)])
def test_sequences_as_long_as_the_model_takes(name, convert):
    model = random_bert(small(name))
    lengths = (model.config.max_positions, 3)
    assert (logits(model, lengths) - padded_logits(convert(model, "sdpa"), lengths)).abs().max() <= FP32_TOLERANCE


def test_bert_agrees_to_the_last_digits_of_fp64():
    model = random_bert(small("bert-mini")).double()
    # Far below what another eps, GELU or scale would do; transformers' own BERT has no fp32 inside.
    assert (logits(model) - padded_logits(to_hf_bert(model, "eager").double())).abs().max() <= 1e-12


def test_bert_base_has_the_parameters_of_the_original():
    with torch.device("meta"):
        model = Bert(PRESETS["bert-base"])
    # bert-base-uncased with its masked-language-modelling head, decoder tied.
    assert sum(p.numel() for p in model.parameters()) == 109_514_298


def crammed_bert_formula(state, config, ids_BS, mask_BS):
    """Logits (B, S, V): crammed-bert in plain PyTorch, padded, from a cramfast state dict."""
    heads, width = config.num_heads, config.hidden_size
    allowed_BHSS = mask_BS[:, None, None, :]

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    place, channel = torch.arange(ids_BS.shape[1])[:, None], torch.arange(width)
    angle = place / 10_000 ** (channel // 2 * 2 / width).double()
    sinusoid_SC = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    x = state["embeddings.tokens.weight"][ids_BS]
    x = x + state["embeddings.positions.scale"] * sinusoid_SC.to(x.dtype)
    x = norm(x, "embeddings.norm")
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        qkv = norm(x, f"{layer}.attention_norm") @ state[f"{layer}.attention.qkv.weight"].T
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.split(width, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_BHSS).transpose(1, 2).flatten(2)
        x = x + attended @ state[f"{layer}.attention.out.weight"].T
        inner = norm(x, f"{layer}.mlp_norm") @ state[f"{layer}.mlp.0.weight"].T
        gate, value = inner.split(config.intermediate_size, dim=-1)
        x = x + (F.gelu(gate) * value) @ state[f"{layer}.mlp.2.weight"].T
    return norm(x, "final_norm") @ state["embeddings.tokens.weight"].T


@pytest.mark.parametrize(("layers", "dtype"), [(16, torch.float32), (2, torch.float64)])
def test_crammed_bert_is_that_of_the_paper(layers, dtype):
    config = replace(PRESETS["crammed-bert"], vocab_size=VOCAB, num_layers=layers)
    model = random_bert(config).to(dtype)
    # The sinusoid is a table in fp32, whatever the model's dtype.
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else 1e-5
    ids_BS, mask_BS = pad(batch()[0], LENGTHS)
    with torch.no_grad():
        expected = crammed_bert_formula(model.state_dict(), config, ids_BS, mask_BS)[mask_BS]
    assert (logits(model) - expected).abs().max() <= tolerance


def test_parameters_of_crammed_bert():
    config = PRESETS["crammed-bert"]
    with torch.device("meta"):
        model = Bert(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert round(matrices / 1e6, 1) == 119.5
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(linears) == 4 * config.num_layers
    assert all(linear.bias is None for linear in linears)
    assert len(norms) == 2 * config.num_layers + 2
    assert all(norm.eps == 1e-12 and norm.weight.shape == norm.bias.shape == (768,) for norm in norms)
    assert model.head.transform is None and model.head.bias is None
    # Besides matrices and norms, only the sinusoid's scale.
    assert sum(p.numel() for p in model.parameters()) == matrices + len(norms) * 2 * 768 + 1


def test_initial_weights_of_crammed_bert():
    torch.manual_seed(0)
    model = Bert(small("crammed-bert"))
    assert model.embeddings.positions.scale.item() == pytest.approx(768**-0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            # 160,000 entries or more: their deviation is known to 1/sqrt(2 n), 5 of which make 1 %.
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.01)
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_crammed_bert_costs_623_mflop_a_token():
    flops = PRESETS["crammed-bert"].flops_per_token(predicted=0.25, mean_attended=128)
    assert flops == pytest.approx(623e6, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_flops_of_the_matrix_products_are_those_counted(name):
    config = tiny(name)
    ids, *sequences = batch()
    positions = torch.arange(0, len(ids), 3)

    def counted(**options):
        with FlopCounterMode(display=False) as counter:
            Bert(config, **options)(ids, *sequences, positions, ids[positions]).backward()
        flops = counter.get_flop_counts()["Global"].items()
        # Attention is left out: its backward may compute the scores again, which is no work by definition.
        return sum(n for operator, n in flops if str(operator) in ("aten.mm", "aten.addmm"))

    expected = len(ids) * config.flops_per_token(len(positions) / len(ids), 0)
    assert counted(sparse_last_layer=False) == pytest.approx(expected)
    # The definition counts the last layer in full; of what follows its attention, predicted tokens alone are computed.
    up = config.intermediate_size * (2 if config.activation == "geglu" else 1)
    weights = config.hidden_size * (config.hidden_size + up + config.intermediate_size)
    assert counted() == pytest.approx(expected - 6 * weights * (len(ids) - len(positions)))


@pytest.mark.parametrize("name", PRESETS)
def test_loss_is_the_cross_entropy_of_the_predictions(name):
    model = random_bert(tiny(name)).double()
    ids, cu_seqlens, max_seqlen = batch()
    positions = torch.tensor([0, 5, 40, 41, 100])
    labels = torch.tensor([7, -100, 0, 210, 3])
    loss = model(ids, cu_seqlens, max_seqlen, positions, labels)
    expected = F.cross_entropy(model.predict(model.encode(ids, cu_seqlens, max_seqlen)[positions]), labels)
    # The same fp64 sums in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_the_last_layer_on_predicted_tokens_alone_changes_nothing(name):
    model = random_bert(tiny(name)).double()
    ids, *sequences = batch()
    positions = torch.tensor([0, 5, 40, 41, 100])
    results = []
    for model.sparse_last_layer in (True, False):
        loss = model(ids, *sequences, positions, ids[positions])
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    hidden = model.encode(ids, *sequences)
    torch.testing.assert_close(model.encode(ids, *sequences, positions), hidden[positions], rtol=0, atol=1e-12)
    # The same fp64 sums in another order.
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_takes_the_memory_that_the_model_is_given(name):
    ids, *sequences = batch()
    positions = torch.arange(0, len(ids), 3)
    assert [Bert(tiny(name), **given).head.memory for given in ({}, {"memory": "low"})] == ["fast", "low"]
    with pytest.raises(ValueError, match="mlm_loss: memory is 'none', expected one of 'fast', 'low'"):
        Bert(tiny(name), memory="none")(ids, *sequences, positions, ids[positions])


@pytest.mark.parametrize("name", PRESETS)
def test_a_sequence_does_not_see_its_neighbours(name):
    model = random_bert(tiny(name)).double()
    ids, cu_seqlens, max_seqlen = batch((40, 1, 0, 63, 17))
    with torch.no_grad():
        together = model.encode(ids, cu_seqlens, max_seqlen)
        for start, end in pairwise(cu_seqlens):
            length = int(end - start)
            alone = model.encode(ids[start:end], torch.tensor([0, length], dtype=torch.int32), length)
            # The same fp64 sums in another order.
            torch.testing.assert_close(together[start:end], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_hidden_states_depend_on_place_and_on_every_token_of_the_sequence(name):
    model = random_bert(tiny(name)).double()
    ids = torch.arange(10, 20)
    changed = ids.clone()
    changed[9] = 5
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32)
    with torch.no_grad():
        hidden, other, turned = (model.encode(x, cu_seqlens, 10) for x in (ids, changed, ids.flip(0)))
    # Bidirectional: the last token is seen by all.
    assert ((hidden - other).abs().amax(-1) > 1e-6).all()
    assert ((hidden - turned.flip(0)).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_reach_every_parameter(name):
    model = random_bert(tiny(name))
    ids, cu_seqlens, max_seqlen = batch()
    positions = torch.arange(0, len(ids), 3)
    model(ids, cu_seqlens, max_seqlen, positions, ids[positions]).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        if parameter_name == "embeddings.token_types.weight":
            # Pretraining has one token type.
            assert parameter.grad[0].any() and not parameter.grad[1].any()
        elif parameter_name == "embeddings.positions.weight":
            assert parameter.grad[:max_seqlen].any(-1).all() and not parameter.grad[max_seqlen:].any()
        elif parameter.ndim == 2:
            assert parameter.grad.any(-1).all(), parameter_name
        else:
            assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", PRESETS)
def test_autocast_gives_bf16_activations_and_an_fp32_loss(name):
    model = random_bert(tiny(name))
    ids, cu_seqlens, max_seqlen = batch()
    positions = torch.arange(0, len(ids), 3)
    exact = model(ids, cu_seqlens, max_seqlen, positions, ids[positions])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encode(ids, cu_seqlens, max_seqlen).dtype == torch.bfloat16
        loss = model(ids, cu_seqlens, max_seqlen, positions, ids[positions])
    assert loss.dtype == torch.float32
    # Logits below 4 in size are wrong by some eps of bf16 (0.008) each, and their errors average out over 41 rows.
    torch.testing.assert_close(loss, exact, rtol=0, atol=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedAddLayerNorm])
def test_norms_stand_in_for_those_of_torch(cls, bias):
    theirs = nn.LayerNorm(96, eps=1e-3, bias=bias)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = cls(96, eps=1e-3, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 3, 5, 96)
    if cls is FusedLayerNorm:
        assert torch.equal(ours(x), theirs(x))
    else:
        y, s = ours(x, residual)
        assert torch.equal(s, x + residual) and torch.equal(y, theirs(x + residual))
        y, s = ours(x)
        assert s is x and torch.equal(y, theirs(x))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_stand_in_for_those_of_torch(approximate):
    theirs, ours = nn.GELU(approximate), FusedGELU(approximate)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 96)
    gate, value = x.chunk(2, -1)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(FusedGEGLU(approximate)(x), theirs(gate) * value)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_multi_head_attention_of_torch(bias):
    theirs = nn.MultiheadAttention(96, 3, bias=bias, batch_first=True).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = UnpaddedSelfAttention(96, 3, bias).double()
    names = {"in_proj_": "qkv.", "out_proj": "out"}
    ours.load_state_dict(rename(theirs.state_dict(), names))
    _, cu_seqlens, max_seqlen = batch()
    x = torch.randn(sum(LENGTHS), 96, dtype=torch.float64)
    expected = torch.cat([theirs(part, part, part, need_weights=False)[0] for part in x.split(LENGTHS)])
    # The same fp64 sums in another order, on outputs of size 1 to 10.
    torch.testing.assert_close(ours(x, cu_seqlens, max_seqlen), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedAddLayerNorm])
@pytest.mark.parametrize("arguments", [((4, 8),), (8, 1e-5, False)])
def test_norms_refuse_what_the_kernel_does_not_do(cls, arguments):
    with pytest.raises(ValueError, match=f"{cls.__name__} normalises one dimension with a learned weight"):
        cls(*arguments)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(UserError, match="hidden size 768 is not a multiple of 7 heads"):
        replace(PRESETS["bert-base"], num_heads=7)
