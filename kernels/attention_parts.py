"""What attention's kernels are put together from: groups and what their tokens see, loads and stores, rotary embedding,
dropout.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .language import tl, triton


@triton.jit
def group_at(groups_ptr, index, span):
    """First token and length of group `index`; without groups every one has `span` tokens."""
    if groups_ptr is None:
        return index * span, span
    else:
        start = tl.load(groups_ptr + 2 + 2 * index)
        return start, tl.load(groups_ptr + 3 + 2 * index) - start


@triton.jit
def sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED: tl.constexpr):
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
def seen_by(low, size, place):
    """Whether tokens with this sight see the tokens at `place`; operands broadcast."""
    return (place - low).to(tl.uint32) < size


@triton.jit
def seen_by_tile(low, size, TILE: tl.constexpr):
    """The same for the tokens of a tile and all of its places, (TILE, TILE)."""
    # In eights, which is how the results of matrix products lie in registers: which eight it is, is then known when
    # compiling, and only two of the other numbers are left to a thread. Else it computes, or keeps, all its places.
    eight, rest = 8 * tl.arange(0, TILE // 8), tl.arange(0, 8)
    place = (rest[None, None, :] - low[:, None, None]) + eight[None, :, None]
    return tl.reshape(place.to(tl.uint32) < size[:, None, None], (TILE, TILE))


@triton.jit
def load_matrix(pointer, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
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
def store_matrix(
    pointer, x, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
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
def load_vector(pointer, rows, valid, MASKED: tl.constexpr):
    """Numbers `rows` from `pointer` on; 0 where not `valid`."""
    if MASKED:
        return tl.load(pointer + rows, mask=valid, other=0.0)
    else:
        return tl.load(pointer + rows)


@triton.jit
def store_vector(pointer, x, rows, valid, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + rows, x, mask=valid)
    else:
        tl.store(pointer + rows, x)


@triton.jit
def _load_halves(pointer, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """The first and the second half of the columns, (rows, D / 2) each."""
    HALF: tl.constexpr = D // 2
    x1 = load_matrix(pointer, rows, valid, STRIDE, HALF, HALF, MASKED)
    return x1, load_matrix(pointer + HALF, rows, valid, STRIDE, HALF, HALF, MASKED)


@triton.jit
def _store_halves(pointer, x1, x2, rows, valid, STRIDE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    HALF: tl.constexpr = D // 2
    store_matrix(pointer, x1, rows, valid, STRIDE, HALF, HALF, MASKED)
    store_matrix(pointer + HALF, x2, rows, valid, STRIDE, HALF, HALF, MASKED)


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
def load_turned(
    qkv_ptr, angles_ptr, bounds_ptr, start, place, valid,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """q and k of a group, turned where there are angles."""
    if angles_ptr is None:
        q = load_matrix(qkv_ptr, place, valid, 3 * H * D, D, WIDTH, MASKED)
        return q, load_matrix(qkv_ptr + H * D, place, valid, 3 * H * D, D, WIDTH, MASKED)
    else:
        q1, q2 = _load_halves(qkv_ptr, place, valid, 3 * H * D, D, MASKED)
        k1, k2 = _load_halves(qkv_ptr + H * D, place, valid, 3 * H * D, D, MASKED)
        # Always so. What is under a condition the compiler leaves there. Else it would copy the angles to shared memory
        # ahead, past the cache of the multiprocessor, which holds all of them; and would turn q once more, in the
        # layout of the matrix product.
        if tl.num_programs(0) > 0:
            cos, sin = _angles(angles_ptr, bounds_ptr, start, place, valid, D)
            q1, q2 = _turn(q1, q2, cos, sin)
            k1, k2 = _turn(k1, k2, cos, sin)
        return _join(q1, q2, D), _join(k1, k2, D)


@triton.jit
def store_unturned(
    dqkv_ptr, dq, dk, angles_ptr, bounds_ptr, start, place, valid,
    H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of turned q and k as those of q and k before. They are rounded first, as PyTorch's are: in
    16 bits they go through shared memory to the threads that have the angles."""
    q1, q2 = _split(dq.to(dqkv_ptr.dtype.element_ty), D)
    k1, k2 = _split(dk.to(dqkv_ptr.dtype.element_ty), D)
    if tl.num_programs(0) > 0:  # as in `load_turned`
        cos, sin = _angles(angles_ptr, bounds_ptr, start, place, valid, D)
        q1, q2 = _turn(q1, q2, cos, -sin)
        k1, k2 = _turn(k1, k2, cos, -sin)
    _store_halves(dqkv_ptr, q1, q2, place, valid, 3 * H * D, D, MASKED)
    _store_halves(dqkv_ptr + H * D, k1, k2, place, valid, 3 * H * D, D, MASKED)


