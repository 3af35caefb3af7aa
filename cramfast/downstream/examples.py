"""Rows as tokens, and tokens as unpadded batches whose shapes are few.

An input is [CLS] sentence [SEP], or [CLS] sentence [SEP] sentence [SEP]. A batch for training has as many tokens as the
smallest of a short ladder of sizes that it fits into, so that few CUDA graphs serve all: what is left over is filled
with [PAD] in sequences of their own, which no classifier looks at. A batch that is short of sequences, the last of an
epoch, has some of one [PAD] in their place, of weight 0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from tokenizers import Tokenizer

from ..data.tokenizer import SpecialIds
from .tasks import Rows

_MOST_SIZES = 14
# The smallest size of a ladder goes this many times into the largest.
_SPAN = 16
_MULTIPLE = 16
_ROWS_AT_ONCE = 1024
# Tensors inside one buffer begin at multiples of so many numbers, which vector loads like.
_ALIGNED = 64


@dataclass(frozen=True)
class Examples:
    """Inputs laid end to end: ids and types (0, or 1 in a second sentence) int32 (T,), ends int64 (N + 1,); labels (N,)
    int64 or, of scores, float32."""

    ids: np.ndarray
    types: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each input (N,)."""
        return np.diff(self.ends)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Where the tokens of these inputs lie, one input after the other."""
        lengths = self.lengths[rows]
        shifts = np.repeat(self.ends[rows] - (np.cumsum(lengths) - lengths), lengths)
        return np.arange(lengths.sum()) + shifts


def encode(
    rows: Rows, tokenizer: Tokenizer, special: SpecialIds, max_length: int, report: Callable[[int], None]
) -> Examples:
    """Tokenise all rows; inputs are cut to max_length tokens. `report` hears how many rows are done."""
    ids, types, lengths = [], [], []
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        firsts = tokenizer.encode_batch_fast(rows.first[part], add_special_tokens=False)
        seconds = [None] * len(firsts)
        if rows.second is not None:
            seconds = tokenizer.encode_batch_fast(rows.second[part], add_special_tokens=False)
        for first, second in zip(firsts, seconds, strict=True):
            one, two = _cut(first.ids, None if second is None else second.ids, max_length)
            before = [special.cls, *one, special.sep]
            after = [] if two is None else [*two, special.sep]
            ids.append(np.array(before + after, dtype=np.int32))
            types.append(np.repeat(np.array([0, 1], dtype=np.int32), (len(before), len(after))))
            lengths.append(len(before) + len(after))
        report(len(lengths))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    labels = np.array(rows.labels, dtype=np.float32 if isinstance(rows.labels[0], float) else np.int64)
    return Examples(np.concatenate(ids), np.concatenate(types), ends, labels)


def _cut(one: list[int], two: list[int] | None, max_length: int) -> tuple[list[int], list[int] | None]:
    """Both sentences cut at their ends until they fit with the special tokens, the longer one first."""
    if two is None:
        return one[: max_length - 2], None
    room = max_length - 3
    if len(one) + len(two) <= room:
        return one, two
    keep_one = min(len(one), max(math.ceil(room / 2), room - len(two)))
    return one[:keep_one], two[: room - keep_one]


def ladder(batch_size: int, max_length: int) -> list[int]:
    """The token counts that training batches may have, rising by a constant factor to the most there can be."""
    most = batch_size * max_length
    factor = _SPAN ** (1 / (_MOST_SIZES - 1))
    sizes = {math.ceil(most / factor**step / _MULTIPLE) * _MULTIPLE for step in range(_MOST_SIZES)}
    return sorted(sizes)


@dataclass(frozen=True)
class Shape:
    """Of a batch: tokens, sequences that are classified, sequences in all, and the longest that there may be."""

    tokens: int
    rows: int
    sequences: int
    max_length: int

    def layout(self) -> tuple[dict[str, slice], int]:
        """Where in a buffer of 32-bit numbers each tensor of a batch lies, and the buffer's size."""
        sizes = {
            "input_ids": self.tokens,
            "token_types": self.tokens,
            "cu_seqlens": self.sequences + 1,
            "labels": self.rows,
            "weights": self.rows,
        }
        slices, offset = {}, 0
        for name, size in sizes.items():
            slices[name] = slice(offset, offset + size)
            offset += math.ceil(size / _ALIGNED) * _ALIGNED
        return slices, offset


