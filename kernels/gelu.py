"""GELU and its gated form.

    gelu(x) = x * Phi(x), Phi the normal distribution function       (erf form; approximate="tanh" on request)
    geglu(a, b) = gelu(a) * b, with a and b the halves of one (..., 2I) tensor

Sources: Hendrycks & Gimpel, 1606.08415; Shazeer, "GLU Variants Improve Transformer", 2002.05202.
"""

import torch
import torch.nn.functional as F

from .dispatch import pick


def gelu_reference(x, approximate="none"):
    """The definition, on any device and floating dtype; see `gelu`."""
    return F.gelu(x, approximate=approximate)


def geglu_reference(x, approximate="none"):
    """The definition, on any device and floating dtype; see `geglu`."""
    gate, value = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * value


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU of x, elementwise, in x's dtype. `approximate` is "none" (exact, erf) or "tanh"."""
    return pick("gelu", x.device, gelu_reference)(x, approximate)


def geglu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu(first half) * second half of x (..., 2I) → (..., I); the order Hugging Face ModernBERT uses."""
    return pick("geglu", x.device, geglu_reference)(x, approximate)
