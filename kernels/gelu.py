"""GELU and its gated form.

    gelu(x) = x * Phi(x), Phi the normal distribution function       (erf form; approximate="tanh" on request)
    geglu(a, b) = gelu(a) * b, with a and b the halves of one (..., 2I) tensor

Only the input is saved for the backward pass, which reads it and the gradient once:

    dgelu/dx = Phi(x) + x * phi(x),   phi(x) = exp(-x²/2) / sqrt(2 pi)
    da = dy * b * dgelu/da,           db = dy * gelu(a)

geglu reads and writes its halves in place in the packed tensor, nothing is split or joined. Its backward pass has
gelu(a) * b at hand and writes it on request (`torch.ops.cramfast.geglu_backward`), so that a layer which needs it for
the next weight's gradient need not keep it from the forward pass.

Sources: Hendrycks & Gimpel, 1606.08415; Shazeer, "GLU Variants Improve Transformer", 2002.05202.
"""

import functools

import torch
import torch.nn.functional as F

from .arguments import expect_choice, expect_even, expect_floating
from .dispatch import pick
from .language import tl, triton
from .launch import Launch, catalogue, ceil_div, contiguous
from .operator import Operator, define

APPROXIMATIONS = ("none", "tanh")


def gelu_reference(x, approximate="none"):
    """The definition, on any device and floating dtype; see `gelu`."""
    return F.gelu(x, approximate=approximate)


def geglu_reference(x, approximate="none"):
    """The definition, on any device and floating dtype; see `geglu`."""
    gate, value = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * value


@triton.jit
def _tail(z):
    """Phi(-z) for z >= 0 as 2 to a polynomial, to 3e-5 of its value up to z = 8 and below 1e-15 from there on: a tenth
    of float16's rounding, at a third of the instructions that erf takes."""
    p = 4.876053228893103e-05 - 1.2808939492675911e-06 * z
    p = p * z - 0.0008140021321648238
    p = p * z + 0.007986417561854574
    p = p * z - 0.05277496588231082
    p = p * z - 0.45971558089341313
    p = p * z - 1.1507967441965161
    return tl.exp2(p * z - 1.0)


@triton.jit
def phi_of(x, FORM: tl.constexpr):
    """(phi, 1 - phi), phi the factor that makes x into gelu(x). FORM: "erf", "tail" (erf for 16 bits), "tanh"."""
    if FORM == "erf":
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return phi, 1.0 - phi
    elif FORM == "tail":
        tail = _tail(tl.abs(x))
        phi = tl.where(x < 0, tail, 1.0 - tail)
        return phi, 1.0 - phi
    else:  # 1/2 (1 + tanh u) = 1 / (1 + exp(-2u)),  u = sqrt(2/pi) (x + 0.044715 x³); exp(-2|u|) is at most 1
        z = tl.abs(x)
        ratio = tl.exp2(z * (-2.302208198144325 - 0.1029432395800235 * z * z))
        most = 1.0 / (1.0 + ratio)
        least = ratio * most
        return tl.where(x < 0, least, most), tl.where(x < 0, most, least)


@triton.jit
def slope_of(x, phi, rest, FORM: tl.constexpr):
    """d gelu(x) / dx, given phi and 1 - phi of x."""
    if FORM == "tanh":  # d phi / dx = phi (1 - phi) * 2 du/dx
        return phi + x * phi * rest * (1.5957691216057308 + 0.21406444881780073 * x * x)
    else:
        return phi + x * (0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817))


