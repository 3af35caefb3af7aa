"""The flat layout: T tokens of B sequences back to back, `cu_seqlens` (B+1,) marking where each begins and ends.

`group_sequences` prepares a batch for kernels that give a program whole sequences to work on: short neighbours go
together into one group, as many as `limit` tokens hold, so that a program's tile of rows is well filled; a longer
sequence is a group of its own. Long groups come first, because a program that starts late should not last long.

The grouping is greedy, and greed is serial. The batch is cut into windows of tokens instead, and every lane of one
program walks the sequences that begin in its window, once to count and once to write. A group ends with its window,
which costs half a group a window. Kernels that gather rows have their tiles filled better, by `packing.py`.
"""

import functools

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div
from .operator import define

_LANES, _NUM_WARPS = 128, 4
_WINDOW = 512
_TOKENS_PER_PROGRAM = 1024


def sequence_positions(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sequence each token belongs to, and its place there.

    cu_seqlens: int32 (B+1,), rising from 0 to `total`; sequences may be empty. Returns two int64 tensors (total,):
    the sequence index and the position inside the sequence. Nothing is copied to the host.
    """
    token = torch.arange(total, device=cu_seqlens.device)
    boundaries = cu_seqlens.long()
    sequence = torch.searchsorted(boundaries[1:], token, right=True)
    return sequence, token - boundaries[sequence]


def all_as_long(cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> bool:
    """Whether each sequence has max_seqlen tokens, of `total` together. None has more, so their number alone tells, and
    cu_seqlens (B+1,) is not looked into."""
    return total == (cu_seqlens.shape[0] - 1) * max_seqlen


@triton.jit
def _count_at_most(cu_ptr, sequences, token):
    """How many of cu_seqlens' first `sequences` + 1 entries are at most `token`, for a vector of them."""
    low = tl.zeros_like(token)
    high = low + sequences + 1
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        below = searching & (tl.load(cu_ptr + middle, mask=searching, other=0) <= token)
        low = tl.where(below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    return low


@triton.jit
def _emit(
    groups_ptr, begin, end, mask, counts, offsets, WRITE: tl.constexpr, LIMIT: tl.constexpr, CLASSES: tl.constexpr
):
    """One group for each lane in `mask`: counted by its class, which is how many times `LIMIT` it spans, and written
    to the place that counting has found."""
    longest_first = tl.maximum(CLASSES - 1 - (end - begin - 1) // LIMIT, 0)
    chosen = (longest_first[:, None] == tl.arange(0, CLASSES)[None, :]) & mask[:, None]
    if WRITE:
        slot = 1 + tl.sum(tl.where(chosen, offsets + counts, 0), 1)
        tl.store(groups_ptr + 2 * slot, begin, mask=mask)
        tl.store(groups_ptr + 2 * slot + 1, end, mask=mask)
    return counts + chosen.to(tl.int32)


@triton.jit
def _walk(
    groups_ptr, cu_ptr, first, stop, sequences, offsets, WRITE: tl.constexpr, LIMIT: tl.constexpr, CLASSES: tl.constexpr
):
    """Every lane goes through the sequences from `first` on that begin before token `stop`. Returns its groups by
    class (lanes, classes)."""
    sequence = first
    counts = tl.zeros_like(offsets)
    begin = tl.load(cu_ptr + sequence, mask=sequence < sequences, other=0)
    end = begin
    going = (sequence < sequences) & (begin < stop)
    while tl.max(going.to(tl.int32), 0) > 0:
        next_end = tl.load(cu_ptr + sequence + 1, mask=going, other=0)
        full = going & (next_end - begin > LIMIT) & (end > begin)
        counts = _emit(groups_ptr, begin, end, full, counts, offsets, WRITE, LIMIT, CLASSES)
        begin = tl.where(full, end, begin)
        end = tl.where(going, next_end, end)
        sequence += going.to(tl.int32)
        going = going & (sequence < sequences) & (end < stop)
    return _emit(groups_ptr, begin, end, end > begin, counts, offsets, WRITE, LIMIT, CLASSES)


@triton.jit
def _group_kernel(
    cu_ptr,  # (B + 1,)
    groups_ptr,  # (1 + slots, 2)
    bounds_ptr,  # (2, T)
    sequences,
    tokens,
    window,  # tokens of a lane
    LIMIT: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        lane = tl.arange(0, LANES)
        # What follows reads one entry after the other, which takes long from memory; from the cache it does not.
        least = tl.zeros([BLOCK], tl.int32)
        for i in range(0, sequences + 1, BLOCK):
            entry = i + tl.arange(0, BLOCK)
            least = tl.minimum(least, tl.load(cu_ptr + entry, mask=entry <= sequences, other=0))
        # The first sequence of a lane begins at its first token or later, and cu_seqlens[0] is 0.
        first = _count_at_most(cu_ptr, sequences, lane * window - 1 + tl.min(least, 0))
        stop = tl.minimum((lane + 1) * window, tokens)
        none = tl.zeros([LANES, CLASSES], tl.int32)
        counts = _walk(groups_ptr, cu_ptr, first, stop, sequences, none, False, LIMIT, CLASSES)
        of_class = tl.sum(counts, 0)
        offsets = tl.cumsum(counts, 0) - counts + (tl.cumsum(of_class, 0) - of_class)[None, :]
        _walk(groups_ptr, cu_ptr, first, stop, sequences, offsets, True, LIMIT, CLASSES)
        tl.store(groups_ptr, tl.sum(of_class, 0))
    else:
        token = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        mask = token < tokens
        after = _count_at_most(cu_ptr, sequences, token)
        tl.store(bounds_ptr + token, tl.load(cu_ptr + after - 1, mask=mask, other=0), mask=mask)
        tl.store(bounds_ptr + tokens + token, tl.load(cu_ptr + after, mask=mask, other=0), mask=mask)


@functools.lru_cache
def launch_for(limit, classes) -> Launch:
    """The kernel for groups of up to `limit` tokens and sequences of up to `classes` (a power of two) times that."""
    constants = {"LIMIT": limit, "CLASSES": classes, "LANES": _LANES, "BLOCK": _TOKENS_PER_PROGRAM}
    return Launch(_group_kernel, (torch.int32,) * 3, ("i32",) * 3, constants, _NUM_WARPS)


@catalogue
def _launches(dtype, capability):
    if dtype.itemsize == 2 and capability >= 80:  # for attention
        yield launch_for(128, 1)
        yield launch_for(128, 2)
        yield launch_for(64, 8)


def _group(cu_seqlens, total, longest, limit):
    window = torch.sym_max(_WINDOW, ceil_div(total, _LANES))
    sequences = cu_seqlens.shape[0] - 1
    # Of two groups in a row the second's first sequence did not fit into the first: together they are over `limit`.
    slots = torch.sym_min(sequences, 2 * ceil_div(total, limit) + ceil_div(total, window))
    groups, bounds = cu_seqlens.new_empty((1 + slots, 2)), cu_seqlens.new_empty((2, total))
    programs = 1 + ceil_div(total, _TOKENS_PER_PROGRAM)
    launch = launch_for(limit, triton.next_power_of_2(ceil_div(longest, limit)))
    launch(programs, cu_seqlens, groups, bounds, sequences, total, window)
    return groups, bounds


_group_op = define("group_sequences", "(Tensor cu, SymInt total, int longest, int limit) -> (Tensor, Tensor)", _group)


def group_sequences(
    cu_seqlens: torch.Tensor, total: int, longest: int, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of whole sequences, of up to `limit` tokens or one alone, the longest first → (groups, bounds).

    cu_seqlens: int32 (B+1,), contiguous, rising from 0 to `total`, in steps of `longest` at most. groups: int32
    (1 + slots, 2), first the number of groups, then the first token and the one past the last of each; the rest of it
    is not written. bounds: int32 (2, total), for each token the same of its own sequence. Nothing is copied to the
    host.
    """
    if torch.compiler.is_compiling():
        return _group_op(cu_seqlens, total, longest, limit)
    return _group(cu_seqlens, total, longest, limit)
