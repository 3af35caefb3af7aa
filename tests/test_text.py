import gzip
import itertools
import json
import lzma
import os
import sysconfig

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cramfast.data import text
from cramfast.data.text import BuiltIn, open_sources
from cramfast.errors import UserError

PLAIN = "first line\nsecond line\n\n \t\nsécond dócument 𝄞\n"
BY_BLANK_LINE = ["first line\nsecond line", "sécond dócument 𝄞"]
BY_LINE = ["first line", "second line", "sécond dócument 𝄞"]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}
COMPRESSED = [suffix for suffix in COMPRESS if suffix]


def documents(*specs, **settings) -> list[str]:
    sources = open_sources(tuple(map(str, specs)), **settings)
    return list(itertools.chain.from_iterable(sources))


def error(*specs, **settings) -> str:
    """The message of the UserError that reading raises."""
    with pytest.raises(UserError) as caught:
        documents(*specs, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(path, content: bytes | str):
    """Write `content`, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def write_parquet(path, column, name: str = "text", **options):
    pyarrow.parquet.write_table(pyarrow.table({"number": range(len(column)), name: column}), path, **options)
    return path


# Files, folders, patterns


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(("document_per", "expected"), [("blank-line", BY_BLANK_LINE), ("line", BY_LINE)])
def test_text_file(tmp_path, suffix, document_per, expected):
    path = write(tmp_path / f"a.txt{suffix}", PLAIN)
    assert documents(path, document_per=document_per) == expected


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_every_member_of_a_concatenated_archive_is_read(tmp_path, suffix):
    compress = COMPRESS[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"one\n\n") + compress(b"two\n\nthr") + compress(b"ee"))
    assert documents(path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "content",
    [b"one\r\ntwo\r\n\r\nthree\r\n", b"\xef\xbb\xbfone\ntwo\n\nthree", b"\xef\xbb\xbfone\r\ntwo\r\n \r\n\r\nthree"],
    ids=["CRLF", "BOM", "both"],
)
def test_line_ends_and_byte_order_mark_leave_no_trace(tmp_path, content):
    path = write(tmp_path / "a.txt", content)
    assert documents(path) == ["one\ntwo", "three"]
    assert documents(path, document_per="line") == ["one", "two", "three"]


@pytest.mark.parametrize("content", ["", "\n", " \n\t\r\n\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_file_without_text_holds_no_document(tmp_path, name, content):
    assert documents(write(tmp_path / name, content)) == []


def test_folder_is_read_in_order_of_its_paths(tmp_path):
    write(tmp_path / "b.txt", "from b")
    write(tmp_path / "a.TXT", "from a")
    write(tmp_path / "c" / "deep" / "d.md.gz", "from d")
    write(tmp_path / "e.jsonl.zst", '{"text": "from e"}')
    write_parquet(tmp_path / "f.parquet", ["from f"])
    write(tmp_path / "g.py", "not text")
    write(tmp_path / "h.gz", "of unknown format")
    assert documents(tmp_path) == [f"from {name}" for name in "abdef"]


def test_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "d/e.txt"):
        write(tmp_path / name, name)
    assert documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert documents(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "d/e.txt"]
    assert documents(tmp_path / "[bc].*") == ["b.txt", "c.md"]


def test_a_file_may_have_the_name_of_a_pattern(tmp_path):
    write(tmp_path / "a1.txt", "matches")
    assert documents(write(tmp_path / "a[1].txt", "is meant")) == ["is meant"]


def test_several_sources_keep_their_order(tmp_path):
    b, a = write(tmp_path / "b.txt", "b"), write(tmp_path / "a.jsonl", '{"text": "a"}')
    assert documents(b, a, b) == ["b", "a", "b"]


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "a.txt", "at home")
    assert documents("~/a.txt") == ["at home"]


def test_an_unknown_ending_is_read_as_text(tmp_path):
    assert documents(write(tmp_path / "corpus", PLAIN)) == BY_BLANK_LINE


@pytest.mark.parametrize("suffix", COMPRESS)
def test_bytes_read_end_at_the_size_of_the_file(tmp_path, suffix):
    path = write(tmp_path / f"a.txt{suffix}", PLAIN * 100)
    (source,) = open_sources((str(path),))
    assert source.bytes_read == 0
    assert list(source)
    assert source.bytes_read == source.size == path.stat().st_size


def test_identity_tells_files_and_settings_apart(tmp_path):
    path = write(tmp_path / "a.txt", "one")

    def identity(path=path, **settings):
        return open_sources((str(path),), **settings)[0].identity()

    first = identity()
    assert identity() == first
    assert json.loads(json.dumps(first)) == first
    assert identity(document_per="line") != first
    assert identity(write(tmp_path / "b.txt", "one")) != first
    records = write(tmp_path / "a.jsonl", '{"text": "one"}')
    assert identity(records) != identity(records, text_field="body")

    status = path.stat()
    path.write_text("one two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    longer = identity()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert len({str(i) for i in (first, longer, identity())}) == 3


# Records


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson"])
def test_json_lines(tmp_path, kind, suffix):
    lines = ['{"id": 1, "text": "one\\n\\ntw\\u00f6"}', "", '{"text": null}', '{"text": "  "}', '{"text": "drei – 𝄞"}']
    path = write(tmp_path / f"a.{kind}{suffix}", "\ufeff" + "\r\n".join(lines))
    assert documents(path) == ["one\n\ntwö", "drei – 𝄞"]


def test_json_text_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": 1, "body": "chosen"}\n')
    assert documents(path, text_field="body") == ["chosen"]


def test_a_lone_surrogate_in_json_becomes_text_that_can_be_encoded(tmp_path):
    (document,) = documents(write(tmp_path / "a.jsonl", '{"text": "a \\ud83d b \\ud83d\\ude00"}'))
    assert document == "a ? b 😀"
    assert document.encode()


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet(tmp_path, compression):
    column = [f"text {i}" for i in range(1000)]
    column[1], column[2] = None, " "
    path = write_parquet(tmp_path / "a.parquet", column, compression=compression, row_group_size=300)
    assert documents(path) == [column[0], *column[3:]]


def test_parquet_text_field_and_bytes_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", "two"], name="body")
    (source,) = open_sources((str(path),), text_field="body")
    assert list(source) == ["one", "two"]
    assert source.bytes_read == source.size


def test_empty_parquet(tmp_path):
    assert documents(write_parquet(tmp_path / "a.parquet", pyarrow.array([], pyarrow.string()))) == []


# Built-in


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small folder in the place of the standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    write(
        tmp_path / "b.py", '"""Module b."""\nclass C:\n    """Class C."""\n    async def f(self):\n        """F."""\n'
    )
    write(tmp_path / "package" / "a.py", 'def f():\n    """Of a function."""\n')
    write(tmp_path / "silent.py", "x = 1\n")
    write(tmp_path / "broken.py", '"""Never closed\n')
    for folder in ("test", "site-packages", "lib2to3"):
        write(tmp_path / folder / "m.py", '"""Not meant for readers."""\n')
    return tmp_path


def test_built_in_docstrings(library):
    assert list(BuiltIn())[-2:] == ["Module b.\nClass C.\nF.", "Of a function."]


def test_built_in_size_and_identity(library):
    source = BuiltIn()
    assert list(source)
    assert source.bytes_read == source.size
    assert BuiltIn().identity() == source.identity()
    write(library / "c.py", '"""Module c."""')
    assert BuiltIn().identity() != source.identity()


def test_built_in_is_what_no_data_means():
    (source,) = open_sources(())
    assert isinstance(source, BuiltIn)
    assert any("__future__" in document for document in itertools.islice(source, 150))


# Hub


class Hub:
    """Stands for the Hub: knows the data sets `names`, each with the same records, and remembers what was asked."""

    def __init__(self, names, records):
        self.names, self.records, self.calls = names, records, []

    def load_dataset(self, name, config=None, *, split, streaming):
        assert streaming
        self.calls.append((name, config, split))
        if name not in self.names:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        return self.records


@pytest.fixture
def hub(monkeypatch):
    def install(names, records=({"text": "one"}, {"text": None}, {"text": "two"})):
        fake = Hub(names, records)
        monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
        return fake

    return install


@pytest.mark.parametrize(
    ("spec", "calls"),
    [
        ("hf:imdb", [("imdb", None, "train")]),
        ("hf:imdb@test[:10%]", [("imdb", None, "test[:10%]")]),
        ("hf:owner/books", [("owner/books", None, "train")]),
        ("hf:owner/books@test", [("owner/books", None, "test")]),
        ("hf:imdb/plain", [("imdb/plain", None, "train"), ("imdb", "plain", "train")]),
        ("hf:imdb/plain@test", [("imdb/plain", None, "test"), ("imdb", "plain", "test")]),
        ("hf:owner/books/2024.en", [("owner/books", "2024.en", "train")]),
        ("hf:owner/books/2024.en@test", [("owner/books", "2024.en", "test")]),
    ],
)
def test_hub_names(hub, spec, calls):
    fake = hub(["imdb", "owner/books"])
    assert documents(spec) == ["one", "two"]
    assert fake.calls == calls


def test_hub_identity():
    specs = ("hf:a", "hf:a/b", "hf:a/b/c", "hf:a@test")
    identities = [source.identity() for source in open_sources(specs)]
    identities += [open_sources(("hf:a",), text_field="body")[0].identity()]
    assert len({json.dumps(identity) for identity in identities}) == 5
    assert open_sources(("hf:a@train",))[0].identity() == open_sources(("hf:a",))[0].identity()


def test_hub_text_field_and_bytes_read(hub):
    hub(["imdb"], [{"body": "one"}, {"body": "three"}])
    (source,) = open_sources(("hf:imdb",), text_field="body")
    assert list(source) == ["one", "three"]
    assert source.size is None
    assert source.bytes_read == 8


# Long lines and documents


@pytest.mark.parametrize("suffix", ["", ".zst"])
@pytest.mark.parametrize("document_per", ["blank-line", "line"])
@pytest.mark.parametrize("shift", range(10))
def test_a_long_line_is_cut_between_characters(tmp_path, monkeypatch, shift, document_per, suffix):
    monkeypatch.setattr(text, "_LONGEST_LINE", 16)
    line = "a" * shift + "é€𝄞" * 20
    path = write(tmp_path / f"a.txt{suffix}", f"{line}\n\nend\n")
    *parts, end = "\n".join(documents(path, document_per=document_per)).split("\n")
    assert end == "end"
    assert "".join(parts) == line
    assert max(len(part.encode()) for part in parts) <= 16 + 3  # a character cut in two begins the next part


@pytest.mark.parametrize("length", [15, 16, 17, 32])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_as_long_as_the_limit_ends_no_document(tmp_path, monkeypatch, length, end):
    monkeypatch.setattr(text, "_LONGEST_LINE", 16)
    path = write(tmp_path / "a.txt", end.join(["a" * length, "b", "", "c"]))
    first, second = documents(path)
    assert first.replace("\n", "") == "a" * length + "b"
    assert second == "c"


def test_a_long_document_is_cut_between_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LONGEST_DOCUMENT", 100)
    lines = [f"líne {i:02d}" for i in range(60)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    parts = documents(path)
    assert len(parts) > 2
    assert "\n".join(parts) == "\n".join(lines)
    assert max(len(part.replace("\n", "")) for part in parts) <= 100 + len(lines[0])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_a_long_record_is_cut_and_loses_nothing(tmp_path, monkeypatch, hub, kind):
    monkeypatch.setattr(text, "_LONGEST_DOCUMENT", 100)
    content = "é€𝄞 " * 60
    if kind == "hf":
        hub(["long"], [{"text": content}])
        spec = "hf:long"
    elif kind == "parquet":
        spec = write_parquet(tmp_path / "a.parquet", [content])
    else:
        spec = write(tmp_path / "a.jsonl", json.dumps({"text": content}))
    parts = documents(spec)
    assert [len(part) for part in parts] == [100, 100, 40]
    assert "".join(parts) == content


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_json_line_beyond_the_longest_line_is_read_whole(tmp_path, monkeypatch, ascii_only):
    monkeypatch.setattr(text, "_LONGEST_LINE", 16)
    records = [{"text": "é€𝄞 " * 20 + str(i)} for i in range(3)]
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert documents(path) == [record["text"] for record in records]


# Bad input


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "*.txt", "**/*.parquet"])
def test_nothing_by_that_name(tmp_path, name):
    message = error(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ")


def test_empty_folder(tmp_path):
    write(tmp_path / "folder" / "program.py", "")
    message = error(tmp_path / "folder")
    assert message.startswith(f"{tmp_path / 'folder'}: ")
    assert ".txt" in message and ".zst" in message


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_an_archive_cut_short(tmp_path, suffix, kept, kind):
    path = tmp_path / f"a.{kind}{suffix}"
    content = "".join(f'{{"text": "{i * i % 7919}"}}\n' for i in range(20_000))
    whole = COMPRESS[suffix](content.encode())
    path.write_bytes(whole[: int(len(whole) * kept)])
    message = error(path)
    assert message.startswith(f"{path}: byte ")
    assert f"of {path.stat().st_size}" in message


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_an_archive_that_is_none(tmp_path, suffix, kind):
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(b"this was never compressed\n" * 10)
    assert error(path).startswith(f"{path}: byte 0 of 260: ")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])  # the frames of .zst files need not have a checksum
