"""The backward kernel of `attention.py` for groups of up to 128 tokens on cards of compute capability 9.0, in Gluon,
whose warps work side by side as those of `attention_hopper_tile_forward.py` do.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import fetch_line, fetch_rows, make_barriers, seen_of, store_rows, store_turned_back
from .attention_hopper_prepare import prepare
from .attention_parts import generator_of, group_at, is_kept
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .tiles import chunk_of, vectors

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _store(dqkv_ptr, tiles, stage, length, H: gl.constexpr, MASKED: gl.constexpr):
    """The gradients of a group's rows."""
    # Unrolled, unlike `store_block`: there are registers for it, and the kernel takes 2 to 5 % less time.
    q_tiles, k_tiles, v_tiles, _ = tiles
    D: gl.constexpr = q_tiles.shape[2]
    layout: gl.constexpr = vectors(D, gl.num_warps())
    PART: gl.constexpr = 64
    rows = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for part in gl.static_range(q_tiles.shape[1] // PART):
        place = part * PART + rows
        at = dqkv_ptr + (place[:, None] * (3 * H * D) + columns[None, :])
        store_rows(at + 2 * H * D, chunk_of(v_tiles, stage, part, PART).load(layout), place < length, MASKED)
        store_rows(at, chunk_of(q_tiles, stage, part, PART).load(layout), place < length, MASKED)
        store_rows(at + H * D, chunk_of(k_tiles, stage, part, PART).load(layout), place < length, MASKED)


@gluon.jit
def _move_backward(
    data, groups_ptr, angles_ptr, tiles, lse_lines, positions, barriers, turns, T,
    H: gl.constexpr, TURNS: gl.constexpr, ENGINE: gl.constexpr,
):  # fmt: skip
    dout_ptr, qkv_ptr, lse_ptr, dqkv_ptr = data
    q_tiles, k_tiles, v_tiles, dout_tiles = tiles
    full, rest, _, _, back = barriers
    MASKED: gl.constexpr = groups_ptr is not None
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    ROW: gl.constexpr = 3 * H * D
    if ENGINE:
        dqkv = tma.make_tensor_descriptor(dqkv_ptr, [T, ROW], [ROW, 1], [TILE, D], q_tiles.layout)
    program, programs = gl.program_id(0), gl.num_programs(0)
    for i in range(-STAGES, turns):
        stage = (i + STAGES) % STAGES
        if i >= 0:
            item = program + i * programs
            start, length = group_at(groups_ptr, item // H, TILE)
            column = item % H * D
            mbarrier.wait(back.index(stage), (i // STAGES) & 1)
            if ENGINE:
                tma.async_copy_shared_to_global(dqkv, [start, column], q_tiles.index(stage))
                tma.async_copy_shared_to_global(dqkv, [start, column + H * D], k_tiles.index(stage))
                tma.async_copy_shared_to_global(dqkv, [start, column + 2 * H * D], v_tiles.index(stage))
                tma.store_wait(0)
            else:
                at = dqkv_ptr + (start.to(gl.int64) * ROW + column)
                if angles_ptr is None:
                    _store(at, tiles, stage, length, H, MASKED)
                else:
                    store_turned_back(at, tiles, stage, angles_ptr, positions, length, H)
        if i + STAGES < turns:
            item = program + (i + STAGES) * programs
            start, length = group_at(groups_ptr, item // H, TILE)
            qkv, dout = qkv_ptr + item % H * D, dout_ptr + item % H * D
            fetch_rows(q_tiles.index(stage), qkv, start, length, ROW, MASKED)
            fetch_rows(k_tiles.index(stage), qkv + H * D, start, length, ROW, MASKED)
            lse = lse_ptr + (item % H).to(gl.int64) * T
            fetch_line(lse_lines.index(stage), lse, start, length, MASKED)
            if TURNS:
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            fetch_rows(v_tiles.index(stage), qkv + 2 * H * D, start, length, ROW, MASKED)
            fetch_rows(dout_tiles.index(stage), dout, start, length, H * D, MASKED)
            async_copy.mbarrier_arrive(rest.index(stage), increment_count=False)


@gluon.jit
def _multiply_backward(
    groups_ptr, seed_ptr, tiles, weights, lse_lines, sights, barriers, turns, scale, dropout,
    H: gl.constexpr, PREPARED: gl.constexpr, TURNS: gl.constexpr, ENGINE: gl.constexpr,
):  # fmt: skip
    """`weights` (TILE, TILE) holds P, then dS, for the products that take them on their side."""
    q_tiles, k_tiles, v_tiles, dout_tiles = tiles
    full, rest, ready, done, _ = barriers
    MASKED: gl.constexpr = groups_ptr is not None
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TILE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    place = gl.arange(0, TILE, layout=gl.SliceLayout(1, square))
    others = gl.arange(0, TILE, layout=gl.SliceLayout(0, square))
    program, programs = gl.program_id(0), gl.num_programs(0)
    more = 1.0 / (1.0 - dropout)
    for i in range(turns):
        stage = i % STAGES
        item = program + i * programs
        q, k, v, dout = q_tiles.index(stage), k_tiles.index(stage), v_tiles.index(stage), dout_tiles.index(stage)
        nothing = gl.zeros([TILE, TILE], gl.float32, square)
        if PREPARED:
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        else:
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            fence_async_shared()
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = lse_lines.index(stage).load(gl.SliceLayout(1, square))
        if TURNS:
            mbarrier.wait(rest.index(stage), (i // STAGES) & 1)
            fence_async_shared()
        if seed_ptr is None:
            dp = warpgroup_mma(dout, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
        else:
            s = warpgroup_mma_wait(0, deps=(s,))
        p = gl.exp2(s * (scale * LOG2_E) - lse[:, None])
        if MASKED:
            p = gl.where(seen_of(sights.index(stage), square), p, 0.0)
        if seed_ptr is not None:
            start, _length = group_at(groups_ptr, item // H, TILE)
            kept = is_kept(generator_of(seed_ptr, item % H), start, 0, place[:, None], 0, others[None, :], dropout)
            # What is dropped is told by its sign from here on: masks of their own would be too much for the registers.
            p = gl.where(kept, p, -p)
            weights.store(gl.maximum(p, 0.0).to(dtype))
            dp = warpgroup_mma(dout, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
        else:
            weights.store(p.to(dtype))
        fence_async_shared()
        nothing = gl.zeros([TILE, D], gl.float32, narrow)
        dv = warpgroup_mma(weights.permute((1, 0)), dout, nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        if seed_ptr is not None:
            dp = gl.where(p > 0, dp * more, 0.0)
            p = gl.abs(p)
        delta = gl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(dtype)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        weights.store(ds)
        fence_async_shared()
        ds = gl.convert_layout(ds, gl.DotOperandLayout(0, narrow, 2))
        dq = warpgroup_mma(ds, k, nothing, use_acc=False, is_async=True)
        dk = warpgroup_mma(weights.permute((1, 0)), q, nothing, use_acc=False, is_async=True)
        if seed_ptr is not None:
            dv *= more
        v.store(dv.to(dtype))
        dq, dk = warpgroup_mma_wait(0, deps=(dq, dk))
        q.store((dq * scale).to(dtype))
        k.store((dk * scale).to(dtype))
        if ENGINE:
            fence_async_shared()
        mbarrier.arrive(done.index(stage), count=1)


@gluon.jit
def backward_tile_hopper(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    lse_ptr,  # (H, T)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    angles_ptr,  # (TILE, D), cos and sin side by side, by position, or None
    seed_ptr,  # (1,) or None
    dqkv_ptr,  # (T, 3, H, D)
    T,
    count,  # of groups, where groups_ptr is None
    window,
    scale,
    dropout,
    H: gl.constexpr,
    D: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOWED: gl.constexpr,
    PREPARERS: gl.constexpr,  # warps
    PREPARERS_REGISTERS: gl.constexpr,
    MOVERS: gl.constexpr,
    MOVERS_REGISTERS: gl.constexpr,
):
    PREPARED: gl.constexpr = groups_ptr is not None or angles_ptr is not None
    TURNS: gl.constexpr = groups_ptr is None and angles_ptr is not None
    # Where the multipliers or the preparers have the most to do, stores by the copy engine leave them more of the time.
    ENGINE: gl.constexpr = TURNS or (groups_ptr is None and seed_ptr is not None)
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    dout_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    weights = gl.allocate_shared_memory(dtype, [TILE, TILE], gl.NVMMASharedLayout(128, 16, 2))
    lse_lines = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], line)
    sights, positions = None, None
    if groups_ptr is not None:
        sights = gl.allocate_shared_memory(gl.int16, [STAGES, TILE], line)
        positions = gl.allocate_shared_memory(gl.int8, [STAGES, TILE], line)
        count = gl.load(groups_ptr)
    barriers = make_barriers(STAGES, MOVERS, TURNS)
    program, programs = gl.program_id(0), gl.num_programs(0)
    turns = (count * H - program + programs - 1) // programs
    tiles, notes = (q_tiles, k_tiles, v_tiles, dout_tiles), (sights, positions)
    data = (dout_ptr, qkv_ptr, lse_ptr, dqkv_ptr)
    if PREPARED:
        gl.warp_specialize(
            [
                (
                    _multiply_backward,
                    (
                        groups_ptr,
                        seed_ptr,
                        tiles,
                        weights,
                        lse_lines,
                        sights,
                        barriers,
                        turns,
                        scale,
                        dropout,
                        H,
                        PREPARED,
                        TURNS,
                        ENGINE,
                    ),
                ),
                (
                    prepare,
                    (groups_ptr, bounds_ptr, angles_ptr, tiles, notes, barriers, turns, T, window, H, WINDOWED, True),
                ),
                (
                    _move_backward,
                    (data, groups_ptr, angles_ptr, tiles, lse_lines, positions, barriers, turns, T, H, TURNS, ENGINE),
                ),
            ],
            [PREPARERS, MOVERS],
            [PREPARERS_REGISTERS, MOVERS_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply_backward,
                    (
                        groups_ptr,
                        seed_ptr,
                        tiles,
                        weights,
                        lse_lines,
                        sights,
                        barriers,
                        turns,
                        scale,
                        dropout,
                        H,
                        PREPARED,
                        TURNS,
                        ENGINE,
                    ),
                ),
                (
                    _move_backward,
                    (data, groups_ptr, angles_ptr, tiles, lse_lines, positions, barriers, turns, T, H, TURNS, ENGINE),
                ),
            ],
            [MOVERS],
            [MOVERS_REGISTERS],
        )
