"""The loss without logits: their exponentials come out of the decoder's product, and nothing but two products more
reads them.

    base[m] = z[m, labels[m]],   e = exp(z − base),   total = Σ e,   loss = log total
    d-logits = (e − total onehot) / total,   drows = (e − total onehot) @ weight / total,
    dweight = (e − total onehot)ᵀ @ (rows / total)

With the label's own logit as `base` no largest logit is needed beforehand, and exp is right for every row whose loss is
below 69 nats: e of the label is 1, up to what two sums of the same products differ by, and bfloat16 has room for the
others. A row that has more, or no number at all, is done again by a program of its own, from its largest logit. The
label's e takes its share, 1 − total, and the division waits for what is small: `scaled` rows, and drows when they are
handed on.

Of a row the forward pass leaves three numbers, `statistics` (3, M or a few more): lse = base + log total; total,
infinite where the label does not count; and share, d-logits of the label, which probability - 1 in 16 bits is not.
"""

import functools

import torch

from .language import tl, triton
from .launch import Launch, capability_of, catalogue, ceil_div, dtype_of
from .main_grad import add_product
from .mlm_loss_kernels import (
    LOG2E,
    NUM_WARPS,
    Options,
    add_gradients,
    block_column,
    column_sums_launch,
    natural_log,
    row_stride,
    scale_launch,
    scatter_launch,
    split,
    tile,
)
from .mlm_loss_product import CAPABILITIES, exponentials, pieces, probabilities

_ALIGNMENT = 16
_FLOATS = _ALIGNMENT // 4
# exp(69): beyond it, sums with a decoder's rows might leave the range.
_LARGEST = tl.constexpr(1e30)


def fuses(hidden: torch.Tensor, options: Options) -> bool:
    """Whether the loss of hidden (T, C) is computed without logits: in bfloat16, on cards whose product is as fast."""
    whole = hidden.dtype == torch.bfloat16 and hidden.shape[1] * hidden.itemsize % _ALIGNMENT == 0
    return whole and options == Options() and capability_of(hidden.device) in CAPABILITIES


