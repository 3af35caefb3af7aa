"""GLUE's numbers: medians over seeds, their average, and the table in the cramming paper's layout.

Results are the JSON that finetuning writes: `tasks` → task → `seeds` → seed → `scores` → split → metric.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

Number = tuple[str, str, str]
"""(task, split, metric)"""


@dataclass(frozen=True)
class Column:
    """A column of the table and the numbers that it shows, of which every one counts in the average."""

    title: str
    numbers: tuple[Number, ...]


COLUMNS = (
    Column("MNLI m/mm", (("mnli", "matched", "accuracy"), ("mnli", "mismatched", "accuracy"))),
    Column("SST-2", (("sst2", "dev", "accuracy"),)),
    Column("STS-B", (("stsb", "dev", "pearson"),)),
    Column("RTE", (("rte", "dev", "accuracy"),)),
    Column("QNLI", (("qnli", "dev", "accuracy"),)),
    Column("QQP", (("qqp", "dev", "f1"),)),
    Column("MRPC", (("mrpc", "dev", "f1"),)),
    Column("CoLA", (("cola", "dev", "matthews"),)),
)
HEAD = (*(column.title for column in COLUMNS), "average")


def medians(results: dict) -> dict[Number, float]:
    """The median over seeds of every number in the results."""
    found: dict[Number, list[float]] = {}
    for task, entry in results["tasks"].items():
        for seed in entry["seeds"].values():
            for split, scores in seed["scores"].items():
                for metric, value in scores.items():
                    found.setdefault((task, split, metric), []).append(value)
    return {number: median(values) for number, values in found.items()}


def cells(found: dict[Number, float]) -> tuple[str, ...]:
    """A row under HEAD, in percent; "–" for what is missing, which the average leaves out."""
    counted = [found[number] for column in COLUMNS for number in column.numbers if number in found]
    average = percent(fmean(counted)) if counted else "–"
    return (*("/".join(percent(found.get(n)) for n in column.numbers) for column in COLUMNS), average)


def percent(share: float | None) -> str:
    """One digit after the point."""
    return "–" if share is None else f"{100 * share:.1f}"


def in_percent(scores: dict[str, dict[str, float]]) -> str:
    """Metrics in percent; the split is named where there are several."""
    return ", ".join(
        f"{metric} {percent(value)}" + (f" {split}" if len(scores) > 1 else "")
        for split, values in scores.items()
        for metric, value in values.items()
    )


def missing(found: dict[Number, float]) -> list[str]:
    """The columns that lack a number."""
    return [column.title for column in COLUMNS if any(number not in found for number in column.numbers)]


def remark(found: dict[Number, float]) -> str:
    """What a reader of the average has to know; empty when all nine numbers are there."""
    absent = missing(found)
    if not absent:
        return ""
    numbers = [number for column in COLUMNS for number in column.numbers]
    count = sum(number in found for number in numbers)
    return f"The average is over {count} of {len(numbers)} numbers; missing: {', '.join(absent)}."


def plain_table(rows: dict[str, dict[Number, float]]) -> str:
    """The table as aligned text, a row for each name."""
    lines = [("", *HEAD), *((name, *cells(found)) for name, found in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: Iterable[str], widths: list[int]) -> str:
    name, *others = line
    return "  ".join([name.ljust(widths[0]), *(o.rjust(w) for o, w in zip(others, widths[1:], strict=True))])
