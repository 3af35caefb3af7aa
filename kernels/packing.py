"""Tiles of `limit` tokens, each filled with whole sequences from wherever in the batch they lie.

Neighbours alone fill them badly: of sequences of 16 to 128 tokens a tile of 128 would hold 94 on average. Here
sequences are packed a chunk at a time, the longest first, and each tile is filled up with the longest that still fit:
120 tokens. A program of one warp packs a chunk, in as many steps as there are sequences. Who then lays the tokens out
counts the tiles of the chunks before, so the same batch is always laid out in the same way.

Source: first-fit decreasing, Johnson, "Near-optimal bin packing algorithms", 1973.
"""

import functools

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div
from .operator import define

_CHUNK = 64  # sequences
_TOKENS_PER_PROGRAM = 1024
_NUM_WARPS = 4


@triton.jit
def _pack_kernel(
    cu_ptr,  # (sequences + 1,)
    chunks_ptr,  # (2 chunks CHUNK + chunks,): where each sequence lies, how full each tile is, how many tiles
    sequences,
    chunks,
    LIMIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tile and place for each sequence of a chunk, as LIMIT * tile + place, tiles numbered from 0 in the chunk."""
    FITS: tl.constexpr = 1 << 30
    chunk, index = tl.program_id(0), tl.arange(0, CHUNK)
    sequence = chunk * CHUNK + index
    begin = tl.load(cu_ptr + sequence, mask=sequence < sequences, other=0)
    end = tl.load(cu_ptr + sequence + 1, mask=sequence < sequences, other=0)
    # No two are alike: of sequences of a length the first is the largest.
    left = tl.where(end > begin, (end - begin) * CHUNK + (CHUNK - 1 - index), 0)
    tile, space = -1, 0
    lies, filled = tl.zeros_like(left), tl.zeros_like(left)
    for _ in range(tl.sum((left > 0).to(tl.int32), 0)):
        fits = (left > 0) & (left < (space + 1) * CHUNK)
        # The largest of those that fit, or of all, for a tile of its own.
        best = tl.max(tl.where(fits, left + FITS, left), 0)
        if best < FITS:
            tile += 1
            space = LIMIT
        chosen = left == best % FITS
        lies = tl.where(chosen, tile * LIMIT + LIMIT - space, lies)
        space = tl.maximum(space - best % FITS // CHUNK, 0)
        filled = tl.where(index == tile, LIMIT - space, filled)
        left = tl.where(chosen, 0, left)
    tl.store(chunks_ptr + sequence, lies)
    tl.store(chunks_ptr + chunks * CHUNK + sequence, filled)
    tl.store(chunks_ptr + 2 * chunks * CHUNK + chunk, tile + 1)


@triton.jit
def _lay_out_kernel(
    cu_ptr,  # (sequences + 1,)
    chunks_ptr,  # as `_pack_kernel` leaves it
    count_ptr,  # (1,)
    places_ptr,  # (2, slots, LIMIT)
    sequences,
    chunks,
    slots,
    window,
    LIMIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Lays out BLOCK of the tokens of a chunk."""
    PARTS: tl.constexpr = CHUNK * LIMIT // BLOCK
    chunk, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    counts_ptr = chunks_ptr + 2 * chunks * CHUNK
    before = 0
    for i in range(0, chunk, BLOCK):
        others = i + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(counts_ptr + others, mask=others < chunk, other=0), 0)
    first, last = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, sequences)
    token = tl.load(cu_ptr + first) + part * BLOCK + tl.arange(0, BLOCK)
    valid = token < tl.load(cu_ptr + last)
    # The last sequence that begins at the token or before.
    sequence = tl.zeros_like(token) + first
    for i in tl.static_range(CHUNK.bit_length() - 1):
        next = sequence + (CHUNK >> (i + 1))
        entry = tl.load(cu_ptr + next, mask=valid & (next < last), other=0)
        sequence = tl.where(valid & (next < last) & (entry <= token), next, sequence)
    begin = tl.load(cu_ptr + sequence, mask=valid, other=0)
    end = tl.load(cu_ptr + sequence + 1, mask=valid, other=0)
    lies = tl.load(chunks_ptr + sequence, mask=valid, other=0)
    position, low = token - begin, lies % LIMIT
    place, beyond = low + position, low + end - begin
    if WINDOWED:
        low, beyond = tl.maximum(low, place - window), tl.minimum(beyond, place + window + 1)
    at = (before + lies // LIMIT) * LIMIT + place
    # A sequence longer than a tile, which there must not be, writes nothing behind it.
    valid &= place < LIMIT
    tl.store(places_ptr + at, token, mask=valid)
    tl.store(places_ptr + slots * LIMIT + at, low | (beyond - 1) << 8 | position << 16, mask=valid)
    # The rest of as many tiles as have BLOCK places.
    tile, place = part * (BLOCK // LIMIT) + tl.arange(0, BLOCK // LIMIT), tl.arange(0, LIMIT)
    count = tl.load(counts_ptr + chunk)
    filled = tl.load(chunks_ptr + (chunks + chunk) * CHUNK + tile)
    at = (before + tile)[:, None] * LIMIT + place[None, :]
    empty = (tile < count)[:, None] & (place[None, :] >= filled[:, None])
    tl.store(places_ptr + at, -1, mask=empty)
    tl.store(places_ptr + slots * LIMIT + at, 1, mask=empty)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count_ptr, before + count)


@functools.lru_cache
def _pack_launch(limit) -> Launch:
    constants = {"LIMIT": limit, "CHUNK": _CHUNK}
    return Launch(_pack_kernel, (torch.int32,) * 2, ("i32",) * 2, constants, 1)


@functools.lru_cache
def _lay_out_launch(limit, windowed) -> Launch:
    constants = {"LIMIT": limit, "CHUNK": _CHUNK, "BLOCK": _TOKENS_PER_PROGRAM, "WINDOWED": windowed}
    return Launch(_lay_out_kernel, (torch.int32,) * 4, ("i32",) * 4, constants, _NUM_WARPS)


@catalogue
def _launches(dtype, capability):
    if dtype.itemsize == 2 and capability == 90:  # for attention
        yield _pack_launch(128)
        yield from (_lay_out_launch(128, windowed) for windowed in (False, True))


def _pack(cu_seqlens, total, limit, window):
    sequences = cu_seqlens.shape[0] - 1
    chunks = ceil_div(sequences, _CHUNK)
    # In a chunk at most one tile is half empty. And one: `torch.compile` compiles anew for a dimension of 1.
    slots = torch.sym_min(sequences, 2 * ceil_div(total, limit) + chunks) + 1
    packed = cu_seqlens.new_empty(chunks * (2 * _CHUNK + 1))
    count, places = cu_seqlens.new_empty(1), cu_seqlens.new_empty((2, slots, limit))
    _pack_launch(limit)(chunks, cu_seqlens, packed, sequences, chunks)
    programs = chunks * (_CHUNK * limit // _TOKENS_PER_PROGRAM)
    lay_out = _lay_out_launch(limit, window >= 0)
    lay_out(programs, cu_seqlens, packed, count, places, sequences, chunks, slots, window)
    return count, places


_pack_op = define("pack_sequences", "(Tensor cu, SymInt total, int limit, int window) -> (Tensor, Tensor)", _pack)


def pack_sequences(
    cu_seqlens: torch.Tensor, total: int, limit: int, window: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of whole sequences, up to `limit` tokens in each → (count, places).

    cu_seqlens: int32 (B+1,), contiguous, rising from 0 to `total` > 0, in steps of `limit`, a power of two up to 128,
    at most. window: how far a token sees to either side; its whole sequence if negative. count: int32 (1,), of tiles.
    places: int32 (2, slots, limit), for each place in a tile the token there, and what is to be known of it: the first
    place that it sees in the lowest byte, the last in the next, its position in its sequence above them. A place
    without a token has -1, and sees from 1 to 0; slots past the last tile are not written. Nothing is copied to the
    host.
    """
    if torch.compiler.is_compiling():
        return _pack_op(cu_seqlens, total, limit, window)
    return _pack(cu_seqlens, total, limit, window)
