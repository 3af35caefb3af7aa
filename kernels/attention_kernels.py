"""The Triton kernels of `attention.py`.

Sequences are taken in groups (`sequences.py`): whole short ones together as far as a tile of rows holds them, so that a
batch of 20-token sentences does not pay for 128-row tiles, or a longer one alone. A token sees an interval of its
group, which is its own sequence cut by the window. Where all sequences just fill their tiles there is nothing to mask
and no groups are needed.

- `forward_tile`, `backward_tile`: a group is one tile, its scores are on the chip at once. The softmax needs no
  rescaling; backward makes dq, dk and dv in one pass, with delta = rowsum(P * dP) from the tile itself. Tiles of 128
  are for cards that have room for them, with kernels of their own (`attention_hopper_tile_forward.py` and
  `_backward.py`); here they are interpreted.
- `forward_blocks`, `backward_queries`, `backward_keys`: a group spans blocks. The softmax is rescaled from block to
  block; backward goes over the pairs of blocks twice, once for dq and once for dk and dv. That is 7 products where one
  pass takes 5, yet faster: one pass has to add to dk and dv in memory, and holds so much that nothing runs beside it.
  On Hopper, one pass does not: up to 256 tokens all of a group is on the chip (`attention_hopper_blocks.py`), up to
  512 its dq (`attention_hopper_steps.py`).

No program writes what another writes: there are no atomics, and results are the same every time.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_parts import (
    block_of,
    generator_of,
    group_at,
    is_kept,
    load_matrix,
    load_turned,
    load_vector,
    range_of,
    seen_by,
    seen_by_tile,
    sight_of,
    store_block_unturned,
    store_matrix,
    store_unturned,
    store_vector,
)
from .language import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_tile(
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
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    MASKED: tl.constexpr = groups_ptr is not None
    ROW: tl.constexpr = 3 * H * D
    if MASKED:
        count = tl.load(groups_ptr)
    place = tl.arange(0, TILE)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for turn in tl.range(0, (count * H - program + programs - 1) // programs, num_stages=STAGES):
        item = program + turn * programs
        head = item % H
        start, length = group_at(groups_ptr, item // H, TILE)
        valid = place < length
        if MASKED:
            low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
        qkv = qkv_ptr + start.to(tl.int64) * ROW + head * D
        q, k = load_turned(qkv, angles_ptr, bounds_ptr, start, place, valid, H, D, WIDTH, MASKED)
        v = load_matrix(qkv + 2 * H * D, place, valid, ROW, D, WIDTH, MASKED)
        s = tl.dot(q, tl.trans(k))
        if MASKED:
            s = tl.where(seen_by_tile(low, size, TILE), s, float("-inf"))
        m = tl.max(s, 1) * (scale * LOG2_E)
        p = tl.exp2(s * (scale * LOG2_E) - m[:, None])
        total = tl.sum(p, 1)
        share = 1.0 / total
        if seed_ptr is not None:
            kept = is_kept(generator_of(seed_ptr, head), start, 0, place[:, None], 0, place[None, :], dropout)
            p = tl.where(kept, p, 0.0)
            share /= 1.0 - dropout
        out = tl.dot(p.to(v.dtype), v) * share[:, None]
        store_matrix(out_ptr + start.to(tl.int64) * (H * D) + head * D, out, place, valid, H * D, D, WIDTH, MASKED)
        store_vector(lse_ptr + head.to(tl.int64) * T + start, m + tl.log2(total), place, valid, MASKED)


@triton.jit
def backward_tile(
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
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    MASKED: tl.constexpr = groups_ptr is not None
    ROW: tl.constexpr = 3 * H * D
    if MASKED:
        count = tl.load(groups_ptr)
    place = tl.arange(0, TILE)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for turn in tl.range(0, (count * H - program + programs - 1) // programs, num_stages=STAGES):
        item = program + turn * programs
        head = item % H
        start, length = group_at(groups_ptr, item // H, TILE)
        valid = place < length
        if MASKED:
            low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
        here = start.to(tl.int64) * ROW + head * D
        qkv, dqkv = qkv_ptr + here, dqkv_ptr + here
        q, k = load_turned(qkv, angles_ptr, bounds_ptr, start, place, valid, H, D, WIDTH, MASKED)
        v = load_matrix(qkv + 2 * H * D, place, valid, ROW, D, WIDTH, MASKED)
        dout = dout_ptr + start.to(tl.int64) * (H * D) + head * D
        do = load_matrix(dout, place, valid, H * D, D, WIDTH, MASKED)
        lse = load_vector(lse_ptr + head.to(tl.int64) * T + start, place, valid, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
        if MASKED:
            p = tl.where(seen_by_tile(low, size, TILE), p, 0.0)
        dp = tl.dot(do, tl.trans(v))
        dropped = p
        if seed_ptr is not None:
            kept = is_kept(generator_of(seed_ptr, head), start, 0, place[:, None], 0, place[None, :], dropout)
            dropped = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp * (1.0 / (1.0 - dropout)), 0.0)
        dv = tl.dot(tl.trans(dropped.to(q.dtype)), do)
        if seed_ptr is not None:
            dv *= 1.0 / (1.0 - dropout)
        store_matrix(dqkv + 2 * H * D, dv, place, valid, ROW, D, WIDTH, MASKED)
        delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q) * scale
        if angles_ptr is None:
            store_matrix(dqkv + H * D, dk, place, valid, ROW, D, WIDTH, MASKED)
        dq = tl.dot(ds, k) * scale
        if angles_ptr is None:
            store_matrix(dqkv, dq, place, valid, ROW, D, WIDTH, MASKED)
        else:
            store_unturned(dqkv, dq, dk, angles_ptr, bounds_ptr, start, place, valid, H, D, MASKED)


@triton.jit
def forward_blocks(
    qkv_ptr,  # (T, 3, H, D)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    seed_ptr,  # (1,) or None
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T)
    T,
    span,  # of a group, the most it can have
    window,
    scale,
    dropout,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    MASKED: tl.constexpr = groups_ptr is not None
    ROW: tl.constexpr = 3 * H * D
    head, first, start, length = block_of(groups_ptr, span, H, BLOCK)
    if first < length:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, STEP)
        place = first + rows
        valid = place < length
        if MASKED:
            low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
        qkv = qkv_ptr + start.to(tl.int64) * ROW + head * D
        q = load_matrix(qkv + first * ROW, rows, valid, ROW, D, WIDTH, MASKED)
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        out = tl.zeros([BLOCK, WIDTH], tl.float32)
        left, right = range_of(first, length, window, BLOCK, WINDOWED)
        for other in tl.range(left, right, STEP, num_stages=STAGES):
            key = other + columns
            there = key < length
            k_ptr = qkv + other * ROW + H * D
            k = load_matrix(k_ptr, columns, there, ROW, D, WIDTH, MASKED)
            v = load_matrix(k_ptr + H * D, columns, there, ROW, D, WIDTH, MASKED)
            s = tl.dot(q, tl.trans(k))
            if MASKED:
                s = tl.where(seen_by(low[:, None], size[:, None], key[None, :]), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2_E))
            base = m_new
            if MASKED:  # a row that has seen nothing so far
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
            rescale = tl.exp2(m - base)
            p = tl.exp2(s * (scale * LOG2_E) - base[:, None])
            total = total * rescale + tl.sum(p, 1)
            if seed_ptr is not None:
                kept = is_kept(
                    generator_of(seed_ptr, head), start, first, rows[:, None], other, columns[None, :], dropout
                )
                p = tl.where(kept, p, 0.0)
            out = tl.dot(p.to(v.dtype), v, out * rescale[:, None])
            m = m_new
        share = 1.0 / total
        if seed_ptr is not None:
            share /= 1.0 - dropout
        out *= share[:, None]
        token = start.to(tl.int64) + first
        store_matrix(out_ptr + token * (H * D) + head * D, out, rows, valid, H * D, D, WIDTH, MASKED)
        store_vector(lse_ptr + head.to(tl.int64) * T + token, m + tl.log2(total), rows, valid, MASKED)


@triton.jit
def backward_queries(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    angles_ptr,  # (T, D), cos and sin side by side, (span, D) without groups, or None
    seed_ptr,  # (1,) or None
    dqkv_ptr,  # (T, 3, H, D): writes dq
    delta_ptr,  # (H, T): rowsum(out * dout)
    T,
    span,  # of a group, the most it can have
    window,
    scale,
    dropout,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    MASKED: tl.constexpr = groups_ptr is not None
    TURNED: tl.constexpr = angles_ptr is not None
    ROW: tl.constexpr = 3 * H * D
    head, first, start, length = block_of(groups_ptr, span, H, BLOCK)
    if first < length:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, STEP)
        place = first + rows
        valid = place < length
        if MASKED:
            low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
        token = start.to(tl.int64) + first
        qkv = qkv_ptr + start.to(tl.int64) * ROW + head * D
        q = load_matrix(qkv + first * ROW, rows, valid, ROW, D, WIDTH, MASKED)
        do = load_matrix(dout_ptr + token * (H * D) + head * D, rows, valid, H * D, D, WIDTH, MASKED)
        o = load_matrix(out_ptr + token * (H * D) + head * D, rows, valid, H * D, D, WIDTH, MASKED)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        store_vector(delta_ptr + head.to(tl.int64) * T + token, delta, rows, valid, MASKED)
        lse = load_vector(lse_ptr + head.to(tl.int64) * T + token, rows, valid, MASKED)
        dq = tl.zeros([BLOCK, WIDTH], tl.float32)
        left, right = range_of(first, length, window, BLOCK, WINDOWED)
        for other in tl.range(left, right, STEP, num_stages=STAGES):
            key = other + columns
            there = key < length
            k_ptr = qkv + other * ROW + H * D
            k = load_matrix(k_ptr, columns, there, ROW, D, WIDTH, MASKED)
            v = load_matrix(k_ptr + H * D, columns, there, ROW, D, WIDTH, MASKED)
            s = tl.dot(q, tl.trans(k))
            dp = tl.dot(do, tl.trans(v))
            p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
            if MASKED:
                p = tl.where(seen_by(low[:, None], size[:, None], key[None, :]), p, 0.0)
            if seed_ptr is not None:
                kept = is_kept(
                    generator_of(seed_ptr, head), start, first, rows[:, None], other, columns[None, :], dropout
                )
                dp = tl.where(kept, dp * (1.0 / (1.0 - dropout)), 0.0)
            dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq)
        dq *= scale
        angles = angles_ptr
        if TURNED:
            angles += (token if MASKED else first) * D
        dq_ptr = dqkv_ptr + token * ROW + head * D
        store_block_unturned(dq_ptr, dq, rows, valid, angles, ROW, D, WIDTH, MASKED)


@triton.jit
def backward_keys(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    lse_ptr,  # (H, T)
    delta_ptr,  # (H, T)
    groups_ptr,  # (1 + groups, 2) or None
    bounds_ptr,  # (2, T) or None
    angles_ptr,  # (T, D), cos and sin side by side, (span, D) without groups, or None
    seed_ptr,  # (1,) or None
    dqkv_ptr,  # (T, 3, H, D): writes dk and dv
    T,
    span,  # of a group, the most it can have
    window,
    scale,
    dropout,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Scores lie on their side, a row for each key: so they come out of one product as the next one takes them in."""
    MASKED: tl.constexpr = groups_ptr is not None
    TURNED: tl.constexpr = angles_ptr is not None
    ROW: tl.constexpr = 3 * H * D
    head, first, start, length = block_of(groups_ptr, span, H, BLOCK)
    if first < length:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, STEP)
        place = first + rows
        valid = place < length
        if MASKED:
            low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
        start_long = start.to(tl.int64)
        qkv = qkv_ptr + start_long * ROW + head * D
        k_ptr = qkv + first * ROW + H * D
        k = load_matrix(k_ptr, rows, valid, ROW, D, WIDTH, MASKED)
        v = load_matrix(k_ptr + H * D, rows, valid, ROW, D, WIDTH, MASKED)
        dout = dout_ptr + start_long * (H * D) + head * D
        row = head.to(tl.int64) * T + start
        dk = tl.zeros([BLOCK, WIDTH], tl.float32)
        dv = tl.zeros([BLOCK, WIDTH], tl.float32)
        left, right = range_of(first, length, window, BLOCK, WINDOWED)
        for other in tl.range(left, right, STEP, num_stages=STAGES):
            query = other + columns
            there = query < length
            q = load_matrix(qkv + other * ROW, columns, there, ROW, D, WIDTH, MASKED)
            do = load_matrix(dout + other * (H * D), columns, there, H * D, D, WIDTH, MASKED)
            lse = load_vector(lse_ptr + row + other, columns, there, MASKED)
            delta = load_vector(delta_ptr + row + other, columns, there, MASKED)
            s = tl.dot(k, tl.trans(q))
            dp = tl.dot(v, tl.trans(do))
            p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
            if MASKED:
                p = tl.where(seen_by(low[:, None], size[:, None], query[None, :]), p, 0.0)
            dropped = p
            if seed_ptr is not None:
                kept = is_kept(
                    generator_of(seed_ptr, head), start, other, columns[None, :], first, rows[:, None], dropout
                )
                dropped = tl.where(kept, p, 0.0)
                dp = tl.where(kept, dp * (1.0 / (1.0 - dropout)), 0.0)
            dv = tl.dot(dropped.to(q.dtype), do, dv)
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk)
        dk *= scale
        if seed_ptr is not None:
            dv *= 1.0 / (1.0 - dropout)
        token = start_long + first
        angles = angles_ptr
        if TURNED:
            angles += (token if MASKED else first) * D
        dk_ptr = dqkv_ptr + token * ROW + (H + head) * D
        store_block_unturned(dk_ptr, dk, rows, valid, angles, ROW, D, WIDTH, MASKED)
        store_matrix(dk_ptr + H * D, dv, rows, valid, ROW, D, WIDTH, MASKED)
