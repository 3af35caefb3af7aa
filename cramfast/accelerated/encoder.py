"""One encoder without padding for all architectures, over the modules that a model has already.

T tokens, C hidden size, I intermediate size, H heads, D head size, M rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..kernels import add_layer_norm, geglu, gelu, layer_norm, linear, varlen_attention
from ..layers import only
from .batch import Batch


@dataclass(frozen=True)
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

    def weights(self, dtype: torch.dtype) -> "Weights":
        """The linear layers' parameters in `dtype`, those of q, k and v as one for a single product.

        That copies the weights, which takes some microseconds on the device. It is far less to launch than three
        products, and than what autocast does for each parameter by itself.
        """
        groups = [[part.weight for part in self.qkv], [part.bias for part in self.qkv]]
        groups += [[p] for part in (self.out, self.wide, self.narrow) for p in (part.weight, part.bias)]
        if dtype == self.out.weight.dtype or torch.compiler.is_compiling():
            return Weights(*(None if group[0] is None else _joined(group, dtype) for group in groups))
        present = [group for group in groups if group[0] is not None]
        made = iter(_Together.apply(dtype, [len(group) for group in present], *(p for group in present for p in group)))
        return Weights(*(None if group[0] is None else next(made) for group in groups))

    def attend(self, weights: "Weights", x: torch.Tensor, batch: Batch, rows: torch.Tensor | None) -> torch.Tensor:
        """Attention and what follows it until the residual addition: (T, C) → (T, C), or (M, C) of `rows` alone."""
        cos, sin = self.tables
        qkv_T3HD = linear(x, weights.qkv, weights.qkv_bias).unflatten(-1, (3, self.heads, -1))
        dropout_p = self.attention_dropout if self.module.training else 0.0
        options = {"cos": cos, "sin": sin, "window": self.window, "dropout_p": dropout_p}
        attended = varlen_attention(qkv_T3HD, batch.cu_seqlens, batch.max_seqlen, **options).flatten(1)
        return self.out_dropout(linear(only(attended, rows), weights.out, weights.out_bias))

    def feed_forward(self, weights: "Weights", x: torch.Tensor) -> torch.Tensor:
        """The feed-forward network until the residual addition, (T, C) → (T, C)."""
        wide = linear(x, weights.wide, weights.wide_bias)
        x = (activate_gated if self.gated else activate)(self.activation, wide)
        if self.inner_dropout is not None:
            x = self.inner_dropout(x)
        return self.narrow_dropout(linear(x, weights.narrow, weights.narrow_bias))


class Weights(NamedTuple):
    """Of one layer, in the dtype of activations; qkv (3C, C)."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    wide: torch.Tensor
    wide_bias: torch.Tensor | None
    narrow: torch.Tensor
    narrow_bias: torch.Tensor | None


def _joined(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(dtype)


def _parts(whole: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return whole.chunk(count) if count > 1 else (whole,)


class _Together(torch.autograd.Function):
    """(dtype, sizes, *parameters) → `_joined` of each group of so many parameters, all groups in one go, and so are
    their gradients."""

    @staticmethod
    def forward(ctx, dtype, sizes, *parameters):
        ctx.sizes, ctx.dtype = sizes, parameters[0].dtype
        whole, views, first = [], [], 0
        for size in sizes:
            rows, *rest = parameters[first].shape
            whole.append(parameters[first].new_empty(size * rows, *rest, dtype=dtype))
            views += _parts(whole[-1], size)
            first += size
        torch._foreach_copy_(views, parameters)
        return tuple(whole)

    @staticmethod
    def backward(ctx, *grads):
        parts = [part for grad, size in zip(grads, ctx.sizes, strict=True) for part in _parts(grad, size)]
        wide = [part.new_empty(part.shape, dtype=ctx.dtype) for part in parts]
        torch._foreach_copy_(wide, parts)
        return None, None, *wide


def expect_plain(kind: type[nn.Module], *modules: nn.Module) -> None:
    """Raise ValueError for a module that is not exactly of this class: what another one adds would not be computed."""
    for module in modules:
        if type(module) is not kind:
            raise ValueError(f"cramfast.accelerate: a {type(module).__name__} in place of a torch.nn.{kind.__name__}")


def apply(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def add_norm(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual)."""
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def normalised(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def post_norm(layer: Layer, batch: Batch, rows: torch.Tensor | None, x: torch.Tensor, residual: None):
    """x → norm(x + attention(x)), then the same with the feed-forward network, as BERT. `residual` stays None."""
    weights = layer.weights(x.dtype)
    x, _ = add_norm(layer.attention_norm, layer.attend(weights, x, batch, rows), only(x, rows))
    x, _ = add_norm(layer.mlp_norm, layer.feed_forward(weights, x), x)
    return x, residual


def pre_norm(layer: Layer, batch: Batch, rows: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor | None):
    """x → x + attention(norm(x)), then the same with the feed-forward network, as ModernBERT.

    Takes and returns the last block's output and the stream that it has not been added to yet, so that each addition
    happens in the norm that follows it.
    """
    norm, weights = layer.attention_norm, layer.weights(x.dtype)
    if residual is None:
        x, residual = (x if norm is None else normalised(norm, x)), x
    elif norm is None:
        x = residual = x + residual
    else:
        x, residual = add_norm(norm, x, residual)
    x, residual = add_norm(layer.mlp_norm, layer.attend(weights, x, batch, rows), only(residual, rows))
    return layer.feed_forward(weights, x), residual


def run_layers(
    layers: list[Layer],
    block: Callable,
    final_norm: nn.LayerNorm | None,
    x: torch.Tensor,
    batch: Batch,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states (T, C) of embedded tokens x (T, C), or those (M, C) of `rows` (M,) alone, which is all that the
    last layer then computes behind its attention."""
    residual = None
    for layer in layers:
        run = partial(block, layer, batch, rows if layer is layers[-1] else None)
        if layer.module.training and getattr(layer.module, "gradient_checkpointing", False):
            x, residual = layer.module._gradient_checkpointing_func(run, x, residual)
        else:
            x, residual = run(x, residual)
    return x if final_norm is None else add_norm(final_norm, x, residual)[0]


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


def activate(activation: Callable, x: torch.Tensor) -> torch.Tensor:
    """The activation, fused where it is a GELU."""
    form = gelu_form(activation)
    return activation(x) if form is None else gelu(x, form)


def activate_gated(activation: Callable, packed: torch.Tensor) -> torch.Tensor:
    """(T, 2I) → (T, I): the activation of the first half times the second."""
    form = gelu_form(activation)
    if form is not None:
        return geglu(packed, form)
    value, gate = packed.chunk(2, dim=-1)
    return activation(value) * gate