@triton.jit
def store_block_unturned(
    pointer, dx, rows, valid, angles_ptr,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store a block's gradient; where there are angles, of its `rows`, that of turned rows as that of rows before."""
    if angles_ptr is None:
        store_matrix(pointer, dx, rows, valid, STRIDE, D, WIDTH, MASKED)
    else:
        cos, sin = _load_halves(angles_ptr, rows, valid, D, D, MASKED)
        x1, x2 = _split(dx, D)
        x1, x2 = _turn(x1, x2, cos.to(tl.float32), -sin.to(tl.float32))
        _store_halves(pointer, x1, x2, rows, valid, STRIDE, D, MASKED)


@triton.jit
def block_of(groups_ptr, span, H: tl.constexpr, BLOCK: tl.constexpr):
    """This program's head, the first place of its block in its group, and the group. Without a block left in the group
    the place is past its end. Heads of one block come one after the other, for their rows share lines of memory."""
    program = tl.program_id(0)
    blocks = tl.cdiv(span, BLOCK)
    group = program // (H * blocks)
    first = program // H % blocks * BLOCK
    start, length = group_at(groups_ptr, group, span)
    if groups_ptr is not None:
        length = tl.where(group < tl.load(groups_ptr), length, 0)
    return program % H, first, start, length


@triton.jit
def range_of(first, length, window, BLOCK: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the blocks begin and end that some token of the block at `first` sees. A multiple of BLOCK, as loads of
    whole cache lines like it."""
    if WINDOWED:
        left = tl.maximum(first - window, 0) // BLOCK * BLOCK
        return left, tl.minimum(first + BLOCK + window, length)
    else:
        return 0, length


@triton.jit
def _mix(x):
    """SplitMix's mixing of 32 bits: of numbers that follow one another it makes unrelated ones, the high half above
    all."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def _factor(place, SALT: tl.constexpr):
    """One of four odd factors, by two bits of `place`."""
    return _mix(((place >> 3 & 3) + 1).to(tl.uint32) * SALT) | 1


@triton.jit
def generator_of(seed_ptr, head):
    """What the random numbers of a head begin with, by Philox: two of 32 bits, the second odd."""
    begin, step, _, _ = tl.philox(tl.load(seed_ptr), head, 0, 0, 0)
    return begin, step | 1


@triton.jit
def is_kept(generator, start, queries, query, keys, key, dropout):
    """Whether the weight of key `keys` + `key` for query `queries` + `query` is kept, places in the group of the token
    `start`. queries, keys: one number, a multiple of 32; query, key broadcast. The places decide, so that it does not
    matter which kernel asks, or in which order."""
    # From the head's generator each query splits off its own, for its keys to draw from: SplitMix, for a number from
    # Philox for each weight would take longer than all else.
    begin, step = generator
    own = _mix(begin + (start + queries + (query & ~0x18)).to(tl.uint32) * step)
    own ^= own >> 16
    number = _mix(own + (keys + (key & ~0x18)).to(tl.uint32) * (own * 0x9E3779B1 | 1))
    number ^= number >> 16
    # Four queries and four keys share a number: a thread has them, or half of them, of a matrix product's results, and
    # the compiler knows the factors. They are such that no two of the sixteen products hang together in short vectors.
    number *= _factor(query, 0xA745D743) * _factor(key, 0xA48C9985)
    return number >= tl.cast(dropout * 4294967296.0, tl.uint32)
