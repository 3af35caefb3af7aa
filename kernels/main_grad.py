"""Gradients of weights, added where they are collected.

Who accumulates gradients over microbatches keeps one float32 buffer a weight. A weight that carries it as its attribute
`main_grad` gets its gradient added there by the operator that computes it: no 16-bit gradient is written, read and
added, and autograd sees none. Where its attribute `replaces_main_grad` is true, the gradient takes the place of what
was there, which saves clearing it, and the attribute becomes false.

The name `main_grad` is Megatron-LM's (Shoeybi et al., 1909.08053).
"""

import torch


def collects(weight: torch.Tensor) -> bool:
    """Whether the gradient of `weight` goes to its `main_grad`."""
    return getattr(weight, "main_grad", None) is not None


def claim(weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """`main_grad`, for the next gradient, and whether that joins what is there; those that follow will."""
    joins = not getattr(weight, "replaces_main_grad", False)
    weight.replaces_main_grad = False
    return weight.main_grad, joins


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool = False) -> None:
    """total += left @ right, or = where it is the `first`, with total in float32 whatever the factors are."""
    left, right, options = _factors(left, right, total.dtype)
    if first:
        torch.mm(left, right, **options, out=total)
    else:
        torch.addmm(total, left, right, **options, out=total)


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`: where that is float32, as it was summed up, whatever the factors are."""
    left, right, options = _factors(left, right, dtype)
    return torch.mm(left, right, **options)


def _factors(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The factors, and what torch needs to be told, for their product in `dtype`."""
    if dtype == left.dtype:
        return left, right, {}
    if dtype == torch.float32 and left.is_cuda:
        return left, right, {"out_dtype": dtype}
    return left.to(dtype), right.to(dtype), {}  # torch has no such product
