"""The Triton kernels of the masked-language-modelling loss, and their launches.

Logits lie in rows of `row_stride(V)` elements, so that every row begins on a cache line whatever V is; what stands
beyond column V is never used.

d-logits are written for the sum over rows, not for the mean: divided by thousands of rows, most would fall below what
16 bits hold. In float16, whose range ends soon, they are multiplied by a power of two on top, `gradient_scale`.
"""

import functools
from dataclasses import dataclass

import torch

from .language import tl, triton
from .launch import Launch, catalogue

_LOG2E = tl.constexpr(1.4426950408889634)
# Elements of a row of logits that begin a cache line, in whatever dtype.
LINE = 64
_LANES, _VECTOR = 32, 16
# Two programs of 16 warps fill a multiprocessor, and what they read of a row is still in its own cache.
_ROW_WARPS = 16
# Left alone, the compiler spills a few bytes to have fewer.
_ENOUGH_REGISTERS = 64


def row_stride(vocabulary: int) -> int:
    """Elements from one row of logits to the next: whole cache lines."""
    return -(-vocabulary // LINE) * LINE


def gradient_scale(dtype: torch.dtype) -> float:
    """What d-logits of `dtype` are multiplied by: 1024 in float16, as a loss scale of 65,536 makes of the mean over 64
    rows. Then probabilities down to 6e-8 are normal numbers, and weights up to 30 give no overflow."""
    return 1024.0 if dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class Options:
    """What the definition of the loss leaves open: the weight of the squared logsumexp, and the share of the target
    that is spread over the vocabulary."""

    z_loss: float = 0.0
    smoothing: float = 0.0

    @property
    def constants(self) -> dict[str, float]:
        return {"Z_LOSS": self.z_loss, "SMOOTHING": self.smoothing}


@triton.jit
def targets_kernel(
    labels_ptr,  # (rows,)
    positions_ptr,  # (rows,) or None
    targets_ptr,  # (rows,): the label, -1 where the row does not count
    rows,
    total,
    vocabulary,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row, mask=row < rows, other=0).to(tl.int64)
    counts = (label != ignore_index) & (label >= 0) & (label < vocabulary)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + row, mask=row < rows, other=0).to(tl.int64)
        counts &= (position >= 0) & (position < total)
    tl.store(targets_ptr + row, tl.where(counts, label, -1).to(tl.int32), mask=row < rows)


