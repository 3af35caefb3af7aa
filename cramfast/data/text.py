"""Sources of text, each read as a stream of documents (str) that never holds more than one of them.

A source has `identity()`, which the token cache is keyed by, `size` in bytes on disk (None: unknown), `bytes_read` so
far, and iterates over its documents. Bad input raises UserError naming the file and the line or offset.
"""

import ast
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from ..errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst")
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)
_FOLDER_TEXT = (".txt", ".text", ".md")

# A longer line or document is cut, so that memory stays bounded whatever a file holds.
_LONGEST_LINE = 1 << 20
_LONGEST_DOCUMENT = 1 << 20
# A JSON line is parsed whole, so beyond this many characters it is refused.
_LONGEST_RECORD = 1 << 26


def open_sources(specs: tuple[str, ...], document_per: str = "blank-line", text_field: str = "text") -> list["Source"]:
    """The sources that `--data SPEC ...` names, in order; no spec means the built-in corpus.

    Raises UserError for a path or pattern that matches nothing.
    """
    if not specs:
        return [BuiltIn()]
    sources = []
    for spec in specs:
        if spec.startswith("hf:"):
            sources.append(HubDataset(spec, text_field))
        else:
            sources += [_file_source(path, document_per, text_field) for path in _paths(spec)]
    return sources


def _paths(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_dir():
        known = (*_FOLDER_TEXT, *_JSON_LINES, *_PARQUET)
        found = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in known)
        if not found:
            raise UserError(
                f"{spec}: no files ending in {' '.join(known)} (or those with {' '.join(COMPRESSIONS)}) inside"
            )
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise UserError(f"{spec}: no such file, folder or pattern with a match")
    return found


def _suffix(path: Path) -> str:
    """The ending that tells the format, compression aside."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def _file_source(path: Path, document_per: str, text_field: str) -> "Source":
    if _suffix(path) in _PARQUET:
        return Parquet(path, text_field)
    if _suffix(path) in _JSON_LINES:
        return JsonLines(path, text_field)
    return TextFile(path, document_per)


class Source:
    """What every source of documents has."""

    size: int | None = None
    bytes_read: int = 0

    def identity(self) -> dict:
        """What the documents depend on; equal identities give equal documents."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError


