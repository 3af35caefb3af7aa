"""What every way to the masked-language-modelling loss shares: kernels, their launches, and how work is divided."""

import functools
from dataclasses import dataclass

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div
from .main_grad import add_product

LOG2E = tl.constexpr(1.4426950408889634)
# Elements of a row of logits that begin a cache line, in whatever dtype.
LINE = 64
LANES, VECTOR = 32, 16
NUM_WARPS = 4
MOST_TILE = 256
# Left alone, the compiler spills a few bytes to have fewer.
ENOUGH_REGISTERS = 64
_BLOCK = 1024
# Rows or columns of a product are multiples of cuBLAS's tiles where there are that many.
_PRODUCT_TILE = 128


@dataclass(frozen=True)
class Options:
    """What the definition of the loss leaves open: the weight of the squared logsumexp, and the share of the target
    that is spread over the vocabulary."""

    z_loss: float = 0.0
    smoothing: float = 0.0

    @property
    def constants(self) -> dict[str, float]:
        return {"Z_LOSS": self.z_loss, "SMOOTHING": self.smoothing}


def row_stride(vocabulary: int) -> int:
    """Elements from one row of logits to the next: whole cache lines."""
    return -(-vocabulary // LINE) * LINE


def gradient_scale(dtype: torch.dtype) -> float:
    """What d-logits of `dtype` are multiplied by: 1024 in float16, as a loss scale of 65,536 makes of the mean over 64
    rows. Then probabilities down to 6e-8 are normal numbers, and weights up to 30 give no overflow."""
    return 1024.0 if dtype == torch.float16 else 1.0


def split(total: int, size: int, limit: int) -> list[tuple[int, int]]:
    """(start, end) of equal parts of `total` that take up to `limit` bytes at `size` each."""
    most = max(1, limit // size)
    parts = ceil_div(total, most)
    length = ceil_div(total, max(1, parts))
    if most >= _PRODUCT_TILE:
        length = min(ceil_div(length, _PRODUCT_TILE), most // _PRODUCT_TILE) * _PRODUCT_TILE
    return [(start, min(start + length, total)) for start in range(0, total, length or 1)]


def block_column(count: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of one column of logits of `count` rows and of its gradient in float32, which is `width` long."""
    return count * dtype.itemsize + width * torch.float32.itemsize


def tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """A tile of whole rows or pieces of them, for 4 warps with two 16-byte loads a lane."""
    elements = NUM_WARPS * LANES * 2 * VECTOR // dtype.itemsize
    columns = min(MOST_TILE, triton.next_power_of_2(width))
    return {"TILE": columns, "ROWS": max(1, elements // columns)}


def over_tiles(launch, rows, *arguments, width=None):
    """Run a kernel whose programs take ROWS × TILE elements of a tensor of `rows` rows, of C elements or `width`."""
    constants = launch.constants
    width = constants["C"] if width is None else width
    launch(ceil_div(rows, constants["ROWS"]) * ceil_div(width, constants["TILE"]), *arguments)


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
    row, column, mask = places(rows, C, TILE, ROWS)
    position = tl.load(positions_ptr + row, mask=row < rows, other=0).to(tl.int64)
    inside = mask & (position >= 0) & (position < total)
    x = tl.load(hidden_ptr + position * C + column, mask=inside, other=0.0)
    tl.store(rows_ptr + row * C + column, x, mask=mask)


@triton.jit
def places(rows, C, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Which ROWS × TILE elements of a (rows, C) tensor are this program's: row (ROWS, 1), column (1, TILE), mask."""
    across = tl.cdiv(C, TILE)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)[None, :]
    return row, column, (row < rows) & (column < C)


@triton.jit
def natural_log(x):
    """The natural logarithm of x > 0 or of no number, right to its last bit; the GPU's own is to 2^-22.
    x = 2^exponent (1 + f), and log(1 + f) by a series in f / (2 + f)."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # sqrt(1/2) becomes 0: 1 + f is between it and sqrt(2)
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = z * (0.6666666666 + z * (0.4000097 + z * (0.28498787 + z * 0.24279079)))
    half_square = 0.5 * f * f
    small = half_square - (s * (half_square + series) + exponent * 9.0580006e-06)
    return tl.where(x < float("inf"), exponent * 0.69313812256 - (small - f), x)


@triton.jit
def divided(x, totals_ptr, row, rows):
    """Some of the rows (ROWS, 1) divided by their totals: 0, whatever they are, where that is infinite."""
    if totals_ptr is None:
        return x
    else:
        total = tl.load(totals_ptr + row, mask=row < rows, other=1.0)
        return tl.where(total == float("inf"), 0.0, x / total)


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
    totals_ptr,  # (rows,), by which rows are divided, or None
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
        x = tl.load(dlogits_ptr + row * STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += divided(x, totals_ptr, row, rows)
    sums = tl.load(sums_ptr + column, mask=column < V, other=0.0) + tl.sum(total, 0)
    tl.store(sums_ptr + column, sums, mask=column < V)


@triton.jit
def scale_kernel(
    source_ptr,  # (rows, C)
    totals_ptr,  # (rows,), by which rows of the source are divided, or None
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
    row, column, mask = places(rows, C, TILE, ROWS)
    factor = tl.load(dloss_ptr) * (tl.load(inverse_ptr) / SCALE)
    x = tl.load(source_ptr + row * C + column, mask=mask, other=0.0).to(tl.float32)
    y = divided(x, totals_ptr, row, rows) * factor
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
    totals_ptr,  # (rows,), by which rows are divided, or None
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
    token, column, mask = places(total, C, TILE, ROWS)
    before = tl.load(ends_ptr + token, mask=token < total, other=0)
    first = rows - before
    last = tl.load(ends_ptr + total + token, mask=token < total, other=0) - 1
    x = tl.load(drows_ptr + first * C + column, mask=mask & (before > 0), other=0.0).to(tl.float32)
    x = divided(x, totals_ptr, first, rows)
    repeated = (before > 0) & (last > first)
    row = tl.min(tl.where(repeated, first, rows)) + 1
    end = tl.max(tl.where(repeated, last, -1))
    while row <= end:
        same = (tl.load(positions_ptr + row) == token) & (first < row)
        y = tl.load(drows_ptr + row * C + column, mask=mask & same, other=0.0).to(tl.float32)
        x += tl.where(same, divided(y, totals_ptr, row, rows), 0.0)
        row += 1
    factor = tl.load(dloss_ptr) * (tl.load(inverse_ptr) / SCALE)
    tl.store(out_ptr + token * C + column, x * factor, mask=mask)


@functools.lru_cache
def targets_launch(labels, positions) -> Launch:
    """dtypes of labels, and of positions (None: there are none)."""
    return Launch(targets_kernel, (labels, positions, torch.int32), ("i64",) * 4, {"BLOCK": _BLOCK}, NUM_WARPS)


@functools.lru_cache
def gather_launch(width, dtype, positions) -> Launch:
    constants = {"C": width, **tile(width, dtype)}
    return Launch(gather_kernel, (dtype, positions, dtype), ("i64",) * 2, constants, NUM_WARPS)


@functools.lru_cache
def mean_launch() -> Launch:
    pointers = (torch.float32, torch.int32, torch.float32, torch.float32)
    return Launch(mean_kernel, pointers, ("i64",), {"BLOCK": 4 * _BLOCK}, 4 * NUM_WARPS)


@functools.lru_cache
def column_sums_launch(vocabulary, dtype, totals=False) -> Launch:
    """totals: whether there are such to divide rows by; as in those that follow."""
    constants = {"V": vocabulary, "STRIDE": row_stride(vocabulary), "COLUMNS": 128, "ROWS": 16}
    pointers = (dtype, torch.float32, torch.float32 if totals else None)
    return Launch(column_sums_kernel, pointers, ("i64",), constants, 2 * NUM_WARPS)


@functools.lru_cache
def scale_launch(width, source, out, scale, add=False, totals=False) -> Launch:
    """dtypes of the source and of the result; scale: what to divide by; add: to the result that is there."""
    wide = torch.float32
    constants = {"C": width, **tile(width, source), "SCALE": scale, "ADD": add}
    return Launch(scale_kernel, (source, wide if totals else None, wide, wide, out), ("i64",), constants, NUM_WARPS)


@functools.lru_cache
def ends_launch(positions) -> Launch:
    return Launch(ends_kernel, (positions, torch.int32), ("i64", "i64"), {"BLOCK": _BLOCK}, NUM_WARPS)


@functools.lru_cache
def scatter_launch(width, dtype, positions, totals=False) -> Launch:
    constants = {"C": width, **tile(width, dtype), "SCALE": gradient_scale(dtype)}
    wide = torch.float32
    pointers = (dtype, wide if totals else None, positions, torch.int32, wide, wide, dtype)
    return Launch(scatter_kernel, pointers, ("i64", "i64"), constants, NUM_WARPS, ENOUGH_REGISTERS)


def add_gradients(dlogits, rows, decoder, start, drows, dweight, dbias, totals=None):
    """From dlogits (m, columns) of rows (m, C), the first of which is number `start`, what is given: their part of
    drows (M, C), and what they add to dweight (columns, C) and, each divided by its total (m,), to dbias (V,)."""
    count = dlogits.shape[0]
    if dbias is not None:
        launch = column_sums_launch(int(dbias.shape[0]), dlogits.dtype, totals is not None)
        launch(ceil_div(dbias.shape[0], launch.constants["COLUMNS"]), dlogits, dbias, totals, count)
    if dweight is not None:
        add_product(dweight, dlogits.t(), rows, first=start == 0)
    if drows is not None:
        torch.mm(dlogits, decoder, out=drows[start : start + count])


def scaled(source, out, scale, dloss, inverse, joins=False, totals=None):
    """out = source * dloss * inverse / scale, or += where it `joins`, both (rows, columns); totals (rows,): what rows
    of the source are divided by."""
    launch = scale_launch(int(source.shape[1]), source.dtype, out.dtype, scale, joins, totals is not None)
    over_tiles(launch, source.shape[0], source, totals, dloss, inverse, out, source.shape[0])
    return out


@catalogue
def _launches(dtype, _capability):
    index, wide = torch.int64, torch.float32
    for vocabulary in (8_192, 32_768, 30_522, 50_368):
        yield column_sums_launch(vocabulary, dtype)
    for width in (768, 1024):
        yield gather_launch(width, dtype, index)
        yield scatter_launch(width, dtype, index)
    yield from (targets_launch(index, index), ends_launch(index), mean_launch())
    yield from (scale_launch(768, source, out, 1.0) for source, out in ((wide, dtype), (wide, wide), (dtype, dtype)))
    yield scale_launch(768, wide, wide, 1.0, add=True)
