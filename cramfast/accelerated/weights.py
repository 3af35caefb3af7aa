"""The parameters of a layer as its matrix products take them: in the dtype of activations, those of q, k and v as one.

That copies them. It takes some microseconds on the device, far less than to launch three products instead, or what
autocast does for each parameter by itself.
"""

from typing import NamedTuple

import torch
from torch import nn


class Weights(NamedTuple):
    """Of one layer, (out, in) and (out,), of q, k and v (3C, C) and (3C,). None where a layer has no bias."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    wide: torch.Tensor
    wide_bias: torch.Tensor | None
    narrow: torch.Tensor
    narrow_bias: torch.Tensor | None


Groups = list[tuple[nn.Parameter, ...] | None]
"""The parameters that each of `Weights` is made of."""


def parameters_of(module: nn.Linear | nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weight and bias, without the microsecond that a look through the module takes where they are parameters."""
    held = module._parameters
    if "weight" in held and "bias" in held:
        return held["weight"], held["bias"]
    return module.weight, module.bias


def groups_of(qkv: tuple[nn.Linear, ...], out: nn.Linear, wide: nn.Linear, narrow: nn.Linear) -> Groups:
    """What the weights of these four products are made of."""
    groups = []
    for layers in (qkv, (out,), (wide,), (narrow,)):
        weights, biases = zip(*map(parameters_of, layers), strict=True)
        groups += [weights, None if biases[0] is None else biases]
    return groups


def joined(groups: Groups, dtype: torch.dtype) -> Weights:
    """In operations that autograd knows."""
    return Weights(
        *(None if group is None else (group[0] if len(group) == 1 else torch.cat(group)).to(dtype) for group in groups)
    )


@torch.no_grad()
def copied(groups_of_layers: list[Groups], dtype: torch.dtype) -> list[Weights]:
    """The same of all layers in one go, unknown to autograd; what needs no copy is the parameter itself."""
    made, targets, sources = [], [], []
    for groups in groups_of_layers:
        wholes = []
        for group in groups:
            whole = None if group is None else group[0]
            if whole is not None and len(group) > 1:
                whole = whole.new_empty((len(group) * whole.shape[0], *whole.shape[1:]), dtype=dtype)
                targets += whole.chunk(len(group))
                sources += group
            elif whole is not None and whole.dtype != dtype:
                whole = torch.empty_like(whole, dtype=dtype)
                targets.append(whole)
                sources += group
            wholes.append(whole)
        made.append(Weights(*wholes))
    if targets:
        torch._foreach_copy_(targets, sources)
    return made
