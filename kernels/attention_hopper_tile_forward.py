"""The forward kernel of `attention.py` for tiles of 128 tokens on cards of compute capability 9.0, in Gluon;
`attention_hopper_tile_backward.py` has the other.

A tile is computed as in `attention_kernels.py`. But there the warps of a program do one thing after the other: they
load, turn by rotary embedding, multiply and store, and wait in between. Here every warp keeps to one of these, and a
ring of stages in shared memory goes from one to the next:

    mover: loads q, k, v and dout  →  preparer: turns q and k where they lie, notes what each row sees
        →  multiplier: matrix products and softmax, results in place of what was read  →  mover: stores them

With neither angles nor masks there is nothing to prepare. Each step hands a stage on through a barrier of its own
(`full`, `ready`, `done`), which is waited for by the parity of how often the ring has gone round. The multiplier keeps
the accumulators of two products at once, so it has most of the registers. Forward, it begins the scores of the next
tile before it is done with one; backward, that gains nothing, for memory is what is waited for.

A tile is one sequence as long, or holds several that `pack_sequences` found for it: then the mover gathers the rows of
their tokens, and each row has a mask. Where a tile is one sequence, q and k are turned while v and dout (`rest`) are
still on their way. Backward, the preparer turns dq and dk back and completes `ready` a second time.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import (
    as_rows,
    fetch_rows,
    gather_rows,
    make_barriers,
    one_each,
    store_rows,
    tokens_of,
    turns_of,
    where_seen,
)
from .attention_hopper_prepare import prepare
from .attention_parts import generator_of, is_kept
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .tiles import allocate_tiles, vectors

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _move_forward(
    data, places_ptr, tiles, lse_lines, barriers, turns, T, slots, H: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    qkv_ptr, out_ptr, lse_ptr = data
    q_tiles, k_tiles, v_tiles = tiles
    full, rest, _, done = barriers
    MASKED: gl.constexpr = places_ptr is not None
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    ROW: gl.constexpr = 3 * H * D
    layout: gl.constexpr = vectors(D, gl.num_warps())
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
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
            head = item % H
            of_rows = item // H * TILE + rows
            mbarrier.wait(done.index(stage), (i // STAGES) & 1)
            if MASKED:
                (of_rows,) = as_rows(owners, TILE, layout)
            at = out_ptr + (of_rows.to(gl.int64)[:, None] * (H * D) + (head * D + columns)[None, :])
            store_rows(at, q_tiles.index(stage).load(layout), of_rows >= 0, MASKED)
            lse = lse_ptr + head.to(gl.int64) * T + owners
            gl.store(lse, lse_lines.index(stage).load(line), mask=owners >= 0)
        if i + STAGES < turns:
            tile, qkv = later // H, qkv_ptr + later % H * D
            if MASKED:
                (of_rows,) = as_rows(tokens, TILE, layout)
                gather_rows(q_tiles, stage, 0, qkv, of_rows, ROW)
                gather_rows(k_tiles, stage, 0, qkv + H * D, of_rows, ROW)
                gather_rows(v_tiles, stage, 0, qkv + 2 * H * D, of_rows, ROW)
            else:
                fetch_rows(q_tiles.index(stage), qkv, tile * TILE, TILE, ROW, MASKED)
                fetch_rows(k_tiles.index(stage), qkv + H * D, tile * TILE, TILE, ROW, MASKED)
                if APART:
                    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                fetch_rows(v_tiles.index(stage), qkv + 2 * H * D, tile * TILE, TILE, ROW, MASKED)
            async_copy.mbarrier_arrive(rest.index(stage), increment_count=False)
        tokens, owners = next_tokens, next_owners


@gluon.jit
def _scores(q_tiles, k_tiles, barriers, turn, PREPARED: gl.constexpr, layout: gl.constexpr):
    """Begin to multiply q and k of the tile of a turn, when it has come."""
    full, _, ready, _ = barriers
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    stage = turn % STAGES
    if PREPARED:
        mbarrier.wait(ready.index(stage), (turn // STAGES) & 1)
    else:
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        fence_async_shared()
    nothing = gl.zeros([TILE, TILE], gl.float32, layout)
    q, k = q_tiles.index(stage), k_tiles.index(stage)
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _multiply_forward(
    seed_ptr, tiles, notes, barriers, turns, scale, dropout,
    H: gl.constexpr, MASKED: gl.constexpr, PREPARED: gl.constexpr,
):  # fmt: skip
    q_tiles, k_tiles, v_tiles = tiles
    lse_lines, sights = notes
    _, _, _, done = barriers
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TILE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    place = gl.arange(0, TILE, layout=gl.SliceLayout(1, square))
    others = gl.arange(0, TILE, layout=gl.SliceLayout(0, square))
    program, programs = gl.program_id(0), gl.num_programs(0)
    s = gl.zeros([TILE, TILE], gl.float32, square)
    if turns > 0:
        s = warpgroup_mma_wait(0, deps=(_scores(q_tiles, k_tiles, barriers, 0, PREPARED, square),))
    for i in range(turns):
        stage = i % STAGES
        item = program + i * programs
        q, v = q_tiles.index(stage), v_tiles.index(stage)
        if MASKED:
            s = where_seen(s, sights.index(stage), 0, float("-inf"), square)
        m = gl.max(s, 1) * (scale * LOG2_E)
        p = gl.exp2(s * (scale * LOG2_E) - m[:, None])
        total = gl.sum(p, 1)
        if seed_ptr is not None:
            generator, start = generator_of(seed_ptr, item % H), item // H * TILE
            kept = is_kept(generator, start, 0, place[:, None], 0, others[None, :], dropout)
            p = gl.where(kept, p, 0.0)
        weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, narrow, 2))
        nothing = gl.zeros([TILE, D], gl.float32, narrow)
        out = warpgroup_mma(weights, v, nothing, use_acc=False, is_async=True)
        # Those of the next turn meanwhile; of the last once more, for nothing, since what is under way may not branch.
        s = _scores(q_tiles, k_tiles, barriers, gl.minimum(i + 1, turns - 1), PREPARED, square)
        out = warpgroup_mma_wait(1, deps=(out,))
        share = 1.0 / total
        if seed_ptr is not None:
            share /= 1.0 - dropout
        out *= gl.convert_layout(share, gl.SliceLayout(1, narrow))[:, None]
        q.store(out.to(dtype))
        lse_lines.index(stage).store(m + gl.log2(total))
        mbarrier.arrive(done.index(stage), count=1)
        s = warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def forward_tile_hopper(
    qkv_ptr,  # (T, 3, H, D)
    count_ptr,  # (1,) or None
    places_ptr,  # (2, count, TILE) or None, as `pack_sequences` gives both
    angles_ptr,  # as `tile_angles` gives it, without places also (TILE, D) of it; or None
    seed_ptr,  # (1,) or None
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T): log2 of each row's sum of exponentials
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
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = allocate_tiles(qkv_ptr.dtype.element_ty, 3, STAGES, TILE, D)
    lse_lines = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], line)
    notes = (lse_lines, None)
    if MASKED:
        notes = (lse_lines, gl.allocate_shared_memory(gl.int16, [STAGES, TILE], line))
    barriers = make_barriers(STAGES, MOVERS, APART)
    turns = turns_of(count_ptr, count, H)
    data = (qkv_ptr, out_ptr, lse_ptr)
    if PREPARED:
        gl.warp_specialize(
            [
                (_multiply_forward, (seed_ptr, tiles, notes, barriers, turns, scale, dropout, H, MASKED, PREPARED)),
                (prepare, (places_ptr, angles_ptr, tiles, notes[1], barriers, turns, count, H, False)),
                (_move_forward, (data, places_ptr, tiles, lse_lines, barriers, turns, T, count, H, APART)),
            ],
            [PREPARERS, MOVERS],
            [PREPARERS_REGISTERS, MOVERS_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply_forward, (seed_ptr, tiles, notes, barriers, turns, scale, dropout, H, MASKED, PREPARED)),
                (_move_forward, (data, places_ptr, tiles, lse_lines, barriers, turns, T, count, H, APART)),
            ],
            [MOVERS],
            [MOVERS_REGISTERS],
        )
