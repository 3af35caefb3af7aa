"""Rows of a task out of .jsonl, .csv and .tsv files, or of GLUE on the Hugging Face hub, each with its place."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

_HUB = "nyu-mll/glue"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Place:
    """Where a row stands; reads as FILE:LINE."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Row:
    """A sentence or a pair of them, with its label as the file has it."""

    first: str
    second: str | None
    label: object
    place: Place


def read_rows(path: Path, pair: bool | None) -> Iterator[Row]:
    """The rows of a file, by its ending. pair: whether they have a second sentence; None: as the first row has.

    Raises UserError for a file that cannot be read, and by line for a row that lacks a sentence or its label.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = _table(path, file) if path.suffix in _DELIMITERS else _objects(path, file)
            for place, record in records:
                if pair is None:
                    pair = record.get("sentence2") is not None
                yield _row(place, record, ("sentence1", "sentence2") if pair else ("sentence1",))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _objects(path: Path, file) -> Iterator[tuple[Place, dict]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = Place(str(path), number)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: not a JSON object")
        yield place, record


def _table(path: Path, file) -> Iterator[tuple[Place, dict]]:
    # Tab-separated files know no quotes: a lone one is a character of the sentence.
    delimiter = _DELIMITERS[path.suffix]
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
    header = reader.fieldnames or []
    for name in ("sentence1", "label"):
        if header and name not in header:
            raise UserError(f"{path}:1: no column {name}; the header has {', '.join(header)}")
    for record in reader:
        yield Place(str(path), reader.line_num), record


def _row(place: Place, record: dict, columns: tuple[str, ...]) -> Row:
    sentences = [record.get(name) for name in columns]
    for name, sentence in zip(columns, sentences, strict=True):
        if not isinstance(sentence, str):
            raise UserError(f"{place}: no {name}" if sentence is None else f"{place}: {name} is not text")
    label = record.get("label")
    if label is None or label == "":
        raise UserError(f"{place}: no label")
    if not isinstance(label, (str, int, float)):
        raise UserError(f"{place}: label {label!r} is neither a number nor a word")
    return Row(sentences[0], sentences[1] if len(sentences) == 2 else None, label, place)


def hub_rows(task: str, split: str, columns: tuple[str, ...]) -> list[Row]:
    """The rows of one split of a GLUE task on the hub. Raises UserError where `datasets` or the network is missing."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--task {task}: Hugging Face datasets is not installed; install it or give --glue-dir"
        ) from error
    name = f"{_HUB}/{task}@{split}"
    try:
        table = datasets.load_dataset(_HUB, task, split=split)
    except Exception as error:  # of the network, of the hub, of the cache: each has kinds of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: cannot be loaded ({reason[0]}); give --glue-dir") from error
    return [_row(Place(name, number), record, columns) for number, record in enumerate(table, 1)]
