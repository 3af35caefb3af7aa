"""Layer normalisation, alone or fused with the residual addition before it.

    y = (x - mean(x)) * rstd(x) * weight + bias,   rstd = 1 / sqrt(var(x) + eps)

For the backward pass the input (the sum, where there is an addition) is saved and two float32 numbers a row, mean and
rstd. With xhat = (x - mean) * rstd and g = dy * weight:

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dweight = sum(dy * xhat),   dbias = sum(dy),   sums over rows

Backward is one pass: each program walks over many rows, keeps its share of dweight and dbias in registers, and a second
small kernel adds the shares up in a fixed order. On request (`torch.ops.cramfast.layer_norm_backward`) it writes y once
more, for a layer that keeps only the statistics. Statistics are fp32 whatever the dtype of x (fp64 for fp64, which runs
as the reference).

What is added to the residual can have dropout in front (for `tape.py`): 0 or 1 / (1 - dropout) times x, from random
numbers that a counter gives, the same in both passes.

Sources: Ba, Kiros, Hinton, "Layer Normalization", 1607.06450; the random numbers: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011.
"""

import functools

import torch
import torch.nn.functional as F

from .arguments import expect_like, expect_parameter, expect_rows
from .dispatch import pick
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, contiguous, dtype_of, multiprocessors
from .operator import Operator, define
from .rows import (
    MAX_WIDTH,
    ROW_REGISTERS,
    ROW_WARPS,
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
    store_rows,
    store_share,
    widen,
    zero_vector,
)


def layer_norm_reference(x, weight, bias=None, eps=1e-5):
    """The definition, on any device and floating dtype; see `layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)


def add_layer_norm_reference(x, residual, weight, bias=None, eps=1e-5):
    """The definition, on any device and floating dtype; see `add_layer_norm`."""
    s = x + residual
    return layer_norm_reference(s, weight, bias, eps), s


@triton.jit
def _kept(seed_ptr, stream, row, dropout, TILE: tl.constexpr, TILES: tl.constexpr):
    """1 / (1 - dropout) for what is kept of rows `row`, else 0. A counter gives four numbers, one for each tile.
    Attention's counters end with 0; `stream` is another for each dropout that has the same seed."""
    tl.static_assert(TILES <= 4)
    column = tl.arange(0, TILE)
    bits = tl.philox(tl.load(seed_ptr), row.to(tl.int32)[:, None], column[None, :], 0, stream)
    factors = ()
    for i in tl.static_range(TILES):
        kept = tl.uint_to_uniform_float(bits[i]) >= dropout
        factors = factors + (tl.where(kept, 1.0 / (1.0 - dropout), 0.0),)
    return factors


@triton.jit
def _norm_kernel(
    x_ptr,  # (rows, C)
    residual_ptr,  # (rows, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    seed_ptr,  # (1,), where x has dropout
    y_ptr,  # (rows, C)
    s_ptr,  # (rows, C), where there is a residual
    statistics_ptr,  # (2, rows): mean and rstd
    rows,
    stream,
    eps,
    dropout,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    x = widen(load_rows(x_ptr, row, valid, C, TILE, TILES), TILES)
    if seed_ptr is not None:
        x = multiply_rows(x, _kept(seed_ptr, stream, row, dropout, TILE, TILES), TILES)
    if residual_ptr is not None:
        s = add_rows(x, widen(load_rows(residual_ptr, row, valid, C, TILE, TILES), TILES), TILES)
        x = ()
        for i in tl.static_range(TILES):
            # Rounded as it is handed on: the backward pass sees no other.
            x = x + (s[i].to(s_ptr.dtype.element_ty).to(tl.float32),)
        store_rows(s_ptr, x, row, valid, C, TILE, TILES)
    weight = load_vector(weight_ptr, C, TILE, TILES)
    bias = None
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, C, TILE, TILES)
    mean, rstd = row_statistics(x, eps, C, TILE, TILES)
    tl.store(statistics_ptr + row, mean, mask=valid)
    tl.store(statistics_ptr + rows + row, rstd, mask=valid)
    store_rows(y_ptr, normalise_rows(x, mean, rstd, weight, bias, TILES), row, valid, C, TILE, TILES)


