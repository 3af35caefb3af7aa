"""Matrix products with GEGLU where they end, for cards of compute capability 9.0, in Gluon.

    u = x Wᵀ,  y = gelu(u₁) u₂                        u₁, u₂ the halves of u's columns
    dy = dz W,  du = dy times the slopes of y at u,  and y once more on request

The first spares a reading of u, the second a writing and a reading of dy, which are the largest tensors of a layer.

Every warp keeps to one of three tasks, and two rings in shared memory go from one to the next:

    loader: steps of both factors, by the copy engine  →  multiplier: a tile of their product, rounded as the result of
    any product is  →  finishers: GEGLU, from and to memory in whole cache lines

so a tile is multiplied while those before are finished. Finishers are groups of four warps that take tiles in turn: two
where y is computed, three where its slopes are, which take more arithmetic than two have time for.

Symbols in comments: T rows, C columns of x or dz, I columns of y.
"""

import functools

import torch
import torch.nn.functional as F

from .gelu import form_of, geglu_backward, geglu_forward, phi_of, slope_of
from .language import GLUON_AVAILABLE, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .launch import Launch, aligned, capability_of, catalogue, ceil_div, multiprocessors
from .tiles import chunk_of, split, tile_at, vectors

CAPABILITY = 90
DTYPES = (torch.float16, torch.bfloat16)
_TILE, _DEPTH, _GROUP = 128, 64, 8


