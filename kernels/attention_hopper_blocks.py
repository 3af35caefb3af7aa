"""The backward kernel of `attention.py` for batches whose longest sequence has 129 to 256 tokens, on cards of compute
capability 9.0, in Gluon.

`backward_queries` and `backward_keys` go over the pairs of blocks twice, seven products in all, for a program has room
for the gradient of one block. Here all of a group is in shared memory, two blocks of 128 tokens, and with it dq of one
block of keys until the other adds to it: five products, and every tensor is read and written once.

As in `attention_hopper_tile_forward.py` every warp keeps to one task, and blocks in shared memory go from one to the
next:

    mover: loads q, k, v and dout, computes delta of their rows  →  multiplier: matrix products, results in place of
    what was read  →  mover: stores them in whole cache lines, and loads the next group's

k and v of a block are done with, and refilled, while the other block of keys is at work, so that the multiplier seldom
waits. A barrier is waited for by the parity of how often its stage has been used.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import (
    fetch_line,
    fetch_rows,
    items_of,
    more_of,
    note_delta,
    note_sight,
    share_of,
    store_block,
    where_seen,
)
from .attention_parts import generator_of, group_at, is_kept
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .tiles import allocate_tiles, split

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK = gl.constexpr(128)
STAGES = gl.constexpr(2)  # of either ring: one group


@gluon.jit
def _make_barriers():
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=1)
    return barriers


@gluon.jit
def _group_of(groups_ptr, item, span, H: gl.constexpr):
    """Head, and the group's first token and length."""
    start, length = group_at(groups_ptr, item // H, span)
    return item % H, start, length


@gluon.jit
def _write(weights, x):
    """Stores x (BLOCK, BLOCK) by its halves: they lie as results do, whose addresses then do for both."""
    halves = weights._reinterpret(weights.dtype, [2, BLOCK, BLOCK // 2], weights.layout)
    left, right = split(x, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK // 2, 16]))
    halves.index(0).store(left)
    halves.index(1).store(right)


@gluon.jit
def _dp_less_delta(dout, v, deltas, square: gl.constexpr):
    """dP - delta, on its way. The product goes on from minus delta, which has no registers then when all are taken."""
    less = gl.zeros([BLOCK, BLOCK], gl.float32, square) - deltas.load(gl.SliceLayout(1, square))[:, None]
    return warpgroup_mma(dout, v.permute((1, 0)), less, is_async=True)


@gluon.jit
def _multiply(groups_ptr, seed_ptr, tiles, weights, parts, lines, barriers, T, span, scale, dropout, H: gl.constexpr):
    """`weights` (BLOCK, BLOCK) holds P, then dS, for the products that take them on their side; `parts` dq of the keys
    before."""
    q_tiles, dout_tiles, k_tiles, v_tiles = tiles
    lse_lines, deltas, sights = lines
    ready, done, kv_done = barriers
    MASKED: gl.constexpr = groups_ptr is not None
    D: gl.constexpr = q_tiles.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, square)
    rows = gl.arange(0, BLOCK, layout=of_rows)
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, square))
    item, block = gl.program_id(0), 0
    # Asked for again and again: there is no register to keep it in.
    while item < items_of(groups_ptr, T, span, H):
        head, start, length = _group_of(groups_ptr, item, span, H)
        dk = gl.zeros([BLOCK, D], gl.float32, narrow)
        dv = gl.zeros([BLOCK, D], gl.float32, narrow)
        blocks = (length + BLOCK - 1) // BLOCK
        key, query = 0, 0
        # One loop over pairs: in two, addresses of k and v would be kept in registers, of which there are none left.
        while key < blocks:
            stage, kv_stage = (block + query) % STAGES, (block + key) % STAGES
            q, dout, k, v = (
                q_tiles.index(stage),
                dout_tiles.index(stage),
                k_tiles.index(kv_stage),
                v_tiles.index(kv_stage),
            )
            nothing = gl.zeros([BLOCK, BLOCK], gl.float32, square)
            if key == 0:
                mbarrier.wait(ready.index(stage), (block + query) // STAGES & 1)
            s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if seed_ptr is None:
                dp = _dp_less_delta(dout, v, deltas.index(stage), square)
                s = warpgroup_mma_wait(1, deps=(s,))
            else:
                s = warpgroup_mma_wait(0, deps=(s,))
            lse = lse_lines.index(stage).load(of_rows)
            p = gl.exp2(s * (scale * LOG2_E) - lse[:, None])
            if MASKED:
                p = where_seen(p, sights.index(stage), key * BLOCK, 0.0, square)
            kept = p
            if seed_ptr is not None:
                # What is dropped is told by its sign from here on: dS of it is delta alone.
                queries, keys = query * BLOCK, key * BLOCK
                chosen = is_kept(
                    generator_of(seed_ptr, head), start, queries, rows[:, None], keys, columns[None, :], dropout
                )
                p = gl.where(chosen, p, -p)
                kept = gl.maximum(p, 0.0)
            _write(weights, kept.to(dtype))
            if seed_ptr is not None:
                dp = _dp_less_delta(dout, v, deltas.index(stage), square)
            fence_async_shared()
            dv = warpgroup_mma(weights.permute((1, 0)), dout, dv, use_acc=query > 0, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            if seed_ptr is not None:
                dp = gl.where(p > 0, dp, deltas.index(stage).load(of_rows)[:, None])
            ds = (p * dp).to(dtype)
            dv = warpgroup_mma_wait(0, deps=(dv,))
            _write(weights, ds)
            fence_async_shared()
            dk = warpgroup_mma(weights.permute((1, 0)), q, dk, use_acc=query > 0, is_async=True)
            ds = gl.convert_layout(ds, gl.DotOperandLayout(0, narrow, 2))
            dq = warpgroup_mma(ds, k, gl.zeros([BLOCK, D], gl.float32, narrow), use_acc=False, is_async=True)
            dq, dk = warpgroup_mma_wait(0, deps=(dq, dk))
            if key > 0:
                dq += parts.index(stage).load(narrow)
            if key + 1 < blocks:
                parts.index(stage).store(dq)
            else:
                q.store((dq * (scale * more_of(seed_ptr, dropout))).to(dtype))
                mbarrier.arrive(done.index(stage), count=1)
            query += 1
            if query == blocks:
                more = more_of(seed_ptr, dropout)
                v.store((dv * more).to(dtype))
                k.store((dk * (scale * more)).to(dtype))
                mbarrier.arrive(kv_done.index(kv_stage), count=1)
                key, query = key + 1, 0
        item += gl.num_programs(0)
        block += blocks


@gluon.jit
def _block_at(groups_ptr, position, span, H: gl.constexpr):
    """Head, and the group's first token, length and first place of the block at this program's `position`, two for each
    of its items."""
    head, start, length = _group_of(groups_ptr, gl.program_id(0) + position // 2 * gl.num_programs(0), span, H)
    return head, start, length, position % 2 * BLOCK


@gluon.jit
def _after(position, length):
    """The position of the block that follows one of a group of this length."""
    return position + gl.where((position % 2 == 0) & (length <= BLOCK), 2, 1)


@gluon.jit
def _move(
    data, groups_ptr, bounds_ptr, angles_ptr, seed_ptr, tiles, parts, lines, barriers, T, span, window, dropout,
    H: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Stores what has been computed of a block and loads the one that takes its place, two blocks on."""
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr = data
    q_tiles, dout_tiles, k_tiles, v_tiles = tiles
    lse_lines, deltas, sights = lines
    ready, done, kv_done = barriers
    MASKED: gl.constexpr = groups_ptr is not None
    D: gl.constexpr = q_tiles.shape[2]
    ROW: gl.constexpr = 3 * H * D
    # Where dq of the first keys will be: until then nobody has been there.
    outs = parts._reinterpret(q_tiles.dtype, [2 * STAGES, BLOCK, D], q_tiles.layout)
    items = items_of(groups_ptr, T, span, H)
    end = 2 * ((items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))
    position, n = gl.minimum(end, 0), 0
    position_ahead, ahead = position, n
    while position < end:
        loading = position_ahead < end
        storing = (n + STAGES == ahead) | (position_ahead >= end)
        if storing:
            head, start, length, first = _block_at(groups_ptr, position, span, H)
            mbarrier.wait(kv_done.index(n % STAGES), n // STAGES & 1)
            store_block(k_tiles, n % STAGES, dqkv_ptr, angles_ptr, head, start, first, length, None, 1, H, MASKED)
            store_block(v_tiles, n % STAGES, dqkv_ptr, None, head, start, first, length, None, 2, H, MASKED)
        if loading:
            head, start, length, first = _block_at(groups_ptr, position_ahead, span, H)
            stage, at, left = ahead % STAGES, start + first, length - first
            fetch_rows(k_tiles.index(stage), qkv_ptr + (H + head) * D, at, left, ROW, MASKED)
            fetch_rows(v_tiles.index(stage), qkv_ptr + (2 * H + head) * D, at, left, ROW, MASKED)
        if storing:
            head, start, length, first = _block_at(groups_ptr, position, span, H)
            mbarrier.wait(done.index(n % STAGES), n // STAGES & 1)
            store_block(q_tiles, n % STAGES, dqkv_ptr, angles_ptr, head, start, first, length, None, 0, H, MASKED)
            position, n = _after(position, length), n + 1
        if loading:
            head, start, length, first = _block_at(groups_ptr, position_ahead, span, H)
            stage, at, left = ahead % STAGES, start + first, length - first
            fetch_rows(q_tiles.index(stage), qkv_ptr + head * D, at, left, ROW, MASKED)
            fetch_rows(dout_tiles.index(stage), dout_ptr + head * D, at, left, H * D, MASKED)
            fetch_rows(outs.index(2 * stage), out_ptr + head * D, at, left, H * D, MASKED)
            fetch_line(lse_lines.index(stage), lse_ptr + head.to(gl.int64) * T, at, left, MASKED)
            async_copy.commit_group()
            if MASKED:
                note_sight(sights.index(stage), bounds_ptr, start, first, length, T, window, WINDOWED)
            async_copy.wait_group(0)
            note_delta(
                deltas.index(stage), outs, 2 * stage, dout_tiles, stage, None, BLOCK, share_of(seed_ptr, dropout)
            )
            fence_async_shared()
            mbarrier.arrive(ready.index(stage), count=1)
            position_ahead, ahead = _after(position_ahead, length), ahead + 1


@gluon.jit
def backward_blocks_hopper(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D), q and k turned where there are angles
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    angles_ptr,  # (T, D), cos and sin side by side, (span, D) without groups, or None
    seed_ptr,  # (1,) or None
    dqkv_ptr,  # (T, 3, H, D)
    T,
    span,  # of a group, the most it can have
    window,
    scale,
    dropout,
    H: gl.constexpr,
    D: gl.constexpr,
    WINDOWED: gl.constexpr,
    MULTIPLIERS: gl.constexpr,  # warps
    MULTIPLIERS_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = allocate_tiles(dtype, 4, STAGES, BLOCK, D)
    parts = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK, D], gl.NVMMASharedLayout(128, 32, 2))
    weights = gl.allocate_shared_memory(dtype, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    lse_lines = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], line)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], line)
    sights = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK], line)
    barriers = _make_barriers(), _make_barriers(), _make_barriers()
    lines = (lse_lines, deltas, sights)
    data = (dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr)
    gl.warp_specialize(
        [
            (
                _move,
                (
                    data,
                    groups_ptr,
                    bounds_ptr,
                    angles_ptr,
                    seed_ptr,
                    tiles,
                    parts,
                    lines,
                    barriers,
                    T,
                    span,
                    window,
                    dropout,
                    H,
                    WINDOWED,
                ),
            ),
            (
                _multiply,
                (groups_ptr, seed_ptr, tiles, weights, parts, lines, barriers, T, span, scale, dropout, H),
            ),
        ],
        [MULTIPLIERS],
        [MULTIPLIERS_REGISTERS],
    )
