"""Rotary position embedding: with x1, x2 the halves of a head,

    (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin),   cos and sin of the token's position in its sequence

`token_angles` lays the angles out as the kernels read them, cos and sin side by side in 16 bits: rounding them to
float16 errs an eighth of what bfloat16 does when q and k are rounded, and as much as float16 itself does. The kernels
for short sequences turn q and k as they load them, by a table of so few positions that a multiprocessor's cache holds
it. `tile_angles` makes that for tiles of several sequences and tells whether angles rise evenly with positions: scores
know of the angle between q and k alone, so by the places in a tile they are then the same.

Where blocks meet many times q and k would be turned as often, so for longer sequences `turn_packed` does it once, by
angles laid out by token, on a copy that is kept for the backward pass instead of qkv. `turn` is the same with a
gradient, in front of attention that others compute.

Source: Su et al., RoFormer, 2104.09864.
"""

import functools

import torch

from .dispatch import choose
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, contiguous
from .operator import define
from .sequences import sequence_positions

_ROWS, _NUM_WARPS = 64, 4


@triton.jit
def _angles_kernel(
    cos_ptr,  # (P, HALF)
    sin_ptr,  # (P, HALF)
    bounds_ptr,  # (2, T) or None: token and position are the same
    angles_ptr,  # (T, 2 HALF)
    tokens,
    positions,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    valid = token < tokens
    position = token
    if bounds_ptr is not None:
        position -= tl.load(bounds_ptr + token, mask=valid, other=0)
    # A position past the last, which only a sequence longer than max_seqlen has, gets the last.
    source = tl.minimum(position, positions - 1)[:, None] * HALF + column[None, :]
    mask = valid[:, None] & (column < HALF)[None, :]
    target = angles_ptr + token.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
    tl.store(target, tl.load(cos_ptr + source, mask=mask, other=0.0).to(tl.float16), mask=mask)
    tl.store(target + HALF, tl.load(sin_ptr + source, mask=mask, other=0.0).to(tl.float16), mask=mask)


@triton.jit
def _load_angle(cos_ptr, sin_ptr, row, positions, HALF: tl.constexpr):
    at = tl.minimum(row, positions - 1)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(cos_ptr + at).to(tl.float32), tl.load(sin_ptr + at).to(tl.float32)


@triton.jit
def _tile_angles_kernel(
    cos_ptr,  # (positions, HALF)
    sin_ptr,  # (positions, HALF)
    angles_ptr,  # (TILE + 1, 2 HALF)
    positions,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """As complex numbers c[p] of positions p, even angles have c[p] c[0] = c[p // 2] c[p - p // 2], and are continued
    by it past the last."""
    EVEN: tl.constexpr = 2e-5  # twice what cos and sin in fp32 err by when an angle of 128 was rounded
    row, column = tl.arange(0, TILE), tl.arange(0, HALF)
    cos, sin = _load_angle(cos_ptr, sin_ptr, row, positions, HALF)
    cos1, sin1 = _load_angle(cos_ptr, sin_ptr, row // 2, positions, HALF)
    cos2, sin2 = _load_angle(cos_ptr, sin_ptr, row - row // 2, positions, HALF)
    cos0, sin0 = _load_angle(cos_ptr, sin_ptr, row * 0, positions, HALF)
    size = cos0 * cos0 + sin0 * sin0
    cos12, sin12 = cos1 * cos2 - sin1 * sin2, sin1 * cos2 + cos1 * sin2
    even_cos, even_sin = (cos12 * cos0 + sin12 * sin0) / size, (sin12 * cos0 - cos12 * sin0) / size
    given, allowed = (row < positions)[:, None], EVEN * tl.sqrt(size)
    even = (tl.abs(cos - even_cos) <= allowed) & (tl.abs(sin - even_sin) <= allowed) | ~given
    all_even = (positions > TILE // 2) & (tl.min(tl.min(even.to(tl.int32), 1), 0) > 0)
    at = angles_ptr + row[:, None] * (2 * HALF) + column[None, :]
    tl.store(at, tl.where(given, cos, even_cos).to(tl.float16))
    tl.store(at + HALF, tl.where(given, sin, even_sin).to(tl.float16))
    tl.store(angles_ptr + TILE * 2 * HALF + tl.arange(0, 2 * HALF), all_even.to(tl.float16))


@triton.jit
def _turn_kernel(
    x_ptr,  # (T, 3, H, 2 HALF)
    angles_ptr,  # (T, 2 HALF), or (PERIOD, 2 HALF)
    y_ptr,  # (T, 3, H, 2 HALF)
    rows,  # T * 3 H
    period,  # tokens after which the angles begin again
    H: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Turn q and k, or turn them back, and copy v."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_value = (row % (3 * H) >= 2 * H)[:, None]
    mask = (row < rows)[:, None] & (column < HALF)[None, :]
    place = row[:, None] * (2 * HALF) + column[None, :]
    x1 = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + place + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = angles_ptr + (row // (3 * H) % period)[:, None] * (2 * HALF) + column[None, :]
    cos = tl.where(is_value, 1.0, tl.load(angle, mask=mask, other=0.0).to(tl.float32))
    sin = tl.where(is_value, 0.0, tl.load(angle + HALF, mask=mask, other=0.0).to(tl.float32))
    if BACK:
        sin = -sin
    tl.store(y_ptr + place, x1 * cos - x2 * sin, mask=mask)
    tl.store(y_ptr + place + HALF, x2 * cos + x1 * sin, mask=mask)


@functools.lru_cache
def _angles_launch(cos_dtype, masked, head_size) -> Launch:
    half = head_size // 2
    constants = {"HALF": half, "WIDTH": triton.next_power_of_2(half), "ROWS": _ROWS}
    pointers = (cos_dtype, cos_dtype, torch.int32 if masked else None, torch.float16)
    return Launch(_angles_kernel, pointers, ("i32", "i32"), constants, _NUM_WARPS)


@functools.lru_cache
def _tile_angles_launch(cos_dtype, head_size, tile) -> Launch:
    constants = {"HALF": head_size // 2, "TILE": tile}
    return Launch(_tile_angles_kernel, (cos_dtype, cos_dtype, torch.float16), ("i32",), constants, _NUM_WARPS)


@functools.lru_cache
def _turn_launch(dtype, heads, head_size, back) -> Launch:
    half = head_size // 2
    constants = {"H": heads, "HALF": half, "WIDTH": triton.next_power_of_2(half), "ROWS": _ROWS, "BACK": back}
    return Launch(_turn_kernel, (dtype, torch.float16, dtype), ("i64", "i32"), constants, _NUM_WARPS)


@catalogue
def _launches(dtype, capability):
    if dtype.itemsize == 2 and capability >= 80:
        yield from (_angles_launch(torch.float32, masked, 64) for masked in (False, True))
        yield from (_turn_launch(dtype, 12, 64, back) for back in (False, True))
    if dtype.itemsize == 2 and capability == 90:
        yield _tile_angles_launch(torch.float32, 64, 128)


def _token_angles(cos, sin, bounds, tokens):
    cos, sin = contiguous(cos, sin)
    head_size = 2 * int(cos.shape[1])
    angles = cos.new_empty((tokens, head_size), dtype=torch.float16)
    launch = _angles_launch(cos.dtype, bounds is not None, head_size)
    launch(ceil_div(tokens, _ROWS), cos, sin, bounds, angles, tokens, cos.shape[0])
    return (angles,)


_angles_op = define("token_angles", "(Tensor cos, Tensor sin, Tensor? bounds, SymInt tokens) -> Tensor", _token_angles)


def token_angles(cos: torch.Tensor, sin: torch.Tensor, bounds: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """cos, sin (P, D/2) by position → float16 (tokens, D), side by side, by token.

    bounds: int32 (2, tokens) as `group_sequences` gives it; None where token and position are the same, or for a table
    of the first `tokens` positions.
    """
    if torch.compiler.is_compiling():
        return _angles_op(cos, sin, bounds, tokens)
    return _token_angles(cos, sin, bounds, tokens)[0]


def _tile_angles(cos, sin, tile):
    cos, sin = contiguous(cos, sin)
    head_size = 2 * int(cos.shape[1])
    angles = cos.new_empty((tile + 1, head_size), dtype=torch.float16)
    _tile_angles_launch(cos.dtype, head_size, tile)(1, cos, sin, angles, cos.shape[0])
    return (angles,)


_tile_angles_op = define("tile_angles", "(Tensor cos, Tensor sin, int tile) -> Tensor", _tile_angles)


def tile_angles(cos: torch.Tensor, sin: torch.Tensor, tile: int) -> torch.Tensor:
    """cos, sin (P, D/2) by position → float16 (tile + 1, D), side by side, for tiles of several sequences.

    Row p has the angles of position p. The last row is 1 where these rise evenly from a position to the next and P is
    more than half of `tile`, a power of two: then places after P are continued evenly; else 0.
    """
    if torch.compiler.is_compiling():
        return _tile_angles_op(cos, sin, tile)
    return _tile_angles(cos, sin, tile)[0]


def turn_packed(qkv: torch.Tensor, angles: torch.Tensor, back: bool = False) -> torch.Tensor:
    """A copy of qkv (T, 3, H, D) with q and k turned by angles (T, D), or by (S, D) again and again.

    back: by as much the other way, which is the gradient of turning.
    """
    qkv = qkv.contiguous()
    turned = torch.empty_like(qkv)
    heads, head_size = map(int, qkv.shape[2:])
    rows = qkv.shape[0] * 3 * heads
    launch = _turn_launch(qkv.dtype, heads, head_size, back)
    launch(ceil_div(rows, _ROWS), qkv, angles, turned, rows, angles.shape[0])
    return turned


def _save(ctx, inputs, output):
    _, angles, ctx.back = inputs
    ctx.save_for_backward(angles)


_turn_op = define(
    "turn_packed",
    "(Tensor qkv, Tensor angles, bool back) -> Tensor",
    lambda *arguments: (turn_packed(*arguments),),
    _save,
    lambda ctx, dturned: (_turn_op(dturned, *ctx.saved_tensors, not ctx.back), None, None),
)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The definition: x (..., D) turned by cos, sin (..., D/2), in fp32 or wider, rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def turns_in_one_kernel(qkv: torch.Tensor) -> bool:
    """Whether `turn` has a kernel for tensors like this, or is put together from operations of torch."""
    return choose("varlen_attention", qkv.device, qkv.dtype).backend == "triton"


def turn(qkv: torch.Tensor, cu_seqlens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A copy of qkv (T, 3, H, D) with q and k turned to their places in their sequences, by tables cos, sin (P, D/2) of
    positions; with a gradient."""
    _, position = sequence_positions(cu_seqlens, qkv.shape[0])
    if turns_in_one_kernel(qkv):
        return _turn_op(qkv, torch.cat((cos, sin), dim=1).half()[position], False)
    qk, v = qkv.split((2, 1), dim=1)
    return torch.cat((rotate(qk, cos[position, None, None], sin[position, None, None]), v), dim=1)
