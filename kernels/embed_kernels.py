"""The Triton kernels of the embedding layer, and their launches; embed.py has the formula and says who does what."""

import functools

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div
from .rows import (
    ROW_REGISTERS,
    RowTiling,
    add_rows,
    fold_rows,
    load_gradient,
    load_rows,
    load_vector,
    multiply_rows,
    normalise_rows,
    row_gradient,
    row_statistics,
    row_tiling,
    scale_rows,
    store_rows,
    store_share,
    sum_rows,
    widen,
    zero_vector,
)


@triton.jit
def _gather(
    row,
    position,
    valid,
    weight_ptr,
    position_weight_ptr,
    position_scale_ptr,
    vocabulary,
    positions,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """x = weight[row] + position_weight[position], times the scale if there is one; position_weight[position], or x
    where there are no positions; and which rows lie inside the tables. row, position and valid are (ROWS,)."""
    inside = (row >= 0) & (row < vocabulary)
    x = widen(load_rows(weight_ptr, row, valid & inside, C, TILE, TILES), TILES)
    place = x
    if position_weight_ptr is not None:
        inside &= (position >= 0) & (position < positions)
        place = widen(load_rows(position_weight_ptr, position, valid & inside, C, TILE, TILES), TILES)
        if position_scale_ptr is not None:
            x = add_rows(x, scale_rows(place, tl.load(position_scale_ptr).to(tl.float32), TILES), TILES)
        else:
            x = add_rows(x, place, TILES)
    return x, place, inside


@triton.jit
def _index(ids_ptr, token, valid, otherwise):
    """ids[token] as int64, or `otherwise` where there are no ids."""
    if ids_ptr is not None:
        return tl.load(ids_ptr + token, mask=valid, other=0).to(tl.int64)
    else:
        return otherwise


@triton.jit
def _embed_kernel(
    ids_ptr,  # (tokens,)
    weight_ptr,  # (vocabulary, C)
    position_ids_ptr,  # (tokens,) or None
    position_weight_ptr,  # (positions, C) or None
    position_scale_ptr,  # () or None
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,) or None
    y_ptr,  # (tokens, C)
    statistics_ptr,  # (2, tokens): mean and rstd
    tokens,
    vocabulary,
    positions,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    row = _index(ids_ptr, token, valid, token)
    position = _index(position_ids_ptr, token, valid, token)
    tables = (weight_ptr, position_weight_ptr, position_scale_ptr, vocabulary, positions)
    x, _, inside = _gather(row, position, valid, *tables, C, TILE, TILES)
    mean, rstd = row_statistics(x, eps, C, TILE, TILES)
    rstd = tl.where(inside, rstd, float("nan"))
    tl.store(statistics_ptr + token, mean, mask=valid)
    tl.store(statistics_ptr + tokens + token, rstd, mask=valid)
    weight = load_vector(norm_weight_ptr, C, TILE, TILES)
    bias = None
    if norm_bias_ptr is not None:
        bias = load_vector(norm_bias_ptr, C, TILE, TILES)
    store_rows(y_ptr, normalise_rows(x, mean, rstd, weight, bias, TILES), token, valid, C, TILE, TILES)


@triton.jit
def _embed_backward_kernel(
    dy_ptr,  # (tokens, C)
    keys_ptr,  # (tokens,): the table's rows that the tokens use, sorted; -1 for those outside of it
    order_ptr,  # (tokens,): the tokens in that order
    ids_ptr,  # None where the keys are the token ids
    weight_ptr,
    position_ids_ptr,  # None where the keys are the position ids, or without positions
    position_weight_ptr,
    position_scale_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    statistics_ptr,
    dtable_ptr,  # (size, C), zeros, or what the gradient joins
    pieces_ptr,  # (chunks, 2, C): sums of rows that a chunk shares with the one before, and with the one after it
    partial_ptr,  # (1 or 2, shares, C) or None: gradients of the norm's weight and bias over SHARE tokens of each chunk
    dscale_ptr,  # (chunks,) or None: of the scale, over each chunk
    tokens,
    vocabulary,
    positions,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,
    ADD: tl.constexpr,
):
    weight = load_vector(norm_weight_ptr, C, TILE, TILES)
    total = _zero_rows(TILE, TILES, ROWS)
    chunk = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = chunk * CHUNK
    key = tl.load(keys_ptr + place, mask=place < tokens, other=-1).to(tl.int64)
    before = tl.load(keys_ptr + place - 1, mask=(place > 0) & (place < tokens), other=-1).to(tl.int64)
    # Whether the sum under way began in an earlier chunk.
    shared = (place > 0) & (before == key)
    token = tl.load(order_ptr + place, mask=place < tokens, other=0)
    next_dy, next_mean, next_rstd = load_gradient(dy_ptr, statistics_ptr, token, place < tokens, tokens, C, TILE, TILES)
    dscale = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, CHUNK // SHARE):
        dweight = zero_vector(TILE, TILES)
        dbias = zero_vector(TILE, TILES)
        for step in tl.range(part * SHARE, (part + 1) * SHARE):
            valid = place < tokens
            row = _index(ids_ptr, token, valid, key)
            position = _index(position_ids_ptr, token, valid, key)
            tables = (weight_ptr, position_weight_ptr, position_scale_ptr, vocabulary, positions)
            x, position_row, _ = _gather(row, position, valid, *tables, C, TILE, TILES)
            dy, mean, rstd = widen(next_dy, TILES), next_mean, next_rstd
            place += 1
            # The next gradient travels while this one is worked on.
            more = (place < tokens) & (step < CHUNK - 1)
            token = tl.load(order_ptr + place, mask=more, other=0)
            next_dy, next_mean, next_rstd = load_gradient(dy_ptr, statistics_ptr, token, more, tokens, C, TILE, TILES)
            following = tl.load(keys_ptr + place, mask=place < tokens, other=-1).to(tl.int64)
            dx, xhat = row_gradient(dy, x, mean, rstd, weight, C, TILES)
            total = add_rows(total, dx, TILES)
            if dscale_ptr is not None:
                dscale += sum_rows(multiply_rows(dx, position_row, TILES), TILES)
            if partial_ptr is not None:
                dweight = fold_rows(dweight, multiply_rows(dy, xhat, TILES), TILES)
                if norm_bias_ptr is not None:
                    dbias = fold_rows(dbias, dy, TILES)
            goes_on = (place < tokens) & (following == key)
            ends = valid & ((step == CHUNK - 1) | (goes_on == 0))
            piece = ends & (shared | goes_on)
            whole = ends & (piece == 0) & (key >= 0)
            row_sum = total
            if ADD:
                row_sum = add_rows(total, load_rows(dtable_ptr, key, whole, C, TILE, TILES), TILES)
            store_rows(dtable_ptr, row_sum, key, whole, C, TILE, TILES)
            store_rows(pieces_ptr, total, 2 * chunk + tl.where(shared, 0, 1), piece, C, TILE, TILES)
            total = _keep(total, ends == 0, TILES)
            shared &= ends == 0
            key = following
        if partial_ptr is not None:
            share = tl.program_id(0) * (CHUNK // SHARE) + part
            store_share(partial_ptr, share, dweight, C, TILE, TILES)
            if norm_bias_ptr is not None:
                store_share(partial_ptr, tl.num_programs(0) * (CHUNK // SHARE) + share, dbias, C, TILE, TILES)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + chunk, dscale, mask=chunk * CHUNK < tokens)


@triton.jit
def _zero_rows(TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros([ROWS, TILE], tl.float32),)
    return tiles


@triton.jit
def _keep(tiles, rows, TILES: tl.constexpr):
    """`tiles` with zeros outside of `rows` (ROWS,)."""
    out = ()
    for i in tl.static_range(TILES):
        out = out + (tl.where(rows[:, None], tiles[i], 0.0),)
    return out


@triton.jit
def _join_kernel(
    keys_ptr,  # (tokens,), sorted
    pieces_ptr,  # (chunks, 2, C)
    dtable_ptr,  # (size, C)
    tokens,
    C: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Adds up the pieces of the row whose tokens begin in this program's chunk and go on in the next."""
    across = tl.cdiv(C, TILE)
    chunk = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    end = (chunk + 1) * CHUNK
    key = tl.load(keys_ptr + end - 1, mask=end < tokens, other=-1).to(tl.int64)
    following = tl.load(keys_ptr + end, mask=end < tokens, other=-2).to(tl.int64)
    # It began in this chunk unless the last token of the one before has the same row.
    before = tl.load(keys_ptr + chunk * CHUNK - 1, mask=(chunk > 0) & (end < tokens), other=-1).to(tl.int64)
    if (key == following) & ((chunk == 0) | (before != key)) & (key >= 0):
        total = tl.load(pieces_ptr + (2 * chunk + 1) * C + column, mask=column < C, other=0.0)
        next = chunk + 1
        more = key == following
        while more:
            others = next + tl.arange(0, CHUNKS)
            first = tl.load(keys_ptr + others * CHUNK, mask=others * CHUNK < tokens, other=-1).to(tl.int64)
            same = first == key
            mask = same[:, None] & (column < C)[None, :]
            total += tl.sum(tl.load(pieces_ptr + 2 * others[:, None] * C + column[None, :], mask=mask, other=0.0), 0)
            next += CHUNKS
            more = tl.sum(same.to(tl.int32), 0) == CHUNKS
        if ADD:
            total += tl.load(dtable_ptr + key * C + column, mask=column < C, other=0.0)
        tl.store(dtable_ptr + key * C + column, total, mask=column < C)


# Tokens that a group of warps walks over: long enough for the walk to outweigh its pieces, short enough to fill a card.
_CHUNK = 32
# Tokens whose share of the norm's gradients is added up one after the other: more would cost digits.
_SHARE = 16


@functools.lru_cache
def forward_launch(hidden, itemsize, pointers) -> Launch:
    """The forward kernel for outputs of `itemsize` bytes; pointers: the dtypes of its tensors."""
    tiling = row_tiling(hidden, itemsize, num_warps=4)
    return Launch(_embed_kernel, pointers, ("i64", "i64", "i64", "fp32"), tiling.constants, tiling.num_warps)


def _walk_tiling(hidden: int, itemsize: int) -> RowTiling:
    """That of the walk, which keeps more of a row in registers than other kernels."""
    return row_tiling(hidden, itemsize, row_in_lane=48)


def chunks_of(tokens: int) -> int:
    """How many groups of warps share the walk over so many tokens."""
    return ceil_div(tokens, _CHUNK)


def shares_of(tokens: int, hidden: int, itemsize: int) -> int:
    """How many shares of the norm's gradients they leave, whose output gradient has elements of `itemsize` bytes."""
    return ceil_div(chunks_of(tokens), _walk_tiling(hidden, itemsize).rows) * (_CHUNK // _SHARE)


@functools.lru_cache
def backward_launch(hidden, itemsize, pointers, add=False) -> Launch:
    """The walk over sorted tokens, for output gradients of `itemsize` bytes; pointers: the dtypes of its tensors; add:
    to the gradient that is there."""
    tiling = _walk_tiling(hidden, itemsize)
    constants = tiling.constants | {"CHUNK": _CHUNK, "SHARE": _SHARE, "ADD": add}
    return Launch(_embed_backward_kernel, pointers, ("i64",) * 3, constants, tiling.num_warps, ROW_REGISTERS)


@functools.lru_cache
def join_launch(hidden, key_dtype, table_dtype, add=False) -> Launch:
    """The kernel that adds up pieces; add: to the gradient that is there."""
    tile = min(256, triton.next_power_of_2(hidden))
    constants = {"C": hidden, "TILE": tile, "CHUNK": _CHUNK, "CHUNKS": 64, "ADD": add}
    return Launch(_join_kernel, (key_dtype, torch.float32, table_dtype), ("i64",), constants, 4)


@catalogue
def _launches(dtype, _capability):
    index, wide = torch.int64, torch.float32
    for hidden, position, scale in ((768, None, None), (768, index, None), (768, index, wide), (1024, index, None)):
        tables = (index, wide, position, position and wide, scale, wide, wide)
        yield forward_launch(hidden, dtype.itemsize, (*tables, dtype, wide))
        sorted_by_token = (dtype, torch.int16, index, None, *tables[1:], wide, wide, wide, wide, scale)
        yield backward_launch(hidden, dtype.itemsize, sorted_by_token, add=True)
        if hidden == 768 and scale is None:
            yield backward_launch(hidden, dtype.itemsize, sorted_by_token)
        if position is not None and scale is None:
            tables = (index, wide, None, wide, None, wide, wide)
            sorted_by_position = (dtype, torch.int16, index, *tables, wide, wide, wide, None, None)
            yield backward_launch(hidden, dtype.itemsize, sorted_by_position)
    yield from (join_launch(768, torch.int16, wide, add) for add in (False, True))
