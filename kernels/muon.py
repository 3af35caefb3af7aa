"""Muon over flat buffers, around `orthogonalise`: what comes before it and after it, a pass each.

With g the gradient times a factor (clipping and loss scaling in one) and m the momentum:

    m ← β m + g      u = g + β m      o = orthogonalise(u), matrix by matrix      w ← (1 − lr λ) w − lr scale o

`muon_direction` writes u in the dtype that is orthogonalised in, 14 bytes an element in float32 and 16 bits, and times
1024: float16 has nothing as small as the elements of a clipped gradient, and the scale makes no difference to o.
`muon_update` writes w, and in the same pass w in 16 bits for the matrix products: 12 bytes. The numbers that change
from step to step are those of `adamw_rates`, on the device; an update that is skipped changes nothing.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with Nesterov momentum.
"""

import functools

import torch

from .arguments import expect_flat
from .dispatch import pick, register
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, dtype_of, size_type

_NAME = "muon"
_GAIN = 1024.0
_BLOCK, _NUM_WARPS = 1024, 4


def muon_direction_reference(gradient, momentum, rates, direction, *, beta) -> None:
    """The definition, on any device and floating dtype; see `muon_direction`."""
    *_, factor, skipped = rates.to(gradient.dtype)
    g = gradient * factor
    m = momentum * beta + g
    direction.copy_(torch.where(skipped > 0, direction, (g + m * beta) * _GAIN))
    momentum.copy_(torch.where(skipped > 0, momentum, m))


def muon_update_reference(weight, direction, rates, working=None, *, scale, weight_decay) -> None:
    """The definition, on any device and floating dtype; see `muon_update`."""
    lr, *_, skipped = rates.to(weight.dtype)
    w = weight * (1 - lr * weight_decay) - lr * scale * direction.to(weight.dtype)
    if working is not None:
        working.copy_(torch.where(skipped > 0, working, w))
    weight.copy_(torch.where(skipped > 0, weight, w))


@triton.jit
def _direction_kernel(
    gradient_ptr,  # (N,)
    momentum_ptr,  # (N,)
    direction_ptr,  # (N,)
    rates_ptr,  # (5,)
    size,
    beta,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    if tl.load(rates_ptr + 4) == 0.0:
        g = tl.load(gradient_ptr + place, mask=mask) * tl.load(rates_ptr + 3)
        m = tl.load(momentum_ptr + place, mask=mask) * beta + g
        tl.store(momentum_ptr + place, m, mask=mask)
        tl.store(direction_ptr + place, (g + m * beta) * GAIN, mask=mask)


@triton.jit
def _update_kernel(
    weight_ptr,  # (N,)
    direction_ptr,  # (N,)
    working_ptr,  # (N,) or None
    rates_ptr,  # (5,)
    size,
    scale,
    weight_decay,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    if tl.load(rates_ptr + 4) == 0.0:
        lr = tl.load(rates_ptr)
        w = tl.load(weight_ptr + place, mask=mask) * (1 - lr * weight_decay)
        w -= lr * scale * tl.load(direction_ptr + place, mask=mask).to(tl.float32)
        tl.store(weight_ptr + place, w, mask=mask)
        if working_ptr is not None:
            tl.store(working_ptr + place, w, mask=mask)


@functools.lru_cache
def direction_launch(direction_dtype: torch.dtype, whole_vectors: bool) -> Launch:
    """The first kernel."""
    pointers = (torch.float32, torch.float32, direction_dtype, torch.float32)
    return Launch(
        _direction_kernel, pointers, (size_type(whole_vectors), "fp32"), {"GAIN": _GAIN, "BLOCK": _BLOCK}, _NUM_WARPS
    )


@functools.lru_cache
def update_launch(direction_dtype: torch.dtype, working_dtype: torch.dtype | None, whole_vectors: bool) -> Launch:
    """The second kernel; working_dtype None: without rounded weights."""
    pointers = (torch.float32, direction_dtype, working_dtype, torch.float32)
    scalars = (size_type(whole_vectors), "fp32", "fp32")
    return Launch(_update_kernel, pointers, scalars, {"BLOCK": _BLOCK}, _NUM_WARPS)


@catalogue
def _launches(dtype, _capability):
    yield direction_launch(dtype, True)
    yield update_launch(dtype, None if dtype.itemsize == 4 else dtype, True)
    yield update_launch(dtype, None, False)


def _direction(gradient, momentum, rates, direction, *, beta) -> None:
    size = gradient.numel()
    launch = direction_launch(direction.dtype, size % 16 == 0)
    launch(ceil_div(size, _BLOCK), gradient, momentum, direction, rates, size, beta)


def _update(weight, direction, rates, working=None, *, scale, weight_decay) -> None:
    size = weight.numel()
    launch = update_launch(direction.dtype, dtype_of(working), size % 16 == 0)
    launch(ceil_div(size, _BLOCK), weight, direction, working, rates, size, scale, weight_decay)


register(_NAME, (_direction, _update), (torch.float32,))


@torch.no_grad()
def muon_direction(
    gradient: torch.Tensor, momentum: torch.Tensor, rates: torch.Tensor, direction: torch.Tensor, *, beta: float
) -> None:
    """Update momentum (N,) by gradient (N,), and write what is to be orthogonalised to direction (N,).

    gradient and momentum are float32, direction is that or of 16 bits, rates from `adamw_rates`; all contiguous.
    Where the update is to be skipped direction is not written. Raises ValueError for a shape, device or layout,
    TypeError for a dtype that does not fit.
    """
    expect_flat(_NAME, {"gradient": gradient, "momentum": momentum}, {"direction": direction}, rates)
    run, _ = pick(_NAME, gradient, (muon_direction_reference, muon_update_reference))
    run(gradient, momentum, rates, direction, beta=beta)


@torch.no_grad()
def muon_update(
    weight: torch.Tensor,
    direction: torch.Tensor,
    rates: torch.Tensor,
    working: torch.Tensor | None = None,
    *,
    scale: float,
    weight_decay: float,
) -> None:
    """Update weight (N,), float32, in place along direction (N,), times the learning rate and `scale`.

    working: (N,), float32 or 16-bit, gets the new weights rounded. rates and errors as in `muon_direction`.
    """
    rounded = {"direction": direction} | ({} if working is None else {"working": working})
    expect_flat(_NAME, {"weight": weight}, rounded, rates)
    _, run = pick(_NAME, weight, (muon_direction_reference, muon_update_reference))
    run(weight, direction, rates, working, scale=scale, weight_decay=weight_decay)
