"""Where each architecture of transformers keeps what the encoder needs.

Modules are looked up on every call, so that what the owner of a model exchanges counts; those of layers in `_modules`,
which takes a tenth of the microsecond that an attribute takes. B sequences of S places, T tokens, C hidden size, V
vocabulary, P positions.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..kernels import Nodes, embed
from ..model import activation_dtype, rotary_tables
from .batch import Batch
from .encoder import NO_DROPOUT, Layer, activate, apply, dropped, expect_plain, normalised, post_norm, pre_norm

# Tables of rotary embedding are made for a multiple of so many places: a few serve all batches.
_TABLE_STEP = 256


@dataclass(frozen=True)
class Head:
    """The modules of a masked-language-modelling head, its decoder (V, C). Raises ValueError as `Layer` does."""

    dense: nn.Linear
    activation: Callable
    norm: nn.LayerNorm
    decoder: nn.Linear

    def __post_init__(self):
        expect_plain(nn.Linear, self.dense, self.decoder)
        expect_plain(nn.LayerNorm, self.norm)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """What the decoder is given, (M, C) → (M, C)."""
        return normalised(self.norm, activate(self.activation, apply(self.dense, x)))


@dataclass(frozen=True)
class Family:
    """How to read an architecture; all functions take the base model, `head` the one around it.

    layers(base, longest): for sequences of at most so many tokens. positions(base, input_ids): int64, expanding to
    (B, S); None where embeddings have no positions. offset(base): the first position of a sequence. relative: whether
    tokens know how far others are away, so that padding between them counts. counts_items: whether the loss is over
    `num_items_in_batch`, where that is given.
    """

    layers: Callable[[nn.Module, int], list[Layer]]
    head: Callable[[nn.Module], Head]
    block: Callable = post_norm
    positions: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    offset: Callable[[nn.Module], int] = lambda base: 0
    relative: bool = False
    counts_items: bool = False

    def longest(self, base: nn.Module) -> int | None:
        """Places that a sequence can have; None for any number."""
        if self.positions is None:
            return None
        return base.embeddings.position_embeddings.num_embeddings - self.offset(base)

    def embed(self, base: nn.Module, batch: Batch) -> torch.Tensor:
        """Embedded tokens (T, C) in the dtype of activations. Raises ValueError as `Layer` does."""
        embeddings = base.embeddings
        tokens = embeddings.tok_embeddings if self.relative else embeddings.word_embeddings
        norm = embeddings.norm if self.relative else embeddings.LayerNorm
        expect_plain(nn.LayerNorm, norm)
        position_ids, position_weight = _positions(embeddings, batch)
        embedded = embed(
            batch.input_ids,
            _table(tokens),
            norm.weight,
            norm.bias,
            position_ids=position_ids,
            position_weight=position_weight,
            eps=norm.eps,
            dtype=activation_dtype(tokens.weight),
        )
        embedded = dropped(Nodes, embeddings.drop if self.relative else embeddings.dropout, embedded)
        project = getattr(base, "embeddings_project", None)
        return embedded if project is None else apply(project, embedded)


def _positions(embeddings: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Which rows of a table (positions, or all sums of a token type's row and a position's) the tokens (T,) have."""
    if batch.positions is None:
        return None, None
    table, types = _table(embeddings.position_embeddings), getattr(embeddings, "token_type_embeddings", None)
    if types is None:
        return batch.positions, table
    if batch.token_types is None:
        return batch.positions, table + types.weight[0]
    return torch.add(batch.positions, batch.token_types, alpha=len(table)), (types.weight[:, None] + table).flatten(
        0, 1
    )


class _ZeroRowGradient(torch.autograd.Function):
    """A weight whose row's gradient is 0, as `torch.nn.Embedding` has it for its padding_idx."""

    @staticmethod
    def forward(ctx, weight, row):
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        # As large as the vocabulary. The embedding made it, for nobody else.
        if torch.compiler.is_compiling():
            grad = grad.clone()
        grad[ctx.row].zero_()
        return grad, None


def _table(embedding: nn.Embedding) -> torch.Tensor:
    expect_plain(nn.Embedding, embedding)
    weight, row = embedding.weight, embedding.padding_idx
    return weight if row is None or not weight.requires_grad else _ZeroRowGradient.apply(weight, row)


def _columns(_base: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device)