class _File(Source):
    """A source that is one file on disk."""

    def __init__(self, path: Path, **settings: str):
        self.path = path
        self.settings = settings
        self.size = path.stat().st_size

    def identity(self) -> dict:
        status = self.path.stat()
        return {
            "path": str(self.path.resolve()),
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
            **self.settings,
        }

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, text without its line end) of the decompressed file."""
        try:
            with open(self.path, "rb") as raw:
                for line in _decode(_decompress(raw, self.path), self.path):
                    self.bytes_read = raw.tell()
                    yield line
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            where = f"{self.path}: byte {self.bytes_read} of {self.size}"
            raise UserError(f"{where}: {_one_line(error)}; the file is unreadable, damaged or cut short") from error


class TextFile(_File):
    """Plain text, documents separated by blank lines or one a line."""

    def __init__(self, path: Path, document_per: str):
        super().__init__(path, document_per=document_per)

    def __iter__(self) -> Iterator[str]:
        one_a_line = self.settings["document_per"] == "line"
        lines, length = [], 0
        for _, line in self._lines():
            blank = not line.strip()
            if not blank:
                lines.append(line)
                length += len(line)
            if lines and (blank or one_a_line or length > _LONGEST_DOCUMENT):
                yield "\n".join(lines)
                lines, length = [], 0
        if lines:
            yield "\n".join(lines)


class JsonLines(_File):
    """One JSON object a line, the text in one of its fields."""

    def __init__(self, path: Path, text_field: str):
        super().__init__(path, text_field=text_field)

    def __iter__(self) -> Iterator[str]:
        field = self.settings["text_field"]
        for number, line in self._whole_lines():
            if not line.strip():
                continue
            where = f"{self.path}: line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            except (ValueError, RecursionError) as error:  # a number of too many digits, brackets nested too deep
                raise UserError(f"{where}: not JSON: {_one_line(error)}") from error
            yield from _cut(_field(record, field, where))

    def _whole_lines(self) -> Iterator[tuple[int, str]]:
        """`_lines` with the parts of long lines put together again."""
        for number, parts in groupby(self._lines(), key=itemgetter(0)):
            line = ""
            for _, part in parts:
                line += part
                if len(line) > _LONGEST_RECORD:
                    raise UserError(f"{self.path}: line {number}: longer than {_LONGEST_RECORD:,} characters")
            yield number, line


class Parquet(_File):
    """A Parquet table, the text in one of its columns."""

    def __init__(self, path: Path, text_field: str):
        super().__init__(path, text_field=text_field)

    def __iter__(self) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        field = self.settings["text_field"]
        rows = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as table:
                if field not in table.schema_arrow.names:
                    names = ", ".join(table.schema_arrow.names)
                    raise UserError(f"{self.path}: no column {field!r}; it has {names} (choose with --text-field)")
                for batch in table.iter_batches(batch_size=256, columns=[field]):
                    for value in batch.column(0):
                        yield from _cut(_field({field: value.as_py()}, field, f"{self.path}: row {rows}"))
                        rows += 1
                    self.bytes_read = self.size * rows // table.metadata.num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{self.path}: row {rows}: {_one_line(error)}") from error


class HubDataset(Source):
    """hf:NAME[/CONFIG][@SPLIT], streamed through `datasets`; NAME may be OWNER/NAME. The split is train by default."""

    def __init__(self, spec: str, text_field: str):
        match = re.fullmatch(r"hf:([^@/]+(?:/[^@/]+){0,2})(?:@(.+))?", spec)
        if match is None:
            raise UserError(f"{spec}: expected hf:NAME[/CONFIG][@SPLIT]")
        self.spec, self.text_field = spec, text_field
        self.parts, self.split = match[1].split("/"), match[2] or "train"

    def identity(self) -> dict:
        return {"hub": "/".join(self.parts), "split": self.split, "text_field": self.text_field}

    def __iter__(self) -> Iterator[str]:
        number = 0
        try:
            for number, record in enumerate(self._open(), start=1):
                text = _field(record, self.text_field, f"{self.spec}: record {number}")
                self.bytes_read += len(text)
                yield from _cut(text)
        except UserError:
            raise
        except Exception as error:  # datasets and its transports raise dozens of kinds
            raise UserError(f"{self.spec}: record {number}: {_one_line(error)}") from error

    def _open(self):
        """The streaming dataset. Of two parts the second is a configuration only if no OWNER/NAME is called so."""
        import datasets

        name, config = self.parts[0], self.parts[-1]
        if len(self.parts) == 3:
            return datasets.load_dataset("/".join(self.parts[:2]), config, split=self.split, streaming=True)
        if len(self.parts) == 1:
            return datasets.load_dataset(name, split=self.split, streaming=True)
        try:
            return datasets.load_dataset("/".join(self.parts), split=self.split, streaming=True)
        except datasets.exceptions.DatasetNotFoundError:
            return datasets.load_dataset(name, config, split=self.split, streaming=True)


class BuiltIn(Source):
    """The English of the running Python: its language topics and the docstrings of its standard library.

    A document is one topic, or one module's docstrings.
    """

    def __init__(self):
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
        self.modules = sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))
        self.size = sum(path.stat().st_size for path in self.modules)

    def identity(self) -> dict:
        return {"built-in": sys.version, "modules": len(self.modules), "bytes": self.size}

    def __iter__(self) -> Iterator[str]:
        try:
            from pydoc_data.topics import topics
        except ImportError:  # some distributions package it apart
            topics = {}
        yield from topics.values()
        for path in self.modules:
            source = path.read_bytes()
            self.bytes_read += len(source)
            text = "\n".join(_docstrings(source))
            if text:
                yield text


def _docstrings(source: bytes) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def _decompress(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _decode(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of a byte stream in UTF-8. Lines beyond _LONGEST_LINE come in parts."""
    number, offset, rest, opens_line = 1, 0, b"", True
    while read := stream.readline(_LONGEST_LINE):
        line = rest + read
        try:
            text, rest = line.decode(), b""
        except UnicodeDecodeError as error:
            # A part may end inside a character; the remainder opens the next one.
            if read.endswith(b"\n") or len(line) - error.start > 3 or len(read) < _LONGEST_LINE:
                at = offset + error.start
                raise UserError(f"{path}: line {number}: invalid UTF-8 at byte {at} of the text") from error
            text, rest = line[: error.start].decode(), line[error.start :]
        if number == 1 and offset == 0:
            text = text.removeprefix("\ufeff")
        text = text.rstrip("\r\n")
        if text or opens_line:  # the bare line end of a line that was cut just before it is not a blank line
            yield number, text
        offset += len(line) - len(rest)
        opens_line = read.endswith(b"\n")
        number += opens_line
    if rest:
        raise UserError(f"{path}: line {number}: invalid UTF-8 at byte {offset} of the text")


def _field(record, name: str, where: str) -> str:
    """The text of one record; a null is an empty text, a lone surrogate (JSON can spell one) a question mark."""
    if not isinstance(record, dict) or name not in record:
        has = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"{where}: no field {name!r}; it has {has} (choose with --text-field)")
    text = record[name]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: field {name!r} is a {type(text).__name__}, not text")
    return (text or "").encode(errors="replace").decode()


def _cut(text: str) -> Iterator[str]:
    """The text in parts of at most _LONGEST_DOCUMENT characters; nothing for blank text."""
    if text.strip():
        for start in range(0, len(text), _LONGEST_DOCUMENT):
            yield text[start : start + _LONGEST_DOCUMENT]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
