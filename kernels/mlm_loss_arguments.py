"""Checks of the masked-language-modelling loss's arguments, in the manner of `arguments.py`."""

import torch

from .arguments import checking, expect_choice, expect_floating, expect_indices, expect_parameter

MEMORY = ("fast", "low")


def expect_predictions(
    operator: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None,
    bias: torch.Tensor | None,
    ignore_index: int,
) -> None:
    """hidden (T, C), weight (V, C), bias (V,), labels (M,) and positions (M,), M = T without positions.

    Raises TypeError for a dtype and ValueError for a shape or device that does not fit. With CRAMFAST_CHECK=1 it waits
    for the GPU and raises ValueError for the first label or position that is outside of what it names.
    """
    expect_floating(operator, "hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"{operator}: hidden has shape {tuple(hidden.shape)}, expected (T, C)")
    total, width = hidden.shape
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"{operator}: weight has shape {tuple(weight.shape)}, expected (V, {width})")
    vocabulary = weight.shape[0]
    expect_parameter(operator, "weight", weight, (vocabulary, width), hidden)
    if bias is not None:
        expect_parameter(operator, "bias", bias, (vocabulary,), hidden)
    if positions is None:
        expect_indices(operator, "labels", labels, hidden, (total,))
    else:
        expect_indices(operator, "positions", positions, hidden)
        expect_indices(operator, "labels", labels, hidden, positions.shape)
    if checking(hidden):
        _expect_inside(operator, "labels", labels, vocabulary, ignore_index)
        if positions is not None:
            _expect_inside(operator, "positions", positions, total)


def expect_loss_options(operator: str, z_loss: float, label_smoothing: float, memory: str) -> None:
    """Raises ValueError for a negative z_loss, a label_smoothing outside of 0 to 1, or an unknown memory."""
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{operator}: z_loss is {z_loss}, expected at least 0")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{operator}: label_smoothing is {label_smoothing}, expected 0 to 1")
    expect_choice(operator, "memory", memory, MEMORY)


def _expect_inside(operator, name, indices, end, ignored=None):
    outside = (indices < 0) | (indices >= end)
    if ignored is not None:
        outside &= indices != ignored
    if outside.any():
        place = int(outside.int().argmax())
        allowed = f"0 to {end - 1}" + ("" if ignored is None else f" or {ignored}")
        raise ValueError(f"{operator}: {name}[{place}] is {int(indices[place])}, expected {allowed}")
