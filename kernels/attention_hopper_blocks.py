"""The backward kernel of `attention.py` for batches whose longest sequence has 129 to 256 tokens, on cards of compute
capability 9.0, in Gluon. It knows no dropout, for which its threads have no registers left.

`backward_queries` and `backward_keys` go over the pairs of blocks twice, seven products in all, for a program has room
for the gradient of one block. Here all of a group is in shared memory, two blocks of 128 tokens, and with it dq of one
block of keys until the other adds to it: five products, and every tensor is read and written once.

As in `attention_hopper.py` every warp keeps to one task, and blocks in shared memory go from one to the next:

    mover: loads q, k, v and dout, computes delta of their rows  →  multiplier: matrix products, results in place of
    what was read  →  mover: stores them in whole cache lines, and loads the next group's

k and v of a block are done with, and refilled, while the other block of keys is at work, so that the multiplier seldom
waits. A barrier is waited for by the parity of how often its stage has been used.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import eights, fetch_line, fetch_rows, half_rows, store_rows, turn, whole_rows
from .attention_parts import group_at, sight_of
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .tiles import chunk_of, split, vectors

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
def _items(groups_ptr, T, span, H: gl.constexpr):
    """How many there are for all programs together: heads of groups."""
    if groups_ptr is None:
        return T // span * H
    else:
        return gl.load(groups_ptr) * H


@gluon.jit
def _group_of(groups_ptr, item, span, H: gl.constexpr):
    """Head, and the group's first token and length."""
    start, length = group_at(groups_ptr, item // H, span)
    return item % H, start, length


@gluon.jit
def _note_sight(line, bounds_ptr, start, first, length, T, window, WINDOWED: gl.constexpr):
    """The first and last place that each row of a block sees, in a byte each; the last is before the first if none."""
    place = first + gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    low, size = sight_of(bounds_ptr, start, place, place < length, T, window, WINDOWED)
    none = size == 0
    low, last = gl.where(none, 1, low), gl.where(none, 0, low + size.to(gl.int32) - 1)
    line.store((low | (last << 8)).to(gl.int16))


@gluon.jit
def _from(place, lane):
    """Bits of a row's 32 places in a thread, set for those at or beyond a `place` of the block."""
    count = 2 * (place >> 3) + gl.minimum(gl.maximum((place & 7) - lane, 0), 2)
    return (-1 << (count >> 1)) << (count - (count >> 1))  # by 32 at once would be undefined


@gluon.jit
def _seen_of(line, key, scores: gl.constexpr):
    """Which places of the block of keys at `key` each row sees, from what `_note_sight` notes."""
    # A thread has two of each eight columns: a bit for each of them is all that it keeps of a row's sight.
    layout: gl.constexpr = eights(gl.num_warps())
    pairs: gl.constexpr = gl.SliceLayout(1, layout)
    sight = line.load(gl.SliceLayout(1, pairs)).to(gl.int32)
    low, end = (sight & 0xFF) - key, ((sight >> 8) & 0xFF) + 1 - key
    low, end = gl.minimum(gl.maximum(low, 0), BLOCK), gl.minimum(gl.maximum(end, 0), BLOCK)
    rest = gl.arange(0, 8, layout=gl.SliceLayout(0, pairs))
    bits = _from(low[:, None], (rest & 6)[None, :]) & ~_from(end[:, None], (rest & 6)[None, :])
    eight = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    which = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout))) & 1
    bit = 2 * eight[None, :, None] + which[None, None, :]
    seen = gl.reshape((bits[:, None, :] >> bit) & 1, [layout.shape[0], BLOCK]) != 0
    return gl.convert_layout(seen, scores, assert_trivial=True)


