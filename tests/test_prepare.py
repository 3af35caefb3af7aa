import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cramfast.config import TextOptions
from cramfast.data import prepare as module
from cramfast.data.prepare import is_heldout, prepare
from cramfast.data.shards import Dataset, unigram_entropy
from cramfast.data.tokenizer import special_ids, train_tokenizer
from cramfast.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
DOCUMENTS = [
    " ".join(random.Random(number).choices(WORDS, k=5 + number % 20)) + f" number {number}." for number in range(200)
]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents))
    return path


class Watcher:
    """Stands for the display; `stages` stays empty when nothing is built."""

    def __init__(self):
        self.stages: list[str] = []
        self.read: list[tuple[int, int | None]] = []
        self.said: list[str] = []

    def report(self, stage, read, total):
        if stage not in self.stages:
            self.stages.append(stage)
        self.read.append((read, total))


def build(options: TextOptions, cache: Path) -> tuple[Dataset, Watcher]:
    watcher = Watcher()
    return prepare(options, cache, watcher.report, watcher.said.append), watcher


def error(options: TextOptions, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        build(options, cache)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def split_documents(dataset: Dataset, split: str) -> list[tuple[int, ...]]:
    stream = dataset.split(split)
    tokens = stream.take(np.arange(len(stream)))
    return [tuple(part.tolist()) for part in np.split(tokens, np.asarray(stream.document_ends, np.int64))[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def options(tmp_path):
    path = write_documents(tmp_path / "corpus.txt", DOCUMENTS)
    return TextOptions(data=(str(path),), vocab_size=300, heldout_fraction=0.2, max_tokens_per_char=1.0)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A tokenizer that depends on no test's text."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(lambda: iter(DOCUMENTS), 300, lowercase=True, strip_accents=True, ascii_only=True).save(str(path))
    return path


# Content


def test_every_document_is_in_one_split_in_its_order(options, cache):
    dataset, _ = build(options, cache)
    separator = special_ids(dataset.tokenizer).sep
    for split in ("train", "heldout"):
        texts = [text for text in DOCUMENTS if is_heldout(text, 0.2) == (split == "heldout")]
        ids = [dataset.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert split_documents(dataset, split) == [(*tokens, separator) for tokens in ids]


def test_manifest(options, cache, tmp_path):
    dataset, _ = build(options, cache)
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    status = (tmp_path / "corpus.txt").stat()
    assert manifest["format"] == 1
    (source,) = manifest["source"]
    assert Path(source["path"]) == (tmp_path / "corpus.txt").resolve()
    assert (source["bytes"], source["modified"]) == (status.st_size, status.st_mtime_ns)
    assert manifest["options"] == json.loads(json.dumps(asdict(options), default=str))
    assert manifest["vocab_size"] == dataset.tokenizer.get_vocab_size() == dataset.vocab_size
    assert manifest["dtype"] == "uint16"
    assert manifest["dropped_documents"] == 0
    assert {split: part["documents"] for split, part in manifest["splits"].items()} == {
        split: len(split_documents(dataset, split)) for split in ("train", "heldout")
    }
    counts = Counter(token for document in split_documents(dataset, "train") for token in document)
    assert manifest["unigram_entropy"] == unigram_entropy(np.array([counts[i] for i in range(dataset.vocab_size)]))
    listed = [manifest["tokenizer"]]
    for part in manifest["splits"].values():
        listed += [part["boundaries"], *part["shards"]]
    sizes = {entry["file"]: entry["bytes"] for entry in listed}
    files = contents(dataset.folder)
    assert {**sizes, "manifest.json": len(files["manifest.json"])} == {name: len(data) for name, data in files.items()}


def test_an_existing_tokenizer_is_used(options, cache, tokenizer_file):
    dataset, watcher = build(replace(options, tokenizer=tokenizer_file), cache)
    assert dataset.tokenizer.to_str() == module.open_tokenizer(tokenizer_file).to_str()
    assert watcher.stages == ["tokenising"]


def test_progress_goes_through_the_stages_up_to_the_size_of_the_text(options, cache, tmp_path):
    heldout = write_documents(tmp_path / "heldout.txt", ["held out"])
    _, watcher = build(replace(options, heldout_data=(str(heldout),)), cache)
    assert watcher.stages == ["training the tokenizer", "tokenising", "tokenising the held-out text"]
    size = (tmp_path / "corpus.txt").stat().st_size
    assert {total for _, total in watcher.read} == {size, heldout.stat().st_size}
    assert all(0 < read <= total for read, total in watcher.read)


def test_data_in_several_files_is_one_corpus(options, cache, tmp_path):
    first, second = tmp_path / "1.txt.gz", tmp_path / "2.jsonl"
    first.write_bytes(gzip.compress("\n\n".join(DOCUMENTS[:90]).encode()))
    second.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[90:]))
    several, _ = build(replace(options, data=(str(first), str(second))), cache)
    one, _ = build(options, cache)
    for split in ("train", "heldout"):
        assert split_documents(several, split) == split_documents(one, split)
    assert len(several.manifest["source"]) == 2


def test_documents_without_a_token_are_left_out(options, cache, tokenizer_file, tmp_path):
    path = write_documents(tmp_path / "a.txt", ["你好", *DOCUMENTS])
    dataset, _ = build(replace(options, data=(str(path),), tokenizer=tokenizer_file), cache)
    assert sum(part["documents"] for part in dataset.manifest["splits"].values()) == len(DOCUMENTS)


def test_text_with_a_lone_surrogate_is_prepared(options, cache, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} \ud83d"}) + "\n" for text in DOCUMENTS))
    dataset, _ = build(replace(options, data=(str(path),)), cache)
    assert sum(part["documents"] for part in dataset.manifest["splits"].values()) == len(DOCUMENTS)


# Finding the cache again


def test_same_options_find_the_same_cache(options, cache):
    first, watcher = build(options, cache)
    assert watcher.stages == ["training the tokenizer", "tokenising"]
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second, watcher = build(options, cache)
    assert watcher.stages == watcher.said == []
    assert second.folder == first.folder
    assert second.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in second.folder.iterdir()} == before
    assert len(entries(cache)) == 1


def test_the_same_files_by_another_name_find_the_same_cache(options, cache, tmp_path, monkeypatch):
    first, _ = build(options, cache)
    monkeypatch.chdir(tmp_path)
    for data in ("corpus.txt", "corp*.txt", "."):
        second, watcher = build(replace(options, data=(data,), text_field="unused"), cache)
        assert second.folder == first.folder
        assert watcher.stages == []


@pytest.mark.parametrize(
    "change",
    [
        {"heldout_fraction": 0.3},
        {"document_per": "line"},
        {"lowercase": False},
        {"strip_accents": False},
        {"ascii_only": False},
        {"max_tokens_per_char": 0.9},
        {"vocab_size": 310},
    ],
    ids=str,
)
def test_another_setting_makes_another_cache(options, cache, change):
    first, _ = build(options, cache)
    second, watcher = build(replace(options, **change), cache)
    assert watcher.stages
    assert second.folder != first.folder
    assert build(options, cache)[0].folder == first.folder
    assert len(entries(cache)) == 2


def test_another_file_makes_another_cache(options, cache, tmp_path, tokenizer_file):
    other = write_documents(tmp_path / "other.txt", DOCUMENTS)
    both = tuple(map(str, (*options.data, other)))
    variants = [
        options,
        replace(options, data=(str(other),)),
        replace(options, data=both),
        replace(options, data=both[::-1]),
        replace(options, heldout_data=(str(other),)),
        replace(options, tokenizer=tokenizer_file),
    ]
    assert len({build(variant, cache)[0].folder for variant in variants}) == len(variants)


def test_another_text_field_makes_another_cache(options, cache, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "body": text}) + "\n" for text in DOCUMENTS))
    options = replace(options, data=(str(path),))
    assert build(options, cache)[0].folder != build(replace(options, text_field="body"), cache)[0].folder