def test_a_damaged_archive(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    damaged = bytearray(COMPRESS[suffix]("".join(f"{i * i % 7919}\n" for i in range(20_000)).encode()))
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    assert error(path).startswith(f"{path}: byte ")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b"\xff", 1, 0),
        (b"ok\nb\xe9d\n", 2, 4),
        (b"ok\r\n\r\nb\xe9d\r\n", 3, 7),
        (b"\xef\xbb\xbfok\n\xff\n", 2, 6),
        (b"ok\ncut \xe2\x82", 2, 7),
        (b"ok\ncut \xe2\x82\nmore\n", 2, 7),
        (b"ok\n" + b"a" * 15 + b"\xff" + b"a" * 15, 2, 18),
        (b"ok\n" + b"a" * 14 + b"\xe2\x82", 2, 17),
        (b"ok\n" + b"a" * 15 + b"\xe2\x82" + b"a" * 15, 2, 18),
        (b"ok\n" + b"\xe2\x82\xac" * 20 + b"\xff\nok\n", 2, 63),
        (b"a" * 100 + b"\nok\n\xc3\x28\n", 3, 104),
        ("ünïcode\n".encode("utf-16"), 1, 0),
    ],
)
def test_invalid_utf8(tmp_path, monkeypatch, content, line, byte, suffix):
    monkeypatch.setattr(text, "_LONGEST_LINE", 16)
    path = write(tmp_path / f"a.txt{suffix}", content)
    message = error(path)
    assert message.startswith(f"{path}: line {line}: ")
    assert f"byte {byte} " in message


