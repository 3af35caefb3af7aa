"""`python -m cramfast.pretrain`: pretrain an encoder on text within a budget."""

import os
import sys

from . import cli
from .config import PretrainOptions


def main(argv: list[str] | None = None) -> int:
    return cli.run(PretrainOptions, _pretrain, "cramfast.pretrain", argv)


def _pretrain(options: PretrainOptions) -> int:
    # Waiting CPU threads sleep instead of spinning, which costs several times the speed where other programs run too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .train.run import pretrain  # torch comes with it, which --help need not wait for

    return pretrain(options)


if __name__ == "__main__":
    sys.exit(main())
