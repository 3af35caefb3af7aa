"""AdamW over flat buffers: one pass that clips, updates and rounds the weights for the next forward pass.

With g the gradient times a factor (clipping and loss scaling in one), m and v its moments and n the number of updates:

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    w ← (1 − lr λ) w − lr / (1 − β₁ⁿ) · m / (√v / √(1 − β₂ⁿ) + ε)

The same pass writes w in 16 bits where the matrix products want it so: 30 bytes an element in float32. What changes
from step to step lies on the device, so that a captured CUDA graph takes it along. An update may be skipped there.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 1711.05101, algorithm 2.
"""

import functools

import torch

from .arguments import expect_flat
from .dispatch import pick, register
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, dtype_of, size_type

_NAME = "adamw"


def adamw_rates(
    lr: torch.Tensor,
    updates: torch.Tensor,
    factor: torch.Tensor,
    skipped: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
) -> torch.Tensor:
    """The numbers that an update goes by, float32 (5,), from scalars on the device.

    updates: how many there will have been after this one. factor: what gradients are multiplied by. skipped: 1 where
    nothing may change, else 0.
    """
    # In float64: 1 − β₂ⁿ loses half its digits in float32 while n is small.
    count = updates.double()
    step_size = lr.double() / (1 - beta1**count)
    second_scale = (1 - beta2**count).rsqrt()
    return torch.stack((lr.double(), step_size, second_scale, factor.double(), skipped.double())).float()


def adamw_reference(weight, gradient, first, second, rates, working=None, *, beta1, beta2, eps, weight_decay) -> None:
    """The definition, on any device and floating dtype; see `adamw`."""
    lr, step_size, second_scale, factor, skipped = rates.to(weight.dtype)
    g = gradient * factor
    m = first * beta1 + g * (1 - beta1)
    v = second * beta2 + g * g * (1 - beta2)
    w = weight * (1 - lr * weight_decay) - step_size * m / (v.sqrt() * second_scale + eps)
    for tensor, new in ((weight, w), (first, m), (second, v)):
        tensor.copy_(torch.where(skipped > 0, tensor, new))
    if working is not None:
        working.copy_(torch.where(skipped > 0, working.to(weight.dtype), weight))


@triton.jit
def _adamw_kernel(
    weight_ptr,  # (N,)
    gradient_ptr,  # (N,)
    first_ptr,  # (N,)
    second_ptr,  # (N,)
    working_ptr,  # (N,) or None
    rates_ptr,  # (5,)
    size,
    beta1,
    rest1,  # 1 - beta1, which float32 does not give from beta1
    beta2,
    rest2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    if tl.load(rates_ptr + 4) == 0.0:
        lr, step_size = tl.load(rates_ptr), tl.load(rates_ptr + 1)
        second_scale, factor = tl.load(rates_ptr + 2), tl.load(rates_ptr + 3)
        g = tl.load(gradient_ptr + place, mask=mask) * factor
        m = tl.load(first_ptr + place, mask=mask) * beta1 + g * rest1
        v = tl.load(second_ptr + place, mask=mask) * beta2 + g * g * rest2
        w = tl.load(weight_ptr + place, mask=mask) * (1 - lr * weight_decay)
        w -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * second_scale + eps)
        tl.store(first_ptr + place, m, mask=mask)
        tl.store(second_ptr + place, v, mask=mask)
        tl.store(weight_ptr + place, w, mask=mask)
        if working_ptr is not None:
            tl.store(working_ptr + place, w, mask=mask)


@functools.lru_cache
def launch_for(working_dtype: torch.dtype | None, whole_vectors: bool = True) -> Launch:
    """The kernel, with weights rounded to `working_dtype` beside the update (None: without)."""
    pointers = (torch.float32,) * 4 + (working_dtype, torch.float32)
    # Two loads of 16 bytes a thread from each of four buffers are under way at once.
    return Launch(_adamw_kernel, pointers, (size_type(whole_vectors),) + ("fp32",) * 6, {"BLOCK": 1024}, 4)


@catalogue
def _launches(dtype, _capability):
    yield launch_for(None)
    yield launch_for(None, whole_vectors=False)
    if dtype.itemsize == 2:
        yield launch_for(dtype)


def _adamw(weight, gradient, first, second, rates, working=None, *, beta1, beta2, eps, weight_decay) -> None:
    size = weight.numel()
    launch = launch_for(dtype_of(working), size % 16 == 0)
    scalars = (beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay)
    grid = ceil_div(size, launch.constants["BLOCK"])
    launch(grid, weight, gradient, first, second, working, rates, size, *scalars)


register(_NAME, _adamw, (torch.float32,))


@torch.no_grad()
def adamw(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    rates: torch.Tensor,
    working: torch.Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update weight (N,) in place, with its moments first and second, by gradient. All (N,), float32 and contiguous.

    rates: from `adamw_rates`. working: (N,), float32 or 16-bit, gets the new weights rounded. Nothing is copied to
    the host. Raises ValueError for a shape, device or layout, TypeError for a dtype that does not fit.
    """
    buffers = {"weight": weight, "gradient": gradient, "first": first, "second": second}
    expect_flat(_NAME, buffers, {} if working is None else {"working": working}, rates)
    run = pick(_NAME, weight, adamw_reference)
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    run(weight, gradient, first, second, rates, working, **options)
