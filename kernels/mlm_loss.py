"""The masked-language-modelling loss: decoder product and cross-entropy on the predicted rows only.

z = hidden[positions] @ weightᵀ + bias
loss = mean of logsumexp(z[m]) − z[m, labels[m]] over the rows m that have a label
"""

import torch
import torch.nn.functional as F

from .dispatch import pick


def mlm_loss_reference(hidden, weight, labels, positions=None, bias=None, *, ignore_index=-100):
    """The definition, on any device and floating dtype; holds the (M, V) logits; see `mlm_loss`."""
    rows = hidden if positions is None else hidden[positions]
    logits = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.to(wide), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def mlm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy, in nats, of predicting labels (M,) from rows of hidden (T, C).

    positions (M,) names the rows (None: all of them, M = T); weight (V, C) and bias (V,) are the decoder. Labels equal
    to `ignore_index` do not count; with none left the loss is 0. Returns an fp32 scalar (fp64 for fp64 input).
    """
    run = pick("mlm_loss", hidden, mlm_loss_reference)
    return run(hidden, weight, labels, positions, bias, ignore_index=ignore_index)