@triton.jit
def gather_kernel(
    hidden_ptr,  # (total, C)
    positions_ptr,  # (rows,)
    rows_ptr,  # (rows, C): zeros where the position is none
    rows,
    total,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, mask = _places(rows, C, TILE, ROWS)
    position = tl.load(positions_ptr + row, mask=row < rows, other=0).to(tl.int64)
    inside = mask & (position >= 0) & (position < total)
    x = tl.load(hidden_ptr + position * C + column, mask=inside, other=0.0)
    tl.store(rows_ptr + row * C + column, x, mask=mask)


@triton.jit
def _places(rows, C, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Which ROWS × TILE elements of a (rows, C) tensor are this program's: row (ROWS, 1), column (1, TILE), mask."""
    across = tl.cdiv(C, TILE)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)[None, :]
    return row, column, (row < rows) & (column < C)


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
        factor *= 1.0 + 2.0 * Z_LOSS * (top + _log(total))
    return factor


@triton.jit
def _exp(z, top, logits_ptr):
    """exp(z - top). For logits that lie in 16 bits one instruction may do the work of two: what it loses for a `top`
    far from 0 is little beside their rounding, and the same for all."""
    if logits_ptr.dtype.element_ty == tl.float32:
        return tl.exp2((z - top) * _LOG2E)
    else:
        return tl.exp2(z * _LOG2E - top * _LOG2E)


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
def _log(x):
    """The natural logarithm of x > 0, right to its last bit; the GPU's own is to 2^-22. x = 2^exponent (1 + f), and
    log(1 + f) by a series in f / (2 + f)."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # sqrt(1/2) becomes 0: 1 + f is between it and sqrt(2)
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = z * (0.6666666666 + z * (0.4000097 + z * (0.28498787 + z * 0.24279079)))
    half_square = 0.5 * f * f
    small = half_square - (s * (half_square + series) + exponent * 9.0580006e-06)
    return exponent * 0.69313812256 - (small - f)


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
    loss = _row_loss(top, _log(total), target_logit, mean, Z_LOSS, SMOOTHING)
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
    row, place, mask = _places(rows, width, TILE, ROWS)
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


@triton.jit
def mean_kernel(
    losses_ptr,  # (rows,)
    targets_ptr,  # (rows,)
    loss_ptr,  # (): their mean over the rows that count
    inverse_ptr,  # (): 1 / the number of those
    rows,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + row, mask=row < rows, other=0.0)
        count += (tl.load(targets_ptr + row, mask=row < rows, other=-1) >= 0).to(tl.int32)
    number = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(loss_ptr, tl.div_rn(tl.sum(total, 0), number))
    tl.store(inverse_ptr, tl.div_rn(1.0, number))


@triton.jit
def column_sums_kernel(
    dlogits_ptr,  # (rows, STRIDE)
    sums_ptr,  # (V,): those of the columns are added to it
    rows,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (column < STRIDE)[None, :]
        total += tl.load(dlogits_ptr + row * STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = tl.load(sums_ptr + column, mask=column < V, other=0.0) + tl.sum(total, 0)
    tl.store(sums_ptr + column, sums, mask=column < V)


@triton.jit
def scale_kernel(
    source_ptr,  # (rows, C)
    dloss_ptr,  # ()
    inverse_ptr,  # ()
    out_ptr,  # (rows, C)
    rows,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    ADD: tl.constexpr,
):
    """out = source * dloss * inverse / SCALE, or += with ADD."""
    row, column, mask = _places(rows, C, TILE, ROWS)
    factor = tl.load(dloss_ptr) * (tl.load(inverse_ptr) / SCALE)
    x = tl.load(source_ptr + row * C + column, mask=mask, other=0.0).to(tl.float32)
    y = x * factor
    if ADD:
        y += tl.load(out_ptr + row * C + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * C + column, y, mask=mask)


@triton.jit
def ends_kernel(
    positions_ptr,  # (rows,)
    ends_ptr,  # (2, total), zeros: rows minus the first row with this position, and the last such row plus one
    rows,
    total,
    BLOCK: tl.constexpr,
):
    """Integer maxima, which come out the same in whatever order they are taken."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    inside = (position >= 0) & (position < total)
    tl.atomic_max(ends_ptr + position, rows.to(tl.int32) - row, mask=inside)
    tl.atomic_max(ends_ptr + total + position, row + 1, mask=inside)


@triton.jit
def scatter_kernel(
    drows_ptr,  # (rows, C)
    positions_ptr,  # (rows,)
    ends_ptr,  # (2, total)
    dloss_ptr,  # ()
    inverse_ptr,  # ()
    out_ptr,  # (total, C)
    rows,
    total,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """out = the sum of drows with this position, in order, * dloss * inverse / SCALE; 0 where there is none."""
    token, column, mask = _places(total, C, TILE, ROWS)
    before = tl.load(ends_ptr + token, mask=token < total, other=0)
    first = rows - before
    last = tl.load(ends_ptr + total + token, mask=token < total, other=0) - 1
    x = tl.load(drows_ptr + first * C + column, mask=mask & (before > 0), other=0.0).to(tl.float32)
    repeated = (before > 0) & (last > first)
    row = tl.min(tl.where(repeated, first, rows)) + 1
    end = tl.max(tl.where(repeated, last, -1))
    while row <= end:
        same = (tl.load(positions_ptr + row) == token) & (first < row)
        x += tl.load(drows_ptr + row * C + column, mask=mask & same, other=0.0).to(tl.float32)
        row += 1
    factor = tl.load(dloss_ptr) * (tl.load(inverse_ptr) / SCALE)
    tl.store(out_ptr + token * C + column, x * factor, mask=mask)


_BLOCK = 1024
_NUM_WARPS = 4
_MOST_TILE = 256


def _tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """A tile of whole rows or pieces of them, for 4 warps with two 16-byte loads a lane."""
    elements = _NUM_WARPS * _LANES * 2 * _VECTOR // dtype.itemsize
    tile = min(_MOST_TILE, triton.next_power_of_2(width))
    return {"TILE": tile, "ROWS": max(1, elements // tile)}


@functools.lru_cache
def targets_launch(labels, positions) -> Launch:
    """dtypes of labels, and of positions (None: there are none)."""
    return Launch(targets_kernel, (labels, positions, torch.int32), ("i64",) * 4, {"BLOCK": _BLOCK}, _NUM_WARPS)


@functools.lru_cache
def gather_launch(width, dtype, positions) -> Launch:
    constants = {"C": width, **_tile(width, dtype)}
    return Launch(gather_kernel, (dtype, positions, dtype), ("i64",) * 2, constants, _NUM_WARPS)


@functools.lru_cache
def rows_launch(vocabulary, dtype, bias, options, gradient, statistics, best) -> Launch:
    """The kernel that makes losses of rows of logits, and d-logits on request; bias: its dtype or None."""
    wide = torch.float32
    pointers = (dtype, torch.int32, bias, wide, wide if statistics else None, torch.int32 if best else None)
    constants = {"V": vocabulary, "STRIDE": row_stride(vocabulary)}
    constants |= {"LANES": _ROW_WARPS * _LANES, "VECTOR": _VECTOR // dtype.itemsize}
    constants |= {"GRADIENT": gradient, "SCALE": gradient_scale(dtype), **options.constants}
    # A bias takes registers of its own.
    registers = _ENOUGH_REGISTERS * (1 if bias is None else 2)
    return Launch(rows_kernel, pointers, ("i64", "i64"), constants, _ROW_WARPS, registers)


@functools.lru_cache
def block_launch(vocabulary, dtype, bias, options) -> Launch:
    """The kernel that makes d-logits of a block of columns, in rows of a multiple of `LINE`."""
    constants = {"V": vocabulary, **_tile(_MOST_TILE, dtype), "SCALE": gradient_scale(dtype), **options.constants}
    pointers = (dtype, torch.int32, bias, torch.float32)
    return Launch(block_gradient_kernel, pointers, ("i64", "i64", f"i32:{LINE}"), constants, _NUM_WARPS)


@functools.lru_cache
def mean_launch() -> Launch:
    pointers = (torch.float32, torch.int32, torch.float32, torch.float32)
    return Launch(mean_kernel, pointers, ("i64",), {"BLOCK": 4 * _BLOCK}, 4 * _NUM_WARPS)


@functools.lru_cache
def column_sums_launch(vocabulary, dtype) -> Launch:
    constants = {"V": vocabulary, "STRIDE": row_stride(vocabulary), "COLUMNS": 128, "ROWS": 16}
    return Launch(column_sums_kernel, (dtype, torch.float32), ("i64",), constants, 2 * _NUM_WARPS)


@functools.lru_cache
def scale_launch(width, source, out, scale, add=False) -> Launch:
    """dtypes of the source and of the result; scale: what to divide by; add: to the result that is there."""
    wide = torch.float32
    constants = {"C": width, **_tile(width, source), "SCALE": scale, "ADD": add}
    return Launch(scale_kernel, (source, wide, wide, out), ("i64",), constants, _NUM_WARPS)


@functools.lru_cache
def ends_launch(positions) -> Launch:
    return Launch(ends_kernel, (positions, torch.int32), ("i64", "i64"), {"BLOCK": _BLOCK}, _NUM_WARPS)


@functools.lru_cache
def scatter_launch(width, dtype, positions) -> Launch:
    constants = {"C": width, **_tile(width, dtype), "SCALE": gradient_scale(dtype)}
    pointers = (dtype, positions, torch.int32, torch.float32, torch.float32, dtype)
    return Launch(scatter_kernel, pointers, ("i64", "i64"), constants, _NUM_WARPS, _ENOUGH_REGISTERS)


@catalogue
def _launches(dtype, _capability):
    index, wide, plain, every = torch.int64, torch.float32, Options(), Options(1e-4, 0.1)
    for vocabulary in (8_192, 32_768, 30_522, 50_368):
        yield rows_launch(vocabulary, dtype, None, plain, gradient=True, statistics=False, best=False)
        yield rows_launch(vocabulary, dtype, wide, every, gradient=True, statistics=True, best=False)
        yield rows_launch(vocabulary, dtype, None, plain, gradient=False, statistics=False, best=True)
        yield column_sums_launch(vocabulary, dtype)
    yield block_launch(30_522, dtype, wide, every)
    for width in (768, 1024):
        yield gather_launch(width, dtype, index)
        yield scatter_launch(width, dtype, index)
    yield from (targets_launch(index, index), ends_launch(index), mean_launch())
    yield from (scale_launch(768, source, out, 1.0) for source, out in ((wide, dtype), (wide, wide), (dtype, dtype)))
    yield scale_launch(768, wide, wide, 1.0, add=True)
