"""`python -m cramfast.pretrain` forked from a process that has imported it, which takes longer than a few updates."""

import multiprocessing
import os
import sys
from pathlib import Path
from unittest.mock import patch

from cramfast import pretrain

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cramfast.train.run", "matplotlib.pyplot"])


class ForkedRun:
    """What a subprocess.Popen of the command is; `folder` gets what it prints."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path):
        self._printed = [folder / f"{os.urandom(8).hex()}.{name}" for name in ("out", "err")]
        self._process = _CONTEXT.Process(target=_run, args=(words, environment, self._printed), daemon=True)
        # The first starts the process that forks, whose torch has as many threads as this says.
        with patch.dict(os.environ, environment):
            self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> list[str]:
        self._process.join(timeout)
        return [path.read_text() if path.exists() else "" for path in self._printed]


def _run(words: list[str], environment: dict[str, str], printed: list[Path]) -> None:
    for descriptor, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    sys.exit(pretrain.main(words))