@gluon.jit
def _place_of(turn, rows, WIDTH: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of the tile that this program has in a turn."""
    down, across = (rows + TILE - 1) // TILE, (WIDTH + COLUMNS - 1) // COLUMNS
    i, j = tile_at(gl.program_id(0) + turn * gl.num_programs(0), down, across, GROUP)
    return i * TILE, j * COLUMNS


@gluon.jit
def _turns(rows, WIDTH: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr):
    """How many tiles this program has."""
    tiles = (rows + TILE - 1) // TILE * ((WIDTH + COLUMNS - 1) // COLUMNS)
    return (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _ring(STAGES: gl.constexpr):
    """(full, empty) barriers of a ring."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    return full, empty


@gluon.jit
def _step(left_tiles, right_tiles, full, n, z, TRANSPOSED: gl.constexpr):
    """Begins to add to z the product of the tiles that are loaded as number n, and waits for those before."""
    STAGES: gl.constexpr = left_tiles.shape[0]
    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
    right = right_tiles.index(n % STAGES)
    if TRANSPOSED:
        right = right.permute((1, 0))
    z = warpgroup_mma(left_tiles.index(n % STAGES), right, z, is_async=True)
    return warpgroup_mma_wait(1, deps=(z,))


@gluon.jit
def _hand_over(z, halves, hands, turn):
    """The product of this turn to the finisher whose turn it is, once it has taken the one before."""
    filled, taken = hands
    HANDS: gl.constexpr = halves.shape[0] // 2
    hand = turn % HANDS
    left, right = split(z, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16]))
    mbarrier.wait(taken.index(hand), turn // HANDS & 1 ^ 1)
    halves.index(2 * hand).store(left)
    halves.index(2 * hand + 1).store(right)
    mbarrier.arrive(filled.index(hand), count=1)


@gluon.jit
def _multiply(left_tiles, right_tiles, halves, loads, hands, turns, STEPS: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Products (TILE, 128) to `halves` (2 * finishers, TILE, 64), the left 64 columns of a tile and the right ones."""
    full, empty = loads
    STAGES: gl.constexpr = left_tiles.shape[0]
    TILE: gl.constexpr = left_tiles.shape[1]
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 128, 16])
    for turn in range(turns):
        n = turn * STEPS
        z = _step(left_tiles, right_tiles, full, n, gl.zeros([TILE, 128], gl.float32, whole), TRANSPOSED)
        for _ in range(1, STEPS):
            n += 1
            z = _step(left_tiles, right_tiles, full, n, z, TRANSPOSED)
            mbarrier.arrive(empty.index((n - 1) % STAGES), count=1)
        z = warpgroup_mma_wait(0, deps=(z,))
        mbarrier.arrive(empty.index(n % STAGES), count=1)
        _hand_over(z.to(halves.dtype), halves, hands, turn)


@gluon.jit
def _load_forward(
    x_ptr, weight_ptr, x_tiles, weight_tiles, loads, turns, rows,
    C: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    full, empty = loads
    STAGES: gl.constexpr = x_tiles.shape[0]
    TILE: gl.constexpr = x_tiles.shape[1]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    COLUMNS: gl.constexpr = weight_tiles.shape[1] // 2
    STEPS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    x = tma.make_tensor_descriptor(x_ptr, [rows, C], [C, 1], [TILE, DEPTH], x_tiles.layout)
    gates = tma.make_tensor_descriptor(weight_ptr, [WIDTH, C], [C, 1], [COLUMNS, DEPTH], x_tiles.layout)
    values = tma.make_tensor_descriptor(weight_ptr + WIDTH * C, [WIDTH, C], [C, 1], [COLUMNS, DEPTH], x_tiles.layout)
    halves = weight_tiles._reinterpret(weight_tiles.dtype, [2 * STAGES, COLUMNS, DEPTH], weight_tiles.layout)
    for turn in range(turns):
        row, column = _place_of(turn, rows, WIDTH, TILE, COLUMNS, GROUP)
        for step in range(STEPS):
            n = turn * STEPS + step
            stage = n % STAGES
            mbarrier.wait(empty.index(stage), n // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), (TILE + 2 * COLUMNS) * DEPTH * 2)
            tma.async_copy_global_to_shared(x, [row, step * DEPTH], full.index(stage), x_tiles.index(stage))
            at = [column, step * DEPTH]
            tma.async_copy_global_to_shared(gates, at, full.index(stage), halves.index(2 * stage))
            tma.async_copy_global_to_shared(values, at, full.index(stage), halves.index(2 * stage + 1))


@gluon.jit
def _at(row, column, rows, WIDTH: gl.constexpr, STRIDE: gl.constexpr, PART: gl.constexpr):
    """Offsets of a part from `row` and `column` on in a tensor with rows of STRIDE elements, and whether they are
    there."""
    layout: gl.constexpr = vectors(64, gl.num_warps())
    row = row + gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    column = column + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    valid = (row < rows)[:, None]
    if WIDTH % 128 > 0:
        valid = valid & (column < WIDTH)[None, :]
    return row.to(gl.int64)[:, None] * STRIDE + column[None, :], valid


@gluon.jit
def _finish_forward(
    u_ptr, y_ptr, halves, hands, turns, rows,
    WHICH: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr, FORM: gl.constexpr,
):  # fmt: skip
    filled, taken = hands
    HANDS: gl.constexpr = halves.shape[0] // 2
    TILE: gl.constexpr = halves.shape[1]
    dtype: gl.constexpr = halves.dtype
    layout: gl.constexpr = vectors(64, gl.num_warps())
    for turn in range(WHICH, turns, HANDS):
        row, column = _place_of(turn, rows, WIDTH, TILE, 64, GROUP)
        mbarrier.wait(filled.index(WHICH), turn // HANDS & 1)
        for part in range(TILE // PART):
            gate = chunk_of(halves, 2 * WHICH, part, PART).load(layout)
            value = chunk_of(halves, 2 * WHICH + 1, part, PART).load(layout)
            at, valid = _at(row + part * PART, column, rows, WIDTH, 2 * WIDTH, PART)
            gl.store(u_ptr + at, gate, mask=valid)
            gl.store(u_ptr + WIDTH + at, value, mask=valid)
            gate = gate.to(gl.float32)
            phi, _ = phi_of(gate, FORM)
            at, valid = _at(row + part * PART, column, rows, WIDTH, WIDTH, PART)
            gl.store(y_ptr + at, (gate * phi * value.to(gl.float32)).to(dtype), mask=valid)
        mbarrier.arrive(taken.index(WHICH), count=1)


@gluon.jit
def forward_kernel(
    x_ptr,  # (T, C)
    weight_ptr,  # (2 I, C)
    u_ptr,  # (T, 2 I)
    y_ptr,  # (T, I)
    rows,
    C: gl.constexpr,
    WIDTH: gl.constexpr,
    FORM: gl.constexpr,
    TILE: gl.constexpr,
    DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,  # rows that a finisher has at a time
    REGISTERS: gl.constexpr,  # of its threads
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STEPS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, DEPTH], layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, 128, DEPTH], layout)
    halves = gl.allocate_shared_memory(dtype, [4, TILE, 64], layout)
    loads, hands = _ring(STAGES), _ring(2)
    turns = _turns(rows, WIDTH, TILE, 64)
    gl.warp_specialize(
        [
            (_multiply, (x_tiles, weight_tiles, halves, loads, hands, turns, STEPS, True)),
            (_finish_forward, (u_ptr, y_ptr, halves, hands, turns, rows, 0, WIDTH, GROUP, PART, FORM)),
            (_finish_forward, (u_ptr, y_ptr, halves, hands, turns, rows, 1, WIDTH, GROUP, PART, FORM)),
            (_load_forward, (x_ptr, weight_ptr, x_tiles, weight_tiles, loads, turns, rows, C, WIDTH, GROUP)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


@gluon.jit
def _load_backward(
    dz_ptr, weight_ptr, dz_tiles, weight_tiles, loads, turns, rows,
    C: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    full, empty = loads
    STAGES: gl.constexpr = dz_tiles.shape[0]
    TILE: gl.constexpr = dz_tiles.shape[1]
    DEPTH: gl.constexpr = dz_tiles.shape[2]
    STEPS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    dz = tma.make_tensor_descriptor(dz_ptr, [rows, C], [C, 1], [TILE, DEPTH], dz_tiles.layout)
    weight = tma.make_tensor_descriptor(weight_ptr, [C, WIDTH], [WIDTH, 1], [DEPTH, 128], weight_tiles.layout)
    for turn in range(turns):
        row, column = _place_of(turn, rows, WIDTH, TILE, 128, GROUP)
        for step in range(STEPS):
            n = turn * STEPS + step
            stage = n % STAGES
            mbarrier.wait(empty.index(stage), n // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), (TILE + 128) * DEPTH * 2)
            tma.async_copy_global_to_shared(dz, [row, step * DEPTH], full.index(stage), dz_tiles.index(stage))
            at = [step * DEPTH, column]
            tma.async_copy_global_to_shared(weight, at, full.index(stage), weight_tiles.index(stage))


@gluon.jit
def _fetch(u_ptr, turn, part, rows, WIDTH: gl.constexpr, TILE: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr):
    """Both halves of u for a part of this turn's tile; parts are counted through its left columns, then the right."""
    PARTS: gl.constexpr = TILE // PART
    row, column = _place_of(turn, rows, WIDTH, TILE, 128, GROUP)
    at, valid = _at(row + part % PARTS * PART, column + part // PARTS * 64, rows, WIDTH, 2 * WIDTH, PART)
    return gl.load(u_ptr + at, mask=valid, other=0.0), gl.load(u_ptr + WIDTH + at, mask=valid, other=0.0)


@gluon.jit
def _finish_backward(
    u_ptr, du_ptr, y_ptr, halves, hands, turns, rows,
    WHICH: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr, FORM: gl.constexpr,
):  # fmt: skip
    filled, taken = hands
    HANDS: gl.constexpr = halves.shape[0] // 2
    TILE: gl.constexpr = halves.shape[1]
    PARTS: gl.constexpr = TILE // PART
    dtype: gl.constexpr = halves.dtype
    layout: gl.constexpr = vectors(64, gl.num_warps())
    gate, value = _fetch(u_ptr, gl.minimum(turns - 1, WHICH), 0, rows, WIDTH, TILE, GROUP, PART)
    for turn in range(WHICH, turns, HANDS):
        row, column = _place_of(turn, rows, WIDTH, TILE, 128, GROUP)
        mbarrier.wait(filled.index(WHICH), turn // HANDS & 1)
        for part in range(2 * PARTS):
            # What comes next, long before it is used.
            following = gl.where(part + 1 < 2 * PARTS, turn, gl.minimum(turns - 1, turn + HANDS))
            gate_next, value_next = _fetch(u_ptr, following, (part + 1) % (2 * PARTS), rows, WIDTH, TILE, GROUP, PART)
            dy = chunk_of(halves, 2 * WHICH + part // PARTS, part % PARTS, PART).load(layout).to(gl.float32)
            gate, value = gate.to(gl.float32), value.to(gl.float32)
            phi, rest = phi_of(gate, FORM)
            activation = gate * phi
            top, left = row + part % PARTS * PART, column + part // PARTS * 64
            at, valid = _at(top, left, rows, WIDTH, 2 * WIDTH, PART)
            gl.store(du_ptr + at, (dy * value * slope_of(gate, phi, rest, FORM)).to(dtype), mask=valid)
            gl.store(du_ptr + WIDTH + at, (dy * activation).to(dtype), mask=valid)
            if y_ptr is not None:
                at, valid = _at(top, left, rows, WIDTH, WIDTH, PART)
                gl.store(y_ptr + at, (activation * value).to(dtype), mask=valid)
            gate, value = gate_next, value_next
        mbarrier.arrive(taken.index(WHICH), count=1)


@gluon.jit
def backward_kernel(
    dz_ptr,  # (T, C)
    weight_ptr,  # (C, I)
    u_ptr,  # (T, 2 I)
    du_ptr,  # (T, 2 I), may be u itself
    y_ptr,  # (T, I) or None
    rows,
    C: gl.constexpr,
    WIDTH: gl.constexpr,
    FORM: gl.constexpr,
    TILE: gl.constexpr,
    DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,  # rows that a finisher has at a time
    REGISTERS: gl.constexpr,  # of its threads
):
    dtype: gl.constexpr = dz_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STEPS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    dz_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, DEPTH], layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, 128], layout)
    halves = gl.allocate_shared_memory(dtype, [6, TILE, 64], layout)
    loads, hands = _ring(STAGES), _ring(3)
    turns = _turns(rows, WIDTH, TILE, 128)
    gl.warp_specialize(
        [
            (_multiply, (dz_tiles, weight_tiles, halves, loads, hands, turns, STEPS, False)),
            (_finish_backward, (u_ptr, du_ptr, y_ptr, halves, hands, turns, rows, 0, WIDTH, GROUP, PART, FORM)),
            (_finish_backward, (u_ptr, du_ptr, y_ptr, halves, hands, turns, rows, 1, WIDTH, GROUP, PART, FORM)),
            (_finish_backward, (u_ptr, du_ptr, y_ptr, halves, hands, turns, rows, 2, WIDTH, GROUP, PART, FORM)),
            (_load_backward, (dz_ptr, weight_ptr, dz_tiles, weight_tiles, loads, turns, rows, C, WIDTH, GROUP)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 24],
    )


def _constants(columns, width, dtype, approximate):
    tiling = {"TILE": _TILE, "DEPTH": _DEPTH, "GROUP": _GROUP}
    return {"C": columns, "WIDTH": width, "FORM": form_of(dtype, approximate)} | tiling


@functools.lru_cache
def forward_launch(columns: int, width: int, dtype: torch.dtype, approximate: str) -> Launch:
    constants = _constants(columns, width, dtype, approximate) | {"STAGES": 5, "PART": 64, "REGISTERS": 136}
    return Launch(forward_kernel, (dtype,) * 4, ("i32",), constants, 4)


@functools.lru_cache
def backward_launch(columns: int, width: int, dtype: torch.dtype, approximate: str, again: bool) -> Launch:
    """again: y is written."""
    constants = _constants(columns, width, dtype, approximate) | {"STAGES": 4, "PART": 32, "REGISTERS": 96}
    return Launch(backward_kernel, (*(dtype,) * 4, dtype if again else None), ("i32",), constants, 4)


@catalogue
def _launches(dtype, capability):
    if GLUON_AVAILABLE and capability == CAPABILITY and dtype in DTYPES:
        yield forward_launch(768, 1536, dtype, "none")
        for again in (False, True):
            yield backward_launch(768, 1536, dtype, "none", again)


def product_and_geglu(x, weight, bias, approximate):
    """(u, y) of x (T, C) and weight (2I, C), all in one dtype, with bias (2I,) or None; one after the other where there
    is no kernel for both."""
    if bias is not None or not _serves(x, weight):
        u = F.linear(x, weight, bias)
        return u, *geglu_forward(u, approximate)
    x, weight = aligned(x.contiguous()), aligned(weight.contiguous())
    (rows, columns), width = x.shape, weight.shape[0] // 2
    u, y = x.new_empty(rows, 2 * width), x.new_empty(rows, width)
    launch = forward_launch(int(columns), int(width), x.dtype, approximate)
    launch(_programs(x, ceil_div(width, 64)), x, weight, u, y, rows)
    return u, y


def product_and_geglu_backward(dz, weight, u, approximate, activation=False, in_place=False):
    """(du, y) as `geglu_backward` has them, of dz (T, C), weight (C, I) and u (T, 2I); one after the other where there
    is no kernel for both."""
    if not _serves(dz, weight):
        return geglu_backward(dz @ weight, u, approximate, activation, in_place)
    dz, weight, u = aligned(dz.contiguous()), aligned(weight.contiguous()), aligned(u.contiguous())
    (rows, columns), width = dz.shape, weight.shape[1]
    du, y = u if in_place else torch.empty_like(u), u.new_empty(rows, width) if activation else None
    launch = backward_launch(int(columns), int(width), u.dtype, approximate, activation)
    launch(_programs(dz, ceil_div(width, 128)), dz, weight, u, du, y, rows)
    return du, y


def _serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels are for products of x (T, C), of either pass, with a weight of its dtype."""
    return (
        GLUON_AVAILABLE
        and x.is_cuda
        and capability_of(x.device) == CAPABILITY
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        # Rows that begin at multiples of 16 bytes, for the copy engine.
        and not any(size % 16 for size in weight.shape)
        and 0 not in x.shape
    )


def _programs(x, across):
    """As many as stay on the GPU, at most one a tile."""
    return min(ceil_div(x.shape[0], _TILE) * across, multiprocessors(x.device))