@triton.jit
def _norm_backward_kernel(
    dy_ptr,  # (rows, C)
    ds_ptr,  # (rows, C) or None: a gradient that reaches x besides
    x_ptr,  # (rows, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    seed_ptr,  # (1,), where a part of x had dropout
    statistics_ptr,  # (2, rows)
    dx_ptr,  # (rows, C)
    dpart_ptr,  # (rows, C), the gradient of that part before dropout
    y_ptr,  # (rows, C) or None: the forward pass's output, computed again
    partial_ptr,  # (1 or 2, programs, C): each program's dweight and, where there is a bias, dbias
    rows,
    stream,
    dropout,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    weight = load_vector(weight_ptr, C, TILE, TILES)
    dweight = zero_vector(TILE, TILES)
    dbias = zero_vector(TILE, TILES)
    # From the last rows to the first: what was written last before this kernel is still in the cache.
    row = (tl.cdiv(rows, ROWS) - 1 - tl.program_id(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    next_x, next_dy, next_mean, next_rstd = _load(x_ptr, dy_ptr, statistics_ptr, row, rows, C, TILE, TILES)
    for _ in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        valid = (row >= 0) & (row < rows)
        x, dy, mean, rstd = widen(next_x, TILES), widen(next_dy, TILES), next_mean, next_rstd
        if ds_ptr is not None:
            ds = load_rows(ds_ptr, row, valid, C, TILE, TILES)
        # The next rows travel while these are worked on: so few warps fit that they cannot cover for each other.
        following = row - tl.num_programs(0) * ROWS
        next_x, next_dy, next_mean, next_rstd = _load(x_ptr, dy_ptr, statistics_ptr, following, rows, C, TILE, TILES)
        dx, xhat = row_gradient(dy, x, mean, rstd, weight, C, TILES)
        dweight = fold_rows(dweight, multiply_rows(dy, xhat, TILES), TILES)
        if bias_ptr is not None:
            dbias = fold_rows(dbias, dy, TILES)
        if ds_ptr is not None:
            dx = add_rows(dx, widen(ds, TILES), TILES)
        store_rows(dx_ptr, dx, row, valid, C, TILE, TILES)
        if seed_ptr is not None:
            dpart = multiply_rows(dx, _kept(seed_ptr, stream, row, dropout, TILE, TILES), TILES)
            store_rows(dpart_ptr, dpart, row, valid, C, TILE, TILES)
        if y_ptr is not None:
            bias = None
            if bias_ptr is not None:
                bias = load_vector(bias_ptr, C, TILE, TILES)
            store_rows(y_ptr, normalise_rows(x, mean, rstd, weight, bias, TILES), row, valid, C, TILE, TILES)
        row = following
    store_share(partial_ptr, tl.program_id(0), dweight, C, TILE, TILES)
    if bias_ptr is not None:
        store_share(partial_ptr, tl.num_programs(0) + tl.program_id(0), dbias, C, TILE, TILES)


@triton.jit
def _load(x_ptr, dy_ptr, statistics_ptr, row, rows, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    valid = (row >= 0) & (row < rows)
    x = load_rows(x_ptr, row, valid, C, TILE, TILES)
    dy, mean, rstd = load_gradient(dy_ptr, statistics_ptr, row, valid, rows, C, TILE, TILES)
    return x, dy, mean, rstd


@triton.jit
def _sum_shares_kernel(
    partial_ptr,  # (1 or 2, shares, C)
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,) or None
    shares,
    C: tl.constexpr,
    SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([SHARES, COLUMNS], tl.float32)
    dbias = tl.zeros([SHARES, COLUMNS], tl.float32)
    for start in tl.range(0, shares, SHARES):
        share = start + tl.arange(0, SHARES)
        mask = (share < shares)[:, None] & (column < C)[None, :]
        place = partial_ptr + share[:, None] * C + column[None, :]
        dweight += tl.load(place, mask=mask, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(place + shares * C, mask=mask, other=0.0)
    tl.store(dweight_ptr + column, tl.sum(dweight, 0), mask=column < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + column, tl.sum(dbias, 0), mask=column < C)


def _row_in_lane(dropout):
    """Bytes of a row in a lane at the most. Random numbers go by the tiles, so those are the same forward and backward,
    and take registers of the backward pass."""
    return 48 if dropout else 64


@functools.lru_cache
def forward_launch(hidden, dtype, weight_dtype, bias_dtype, add, dropout=False) -> Launch:
    """The forward kernel for rows of `hidden` elements; bias_dtype None: no bias; add: with a residual."""
    tiling = row_tiling(hidden, dtype.itemsize, num_warps=4, row_in_lane=_row_in_lane(dropout))
    second, seed = dtype if add else None, torch.int64 if dropout else None
    pointers = (dtype, second, weight_dtype, bias_dtype, seed, dtype, second, torch.float32)
    return Launch(_norm_kernel, pointers, ("i64", "i32", "fp32", "fp32"), tiling.constants, tiling.num_warps)


@functools.lru_cache
def backward_launch(hidden, dtype, weight_dtype, bias_dtype, add, recompute, dropout=False) -> Launch:
    """The backward kernel; add: with a gradient of the sum; recompute: with the output of the forward pass."""
    # Two rows of 768 in 16 bits: they lie there twice, as loaded for the next turn and as float32.
    room = 96 if dtype.itemsize == 2 else 48
    tiling = row_tiling(
        hidden, dtype.itemsize, bytes_in_lane=0 if recompute or dropout else room, row_in_lane=_row_in_lane(dropout)
    )
    ds, y = dtype if add else None, dtype if recompute else None
    seed, dpart = (torch.int64, dtype) if dropout else (None, None)
    pointers = (dtype, ds, dtype, weight_dtype, bias_dtype, seed, torch.float32, dtype, dpart, y, torch.float32)
    scalars, warps = ("i64", "i32", "fp32"), tiling.num_warps
    # A multiprocessor has 65,536, which more than eight warps have to share.
    registers = min(ROW_REGISTERS, 65_536 // (32 * warps))
    return Launch(_norm_backward_kernel, pointers, scalars, tiling.constants, warps, registers)


@functools.lru_cache
def sum_launch(hidden, weight_dtype, bias_dtype) -> Launch:
    """The kernel that adds up the programs' shares of dweight and dbias."""
    pointers = (torch.float32, weight_dtype, bias_dtype)
    return Launch(_sum_shares_kernel, pointers, ("i32",), {"C": hidden, "SHARES": 256, "COLUMNS": 8}, 8)


@catalogue
def _launches(dtype, _capability):
    for hidden in (64, 768, 1024, 4096):
        parameters = (hidden, dtype, torch.float32, torch.float32)
        yield forward_launch(*parameters, add=True)
        yield from (backward_launch(*parameters, add=True, recompute=recompute) for recompute in (False, True))
        if dtype.itemsize == 2 and hidden in (768, 1024):  # as tapes have it
            yield forward_launch(*parameters, add=True, dropout=True)
            yield from (backward_launch(*parameters, add=add, recompute=False, dropout=True) for add in (False, True))
    yield from (
        forward_launch(768, dtype, dtype, None, add=False),
        backward_launch(768, dtype, dtype, None, False, False),
    )
    yield sum_launch(768, torch.float32, torch.float32)


def norm_forward(x, residual, weight, bias, eps, seed=None, stream=0, dropout=0.0):
    """(y, s, statistics (2, rows)); s is None without a residual. seed: int64 (1,) or more, where x has dropout."""
    x, residual, weight, bias = contiguous(x, residual, weight, bias)
    y, s = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    hidden = int(weight.shape[0])
    rows = x.numel() // hidden
    statistics = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    launch = forward_launch(hidden, x.dtype, weight.dtype, dtype_of(bias), s is not None, seed is not None)
    grid = ceil_div(rows, launch.constants["ROWS"])
    launch(grid, x, residual, weight, bias, seed, y, s, statistics, rows, stream, eps, dropout)
    return y, s, statistics


def _layer_norm(x, weight, bias, eps):
    y, _, statistics = norm_forward(x, None, weight, bias, eps)
    return y, statistics


def _programs(rows, rows_at_once, num_warps, multiprocessors):
    """How many programs share the rows: as many as fit, where there are 32 rows for each. Of fewer rows half as many
    take no longer, and what each leaves has to be added up."""
    most = multiprocessors * max(1, ROW_WARPS // num_warps)
    programs = min(max(ceil_div(rows, 32), ceil_div(most, 2)), most)
    return max(1, min(programs, ceil_div(rows, rows_at_once)))


def norm_backward(dy, ds, x, weight, bias, statistics, recompute=False):
    """(dx, dweight, dbias, y); dbias is None without a bias, y unless `recompute`."""
    return norm_and_dropout_backward(dy, ds, x, weight, bias, statistics, recompute)[:4]


def norm_and_dropout_backward(dy, ds, x, weight, bias, statistics, recompute=False, seed=None, stream=0, dropout=0.0):
    """(dx, dweight, dbias, y, dpart): dx of the sum and so of the residual, dpart of what `norm_forward` was given as
    x; None without a seed, since then it is the same."""
    dy, ds, x, weight, bias = contiguous(dy, ds, x, weight, bias)
    dx, y = torch.empty_like(x), torch.empty_like(x) if recompute else None
    dpart = None if seed is None else torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    hidden, rows = int(weight.shape[0]), statistics.shape[1]
    launch = backward_launch(hidden, x.dtype, weight.dtype, dtype_of(bias), ds is not None, recompute, seed is not None)
    programs = _programs(rows, launch.constants["ROWS"], launch.num_warps, multiprocessors(x.device))
    partial = torch.empty((1 if bias is None else 2, programs, hidden), dtype=torch.float32, device=x.device)
    tensors = (dy, ds, x, weight, bias, seed, statistics, dx, dpart, y, partial)
    launch(programs, *tensors, rows, stream, dropout)
    launch = sum_launch(hidden, dweight.dtype, dtype_of(dbias))
    launch(ceil_div(hidden, launch.constants["COLUMNS"]), partial, dweight, dbias, programs)
    return dx, dweight, dbias, y, dpart


def _save(ctx, inputs, results):
    *_, weight, bias, _ = inputs
    x = inputs[0] if len(results) == 2 else results[1]
    ctx.save_for_backward(x, weight, bias, results[-1])
    ctx.set_materialize_grads(False)


def _layer_norm_gradients(ctx, backward, dy, *_):
    if dy is None:
        return None, None, None, None
    x, weight, bias, statistics = ctx.saved_tensors
    dx, dweight, dbias, _ = backward(dy, None, x, weight, bias, statistics, False)
    return dx, dweight, None if bias is None else dbias, None


def _add_layer_norm_gradients(ctx, backward, dy, ds, *_):
    if dy is None:
        return ds, ds, None, None, None
    s, weight, bias, statistics = ctx.saved_tensors
    dx, dweight, dbias, _ = backward(dy, ds, s, weight, bias, statistics, False)
    return dx, dx, dweight, None if bias is None else dbias, None


_backward_op = define(
    "layer_norm_backward",
    "(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor? bias, Tensor statistics, bool recompute)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor y)",
    norm_backward,
)
_layer_norm_operator = Operator(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor statistics)",
    forward=_layer_norm,
    save=_save,
    backward=(norm_backward, _backward_op),
    gradients=_layer_norm_gradients,
)
_add_layer_norm_operator = Operator(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor s, Tensor statistics)",
    forward=norm_forward,
    save=_save,
    backward=(norm_backward, _backward_op),
    gradients=_add_layer_norm_gradients,
    outputs=2,
)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise the last dimension of x (..., C) with weight (C,) and bias (C,) → (..., C) in x's dtype.

    Parameters may be fp32 while x is 16-bit. Raises ValueError for a shape or device that does not fit and for C above
    16,384, TypeError for a dtype that does not fit.
    """
    check_norm("layer_norm", x, weight, bias)
    return pick("layer_norm", x, layer_norm_reference)(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(y, s)` with s = x + residual and y = layer_norm(s), all (..., C) in one dtype.

    A pre-norm block carries s on as its residual stream; the gradients of y and s both flow into x and residual. Raises
    as `layer_norm` does.
    """
    check_norm("add_layer_norm", x, weight, bias)
    expect_like("add_layer_norm", "residual", residual, x.shape, x)
    return pick("add_layer_norm", x, add_layer_norm_reference)(x, residual, weight, bias, eps)


def check_norm(operator, x, weight, bias):
    """Raises as `layer_norm` does."""
    width = expect_rows(operator, "x", x, MAX_WIDTH)
    expect_parameter(operator, "weight", weight, (width,), x)
    if bias is not None:
        expect_parameter(operator, "bias", bias, (width,), x)