def test_documents_before_the_bad_line_are_read(tmp_path):
    (source,) = open_sources((str(write(tmp_path / "a.txt", b"one\n\ntwo\n\nb\xe9d\n")),))
    stream = iter(source)
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(UserError, match="line 5"):
        next(stream)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"body": "x"}', "no field 'text'; it has body"),
        ('{"text": 5}', "field 'text'"),
        ('{"text": ["a"]}', "field 'text'"),
        ('{"text": {"a": "b"}}', "field 'text'"),
        ('["text"]', "no field 'text'"),
        ('"text"', "no field 'text'"),
        ("null", "no field 'text'"),
        ('{"text": "open', "not JSON"),
        ('{"text": "a"} {"text": "b"}', "not JSON"),
        ("plain words", "not JSON"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_bad_json_line(tmp_path, line, says, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", f'{{"text": "fine"}}\n\n{line}\n')
    message = error(path)
    assert message.startswith(f"{path}: line 3: ")
    assert says in message


def test_a_json_line_too_long_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LONGEST_LINE", 16)
    monkeypatch.setattr(text, "_LONGEST_RECORD", 64)
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": "' + "a" * 100 + '"}\n')
    assert error(path).startswith(f"{path}: line 2: ")


def test_missing_parquet_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one"], name="body")
    message = error(path)
    assert message.startswith(f"{path}: ")
    assert "'text'" in message and "number, body" in message


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -1])
def test_parquet_cut_short(tmp_path, kept):
    path = write_parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(1000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if 0 < kept < 1 else kept])
    assert error(path).startswith(f"{path}: row 0: ")


