"""AdamW over flat buffers: one pass that clips, updates and rounds the weights for the next forward pass.

With g the gradient times a factor (clipping and loss scaling in one), m and v its moments and n the number of updates:

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    w ← (1 − lr λ) w − lr / (1 − β₁ⁿ) · m / (√v / √(1 − β₂ⁿ) + ε)

The same pass writes w in 16 bits where the matrix products want it so: 30 bytes an element in float32. What changes
from step to step lies on the device, so that a captured CUDA graph takes it along. An update may be skipped there:
`update_rates` decides that and the clipping, with the norm of all gradients at hand, in one kernel on scalars.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 1711.05101, algorithm 2.
"""

import functools
import math

import torch

from .arguments import expect_flat, expect_like
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


def update_rates_reference(gradient_norm, loss, loss_scale, lr, updates, report, *, clip, beta1, beta2):
    """The definition, on any device; see `update_rates`."""
    norm = gradient_norm / loss_scale
    skipped = (~torch.isfinite(norm + loss)).float()
    factor = 1 / (loss_scale * (norm / clip).clamp(min=1.0))
    updates += 1 - skipped
    report.copy_(torch.stack((loss, norm, skipped)))
    return adamw_rates(lr, updates, factor, skipped, beta1=beta1, beta2=beta2)


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


@triton.jit
def _rates_kernel(
    gradient_norm_ptr,  # ()
    loss_ptr,  # ()
    loss_scale_ptr,  # ()
    lr_ptr,  # ()
    updates_ptr,  # ()
    report_ptr,  # (3,)
    rates_ptr,  # (5,)
    clip,
    log_beta1,
    log_beta2,
):
    loss, loss_scale, lr = tl.load(loss_ptr), tl.load(loss_scale_ptr), tl.load(lr_ptr)
    norm = tl.div_rn(tl.load(gradient_norm_ptr), loss_scale)
    # The largest float32: infinite and NaN are not below it.
    finite = tl.abs(norm + loss) <= 3.4028234663852886e38
    skipped = tl.where(finite, 0.0, 1.0)
    updates = tl.load(updates_ptr) + (1.0 - skipped)
    tl.store(updates_ptr, updates)
    tl.store(report_ptr, loss)
    tl.store(report_ptr + 1, norm)
    tl.store(report_ptr + 2, skipped)
    count = updates.to(tl.float64)
    rest1 = 1.0 - tl.exp(count * log_beta1)
    rest2 = 1.0 - tl.exp(count * log_beta2)
    tl.store(rates_ptr, lr)
    tl.store(rates_ptr + 1, (lr.to(tl.float64) / rest1).to(tl.float32))
    tl.store(rates_ptr + 2, (1.0 / tl.sqrt(rest2)).to(tl.float32))
    tl.store(rates_ptr + 3, tl.div_rn(1.0, loss_scale * tl.maximum(tl.div_rn(norm, clip), 1.0)))
    tl.store(rates_ptr + 4, skipped)


@functools.lru_cache
def rates_launch() -> Launch:
    """The kernel on scalars."""
    return Launch(_rates_kernel, (torch.float32,) * 7, ("fp32",) * 3, {}, 1)


@functools.lru_cache
def launch_for(working_dtype: torch.dtype | None, whole_vectors: bool = True) -> Launch:
    """The kernel, with weights rounded to `working_dtype` beside the update (None: without)."""
    pointers = (torch.float32,) * 4 + (working_dtype, torch.float32)
    # Two loads of 16 bytes a thread from each of four buffers are under way at once.
    return Launch(_adamw_kernel, pointers, (size_type(whole_vectors),) + ("fp32",) * 6, {"BLOCK": 1024}, 4)


@catalogue
def _launches(dtype, _capability):
    yield rates_launch()
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


def _rates(gradient_norm, loss, loss_scale, lr, updates, report, *, clip, beta1, beta2):
    rates = torch.empty(5, device=loss.device)
    tensors = (gradient_norm, loss, loss_scale, lr, updates, report, rates)
    rates_launch()(1, *tensors, clip, math.log(beta1), math.log(beta2))
    return rates


register(_NAME, (_adamw, _rates), (torch.float32,))


@torch.no_grad()
def update_rates(
    gradient_norm: torch.Tensor,
    loss: torch.Tensor,
    loss_scale: torch.Tensor,
    lr: torch.Tensor,
    updates: torch.Tensor,
    report: torch.Tensor,
    *,
    clip: float,
    beta1: float,
    beta2: float,
) -> torch.Tensor:
    """Decide on an update, on the device: returns what `adamw` and Muon take as rates, float32 (5,).

    gradient_norm: of gradients times `loss_scale`; they are scaled to at most `clip` (inf: as they are). The update is
    skipped where that norm or the loss is not finite, and else counted in `updates`. report (3,) gets the loss, the
    gradient norm before clipping, and whether the update is skipped, 1 or 0. All are float32, but for report scalars.
    Raises ValueError for a shape, device or layout, TypeError for a dtype that does not fit.
    """
    scalars = {"gradient_norm": gradient_norm, "loss": loss, "loss_scale": loss_scale, "lr": lr, "updates": updates}
    like = loss.new_empty(0, dtype=torch.float32)
    for name, tensor in scalars.items():
        expect_like(_NAME, name, tensor, (), like)
    expect_like(_NAME, "report", report, (3,), like)
    _, run = pick(_NAME, loss, (adamw_reference, update_rates_reference))
    return run(*scalars.values(), report, clip=clip, beta1=beta1, beta2=beta2)


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

    rates: from `update_rates` or `adamw_rates`. working: (N,), float32 or 16-bit, gets the new weights rounded. Nothing
    is copied to the host. Raises ValueError for a shape, device or layout, TypeError for a dtype that does not fit.
    """
    buffers = {"weight": weight, "gradient": gradient, "first": first, "second": second}
    expect_flat(_NAME, buffers, {} if working is None else {"working": working}, rates)
    run, _ = pick(_NAME, weight, (adamw_reference, update_rates_reference))
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    run(weight, gradient, first, second, rates, working, **options)
