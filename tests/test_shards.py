import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from cramfast.data import shards
from cramfast.data.shards import (
    SPLITS,
    DamagedShards,
    Dataset,
    SplitWriter,
    TokenStream,
    file_entry,
    token_dtype,
    unigram_entropy,
    write_manifest,
)


def random_documents(number: int, vocab_size: int = 1000, longest: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, size=rng.integers(1, longest + 1)) for _ in range(number)]


def write_dataset(folder, documents: dict[str, list[np.ndarray]], vocab_size=1000, shard_tokens=100) -> Dataset:
    folder.mkdir()
    Tokenizer(models.WordPiece({"[UNK]": 0, "word": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    dtype = token_dtype(vocab_size)
    splits = {}
    for split in SPLITS:
        writer = SplitWriter(folder, split, dtype, vocab_size, shard_tokens)
        for tokens in documents[split]:
            writer.add(tokens)
        splits[split] = writer.close()
    manifest = {"vocab_size": vocab_size, "dtype": dtype.name, "tokenizer": file_entry(folder / "tokenizer.json")}
    write_manifest(folder, {**manifest, "splits": splits})
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a dataset with two shards in its training split."""
    folder = tmp_path_factory.mktemp("shards") / "dataset"
    documents = [np.arange(60), np.arange(70), np.arange(20)]
    write_dataset(folder, {"train": documents, "heldout": documents[:1]})
    return folder


@pytest.fixture
def copied(small, tmp_path):
    return shutil.copytree(small, tmp_path / "dataset")


# Round trip


@pytest.mark.parametrize("flush_tokens", [1, 64, 1 << 20])
@pytest.mark.parametrize("shard_tokens", [7, 100, 1 << 20])
@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_round_trip(tmp_path, monkeypatch, vocab_size, shard_tokens, flush_tokens):
    monkeypatch.setattr(shards, "_FLUSH_TOKENS", flush_tokens)
    documents = {"train": random_documents(12, vocab_size), "heldout": random_documents(3, vocab_size)}
    dataset = write_dataset(tmp_path / "dataset", documents, vocab_size, shard_tokens)
    for split, expected in documents.items():
        stream = dataset.split(split)
        tokens = np.concatenate(expected)
        assert len(stream) == len(tokens)
        assert stream.take(np.arange(len(stream))).tolist() == tokens.tolist()
        assert stream.document_ends.tolist() == np.cumsum([len(document) for document in expected]).tolist()
        full, rest = divmod(len(tokens), shard_tokens)
        assert [len(shard) for shard in stream.shards] == [shard_tokens] * full + [rest] * (rest > 0)


def test_manifest_of_a_split(tmp_path):
    documents = random_documents(30)
    writer = SplitWriter(tmp_path, "train", np.dtype(np.uint16), 1000, shard_tokens=100)
    for tokens in documents:
        writer.add(tokens)
    part = writer.close()
    tokens = np.concatenate(documents)
    assert part["tokens"] == len(tokens)
    assert part["documents"] == writer.documents == 30
    assert [entry["file"] for entry in part["shards"][:2]] == ["train-00000.tokens", "train-00001.tokens"]
    assert part["boundaries"]["file"] == "train.documents"
    for entry in (part["boundaries"], *part["shards"]):
        assert entry == file_entry(tmp_path / entry["file"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.documents",
        *(entry["file"] for entry in part["shards"]),
    }
    assert writer.counts.tolist() == np.bincount(tokens, minlength=1000).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (1 << 20, np.uint32)]
)
def test_type_of_the_tokens_holds_the_highest_id(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    documents = [np.array([vocab_size - 1, 0, vocab_size - 1])]
    dataset = write_dataset(tmp_path / "dataset", {"train": documents, "heldout": documents}, vocab_size)
    stream = dataset.split("train")
    assert stream.shards[0].dtype == dtype
    assert stream.take(np.arange(3)).tolist() == documents[0].tolist()


def test_shards_are_mapped_not_read(small):
    stream = Dataset.open(small).split("train")
    assert all(isinstance(array, np.memmap) for array in (*stream.shards, stream.document_ends))


def test_tokenizer_of_a_dataset(small):
    dataset = Dataset.open(small)
    assert dataset.tokenizer.encode("word").ids == [1]
    assert dataset.vocab_size == 1000


# Taking tokens


@pytest.mark.parametrize("sizes", [[50], [1, 1, 1, 47], [20, 30], [7, 13, 0, 30]])
def test_take_across_shards(sizes):
    tokens = np.arange(100, 150).astype(np.uint16)
    stream = TokenStream(np.split(tokens, np.cumsum(sizes)[:-1]), np.array([50]))
    index = np.random.default_rng(0).integers(0, 50, size=200)
    taken = stream.take(index)
    assert taken.dtype == np.int64
    assert taken.tolist() == tokens[index].tolist()
    assert stream.take(index[:0]).tolist() == []


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"0")


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, extend, empty, remove])
@pytest.mark.parametrize(
    "name",
    [
        "train-00000.tokens",
        "train-00001.tokens",
        "train.documents",
        "heldout-00000.tokens",
        "heldout.documents",
        "tokenizer.json",
        "manifest.json",
    ],
)
def test_damage_is_found_and_the_file_named(copied, name, damage):
    assert Dataset.open(copied)
    damage(copied / name)
    with pytest.raises(DamagedShards) as caught:
        Dataset.open(copied)
    message = str(caught.value)
    assert message.startswith(f"{copied / name}: ")
    assert len(message.splitlines()) == 1


def test_damage_anywhere_in_the_manifest_is_found(copied):
    path = copied / "manifest.json"
    sound = path.read_bytes()
    for position in range(0, len(sound), 3):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        with pytest.raises(DamagedShards, match=r"manifest\.json: "):
            Dataset.open(copied)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"', "{}", '{"format": 1}', '{"format": 1, "splits": 3}'])
def test_a_manifest_of_something_else(copied, content):
    (copied / "manifest.json").write_text(content)
    with pytest.raises(DamagedShards, match=r"manifest\.json: "):
        Dataset.open(copied)


def test_a_manifest_of_another_format(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": shards.FORMAT + 1}))
    with pytest.raises(DamagedShards, match=rf"format {shards.FORMAT + 1}, expected {shards.FORMAT}"):
        Dataset.open(copied)


# Entropy


def test_unigram_entropy_against_its_definition():
    tokens = np.concatenate(random_documents(100, vocab_size=50)).tolist()
    counts = Counter(tokens)
    expected = -math.fsum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    # Sums of 50 terms in float64: the last few of 53 bits may differ.
    assert unigram_entropy(np.bincount(tokens, minlength=80)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], math.log(4)), ([0, 7, 0], 0.0), ([1, 0, 1], math.log(2))]
)
def test_unigram_entropy_of_simple_frequencies(counts, expected):
    assert unigram_entropy(np.array(counts)) == pytest.approx(expected, rel=1e-15, abs=0)
