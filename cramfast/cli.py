"""Flags out of dataclasses, and errors as one line with exit code 2."""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from .errors import UserError

Options = TypeVar("Options")


def run(options_type: type[Options], main: Callable[[Options], int], prog: str, argv: list[str] | None = None) -> int:
    """Parse `argv` into `options_type`, call `main`, return the exit code: 2 with one line for bad input."""
    try:
        return main(parse(options_type, prog, argv))
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def parse(options_type: type[Options], prog: str, argv: list[str] | None = None) -> Options:
    """`options_type` filled from flags. Raises UserError for flags that are wrong."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options_type, prog=prog, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if not end.code:
            raise
    raise UserError(_one_line(complaint.getvalue()))


def _one_line(box: str) -> str:
    """The message in the box that tyro draws: what stands above its first ruler, and the nearest flag it names."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    ruler = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    message = " ".join(line for line in lines[:ruler] if line).split(" Got errors:")[0]
    nearest = re.search(r"Perhaps you meant:.*?(--[\w-]+)", box, re.DOTALL)
    return f"{message} (perhaps {nearest[1]}?)" if nearest else f"{message} (see --help)"
