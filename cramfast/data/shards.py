"""Token files on disk: written once, checked by checksum, read through memory maps.

A dataset is one folder: `manifest.json`, `tokenizer.json` and, for each split (`train`, `heldout`),
`SPLIT-NNNNN.tokens` (uint16, or uint32 above 65,536 entries) and `SPLIT.documents` (uint64, the end of each document in
the stream of the split). A document is its tokens and one separator. The folder is written aside and renamed when it is
complete, so that half of one never exists under its name.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = 1
SPLITS = ("train", "heldout")
_SHARD_TOKENS = 1 << 26
_FLUSH_TOKENS = 1 << 20
_CHUNK_BYTES = 1 << 22


class DamagedShards(Exception):
    """A dataset's files do not match its manifest; the message names the file."""


class SplitWriter:
    """Writes one split: `add` documents, then `close` for the split's part of the manifest."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, vocab_size: int, shard_tokens: int = _SHARD_TOKENS):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.documents = 0
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self._written = 0
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0
        self._files: list[dict] = []
        self._shard: _HashedFile | None = None
        self._ends = _HashedFile(folder / f"{split}.documents")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, its separator included."""
        self.documents += 1
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        if self._waiting_tokens >= _FLUSH_TOKENS:
            self._flush()

    def close(self) -> dict:
        self._flush()
        self._close_shard()
        return {
            "tokens": self._written,
            "documents": self.documents,
            "shards": self._files,
            "boundaries": self._ends.close(),
        }

    def release(self) -> None:
        """Close the files, finished or not: Windows removes none that is open."""
        for file in (self._shard, self._ends):
            if file is not None:
                file.file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        lengths = [len(tokens) for tokens in self._waiting]
        self._ends.write(np.cumsum([self._written, *lengths], dtype=np.uint64)[1:])
        tokens = np.concatenate(self._waiting)
        self._waiting, self._waiting_tokens = [], 0
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        tokens = tokens.astype(self.dtype)
        while len(tokens):
            room = self.shard_tokens - self._written % self.shard_tokens
            part, tokens = tokens[:room], tokens[room:]
            if self._shard is None:
                self._shard = _HashedFile(self.folder / f"{self.split}-{len(self._files):05d}.tokens")
            self._shard.write(part)
            self._written += len(part)
            if len(part) == room:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._files.append(self._shard.close())
            self._shard = None


class _HashedFile:
    """A file whose SHA-256 is taken while it is written."""

    def __init__(self, path: Path):
        self.path, self.file, self.hash = path, path.open("wb"), hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.hash.update(data)

    def close(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"file": self.path.name, "bytes": self.path.stat().st_size, "sha256": self.hash.hexdigest()}


@dataclass(frozen=True)
class Dataset:
    """A complete token dataset in a folder."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open and verify every checksum. Raises DamagedShards naming the file that does not match."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise DamagedShards(f"{folder / 'manifest.json'}: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise DamagedShards(f"{folder / 'manifest.json'}: format {found}, expected {FORMAT}")
        if manifest.pop("sha256", None) != _digest(manifest):
            raise DamagedShards(f"{folder / 'manifest.json'}: its checksum is not that of its content")
        files = [manifest["tokenizer"]]
        for split in manifest["splits"].values():
            files += [split["boundaries"], *split["shards"]]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda entry: _verify(folder, entry), files))
        return cls(folder, manifest)

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @cached_property
    def tokenizer(self):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def split(self, name: str) -> "TokenStream":
        part = self.manifest["splits"][name]
        dtype = np.dtype(self.manifest["dtype"])
        shards = [np.memmap(self.folder / entry["file"], dtype, mode="r") for entry in part["shards"]]
        ends = np.memmap(self.folder / part["boundaries"]["file"], np.uint64, mode="r")
        return TokenStream(shards, ends)


def _verify(folder: Path, entry: dict) -> None:
    path, digest = folder / entry["file"], hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DamagedShards(f"{path}: {error.strerror}") from error
    if digest.hexdigest() != entry["sha256"]:
        raise DamagedShards(f"{path}: its checksum is not the one in the manifest")


class TokenStream:
    """All tokens of a split as one stream, documents in order; `document_ends[i]` is where document i ends."""

    def __init__(self, shards: list[np.ndarray], document_ends: np.ndarray):
        self.shards, self.document_ends = shards, document_ends
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, index: np.ndarray) -> np.ndarray:
        """Tokens at stream positions `index` (n,) → int64 (n,)."""
        if len(self.shards) == 1:
            return self.shards[0][index].astype(np.int64)
        tokens = np.empty(len(index), dtype=np.int64)
        which = np.searchsorted(self._starts, index, side="right") - 1
        for shard in np.unique(which):
            chosen = which == shard
            tokens[chosen] = self.shards[shard][index[chosen] - self._starts[shard]]
        return tokens


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of the token frequencies: the loss of a model that knows frequencies and nothing else."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json, the last file of a dataset, with the checksum of its own content."""
    path = folder / "manifest.json"
    manifest = {"format": FORMAT, **manifest}
    with open(path, "w") as file:
        json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def file_entry(path: Path) -> dict:
    """The manifest's record of a file that exists."""
    data = path.read_bytes()
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
