"""Sums over the rows of several matrices at once, as the gradients of the biases of a layer are.

    s[c] = sum over t of x[t, c]

For a short batch a sum takes a GPU a few microseconds, and the host many times that to ask for it. One kernel does up
to four: a program sums a piece of the columns of one of them in float32, always in the same order.
"""

import functools
from collections.abc import Sequence

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div

_MOST = 4
_ROWS, _COLUMNS, _NUM_WARPS = 64, 64, 4


def column_sums_reference(matrices, dtype):
    """The definition, on any device and floating dtype; see `column_sums`."""
    return [matrix.sum(0, dtype=dtype) for matrix in matrices]


@triton.jit
def _sum(x_ptr, sums_ptr, piece, rows, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the sums of columns piece · COLUMNS and those that follow of x (rows, N)."""
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < N)[None, :]
        total += tl.load(x_ptr + row.to(tl.int64)[:, None] * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + column, tl.sum(total, 0), mask=column < N)


@triton.jit
def _column_sums_kernel(
    x0_ptr,  # (rows, N0)
    x1_ptr,  # (rows, N1), where there is a second matrix
    x2_ptr,
    x3_ptr,
    sums_ptr,  # (N0 + N1 + N2 + N3,)
    rows,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    piece = tl.program_id(0)
    first1: tl.constexpr = (N0 + COLUMNS - 1) // COLUMNS
    first2: tl.constexpr = first1 + (N1 + COLUMNS - 1) // COLUMNS
    first3: tl.constexpr = first2 + (N2 + COLUMNS - 1) // COLUMNS
    if piece < first1:
        _sum(x0_ptr, sums_ptr, piece, rows, N0, ROWS, COLUMNS)
    elif piece < first2:
        if x1_ptr is not None:
            _sum(x1_ptr, sums_ptr + N0, piece - first1, rows, N1, ROWS, COLUMNS)
    elif piece < first3:
        if x2_ptr is not None:
            _sum(x2_ptr, sums_ptr + N0 + N1, piece - first2, rows, N2, ROWS, COLUMNS)
    else:
        if x3_ptr is not None:
            _sum(x3_ptr, sums_ptr + N0 + N1 + N2, piece - first3, rows, N3, ROWS, COLUMNS)


@functools.lru_cache
def launch_for(widths: tuple[int, ...], dtype: torch.dtype, sums_dtype: torch.dtype) -> Launch:
    """The kernel for up to four matrices of `dtype` with so many columns."""
    absent = _MOST - len(widths)
    pointers = (*(dtype for _ in widths), *(None,) * absent, sums_dtype)
    constants = {f"N{i}": width for i, width in enumerate((*widths, *(0,) * absent))}
    return Launch(_column_sums_kernel, pointers, ("i32",), constants | {"ROWS": _ROWS, "COLUMNS": _COLUMNS}, _NUM_WARPS)


@catalogue
def _launches(dtype, _capability):
    yield launch_for((2304, 768, 3072, 768), dtype, torch.float32)
    yield launch_for((776,), dtype, dtype)


def column_sums(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The sums (N,), in `dtype`, over the rows of each of some contiguous matrices (T, N) of one dtype, on one device
    that runs kernels. N need not be the same for all. The sums are views of one tensor for each four matrices.

    Raises ValueError where T differs.
    """
    if len({matrix.shape[0] for matrix in matrices}) > 1:
        shapes = ", ".join(str(tuple(matrix.shape)) for matrix in matrices)
        raise ValueError(f"column_sums: matrices have shapes {shapes}, expected as many rows in each")
    if len(matrices) > _MOST:
        return column_sums(matrices[:_MOST], dtype) + column_sums(matrices[_MOST:], dtype)
    widths = tuple([matrix.shape[1] for matrix in matrices])
    sums = torch.empty(sum(widths), dtype=dtype, device=matrices[0].device)
    launch = launch_for(widths, matrices[0].dtype, dtype)
    pieces = sum([ceil_div(width, _COLUMNS) for width in widths])
    launch(pieces, *matrices, *(None,) * (_MOST - len(widths)), sums, matrices[0].shape[0])
    return [*sums.split_with_sizes(widths)]  # what `split` calls after a look through its arguments
