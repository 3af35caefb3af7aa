"""The backward kernel of `attention.py` for batches whose longest sequence has 257 to 512 tokens, on cards of compute
capability 9.0, in Gluon.

`backward_queries` and `backward_keys` go over the pairs of blocks twice, seven products in all. Here one block of 128
keys after the other meets all queries of its group, 64 at a step, and keeps dk and dv in registers; dq of all steps
lies in shared memory, where one block of keys after the other adds to it: five products, and no atomics.

Scores lie on their side, a row for each key, so that P and dS come out of one product as the next takes them in, from
registers: only dq wants dS through shared memory. As in `attention_hopper_tile_forward.py` every warp keeps to one
task:

    loader: brings k of a block; through a ring of stages its v, which goes on to registers, then q and dout step by
    step; computes delta of rows that come for the first time  →  two multipliers, each with half of a block's keys:
    matrix products and softmax, scores of the next step beside the last products of this  →  storer: takes dq away when
    no more keys are to come, and dk when its keys have met all queries

The multipliers run half a step apart, for the second adds to dq what the first has added to: one multiplies while the
other computes exponentials.

A barrier is waited for by the parity of how often its stage has been used.

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
    store_rows,
    where_seen,
)
from .attention_parts import generator_of, group_at, is_kept
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK = gl.constexpr(128)  # keys
STEP = gl.constexpr(64)  # queries
STEPS = gl.constexpr(8)  # of the longest group
STAGES = gl.constexpr(3)
# The first of each kind of barriers. They are one array: each would take a few bytes more, which are not there.
FULL, K_FULL = gl.constexpr(0), gl.constexpr(3)  # of a stage, and k: completed by all copies of the loader's warps
DONE, K_DONE = gl.constexpr(5), gl.constexpr(8)  # by both multipliers
READY, NOTED = gl.constexpr(10), gl.constexpr(13)  # delta of a step that is new, and what a block's rows see
HANDED = gl.constexpr(15)  # dq of a step, to the second multiplier
DQ_DONE, DQ_FREE = gl.constexpr(18), gl.constexpr(26)
K_FREE = gl.constexpr(34)
BARRIERS = gl.constexpr(35)


@gluon.jit
def _steps_of(key, length, window, WINDOWED: gl.constexpr):
    """The first step of queries that see some of the block of keys at `key`, and the one behind the last."""
    first, end = 0, length
    if WINDOWED:
        first, end = gl.maximum(key - window, 0) // STEP, gl.minimum(key + BLOCK + window, length)
    return first, (end + STEP - 1) // STEP


@gluon.jit
def _is_new(key, step, window, WINDOWED: gl.constexpr):
    """Whether no block of keys has met this step before the one at `key`."""
    new = key == 0
    if WINDOWED:
        new = new | (step * STEP >= key + window)
    return new


@gluon.jit
def _is_final(key, step, length, window, WINDOWED: gl.constexpr):
    """Whether no block of keys will meet this step after the one at `key`."""
    final = key + BLOCK >= length
    if WINDOWED:
        final = final | (key + BLOCK >= step * STEP + STEP + window)
    return final


@gluon.jit
def _block_after(groups_ptr, at, items, span, H: gl.constexpr):
    """The block of keys that a program takes after `at`: item, first key, the group's first token and length, and the
    number of its first step among all that the program has come to."""
    item, key, start, length, base = at
    key += BLOCK
    if key >= length:
        item += gl.num_programs(0)
        key = 0
        base += (length + STEP - 1) // STEP
        if item < items:
            start, length = group_at(groups_ptr, item // H, span)
    return item, key, start, length, base


@gluon.jit
def _step_after(groups_ptr, at, step, end, n, blocks, items, span, window, H: gl.constexpr, WINDOWED: gl.constexpr):
    """What `_block_after` returns of the step after `step`, then that step, its place in the ring, and its block."""
    step, n = step + 1, n + 1
    item, key, start, length, base = at
    if step == end:
        item, key, start, length, base = _block_after(groups_ptr, at, items, span, H)
        # v comes before it.
        step, n, blocks = _steps_of(key, length, window, WINDOWED)[0], n + 1, blocks + 1
    return (item, key, start, length, base), step, n, blocks


@gluon.jit
def _first_block(groups_ptr, items, span, H: gl.constexpr):
    start, length = 0, 0
    if gl.program_id(0) < items:
        start, length = group_at(groups_ptr, gl.program_id(0) // H, span)
    return gl.program_id(0), 0, start, length, 0


@gluon.jit
def _note_delta(memory, delta_ptr, T, share, of):
    """delta of a step's rows times `share`, `of` which: its place in the ring, its number, head, first token and how
    many follow."""
    ring, _, _, parts, lines, _, barriers = memory
    n, number, head, start, left = of
    stage = n % STAGES
    halves = ring._reinterpret(ring.dtype, [2 * STAGES, STEP, ring.shape[2]], ring.layout)
    outs = parts._reinterpret(ring.dtype, [2 * STEPS, STEP, ring.shape[2]], ring.layout)
    line, row = lines.index(STAGES + stage), delta_ptr + (head.to(gl.int64) * T + start)
    note_delta(line, outs, number % STEPS * 2, halves, 2 * stage + 1, row, left, share)
    mbarrier.arrive(barriers.index(READY + number % STAGES), count=1)


@gluon.jit
def _load(
    data, groups_ptr, bounds_ptr, seed_ptr, memory, T, span, window, dropout, H: gl.constexpr, WINDOWED: gl.constexpr
):  # fmt: skip
    """Computes delta, and what rows see, while the next copies are on their way."""
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr = data
    ring, k_tiles, _, parts, lines, sights, barriers = memory
    MASKED: gl.constexpr = groups_ptr is not None
    D: gl.constexpr = ring.shape[2]
    ROW: gl.constexpr = 3 * H * D
    halves = ring._reinterpret(ring.dtype, [2 * STAGES, STEP, D], ring.layout)
    # Before a step's first dq, `out` of its rows is there.
    outs = parts._reinterpret(ring.dtype, [2 * STEPS, STEP, D], ring.layout)
    items = items_of(groups_ptr, T, span, H)
    item, key, start, length, base = _first_block(groups_ptr, items, span, H)
    n, blocks = 0, 0
    new, before = False, (n, n, item, start, length)
    share = share_of(seed_ptr, dropout)
    while item < items:
        head, slot, stage = item % H, blocks % 2, n % STAGES
        row = head.to(gl.int64) * T
        if blocks >= 2:
            mbarrier.wait(barriers.index(K_FREE), blocks & 1)
        fetch_rows(k_tiles.index(slot), qkv_ptr + (H + head) * D, start + key, length - key, ROW, MASKED)
        async_copy.mbarrier_arrive(barriers.index(K_FULL + slot), increment_count=False)
        if n >= STAGES:
            mbarrier.wait(barriers.index(DONE + stage), (n // STAGES - 1) & 1)
        fetch_rows(ring.index(stage), qkv_ptr + (2 * H + head) * D, start + key, length - key, ROW, MASKED)
        async_copy.mbarrier_arrive(barriers.index(FULL + stage), increment_count=False)
        async_copy.commit_group()
        if new:
            async_copy.wait_group(1)
            _note_delta(memory, delta_ptr, T, share, before)
        if MASKED:
            note_sight(sights.index(slot), bounds_ptr, start, key, length, T, window, WINDOWED)
            mbarrier.arrive(barriers.index(NOTED + slot), count=1)
        new, n = False, n + 1
        first, end = _steps_of(key, length, window, WINDOWED)
        for step in range(first, end):
            stage, at, left, number = n % STAGES, start + step * STEP, length - step * STEP, base + step
            if n >= STAGES:
                mbarrier.wait(barriers.index(DONE + stage), (n // STAGES - 1) & 1)
            fetch_rows(halves.index(2 * stage), qkv_ptr + head * D, at, left, ROW, MASKED)
            fetch_rows(halves.index(2 * stage + 1), dout_ptr + head * D, at, left, H * D, MASKED)
            fetch_line(lines.index(stage), lse_ptr + row, at, left, MASKED)
            was_new, new = new, _is_new(key, step, window, WINDOWED)
            if new:
                if number >= STEPS:
                    mbarrier.wait(barriers.index(DQ_FREE + number % STEPS), (number // STEPS - 1) & 1)
                fetch_rows(outs.index(number % STEPS * 2), out_ptr + head * D, at, left, H * D, MASKED)
            else:
                fetch_line(lines.index(STAGES + stage), delta_ptr + row, at, left, MASKED)
            async_copy.mbarrier_arrive(barriers.index(FULL + stage), increment_count=False)
            async_copy.commit_group()
            if was_new:
                async_copy.wait_group(1)
                _note_delta(memory, delta_ptr, T, share, before)
            before, n = (n, number, head, at, left), n + 1
        item, key, start, length, base = _block_after(groups_ptr, (item, key, start, length, base), items, span, H)
        blocks += 1
    if new:
        async_copy.wait_group(0)
        _note_delta(memory, delta_ptr, T, share, before)


@gluon.jit
def _store_dv(
    dqkv_ptr, dv, head, start, first, length, H: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """From registers: no room in shared memory is free that is not needed at once."""
    D: gl.constexpr = dv.shape[1]
    place = first + gl.arange(0, dv.shape[0], layout=gl.SliceLayout(1, layout))
    column = (2 * H + head) * D + gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = dqkv_ptr + ((start + place).to(gl.int64)[:, None] * (3 * H * D) + column[None, :])
    store_rows(at, dv.to(dqkv_ptr.dtype.element_ty), place < length, MASKED)


@gluon.jit
def _multiply(
    dqkv_ptr, groups_ptr, seed_ptr, memory, T, span, window, scale, dropout,
    WHICH: gl.constexpr, H: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Everything of one half of each block of keys: the first, or the second, by `WHICH`."""
    ring, k_tiles, weights, parts, lines, sights, barriers = memory
    MASKED: gl.constexpr = groups_ptr is not None
    D: gl.constexpr = ring.shape[2]
    HALF: gl.constexpr = BLOCK // 2
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = ring.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, STEP, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    of_columns: gl.constexpr = gl.SliceLayout(0, square)
    rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, square))
    columns = gl.arange(0, STEP, layout=of_columns)
    halves = ring._reinterpret(dtype, [2 * STAGES, STEP, D], ring.layout)
    k_halves = k_tiles._reinterpret(dtype, [4, HALF, D], k_tiles.layout)
    sight_halves = sights._reinterpret(gl.int32, [4, HALF], sights.layout)
    items = items_of(groups_ptr, T, span, H)
    at = _first_block(groups_ptr, items, span, H)
    step, n, blocks = 0, 1, 0
    if at[0] < items:
        mbarrier.wait(barriers.index(K_FULL), 0)
        mbarrier.wait(barriers.index(FULL + 1), 0)
        fence_async_shared()
    dk = gl.zeros([HALF, D], gl.float32, narrow)
    dv = gl.zeros([HALF, D], gl.float32, narrow)
    v = gl.zeros([HALF, D], dtype, gl.DotOperandLayout(0, square, 2))
    nothing = gl.zeros([HALF, STEP], gl.float32, square)
    s = warpgroup_mma(k_halves.index(WHICH), halves.index(2).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    generator = None
    if seed_ptr is not None:
        generator = generator_of(seed_ptr, at[0] % H)
    while at[0] < items:
        item, key, start, length, base = at
        stage, half, number = n % STAGES, blocks % 2 * 2 + WHICH, base + step
        nth = n - 1 - blocks  # step, where n counts what comes through the ring
        first, end = _steps_of(key, length, window, WINDOWED)
        last = step + 1 == end
        q, dout, k = halves.index(2 * stage), halves.index(2 * stage + 1), k_halves.index(half)
        if step == first:
            mbarrier.wait(barriers.index(FULL + (n - 1) % STAGES), (n - 1) // STAGES & 1)
            v = halves.index((n - 1) % STAGES * 2 + WHICH).load(gl.DotOperandLayout(0, square, 2))
            mbarrier.arrive(barriers.index(DONE + (n - 1) % STAGES), count=1)
            if MASKED:
                mbarrier.wait(barriers.index(NOTED + blocks % 2), blocks // 2 & 1)
            if seed_ptr is not None:
                generator = generator_of(seed_ptr, item % H)
        new = _is_new(key, step, window, WINDOWED)
        if new:
            mbarrier.wait(barriers.index(READY + number % STAGES), number // STAGES & 1)
        # The product goes on from minus delta.
        less_delta = gl.zeros([HALF, STEP], gl.float32, square) - lines.index(STAGES + stage).load(of_columns)[None, :]
        dp = warpgroup_mma(v, dout.permute((1, 0)), less_delta, is_async=True)
        lse = lines.index(stage).load(of_columns)
        p = gl.exp2(s * (scale * LOG2_E) - lse[None, :])
        if MASKED:
            p = where_seen(p, sight_halves.index(half), step * STEP, 0.0, square)
        kept = p
        if seed_ptr is not None:
            # What is dropped is told by its sign from here on: dS of it is delta alone.
            chosen = is_kept(
                generator, start, step * STEP, columns[None, :], key + WHICH * HALF, rows[:, None], dropout
            )
            p = gl.where(chosen, p, -p)
            kept = gl.maximum(p, 0.0)
        taken = gl.convert_layout(kept.to(dtype), gl.DotOperandLayout(0, narrow, 2))
        dv = warpgroup_mma(taken, dout, dv, use_acc=step > first, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        if seed_ptr is not None:
            dp = gl.where(p > 0, dp, lines.index(STAGES + stage).load(of_columns)[None, :])
        ds = (p * dp).to(dtype)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        at_2, step_2, n_2, blocks_2 = _step_after(
            groups_ptr, at, step, end, n, blocks, items, span, window, H, WINDOWED
        )
        stage_2 = n_2 % STAGES
        if at_2[0] < items:
            if last:
                mbarrier.wait(barriers.index(K_FULL + blocks_2 % 2), blocks_2 // 2 & 1)
            mbarrier.wait(barriers.index(FULL + stage_2), n_2 // STAGES & 1)
        if WHICH == 1:
            mbarrier.wait(barriers.index(HANDED + nth % STAGES), nth // STAGES & 1)
        weights.index(WHICH).store(ds)
        fence_async_shared()
        nothing = gl.zeros([STEP, D], gl.float32, narrow)
        dq = warpgroup_mma(weights.index(WHICH).permute((1, 0)), k, nothing, use_acc=False, is_async=True)
        taken = gl.convert_layout(ds, gl.DotOperandLayout(0, narrow, 2))
        dk = warpgroup_mma(taken, q, dk, use_acc=step > first, is_async=True)
        # Scores of the next step, of whatever is there if there is none: a branch would end what goes on beside.
        nothing = gl.zeros([HALF, STEP], gl.float32, square)
        q_2, k_2 = halves.index(2 * stage_2), k_halves.index(blocks_2 % 2 * 2 + WHICH)
        s = warpgroup_mma(k_2, q_2.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(2, deps=(dq,))
        part = parts.index(number % STEPS)
        if WHICH == 1:
            part.store(dq + part.load(narrow))
        else:
            part.store(gl.where(new, dq, dq + part.load(narrow)))
            mbarrier.arrive(barriers.index(HANDED + nth % STAGES), count=1)
        dk, s = warpgroup_mma_wait(0, deps=(dk, s))
        mbarrier.arrive(barriers.index(DONE + stage), count=1)
        if WHICH == 1 and _is_final(key, step, length, window, WINDOWED):
            mbarrier.arrive(barriers.index(DQ_DONE + number % STEPS), count=1)
        if last:
            more = more_of(seed_ptr, dropout)
            k.store((dk * (scale * more)).to(dtype))
            mbarrier.arrive(barriers.index(K_DONE + blocks % 2), count=1)
            _store_dv(dqkv_ptr, dv * more, item % H, start, key + WHICH * HALF, length, H, MASKED, narrow)
        at, step, n, blocks = at_2, step_2, n_2, blocks_2


@gluon.jit
def _store(
    dqkv_ptr, groups_ptr, angles_ptr, seed_ptr, memory, T, span, window, scale, dropout,
    H: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    _, k_tiles, _, parts, _, _, barriers = memory
    MASKED: gl.constexpr = groups_ptr is not None
    items = items_of(groups_ptr, T, span, H)
    item, key, start, length, base = _first_block(groups_ptr, items, span, H)
    blocks = 0
    scale *= more_of(seed_ptr, dropout)
    while item < items:
        head, slot = item % H, blocks % 2
        first, end = _steps_of(key, length, window, WINDOWED)
        for step in range(first, end):
            if _is_final(key, step, length, window, WINDOWED):
                number, row = base + step, step * STEP
                which = number % STEPS
                mbarrier.wait(barriers.index(DQ_DONE + which), number // STEPS & 1)
                store_block(parts, which, dqkv_ptr, angles_ptr, head, start, row, length, scale, 0, H, MASKED)
                mbarrier.arrive(barriers.index(DQ_FREE + which), count=1)
        mbarrier.wait(barriers.index(K_DONE + slot), blocks // 2 & 1)
        store_block(k_tiles, slot, dqkv_ptr, angles_ptr, head, start, key, length, None, 1, H, MASKED)
        mbarrier.arrive(barriers.index(K_FREE), count=1)
        item, key, start, length, base = _block_after(groups_ptr, (item, key, start, length, base), items, span, H)
        blocks += 1


@gluon.jit
def backward_steps_hopper(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D), q and k turned where there are angles
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    angles_ptr,  # (T, D), cos and sin side by side, (span, D) without groups, or None
    seed_ptr,  # (1,) or None
    dqkv_ptr,  # (T, 3, H, D)
    delta_ptr,  # (H, T): rowsum(out * dout), times the share of weights that dropout leaves
    T,
    span,  # of a group, the most it can have
    window,
    scale,
    dropout,
    H: gl.constexpr,
    D: gl.constexpr,
    WINDOWED: gl.constexpr,
    MULTIPLIERS_REGISTERS: gl.constexpr,
    LOADERS_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * STEP, D], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, BLOCK, D], layout)
    # dq of the keys so far. Eight columns of a row, which four threads have, lie on other banks than those of the next
    # three rows.
    parts = gl.allocate_shared_memory(gl.float32, [STEPS, STEP, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    # dS of either half.
    weights = gl.allocate_shared_memory(dtype, [2, BLOCK // 2, STEP], gl.NVMMASharedLayout(128, 16, 2))
    lines = gl.allocate_shared_memory(gl.float32, [2 * STAGES, STEP], line)  # lse, then delta
    sights = gl.allocate_shared_memory(gl.int32, [2, BLOCK], line)
    barriers = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BARRIERS):
        mbarrier.init(barriers.index(i), count=32 * gl.num_warps() if i < DONE else 2 if i < READY else 1)
    memory = (ring, k_tiles, weights, parts, lines, sights, barriers)
    data = (dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr)
    gl.warp_specialize(
        [
            (
                _store,
                (dqkv_ptr, groups_ptr, angles_ptr, seed_ptr, memory, T, span, window, scale, dropout, H, WINDOWED),
            ),
            (_load, (data, groups_ptr, bounds_ptr, seed_ptr, memory, T, span, window, dropout, H, WINDOWED)),
            (_multiply, (dqkv_ptr, groups_ptr, seed_ptr, memory, T, span, window, scale, dropout, 0, H, WINDOWED)),
            (_multiply, (dqkv_ptr, groups_ptr, seed_ptr, memory, T, span, window, scale, dropout, 1, H, WINDOWED)),
        ],
        [4, 4, 4],
        [LOADERS_REGISTERS, MULTIPLIERS_REGISTERS, MULTIPLIERS_REGISTERS],
    )
