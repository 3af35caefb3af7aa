"""The forward kernel of `attention.py` for groups of up to 128 tokens on cards of compute capability 9.0, in Gluon;
`attention_hopper_tile_backward.py` has the other.

A tile is computed as in `attention_kernels.py`. But there the warps of a program do one thing after the other: they
load, turn by rotary embedding, multiply and store, and wait in between. Here every warp keeps to one of these, and a
ring of stages in shared memory goes from one to the next:

    mover: loads q, k, v and dout  →  preparer: turns q and k where they lie, notes what each row sees
        →  multiplier: matrix products and softmax, results in place of what was read  →  mover: stores them

With neither angles nor masks there is nothing to prepare. Each step hands a stage on through a barrier of its own
(`full`, `ready`, `done`), which is waited for by the parity of how often the ring has gone round. The multiplier keeps
the accumulators of two products at once, so it has most of the registers.

Where groups fill their tiles, what rotary embedding needs is the same for all of them (`attention_hopper_prepare.py`):
q and k are turned while v and dout (`rest`) are still on their way, and the preparer turns dq and dk back (`back`).

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import fetch_rows, make_barriers, seen_of, store_rows
from .attention_hopper_prepare import prepare
from .attention_parts import generator_of, group_at, is_kept
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, warpgroup_mma
from .tiles import vectors

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _move_forward(qkv_ptr, groups_ptr, out_ptr, tiles, barriers, turns, H: gl.constexpr, TURNS: gl.constexpr):
    q_tiles, k_tiles, v_tiles = tiles
    full, rest, _, done, _ = barriers
    MASKED: gl.constexpr = groups_ptr is not None
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    ROW: gl.constexpr = 3 * H * D
    layout: gl.constexpr = vectors(D, gl.num_warps())
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    program, programs = gl.program_id(0), gl.num_programs(0)
    for i in range(-STAGES, turns):
        stage = (i + STAGES) % STAGES
        if i >= 0:
            item = program + i * programs
            start, length = group_at(groups_ptr, item // H, TILE)
            at = (start + rows).to(gl.int64)[:, None] * (H * D) + (item % H * D + columns)[None, :]
            mbarrier.wait(done.index(stage), (i // STAGES) & 1)
            store_rows(out_ptr + at, q_tiles.index(stage).load(layout), rows < length, MASKED)
        if i + STAGES < turns:
            item = program + (i + STAGES) * programs
            start, length = group_at(groups_ptr, item // H, TILE)
            qkv = qkv_ptr + item % H * D
            fetch_rows(q_tiles.index(stage), qkv, start, length, ROW, MASKED)
            fetch_rows(k_tiles.index(stage), qkv + H * D, start, length, ROW, MASKED)
            if TURNS:
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            fetch_rows(v_tiles.index(stage), qkv + 2 * H * D, start, length, ROW, MASKED)
            async_copy.mbarrier_arrive(rest.index(stage), increment_count=False)


@gluon.jit
def _multiply_forward(
    groups_ptr, seed_ptr, lse_ptr, tiles, sights, barriers, turns, T, scale, dropout,
    H: gl.constexpr, PREPARED: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    q_tiles, k_tiles, v_tiles = tiles
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
    for i in range(turns):
        stage = i % STAGES
        item = program + i * programs
        start, length = group_at(groups_ptr, item // H, TILE)
        q, k, v = q_tiles.index(stage), k_tiles.index(stage), v_tiles.index(stage)
        if PREPARED:
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        else:
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            fence_async_shared()
        s = warpgroup_mma(q, k.permute((1, 0)), gl.zeros([TILE, TILE], gl.float32, square), use_acc=False)
        if MASKED:
            s = gl.where(seen_of(sights.index(stage), square), s, float("-inf"))
        m = gl.max(s, 1) * (scale * LOG2_E)
        p = gl.exp2(s * (scale * LOG2_E) - m[:, None])
        total = gl.sum(p, 1)
        if seed_ptr is not None:
            kept = is_kept(generator_of(seed_ptr, item % H), start, 0, place[:, None], 0, others[None, :], dropout)
            p = gl.where(kept, p, 0.0)
        weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, narrow, 2))
        if TURNS:
            mbarrier.wait(rest.index(stage), (i // STAGES) & 1)
            fence_async_shared()
        out = warpgroup_mma(weights, v, gl.zeros([TILE, D], gl.float32, narrow), use_acc=False)
        share = 1.0 / total
        if seed_ptr is not None:
            share /= 1.0 - dropout
        out *= gl.convert_layout(share, gl.SliceLayout(1, narrow))[:, None]
        q.store(out.to(dtype))
        mbarrier.arrive(done.index(stage), count=1)
        lse = lse_ptr + (item % H).to(gl.int64) * T + start + place
        if MASKED:
            gl.store(lse, m + gl.log2(total), mask=place < length)
        else:
            gl.store(lse, m + gl.log2(total))


@gluon.jit
def forward_tile_hopper(
    qkv_ptr,  # (T, 3, H, D)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    angles_ptr,  # (TILE, D), cos and sin side by side, by position, or None
    seed_ptr,  # (1,) or None
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T): log2 of each row's sum of exponentials
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
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], rows)
    sights, positions = None, None
    if groups_ptr is not None:
        sights = gl.allocate_shared_memory(gl.int16, [STAGES, TILE], line)
        positions = gl.allocate_shared_memory(gl.int8, [STAGES, TILE], line)
        count = gl.load(groups_ptr)
    barriers = make_barriers(STAGES, MOVERS, TURNS)
    program, programs = gl.program_id(0), gl.num_programs(0)
    turns = (count * H - program + programs - 1) // programs
    tiles, notes = (q_tiles, k_tiles, v_tiles), (sights, positions)
    if PREPARED:
        gl.warp_specialize(
            [
                (
                    _multiply_forward,
                    (
                        groups_ptr,
                        seed_ptr,
                        lse_ptr,
                        tiles,
                        sights,
                        barriers,
                        turns,
                        T,
                        scale,
                        dropout,
                        H,
                        PREPARED,
                        TURNS,
                    ),
                ),
                (
                    prepare,
                    (groups_ptr, bounds_ptr, angles_ptr, tiles, notes, barriers, turns, T, window, H, WINDOWED, False),
                ),
                (_move_forward, (qkv_ptr, groups_ptr, out_ptr, tiles, barriers, turns, H, TURNS)),
            ],
            [PREPARERS, MOVERS],
            [PREPARERS_REGISTERS, MOVERS_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply_forward,
                    (
                        groups_ptr,
                        seed_ptr,
                        lse_ptr,
                        tiles,
                        sights,
                        barriers,
                        turns,
                        T,
                        scale,
                        dropout,
                        H,
                        PREPARED,
                        TURNS,
                    ),
                ),
                (_move_forward, (qkv_ptr, groups_ptr, out_ptr, tiles, barriers, turns, H, TURNS)),
            ],
            [MOVERS],
            [MOVERS_REGISTERS],
        )