def test_a_changed_file_makes_another_cache(options, cache, tmp_path):
    first, _ = build(options, cache)
    write_documents(tmp_path / "corpus.txt", [*DOCUMENTS, "one more"])
    second, _ = build(options, cache)
    status = (tmp_path / "corpus.txt").stat()
    os.utime(tmp_path / "corpus.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    third, _ = build(options, cache)
    assert len({first.folder, second.folder, third.folder}) == 3


def test_a_changed_tokenizer_makes_another_cache(options, cache, tmp_path, tokenizer_file):
    path = tmp_path / "tokenizer.json"
    shutil.copy(tokenizer_file, path)
    first, _ = build(replace(options, tokenizer=path), cache)
    tokenizer = module.open_tokenizer(path)
    tokenizer.add_tokens(["anotherword"])
    tokenizer.save(str(path))
    second, _ = build(replace(options, tokenizer=path), cache)
    assert second.folder != first.folder
    assert second.vocab_size == first.vocab_size + 1


def test_where_a_tokenizer_lies_makes_no_difference(options, cache, tmp_path, tokenizer_file):
    moved = shutil.copy(tokenizer_file, tmp_path / "moved.json")
    first, _ = build(replace(options, tokenizer=tokenizer_file), cache)
    second, watcher = build(replace(options, tokenizer=Path(moved)), cache)
    assert second.folder == first.folder
    assert watcher.stages == []


# Damage, interruption, neighbours


@pytest.mark.parametrize("name", ["train-00000.tokens", "heldout.documents", "tokenizer.json", "manifest.json"])
def test_a_damaged_dataset_is_built_again(options, cache, name):
    folder = build(options, cache)[0].folder
    original = contents(folder)
    damaged = bytearray(original[name])
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    rebuilt, watcher = build(options, cache)
    assert rebuilt.folder == folder
    assert contents(folder) == original
    (said,) = watcher.said
    assert str(folder / name) in said
    assert len(said.splitlines()) == 1
    assert entries(cache) == [folder.name]


def test_building_twice_gives_the_same_bytes(options, tmp_path):
    first, second = (build(options, tmp_path / name)[0].folder for name in ("one", "two"))
    assert contents(first) == contents(second)


@pytest.mark.parametrize("content", [b"fine\n\nb\xe9d\n", gzip.compress(os.urandom(5000))[:-9]], ids=["UTF-8", "gzip"])
@pytest.mark.parametrize("used_as", ["data", "heldout_data"])
def test_bad_input_leaves_nothing_behind(options, cache, tmp_path, content, used_as):
    bad = tmp_path / ("bad.txt.gz" if content[:1] == b"\x1f" else "bad.txt")
    bad.write_bytes(content)
    message = error(replace(options, **{used_as: (*options.data, str(bad))}), cache)
    assert message.startswith(f"{bad}: ")
    assert entries(cache) == []


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenising"])
def test_interruption_leaves_nothing_behind(options, cache, stage):
    def interrupt(current, read, total):
        if current == stage and read == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options, cache, interrupt, print)
    assert entries(cache) == []


