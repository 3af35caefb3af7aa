"""Rows of C elements laid over warps, for the kernels that normalise rows.

A row is cut into `tiles` pieces of `tile` columns, one after the other, so that a width like 768 wastes no lanes
(3 × 256). One warp, or a group of them where rows are wide, loads a piece with 16 bytes a lane, and sums along a row
stay inside the group. A program works on `rows` rows at a time.

In the kernels such rows are a tuple of TILES tensors (ROWS, TILE), and a parameter (C,) is one of tensors (1, TILE).
"""

from dataclasses import dataclass

from .language import tl, triton

MAX_WIDTH = 16_384
# Registers of a thread in kernels that keep rows in them from one turn of a loop to the next, and how many such warps
# fit on a multiprocessor.
ROW_REGISTERS, ROW_WARPS = 255, 8
_LANES = 32
_VECTOR = 16
# Bytes of one row in one lane, beyond which a row takes twice the warps.
_ROW_IN_LANE = 64


@dataclass(frozen=True)
class RowTiling:
    """How a program of `num_warps` warps covers `rows` rows of `hidden` columns."""

    hidden: int
    tile: int
    tiles: int
    rows: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"C": self.hidden, "TILE": self.tile, "TILES": self.tiles, "ROWS": self.rows}


def row_tiling(
    hidden: int, itemsize: int, num_warps: int = 1, bytes_in_lane: int = 0, row_in_lane: int = _ROW_IN_LANE
) -> RowTiling:
    """The tiling for rows of `hidden` elements of `itemsize` bytes.

    A program has `num_warps` warps, more where one row needs more, and takes as many rows as they load at once: or
    twice, four times, ... as many, as long as a lane then holds no more than `bytes_in_lane`. A row has so many warps
    that a lane holds no more than `row_in_lane` bytes of it.
    """
    warps_per_row = triton.next_power_of_2(triton.cdiv(hidden * itemsize, _LANES * row_in_lane))
    num_warps = max(num_warps, warps_per_row)
    tile = min(_LANES * _VECTOR // itemsize * warps_per_row, triton.next_power_of_2(hidden))
    tiles = triton.cdiv(hidden, tile)
    rows = max(1, num_warps * _LANES * _VECTOR // (itemsize * tile))
    while 2 * rows * tiles * tile * itemsize <= bytes_in_lane * _LANES * num_warps:
        rows *= 2
    return RowTiling(hidden, tile, tiles, rows, num_warps)


@triton.jit
def load_rows(pointer, row, valid, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Rows `row` (ROWS,) of a (..., C) tensor in its dtype; 0 where not `valid` (ROWS,) and beyond the last column."""
    tiles = ()
    for i in tl.static_range(TILES):
        column = i * TILE + tl.arange(0, TILE)
        mask = valid[:, None] & (column < C)[None, :]
        tiles = tiles + (tl.load(pointer + row[:, None] * C + column[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def widen(tiles, TILES: tl.constexpr):
    """`tiles` as float32."""
    out = ()
    for i in tl.static_range(TILES):
        out = out + (tiles[i].to(tl.float32),)
    return out


@triton.jit
def load_gradient(dy_ptr, statistics_ptr, row, valid, rows, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Rows of the output's gradient (rows, C), and mean and rstd of the same rows out of statistics (2, rows)."""
    dy = load_rows(dy_ptr, row, valid, C, TILE, TILES)
    mean = tl.load(statistics_ptr + row, mask=valid, other=0.0)
    rstd = tl.load(statistics_ptr + rows + row, mask=valid, other=0.0)
    return dy, mean, rstd


@triton.jit
def load_vector(pointer, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """A (C,) tensor as one row in float32."""
    row = tl.zeros([1], tl.int32)
    return widen(load_rows(pointer, row, row == 0, C, TILE, TILES), TILES)


@triton.jit
def store_rows(pointer, tiles, row, valid, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Write `tiles` as rows `row` of a (..., C) tensor."""
    for i in tl.static_range(TILES):
        column = i * TILE + tl.arange(0, TILE)
        mask = valid[:, None] & (column < C)[None, :]
        tl.store(pointer + row[:, None] * C + column[None, :], tiles[i], mask=mask)


@triton.jit
def zero_vector(TILE: tl.constexpr, TILES: tl.constexpr):
    """The start of a sum over rows, by `fold_rows`."""
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros([TILE], tl.float32),)
    return tiles


@triton.jit
def fold_rows(total, tiles, TILES: tl.constexpr):
    """`total` (TILE,) and the sum of all rows of `tiles`."""
    out = ()
    for i in tl.static_range(TILES):
        out = out + (total[i] + tl.sum(tiles[i], 0),)
    return out


@triton.jit
def store_share(pointer, share, total, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Write a sum over rows as row `share` of (shares, C)."""
    for i in tl.static_range(TILES):
        column = i * TILE + tl.arange(0, TILE)
        tl.store(pointer + share * C + column, total[i], mask=column < C)


@triton.jit
def sum_rows(tiles, TILES: tl.constexpr):
    """The sum of each row: first inside each lane, so that lanes exchange one number and not one a tile."""
    total = tiles[0]
    for i in tl.static_range(1, TILES):
        total += tiles[i]
    return tl.sum(total, 1)


@triton.jit
def row_statistics(tiles, eps, C: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each row, in two passes over registers."""
    mean = sum_rows(tiles, TILES) * (1.0 / C)
    squares = ()
    for i in tl.static_range(TILES):
        column = i * TILE + tl.arange(0, TILE)
        centred = tl.where((column < C)[None, :], tiles[i] - mean[:, None], 0.0)
        squares = squares + (centred * centred,)
    variance = sum_rows(squares, TILES) * (1.0 / C) + eps
    # The fast root is some bits short, which would be on the whole row: one step of Newton's method adds them.
    rstd = tl.rsqrt(variance)
    return mean, rstd + 0.5 * rstd * (1.0 - variance * rstd * rstd)


@triton.jit
def normalise_rows(tiles, mean, rstd, weight, bias, TILES: tl.constexpr):
    """(x - mean) * rstd * weight + bias, where bias may be None."""
    out = ()
    for i in tl.static_range(TILES):
        y = (tiles[i] - mean[:, None]) * rstd[:, None] * weight[i]
        if bias is not None:
            y += bias[i]
        out = out + (y,)
    return out


@triton.jit
def row_gradient(dy, x, mean, rstd, weight, C: tl.constexpr, TILES: tl.constexpr):
    """Gradient of the rows x under LayerNorm, given that of its output:
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight. Returns (dx, xhat)."""
    xhat = ()
    g = ()
    products = ()
    for i in tl.static_range(TILES):
        xhat = xhat + ((x[i] - mean[:, None]) * rstd[:, None],)
        g = g + (dy[i] * weight[i],)
        products = products + (g[i] * xhat[i],)
    along = sum_rows(products, TILES) * (1.0 / C)
    total = sum_rows(g, TILES) * (1.0 / C)
    dx = ()
    for i in tl.static_range(TILES):
        dx = dx + (rstd[:, None] * (g[i] - total[:, None] - xhat[i] * along[:, None]),)
    return dx, xhat


@triton.jit
def add_rows(a, b, TILES: tl.constexpr):
    out = ()
    for i in tl.static_range(TILES):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def scale_rows(a, factor, TILES: tl.constexpr):
    out = ()
    for i in tl.static_range(TILES):
        out = out + (a[i] * factor,)
    return out


@triton.jit
def multiply_rows(a, b, TILES: tl.constexpr):
    out = ()
    for i in tl.static_range(TILES):
        out = out + (a[i] * b[i],)
    return out
