"""Layer normalisation, alone or fused with the residual addition before it.

    y = (x - mean(x)) * rstd(x) * weight + bias,   rstd = 1 / sqrt(var(x) + eps)

Statistics are fp32 whatever the dtype of x (fp64 for fp64). Source: Ba, Kiros, Hinton, "Layer Normalization" (2016).
"""

import torch
import torch.nn.functional as F

from .dispatch import pick


def layer_norm_reference(x, weight, bias=None, eps=1e-5):
    """The definition, on any device and floating dtype; see `layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)


def add_layer_norm_reference(x, residual, weight, bias=None, eps=1e-5):
    """The definition, on any device and floating dtype; see `add_layer_norm`."""
    s = x + residual
    return layer_norm_reference(s, weight, bias, eps), s


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise the last dimension of x (..., C) with weight (C,) and bias (C,) → (..., C) in x's dtype.

    Parameters may be fp32 while x is 16-bit.
    """
    return pick("layer_norm", x.device, layer_norm_reference)(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(y, s)` with s = x + residual and y = layer_norm(s), all (..., C) in one dtype.

    A pre-norm block carries s on as its residual stream; the gradients of y and s both flow into x and residual.
    """
    return pick("add_layer_norm", x.device, add_layer_norm_reference)(x, residual, weight, bias, eps)
