"""Unpadded batches out of a token stream: flat (T,) tokens and `cu_seqlens` (B+1,), T the same in every batch.

Two layouts say what a piece, the unit that is shuffled, is:

packed     the next `max_length` tokens of the stream of all documents, endlessly repeated. Epoch e holds the pieces
           that begin inside the e-th repetition; the last one is topped up from the beginning, and the next epoch
           starts where it ends, so that every token is met once a repetition.
documents  at most `max_length` − 1 tokens of one document, behind a [CLS].

Pieces follow one another in an order that is a pure function of (seed, epoch, index), computed without a table. A batch
takes T tokens of them; a piece that does not fit is cut, and its rest opens the next batch. The `Cursor` between two
batches is all there is to remember.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .shards import TokenStream


@dataclass(frozen=True)
class Cursor:
    """Where the next batch begins: piece `index` of `epoch`, `offset` of its stream tokens already used."""

    epoch: int = 0
    index: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """input_ids: int64 (T,); cu_seqlens: int32 (B+1,); attended: sum of squared lengths; next: the cursor after it."""

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    attended: int
    next: Cursor

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, copied without waiting where its memory is pinned."""
        ids, ends = (x.to(device, non_blocking=True) for x in (self.input_ids, self.cu_seqlens))
        return Batch(ids, ends, self.max_seqlen, self.attended, self.next)


class PieceSource(Protocol):
    """A layout: how many pieces an epoch has, and where in the stream each lies."""

    prefix: int | None
    """Token put before every piece; None: none."""

    def count(self, epoch: int) -> int: ...

    def locate(self, epoch: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start in the stream, length) of the pieces at places `index` of the epoch's order."""