def _counted(base: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """RoBERTa's: tokens other than the padding token are counted from padding_idx + 1, that one is at padding_idx."""
    padding = base.embeddings.padding_idx
    others = input_ids.ne(padding).int()
    return (others.cumsum(1) * others).long() + padding


def _bert_layers(base: nn.Module, _longest: int) -> list[Layer]:
    return [_bert_layer(layer) for layer in base.encoder.layer]


def _bert_layer(layer: nn.Module) -> Layer:
    parts = layer._modules
    attention, wide, narrow = parts["attention"]._modules, parts["intermediate"], parts["output"]._modules
    inner, out = attention["self"], attention["output"]._modules
    within = inner._modules
    return Layer(
        module=layer,
        qkv=(within["query"], within["key"], within["value"]),
        heads=inner.num_attention_heads,
        attention_dropout=within["dropout"].p,
        out=out["dense"],
        out_dropout=out["dropout"],
        attention_norm=out["LayerNorm"],
        wide=wide._modules["dense"],
        activation=wide.intermediate_act_fn,
        narrow=narrow["dense"],
        narrow_dropout=narrow["dropout"],
        mlp_norm=narrow["LayerNorm"],
    )


def _distilbert_layers(base: nn.Module, _longest: int) -> list[Layer]:
    return [_distilbert_layer(layer) for layer in base.transformer.layer]


def _distilbert_layer(layer: nn.Module) -> Layer:
    parts = layer._modules
    attention, mlp = parts["attention"]._modules, parts["ffn"]._modules
    return Layer(
        module=layer,
        qkv=(attention["q_lin"], attention["k_lin"], attention["v_lin"]),
        heads=parts["attention"].n_heads,
        attention_dropout=attention["dropout"].p,
        out=attention["out_lin"],
        out_dropout=NO_DROPOUT,
        attention_norm=parts["sa_layer_norm"],
        wide=mlp["lin1"],
        activation=parts["ffn"].activation,
        narrow=mlp["lin2"],
        narrow_dropout=mlp["dropout"],
        mlp_norm=parts["output_layer_norm"],
    )


def _modernbert_layers(base: nn.Module, longest: int) -> list[Layer]:
    config, device = base.config, base.final_norm.weight.device
    size = config.hidden_size // config.num_attention_heads
    local, thetas = _local_layers(config), _thetas(config)
    make = rotary_tables if torch.compiler.is_compiling() else _remembered_tables
    longest = (longest + _TABLE_STEP - 1) // _TABLE_STEP * _TABLE_STEP
    tables = {kind: make(longest, size, thetas[kind], device) for kind in {*local}}
    return [
        _modernbert_layer(layer, config, is_local, tables[is_local])
        for layer, is_local in zip(base.layers, local, strict=True)
    ]


@functools.lru_cache(maxsize=32)
def _remembered_tables(longest: int, size: int, theta: float, device: torch.device):
    # They outlive the pass that makes them, which autograd allows only of tensors made outside of inference mode.
    with torch.inference_mode(False):
        return rotary_tables(longest, size, theta, device)


def _modernbert_layer(layer: nn.Module, config, is_local: bool, tables: tuple[torch.Tensor, torch.Tensor]) -> Layer:
    parts = layer._modules
    attention, mlp, norm = parts["attn"]._modules, parts["mlp"]._modules, parts["attn_norm"]
    return Layer(
        module=layer,
        qkv=(attention["Wqkv"],),
        heads=config.num_attention_heads,
        attention_dropout=parts["attn"].attention_dropout,
        out=attention["Wo"],
        out_dropout=attention["out_drop"],
        attention_norm=None if isinstance(norm, nn.Identity) else norm,
        wide=mlp["Wi"],
        activation=parts["mlp"].act,
        narrow=mlp["Wo"],
        narrow_dropout=NO_DROPOUT,
        mlp_norm=parts["mlp_norm"],
        gated=True,
        inner_dropout=mlp["drop"],
        window=config.local_attention // 2 if is_local else None,
        tables=tables,
    )


def _local_layers(config) -> list[bool]:
    """Which layers see a window alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    return [number % config.global_attn_every_n_layers != 0 for number in range(config.num_hidden_layers)]


def _thetas(config) -> dict[bool, float]:
    """The base of rotary embedding, by whether a layer is local. Raises ValueError for a scaled one."""
    stored = getattr(config, "rope_parameters", None)
    if not stored:  # as in transformers 4
        theta = config.local_rope_theta
        return {False: config.global_rope_theta, True: config.global_rope_theta if theta is None else theta}
    thetas = {}
    for is_local, kind in ((False, "full_attention"), (True, "sliding_attention")):
        rope = stored.get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"cramfast.accelerate: rotary embedding of type {rope['rope_type']}, expected default")
        thetas[is_local] = rope.get("rope_theta")
    return thetas


def _bert_head(model: nn.Module) -> Head:
    transform = model.cls.predictions.transform
    return Head(transform.dense, transform.transform_act_fn, transform.LayerNorm, model.cls.predictions.decoder)


def _roberta_head(model: nn.Module) -> Head:
    return Head(model.lm_head.dense, nn.GELU(), model.lm_head.layer_norm, model.lm_head.decoder)


def _distilbert_head(model: nn.Module) -> Head:
    return Head(model.vocab_transform, model.activation, model.vocab_layer_norm, model.vocab_projector)


def _electra_head(model: nn.Module) -> Head:
    transform = model.generator_predictions
    return Head(transform.dense, transform.activation, transform.LayerNorm, model.generator_lm_head)


def _modernbert_head(model: nn.Module) -> Head:
    return Head(model.head.dense, model.head.act, model.head.norm, model.decoder)


FAMILIES = {
    "BertModel": Family(_bert_layers, _bert_head, positions=_columns),
    "RobertaModel": Family(
        _bert_layers, _roberta_head, positions=_counted, offset=lambda base: base.embeddings.padding_idx + 1
    ),
    "DistilBertModel": Family(_distilbert_layers, _distilbert_head, positions=_columns),
    "ElectraModel": Family(_bert_layers, _electra_head, positions=_columns),
    "ModernBertModel": Family(_modernbert_layers, _modernbert_head, pre_norm, relative=True, counts_items=True),
}
"""By the class of the base model."""
