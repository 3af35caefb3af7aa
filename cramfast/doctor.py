"""`python -m cramfast.doctor`: what this machine is to cramfast, and what is missing."""

import importlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from . import cli
from .errors import UserError


@dataclass(frozen=True)
class DoctorOptions:
    """Report the card, the versions, which operators run as Triton kernels, and what is missing."""

    test: bool = False
    """Instead, run every operator against its reference on this card, in every dtype."""


def main(argv: list[str] | None = None) -> int:
    return cli.run(DoctorOptions, _doctor, "cramfast.doctor", argv)


def _doctor(options: DoctorOptions) -> int:
    return _test() if options.test else _report()


def _test() -> int:
    from rich.console import Console

    from .device import device_class, pick_device
    from .kernels import selftest

    device, console = pick_device(), Console(highlight=False)
    console.print(device_class(device) if device.type == "cuda" else "no CUDA device", markup=False)
    tested = wrong = 0
    with console.status("compiling"):
        for finding in selftest(device):
            name = f"{finding.operator:<18}{str(finding.dtype or '').removeprefix('torch.'):<10}"
            if finding.worst is None:
                console.print(f"{name}{finding.reason}", markup=False)
                continue
            verdict = "WRONG" if finding.wrong else "right"
            error = f"{finding.worst:.0%} of the allowed error"
            console.print(f"{name}{verdict}, {error}, {finding.seconds:.1f} s", markup=False)
            tested, wrong = tested + 1, wrong + finding.wrong
    if not tested:
        raise UserError("--test: no operator runs as a kernel here; TRITON_INTERPRET=1 interprets them on a CPU")
    return 1 if wrong else 0


def _report() -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, finding in (*_machine(), *_operators(), *_peers(), *_storage()):
        table.add_row(name, finding)
    Console(highlight=False).print(table, markup=False)
    return 0


def _machine() -> list[tuple[str, str]]:
    import torch

    from .device import device_class, driver_version, pick_device, pick_dtype, version_of

    device = pick_device()
    rows = [("python", sys.version.split()[0]), ("torch", torch.__version__)]
    rows.append(("triton", version_of("triton") or version_of("triton-windows") or "not installed"))
    rows.append(("driver", driver_version() or "no NVIDIA driver found"))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        rows.append(("card", torch.cuda.get_device_name(device)))
        rows.append(("class", device_class(device)))
        rows.append(("memory", f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"))
    else:
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        rows.append(("card", f"none ({reason}): training runs on {torch.get_num_threads()} CPU threads"))
    scaling = " with loss scaling" if pick_dtype(device) == torch.float16 else ""
    rows.append(("matrix products in", str(pick_dtype(device)).removeprefix("torch.") + scaling))
    return rows


def _operators() -> list[tuple[str, str]]:
    """Who computes each operator; sequences for which attention has no kernel are rows of their own."""
    from .device import pick_device, pick_dtype
    from .kernels import OPERATORS, choose, choose_long

    device, rows = pick_device(), []
    for name in OPERATORS:
        rows.append((name, _chosen(choose, name, device)))
        if name == "varlen_attention":
            kind = device, pick_dtype(device), 64
            rows.append(("attention past 512", _chosen(choose_long, *kind)))
            rows.append(("past 512, one length", _chosen(choose_long, *kind, 0.0, True)))
    return rows


def _chosen(choose, *arguments) -> str:
    try:
        choice = choose(*arguments)
    except (ValueError, RuntimeError) as error:  # CRAMFAST_KERNELS asks for what cannot be
        return f"none: {error}"
    return f"{choice.backend} ({choice.reason})"


def _peers() -> list[tuple[str, str]]:
    """Libraries that are used or compared with where they are installed."""
    from .device import version_of

    def found(distribution: str, module: str) -> str:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken build fails in as many ways as there are builds
            # Its own absence, not that of something it needs.
            own = (module.split(".")[0], distribution)
            missing = isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in own
            return "not installed" if missing else f"does not import: {' '.join(str(error).split())}"
        return version_of(distribution) or "installed"

    return [
        ("flash-attn", found("flash-attn", "flash_attn")),
        # The `apex` of the package index is another project; NVIDIA's has this module.
        ("apex (NVIDIA's)", found("apex", "apex.normalization")),
        ("liger-kernel", found("liger-kernel", "liger_kernel")),
        ("tensorboard", found("tensorboard", "torch.utils.tensorboard")),
    ]


def _storage() -> list[tuple[str, str]]:
    from .data.prepare import default_cache

    cache = default_cache()
    rows = [("token cache", f"{cache}, {_free(cache)} free"), ("here", f"{Path.cwd()}, {_free(Path.cwd())} free")]
    shared = Path("/dev/shm")
    if os.name == "posix" and shared.is_dir():
        rows.append(("shared memory", f"{_free(shared)} free"))
    return rows


def _free(path: Path) -> str:
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