@gluon.jit
def _note_delta(line, outs, douts, stage):
    """rowsum(out * dout) of a block of rows."""
    D: gl.constexpr = douts.shape[2]
    ROWS: gl.constexpr = 256 // D * gl.num_warps() * 2
    layout: gl.constexpr = vectors(D, gl.num_warps())
    pieces = line._reinterpret(gl.float32, [BLOCK // ROWS, ROWS], line.layout)
    for piece in gl.static_range(BLOCK // ROWS):
        out = chunk_of(outs, 2 * stage, piece, ROWS).load(layout).to(gl.float32)
        dout = chunk_of(douts, stage, piece, ROWS).load(layout).to(gl.float32)
        pieces.index(piece).store(gl.sum(out * dout, 1))


@gluon.jit
def _write(weights, x):
    """Stores x (BLOCK, BLOCK) by its halves: they lie as results do, whose addresses then do for both."""
    halves = weights._reinterpret(weights.dtype, [2, BLOCK, BLOCK // 2], weights.layout)
    left, right = split(x, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK // 2, 16]))
    halves.index(0).store(left)
    halves.index(1).store(right)


@gluon.jit
def _multiply(groups_ptr, tiles, weights, parts, lines, barriers, T, span, scale, H: gl.constexpr):
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
    item, block = gl.program_id(0), 0
    # Asked for again and again: there is no register to keep it in.
    while item < _items(groups_ptr, T, span, H):
        length = _group_of(groups_ptr, item, span, H)[2]
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
            # The product goes on from minus delta, which then needs no register when there are least.
            less_delta = nothing - deltas.index(stage).load(of_rows)[:, None]
            dp = warpgroup_mma(dout, v.permute((1, 0)), less_delta, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            lse = lse_lines.index(stage).load(of_rows)
            p = gl.exp2(s * (scale * LOG2_E) - lse[:, None])
            if MASKED:
                p = gl.where(_seen_of(sights.index(stage), key * BLOCK, square), p, 0.0)
            _write(weights, p.to(dtype))
            fence_async_shared()
            dv = warpgroup_mma(weights.permute((1, 0)), dout, dv, use_acc=query > 0, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
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
                q.store((dq * scale).to(dtype))
                mbarrier.arrive(done.index(stage), count=1)
            query += 1
            if query == blocks:
                v.store(dv.to(dtype))
                k.store((dk * scale).to(dtype))
                mbarrier.arrive(kv_done.index(kv_stage), count=1)
                key, query = key + 1, 0
        item += gl.num_programs(0)
        block += blocks


@gluon.jit
def _store_block(
    tiles, stage, dqkv_ptr, angles_ptr, head, start, first, length,
    WHICH: gl.constexpr, H: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The gradient of a block of q, k or v, which is 0, 1 or 2; where there are angles, of turned rows as that of rows
    before."""
    D: gl.constexpr = tiles.shape[2]
    whole: gl.constexpr = whole_rows(D, gl.num_warps())
    half: gl.constexpr = half_rows(D, gl.num_warps())
    ROWS: gl.constexpr = whole.shape[0]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, half))
    columns = gl.arange(0, D // 2, layout=gl.SliceLayout(0, half))
    # How many there are is not known when compiling: unrolled, this would take more registers than there are.
    for chunk in range((gl.minimum(length - first, BLOCK) + ROWS - 1) // ROWS):
        place = first + chunk * ROWS + rows
        valid = place < length
        x1, x2 = split(chunk_of(tiles, stage, chunk, ROWS).load(whole), half)
        if angles_ptr is not None:
            if MASKED:
                at = angles_ptr + ((start + place).to(gl.int64)[:, None] * D + columns[None, :])
                cos = gl.load(at, mask=valid[:, None], other=0.0)
                sin = gl.load(at + D // 2, mask=valid[:, None], other=0.0)
            else:
                at = angles_ptr + (place[:, None] * D + columns[None, :])
                cos, sin = gl.load(at), gl.load(at + D // 2)
            x1, x2 = turn(x1, x2, cos.to(gl.float32), -sin.to(gl.float32))
        column = (WHICH * H + head) * D + columns
        at = dqkv_ptr + ((start + place).to(gl.int64)[:, None] * (3 * H * D) + column[None, :])
        store_rows(at, x1, valid, MASKED)
        store_rows(at + D // 2, x2, valid, MASKED)


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
    data, groups_ptr, bounds_ptr, angles_ptr, tiles, parts, lines, barriers, T, span, window,
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
    items = _items(groups_ptr, T, span, H)
    end = 2 * ((items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))
    position, n = gl.minimum(end, 0), 0
    position_ahead, ahead = position, n
    while position < end:
        loading = position_ahead < end
        storing = (n + STAGES == ahead) | (position_ahead >= end)
        if storing:
            head, start, length, first = _block_at(groups_ptr, position, span, H)
            mbarrier.wait(kv_done.index(n % STAGES), n // STAGES & 1)
            _store_block(k_tiles, n % STAGES, dqkv_ptr, angles_ptr, head, start, first, length, 1, H, MASKED)
            _store_block(v_tiles, n % STAGES, dqkv_ptr, None, head, start, first, length, 2, H, MASKED)
        if loading:
            head, start, length, first = _block_at(groups_ptr, position_ahead, span, H)
            stage, at, left = ahead % STAGES, start + first, length - first
            fetch_rows(k_tiles.index(stage), qkv_ptr + (H + head) * D, at, left, ROW, MASKED)
            fetch_rows(v_tiles.index(stage), qkv_ptr + (2 * H + head) * D, at, left, ROW, MASKED)
        if storing:
            head, start, length, first = _block_at(groups_ptr, position, span, H)
            mbarrier.wait(done.index(n % STAGES), n // STAGES & 1)
            _store_block(q_tiles, n % STAGES, dqkv_ptr, angles_ptr, head, start, first, length, 0, H, MASKED)
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
                _note_sight(sights.index(stage), bounds_ptr, start, first, length, T, window, WINDOWED)
            async_copy.wait_group(0)
            _note_delta(deltas.index(stage), outs, dout_tiles, stage)
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
    dqkv_ptr,  # (T, 3, H, D)
    T,
    span,  # of a group, the most it can have
    window,
    scale,
    H: gl.constexpr,
    D: gl.constexpr,
    WINDOWED: gl.constexpr,
    MULTIPLIERS: gl.constexpr,  # warps
    MULTIPLIERS_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    dout_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    parts = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK, D], gl.NVMMASharedLayout(128, 32, 2))
    weights = gl.allocate_shared_memory(dtype, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    lse_lines = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], line)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], line)
    sights = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK], line)
    barriers = _make_barriers(), _make_barriers(), _make_barriers()
    tiles, lines = (q_tiles, dout_tiles, k_tiles, v_tiles), (lse_lines, deltas, sights)
    data = (dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr)
    gl.warp_specialize(
        [
            (
                _move,
                (data, groups_ptr, bounds_ptr, angles_ptr, tiles, parts, lines, barriers, T, span, window, H, WINDOWED),
            ),
            (
                _multiply,
                (groups_ptr, tiles, weights, parts, lines, barriers, T, span, scale, H),
            ),
        ],
        [MULTIPLIERS],
        [MULTIPLIERS_REGISTERS],
    )
