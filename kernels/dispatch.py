"""One rule for which implementation of an operator runs, and why.

`CRAMFAST_KERNELS` is `auto` (Triton where the operator has a kernel and the tensor's device can run it, else the
reference), `reference`, or `triton` (a choice that cannot be honoured is an error).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

OPERATORS = ("embed", "layer_norm", "add_layer_norm", "gelu", "geglu", "varlen_attention", "mask_tokens", "mlm_loss")
MODES = ("auto", "triton", "reference")


@dataclass(frozen=True)
class Choice:
    """What runs for one operator on one device: `backend` is "triton" or "reference", `reason` a short phrase."""

    backend: str
    reason: str


# The Triton implementation of each operator that has one.
_kernels: dict[str, Callable] = {}


def choose(operator: str, device: torch.device) -> Choice:
    """The implementation of `operator` that runs for tensors on `device`.

    Raises ValueError for an unknown CRAMFAST_KERNELS, RuntimeError when it forces a kernel that cannot run.
    """
    mode = os.environ.get("CRAMFAST_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"CRAMFAST_KERNELS={mode}: expected one of {', '.join(MODES)}")
    if mode == "reference":
        return Choice("reference", "CRAMFAST_KERNELS=reference")
    obstacle = _obstacle(operator, device)
    if obstacle is None:
        return Choice("triton", f"{device.type} device")
    if mode == "triton":
        raise RuntimeError(f"CRAMFAST_KERNELS=triton, but {operator} cannot run as Triton: {obstacle}")
    return Choice("reference", obstacle)


def pick(operator: str, device: torch.device, reference: Callable) -> Callable:
    """The callable that computes `operator` on `device`: its Triton kernel or `reference`, as `choose` decides."""
    return _kernels[operator] if choose(operator, device).backend == "triton" else reference


def _obstacle(operator: str, device: torch.device) -> str | None:
    """Why a Triton kernel cannot serve tensors on `device`; None when it can."""
    if operator not in _kernels:
        return "no Triton kernel yet"
    if device.type == "cuda":
        return None if torch.cuda.get_device_capability(device) >= (7, 5) else "compute capability below 7.5"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"{device.type} device"
