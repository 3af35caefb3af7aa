"""The Triton kernels of `attention.py`.

Sequences are taken in groups (`sequences.py`): whole short ones together as far as a tile of rows holds them, so that a
batch of 20-token sentences does not pay for 128-row tiles, or a longer one alone. A token sees an interval of its
group, which is its own sequence cut by the window. Where all sequences just fill their tiles there is nothing to mask
and no groups are needed.

- `forward_tile`, `backward_tile`: a group is one tile, its scores are on the chip at once. The softmax needs no
  rescaling; backward makes dq, dk and dv in one pass, with delta = rowsum(P * dP) from the tile itself. The programs
  may stay for many groups: with three stages they load the next one's rows while they compute, with two after that.
- `forward_blocks`, `backward_queries`, `backward_keys`: a group spans blocks. The softmax is rescaled from block to
  block; backward goes over the pairs of blocks twice, once for dq and once for dk and dv. That is 7 products where one
  pass takes 5, yet faster: one pass has to add to dk and dv in memory, and holds so much that nothing runs beside it.

No program writes what another writes: there are no atomics, and results are the same every time.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .language import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _group(groups_ptr, index, span):
    """First token and length of group `index`; without groups every one has `span` tokens."""
    if groups_ptr is None:
        return index * span, span
    else:
        start = tl.load(groups_ptr + 2 + 2 * index)
        return start, tl.load(groups_ptr + 3 + 2 * index) - start


@triton.jit
def _group_early(groups_ptr, index, span):
    """As `_group`, for a loop whose loads are made turns ahead. Under a condition, which always holds, this one is made
    at the start of a turn and is there for those that wait for it at the end; else it takes a stage of its own."""
    if groups_ptr is None:
        return _group(groups_ptr, index, span)
    else:
        start, length = index, index
        if tl.num_programs(0) > 0:
            start, length = _group(groups_ptr, index, span)
        return start, length


@triton.jit
def _sight(bounds_ptr, start, place, valid, T, window, WINDOWED: tl.constexpr):
    """For the tokens at `place` in their group: the first place and the number of those they see, none where not
    `valid`."""
    first = tl.load(bounds_ptr + start + place, mask=valid, other=0) - start
    end = tl.load(bounds_ptr + T + start + place, mask=valid, other=0) - start
    low = first
    if WINDOWED:
        low = tl.maximum(first, place - window)
        end = tl.minimum(end, place + window + 1)
    return low, tl.where(valid, end - low, 0).to(tl.uint32)


@triton.jit
def _sees(low, size, place):
    """Whether tokens with this sight see the tokens at `place`; operands broadcast."""
    return (place - low).to(tl.uint32) < size


@triton.jit
def _sees_tile(low, size, TILE: tl.constexpr):
    """The same for the tokens of a tile and all of its places, (TILE, TILE)."""
    # In eights, which is how the results of matrix products lie in registers: which eight it is, is then known when
    # compiling, and only two of the other numbers are left to a thread. Else it computes, or keeps, all its places.
    eight, rest = 8 * tl.arange(0, TILE // 8), tl.arange(0, 8)
    place = (rest[None, None, :] - low[:, None, None]) + eight[None, :, None]
    return tl.reshape(place.to(tl.uint32) < size[:, None, None], (TILE, TILE))


@triton.jit
def _load(pointer, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows `rows` from `pointer` on, (rows, WIDTH): 0 where not `valid` and beyond D."""
    column = tl.arange(0, WIDTH)
    at = pointer + (rows[:, None] * STRIDE + column[None, :])
    if not MASKED:
        return tl.load(at)
    elif WIDTH == D:
        return tl.load(at, mask=valid[:, None], other=0.0)
    else:
        return tl.load(at, mask=valid[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store(pointer, x, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    column = tl.arange(0, WIDTH)
    at = pointer + (rows[:, None] * STRIDE + column[None, :])
    x = x.to(pointer.dtype.element_ty)
    if not MASKED:
        tl.store(at, x)
    elif WIDTH == D:
        tl.store(at, x, mask=valid[:, None])
    else:
        tl.store(at, x, mask=valid[:, None] & (column < D)[None, :])


@triton.jit
def _load_vector(pointer, rows, valid, MASKED: tl.constexpr):
    """Numbers `rows` from `pointer` on; 0 where not `valid`."""
    if MASKED:
        return tl.load(pointer + rows, mask=valid, other=0.0)
    else:
        return tl.load(pointer + rows)


@triton.jit
def _store_vector(pointer, x, rows, valid, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + rows, x, mask=valid)
    else:
        tl.store(pointer + rows, x)


@triton.jit
def _load_halves(pointer, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """The first and the second half of the columns, (rows, D / 2) each."""
    HALF: tl.constexpr = D // 2
    x1 = _load(pointer, rows, valid, STRIDE, HALF, HALF, MASKED)
    return x1, _load(pointer + HALF, rows, valid, STRIDE, HALF, HALF, MASKED)


@triton.jit
def _store_halves(pointer, x1, x2, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    HALF: tl.constexpr = D // 2
    _store(pointer, x1, rows, valid, STRIDE, HALF, HALF, MASKED)
    _store(pointer + HALF, x2, rows, valid, STRIDE, HALF, HALF, MASKED)


@triton.jit
def _join(x1, x2, D: tl.constexpr):
    """Halves side by side, (rows, D). A thread has the same places of both, so nothing moves."""
    return tl.reshape(tl.permute(tl.join(x1, x2), (0, 2, 1)), (x1.shape[0], D))


@triton.jit
def _split(x, D: tl.constexpr):
    """The halves of x (rows, D)."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, D // 2)), (0, 2, 1)))


@triton.jit
def _turn(x1, x2, cos, sin):
    """Rotary embedding of both halves, in the dtype they come in."""
    return (x1 * cos - x2 * sin).to(x1.dtype), (x2 * cos + x1 * sin).to(x1.dtype)


@triton.jit
def _angles(angles_ptr, bounds_ptr, start, place, valid, D: tl.constexpr):
    """cos and sin for the tokens at `place` in their group, (rows, D / 2) each, in fp32."""
    position = place
    if bounds_ptr is not None:
        position -= tl.load(bounds_ptr + start + place, mask=valid, other=start) - start
    cos, sin = _load_halves(angles_ptr, position, valid, D, D, False)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def _load_turned(
    qkv_ptr, angles_ptr, bounds_ptr, start, place, valid,
    H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """q and k of a group, turned."""
    q1, q2 = _load_halves(qkv_ptr, place, valid, 3 * H * D, D, MASKED)
    k1, k2 = _load_halves(qkv_ptr + H * D, place, valid, 3 * H * D, D, MASKED)
    # Always so. What is under a condition the compiler leaves there. Else it would copy the angles to shared memory
    # ahead, past the cache of the multiprocessor, which holds all of them; and would turn q once more, in the layout
    # of the matrix product.
    if tl.num_programs(0) > 0:
        cos, sin = _angles(angles_ptr, bounds_ptr, start, place, valid, D)
        q1, q2 = _turn(q1, q2, cos, sin)
        k1, k2 = _turn(k1, k2, cos, sin)
    return _join(q1, q2, D), _join(k1, k2, D)


@triton.jit
def _store_unturned(
    dqkv_ptr, dq, dk, angles_ptr, bounds_ptr, start, place, valid,
    H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of turned q and k as those of q and k before. They are rounded first, as PyTorch's are: in
    16 bits they go through shared memory to the threads that have the angles."""
    q1, q2 = _split(dq.to(dqkv_ptr.dtype.element_ty), D)
    k1, k2 = _split(dk.to(dqkv_ptr.dtype.element_ty), D)
    if tl.num_programs(0) > 0:  # as in `_load_turned`
        cos, sin = _angles(angles_ptr, bounds_ptr, start, place, valid, D)
        q1, q2 = _turn(q1, q2, cos, -sin)
        k1, k2 = _turn(k1, k2, cos, -sin)
    _store_halves(dqkv_ptr, q1, q2, place, valid, 3 * H * D, D, MASKED)
    _store_halves(dqkv_ptr + H * D, k1, k2, place, valid, 3 * H * D, D, MASKED)


@triton.jit
def _store_block_unturned(
    pointer, dx, rows, valid, angles_ptr,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store a block's gradient; where there are angles, of its `rows`, that of turned rows as that of rows before."""
    if angles_ptr is None:
        _store(pointer, dx, rows, valid, STRIDE, D, WIDTH, MASKED)
    else:
        cos, sin = _load_halves(angles_ptr, rows, valid, D, D, MASKED)
        x1, x2 = _split(dx, D)
        x1, x2 = _turn(x1, x2, cos.to(tl.float32), -sin.to(tl.float32))
        _store_halves(pointer, x1, x2, rows, valid, STRIDE, D, MASKED)


@triton.jit
def _block(groups_ptr, span, H: tl.constexpr, BLOCK: tl.constexpr):
    """This program's head, the first place of its block in its group, and the group. Without a block left in the group
    the place is past its end. Heads of one block come one after the other, for their rows share lines of memory."""
    program = tl.program_id(0)
    blocks = tl.cdiv(span, BLOCK)
    group = program // (H * blocks)
    first = program // H % blocks * BLOCK
    start, length = _group(groups_ptr, group, span)
    if groups_ptr is not None:
        length = tl.where(group < tl.load(groups_ptr), length, 0)
    return program % H, first, start, length


@triton.jit
def _range(first, length, window, BLOCK: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the blocks begin and end that some token of the block at `first` sees. A multiple of BLOCK, as loads of
    whole cache lines like it."""
    if WINDOWED:
        left = tl.maximum(first - window, 0) // BLOCK * BLOCK
        return left, tl.minimum(first + BLOCK + window, length)
    else:
        return 0, length


@triton.jit
def _kept(seed_ptr, query, key, head, dropout):
    """1 / (1 - dropout) where the weight of `key` for `query` is kept, else 0. The tokens' numbers in the batch decide,
    so that it does not matter which kernel asks, or in which order."""
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), query, key, head, 0)
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout, 1.0 / (1.0 - dropout), 0.0)


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
        start, length = _group(groups_ptr, item // H, TILE)
        valid = place < length
        if MASKED:
            low, size = _sight(bounds_ptr, start, place, valid, T, window, WINDOWED)
        qkv = qkv_ptr + start.to(tl.int64) * ROW + head * D
        if angles_ptr is None:
            q = _load(qkv, place, valid, ROW, D, WIDTH, MASKED)
            k = _load(qkv + H * D, place, valid, ROW, D, WIDTH, MASKED)
        else:
            q, k = _load_turned(qkv, angles_ptr, bounds_ptr, start, place, valid, H, D, MASKED)
        v = _load(qkv + 2 * H * D, place, valid, ROW, D, WIDTH, MASKED)
        s = tl.dot(q, tl.trans(k))
        if MASKED:
            s = tl.where(_sees_tile(low, size, TILE), s, float("-inf"))
        m = tl.max(s, 1) * (scale * LOG2_E)
        p = tl.exp2(s * (scale * LOG2_E) - m[:, None])
        total = tl.sum(p, 1)
        if seed_ptr is not None:
            p *= _kept(seed_ptr, start + place[:, None], start + place[None, :], head, dropout)
        out = tl.dot(p.to(v.dtype), v) / total[:, None]
        _store(out_ptr + start.to(tl.int64) * (H * D) + head * D, out, place, valid, H * D, D, WIDTH, MASKED)
        _store_vector(lse_ptr + head.to(tl.int64) * T + start, m + tl.log2(total), place, valid, MASKED)


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
        start, length = _group_early(groups_ptr, item // H, TILE)
        valid = place < length
        if MASKED:
            low, size = _sight(bounds_ptr, start, place, valid, T, window, WINDOWED)
        here = start.to(tl.int64) * ROW + head * D
        qkv, dqkv = qkv_ptr + here, dqkv_ptr + here
        if angles_ptr is None:
            q = _load(qkv, place, valid, ROW, D, WIDTH, MASKED)
            k = _load(qkv + H * D, place, valid, ROW, D, WIDTH, MASKED)
        else:
            q, k = _load_turned(qkv, angles_ptr, bounds_ptr, start, place, valid, H, D, MASKED)
        v = _load(qkv + 2 * H * D, place, valid, ROW, D, WIDTH, MASKED)
        dout = dout_ptr + start.to(tl.int64) * (H * D) + head * D
        do = _load(dout, place, valid, H * D, D, WIDTH, MASKED)
        lse = _load_vector(lse_ptr + head.to(tl.int64) * T + start, place, valid, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
        if MASKED:
            p = tl.where(_sees_tile(low, size, TILE), p, 0.0)
        dp = tl.dot(do, tl.trans(v))
        dropped = p
        if seed_ptr is not None:
            kept = _kept(seed_ptr, start + place[:, None], start + place[None, :], head, dropout)
            dropped = p * kept
            dp *= kept
        dv = tl.dot(tl.trans(dropped.to(q.dtype)), do)
        _store(dqkv + 2 * H * D, dv, place, valid, ROW, D, WIDTH, MASKED)
        delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q) * scale
        if angles_ptr is None:
            _store(dqkv + H * D, dk, place, valid, ROW, D, WIDTH, MASKED)
        dq = tl.dot(ds, k) * scale
        if angles_ptr is None:
            _store(dqkv, dq, place, valid, ROW, D, WIDTH, MASKED)
        else:
            _store_unturned(dqkv, dq, dk, angles_ptr, bounds_ptr, start, place, valid, H, D, MASKED)


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
    head, first, start, length = _block(groups_ptr, span, H, BLOCK)
    if first < length:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, STEP)
        place = first + rows
        valid = place < length
        if MASKED:
            low, size = _sight(bounds_ptr, start, place, valid, T, window, WINDOWED)
        qkv = qkv_ptr + start.to(tl.int64) * ROW + head * D
        q = _load(qkv + first * ROW, rows, valid, ROW, D, WIDTH, MASKED)
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        out = tl.zeros([BLOCK, WIDTH], tl.float32)
        left, right = _range(first, length, window, BLOCK, WINDOWED)
        for other in tl.range(left, right, STEP, num_stages=STAGES):
            key = other + columns
            there = key < length
            k_ptr = qkv + other * ROW + H * D
            k = _load(k_ptr, columns, there, ROW, D, WIDTH, MASKED)
            v = _load(k_ptr + H * D, columns, there, ROW, D, WIDTH, MASKED)
            s = tl.dot(q, tl.trans(k))
            if MASKED:
                s = tl.where(_sees(low[:, None], size[:, None], key[None, :]), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2_E))
            base = m_new
            if MASKED:  # a row that has seen nothing so far
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
            rescale = tl.exp2(m - base)
            p = tl.exp2(s * (scale * LOG2_E) - base[:, None])
            total = total * rescale + tl.sum(p, 1)
            if seed_ptr is not None:
                p *= _kept(seed_ptr, start + place[:, None], start + key[None, :], head, dropout)
            out = tl.dot(p.to(v.dtype), v, out * rescale[:, None])
            m = m_new
        out /= total[:, None]
        token = start.to(tl.int64) + first
        _store(out_ptr + token * (H * D) + head * D, out, rows, valid, H * D, D, WIDTH, MASKED)
        _store_vector(lse_ptr + head.to(tl.int64) * T + token, m + tl.log2(total), rows, valid, MASKED)


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
    head, first, start, length = _block(groups_ptr, span, H, BLOCK)
    if first < length:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, STEP)
        place = first + rows
        valid = place < length
        if MASKED:
            low, size = _sight(bounds_ptr, start, place, valid, T, window, WINDOWED)
        token = start.to(tl.int64) + first
        qkv = qkv_ptr + start.to(tl.int64) * ROW + head * D
        q = _load(qkv + first * ROW, rows, valid, ROW, D, WIDTH, MASKED)
        do = _load(dout_ptr + token * (H * D) + head * D, rows, valid, H * D, D, WIDTH, MASKED)
        o = _load(out_ptr + token * (H * D) + head * D, rows, valid, H * D, D, WIDTH, MASKED)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        _store_vector(delta_ptr + head.to(tl.int64) * T + token, delta, rows, valid, MASKED)
        lse = _load_vector(lse_ptr + head.to(tl.int64) * T + token, rows, valid, MASKED)
        dq = tl.zeros([BLOCK, WIDTH], tl.float32)
        left, right = _range(first, length, window, BLOCK, WINDOWED)
        for other in tl.range(left, right, STEP, num_stages=STAGES):
            key = other + columns
            there = key < length
            k_ptr = qkv + other * ROW + H * D
            k = _load(k_ptr, columns, there, ROW, D, WIDTH, MASKED)
            v = _load(k_ptr + H * D, columns, there, ROW, D, WIDTH, MASKED)
            s = tl.dot(q, tl.trans(k))
            dp = tl.dot(do, tl.trans(v))
            p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
            if MASKED:
                p = tl.where(_sees(low[:, None], size[:, None], key[None, :]), p, 0.0)
            if seed_ptr is not None:
                dp *= _kept(seed_ptr, start + place[:, None], start + key[None, :], head, dropout)
            dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq)
        dq *= scale
        angles = angles_ptr
        if TURNED:
            angles += (token if MASKED else first) * D
        dq_ptr = dqkv_ptr + token * ROW + head * D
        _store_block_unturned(dq_ptr, dq, rows, valid, angles, ROW, D, WIDTH, MASKED)


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
    head, first, start, length = _block(groups_ptr, span, H, BLOCK)
    if first < length:
        rows, columns = tl.arange(0, BLOCK), tl.arange(0, STEP)
        place = first + rows
        valid = place < length
        if MASKED:
            low, size = _sight(bounds_ptr, start, place, valid, T, window, WINDOWED)
        start_long = start.to(tl.int64)
        qkv = qkv_ptr + start_long * ROW + head * D
        k_ptr = qkv + first * ROW + H * D
        k = _load(k_ptr, rows, valid, ROW, D, WIDTH, MASKED)
        v = _load(k_ptr + H * D, rows, valid, ROW, D, WIDTH, MASKED)
        dout = dout_ptr + start_long * (H * D) + head * D
        row = head.to(tl.int64) * T + start
        dk = tl.zeros([BLOCK, WIDTH], tl.float32)
        dv = tl.zeros([BLOCK, WIDTH], tl.float32)
        left, right = _range(first, length, window, BLOCK, WINDOWED)
        for other in tl.range(left, right, STEP, num_stages=STAGES):
            query = other + columns
            there = query < length
            q = _load(qkv + other * ROW, columns, there, ROW, D, WIDTH, MASKED)
            do = _load(dout + other * (H * D), columns, there, H * D, D, WIDTH, MASKED)
            lse = _load_vector(lse_ptr + row + other, columns, there, MASKED)
            delta = _load_vector(delta_ptr + row + other, columns, there, MASKED)
            s = tl.dot(k, tl.trans(q))
            dp = tl.dot(v, tl.trans(do))
            p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
            if MASKED:
                p = tl.where(_sees(low[:, None], size[:, None], query[None, :]), p, 0.0)
            dropped = p
            if seed_ptr is not None:
                kept = _kept(seed_ptr, start + query[None, :], start + place[:, None], head, dropout)
                dropped = p * kept
                dp *= kept
            dv = tl.dot(dropped.to(q.dtype), do, dv)
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk)
        dk *= scale
        token = start_long + first
        angles = angles_ptr
        if TURNED:
            angles += (token if MASKED else first) * D
        dk_ptr = dqkv_ptr + token * ROW + (H + head) * D
        _store_block_unturned(dk_ptr, dk, rows, valid, angles, ROW, D, WIDTH, MASKED)
        _store(dk_ptr + H * D, dv, rows, valid, ROW, D, WIDTH, MASKED)