@triton.jit
def bases_kernel(
    rows_ptr,  # (rows, C)
    decoder_ptr,  # (V, C)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (rows,)
    bases_ptr,  # (rows,): the label's logit, 0 where it does not count
    rows,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets_ptr + row, mask=row < rows, other=-1)
    counts = target >= 0
    base = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, TILE):
        column = start + tl.arange(0, TILE)[None, :]
        mask = counts[:, None] & (column < C)
        x = tl.load(rows_ptr + row[:, None] * C + column, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(decoder_ptr + target[:, None].to(tl.int64) * C + column, mask=mask, other=0.0).to(tl.float32)
        base += tl.sum(x * w, 1)
    if bias_ptr is not None:
        base += tl.load(bias_ptr + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(bases_ptr + row, base, mask=row < rows)


@triton.jit
def _logits(x, decoder_ptr, bias_ptr, column, part, V: tl.constexpr, C: tl.constexpr):
    """Logits of one row x (1, C) at some columns, minus infinity beyond the last."""
    mask = (column < V)[:, None] & (part < C)
    w = tl.load(decoder_ptr + column[:, None].to(tl.int64) * C + part, mask=mask, other=0.0).to(tl.float32)
    z = tl.sum(x * w, 1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    return tl.where(column < V, z, float("-inf"))


@triton.jit
def finish_kernel(
    rows_ptr,  # (rows, C)
    decoder_ptr,  # (V, C)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (rows,)
    sums_ptr,  # (programs, PIECES)
    exponentials_ptr,  # (programs, STRIDE) or None: the label's column takes its own minus the total
    scaled_ptr,  # (programs, C) or None: rows / total
    losses_ptr,  # (rows,)
    statistics_ptr,  # (3, rows) in rows of `stride`: base becomes lse; total; share
    first,
    stride,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row of a chunk, from `first` on. WIDTH, a power of two, covers C."""
    place = tl.program_id(0).to(tl.int64)
    row, part = first + place, tl.arange(0, WIDTH)[None, :]
    target, base = tl.load(targets_ptr + row), tl.load(statistics_ptr + row)
    x = tl.load(rows_ptr + row * C + part, mask=part < C, other=0.0).to(tl.float32)
    total = 0.0
    for start in range(0, PIECES, 256):
        piece = start + tl.arange(0, 256)
        total += tl.sum(tl.load(sums_ptr + place * PIECES + piece, mask=piece < PIECES, other=0.0), 0)
    top = base
    if target < 0:
        total = float("inf")
    elif total <= _LARGEST:
        # Which it is but for rounding, and a label all but certain would get a loss below 0.
        total = tl.maximum(total, 1.0)
    else:  # or no number
        # Not minus infinity, whose difference with itself is no number.
        top, base, total = -1e38, 0.0, 0.0
        for start in range(0, V, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            z = _logits(x, decoder_ptr, bias_ptr, column, part, V, C)
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((z - higher) * LOG2E), 0)
            base += tl.sum(tl.where(column == target, z, 0.0), 0)
            top = higher
        if exponentials_ptr is not None:
            for start in range(0, V, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                z = _logits(x, decoder_ptr, bias_ptr, column, part, V, C)
                e = tl.exp2((z - top) * LOG2E)
                tl.store(exponentials_ptr + place * STRIDE + column, e, mask=column < V)
            tl.debug_barrier()  # another lane has stored the label's
    own = tl.exp2((base - top) * LOG2E)
    log = natural_log(total)
    counts = target >= 0
    tl.store(losses_ptr + row, tl.where(counts, log + (top - base), 0.0))
    tl.store(statistics_ptr + row, top + log)
    tl.store(statistics_ptr + stride + row, total)
    tl.store(statistics_ptr + 2 * stride + row, tl.where(counts, (own - total) / total, 0.0))
    if exponentials_ptr is not None:
        tl.store(exponentials_ptr + place * STRIDE + target, own - total, mask=counts)
    if scaled_ptr is not None:
        tl.store(scaled_ptr + place * C + part, tl.where(counts, x / total, 0.0), mask=part < C)


@functools.lru_cache
def bases_launch(width, dtype, bias) -> Launch:
    pointers = (dtype, dtype, bias, torch.int32, torch.float32)
    return Launch(bases_kernel, pointers, ("i64",), {"C": width, **tile(width, dtype)}, NUM_WARPS)


@functools.lru_cache
def finish_launch(vocabulary, width, dtype, bias, exponentials, scaled) -> Launch:
    """exponentials, scaled: whether there are such."""
    wide, padded = torch.float32, triton.next_power_of_2(width)
    pointers = (dtype, dtype, bias, torch.int32, wide, dtype if exponentials else None, dtype if scaled else None)
    constants = {"V": vocabulary, "STRIDE": row_stride(vocabulary), "C": width, "PIECES": pieces(vocabulary)}
    constants |= {"WIDTH": padded, "COLUMNS": max(1, 16_384 // padded)}
    return Launch(finish_kernel, (*pointers, wide, wide), ("i64", "i64"), constants, NUM_WARPS)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Without gaps and at an address that the product reads from; a copy only where it is not already."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def new_statistics(hidden: torch.Tensor, count: int) -> torch.Tensor:
    """Room for `statistics` of `count` rows, each of the three at such an address too."""
    return hidden.new_empty(3, ceil_div(count, _FLOATS) * _FLOATS, dtype=torch.float32)


def fused_chunks(rows, decoder, vocabulary, bias, targets, limit, losses, drows, dweight, dbias, statistics):
    """From exponentials of rows (M, C), up to `limit` bytes at a time, what is given: losses (M,), drows (M, C), of
    which each row is yet to be divided by its total, dweight (of decoder's shape) and dbias (V,), for the sum over the
    rows; and statistics (3, M)."""
    (count, width), columns, dtype = rows.shape, decoder.shape[0], rows.dtype
    rows, decoder = _readable(rows), _readable(decoder)
    bases, totals = statistics[0], statistics[1]
    launch = bases_launch(int(width), dtype, dtype_of(bias))
    launch(ceil_div(count, launch.constants["ROWS"]), rows, decoder, bias, targets, bases, count)
    gradient, weighs = not (drows is None and dweight is None and dbias is None), dweight is not None
    finish = finish_launch(vocabulary, int(width), dtype, dtype_of(bias), gradient, weighs)
    stride, parts = row_stride(vocabulary), pieces(vocabulary)
    chunks = split(count, parts * bases.itemsize + dtype.itemsize * (stride * gradient + int(width) * weighs), limit)
    most = max((end - start for start, end in chunks), default=0)
    sums = bases.new_empty(most, parts)
    buffer = rows.new_empty(most, stride) if gradient else None
    scaled = rows.new_empty(most, width) if weighs else None
    for start, end in chunks:
        length = end - start
        exponentials(rows[start:end], decoder, vocabulary, bias, bases[start:end], buffer, sums)
        results = (buffer, scaled, losses, statistics)
        finish(length, rows, decoder, bias, targets, sums, *results, start, statistics.stride(0))
        if gradient:
            factors = scaled[:length] if weighs else None
            add_gradients(buffer[:length, :columns], factors, decoder, start, drows, dweight, dbias, totals[start:end])


def fused_weight_gradient(rows, weight, bias, targets, statistics, limit, factor, out, joins) -> None:
    """The gradient of weight times factor (), in `out` (V, C) or added to what is there: from exponentials of a block
    of columns, up to `limit` bytes at a time. statistics (3, M): those of `fused_chunks`."""
    (count, width), vocabulary, dtype = rows.shape, int(weight.shape[0]), rows.dtype
    rows, (lse, _, shares) = _readable(rows), statistics
    blocks = split(vocabulary, block_column(count, int(width), dtype), limit)
    buffer = rows.new_empty(count, row_stride(blocks[0][1]))
    for start, end in blocks:
        decoder, bias_part = _readable(weight[start:end].to(dtype)), None if bias is None else bias[start:end]
        probabilities(rows, decoder, bias_part, lse, targets, shares, factor, start, buffer)
        add_product(out[start:end], buffer[:, : end - start].t(), rows, first=not joins)


@catalogue
def _launches(dtype, capability):
    if capability not in CAPABILITIES or dtype != torch.bfloat16:
        return
    with_bias = (30_522, 768), (32_768, 1024)
    for bias, sizes in ((None, ((32_768, 768), (50_368, 768), *with_bias)), (torch.float32, with_bias)):
        yield bases_launch(768, dtype, bias)
        for vocabulary, width in sizes:
            yield finish_launch(vocabulary, width, dtype, bias, exponentials=True, scaled=True)
    yield finish_launch(32_768, 768, dtype, None, exponentials=True, scaled=False)
    yield finish_launch(32_768, 768, dtype, None, exponentials=False, scaled=False)
    yield column_sums_launch(30_522, dtype, totals=True)
    yield scale_launch(768, dtype, dtype, 1.0, totals=True)
    yield from (scatter_launch(width, dtype, torch.int64, totals=True) for width in (768, 1024))
