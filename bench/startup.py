"""How long `python -m cramfast.pretrain` takes from the start of its process to the end of its first update.

It reads the corpus that every Python brings, as a first-time user does, and finds its batch by timing. The tokens are
in their cache; the compiled kernels are, or, cold, are not.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cramfast import kernels
from cramfast.train.progress import METRICS

from .peers import CRAMFAST

COLD, WARM = "cold", "warm"
_ROUNDS = 3
_POLL_SECONDS = 0.01
_MOST_SECONDS = 300.0
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class StartupWork:
    """The first update of a preset, with the compiled kernels in their cache (WARM) or none there (COLD)."""

    preset: str
    cache: str

    @property
    def work(self) -> str:
        return f"startup/{self.cache}/{self.preset}"


class Starter:
    """Starts runs of a preset in a folder of its own, and stops each after its first update."""

    def __init__(self, preset: str, folder: Path, arguments: tuple[str, ...] = ()):
        self.folder, self.compiled = folder, folder / "compiled"
        settings = ("--preset", preset, "--budget", "10m", "--evals", "1", "--log-every", "1steps")
        places = ("--cache", str(folder / "tokens"), "--out", str(folder / "run"))
        self.command = [sys.executable, "-m", "cramfast.pretrain", *settings, *places, *arguments]
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        # As pip leaves packages: compiled to bytecode, which a container's image may have neither done nor allowed.
        bytecode = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
        self.environment = os.environ | bytecode | {"TRITON_CACHE_DIR": str(self.compiled), "PYTHONPATH": paths}

    def forget_kernels(self) -> None:
        shutil.rmtree(self.compiled, ignore_errors=True)

    def __call__(self) -> None:
        """Return when the first update's record is there. Raises RuntimeError with the run's last line if it fails."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(self.command, env=self.environment, stdout=said, stderr=subprocess.STDOUT)
            try:
                self._wait(process)
            except TimeoutError as error:
                said.seek(0)
                last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
                raise RuntimeError(f"{' '.join(self.command)}: {error}: {last}") from None
            finally:
                process.kill()
                process.wait()

    def _wait(self, process: subprocess.Popen) -> None:
        began, metrics = time.monotonic(), self.folder / "run" / METRICS
        while not (metrics.is_file() and b"\n" in metrics.read_bytes()):
            if process.poll() is not None:
                raise TimeoutError(f"ended with {process.returncode} before its first update")
            if time.monotonic() - began > _MOST_SECONDS:
                raise TimeoutError(f"no update in {_MOST_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)


def measure_startup(benchmark, work: StartupWork, dtype: torch.dtype, device: torch.device, starter: Starter) -> None:
    """Time starts into `benchmark`, whose extra_info becomes the record; the first, which fills the caches, is not."""
    starter()
    benchmark.group = work.work
    setup = starter.forget_kernels if work.cache == COLD else None
    benchmark.pedantic(starter, setup=setup, rounds=_ROUNDS)
    benchmark.extra_info.update(
        work=work.work,
        who=CRAMFAST.who,
        dtype=str(dtype).removeprefix("torch."),
        seconds=benchmark.stats.stats.median if benchmark.stats else None,
        timed_by="events",
        backend=kernels.choose("varlen_attention", device, dtype).backend,
    )
