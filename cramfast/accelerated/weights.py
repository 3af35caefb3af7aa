"""The parameters of a layer as its matrix products take them: in the dtype of activations, those of q, k and v as one.

That copies them. It takes some microseconds on the device, far less than to launch three products instead, or what
autocast does for each parameter by itself.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch._utils import _unflatten_dense_tensors


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
        copies = [group for group in groups if group is not None and (len(group) > 1 or group[0].dtype != dtype)]
        parameters = [parameter for group in copies for parameter in group]
        flat = parameters[0].new_empty(sum(map(torch.numel, parameters)), dtype=dtype) if parameters else None
        views = _unflatten_dense_tensors(flat, parameters) if parameters else ()
        targets += views
        sources += parameters
        made.append(Weights(*_whole(groups, copies, iter(views))))
    if targets:
        torch._foreach_copy_(targets, sources)
    return made


def _whole(groups, copies, views):
    """One tensor for each group, over the views of its parameters, which lie one behind the other."""
    waiting = iter(copies)
    following = next(waiting, None)
    for group in groups:
        if group is None or group is not following:
            yield None if group is None else group[0]
            continue
        first, *rest = [next(views) for _ in group]
        yield first.as_strided((len(group) * len(first), *first.shape[1:]), first.stride()) if rest else first
        following = next(waiting, None)
