"""The tasks: GLUE's nine and those that people bring, and where their rows come from.

A task's data are a training split and one or more development splits of `Rows`. Labels are checked here, so that what
follows can trust them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .rows import Row, hub_rows, read_rows
from .settings import DataOptions, LabelKind


@dataclass(frozen=True)
class Task:
    """metrics: the one that counts comes first. labels: number of classes; 0: what the training rows have. splits: the
    development files by name, each with the names that it may have on disk. columns: the sentences' names on the
    Hugging Face hub."""

    name: str
    kind: LabelKind = "class"
    labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    splits: tuple[tuple[str, tuple[str, ...]], ...] = (("dev", ("dev.jsonl",)),)

    @property
    def is_pair(self) -> bool:
        return len(self.columns) == 2


_MNLI_SPLITS = (
    ("matched", ("dev_matched.jsonl", "dev.jsonl")),
    ("mismatched", ("dev_mismatched.jsonl", "dev_mismatched_*.jsonl")),
)
_OPTIONAL = "mismatched"

GLUE = {
    task.name: task
    for task in (
        Task("mnli", labels=3, columns=("premise", "hypothesis"), splits=_MNLI_SPLITS),
        Task("sst2", columns=("sentence",)),
        Task("stsb", kind="score", labels=1, metrics=("pearson", "spearman")),
        Task("rte"),
        Task("qnli", columns=("question", "sentence")),
        Task("qqp", metrics=("f1", "accuracy"), columns=("question1", "question2")),
        Task("mrpc", metrics=("f1", "accuracy")),
        Task("cola", metrics=("matthews", "accuracy"), columns=("sentence",)),
        Task("wnli"),
    )
}


@dataclass(frozen=True)
class Rows:
    """Sentences, a second one for each where the task is of pairs, and labels: ints, or floats of scores."""

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskData:
    """A task with its rows. outputs: classes, or 1 for a score. names: what the classes are called in the files."""

    task: Task
    train: Rows
    dev: dict[str, Rows]
    outputs: int
    names: tuple[str, ...] = ()


def chosen_tasks(options: DataOptions) -> list[Task]:
    """The tasks that the options name, in the order of the table; one of the user's own is called by its file."""
    if options.train is not None:
        metrics = ("accuracy",) if options.label_kind == "class" else ("pearson", "spearman")
        return [Task(options.train.stem, kind=options.label_kind, labels=0, metrics=metrics)]
    return [task for name, task in GLUE.items() if name in options.task or "all" in options.task]


def load_task(task: Task, options: DataOptions) -> TaskData:
    """Read a task's rows. Raises UserError for files that are missing and rows that are wrong, by file and line."""
    if options.train is not None:
        train, dev = (_whole(read_rows(path, pair=None), path) for path in (options.train, options.dev))
        _same_columns(train, dev, options.train, options.dev)
        return _checked(task, train, {"dev": dev})
    if options.glue_dir is None:
        train = hub_rows(task.name, "train", task.columns)
        dev = {name: hub_rows(task.name, _hub_split(name), task.columns) for name, _ in task.splits}
        return _checked(task, train, dev)
    folder = options.glue_dir / task.name
    if not folder.is_dir():
        raise UserError(f"--glue-dir {options.glue_dir}: has no folder {task.name}")
    paths = {name: _find(folder, patterns) for name, patterns in task.splits}
    paths = {name: path for name, path in paths.items() if path is not None or name != _OPTIONAL}
    missing = next((patterns[0] for name, patterns in task.splits if name in paths and paths[name] is None), None)
    if missing:
        raise UserError(f"{folder}: has no {missing}")
    files = {"train": folder / "train.jsonl", **paths}
    rows = {name: _whole(read_rows(path, task.is_pair), path) for name, path in files.items()}
    return _checked(task, rows.pop("train"), rows)


def _find(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _hub_split(name: str) -> str:
    return "validation" if name == "dev" else f"validation_{name}"


def _whole(rows: Iterable[Row], path: Path) -> list[Row]:
    rows = list(rows)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def _same_columns(train: list[Row], dev: list[Row], train_path: Path, dev_path: Path) -> None:
    if (train[0].second is None) != (dev[0].second is None):
        pairs, singles = (train_path, dev_path) if train[0].second is not None else (dev_path, train_path)
        raise UserError(f"{singles}: has no sentence2, which {pairs} has")


def _checked(task: Task, train: list[Row], dev: dict[str, list[Row]]) -> TaskData:
    """The rows with their labels as numbers that the model can learn."""
    if task.kind == "score":
        convert, outputs, names = _score, 1, ()
    else:
        convert, names = _classes(task, train)
        outputs = len(names)

    def rows(given: list[Row]) -> Rows:
        second = None if given[0].second is None else [row.second for row in given]
        return Rows([row.first for row in given], second, [convert(row) for row in given])

    return TaskData(task, rows(train), {name: rows(given) for name, given in dev.items()}, outputs, names)


def _score(row: Row) -> float:
    try:
        value = float(row.label)
    except (TypeError, ValueError):
        value = float("nan")
    if isinstance(row.label, bool) or not abs(value) < float("inf"):
        raise UserError(f"{row.place}: label {row.label!r} is not a number, which a score is")
    return value


def _classes(task: Task, train: list[Row]) -> tuple[Callable[[Row], int], tuple[str, ...]]:
    """A function from a row to its class, and the names of the classes."""
    numbers = [_whole_number(row.label) for row in train]
    if task.labels or None not in numbers:
        count = task.labels or _count(train, numbers)
        return lambda row: _in_range(row, count), tuple(map(str, range(count)))
    names = sorted({str(row.label) for row in train})
    if len(names) < 2:
        raise UserError(f"{train[0].place.file}: every label is {names[0]!r}; there is nothing to learn")
    numbered = {name: number for number, name in enumerate(names)}

    def number(row: Row) -> int:
        if str(row.label) not in numbered:
            raise UserError(f"{row.place}: label {row.label!r} is in no training row; they have {', '.join(names[:9])}")
        return numbered[str(row.label)]

    return number, tuple(names)


def _whole_number(label: object) -> int | None:
    """The label as an integer where it is one, also as text or as 2.0."""
    if isinstance(label, bool):
        return int(label)
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return int(value) if value.is_integer() else None


def _count(train: list[Row], numbers: list[int]) -> int:
    """How many classes the integers of the training rows tell of."""
    least, count = min(numbers), max(numbers) + 1
    place = train[numbers.index(least if least < 0 else count - 1)].place
    if least < 0:
        raise UserError(f"{place}: label {least} is below 0; classes are integers from 0, or words")
    absent = next((label for label in range(count) if label not in set(numbers)), None)
    if absent is not None:
        raise UserError(f"{place}: label {count - 1}, but no training row has {absent}; classes are integers from 0")
    if count < 2:
        raise UserError(f"{place.file}: every label is 0; there is nothing to learn")
    return count


def _in_range(row: Row, count: int) -> int:
    number = _whole_number(row.label)
    if number is None or not 0 <= number < count:
        raise UserError(f"{row.place}: label {row.label!r} is not one of 0 to {count - 1}")
    return number
