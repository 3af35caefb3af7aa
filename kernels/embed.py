"""The embedding layer: token rows, plus position rows where the model has them, then their LayerNorm.

    x[t] = weight[input_ids[t]] + position_weight[position_ids[t]],   y[t] = layer_norm(x[t])

or with a fixed position_weight, times a learned scalar, position_scale, whose gradient is the sum of
dx[t] · position_weight[position_ids[t]].

Saved for the backward pass are the indices and two float32 numbers a token, mean and rstd; rows are gathered again. The
gradient of a table's row is the sum of dx over the tokens that use it, with dx as in layer_norm.py, added in a fixed
order and in float32 without atomics. The tokens are sorted by row; each group of warps walks over a chunk of them and
writes a row's sum when the row changes. Rows whose tokens spread over several chunks (a mask token's are a fifth of
all) leave their pieces aside, and a second kernel adds those up. dx itself is never written: for a second table the
walk is done again in that table's order.
"""

import functools

import torch
import torch.nn.functional as F

from .arguments import expect_dtype, expect_indices, expect_parameter, expect_table
from .dispatch import pick
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, contiguous, dtype_of
from .layer_norm import layer_norm_reference, sum_launch
from .main_grad import claim, collects
from .operator import Operator, define
from .rows import (
    MAX_WIDTH,
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


def embed_reference(
    input_ids,
    weight,
    norm_weight,
    norm_bias=None,
    *,
    position_ids=None,
    position_weight=None,
    position_scale=None,
    eps=1e-5,
    dtype=None,
):
    """The definition, on any device and floating dtype; see `embed`."""
    rows = F.embedding(input_ids, weight)
    if position_weight is not None:
        places = F.embedding(position_ids, position_weight)
        rows = rows + (places if position_scale is None else position_scale * places.detach())
    return layer_norm_reference(rows, norm_weight, norm_bias, eps).to(dtype or weight.dtype)


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
        yield from (backward_launch(hidden, dtype.itemsize, sorted_by_token, add) for add in (False, True))
        if position is not None and scale is None:
            tables = (index, wide, None, wide, None, wide, wide)
            sorted_by_position = (dtype, torch.int16, index, *tables, wide, wide, wide, None, None)
            yield backward_launch(hidden, dtype.itemsize, sorted_by_position)
    yield from (join_launch(768, torch.int16, wide, add) for add in (False, True))


def _forward(weight, input_ids, norm_weight, norm_bias, position_ids, position_weight, position_scale, eps, dtype):
    """(y (T, C), statistics (2, T))."""
    (vocabulary, hidden), tokens = weight.shape, input_ids.shape[0]
    y = torch.empty((tokens, hidden), dtype=dtype, device=weight.device)
    statistics = torch.empty((2, tokens), dtype=torch.float32, device=weight.device)
    inputs = contiguous(input_ids, weight, position_ids, position_weight, position_scale, norm_weight, norm_bias)
    tensors = (*inputs, y, statistics)
    launch = forward_launch(int(hidden), dtype.itemsize, tuple(map(dtype_of, tensors)))
    grid = ceil_div(tokens, launch.constants["ROWS"])
    launch(grid, *tensors, tokens, vocabulary, _height(position_weight), eps)
    return y, statistics


def _backward(
    dy,
    weight,
    input_ids,
    norm_weight,
    norm_bias,
    position_ids,
    position_weight,
    position_scale,
    statistics,
    collected=None,
):
    """(dweight, dnorm_weight, dnorm_bias, dposition_weight, dposition_scale), None where there is no such parameter, as
    position_weight is none with a scale. dweight is added to `collected`, where given, and returned as that."""
    hidden, chunks = int(weight.shape[1]), ceil_div(input_ids.shape[0], _CHUNK)
    shares = ceil_div(chunks, _walk_tiling(hidden, dy.dtype.itemsize).rows) * (_CHUNK // _SHARE)
    shape = (1 if norm_bias is None else 2, shares, hidden)
    partial = torch.empty(shape, dtype=torch.float32, device=dy.device)
    dscale = None if position_scale is None else torch.empty(chunks, dtype=torch.float32, device=dy.device)
    norm = (norm_weight, norm_bias, statistics)
    inputs = (None, weight, position_ids, position_weight, position_scale, *norm)
    dweight = _table_gradient(dy, input_ids, weight, inputs, (partial, dscale), collected)
    dposition_weight = None
    if position_ids is not None and position_scale is None:
        inputs = (input_ids, weight, None, position_weight, None, *norm)
        dposition_weight = _table_gradient(dy, position_ids, position_weight, inputs, (None, None), None)
    dnorm_weight = torch.empty_like(norm_weight)
    dnorm_bias = None if norm_bias is None else torch.empty_like(norm_bias)
    launch = sum_launch(hidden, norm_weight.dtype, dtype_of(norm_bias))
    launch(ceil_div(hidden, launch.constants["COLUMNS"]), partial, dnorm_weight, dnorm_bias, shares)
    dposition_scale = None if dscale is None else dscale.sum(0, keepdim=True, dtype=position_scale.dtype)
    return dweight, dnorm_weight, dnorm_bias, dposition_weight, dposition_scale


def _table_gradient(dy, ids, table, inputs, shares, collected):
    """The gradient of `table`, whose rows `ids` name, added to `collected` if it is given. inputs: the kernel's tensors
    from ids_ptr to statistics_ptr; shares: those of the norm's gradients and of the scale's, where they are wanted."""
    (size, hidden), tokens = table.shape, ids.shape[0]
    # Sorting takes a pass for each byte of a key. Indices outside the table come first, and have no row.
    keys = ids.where((ids >= 0) & (ids < size), -1).to(torch.int16 if size <= 2**15 else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    add, dtable = collected is not None, collected
    if not add:
        dtable = torch.zeros((size, hidden), dtype=table.dtype, device=table.device)
    chunks = ceil_div(tokens, _CHUNK)
    pieces = torch.empty((chunks, 2, hidden), dtype=torch.float32, device=table.device)
    tensors = (*contiguous(dy, keys, order, *inputs), dtable, pieces, *shares)
    launch = backward_launch(int(hidden), dy.dtype.itemsize, tuple(map(dtype_of, tensors)), add)
    _, weight, _, position_weight, *_ = inputs
    grid = ceil_div(chunks, launch.constants["ROWS"])
    launch(grid, *tensors, tokens, weight.shape[0], _height(position_weight))
    launch = join_launch(int(hidden), keys.dtype, dtable.dtype, add)
    launch(chunks * ceil_div(int(hidden), launch.constants["TILE"]), keys, pieces, dtable, tokens)
    return dtable


def _height(table):
    return 0 if table is None else table.shape[0]


def _save(ctx, inputs, results):
    ctx.save_for_backward(*inputs[:7], results[1])
    ctx.collector = inputs[0] if collects(inputs[0]) else None


def _gradients(ctx, backward, dy, *_):
    *inputs, statistics = ctx.saved_tensors
    if ctx.collector is None or not ctx.needs_input_grad[0]:
        dweight, *others = backward(dy, *inputs, statistics)
    else:
        collected, joins = claim(ctx.collector)
        if not joins:
            collected.zero_()
        dweight, others = None, _backward(dy, *inputs, statistics, collected)[1:]
    dnorm_weight, dnorm_bias, dposition_weight, dposition_scale = others
    norm_bias, _, position_weight, position_scale = inputs[3:]
    dnorm_bias = None if norm_bias is None else dnorm_bias
    if position_scale is None:
        dposition_scale = None
    if position_weight is None or position_scale is not None:
        dposition_weight = None
    return dweight, None, dnorm_weight, dnorm_bias, None, dposition_weight, dposition_scale, None, None


_INPUTS = (
    "Tensor weight, Tensor input_ids, Tensor norm_weight, Tensor? norm_bias, Tensor? position_ids,"
    " Tensor? position_weight, Tensor? position_scale"
)
_operator = Operator(
    "embed",
    f"({_INPUTS}, float eps, ScalarType dtype) -> (Tensor y, Tensor statistics)",
    forward=_forward,
    save=_save,
    backward=(
        _backward,
        define(
            "embed_backward",
            f"(Tensor dy, {_INPUTS}, Tensor statistics)"
            " -> (Tensor dweight, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dposition_weight,"
            " Tensor dposition_scale)",
            _backward,
        ),
    ),
    gradients=_gradients,
)


def embed(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    *,
    position_ids: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    position_scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Normalised embeddings of input_ids (T,) → (T, C) in `dtype` (None: that of weight).

    weight (V, C); norm_weight, norm_bias (C,); position_ids (T,) index rows of position_weight (P, C), both given or
    neither. With position_scale (1,) those are added times that, and are no parameter themselves. Indices are int32 or
    int64. The gradient of a weight with a `main_grad` is added to that. On a GPU a token whose index lies outside its
    table becomes a row of NaN, and nothing else comes to harm; the reference raises as torch does. Raises ValueError
    for a shape or device that does not fit, and when only one of position_ids and position_weight is given, or a scale
    without them, TypeError for a dtype that does not fit.
    """
    if (position_ids is None) != (position_weight is None):
        raise ValueError("embed: position_ids and position_weight go together; one of them is None")
    if position_scale is not None and position_ids is None:
        raise ValueError("embed: position_scale is given without position_ids and position_weight")
    dtype = dtype or weight.dtype
    width = expect_table("embed", "weight", weight, MAX_WIDTH)
    expect_dtype("embed", dtype, weight)
    expect_indices("embed", "input_ids", input_ids, weight)
    expect_parameter("embed", "norm_weight", norm_weight, (width,), weight)
    if norm_bias is not None:
        expect_parameter("embed", "norm_bias", norm_bias, (width,), weight)
    if position_ids is not None:
        expect_indices("embed", "position_ids", position_ids, weight, input_ids.shape)
        expect_table("embed", "position_weight", position_weight, MAX_WIDTH)
        expect_parameter("embed", "position_weight", position_weight, (position_weight.shape[0], width), weight)
    if position_scale is not None:
        expect_parameter("embed", "position_scale", position_scale, (1,), weight)
    run = pick("embed", weight, embed_reference)
    positions = {"position_ids": position_ids, "position_weight": position_weight, "position_scale": position_scale}
    if run is embed_reference:
        return embed_reference(input_ids, weight, norm_weight, norm_bias, **positions, eps=eps, dtype=dtype)
    return run(weight, input_ids, norm_weight, norm_bias, *positions.values(), eps, dtype)
