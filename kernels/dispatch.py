"""One rule for which implementation of an operator runs, and why.

`CRAMFAST_KERNELS` is `auto` (Triton where the operator has a kernel and the tensor's device can run it, else the
reference), `reference`, or `triton` (a choice that cannot be honoured is an error).
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._C import _are_functorch_transforms_active

from .language import AVAILABLE

OPERATORS = (
    "embed",
    "layer_norm",
    "add_layer_norm",
    "gelu",
    "geglu",
    "varlen_attention",
    "mask_tokens",
    "mlm_loss",
    "adamw",
    "orthogonalise",
    "muon",
)
MODES = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """What runs for one operator on one device: `backend` is "triton" or "reference", `reason` a short phrase."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Kernel:
    """The Triton implementation of an operator: what computes it, and the dtypes and the least compute capability that
    it is for."""

    run: Callable
    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int]


_kernels: dict[str, Kernel] = {}


def register(
    operator: str,
    kernel: Callable,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    capability: tuple[int, int] = (7, 5),
) -> None:
    """Make `kernel` the Triton implementation of `operator`, one of `OPERATORS`."""
    if operator not in OPERATORS:
        raise ValueError(f"{operator} is not one of {', '.join(OPERATORS)}")
    _kernels[operator] = Kernel(kernel, dtypes, capability)


def choose(operator: str, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """The implementation of `operator` that runs for tensors of `dtype` (None: of one it has kernels for) on `device`.

    Raises ValueError for an unknown CRAMFAST_KERNELS, RuntimeError when it forces a kernel that cannot run.
    """
    mode = os.environ.get("CRAMFAST_KERNELS", "auto")
    interpreted = device.type != "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
    if torch.compiler.is_compiling():  # traces through a cache, and warns of it
        return _choose(operator, device, dtype, mode, interpreted, False)
    return _remembered(operator, device, dtype, mode, interpreted, _are_functorch_transforms_active())


def pick(operator: str, tensor: torch.Tensor, reference: Callable) -> Callable:
    """The callable that computes `operator` on tensors like this: its kernel or `reference`, as `choose` decides."""
    choice = choose(operator, tensor.device, tensor.dtype)
    return _kernels[operator].run if choice.backend == "triton" else reference


def _choose(
    operator: str,
    device: torch.device,
    dtype: torch.dtype | None,
    mode: str,
    interpreted: bool,
    transformed: bool,
) -> Choice:
    if mode not in MODES:
        raise ValueError(f"CRAMFAST_KERNELS={mode}: expected one of {', '.join(MODES)}")
    if mode == "reference":
        return Choice("reference", "CRAMFAST_KERNELS=reference")
    obstacle = _obstacle(operator, device, dtype, interpreted)
    if obstacle is None and transformed:
        obstacle = "torch.func transforms plain operations alone"
    if obstacle is None:
        return Choice("triton", f"{device.type} device")
    if mode == "triton":
        raise RuntimeError(f"CRAMFAST_KERNELS=triton, but {operator} cannot run as Triton: {obstacle}")
    return Choice("reference", obstacle)


_remembered = functools.lru_cache(_choose)


def _obstacle(operator: str, device: torch.device, dtype: torch.dtype | None, interpreted: bool) -> str | None:
    """Why a Triton kernel cannot serve tensors of `dtype` on `device`; None when it can."""
    if operator not in _kernels:
        return "no Triton kernel yet"
    kernel = _kernels[operator]
    if dtype is not None and dtype.is_floating_point and dtype not in kernel.dtypes:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if not AVAILABLE:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        capability = torch.cuda.get_device_capability(device)
        if capability < kernel.capability:
            return f"compute capability below {kernel.capability[0]}.{kernel.capability[1]}"
        return "no bfloat16 below compute capability 8.0" if dtype == torch.bfloat16 and capability < (8, 0) else None
    return None if interpreted else f"{device.type} device"
