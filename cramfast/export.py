"""`python -m cramfast.export`: a model as a folder that the rest of the world can load."""

import sys
from dataclasses import dataclass
from pathlib import Path

from . import cli


@dataclass(frozen=True)
class ExportOptions:
    """Write a model as a stock Hugging Face folder, and load it back with transformers to compare its logits.

    A model that no class of transformers fits, such as crammed-bert, becomes a folder for cramfast.load.
    """

    checkpoint: str
    """A run, a checkpoint, a final folder, a Hugging Face folder, or a hub id."""
    to: Path
    """Folder to write. It must not exist, or be empty."""


def main(argv: list[str] | None = None) -> int:
    return cli.run(ExportOptions, _export, "cramfast.export", argv)


def _export(options: ExportOptions) -> int:
    from rich.console import Console

    from .exporting import export  # torch comes with it, which --help need not wait for

    console = Console(highlight=False, soft_wrap=True)
    with console.status("") as status:
        done = export(options.checkpoint, options.to, lambda stage: status.update(f"{stage} ..."))
    console.print(done.summary(), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