@dataclass(frozen=True)
class FlatBatch:
    """A batch in one buffer of int32, so that one copy takes it to its place. is_score: labels are float32 there.

    input_ids, token_types (T,); cu_seqlens (B + 1,); labels and weights (R,) of the first R sequences: a loss is the
    sum of theirs by weight, 1 over the number of real ones, 0 of those that only fill the batch.
    """

    shape: Shape
    buffer: torch.Tensor
    is_score: bool
    tokens: int = 0
    sequences: int = 0
    """Real tokens and sequences in it."""
    slices: dict[str, slice] = field(default_factory=dict)

    @classmethod
    def empty(cls, shape: Shape, is_score: bool, device: torch.device | str = "cpu", **counts: int) -> "FlatBatch":
        """A batch of zeros."""
        slices, size = shape.layout()
        buffer = torch.zeros(size, dtype=torch.int32, device=device)
        return cls(shape, buffer, is_score, slices=slices, **counts)

    def part(self, name: str) -> torch.Tensor:
        """One of its tensors, a view."""
        view = self.buffer[self.slices[name]]
        return view.view(torch.float32) if name == "weights" or (name == "labels" and self.is_score) else view

    def pin(self) -> "FlatBatch":
        """The same in memory from which a GPU copies without anyone waiting."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device) -> "FlatBatch":
        """The same on `device`, copied without waiting where its memory is pinned."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))


class BatchMaker:
    """Makes training batches of a task's examples, `batch_size` sequences each.

    filled: whether they are filled up to one of few shapes; otherwise they hold the examples and nothing else.
    """

    def __init__(self, examples: Examples, batch_size: int, max_length: int, pad: int, filled: bool):
        self.examples, self.batch_size, self.max_length, self.pad = examples, batch_size, max_length, pad
        self.sizes = ladder(batch_size, max_length) if filled else None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.examples) / self.batch_size)

    def epoch(self, seed: int, epoch: int) -> Iterator[FlatBatch]:
        """All examples in an order that seed and epoch decide; the last batch may be short."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.examples))
        for begin in range(0, len(order), self.batch_size):
            yield self.make(order[begin : begin + self.batch_size])

    def make(self, rows: np.ndarray) -> FlatBatch:
        """The batch of these examples, of `batch_size` of them at most."""
        examples, lengths = self.examples, self.examples.lengths[rows]
        shape, ends = self._filled(lengths) if self.sizes else _just(lengths)
        is_score = examples.labels.dtype == np.float32
        batch = FlatBatch.empty(shape, is_score, tokens=int(lengths.sum()), sequences=len(rows))
        places = examples.of(rows)
        batch.part("input_ids").fill_(self.pad)[: batch.tokens] = torch.from_numpy(examples.ids[places])
        batch.part("token_types")[: batch.tokens] = torch.from_numpy(examples.types[places])
        batch.part("cu_seqlens")[1:] = torch.from_numpy(ends)
        batch.part("labels")[: len(rows)] = torch.from_numpy(examples.labels[rows])
        batch.part("weights")[: len(rows)] = 1 / len(rows)
        return batch

    def _filled(self, lengths: np.ndarray) -> tuple[Shape, np.ndarray]:
        """The shape of a batch of sequences of these lengths, and where its sequences end."""
        counts = np.ones(self.batch_size, dtype=np.int64)
        counts[: len(lengths)] = lengths
        ends = np.cumsum(counts)
        size = next(size for size in self.sizes if size >= ends[-1])
        fillers = np.arange(1, math.ceil(size / self.max_length) + 1)
        ends = np.concatenate((ends, np.minimum(ends[-1] + self.max_length * fillers, size)))
        return Shape(size, self.batch_size, len(ends), self.max_length), ends


def _just(lengths: np.ndarray) -> tuple[Shape, np.ndarray]:
    ends = np.cumsum(lengths)
    return Shape(int(ends[-1]), len(lengths), len(lengths), int(lengths.max())), ends


def evaluation_batches(
    examples: Examples, most_tokens: int
) -> Iterator[tuple[np.ndarray, tuple[torch.Tensor, ...], int]]:
    """All examples by length in batches of at most `most_tokens` tokens: (their numbers, (input_ids, token_types,
    cu_seqlens), tokens of the longest)."""
    order = np.argsort(-examples.lengths, kind="stable")
    begin = 0
    while begin < len(order):
        longest = int(examples.lengths[order[begin]])
        rows = order[begin : begin + max(1, most_tokens // longest)]
        places = examples.of(rows)
        ends = np.concatenate(([0], np.cumsum(examples.lengths[rows]))).astype(np.int32)
        inputs = (examples.ids[places].astype(np.int64), examples.types[places], ends)
        yield rows, tuple(map(torch.from_numpy, inputs)), longest
        begin += len(rows)
