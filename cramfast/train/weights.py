"""A model's parameters laid end to end in flat buffers, so that one pass of the optimizer covers them all."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

# Elements to which each parameter is aligned: 128 bytes in 16 bits, a cache line.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat buffers."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, `count` × (rows, columns), that fill the flat buffers from `start` to `end`."""

    start: int
    end: int
    count: int
    rows: int
    columns: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """(count, rows, columns), a view of a flat buffer."""
        stride = (self.end - self.start) // self.count
        shape = (self.count, self.rows, self.columns)
        return flat[self.start : self.end].as_strided(shape, (stride, self.columns, 1))


class Weights:
    """Parameters, their gradient, and the 16-bit copies that matrix products use.

    master, gradient: (N,) in the parameters' dtype; the model's parameters become views of `master`. working:
    (decayed,) in `dtype`, None where that is no narrower than the parameters'. The order: matrices of the layers, those
    of one shape side by side, up to `hidden`; embedding tables up to `decayed`; norms, biases and scalars.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        parameters = dict(model.named_parameters())
        self.places, self.hidden, self.decayed, size = _lay_out(parameters)
        first = next(iter(parameters.values()))
        self.master = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.gradient = torch.zeros_like(self.master)
        self.working = None
        self.leaves: dict[str, torch.Tensor] = {}
        """What the forward pass takes in place of the parameters, and gradients are taken of."""
        masters = self.by_name(self.master)
        for name, parameter in parameters.items():
            parameter.data = masters[name].copy_(parameter.data)
            self.leaves[name] = parameter
        if dtype.itemsize < first.dtype.itemsize:
            self.working = torch.zeros(self.decayed, dtype=dtype, device=first.device)
            for name, view in self.by_name(self.working).items():
                self.leaves[name] = view.detach().requires_grad_()
        self.refresh()
        for name, view in self.by_name(self.gradient).items():
            self.leaves[name].main_grad = view

    def refresh(self) -> None:
        """Round the parameters to the working copies, after they were loaded."""
        if self.working is not None:
            self.working.copy_(self.master[: self.decayed])

    def by_name(self, flat: torch.Tensor, start: int = 0) -> dict[str, torch.Tensor]:
        """The pieces of a flat buffer by parameter, in the parameters' shapes. The buffer begins at place `start`, and
        the names are of those that lie in it."""
        return {
            name: flat[place.start - start : place.end - start].view(place.shape)
            for name, place in self.places.items()
            if start <= place.start and place.end - start <= flat.numel()
        }

    def stacks(self) -> list[Stack]:
        """The matrices of the layers. Queries, keys and values count as three, though one product makes them."""
        shapes: dict[tuple[torch.Size, int], list[Place]] = {}
        for name, place in self.places.items():
            if place.end <= self.hidden:
                shapes.setdefault((place.shape, 3 if name.endswith("qkv.weight") else 1), []).append(place)
        stacks = []
        for ((rows, columns), parts), places in shapes.items():
            end = places[-1].start + _aligned(places[-1].shape.numel())
            if rows * columns % (_ALIGNMENT * parts):
                parts = 1
            stacks.append(Stack(places[0].start, end, len(places) * parts, rows // parts, columns))
        return stacks

    def start_gradient(self, anew: bool) -> None:
        """Say what the next gradients do with those already here: take their place, or join them."""
        for leaf in self.leaves.values():
            leaf.replaces_main_grad = anew
        if anew:
            # The matrices' products write theirs; for torch to add to all vectors is one kernel, to copy one for each.
            self.gradient[self.decayed :].zero_()

    def take(self, gradients: Iterable[torch.Tensor | None]) -> None:
        """Collect one gradient for each of `leaves`, in their order; None where a product has added it to the leaf's
        `main_grad`, or a parameter has no part in the loss."""
        vectors = []
        for leaf, gradient in zip(self.leaves.values(), gradients, strict=True):
            if leaf.ndim >= 2 and leaf.replaces_main_grad:
                leaf.main_grad.zero_() if gradient is None else leaf.main_grad.copy_(gradient)
            elif leaf.ndim >= 2 and gradient is not None:
                leaf.main_grad.add_(gradient)
            elif gradient is not None:
                vectors.append((leaf.main_grad, gradient))
        if vectors:
            torch._foreach_add_(*map(list, zip(*vectors, strict=True)))


def _lay_out(parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Place], int, int, int]:
    """Places by name, the ends of the layers' matrices and of all matrices, and the size of the buffers."""

    def group(name: str) -> int:
        return 2 if parameters[name].ndim < 2 else 1 if name.startswith("embeddings.") else 0

    # A matrix that is three stays apart from others of its shape.
    kinds = [(p.shape, name.endswith("qkv.weight")) for name, p in parameters.items()]
    kind_of = {name: kinds.index(kind) for name, kind in zip(parameters, kinds, strict=True)}
    order = sorted(parameters, key=lambda name: (group(name), kind_of[name]))
    places, ends, offset = {}, [0, 0, 0], 0
    for name in order:
        places[name] = Place(offset, parameters[name].shape)
        offset += _aligned(parameters[name].numel())
        ends[group(name) :] = [offset] * len(ends[group(name) :])
    return places, *ends


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
