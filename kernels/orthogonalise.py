"""The orthogonalisation of Muon: matrices with the singular vectors of an update and all singular values near 1.

    X = update / (|update| + eps), the norm being Frobenius's; then `steps` times
    A = X Xᵀ,   X = a X + (b A + c A²) X,   with a, b, c = 3.4445, −4.7750, 2.0315

takes each singular value s to a s + b s³ + c s⁵: a Newton-Schulz iteration whose coefficients lift small values fast
and leave all between about 0.7 and 1.2 rather than at 1. The same with the square completed is

    G = X Xᵀ + b / 2c I,   F = c G Gᵀ + (a − b² / 4c) I,   X = F X

where nothing is added but diagonals: a product that adds to X would copy X first. The first two are symmetric. One
kernel computes either: it works out the tiles on and below the diagonal and stores each twice, the second time
mirrored, which saves nearly half of these products. The third is cuBLAS's. Sums are fp32; X, G and F are 16-bit, which
costs up to a third more error than the first form has in 16 bits, some 1 % in bfloat16.

Of a tall X the smaller side counts as well: G is of Xᵀ X and X = X F, or on cards where this sum down the columns is
slow, X is transposed as it is divided by the norm.

X lies in rows of whole 16 elements, the rest of them zeros, and so are its last rows: that changes none of the values
above, and whatever the size of the update, all loads are of 16 bytes.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/. Half of a symmetric product: https://github.com/nil0x9/flash-muon.
"""

import functools
from dataclasses import dataclass

import torch

from .arguments import expect_device, expect_floating, expect_int
from .dispatch import DTYPES, pick, register
from .language import tl, triton
from .launch import Launch, capability_of, catalogue, ceil_div, has_data
from .operator import define

_NAME = "orthogonalise"
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_CAPABILITY = (8, 0)  # below, Triton has no matrix products to speak of
_MULTIPLE = 16


def orthogonalise_reference(update, steps=5, *, dtype=None, out=None):
    """The definition, on any device, computed in `dtype`: float32 unless given, or float64; see `orthogonalise`."""
    dtype = dtype or torch.promote_types(update.dtype, torch.float32)
    x = (update / _norm(update)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.contiguous() if out is None else out.copy_(x)


def _norm(update):
    """What the matrices (N, m, n) are divided by, (N, 1, 1), in float32 or float64."""
    wide = torch.promote_types(update.dtype, torch.float32)
    return torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True, dtype=wide) + _EPS


def arithmetic(update: torch.Tensor) -> torch.dtype:
    """The dtype that `orthogonalise` computes in: on a GPU one of 16 bits that it has products for; that of the update
    on a CPU, where the interpreter may stand in for a GPU, and for float64."""
    if update.device.type != "cuda" or update.dtype == torch.float64:
        return update.dtype
    if capability_of(update.device) < 10 * _CAPABILITY[0]:
        return torch.float16
    return update.dtype if update.dtype.itemsize == 2 else torch.bfloat16


