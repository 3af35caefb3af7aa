"""One encoder without padding for all architectures, over the modules that a model has already.

T tokens, C hidden size, I intermediate size, H heads, D head size, M rows.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..kernels import Nodes, Pass, Tape, linear, one_node, tape_serves
from .batch import Batch
from .weights import Groups, Weights, copied, groups_of, joined, parameters_of

Run = type[Nodes] | Tape
"""Whose methods compute the operators of a layer."""

NO_DROPOUT = nn.Identity()


@dataclass(slots=True)
class Layer:
    """The modules of one layer, by what they do.

    module: the layer itself, which knows of gradient checkpointing. qkv: one product for all three, or three.
    attention_norm is None where there is none. gated: `wide` gives (T, 2I), and the activation of the first half is
    multiplied by the second. inner_dropout: in front of `narrow`. window: a token sees those at most this many places
    away. tables: cos and sin (longest, D/2) of rotary embedding.

    Raises ValueError where a linear layer or norm is of another class than torch's, like one with an adapter.
    """

    module: nn.Module
    qkv: tuple[nn.Linear, ...]
    heads: int
    attention_dropout: float
    out: nn.Linear
    out_dropout: nn.Module
    attention_norm: nn.LayerNorm | None
    wide: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    narrow: nn.Linear
    narrow_dropout: nn.Module
    mlp_norm: nn.LayerNorm
    gated: bool = False
    inner_dropout: nn.Module | None = None
    window: int | None = None
    tables: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)

    def __post_init__(self):
        expect_plain(nn.Linear, *self.qkv, self.out, self.wide, self.narrow)
        expect_plain(nn.LayerNorm, *((self.attention_norm,) if self.attention_norm is not None else ()), self.mlp_norm)

    def groups(self) -> Groups:
        """The parameters of its four products."""
        return groups_of(self.qkv, self.out, self.wide, self.narrow)

    def attend(
        self, run: Run, weights: Weights, x: torch.Tensor, batch: Batch, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention and the product behind it: (T, C) → (T, C), or (M, C) of `rows` alone."""
        cos, sin = self.tables
        dropout_p = self.attention_dropout if self.module.training else 0.0
        options = {"cos": cos, "sin": sin, "window": self.window, "dropout_p": dropout_p}
        qkv = run.linear(x, weights.qkv, weights.qkv_bias)
        attended = run.attend(qkv, self.heads, batch.cu_seqlens, batch.max_seqlen, **options)
        return run.linear(only(run, attended, rows), weights.out, weights.out_bias)

    def feed_forward(self, run: Run, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward network, (T, C) → (T, C)."""
        wide = run.linear(x, weights.wide, weights.wide_bias)
        x = (activate_gated if self.gated else activate)(self.activation, wide, run)
        if self.inner_dropout is not None:
            x = dropped(run, self.inner_dropout, x)
        return run.linear(x, weights.narrow, weights.narrow_bias)


def expect_plain(kind: type[nn.Module], *modules: nn.Module) -> None:
    """Raise ValueError for a module that is not exactly of this class: what another one adds would not be computed."""
    for module in modules:
        if type(module) is not kind:
            raise ValueError(f"cramfast.accelerate: a {type(module).__name__} in place of a torch.nn.{kind.__name__}")


def apply(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def only(run: Run, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows `rows` (M,) of x (T, C), none of them twice; None: x itself."""
    return x if rows is None else run.select_rows(x, rows)


def dropped(run: Run, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x after a module for dropout."""
    if type(module) is nn.Dropout:
        return run.dropout(x, module.p) if module.training else x
    return module(x)


def add_norm(run: Run, norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor, dropout: nn.Module = NO_DROPOUT):
    """(norm(x + residual), x + residual), of x after a module for dropout."""
    p = 0.0
    if type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else p
    else:
        x = dropout(x)
    return run.add_layer_norm(x, residual, *parameters_of(norm), norm.eps, p)


def normalised(norm: nn.LayerNorm, x: torch.Tensor, run: Run = Nodes) -> torch.Tensor:
    return run.layer_norm(x, *parameters_of(norm), norm.eps)


def post_norm(
    run: Run, layer: Layer, weights: Weights, batch: Batch, rows: torch.Tensor | None, x: torch.Tensor, residual: None
):
    """x → norm(x + attention(x)), then the same with the feed-forward network, as BERT. `residual` stays None."""
    attended = layer.attend(run, weights, x, batch, rows)
    x, _ = add_norm(run, layer.attention_norm, attended, only(run, x, rows), layer.out_dropout)
    x, _ = add_norm(run, layer.mlp_norm, layer.feed_forward(run, weights, x), x, layer.narrow_dropout)
    return x, residual


def pre_norm(
    run: Run,
    layer: Layer,
    weights: Weights,
    batch: Batch,
    rows: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
):
    """x → x + attention(norm(x)), then the same with the feed-forward network, as ModernBERT.

    Takes and returns the last block's output and the stream that it has not been added to yet, so that each addition
    happens in the norm that follows it.
    """
    norm = layer.attention_norm
    if residual is None:
        x, residual = (x if norm is None else normalised(norm, x, run)), x
    elif norm is None:
        x = residual = x + residual
    else:
        x, residual = add_norm(run, norm, x, residual)
    attended = layer.attend(run, weights, x, batch, rows)
    x, residual = add_norm(run, layer.mlp_norm, attended, only(run, residual, rows), layer.out_dropout)
    return dropped(run, layer.narrow_dropout, layer.feed_forward(run, weights, x)), residual


def run_layers(
    block: Callable,
    layers: list[Layer],
    final_norm: nn.LayerNorm | None,
    x: torch.Tensor,
    batch: Batch,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states (T, C) of embedded tokens x (T, C), or those (M, C) of `rows` (M,) alone, which is all that the
    last layer then computes behind its attention."""
    residual, device = None, x.device.type
    taped = fits_tapes(layers, x, batch)
    # What runs on a tape has its dtypes already, and autocast takes long to see it.
    with torch.autocast(device, enabled=False) if taped and torch.is_autocast_enabled(device) else nullcontext():
        for layer, run in zip(layers, (_taped if taped else _by_nodes)(layers, block, x, batch, rows), strict=True):
            if layer.module.training and getattr(layer.module, "gradient_checkpointing", False):
                x, residual = layer.module._gradient_checkpointing_func(run, x, residual)
            else:
                x, residual = run(x, residual)
    return x if final_norm is None else add_norm(Nodes, final_norm, x, residual)[0]


def _by_nodes(layers, block, x, batch, rows):
    """What computes each layer, (x, residual) → (x, residual), with a node for each operator."""

    def run(layer, rows, x, residual):
        return block(Nodes, layer, joined(layer.groups(), x.dtype), batch, rows, x, residual)

    return [partial(run, layer, rows if layer is layers[-1] else None) for layer in layers]


def fits_tapes(layers: list[Layer], x: torch.Tensor, batch: Batch) -> bool:
    """Whether layers can be a node each: of modules that a tape knows, all on kernels."""
    first = layers[0]
    return tape_serves(x, first.heads, batch.max_seqlen, first.tables[0] is not None) and all(
        gelu_form(layer.activation) is not None
        and {type(layer.out_dropout), type(layer.narrow_dropout), type(layer.inner_dropout)} <= _TAPED_DROPOUTS
        and (layer is first or layer.attention_norm is not None)
        for layer in layers
    )


def _taped(layers, block, x, batch, rows):
    """As `_by_nodes`, with a node for each layer."""
    groups = [layer.groups() for layer in layers]
    weights, common = copied(groups, x.dtype), Pass(len(layers))
    if any(layer.module.training for layer in layers):
        # Before the first layer, since checkpointing sets torch's generator back to where that began.
        common.seed(0, x.device)

    def run(layer, groups, weights, number, rows, x, residual):
        made_of = [(x, (x,))] if residual is None else [(x, (x,)), (residual, (residual,))]
        made_of += [made for made in zip(weights, groups, strict=True) if made[1] is not None]
        for norm in (layer.attention_norm, layer.mlp_norm):
            if norm is not None:
                made_of += [(parameter, (parameter,)) for parameter in parameters_of(norm) if parameter is not None]
        tape = Tape(common, number)
        return one_node(lambda tape: block(tape, layer, weights, batch, rows, x, residual), tape, made_of)

    each = zip(layers, groups, weights, range(len(layers)), strict=True)
    return [partial(run, layer, *rest, rows if layer is layers[-1] else None) for layer, *rest in each]


_TAPED_DROPOUTS = {nn.Dropout, nn.Identity, type(None)}
_GELUS = {
    "GELUActivation": "none",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "AccurateGELUActivation": "tanh",
}


def gelu_form(activation: Callable) -> str | None:
    """Which form of GELU an activation of transformers is, "none" or "tanh"; None where it is something else."""
    return activation.approximate if isinstance(activation, nn.GELU) else _GELUS.get(type(activation).__name__)


def activate(activation: Callable, x: torch.Tensor, run: Run = Nodes) -> torch.Tensor:
    """The activation, fused where it is a GELU."""
    form = gelu_form(activation)
    return activation(x) if form is None else run.gelu(x, form)


def activate_gated(activation: Callable, packed: torch.Tensor, run: Run) -> torch.Tensor:
    """(T, 2I) → (T, I): the activation of the first half times the second."""
    form = gelu_form(activation)
    if form is not None:
        return run.geglu(packed, form)
    value, gate = packed.chunk(2, dim=-1)
    return activation(value) * gate