def test_a_full_disk_leaves_nothing_behind(options, cache, monkeypatch):
    def write_manifest(folder, manifest):
        raise OSError(28, "No space left on device", str(folder / "manifest.json"))

    monkeypatch.setattr(module, "write_manifest", write_manifest)
    message = error(options, cache)
    assert "manifest.json: No space left on device" in message
    assert entries(cache) == []


def test_no_file_is_open_when_an_unfinished_folder_is_removed(options, cache, tmp_path, monkeypatch, tokenizer_file):
    """Windows removes no file that is open."""
    (tmp_path / "bad.txt").write_bytes(b"b\xe9d")
    options = replace(options, data=(*options.data, str(tmp_path / "bad.txt")), tokenizer=tokenizer_file)
    opened = []
    remove = shutil.rmtree

    def watch(folder, **settings):
        opened.extend(file.path for file in psutil.Process().open_files() if Path(file.path).parent == folder)
        remove(folder, **settings)

    monkeypatch.setattr(module.shutil, "rmtree", watch)
    error(options, cache)
    assert opened == []


def test_a_cache_that_cannot_be_written(options, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    message = error(options, blocked)
    assert message.startswith(f"{blocked}: ")
    assert "--cache" in message


@pytest.mark.skipif(os.name != "posix", reason="processes are only asked after on POSIX")
def test_what_dead_builders_left_is_removed_and_living_ones_keep_theirs(options, cache):
    folder = build(options, cache)[0].folder
    shutil.rmtree(folder)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = psutil.Process().parent().pid
    for pid in (dead.pid, living):
        abandoned = cache / f"{folder.name}.partial-{pid}"
        abandoned.mkdir()
        (abandoned / "train-00000.tokens").write_bytes(b"half")
    (cache / f"{folder.name}.partial-copy").mkdir()
    build(options, cache)
    assert entries(cache) == sorted([folder.name, f"{folder.name}.partial-{living}", f"{folder.name}.partial-copy"])


def test_what_an_earlier_process_of_the_same_number_left_is_removed(options, cache):
    """In a container every start may run under the same few process numbers."""
    folder = build(options, cache)[0].folder
    original = contents(folder)
    folder.rename(cache / f"{folder.name}.partial-{os.getpid()}")
    (cache / f"{folder.name}.partial-{os.getpid()}" / "train-00001.tokens").write_bytes(b"half")
    rebuilt, _ = build(options, cache)
    assert contents(rebuilt.folder) == original
    assert entries(cache) == [folder.name]


def test_a_process_that_was_faster_is_no_error(options, cache, monkeypatch):
    build_alone = module._build

    def build_and_be_late(folder, *arguments):
        build_alone(folder, *arguments)
        shutil.copytree(folder, folder.with_suffix(""))

    monkeypatch.setattr(module, "_build", build_and_be_late)
    dataset, _ = build(options, cache)
    assert entries(cache) == [dataset.folder.name]


# Held-out text


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.9])
def test_held_out_share(fraction):
    number = 20_000
    share = sum(is_heldout(f"document {i}", fraction) for i in range(number)) / number
    # Five standard deviations of a binomial share.
    assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / number) ** 0.5