@triton.jit
def _places(program, rows, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Which ROWS × TILE elements of a (rows, WIDTH) tensor are number `program`: row, column, mask."""
    across = tl.cdiv(WIDTH, TILE)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % across * TILE + tl.arange(0, TILE)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _from_the_end():
    """Backward kernels begin with the last rows: what was written last before them is still in the cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _gelu_kernel(
    x_ptr,  # (rows, WIDTH)
    y_ptr,  # (rows, WIDTH)
    rows,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    row, column, mask = _places(tl.program_id(0), rows, WIDTH, TILE, ROWS)
    place = row * WIDTH + column
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    phi, _ = phi_of(x, FORM)
    tl.store(y_ptr + place, x * phi, mask=mask)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr,  # (rows, WIDTH)
    x_ptr,  # (rows, WIDTH)
    dx_ptr,  # (rows, WIDTH)
    rows,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    row, column, mask = _places(_from_the_end(), rows, WIDTH, TILE, ROWS)
    place = row * WIDTH + column
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
    phi, rest = phi_of(x, FORM)
    tl.store(dx_ptr + place, dy * slope_of(x, phi, rest, FORM), mask=mask)


@triton.jit
def _geglu_kernel(
    x_ptr,  # (rows, 2 WIDTH)
    y_ptr,  # (rows, WIDTH)
    rows,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    row, column, mask = _places(tl.program_id(0), rows, WIDTH, TILE, ROWS)
    place = row * (2 * WIDTH) + column
    gate = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    phi, _ = phi_of(gate, FORM)
    tl.store(y_ptr + row * WIDTH + column, gate * phi * value, mask=mask)


@triton.jit
def _geglu_backward_kernel(
    dy_ptr,  # (rows, WIDTH)
    x_ptr,  # (rows, 2 WIDTH)
    dx_ptr,  # (rows, 2 WIDTH)
    y_ptr,  # (rows, WIDTH) or None: the forward pass's output, computed again
    rows,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    row, column, mask = _places(_from_the_end(), rows, WIDTH, TILE, ROWS)
    place = row * (2 * WIDTH) + column
    gate = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    phi, rest = phi_of(gate, FORM)
    activation = gate * phi
    tl.store(dx_ptr + place, dy * value * slope_of(gate, phi, rest, FORM), mask=mask)
    tl.store(dx_ptr + place + WIDTH, dy * activation, mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + row * WIDTH + column, activation * value, mask=mask)


_NUM_WARPS = 4
# Two 16-byte loads a lane from each tensor.
_BYTES_PER_PROGRAM = _NUM_WARPS * 32 * 2 * 16


@functools.lru_cache
def launch_for(kernel, tensors, width, dtype, approximate) -> Launch:
    """One of the kernels above for rows of `width` outputs; `tensors`: True for each of its tensors that is there."""
    elements = _BYTES_PER_PROGRAM // dtype.itemsize
    # The widest tile that fits the row without a rest, if that is wide enough for whole cache lines.
    tile = min(width & -width, elements)
    if tile < 64:
        tile = min(256, triton.next_power_of_2(width))
    constants = {"WIDTH": width, "TILE": tile, "ROWS": elements // tile, "FORM": form_of(dtype, approximate)}
    pointers = tuple(dtype if present else None for present in tensors)
    return Launch(kernel, pointers, ("i64",), constants, _NUM_WARPS)


@catalogue
def _launches(dtype, _capability):
    for approximate in APPROXIMATIONS:
        yield launch_for(_gelu_kernel, (True,) * 2, 3072, dtype, approximate)
        yield launch_for(_gelu_backward_kernel, (True,) * 3, 3072, dtype, approximate)
        yield launch_for(_geglu_kernel, (True,) * 2, 1536, dtype, approximate)
        yield launch_for(_geglu_backward_kernel, (True,) * 4, 1536, dtype, approximate)


def form_of(dtype: torch.dtype, approximate: str) -> str:
    if approximate == "tanh":
        return "tanh"
    return "erf" if dtype == torch.float32 else "tail"


def _run(kernel, width, approximate, *tensors):
    """Run `kernel` over `tensors`, the first of which is there and has rows of `width` or 2 `width` elements."""
    first = tensors[0]
    if width == 0:
        return
    launch = launch_for(kernel, tuple([tensor is not None for tensor in tensors]), width, first.dtype, approximate)
    rows = first.numel() // int(first.shape[-1])
    across = ceil_div(width, launch.constants["TILE"])
    launch(ceil_div(rows, launch.constants["ROWS"]) * across, *tensors, rows)


def gelu_forward(x, approximate):
    x = x.contiguous()
    y = torch.empty_like(x)
    _run(_gelu_kernel, int(x.shape[-1]), approximate, x, y)
    return (y,)


def gelu_backward(dy, x, approximate):
    dy, x = contiguous(dy, x)
    dx = torch.empty_like(x)
    _run(_gelu_backward_kernel, int(x.shape[-1]), approximate, dy, x, dx)
    return (dx,)


def geglu_forward(x, approximate):
    x = x.contiguous()
    width = int(x.shape[-1]) // 2
    y = x.new_empty((*x.shape[:-1], width))
    _run(_geglu_kernel, width, approximate, x, y)
    return (y,)


def geglu_backward(dy, x, approximate, activation=False, in_place=False):
    """(dx, y); y is None unless `activation`. in_place: dx takes the place of x."""
    dy, x = contiguous(dy, x)
    dx, y = x if in_place else torch.empty_like(x), torch.empty_like(dy) if activation else None
    _run(_geglu_backward_kernel, int(dy.shape[-1]), approximate, dy, x, dx, y)
    return dx, y


def _save(ctx, inputs, results):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _gelu_gradients(ctx, backward, dy):
    return backward(dy, *ctx.saved_tensors, ctx.approximate)[0], None


def _geglu_gradients(ctx, backward, dy):
    return backward(dy, *ctx.saved_tensors, ctx.approximate, False)[0], None


_gelu_operator = Operator(
    "gelu",
    "(Tensor x, str approximate) -> Tensor y",
    forward=gelu_forward,
    save=_save,
    backward=(
        gelu_backward,
        define("gelu_backward", "(Tensor dy, Tensor x, str approximate) -> Tensor dx", gelu_backward),
    ),
    gradients=_gelu_gradients,
)
_geglu_operator = Operator(
    "geglu",
    "(Tensor x, str approximate) -> Tensor y",
    forward=geglu_forward,
    save=_save,
    backward=(
        geglu_backward,
        define(
            "geglu_backward",
            "(Tensor dy, Tensor x, str approximate, bool activation) -> (Tensor dx, Tensor y)",
            geglu_backward,
        ),
    ),
    gradients=_geglu_gradients,
)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU of x, elementwise, in x's dtype. `approximate` is "none" (exact, erf) or "tanh".

    Raises TypeError unless x is floating, ValueError for another `approximate`.
    """
    expect_floating("gelu", "x", x)
    expect_choice("gelu", "approximate", approximate, APPROXIMATIONS)
    run = pick("gelu", x, gelu_reference)
    return run(x, approximate) if x.dim() else run(x[None], approximate)[0]


def geglu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu(first half) * second half of x (..., 2I) → (..., I); the order Hugging Face ModernBERT uses.

    Raises as `gelu` does, and ValueError when the last dimension is not even.
    """
    expect_geglu(x, approximate)
    return pick("geglu", x, geglu_reference)(x, approximate)


def expect_geglu(x: torch.Tensor, approximate: str) -> None:
    """Raises what `geglu` raises of its arguments."""
    expect_even("geglu", "x", x)
    expect_choice("geglu", "approximate", approximate, APPROXIMATIONS)
