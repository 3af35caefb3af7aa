"""The parameters of a layer as its matrix products take them: in the dtype of activations, those of q, k and v as one.

That copies them. It takes some microseconds on the device, far less than to launch three products instead, or what
autocast does for each parameter by itself.
"""

from operator import itemgetter
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


_of_parameters = itemgetter("weight", "bias")

Groups = list[tuple[nn.Parameter, ...] | None]
"""The parameters that each of `Weights` is made of."""


def parameters_of(module: nn.Linear | nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weight and bias, without the microsecond that a look through the module takes where they are parameters."""
    try:
        return _of_parameters(module._parameters)
    except KeyError:
        return module.weight, module.bias


def groups_of(qkv: tuple[nn.Linear, ...], out: nn.Linear, wide: nn.Linear, narrow: nn.Linear) -> Groups:
    """What the weights of these four products are made of."""
    weights, biases = zip(*map(parameters_of, qkv), strict=True)
    groups = [weights, None if biases[0] is None else biases]
    for weight, bias in map(parameters_of, (out, wide, narrow)):
        groups += [(weight,), None if bias is None else (bias,)]
    return groups


def joined(groups: Groups, dtype: torch.dtype) -> Weights:
    """In operations that autograd knows."""
    return Weights(
        *(None if group is None else (group[0] if len(group) == 1 else torch.cat(group)).to(dtype) for group in groups)
    )


@torch.no_grad()
def copied(groups_of_layers: list[Groups], dtype: torch.dtype) -> list[Weights]:
    """The same of all layers in one go, unknown to autograd; what needs no copy is the parameter itself."""
    weights = _copied_weights([group for groups in groups_of_layers for group in groups[::2]], dtype)
    biases = _copied_biases([group for groups in groups_of_layers for group in groups[1::2]], dtype)
    wholes = [whole for pair in zip(weights, biases, strict=True) for whole in pair]
    count = len(Weights._fields)
    return [Weights(*wholes[first : first + count]) for first in range(0, len(wholes), count)]


def _copied_weights(groups: Groups, dtype: torch.dtype) -> list[torch.Tensor]:
    wholes, targets, sources = [], [], []
    for group in groups:
        whole = group[0]
        if len(group) > 1:
            rows, columns = whole.shape
            whole = whole.new_empty((len(group) * rows, columns), dtype=dtype)
            targets += whole.split_with_sizes([rows] * len(group))
            sources += group
        elif whole.dtype != dtype:
            whole = torch.empty_like(whole, dtype=dtype)
            targets.append(whole)
            sources += group
        wholes.append(whole)
    if targets:
        torch._foreach_copy_(targets, sources)
    return wholes


def _copied_biases(groups: Groups, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """All in one allocation: to make room for each of them takes the host longer than all that is done here."""
    wholes = [None if group is None else group[0] for group in groups]
    places = [i for i, group in enumerate(groups) if group is not None and (len(group) > 1 or group[0].dtype != dtype)]
    if places:
        together = torch.cat([bias for i in places for bias in groups[i]]).to(dtype)
        sizes = [len(groups[i]) * groups[i][0].shape[0] for i in places]
        for i, whole in zip(places, together.split_with_sizes(sizes), strict=True):
            wholes[i] = whole
    return wholes
