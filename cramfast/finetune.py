"""`python -m cramfast.finetune`: finetune an encoder on GLUE or on a task of one's own, and evaluate it."""

import os
import sys

from . import cli
from .downstream.settings import FinetuneOptions


def main(argv: list[str] | None = None) -> int:
    return cli.run(FinetuneOptions, _finetune, "cramfast.finetune", argv)


def _finetune(options: FinetuneOptions) -> int:
    # Waiting CPU threads sleep instead of spinning, which costs several times the speed where other programs run too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .downstream.run import finetune  # torch comes with it, which --help need not wait for

    return finetune(options)


if __name__ == "__main__":
    sys.exit(main())
