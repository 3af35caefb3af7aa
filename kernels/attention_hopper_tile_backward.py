"""The backward kernel of `attention.py` for tiles of 128 tokens on cards of compute capability 9.0, in Gluon, whose
warps work side by side as those of `attention_hopper_tile_forward.py` do.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import (
    as_rows,
    fetch_line,
    fetch_rows,
    gather_line,
    gather_rows,
    make_barriers,
    one_each,
    seen_of,
    store_rows,
    tokens_of,
    turns_of,
)
from .attention_hopper_prepare import prepare
from .attention_parts import generator_of, is_kept
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .tiles import allocate_tiles, chunk_of, vectors

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _store(dqkv_ptr, tiles, stage, owners, H: gl.constexpr, PART: gl.constexpr, MASKED: gl.constexpr):
    """The gradients of a tile's rows, of these tokens where it is masked, else from `dqkv_ptr` on."""
    # Unrolled, unlike `store_block`: there are registers for it, and the kernel takes 2 to 5 % less time.
    q_tiles, k_tiles, v_tiles, _ = tiles
    D: gl.constexpr = q_tiles.shape[2]
    layout: gl.constexpr = vectors(D, gl.num_warps())
    rows = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    tokens = as_rows(owners, PART, layout)
    for part in gl.static_range(q_tiles.shape[1] // PART):
        if MASKED:
            at = dqkv_ptr + (tokens[part].to(gl.int64)[:, None] * (3 * H * D) + columns[None, :])
        else:
            at = dqkv_ptr + ((part * PART + rows)[:, None] * (3 * H * D) + columns[None, :])
        store_rows(at + 2 * H * D, chunk_of(v_tiles, stage, part, PART).load(layout), tokens[part] >= 0, MASKED)
        store_rows(at, chunk_of(q_tiles, stage, part, PART).load(layout), tokens[part] >= 0, MASKED)
        store_rows(at + H * D, chunk_of(k_tiles, stage, part, PART).load(layout), tokens[part] >= 0, MASKED)


@gluon.jit
def _gather(tiles, stage, qkv, dout, tokens, H: gl.constexpr, PART: gl.constexpr):
    """Begin to copy the rows of `tokens`, of which these are those of token 0."""
    q_tiles, k_tiles, v_tiles, dout_tiles = tiles
    D: gl.constexpr = q_tiles.shape[2]
    WIDTH: gl.constexpr = H * D
    of_rows = as_rows(tokens, PART, vectors(D, gl.num_warps()))
    for part in gl.static_range(q_tiles.shape[1] // PART):
        gather_rows(q_tiles, stage, part, qkv, of_rows[part], 3 * WIDTH)
        gather_rows(k_tiles, stage, part, qkv + WIDTH, of_rows[part], 3 * WIDTH)
        gather_rows(v_tiles, stage, part, qkv + 2 * WIDTH, of_rows[part], 3 * WIDTH)
        gather_rows(dout_tiles, stage, part, dout, of_rows[part], WIDTH)


@gluon.jit
def _move_backward(
    data, places_ptr, tiles, lse_lines, barriers, turns, T, slots,
    H: gl.constexpr, TURNS: gl.constexpr, APART: gl.constexpr, ENGINE: gl.constexpr,
):  # fmt: skip
    dout_ptr, qkv_ptr, lse_ptr, dqkv_ptr = data
    q_tiles, k_tiles, v_tiles, dout_tiles = tiles
    full, rest, ready, done = barriers
    MASKED: gl.constexpr = places_ptr is not None
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    ROW: gl.constexpr = 3 * H * D
    # Rows that are moved at a time: fewer take fewer registers.
    PART: gl.constexpr = 32 if MASKED and TURNS else 64
    if ENGINE:
        dqkv = tma.make_tensor_descriptor(dqkv_ptr, [T, ROW], [ROW, 1], [TILE, D], q_tiles.layout)
    line: gl.constexpr = one_each(D, gl.num_warps())
    program, programs = gl.program_id(0), gl.num_programs(0)
    tokens = tokens_of(places_ptr, slots, program, H, TILE, line)
    owners = tokens
    for i in range(-STAGES, turns):
        stage = (i + STAGES) % STAGES
        item = program + i * programs
        later = item + STAGES * programs
        # Asked for a turn before they are needed, which they will have come in.
        next_tokens = tokens_of(places_ptr, slots, later + programs, H, TILE, line)
        next_owners = tokens_of(places_ptr, slots, item + programs, H, TILE, line)
        if i >= 0:
            tile, column = item // H, item % H * D
            mbarrier.wait(done.index(stage), (i // STAGES) & 1)
            if TURNS:  # the second time in a round that it is completed
                mbarrier.wait(ready.index(stage), 1)
            if ENGINE:
                tma.async_copy_shared_to_global(dqkv, [tile * TILE, column], q_tiles.index(stage))
                tma.async_copy_shared_to_global(dqkv, [tile * TILE, column + H * D], k_tiles.index(stage))
                tma.async_copy_shared_to_global(dqkv, [tile * TILE, column + 2 * H * D], v_tiles.index(stage))
                tma.store_wait(0)
            elif MASKED:
                _store(dqkv_ptr + column, tiles, stage, owners, H, PART, MASKED)
            else:
                at = dqkv_ptr + ((tile * TILE).to(gl.int64) * ROW + column)
                _store(at, tiles, stage, owners, H, PART, MASKED)
        if i + STAGES < turns:
            tile, column = later // H, later % H * D
            qkv, dout, lse = qkv_ptr + column, dout_ptr + column, lse_ptr + (later % H).to(gl.int64) * T
            if MASKED:
                gather_line(lse_lines.index(stage), lse, tokens)
                _gather(tiles, stage, qkv, dout, tokens, H, PART)
            else:
                first = tile * TILE
                fetch_rows(q_tiles.index(stage), qkv, first, TILE, ROW, MASKED)
                fetch_rows(k_tiles.index(stage), qkv + H * D, first, TILE, ROW, MASKED)
                fetch_line(lse_lines.index(stage), lse, first, TILE, MASKED)
                if APART:
                    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                fetch_rows(v_tiles.index(stage), qkv + 2 * H * D, first, TILE, ROW, MASKED)
                fetch_rows(dout_tiles.index(stage), dout, first, TILE, H * D, MASKED)
            async_copy.mbarrier_arrive(rest.index(stage), increment_count=False)
        tokens, owners = next_tokens, next_owners


@gluon.jit
def _multiply_backward(
    seed_ptr, tiles, weights, notes, barriers, turns, scale, dropout,
    H: gl.constexpr, MASKED: gl.constexpr, TURNS: gl.constexpr, ENGINE: gl.constexpr,
):  # fmt: skip
    """`weights` (TILE, TILE) holds P, then dS, for the products that take them on their side."""
    q_tiles, k_tiles, v_tiles, dout_tiles = tiles
    lse_lines, sights = notes
    full, _, ready, done = barriers
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
        if TURNS:  # completed twice in a round, this being the first time
            mbarrier.wait(ready.index(stage), 0)
        elif MASKED:
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        else:
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            fence_async_shared()
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = lse_lines.index(stage).load(gl.SliceLayout(1, square))
        if seed_ptr is None:
            dp = warpgroup_mma(dout, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
        else:
            s = warpgroup_mma_wait(0, deps=(s,))
        p = gl.exp2(s * (scale * LOG2_E) - lse[:, None])
        if MASKED:
            p = gl.where(seen_of(sights.index(stage), square), p, 0.0)
        if seed_ptr is not None:
            generator, start = generator_of(seed_ptr, item % H), item // H * TILE
            kept = is_kept(generator, start, 0, place[:, None], 0, others[None, :], dropout)
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
    count_ptr,  # (1,) or None
    places_ptr,  # (2, count, TILE) or None, as `pack_sequences` gives both
    angles_ptr,  # as `tile_angles` gives it, without places also (TILE, D) of it; or None
    seed_ptr,  # (1,) or None
    dqkv_ptr,  # (T, 3, H, D)
    T,
    count,  # of tiles; at the most, where count_ptr tells how many
    scale,
    dropout,
    H: gl.constexpr,
    D: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    PREPARERS: gl.constexpr,  # warps
    PREPARERS_REGISTERS: gl.constexpr,
    MOVERS: gl.constexpr,
    MOVERS_REGISTERS: gl.constexpr,
):
    MASKED: gl.constexpr = count_ptr is not None
    TURNS: gl.constexpr = angles_ptr is not None
    PREPARED: gl.constexpr = MASKED or TURNS
    APART: gl.constexpr = TURNS and not MASKED
    # Where the multipliers or the preparers have the most to do, stores by the copy engine leave them more of the time.
    ENGINE: gl.constexpr = not MASKED and (TURNS or seed_ptr is not None)
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = allocate_tiles(dtype, 4, STAGES, TILE, D)
    weights = gl.allocate_shared_memory(dtype, [TILE, TILE], gl.NVMMASharedLayout(128, 16, 2))
    lse_lines = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], line)
    notes = (lse_lines, None)
    if MASKED:
        notes = (lse_lines, gl.allocate_shared_memory(gl.int16, [STAGES, TILE], line))
    barriers = make_barriers(STAGES, MOVERS, APART)
    turns = turns_of(count_ptr, count, H)
    data = (dout_ptr, qkv_ptr, lse_ptr, dqkv_ptr)
    if PREPARED:
        gl.warp_specialize(
            [
                (
                    _multiply_backward,
                    (seed_ptr, tiles, weights, notes, barriers, turns, scale, dropout, H, MASKED, TURNS, ENGINE),
                ),
                (prepare, (places_ptr, angles_ptr, tiles, notes[1], barriers, turns, count, H, True)),
                (
                    _move_backward,
                    (data, places_ptr, tiles, lse_lines, barriers, turns, T, count, H, TURNS, APART, ENGINE),
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
                    (seed_ptr, tiles, weights, notes, barriers, turns, scale, dropout, H, MASKED, TURNS, ENGINE),
                ),
                (
                    _move_backward,
                    (data, places_ptr, tiles, lse_lines, barriers, turns, T, count, H, TURNS, APART, ENGINE),
                ),
            ],
            [MOVERS],
            [MOVERS_REGISTERS],
        )
