"""One encoder without padding for all architectures, over the modules that a model has already.

T tokens, C hidden size, I intermediate size, H heads, D head size, M rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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

    def attend(self, x: torch.Tensor, batch: Batch, rows: torch.Tensor | None) -> torch.Tensor:
        """Attention and what follows it until the residual addition: (T, C) → (T, C), or (M, C) of `rows` alone."""
        cos, sin = self.tables
        qkv_T3HD = self._project(x).unflatten(-1, (3, self.heads, -1))
        dropout_p = self.attention_dropout if self.module.training else 0.0
        options = {"cos": cos, "sin": sin, "window": self.window, "dropout_p": dropout_p}
        attended = varlen_attention(qkv_T3HD, batch.cu_seqlens, batch.max_seqlen, **options).flatten(1)
        return self.out_dropout(apply(self.out, only(attended, rows)))

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """(T, C) → (T, 3C). Three weights are put together for one product: that copies them, some microseconds, and
        is less to launch than three products whose results are put together."""
        if len(self.qkv) == 1:
            return apply(self.qkv[0], x)
        weight = torch.cat([part.weight for part in self.qkv])
        bias = None if self.qkv[0].bias is None else torch.cat([part.bias for part in self.qkv])
        return linear(x, weight, bias)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward network until the residual addition, (T, C) → (T, C)."""
        x = (activate_gated if self.gated else activate)(self.activation, apply(self.wide, x))
        if self.inner_dropout is not None:
            x = self.inner_dropout(x)
        return self.narrow_dropout(apply(self.narrow, x))


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
    x, _ = add_norm(layer.attention_norm, layer.attend(x, batch, rows), only(x, rows))
    x, _ = add_norm(layer.mlp_norm, layer.feed_forward(x), x)
    return x, residual


def pre_norm(layer: Layer, batch: Batch, rows: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor | None):
    """x → x + attention(norm(x)), then the same with the feed-forward network, as ModernBERT.

    Takes and returns the last block's output and the stream that it has not been added to yet, so that each addition
    happens in the norm that follows it.
    """
    norm = layer.attention_norm
    if residual is None:
        x, residual = (x if norm is None else normalised(norm, x)), x
    elif norm is None:
        x = residual = x + residual
    else:
        x, residual = add_norm(norm, x, residual)
    x, residual = add_norm(layer.mlp_norm, layer.attend(x, batch, rows), only(residual, rows))
    return layer.feed_forward(x), residual


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
