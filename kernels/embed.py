"""The embedding layer: token rows, plus position rows where the model has them, then their LayerNorm.

y[t] = layer_norm(weight[input_ids[t]] + position_weight[position_ids[t]])
"""

import torch
import torch.nn.functional as F

from .dispatch import pick
from .layer_norm import layer_norm_reference


def embed_reference(
    input_ids,
    weight,
    norm_weight,
    norm_bias=None,
    *,
    position_ids=None,
    position_weight=None,
    eps=1e-5,
    dtype=None,
):
    """The definition, on any device and floating dtype; see `embed`."""
    rows = F.embedding(input_ids, weight)
    if position_weight is not None:
        rows = rows + F.embedding(position_ids, position_weight)
    return layer_norm_reference(rows, norm_weight, norm_bias, eps).to(dtype or weight.dtype)


def embed(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    *,
    position_ids: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Normalised embeddings of input_ids (T,) → (T, C) in `dtype` (None: that of weight).

    weight (V, C); norm_weight, norm_bias (C,); position_ids (T,) index rows of position_weight (P, C), both given or
    neither. Raises ValueError when only one of the two is given.
    """
    if (position_ids is None) != (position_weight is None):
        raise ValueError("embed: position_ids and position_weight go together; one of them is None")
    run = pick("embed", weight.device, embed_reference)
    return run(
        input_ids,
        weight,
        norm_weight,
        norm_bias,
        position_ids=position_ids,
        position_weight=position_weight,
        eps=eps,
        dtype=dtype,
    )