def test_a_larger_fraction_holds_out_the_same_and_more():
    texts = [f"document {i}" for i in range(1000)]
    small, large = ({text for text in texts if is_heldout(text, fraction)} for fraction in (0.1, 0.3))
    assert small < large


def test_the_side_of_a_document_does_not_depend_on_the_others(options, cache, tmp_path, tokenizer_file):
    options = replace(options, tokenizer=tokenizer_file)
    alone, _ = build(options, cache)
    shuffled = [*DOCUMENTS[::-1], *(f"one more document {i}" for i in range(100))]
    other = write_documents(tmp_path / "other.txt", shuffled)
    among_others, _ = build(replace(options, data=(str(other),)), cache)
    for split in ("train", "heldout"):
        assert set(split_documents(alone, split)) < set(split_documents(among_others, split))
    assert not set(split_documents(among_others, "train")) & set(split_documents(among_others, "heldout"))


def test_held_out_text_given_separately(options, cache, tmp_path, tokenizer_file):
    options = replace(options, tokenizer=tokenizer_file)
    path = write_documents(tmp_path / "heldout.txt", DOCUMENTS[:7])
    dataset, _ = build(replace(options, heldout_data=(str(path),)), cache)
    assert len(split_documents(dataset, "train")) == len(DOCUMENTS)
    assert split_documents(dataset, "heldout") == split_documents(dataset, "train")[:7]
    assert len(dataset.manifest["source"]) == 2


# Filters


