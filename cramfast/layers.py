"""nn.Modules over the operators of `cramfast.kernels`.

Where `torch.nn` has a counterpart the constructor takes the same arguments and the state dict is the same.
Shapes: T tokens of an unpadded batch, C hidden size, I intermediate size, H heads, D head size, M predictions.
"""

import torch
from torch import nn

from .kernels import (
    add_layer_norm,
    add_layer_norm_geglu_linear,
    add_layer_norm_linear,
    geglu,
    geglu_linear,
    gelu,
    layer_norm,
    linear,
    mlm_loss,
    mlm_scores,
    pad,
    select_rows,
    unpad,
    varlen_attention,
)

__all__ = [
    "FusedAddLayerNorm",
    "FusedGEGLU",
    "FusedGELU",
    "FusedLayerNorm",
    "FusedLinear",
    "SparseMLMHead",
    "UnpaddedSelfAttention",
    "pad",
    "unpad",
]


def only(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows `rows` (M,) of x (T, C), none of them twice; None: x itself."""
    return x if rows is None else select_rows(x, rows)


class FusedLinear(nn.Linear):
    """`torch.nn.Linear`; the gradient of a weight that has a `main_grad` is added to that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class FusedLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, with a learned weight."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if not elementwise_affine or len(self.normalized_shape) != 1:
            raise ValueError(
                f"{type(self).__name__} normalises one dimension with a learned weight; "
                f"got shape {self.normalized_shape}, elementwise_affine={elementwise_affine}"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class FusedAddLayerNorm(FusedLayerNorm):
    """Residual addition and LayerNorm in one: (x, residual) → (norm(x + residual), x + residual).

    Without a residual (the first block of a model) the sum is x itself.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return super().forward(x), x
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def then(
        self, following: FusedLinear, x: torch.Tensor, residual: torch.Tensor | None, recompute: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) → (following(norm(x + residual)), x + residual). recompute: the norm's output is not saved."""
        if residual is None:
            return following(super().forward(x)), x
        parameters = (self.weight, self.bias, following.weight, following.bias)
        return add_layer_norm_linear(x, residual, *parameters, self.eps, recompute)


class FusedGELU(nn.GELU):
    """`torch.nn.GELU`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(x, self.approximate)


class FusedGEGLU(nn.Module):
    """(..., 2I) → (..., I): GELU of the first half times the second."""

    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return geglu(x, self.approximate)

    def then(self, following: FusedLinear, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """following(GEGLU(x)). recompute: GEGLU(x) is not saved."""
        return geglu_linear(x, following.weight, following.bias, self.approximate, recompute)

    def between(
        self,
        norm: FusedAddLayerNorm,
        wide: FusedLinear,
        narrow: FusedLinear,
        x: torch.Tensor,
        residual: torch.Tensor,
        recompute: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) → (narrow(GEGLU(wide(norm(x + residual)))), x + residual). recompute: as in both `then`."""
        parameters = (norm.weight, norm.bias, wide.weight, wide.bias, narrow.weight, narrow.bias)
        return add_layer_norm_geglu_linear(x, residual, *parameters, norm.eps, self.approximate, recompute)


class UnpaddedSelfAttention(nn.Module):
    """Multi-head bidirectional self-attention over unpadded sequences: (T, C) → (T, C).

    dropout: of the attention weights, in training only. window: a token sees those at most this many places away on
    either side (None: all of its sequence). Who has padded tensors x (B, S, C) and a mask (B, S) of the real tokens:

        flat, indices, cu_seqlens, max_seqlen = unpad(x, attention_mask)
        y = pad(attention(flat, cu_seqlens, max_seqlen), indices, *attention_mask.shape)
    """

    def __init__(
        self, hidden_size: int, num_heads: int, bias: bool = True, dropout: float = 0.0, window: int | None = None
    ):
        super().__init__()
        name = type(self).__name__
        if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads:
            raise ValueError(f"{name}: hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{name}: dropout is {dropout}, expected at least 0 and below 1")
        self.num_heads, self.dropout, self.window = num_heads, dropout, window
        self.qkv = FusedLinear(hidden_size, 3 * hidden_size, bias)
        self.out = FusedLinear(hidden_size, hidden_size, bias)

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (T, C); cu_seqlens, max_seqlen, cos and sin as `varlen_attention` takes them. With `rows` (M,), indices of
        tokens, the outputs (M, C) of those alone."""
        return self.attend(self.qkv(x), cu_seqlens, max_seqlen, cos, sin, rows)

    def attend(
        self,
        qkv: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `forward` does after the first projection, whose output qkv (T, 3C) is."""
        qkv_T3HD = qkv.unflatten(-1, (3, self.num_heads, -1))
        dropout_p = self.dropout if self.training else 0.0
        options = {"cos": cos, "sin": sin, "window": self.window, "dropout_p": dropout_p}
        attended = varlen_attention(qkv_T3HD, cu_seqlens, max_seqlen, **options).flatten(1)
        return self.out(only(attended, rows))


class SparseMLMHead(nn.Module):
    """The prediction head, run on predicted rows only: an optional dense + GELU + norm, then the decoder.

    The decoder's weight (V, C) is passed in, because it is the embedding's.

    memory: as `mlm_loss` takes it. "fast" has some 292 MiB beside the loss and its gradients; "low" has 106 MiB in the
    forward pass, when the weight has no gradient yet, 62 MiB in the backward pass, and takes half as much time again.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        transform: bool,
        linear_bias: bool,
        norm_bias: bool,
        decoder_bias: bool,
        eps: float,
        memory: str = "fast",
    ):
        super().__init__()
        self.memory = memory
        self.transform = (
            nn.Sequential(
                FusedLinear(hidden_size, hidden_size, linear_bias),
                FusedGELU(),
                FusedLayerNorm(hidden_size, eps, bias=norm_bias),
            )
            if transform
            else None
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if decoder_bias else None

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean loss of predicting labels (M,) from rows `positions` (M,) of hidden (T, C); None: from all rows."""
        return mlm_loss(*self._predictions(hidden, weight, labels, positions), memory=self.memory)

    @torch.no_grad()
    def score(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(losses, correct)` of each of these predictions, as `mlm_scores` gives them; without gradients."""
        return mlm_scores(*self._predictions(hidden, weight, labels, positions))

    def _predictions(self, hidden, weight, labels, positions):
        """What the loss takes; a transform has picked the rows already."""
        if self.transform is None:
            return hidden, weight, labels, positions, self.bias
        return self.transform(only(hidden, positions)), weight, labels, None, self.bias

    def predict(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) of hidden rows (M, C)."""
        if self.transform is not None:
            rows = self.transform(rows)
        return nn.functional.linear(rows, weight, self.bias)
