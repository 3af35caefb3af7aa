"""What the machine is: the device to train on, the arithmetic it does, its speed, its energy meter."""

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__
from .errors import UserError
from .kernels import OPERATORS, choose

_CLASSES = {
    (7, 5): "sm_75: Turing, no bf16",
    (8, 0): "sm_80: A100, 163 KiB shared memory a block",
    (8, 6): "sm_86: Ampere, 99 KiB shared memory a block",
    (8, 9): "sm_89: Ada, 99 KiB shared memory a block, fp8",
    (9, 0): "sm_90: Hopper, 227 KiB shared memory a block, fp8",
    (10, 0): "sm_100: Blackwell, 227 KiB shared memory a block, fp8",
    (12, 0): "sm_120: Blackwell, 99 KiB shared memory a block, fp8",
}


def has_gpu(wish: str = "auto") -> bool:
    """Whether `--device WISH` means a GPU. Raises UserError when it asks for one that is not there."""
    found = torch.cuda.is_available()
    if wish == "cuda" and not found:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise UserError(f"--device cuda: {built}; see python -m cramfast.doctor")
    return found and wish != "cpu"


def pick_device(wish: str = "auto") -> torch.device:
    """The device of `--device WISH`."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu(wish) else torch.device("cpu")


def operator_backends(device: torch.device) -> set[str]:
    """Who computes the operators there, "triton" or "reference". Raises UserError when CRAMFAST_KERNELS asks for what
    cannot run."""
    try:
        return {choose(operator, device).backend for operator in OPERATORS}
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def pick_dtype(device: torch.device, wish: str = "auto") -> torch.dtype:
    """The dtype of matrix products for `--dtype WISH`. Raises UserError where the device cannot do it."""
    if wish != "auto":
        dtype = getattr(torch, wish)
        if dtype == torch.float16 and device.type == "cpu":
            raise UserError("--dtype float16: training in float16 needs a GPU; use bfloat16 or float32 on a CPU")
        if dtype == torch.bfloat16 and device.type == "cuda" and _capability(device) < (8, 0):
            raise UserError("--dtype bfloat16: this GPU has no bfloat16; use float16 or leave --dtype out")
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if _capability(device) >= (8, 0) else torch.float16


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def device_class(device: torch.device) -> str:
    """The class of a card in one phrase, e.g. "sm_86: Ampere, 99 KiB shared memory a block"."""
    major, minor = _capability(device)
    return _CLASSES.get((major, minor), f"sm_{major}{minor}: not a class this project knows")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large square matrix product on random data: what MFU is a share of. Takes under 0.5 s, or as
    long as two products on a CPU without instructions for the dtype, seconds each."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    for number in range(6):
        if number > 1 and time.perf_counter() - begun > 1:
            break
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def copy_rate(device: torch.device) -> float:
    """Measured bytes a second that a copy inside the device's memory reads and writes. Takes under 0.5 s."""
    # Far beyond the caches; from 512 MiB on the driver's copy is slower again, measured on an NVIDIA H200.
    size, copies = (384 * 2**20, 10) if device.type == "cuda" else (64 * 2**20, 1)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size * copies / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory this process has held: the allocator's on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10  # bytes there, KiB elsewhere


def environment(device: torch.device) -> dict:
    """What a result was measured on: card, driver, versions, git revision, date; None for what cannot be known."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "driver": driver_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton") or version_of("triton-windows"),
        "cramfast": __version__,
        "revision": _git_revision(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The NVIDIA driver's version by NVML; None without one."""
    with contextlib.suppress(Exception):  # no driver, no library: there is nothing to tell
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    return None


def _git_revision() -> str | None:
    """The revision of the clone this code runs from; None outside one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


@dataclass
class EnergyMeter:
    """Joules that the GPU has used since this meter was made, by NVML; None where NVML cannot tell."""

    device: torch.device

    def __post_init__(self):
        self._handle = None
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):  # no driver, no permission, an old card: energy is optional
                import pynvml

                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(self.device))
        self._start = self._read()

    def joules(self) -> float | None:
        now = self._read()
        return None if now is None or self._start is None else now - self._start

    def _read(self) -> float | None:
        if self._handle is not None:
            with contextlib.suppress(Exception):
                import pynvml

                return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        return None


def _uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
