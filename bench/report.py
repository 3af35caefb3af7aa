"""`python -m bench.report`: the results folder as the README's tables and as plots.

Each `<!-- bench:MODULE -->` … `<!-- /bench -->` in the README is filled from that module's results, `bench:bars` with
the bars that are not held, `bench:projection` with what other cards are projected to reach, `bench:glue` with what
finetuning came to, `bench:headline` with the most telling of it all; no number there is typed by hand. `--check` only
says whether README and results agree.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cramfast import cli
from cramfast.errors import UserError

from . import bars, glue, headline, ledger, plots, projection, tables

_ROOT = Path(__file__).parents[1]
_SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


@dataclass(frozen=True)
class ReportOptions:
    """Turn benchmark results into the README's tables and into plots."""

    results: Path = Path(__file__).parent / "results"
    """Folder of the results."""
    readme: Path = _ROOT / "README.md"
    """The file whose marked sections are filled."""
    against: str | None = None
    """Compare with the results at this earlier git revision, and change nothing."""
    check: bool = False
    """Say whether the README agrees with the results, with exit code 1 where it does not; change nothing."""
    bars: bool = False
    """List which bars the results hold and which they miss, and change nothing."""


def main(argv: list[str] | None = None) -> int:
    return cli.run(ReportOptions, report, "bench.report", argv)


def report(options: ReportOptions) -> int:
    devices = ledger.load(options.results)
    if options.against is not None:
        print(tables.comparison(at_revision(options.results, options.against), devices))
        return 0
    if options.bars:
        verdicts = [verdict for device in devices for verdict in bars.evaluate(device)]
        print("\n".join(map(str, verdicts)) or f"no results in {options.results}")
        return 0
    if options.check:
        difference = disagreement(options.results, options.readme)
        if difference:
            print(difference)
        return 1 if difference else 0
    options.readme.write_text(fill(options.readme.read_text(), devices, plot_folder(options.results, options.readme)))
    for device in devices:
        for name, module in device.modules.items():
            if module.has_plot:
                plots.draw(device, module, options.results / device.folder / f"{name}.png")
    print(f"{options.readme.name} and plots written from {sum(len(d.modules) for d in devices)} results files")
    return 0


def fill(text: str, devices: list[ledger.Device], plots_at: str) -> str:
    """`text` with every marked section filled. Raises UserError for results that have no section."""
    names = {match[2] for match in _SECTION.finditer(text)}
    homeless = {name for device in devices for name in device.modules} - names
    if homeless:
        raise UserError(f"the README has no <!-- bench:{min(homeless)} --> section for {min(homeless)}.json")

    def section(match: re.Match) -> str:
        name = match[2]
        if name == "bars":
            content = bars.summary(devices)
        elif name == "projection":
            content = projection.projection_table()
        elif name == "glue":
            content = glue.tables_of(devices)
        elif name == "headline":
            content = headline.headline(devices)
        else:
            content = tables.module_tables(name, devices, plots_at)
        return match[1] + content + "\n" + match[3]

    return _SECTION.sub(section, text)


def disagreement(results: Path, readme: Path) -> str | None:
    """Where the README says something else than the results, as one line; None when they agree."""
    text = readme.read_text()
    expected = fill(text, ledger.load(results), plot_folder(results, readme))
    for said, found in zip(_SECTION.finditer(text), _SECTION.finditer(expected), strict=True):
        if said[0] != found[0]:
            lines = zip([*said[0].splitlines(), ""], [*found[0].splitlines(), ""], strict=False)
            one, other = next(pair for pair in lines if pair[0] != pair[1])
            return f"{readme.name}, bench:{said[2]} says {one!r}, the results say {other!r}; run python -m bench.report"
    return None


def plot_folder(results: Path, readme: Path) -> str:
    """The results folder as the README links to it."""
    return Path(os.path.relpath(results, readme.parent)).as_posix()


def at_revision(results: Path, revision: str) -> list[ledger.Device]:
    """The results folder as it was at a git revision. Raises UserError when git cannot tell."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(results), *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--against {revision}: {(done.stderr.strip().splitlines() or ['git failed'])[0]}")
        return done.stdout

    names = git("ls-tree", "-r", "--name-only", revision, ".").splitlines()
    paths = [Path(name) for name in names if re.fullmatch(r"[^/]+/[^/]+\.json", name)]
    return ledger.from_texts({path: git("show", f"{revision}:./{path}") for path in paths})


if __name__ == "__main__":
    sys.exit(main())