def test_damaged_parquet_page(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(1000)], row_group_size=500)
    start = pyarrow.parquet.read_metadata(path).row_group(1).column(1).dictionary_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    message = error(path)
    assert message.startswith(f"{path}: row ")
    assert 0 < int(message.removeprefix(f"{path}: row ").split(":")[0]) <= 500


@pytest.mark.parametrize("column", [[1, 2], [["a"], ["b"]], [b"a", b"b"], [{"a": "b"}]], ids=str)
def test_parquet_column_that_is_not_text(tmp_path, column):
    path = write_parquet(tmp_path / "a.parquet", column)
    message = error(path)
    assert message.startswith(f"{path}: row 0: ")
    assert "not text" in message


def test_parquet_invalid_utf8(tmp_path):
    rows = pyarrow.array([b"fine", b"also fine", b"b\xe9d", b"fine"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), rows.buffers())
    assert error(write_parquet(tmp_path / "a.parquet", column)).startswith(f"{tmp_path / 'a.parquet'}: row 2: ")


@pytest.mark.parametrize("spec", ["hf:", "hf:/", "hf:a/b/c/d", "hf:@train", "hf:a@"])
def test_bad_hub_name(hub, spec):
    hub([])
    assert error(spec).startswith(f"{spec}: ")


@pytest.mark.parametrize("spec", ["hf:nobody", "hf:no/body", "hf:no/bo/dy@test"])
def test_hub_data_set_that_does_not_exist(hub, spec):
    hub(["imdb"])
    assert error(spec).startswith(f"{spec}: ")


def test_hub_record_without_the_field(hub):
    hub(["imdb"], [{"text": "one"}, {"body": "two"}])
    message = error("hf:imdb")
    assert message.startswith("hf:imdb: record 2: ")
    assert "body" in message


def test_hub_connection_lost(hub):
    def records():
        yield {"text": "one"}
        raise ConnectionError("the line\nis dead")

    hub(["imdb"], records())
    message = error("hf:imdb")
    assert message.startswith("hf:imdb: record 1")
    assert "the line is dead" in message
