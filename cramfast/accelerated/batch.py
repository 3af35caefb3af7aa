"""From a padded batch to its tokens back to back, with one look at the device.

B sequences of S places, T real tokens, M of them with a label that counts.
"""

from dataclasses import dataclass
from operator import add

import torch

from ..kernels import pad, unpad

IGNORED = -100
"""The label of what is not predicted, everywhere in transformers."""


@dataclass(frozen=True)
class Counts:
    """What the host has to know of a batch.

    tokens, longest, shortest: real tokens of all sequences, of the longest and of the shortest. late: sequences that
    begin with padding. pieces: the most pieces that a sequence comes in, more than one where padding lies between.
    predicted: labels that count. stray: those of them that padding has.
    """

    tokens: int
    longest: int
    shortest: int
    late: int = 0
    pieces: int = 1
    predicted: int = 0
    stray: int = 0


@torch.compiler.disable
def count(real: torch.Tensor, labels: torch.Tensor | None = None) -> Counts:
    """Counts of real, bool (B, S), and labels (B, S). The host waits for the device once."""
    of_rows = [real.sum(1), real[:, 0], (real[:, 1:] > real[:, :-1]).sum(1)]
    if labels is not None:
        labelled = labels != IGNORED
        of_rows += [labelled.sum(1), (labelled > real).sum(1)]
    lengths, first, later, *of_labels = torch.stack(of_rows).tolist()
    return Counts(
        sum(lengths),
        max(lengths),
        min(lengths),
        len(first) - sum(first),
        max(map(add, first, later)),
        *map(sum, of_labels),
    )


@dataclass(frozen=True)
class Batch:
    """The real tokens of a padded batch.

    input_ids, positions, token_types: (T,), the latter two None where the model has none or was given none. indices:
    int64 (T,), the places of the tokens in the padded batch; None where all places are real. cu_seqlens: int32 (B+1,).
    """

    shape: tuple[int, int]
    input_ids: torch.Tensor
    positions: torch.Tensor | None
    token_types: torch.Tensor | None
    indices: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """The real places (T, ...) of x (B, S, ...)."""
        return x.flatten(0, 1) if self.indices is None else x.flatten(0, 1).index_select(0, self.indices)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, C) as (B, S, C), padding is zero."""
        return x.view(*self.shape, -1) if self.indices is None else pad(x, self.indices, *self.shape)


def unpadded(
    input_ids: torch.Tensor,
    real: torch.Tensor | None,
    counts: Counts,
    positions: torch.Tensor | None = None,
    token_types: torch.Tensor | None = None,
) -> Batch:
    """The batch of input_ids (B, S) where `real`, bool (B, S), holds (None: everywhere); positions and token_types,
    where given, expand to (B, S)."""
    shape, indices, longest = input_ids.shape, None, counts.longest
    if real is None or counts.tokens == input_ids.numel():
        ids, longest = input_ids.flatten(), shape[1]
        cu_seqlens = torch.arange(0, input_ids.numel() + 1, longest, dtype=torch.int32, device=input_ids.device)
    else:
        ids, indices, cu_seqlens, _ = unpad(input_ids, real, total=counts.tokens)
    batch = Batch(tuple(shape), ids, None, None, indices, cu_seqlens, longest)
    beside = (None if x is None else batch.flat(x.expand(shape)) for x in (positions, token_types))
    return Batch(batch.shape, ids, *beside, indices, cu_seqlens, longest)


def predictions(batch: Batch, labels: torch.Tensor, counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are predicted, rising (M,), and their labels (M,); with none of them, a token whose label does not
    count."""
    flat = batch.flat(labels)
    found = (flat != IGNORED).cumsum(0)
    # Like `nonzero`, which would ask the device how many there are.
    number = torch.arange(1, max(counts.predicted, 1) + 1, device=flat.device)
    rows = torch.searchsorted(found, number).clamp(max=len(flat) - 1)
    return rows, flat[rows]
