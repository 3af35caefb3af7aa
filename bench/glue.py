"""`python -m bench.glue`: results of finetuning, with and without pretraining, as the file of a table in the README.

The file has the environment and the settings that both rows share, and for each row its checkpoint and, by task, the
rows that it was trained and evaluated on and the scores of every seed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from cramfast import cli
from cramfast.downstream.results import NAME
from cramfast.downstream.table import HEAD, cells, medians, remark
from cramfast.downstream.tasks import GLUE
from cramfast.errors import UserError
from cramfast.train.checkpoint import read_json, write_json
from cramfast.train.settings import differences

from .ledger import Device, slug
from .tables import markdown

PRETRAINED, RANDOM = "pretrained", "random weights"
_SHARED = ("protocol", "tokenizer", "device", "dtype")


@dataclass(frozen=True)
class GlueOptions:
    """Join results of cramfast.finetune into one file for the README."""

    pretrained: tuple[Path, ...]
    """Folders with the results of a pretrained encoder; several hold different tasks or seeds of the same one."""
    random: tuple[Path, ...] = ()
    """The same of random weights."""
    to: Path | None = None
    """The file to write. None: bench/results/DEVICE/glue.json, by the device that they come from."""


def main(argv: list[str] | None = None) -> int:
    return cli.run(GlueOptions, join, "bench.glue", argv)


def join(options: GlueOptions) -> int:
    """Write the file. Raises UserError for results that are missing or do not belong together."""
    folders = {PRETRAINED: options.pretrained, RANDOM: options.random}
    read = {name: [_read(folder) for folder in given] for name, given in folders.items() if given}
    for name, results in read.items():
        wrong = next((r for r in results if r["settings"]["random_weights"] != (name == RANDOM)), None)
        if wrong:
            raise UserError(f"--{name.split()[0]}: {wrong['checkpoint']} was finetuned from other weights than those")
        for other in results[1:]:
            _expect_same(results[0], other, (*_SHARED, "encoder"))
        _expect_same(read[PRETRAINED][0], results[0], _SHARED)
    first = read[PRETRAINED][0]
    content = {
        "environment": first["environment"],
        "protocol": first["settings"]["protocol"],
        "dtype": first["settings"]["dtype"],
        "rows": {name: _row(results) for name, results in read.items()},
    }
    path = options.to or Path(__file__).parent / "results" / slug(first["environment"]["device"]) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise UserError(f"--to {path}: {error.strerror}") from error
    print(f"{table(content)}\n\nsaved {path}; python -m bench.report puts it into the README")
    return 0


def _read(folder: Path) -> dict:
    content = read_json(folder / NAME)
    if not {"settings", "checkpoint", "environment", "tasks"} <= content.keys():
        raise UserError(f"{folder / NAME}: not results of cramfast.finetune")
    return content


def _expect_same(one: dict, other: dict, names: tuple[str, ...]) -> None:
    found = differences(*({name: results["settings"][name] for name in names} for results in (one, other)))
    if found:
        there, here = one["checkpoint"], other["checkpoint"]
        raise UserError(f"results of {there} and of {here} do not belong together: {'; '.join(found)}")


def _row(results: list[dict]) -> dict:
    """One row of the table out of the results of several folders. What is told of a seed is its scores and seconds."""
    tasks: dict[str, dict] = {}
    for result in results:
        for task, entry in result["tasks"].items():
            facts = {name: entry[name] for name in ("train_rows", "dev_rows")}
            known = tasks.setdefault(task, facts | {"seeds": {}})
            for seed, values in entry["seeds"].items():
                known["seeds"][seed] = {name: values[name] for name in ("scores", "steps", "seconds")}
    return {"checkpoint": Path(results[0]["checkpoint"]).as_posix(), "tasks": tasks}


def tables_of(devices: list[Device]) -> str:
    """The README's text: a table for every device that has results."""
    return "\n\n".join(table(device.glue) for device in devices if device.glue) or "Nothing measured yet."


def table(content: dict) -> str:
    """The table as Markdown, and what a reader has to know about it."""
    found = {name: medians(row) for name, row in content["rows"].items()}
    rows = [(f"**{name}**" if name == PRETRAINED else name, *cells(values)) for name, values in found.items()]
    return f"{markdown(('', *HEAD), rows)}\n\n{_explanation(content, found[PRETRAINED])}"


def _explanation(content: dict, found: dict) -> str:
    tasks, environment = content["rows"][PRETRAINED]["tasks"], content["environment"]
    seeds = sorted({len(entry["seeds"]) for row in content["rows"].values() for entry in row["tasks"].values()})
    rows = ", ".join(f"{name} {_rows(tasks[name])}" for name in GLUE if name in tasks)
    return (
        f"In percent, medians of {'/'.join(map(str, seeds))} seeds; {content['dtype']}. {remark(found)} "
        f"Rows of training/evaluation: {rows}. {environment['device']}, torch {environment['torch']}, revision "
        f"{environment['revision'] or 'unknown'}, {environment['date']}."
    ).replace("  ", " ")


def _rows(entry: dict) -> str:
    return "/".join(f"{count:,}" for count in (entry["train_rows"], *entry["dev_rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
