"""Some rows of a matrix, and their gradient put back in place.

    y[i] = x[rows[i]]        dx[t] = dy[i] where rows[i] = t, else 0

No row is asked for twice, so the backward pass is a copy: each row of dx looks up where its gradient lies, if anywhere,
and is written once. Nothing is saved but `rows`.
"""

import functools

import torch

from .arguments import checking, expect_indices
from .dispatch import choose
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div
from .rows import MAX_WIDTH, load_rows, row_tiling, store_rows


def select_rows_reference(x, rows):
    """The definition, on any device and dtype; see `select_rows`."""
    return x.index_select(0, rows)


@triton.jit
def _put_back_kernel(
    dy_ptr,  # (M, C)
    source_ptr,  # (T,): which row of dy, or -1
    dx_ptr,  # (T, C)
    total,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < total
    source = tl.load(source_ptr + row, mask=valid, other=-1).to(tl.int64)
    values = load_rows(dy_ptr, source, source >= 0, C, TILE, TILES)
    store_rows(dx_ptr, values, row, valid, C, TILE, TILES)


@functools.lru_cache
def launch_for(hidden, dtype) -> Launch:
    """The backward kernel for rows of `hidden` elements."""
    tiling = row_tiling(hidden, dtype.itemsize, num_warps=4)
    return Launch(_put_back_kernel, (dtype, torch.int32, dtype), ("i64",), tiling.constants, tiling.num_warps)


@catalogue
def _launches(dtype, _capability):
    yield from (launch_for(hidden, dtype) for hidden in (768, 776))


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.total = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        return put_back(dy, *ctx.saved_tensors, ctx.total), None


def put_back(dy, rows, total):
    """dx (total, C) of dy (M, C)."""
    dy = dy.contiguous()
    place = torch.arange(rows.numel(), dtype=torch.int32, device=dy.device)
    source = place.new_full((total,), -1).scatter_(0, rows.long(), place)
    dx = dy.new_empty(total, dy.shape[1])
    launch = launch_for(dy.shape[1], dy.dtype)
    launch(ceil_div(total, launch.constants["ROWS"]), dy, source, dx, total)
    return dx


def select_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `rows` (M,), int32 or int64, of x (T, C) → (M, C); none of them twice, or its gradient is only one of them.

    Raises TypeError for a dtype and ValueError for a shape or device that does not fit; with CRAMFAST_CHECK=1 in the
    environment it waits for the GPU and raises ValueError for a row that comes twice.
    """
    if x.dim() != 2:
        raise ValueError(f"select_rows: x has shape {tuple(x.shape)}, expected (T, C)")
    expect_indices("select_rows", "rows", rows, x)
    if checking(x) and rows.unique().numel() < rows.numel():
        raise ValueError("select_rows: rows has a row twice")
    # What the norms can do with rows, this can: they decide for both.
    plain = torch.compiler.is_compiling() or not 0 < x.shape[1] <= MAX_WIDTH
    if plain or choose("layer_norm", x.device, x.dtype).backend == "reference":
        return select_rows_reference(x, rows)
    return _SelectRows.apply(x, rows)