@pytest.mark.parametrize("limit", [0.2, 0.25, 0.5, 1.0, 2.0])
def test_documents_of_many_tokens_a_character_are_dropped(options, cache, tmp_path, tokenizer_file, limit):
    tokenizer = module.open_tokenizer(tokenizer_file)
    # One token in 1, 2, 4 and 8 characters: shares on either side of the limits, and right on them.
    odd = ["? ! ? !" * 3, "?!?!" * 5, "eta " * 9 + "eta.", "epsilon " * 20]
    documents = [*DOCUMENTS, *odd]
    path = write_documents(tmp_path / "odd.txt", documents)
    options = replace(options, data=(str(path),), tokenizer=tokenizer_file, max_tokens_per_char=limit)
    encoded = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in documents]
    kept = [text for text, ids in encoded if len(ids) / len(text) < limit]
    assert len(kept) < len(documents) or limit > 1
    dataset, _ = build(options, cache)
    assert dataset.manifest["dropped_documents"] == len(documents) - len(kept)
    for split, part in dataset.manifest["splits"].items():
        assert part["documents"] == sum(is_heldout(text, 0.2) == (split == "heldout") for text in kept)


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_empty_corpus(options, cache, tmp_path, content):
    (tmp_path / "corpus.txt").write_text(content)
    message = error(options, cache)
    assert str(tmp_path / "corpus.txt") in message
    assert entries(cache) == []


def test_everything_dropped(options, cache):
    assert options.data[0] in error(replace(options, max_tokens_per_char=0.01), cache)
    assert entries(cache) == []


def test_nothing_held_out(options, cache):
    message = error(replace(options, heldout_fraction=1e-9), cache)
    assert "--heldout-fraction" in message and "200" in message
    assert entries(cache) == []


def test_empty_held_out_text(options, cache, tmp_path):
    empty = write_documents(tmp_path / "empty.txt", [])
    message = error(replace(options, heldout_data=(str(empty),)), cache)
    assert message.startswith(f"--heldout-data {empty}: ")
    assert entries(cache) == []


@pytest.mark.parametrize("missing", ["data", "heldout_data"])
def test_missing_text_is_told_before_any_work(options, cache, tmp_path, missing):
    name = str(tmp_path / "missing.txt")
    assert error(replace(options, **{missing: (name,)}), cache).startswith(f"{name}: ")
    assert entries(cache) == []


def test_missing_tokenizer(options, cache, tmp_path):
    assert str(tmp_path / "none.json") in error(replace(options, tokenizer=tmp_path / "none.json"), cache)
    assert entries(cache) == []


# Memory

# The peak that a process starts with is its parent's, so the parent has to be a small one and not that of the tests.
PREPARE_IN_A_PROCESS_OF_ITS_OWN = """
    import random, resource, subprocess, sys

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(6, 18))) for _ in range(2_000)]
    sentences = [" ".join(rng.choices(words, k=rng.randint(5, 25))) for _ in range(20_000)]
    with open("corpus.txt", "w") as file:
        while file.tell() < 20_000_000:
            file.write(" ".join(rng.choices(sentences, k=20)) + "\\n\\n")

    prepare = '''if True:
        from pathlib import Path
        from cramfast.config import TextOptions
        from cramfast.data.prepare import prepare
        # Lower-casing and accents take time and no memory.
        plain = {"lowercase": False, "strip_accents": False, "max_tokens_per_char": 1.0}
        options = TextOptions(data=("corpus.txt",), vocab_size=8192, heldout_fraction=0.01, **plain)
        dataset = prepare(options, Path("cache"), lambda *_: None, print)
        assert len(dataset.split("train")) > 1_300_000
    '''
    subprocess.run([sys.executable, "-c", prepare], check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
"""


@pytest.mark.skipif(os.name == "nt", reason="no resource module")
def test_memory_is_bounded(tmp_path):
    script = textwrap.dedent(PREPARE_IN_A_PROCESS_OF_ITS_OWN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Tokenising the whole corpus in one go peaks at 370 MiB; a bound above that would see nothing.
    assert int(done.stdout) < 2**28