class PackedPieces:
    """Slices of the endlessly repeated stream; `order` is "shuffled" or "full-stops" (then `full_stop` is its id)."""

    prefix = None

    def __init__(self, stream: TokenStream, length: int, seed: int, order: str = "shuffled", full_stop: int = -1):
        self.stream, self.length, self.seed, self.order, self.full_stop = stream, length, seed, order, full_stop
        self._sorted: tuple[int, np.ndarray] = (-1, np.empty(0))

    def count(self, epoch: int) -> int:
        return self._first(epoch + 1) - self._first(epoch)

    def locate(self, epoch: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.order == "shuffled":
            piece = shuffled(index, self.count(epoch), self.seed, epoch)
        else:
            piece = self._most_full_stops_first(epoch)[index]
        start = (self._first(epoch) + piece) * self.length % len(self.stream)
        return start, np.full(len(index), self.length)

    def _first(self, epoch: int) -> int:
        """Number, counted over all repetitions, of the first piece that begins in repetition `epoch`."""
        return -(-epoch * len(self.stream) // self.length)

    def _most_full_stops_first(self, epoch: int) -> np.ndarray:
        if self._sorted[0] != epoch:
            count, block = self.count(epoch), 1 << 14
            stops = np.empty(count, dtype=np.int32)
            for begin in range(0, count, block):
                piece = np.arange(begin, min(begin + block, count))
                start = (self._first(epoch) + piece)[:, None] * self.length
                tokens = self.stream.take((start + np.arange(self.length)).ravel() % len(self.stream))
                stops[piece] = (tokens.reshape(len(piece), -1) == self.full_stop).sum(axis=1)
            self._sorted = (epoch, np.argsort(-stops, kind="stable"))
        return self._sorted[1]


class DocumentPieces:
    """Pieces of one document each, in shuffled order."""

    def __init__(self, stream: TokenStream, length: int, seed: int, prefix: int):
        self.length, self.seed, self.prefix = length - 1, seed, prefix
        self.ends = np.asarray(stream.document_ends, dtype=np.int64)
        starts = np.concatenate(([0], self.ends[:-1]))
        pieces = -(-(self.ends - starts) // self.length)
        self.starts, self.piece_ends = starts, np.cumsum(pieces)
        self.piece_starts = self.piece_ends - pieces

    def count(self, epoch: int) -> int:
        return int(self.piece_ends[-1])

    def locate(self, epoch: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        piece = shuffled(index, self.count(epoch), self.seed, epoch)
        document = np.searchsorted(self.piece_ends, piece, side="right")
        start = self.starts[document] + (piece - self.piece_starts[document]) * self.length
        return start, np.minimum(self.length, self.ends[document] - start)


class BatchBuilder:
    """Builds the batch at a cursor."""

    def __init__(self, stream: TokenStream, pieces: PieceSource, tokens: int, max_seqlen: int):
        self.stream, self.pieces, self.tokens, self.max_seqlen = stream, pieces, tokens, max_seqlen

    def build(self, cursor: Cursor) -> Batch:
        """The batch of exactly `tokens` tokens that begins at `cursor`."""
        return self._assemble(*self._spans(cursor))

    def _spans(self, cursor: Cursor) -> tuple[np.ndarray, np.ndarray, Cursor]:
        """Stream spans that fill the batch, prefixes counted, and the cursor behind them."""
        extra = self.pieces.prefix is not None
        starts, lengths, room = [], [], self.tokens
        while room > 0:
            count = self.pieces.count(cursor.epoch)
            if not count:  # no piece begins in this repetition of a stream shorter than one
                cursor = Cursor(cursor.epoch + 1)
                continue
            enough = room // self.max_seqlen + 16
            index = np.arange(cursor.index, min(cursor.index + enough, count))
            start, length = self.pieces.locate(cursor.epoch, index)
            start[0] += cursor.offset
            length[0] -= cursor.offset
            begin = np.cumsum(length + extra) - (length + extra)
            pieces = int(np.searchsorted(begin, room))
            taken = np.minimum(length, room - begin - extra)[:pieces]
            starts.append(start[:pieces])
            lengths.append(taken)
            room -= int(taken.sum()) + pieces * extra
            if taken[-1] == length[pieces - 1]:
                cursor = Cursor(cursor.epoch, cursor.index + pieces)
            else:
                offset = int(taken[-1]) + (cursor.offset if pieces == 1 else 0)
                cursor = Cursor(cursor.epoch, cursor.index + pieces - 1, offset)
            if cursor.index == count:
                cursor = Cursor(cursor.epoch + 1)
        return np.concatenate(starts), np.concatenate(lengths), cursor

    def _assemble(self, starts: np.ndarray, lengths: np.ndarray, cursor: Cursor) -> Batch:
        extra = self.pieces.prefix is not None
        full = lengths + extra
        ends = np.cumsum(full)
        begins = ends - full
        index = np.repeat(starts - begins - extra, full) + np.arange(self.tokens)
        index %= len(self.stream)
        input_ids = self.stream.take(index)
        if extra:
            input_ids[begins] = self.pieces.prefix
        cu_seqlens = np.concatenate(([0], ends)).astype(np.int32)
        attended = int((full.astype(np.int64) ** 2).sum())
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(cu_seqlens), self.max_seqlen, attended, cursor)


class Prefetcher:
    """Builds batches in a background thread, a few ahead, in pinned memory for a GPU."""

    def __init__(self, build: Callable[[Cursor], Batch], cursor: Cursor, depth: int = 4, pin: bool = False):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(build, cursor, pin), name="batches", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch. Raises what building it raised, now and ever after."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended; the next caller would wait for it in vain
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and drop what it built."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # room for the item the thread may be waiting to put
                self._queue.get_nowait()
            self._thread.join(timeout=0.01)

    def _work(self, build: Callable[[Cursor], Batch], cursor: Cursor, pin: bool) -> None:
        while not self._stop.is_set():
            try:
                batch = build(cursor)
                if pin:
                    ids, ends = batch.input_ids.pin_memory(), batch.cu_seqlens.pin_memory()
                    batch = Batch(ids, ends, batch.max_seqlen, batch.attended, batch.next)
                cursor = batch.next
            except BaseException as error:
                batch = error
                self._stop.set()
            self._queue.put(batch)


def shuffled(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Places `index` of a random permutation of range(size) that depends on (seed, epoch) alone.

    A Feistel network permutes the smallest power of four that is at least `size`; values beyond it walk on until they
    land inside. Source: Black & Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(4, np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, mask, keys)
        outside = value >= size
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: int, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = value >> np.uint64(half), value & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right, key) & mask)
    return (left << np.uint64(half)) | right


def _scramble(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64's finaliser."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