@triton.jit
def _symmetric_kernel(
    p_ptr,  # (N, side, depth), or (N, depth, side) if DOWN
    s_ptr,  # (N, side, side): scale * P Pᵀ + shift * I, with Pᵀ P if DOWN
    side,
    depth,
    scale,
    shift,
    DOWN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(side, TILE)
    count = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // count).to(tl.int64)
    i, j = _tile_of_triangle(tl.program_id(0) % count, tiles)
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    p_ptr += matrix * side * depth
    s_ptr += matrix * side * side

    s = tl.zeros([TILE, TILE], tl.float32)
    for start in tl.range(0, depth, STEP, num_stages=STAGES):
        along = start + tl.arange(0, STEP)
        if DOWN:
            left = _load(p_ptr, along, row, depth, side)
            s = tl.dot(tl.trans(left), _load(p_ptr, along, column, depth, side), s)
        else:
            left = _load(p_ptr, row, along, side, depth)
            s = tl.dot(left, tl.trans(_load(p_ptr, column, along, side, depth)), s)

    dtype = s_ptr.dtype.element_ty
    if i == j:
        # Places in the tile are constants of each thread; those in the matrix would take registers from the sum.
        place = tl.arange(0, TILE)
        diagonal = (scale * s + tl.where(place[:, None] == place[None, :], shift, 0.0)).to(dtype)
        # No product promises that both halves of this tile round alike.
        diagonal = tl.where(place[:, None] >= place[None, :], diagonal, tl.trans(diagonal))
        _store(s_ptr, diagonal, row, column, side)
    else:
        below = (scale * s).to(dtype)
        _store(s_ptr, below, row, column, side)
        _store(s_ptr, tl.trans(below), column, row, side)


@triton.jit
def _tile_of_triangle(index, tiles):
    """Row and column of one of the tiles on and below the diagonal.

    A row of the lower half and one of the upper half have `tiles` + 1 of them together (`tiles` where that is odd, and
    the first pair is one row alone), so that a division finds the pair.
    """
    pair, place = index // (tiles | 1), index % (tiles | 1)
    lower = tiles // 2 + pair
    in_lower = place <= lower
    return tl.where(in_lower, lower, tiles - tiles % 2 - 1 - lower), tl.where(in_lower, place, place - lower - 1)


@triton.jit
def _load(p_ptr, row, column, rows, columns):
    """A tile of a matrix (rows, columns), with zeros beyond its last rows and columns."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(p_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(s_ptr, x, row, column, side):
    mask = (row < side)[:, None] & (column < side)[None, :]
    tl.store(s_ptr + row[:, None] * side + column[None, :], x, mask=mask)


@dataclass(frozen=True)
class Tiling:
    """A program's share of a symmetric product: `tile` rows and columns, `step` elements of the sum at a time. `down`:
    whether to sum down the columns of tall matrices.

    Two programs fit on a multiprocessor: 128 registers a thread, and half of its shared memory.
    """

    tile: int
    step: int
    num_warps: int
    num_stages: int
    down: bool


_LARGE = Tiling(128, 64, 8, 3, down=True)
# Where the instructions take operands from registers, one of those down the columns gets there past the pipeline.
_SMALL = Tiling(128, 32, 8, 4, down=False)


def tiling_for(capability: int) -> Tiling:
    """What runs on cards of `capability` (90 for 9.0)."""
    return _LARGE if 90 <= capability < 120 else _SMALL


@functools.lru_cache
def symmetric_launch(dtype: torch.dtype, down: bool, tiling: Tiling) -> Launch:
    """The kernel for P of `dtype`; down: for Pᵀ P."""
    constants = {"DOWN": down, "TILE": tiling.tile, "STEP": tiling.step, "STAGES": tiling.num_stages}
    scalars = (f"i32:{_MULTIPLE}", f"i32:{_MULTIPLE}", "fp32", "fp32")
    return Launch(_symmetric_kernel, (dtype, dtype), scalars, constants, tiling.num_warps)


@catalogue
def _launches(dtype, capability):
    if capability < 10 * _CAPABILITY[0]:
        return
    dtype, tiling = dtype if dtype.itemsize == 2 else torch.bfloat16, tiling_for(capability)
    for down in (False, True) if tiling.down else (False,):
        yield symmetric_launch(dtype, down, tiling)


def _symmetric(p, out, tiling, scale, shift, down=False):
    """out = scale * P Pᵀ + shift * I, with Pᵀ P if `down`; both are contiguous, P's sizes multiples of 16."""
    side, depth = reversed(p.shape[1:]) if down else p.shape[1:]
    launch = symmetric_launch(p.dtype, down, tiling)
    tiles = ceil_div(side, tiling.tile)
    launch(p.shape[0] * (tiles * (tiles + 1) // 2), p, out, side, depth, scale, shift)


def _into(update, steps, dtype, out):
    """Compute in `dtype` and write to `out`, of that dtype and of any strides."""
    count, rows, columns = update.shape
    tall, tiling = rows > columns, tiling_for(capability_of(update.device))
    if tall and not tiling.down:
        return _into(update.mT, steps, dtype, out.mT)
    whole = [ceil_div(size, _MULTIPLE) * _MULTIPLE for size in (rows, columns)]
    allocate = update.new_empty if whole == [rows, columns] else update.new_zeros
    x = allocate(count, *whole, dtype=dtype)
    torch.div(update, _norm(update), out=x[:, :rows, :columns])
    side = min(whole)
    a, b, c = _COEFFICIENTS
    gram, factor = (x.new_empty(count, side, side) for _ in range(2))
    spare = torch.empty_like(x) if steps > 1 else None
    for step in range(steps):
        _symmetric(x, gram, tiling, 1.0, b / (2 * c), down=tall)
        _symmetric(gram, factor, tiling, c, a - b * b / (4 * c))
        last = step == steps - 1
        source, target = (x[:, :rows, :columns], out) if last else (x, spare)
        if tall:
            torch.bmm(source, factor[:, :columns, :columns] if last else factor, out=target)
        else:
            torch.bmm(factor[:, :rows, :rows] if last else factor, source, out=target)
        x, spare = spare, x


def _orthogonalise(update, steps, dtype):
    out = update.new_empty(update.shape, dtype=dtype)
    if has_data(update):
        _into(update, steps, dtype, out)
    return (out,)


_op = define(_NAME, "(Tensor update, int steps, ScalarType dtype) -> Tensor", _orthogonalise)


def _orthogonalise_on_gpu(update, steps, *, dtype, out):
    """`orthogonalise` by the kernel."""
    if out is not None and out.dtype == dtype and not torch.compiler.is_compiling():
        _into(update, steps, dtype, out)
        return out
    result = _op(update, steps, dtype) if torch.compiler.is_compiling() else _orthogonalise(update, steps, dtype)[0]
    return result if out is None else out.copy_(result)


register(_NAME, _orthogonalise_on_gpu, DTYPES, _CAPABILITY)


@torch.no_grad()
def orthogonalise(update: torch.Tensor, steps: int = 5, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The polar factor of each matrix of update (N, m, n), roughly: its singular values become some 0.7 to 1.2.

    update: float32 or 16-bit, of any strides, m and n in any order. GPUs compute in bfloat16 for float32 and else in
    the update's dtype; those below compute capability 8.0, which have no bfloat16, in float16. CPUs compute in the
    update's dtype. A matrix of zeros stays one; singular values below some 1/700 of the norm need more than 5 steps.

    out: a floating tensor (N, m, n) of any dtype and strides for the result, which may be update itself. Without it the
    result is in the dtype that is computed in. There is no gradient.

    Memory in use: on a GPU twice that of the result beside it, and two squares of the smaller side for each matrix.

    Raises TypeError for a dtype or a type that does not fit, ValueError for a shape, a device or a number. Source:
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    expect_floating(_NAME, "update", update)
    if update.dim() != 3 or 0 in update.shape[1:]:
        raise ValueError(f"{_NAME}: update has shape {tuple(update.shape)}, expected (N, m, n), m and n at least 1")
    expect_int(_NAME, "steps", steps, 1)
    if out is not None:
        expect_floating(_NAME, "out", out)
        expect_device(_NAME, "out", out, update)
        if out.shape != update.shape:
            raise ValueError(f"{_NAME}: out has shape {tuple(out.shape)}, expected {tuple(update.shape)}")
    run = pick(_NAME, update, orthogonalise_reference)
    return run(update, steps, dtype=arithmetic(update), out=out)
