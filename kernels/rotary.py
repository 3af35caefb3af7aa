"""Rotary position embedding for `attention.py`: with x1, x2 the halves of a head,

    (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin),   cos and sin of the token's position in its sequence

`token_angles` lays the angles out as the kernels read them, cos and sin side by side in 16 bits: rounding them to
float16 errs an eighth of what bfloat16 does when q and k are rounded, and as much as float16 itself does. The kernels
for short sequences turn q and k as they load them, by a table of so few positions that a multiprocessor's cache holds
it. Where blocks meet many times q and k would be turned as often, so for longer sequences `turn_packed` does it once,
by angles laid out by token, on a copy that is kept for the backward pass instead of qkv.

Source: Su et al., RoFormer, 2104.09864.
"""

import functools

import torch

from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, contiguous
from .operator import define

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
):
    """Turn q and k and copy v."""
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
    tl.store(y_ptr + place, x1 * cos - x2 * sin, mask=mask)
    tl.store(y_ptr + place + HALF, x2 * cos + x1 * sin, mask=mask)


@functools.lru_cache
def _angles_launch(cos_dtype, masked, head_size) -> Launch:
    half = head_size // 2
    constants = {"HALF": half, "WIDTH": triton.next_power_of_2(half), "ROWS": _ROWS}
    pointers = (cos_dtype, cos_dtype, torch.int32 if masked else None, torch.float16)
    return Launch(_angles_kernel, pointers, ("i32", "i32"), constants, _NUM_WARPS)


@functools.lru_cache
def _turn_launch(dtype, heads, head_size) -> Launch:
    half = head_size // 2
    constants = {"H": heads, "HALF": half, "WIDTH": triton.next_power_of_2(half), "ROWS": _ROWS}
    return Launch(_turn_kernel, (dtype, torch.float16, dtype), ("i64", "i32"), constants, _NUM_WARPS)


@catalogue
def _launches(dtype, capability):
    if dtype.itemsize == 2 and capability >= 80:
        for masked in (False, True):
            yield _angles_launch(torch.float32, masked, 64)
        yield _turn_launch(dtype, 12, 64)


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


def turn_packed(qkv: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """A copy of contiguous qkv (T, 3, H, D) with q and k turned by angles (T, D), or by (S, D) again and again."""
    turned = torch.empty_like(qkv)
    heads, head_size = map(int, qkv.shape[2:])
    rows = qkv.shape[0] * 3 * heads
    launch = _turn_launch(qkv.dtype, heads, head_size)
    launch(ceil_div(rows, _ROWS), qkv, angles, turned, rows, angles.shape[0])
    return turned
