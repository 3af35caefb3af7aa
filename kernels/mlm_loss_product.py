"""Rows times decoder with the exponential in the product's epilogue: what a softmax is made of, but no logits.

    e = exp(z − base),  z = rows @ decoderᵀ + bias,  and sums of e over pieces of its rows, or
    e = factor exp(z − base),  but factor share where the column is the label's, and 0 where base is infinite

Sums are of e in float32, before it is rounded to bfloat16, which has the range for it: what is larger than 2^126, or no
number, becomes 2^126.

A program takes tiles of e until none is left, and fetches for the next one while it finishes the last; two of them on a
multiprocessor multiply while the other takes exponentials. On an H200 that is as fast as cuBLAS's product alone.
Tensors are read and written by the copy engine of Hopper, from addresses that are multiples of 16 bytes.
"""

import functools

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, dtype_of, multiprocessors
from .mlm_loss_kernels import LOG2E
from .tiles import tile_at

_MOST = tl.constexpr(126.0)
# Of three steps of 64 columns of rows and decoder, 96 KiB, and the half tile that is written, 16 KiB: half of what a
# multiprocessor has, as are the registers.
_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
_NUM_WARPS, _REGISTERS, _PROGRAMS = 8, 128, 2
# Tiles one below the other, before the columns beside them: as many rows as stay in the cache.
_GROUP = 32
# The cards on which it was measured, by compute capability.
CAPABILITIES = (90,)


def pieces(vocabulary: int) -> int:
    """How many sums there are of a row."""
    return ceil_div(vocabulary, _COLUMNS)


@triton.jit
def _exponentials(
    z, bases, bias_ptr, targets_ptr, shares_ptr, factor_ptr, row, column, rows, vocabulary, before,
    MASKED: tl.constexpr,
):  # fmt: skip
    """e of some rows and columns in float32, 0 beyond the vocabulary; column: counted from the decoder's first row."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
    e = tl.exp2(tl.minimum(z * LOG2E - (bases * LOG2E)[:, None], _MOST))
    if MASKED:
        e = tl.where((column < vocabulary)[None, :], e, 0.0)
    if factor_ptr is not None:
        target = tl.load(targets_ptr + row, mask=row < rows, other=-1) - before
        share = tl.load(shares_ptr + row, mask=row < rows, other=0.0)
        factor = tl.load(factor_ptr)
        e *= tl.where(bases == float("inf"), 0.0, factor)[:, None]
        e = tl.where(column[None, :] == target[:, None], (factor * share)[:, None], e)
    return e


@triton.jit
def product_kernel(
    rows_ptr,  # (rows, C)
    decoder_ptr,  # (columns, C)
    bias_ptr,  # (vocabulary,) or None
    bases_ptr,  # (rows,)
    targets_ptr,  # (rows,), where there is a factor: the label; the first column is token `before`
    shares_ptr,  # (rows,), where there is a factor
    factor_ptr,  # () or None
    out_ptr,  # (rows, columns) in rows of `stride`, or None
    sums_ptr,  # (rows, pieces) or None
    rows,
    columns,
    stride,
    vocabulary,
    before,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    left = tl.make_tensor_descriptor(rows_ptr, [rows, C], [C, 1], [ROWS, DEPTH])
    right = tl.make_tensor_descriptor(decoder_ptr, [columns, C], [C, 1], [COLUMNS, DEPTH])
    if out_ptr is not None:
        out = tl.make_tensor_descriptor(out_ptr, [rows, columns], [stride, 1], [ROWS, HALF])
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        i, j = tile_at(tile, down, across, GROUP)
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, C, DEPTH):
            z = tl.dot(left.load([i * ROWS, depth]), right.load([j * COLUMNS, depth]).T, z)
        row = i * ROWS + tl.arange(0, ROWS)
        bases = tl.load(bases_ptr + row, mask=row < rows, other=0.0)
        # In halves: what is written of a whole one would leave room for one step less to be read ahead.
        z0, z1 = tl.split(z.reshape(ROWS, 2, HALF).permute(0, 2, 1))
        column = j * COLUMNS + tl.arange(0, HALF)
        e = _exponentials(
            z0, bases, bias_ptr, targets_ptr, shares_ptr, factor_ptr, row, column, rows, vocabulary, before, MASKED
        )
        sums = tl.sum(e, 1)
        if out_ptr is not None:
            out.store([i * ROWS, j * COLUMNS], e.to(tl.bfloat16))
        column += HALF
        e = _exponentials(
            z1, bases, bias_ptr, targets_ptr, shares_ptr, factor_ptr, row, column, rows, vocabulary, before, MASKED
        )
        if out_ptr is not None:
            out.store([i * ROWS, j * COLUMNS + HALF], e.to(tl.bfloat16))
        if sums_ptr is not None:
            tl.store(sums_ptr + row.to(tl.int64) * across + j, sums + tl.sum(e, 1), mask=row < rows)


@functools.lru_cache
def product_launch(width, bias, factor, out, sums, masked) -> Launch:
    """bias: its dtype or None; factor, out, sums: whether there are such; masked: columns end within a tile."""
    half, wide = torch.bfloat16, torch.float32
    gradient = (torch.int32, wide, wide) if factor else (None,) * 3
    pointers = (half, half, bias, wide, *gradient, half if out else None, wide if sums else None)
    scalars = ("i32", "i32", "i32:16", "i32", "i32")
    constants = {"C": width, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH, "GROUP": _GROUP, "MASKED": masked}
    return Launch(product_kernel, pointers, scalars, constants, _NUM_WARPS, _REGISTERS)


def _product(rows, decoder, vocabulary, bias, bases, targets, shares, factor, before, out, sums):
    (count, width), columns = rows.shape, decoder.shape[0]
    masked = sums is not None and vocabulary % _COLUMNS > 0
    given = (factor is not None, out is not None, sums is not None)
    launch = product_launch(int(width), dtype_of(bias), *given, masked)
    tiles = ceil_div(count, _ROWS) * ceil_div(columns, _COLUMNS)
    grid = min(tiles, _PROGRAMS * multiprocessors(rows.device))
    stride = 0 if out is None else out.stride(0)
    tensors = (rows, decoder, bias, bases, targets, shares, factor, out, sums)
    launch(grid, *tensors, count, columns, stride, vocabulary, before)


def exponentials(rows, decoder, vocabulary, bias, bases, out, sums) -> None:
    """out (M, stride), or None, = exp(z − base) of rows (M, C) and decoder (columns, C), of which `vocabulary` rows
    count; sums (M, pieces). bases: float32 (M,)."""
    _product(rows, decoder, vocabulary, bias, bases, None, None, None, 0, out, sums)


def probabilities(rows, decoder, bias, lse, targets, shares, factor, before, out) -> None:
    """out (M, stride) = factor exp(z − lse), factor share for the label, of rows (M, C) and decoder (columns, C), whose
    first row is of token `before`. lse, shares (M,) and factor (): float32."""
    _product(rows, decoder, decoder.shape[0], bias, lse, targets, shares, factor, before, out, None)


@catalogue
def _launches(dtype, capability):
    if capability in CAPABILITIES and dtype == torch.bfloat16:
        for bias in (None, torch.float32):
            yield product_launch(768, bias, factor=False, out=True, sums=True, masked=False)
            yield product_launch(768, bias, factor=False, out=True, sums=True, masked=True)
            yield product_launch(768, bias, factor=True, out=True, sums=False, masked=False)
        yield product_launch(768, None, factor=False, out=False, sums=True, masked=True)
