"""The loss from logits, a chunk of rows or of columns at a time, and the Triton kernels for it.

Logits lie in rows of `row_stride(V)` elements, so that every row begins on a cache line whatever V is; what stands
beyond column V is never used. d-logits take their place.

d-logits are written for the sum over rows, not for the mean: divided by thousands of rows, most would fall below what
16 bits hold. In float16, whose range ends soon, they are multiplied by a power of two on top, `gradient_scale`.
"""

import functools

import torch

from .language import tl, triton
from .launch import Launch, catalogue, dtype_of
from .main_grad import add_product
from .mlm_loss_kernels import (
    ENOUGH_REGISTERS,
    LANES,
    LINE,
    LOG2E,
    MOST_TILE,
    NUM_WARPS,
    VECTOR,
    Options,
    add_gradients,
    block_column,
    gradient_scale,
    natural_log,
    over_tiles,
    places,
    row_stride,
    scaled,
    split,
    tile,
)

# Two programs of 16 warps fill a multiprocessor, and what they read of a row is still in its own cache.
_ROW_WARPS = 16


@triton.jit
def _load_logits(row_ptr, bias_ptr, column, V: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Logits of one row in float32; minus infinity beyond the last, of which there is none in a WHOLE tile."""
    z = tl.load(row_ptr + column, mask=None if WHOLE else column < STRIDE).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=None if WHOLE else column < V).to(tl.float32)
    return z if WHOLE else tl.where(column < V, z, float("-inf"))


@triton.jit
def _load_target(row_ptr, bias_ptr, target):
    """The logit of the target; of some column where there is none."""
    column = tl.maximum(target, 0)
    z = tl.load(row_ptr + column).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column).to(tl.float32)
    return z


@triton.jit
def _row_loss(top, log_total, target_logit, mean, Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr):
    """Loss of a row whose largest logit is `top` and whose logsumexp is top + log_total; mean: that of its logits."""
    # The large terms first: where the target is the top they cancel, and all that is left is small.
    loss = log_total + (top - target_logit)
    if SMOOTHING > 0:
        loss += SMOOTHING * (target_logit - mean)
    if Z_LOSS > 0:
        loss += Z_LOSS * (top + log_total) * (top + log_total)
    return loss


@triton.jit
def _factor(top, total, SCALE: tl.constexpr, Z_LOSS: tl.constexpr):
    """What makes exp(z - top) into the part of d-logits that comes from the logsumexp."""
    factor = SCALE / total
    if Z_LOSS > 0:
        factor *= 1.0 + 2.0 * Z_LOSS * (top + natural_log(total))
    return factor


@triton.jit
def _exp(z, top, logits_ptr):
    """exp(z - top). For logits that lie in 16 bits one instruction may do the work of two: what it loses for a `top`
    far from 0 is little beside their rounding, and the same for all."""
    if logits_ptr.dtype.element_ty == tl.float32:
        return tl.exp2((z - top) * LOG2E)
    else:
        return tl.exp2(z * LOG2E - top * LOG2E)


@triton.jit
def _gradient(e, factor, V: tl.constexpr, SCALE: tl.constexpr, SMOOTHING: tl.constexpr):
    """d-logits from e = exp(z - top), but for what `_target_share` takes from the target's."""
    d = e * factor
    if SMOOTHING > 0:
        d -= SCALE * SMOOTHING / V
    return d


@triton.jit
def _target_share(SCALE: tl.constexpr, SMOOTHING: tl.constexpr):
    return SCALE * (1.0 - SMOOTHING)


@triton.jit
def _add_statistics(
    tops, totals, sums, row_ptr, bias_ptr, column,
    V: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Each lane's largest logit, sum of exp(logit - largest) and, for SMOOTHING, sum of logits, with a tile more."""
    z = _load_logits(row_ptr, bias_ptr, column, V, STRIDE, WHOLE)
    higher = tl.maximum(tops, tl.max(z, 1))
    totals = totals * _exp(tops, higher, row_ptr) + tl.sum(_exp(z, higher[:, None], row_ptr), 1)
    if SMOOTHING > 0:
        sums += tl.sum(z if WHOLE else tl.where(column < V, z, 0.0), 1)
    return higher, totals, sums


@triton.jit
def _first_of(found, top, row_ptr, bias_ptr, column, V: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Each lane's first column whose logit is `top`, with a tile more."""
    z = _load_logits(row_ptr, bias_ptr, column, V, STRIDE, WHOLE)
    return tl.minimum(found, tl.min(tl.where(z == top, column, V), 1))


@triton.jit
def _store_gradient(
    top, factor, row_ptr, bias_ptr, column,
    V: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr, SCALE: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    z = _load_logits(row_ptr, bias_ptr, column, V, STRIDE, WHOLE)
    d = _gradient(_exp(z, top, row_ptr), factor, V, SCALE, SMOOTHING)
    tl.store(row_ptr + column, d, mask=None if WHOLE else column < STRIDE)


@triton.jit
def rows_kernel(
    logits_ptr,  # (programs, STRIDE): rows from `first` on; d-logits take their place
    targets_ptr,  # (rows,)
    bias_ptr,  # (V,) or None
    losses_ptr,  # (rows,)
    statistics_ptr,  # (2, rows) or None: largest logit, and the sum of exp(logit - largest)
    best_ptr,  # (rows,) or None: the first column with the largest logit
    first,
    rows,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """A program to a row, which it reads twice: the second time from the cache. Held in registers instead, a row leaves
    no room for a second program beside it, and memory idles while they compute. Each lane keeps the maximum and the sum
    of its own columns, so that lanes meet once.

    Two passes of exp leave few instructions to spare: no tile but the last is masked, and the target, a single element
    of a row, gets its share after all the others."""
    TILE: tl.constexpr = LANES * VECTOR
    WHOLE: tl.constexpr = V // TILE * TILE
    # Loads on their way at a time, as many as there are registers for.
    AHEAD: tl.constexpr = 8 if bias_ptr is None and logits_ptr.dtype.element_ty != tl.float32 else 4
    program = tl.program_id(0).to(tl.int64)
    row, row_ptr = first + program, logits_ptr + program * STRIDE
    target = tl.load(targets_ptr + row)
    target_logit = _load_target(row_ptr, bias_ptr, target)
    column = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Not minus infinity, whose difference with itself is no number.
    tops = tl.full([LANES], -1e38, tl.float32)
    totals = tl.zeros([LANES], tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, WHOLE, TILE, loop_unroll_factor=AHEAD):
        here = start + column
        tops, totals, sums = _add_statistics(tops, totals, sums, row_ptr, bias_ptr, here, V, STRIDE, True, SMOOTHING)
    if WHOLE < V:
        here = WHOLE + column
        tops, totals, sums = _add_statistics(tops, totals, sums, row_ptr, bias_ptr, here, V, STRIDE, False, SMOOTHING)
    top = tl.max(tops, 0)
    total = tl.sum(totals * _exp(tops, top, logits_ptr), 0)
    mean = tl.sum(sums, 0) / V if SMOOTHING > 0 else 0.0
    loss = _row_loss(top, natural_log(total), target_logit, mean, Z_LOSS, SMOOTHING)
    tl.store(losses_ptr + row, tl.where(target >= 0, loss, 0.0))
    if statistics_ptr is not None:
        tl.store(statistics_ptr + row, top)
        tl.store(statistics_ptr + rows + row, total)
    if best_ptr is not None:
        found = tl.full([LANES], V, tl.int32)
        for start in tl.range(0, WHOLE, TILE, loop_unroll_factor=4):
            found = _first_of(found, top, row_ptr, bias_ptr, start + column, V, STRIDE, True)
        if WHOLE < V:
            found = _first_of(found, top, row_ptr, bias_ptr, WHOLE + column, V, STRIDE, False)
        tl.store(best_ptr + row, tl.min(found, 0))
    if GRADIENT:
        if target >= 0:
            factor = _factor(top, total, SCALE, Z_LOSS)
            for start in tl.range(0, WHOLE, TILE, loop_unroll_factor=AHEAD):
                here = start + column
                _store_gradient(top, factor, row_ptr, bias_ptr, here, V, STRIDE, True, SCALE, SMOOTHING)
            if WHOLE < V:
                here = WHOLE + column
                _store_gradient(top, factor, row_ptr, bias_ptr, here, V, STRIDE, False, SCALE, SMOOTHING)
            tl.debug_barrier()  # another lane has stored there
            d = _gradient(_exp(target_logit, top, logits_ptr), factor, V, SCALE, SMOOTHING)
            tl.store(row_ptr + target, d - _target_share(SCALE, SMOOTHING))
        else:
            for start in tl.range(0, STRIDE, TILE):
                here = start + column
                tl.store(row_ptr + here, tl.zeros([LANES, VECTOR], tl.float32), mask=here < STRIDE)


@triton.jit
def block_gradient_kernel(
    logits_ptr,  # (rows, width): columns from `start` on; d-logits take their place
    targets_ptr,  # (rows,)
    bias_ptr,  # (V,) or None
    statistics_ptr,  # (2, rows)
    start,
    rows,
    width,
    V: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    row, place, mask = places(rows, width, TILE, ROWS)
    column = (start + place).to(tl.int32)
    z = tl.load(logits_ptr + row * width + place, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    z = tl.where(column < V, z, float("-inf"))
    target = tl.load(targets_ptr + row, mask=row < rows, other=-1)
    top = tl.load(statistics_ptr + row, mask=row < rows, other=0.0)
    total = tl.load(statistics_ptr + rows + row, mask=row < rows, other=1.0)
    e = _exp(z, top, logits_ptr)
    d = _gradient(e, _factor(top, total, SCALE, Z_LOSS), V, SCALE, SMOOTHING)
    d -= tl.where(column == target, _target_share(SCALE, SMOOTHING), 0.0)
    tl.store(logits_ptr + row * width + place, tl.where(target >= 0, d, 0.0), mask=mask)


@functools.lru_cache
def rows_launch(vocabulary, dtype, bias, options, gradient, statistics, best) -> Launch:
    """The kernel that makes losses of rows of logits, and d-logits on request; bias: its dtype or None."""
    wide = torch.float32
    pointers = (dtype, torch.int32, bias, wide, wide if statistics else None, torch.int32 if best else None)
    constants = {"V": vocabulary, "STRIDE": row_stride(vocabulary)}
    constants |= {"LANES": _ROW_WARPS * LANES, "VECTOR": VECTOR // dtype.itemsize}
    constants |= {"GRADIENT": gradient, "SCALE": gradient_scale(dtype), **options.constants}
    # A bias takes registers of its own.
    registers = ENOUGH_REGISTERS * (1 if bias is None else 2)
    return Launch(rows_kernel, pointers, ("i64", "i64"), constants, _ROW_WARPS, registers)


@functools.lru_cache
def block_launch(vocabulary, dtype, bias, options) -> Launch:
    """The kernel that makes d-logits of a block of columns, in rows of a multiple of `LINE`."""
    constants = {"V": vocabulary, **tile(MOST_TILE, dtype), "SCALE": gradient_scale(dtype), **options.constants}
    pointers = (dtype, torch.int32, bias, torch.float32)
    return Launch(block_gradient_kernel, pointers, ("i64", "i64", f"i32:{LINE}"), constants, NUM_WARPS)


def logit_chunks(
    rows, decoder, vocabulary, bias, targets, limit, options, losses, drows, dweight, dbias, statistics, best=None
):  # fmt: skip
    """Logits of rows (M, C), up to `limit` bytes at a time, and from them what is given: losses (M,), drows (M, C),
    dweight (of decoder's shape) and dbias (V,) for the sum over the rows, statistics (2, M), best (M,)."""
    (count, _), columns, dtype = rows.shape, decoder.shape[0], rows.dtype
    gradient = not (drows is None and dweight is None and dbias is None)
    launch = rows_launch(vocabulary, dtype, dtype_of(bias), options, gradient, statistics is not None, best is not None)
    stride = row_stride(vocabulary)
    chunks = split(count, stride * dtype.itemsize, limit)
    buffer = rows.new_empty(max((end - start for start, end in chunks), default=0), stride)
    for start, end in chunks:
        dlogits = buffer[: end - start, :columns]
        torch.mm(rows[start:end], decoder.t(), out=dlogits)
        launch(end - start, buffer, targets, bias, losses, statistics, best, start, count)
        add_gradients(dlogits, rows[start:end], decoder, start, drows, dweight, dbias)


def logit_weight_gradient(
    rows, weight, bias, targets, statistics, limit, options, dloss, inverse, out, joins
) -> None:  # fmt: skip
    """The gradient of weight times dloss times inverse, in `out` (V, C) or added to what is there: from logits of a
    block of columns, up to `limit` bytes at a time. statistics (2, M): those of `logit_chunks`."""
    (count, width), vocabulary, dtype = rows.shape, int(weight.shape[0]), rows.dtype
    blocks = split(vocabulary, block_column(count, int(width), dtype), limit)
    columns = blocks[0][1]
    stride = row_stride(columns)
    buffer, product = rows.new_empty(count, stride), rows.new_empty(columns, width, dtype=torch.float32)
    launch = block_launch(vocabulary, dtype, dtype_of(bias), options)
    for start, end in blocks:
        logits, part = buffer[:, : end - start], product[: end - start]
        torch.mm(rows, weight[start:end].to(dtype).t(), out=logits)
        over_tiles(launch, count, buffer, targets, bias, statistics, start, count, stride, width=stride)
        add_product(part, logits.t(), rows, first=True)
        scaled(part, out[start:end], gradient_scale(dtype), dloss, inverse, joins)


@catalogue
def _launches(dtype, _capability):
    wide, plain, every = torch.float32, Options(), Options(1e-4, 0.1)
    for vocabulary in (8_192, 32_768, 30_522, 50_368):
        yield rows_launch(vocabulary, dtype, None, plain, gradient=True, statistics=False, best=False)
        if vocabulary in (30_522, 50_368):  # the one that takes the most registers, and the largest
            yield rows_launch(vocabulary, dtype, wide, every, gradient=True, statistics=True, best=False)
            yield rows_launch(vocabulary, dtype, None, plain, gradient=False, statistics=False, best=True)
    yield block_launch(30_522, dtype, wide, every)
