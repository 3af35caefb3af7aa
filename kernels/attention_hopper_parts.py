"""What the kernels of attention for Hopper are put together from: layouts, rows on their way to shared memory and
back, rotary embedding, masks.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_parts import sight_of
from .language import async_copy, gl, gluon, mbarrier
from .tiles import chunk_of, split, vectors


@gluon.constexpr_function
def whole_rows(size, warps):
    """Layout of as many rows of `size` columns, 32 or 64, as take a thread eight columns and the eight that rotary
    embedding pairs them with. Lanes are such that those of one access to shared memory meet different banks."""
    lanes = {32: [[0, 8], [1, 0], [4, 0], [2, 0], [8, 0]], 64: [[0, 8], [0, 16], [4, 0], [1, 0], [2, 0]]}[size]
    rows = 512 // size
    of_warps = [[rows << i, 0] for i in range(warps.bit_length() - 1)]
    registers = [[0, 1], [0, 2], [0, 4], [0, size // 2]]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [rows * warps, size])


@gluon.constexpr_function
def half_rows(size, warps):
    """Layout of either half of the columns of `whole_rows`."""
    whole = whole_rows(size, warps)
    shape = [whole.shape[0], size // 2]
    return gl.DistributedLinearLayout(whole.reg_bases[:3], whole.lane_bases, whole.warp_bases, [], shape)


@gluon.constexpr_function
def eights(warps, columns=128):
    """Layout of scores (16 * warps, columns) as a matrix product leaves them, their columns in eights: (.., .., 8)."""
    registers = [[0, 0, 1], [8, 0, 0], *([0, 1 << i, 0] for i in range((columns // 8).bit_length() - 1))]
    lanes, rows = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]], 16 * warps
    of_warps = [[16 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [rows, columns // 8, 8])


@gluon.jit
def make_barriers(STAGES: gl.constexpr, MOVERS: gl.constexpr, APART: gl.constexpr):
    """(full, rest, ready, done), each for every stage: completed by all copies of the movers' warps, by those that come
    last, by the preparers and by the multipliers. If none is waited for APART from the others, `full` is all that
    `rest` could tell."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rest = full
    if APART:
        rest = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * MOVERS)
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(done.index(stage), count=1)
        if APART:
            mbarrier.init(rest.index(stage), count=32 * MOVERS)
    return full, rest, ready, done


@gluon.jit
def join(x1, x2, layout: gl.constexpr):
    x = gl.reshape(gl.permute(gl.join(x1, x2), (0, 2, 1)), (x1.shape[0], 2 * x1.shape[1]))
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def turn(x1, x2, cos, sin):
    return (x1 * cos - x2 * sin).to(x1.dtype), (x2 * cos + x1 * sin).to(x1.dtype)


@gluon.jit
def seen_of(sights, scores: gl.constexpr):
    """Which places of a tile each row sees, from what `prepare` notes, in the layout `scores`. `where_seen` takes fewer
    instructions, but beside dropout's predicates they take longer."""
    # In eights, as `seen_by_tile` does it: which eight it is, is known when compiling.
    layout: gl.constexpr = eights(gl.num_warps())
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    sight = sights.load(of_rows).to(gl.int32)
    low, last = sight & 0xFF, sight >> 8
    size = (last + 1 - low).to(gl.uint32)
    eight = 8 * gl.arange(0, layout.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    rest = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    place = (rest[None, None, :] - low[:, None, None]) + eight[None, :, None]
    seen = gl.reshape(place.to(gl.uint32) < size[:, None, None], [layout.shape[0], 8 * layout.shape[1]])
    return gl.convert_layout(seen, scores, assert_trivial=True)


@gluon.jit
def fetch_rows(tile, pointer, start, length, STRIDE: gl.constexpr, MASKED: gl.constexpr):
    """Begin to copy the rows of a group, zeros beyond its length."""
    layout: gl.constexpr = vectors(tile.shape[1], gl.num_warps())
    rows = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    # A thread's rows are so many apart. In two parts, the addresses differ by what is known when compiling, and only
    # one of them takes registers.
    STEP: gl.constexpr = 256 // tile.shape[1] * gl.num_warps()
    at = pointer + start.to(gl.int64) * STRIDE + ((rows % STEP)[:, None] * STRIDE + columns[None, :])
    at += (rows // STEP * (STEP * STRIDE))[:, None]
    if MASKED:
        async_copy.async_copy_global_to_shared(tile, at, mask=(rows < length)[:, None])
    else:
        async_copy.async_copy_global_to_shared(tile, at)


@gluon.jit
def fetch_line(line, pointer, start, length, MASKED: gl.constexpr):
    place = line_of(line.shape[0])
    if MASKED:
        async_copy.async_copy_global_to_shared(line, pointer + start + place, mask=place < length)
    else:
        async_copy.async_copy_global_to_shared(line, pointer + start + place)


@gluon.jit
def turns_of(count_ptr, count, H: gl.constexpr):
    """How many of all heads of all tiles this program has to do; there are `count` tiles, or as many as in memory."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    if count_ptr is not None:
        count = gl.load(count_ptr)
    return (count * H - program + programs - 1) // programs


@gluon.constexpr_function
def one_each(size, warps):
    """Layout of as many numbers as threads, one for each row of `vectors(size, warps)`, in the warp that has it."""
    in_warp, in_thread = 256 // size, size // 8
    lanes = [[in_warp * warps << i] for i in range(in_thread.bit_length() - 1)]
    lanes += [[1 << i] for i in range(in_warp.bit_length() - 1)]
    of_warps = [[in_warp << i] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([], lanes, of_warps, [], [32 * warps])


@gluon.jit
def tokens_of(places_ptr, slots, item, H: gl.constexpr, TILE: gl.constexpr, layout: gl.constexpr):
    """The tokens of an item's tile, -1 where there is none; without a table, tiles have as many in a row as places.
    Items before the first and after the last have those of some tile."""
    tile, place = gl.maximum(item, 0) // H, gl.arange(0, TILE, layout=layout)
    if places_ptr is None:
        return tile * TILE + place
    else:
        return gl.load(places_ptr + (gl.minimum(tile, slots - 1) * TILE + place))


@gluon.jit
def _parts(x, PART: gl.constexpr, layout: gl.constexpr):
    if x.shape[0] > PART:
        upper, lower = gl.split(gl.permute(gl.reshape(x, (2, x.shape[0] // 2)), (1, 0)))
        return _parts(upper, PART, layout) + _parts(lower, PART, layout)
    else:
        return (gl.convert_layout(x, layout, assert_trivial=True),)


@gluon.jit
def as_rows(tokens, PART: gl.constexpr, layout: gl.constexpr):
    """The tokens of a tile, of which each thread has one as in `one_each`, as rows of `layout`, in parts of PART."""
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    return _parts(gl.convert_layout(tokens, rows), PART, rows)


@gluon.jit
def notes_at(places_ptr, slots, tile, place, TILE: gl.constexpr):
    """What is to be known of `place` in a tile, as `pack_sequences` notes it."""
    return gl.load(places_ptr + ((slots + tile) * TILE + place))


@gluon.jit
def gather_rows(tiles, stage, part, pointer, tokens, STRIDE: gl.constexpr):
    """Begin to copy the rows of `tokens` to a part of a tile, of as many rows; zeros where there is none."""
    layout: gl.constexpr = vectors(tiles.shape[2], gl.num_warps())
    columns = gl.arange(0, tiles.shape[2], layout=gl.SliceLayout(0, layout))
    at = pointer + (tokens.to(gl.int64)[:, None] * STRIDE + columns[None, :])
    into = chunk_of(tiles, stage, part, tokens.shape[0])
    async_copy.async_copy_global_to_shared(into, at, mask=(tokens >= 0)[:, None])


@gluon.jit
def gather_line(line, pointer, tokens):
    """Begin to copy a number of each token in a tile."""
    async_copy.async_copy_global_to_shared(line, pointer + tokens, mask=tokens >= 0)


@gluon.jit
def line_of(size: gl.constexpr):
    return gl.arange(0, size, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def store_rows(pointer, x, valid, MASKED: gl.constexpr):
    if MASKED:
        gl.store(pointer, x, mask=valid[:, None])
    else:
        gl.store(pointer, x)


@gluon.jit
def items_of(groups_ptr, T, span, H: gl.constexpr):
    """How many there are for all programs together, of what one does at a time: heads of groups."""
    if groups_ptr is None:
        return T // span * H
    else:
        return gl.load(groups_ptr) * H


@gluon.jit
def note_sight(line, bounds_ptr, start, first, length, T, window, WINDOWED: gl.constexpr):
    """The first and last place that each row of a block sees, in half of the bits each; the last is before the first if
    none."""
    BITS: gl.constexpr = 8 if line.dtype == gl.int16 else 16
    place = first + line_of(line.shape[0])
    low, size = sight_of(bounds_ptr, start, place, place < length, T, window, WINDOWED)
    none = size == 0
    low, last = gl.where(none, 1, low), gl.where(none, 0, low + size.to(gl.int32) - 1)
    line.store((low | (last << BITS)).to(line.dtype))


@gluon.jit
def _from(place, lane):
    """Bits of a row's places in a thread, two of each eight, set for those at or beyond a `place` of 128."""
    count = 2 * (place >> 3) + gl.minimum(gl.maximum((place & 7) - lane, 0), 2)
    return (-1 << (count >> 1)) << (count - (count >> 1))  # by 32 at once would be undefined


@gluon.jit
def _where_bit(bits, bit, x, other):
    """x where `bits` have `bit`, else `other`, which is float32 too."""
    # So written, it becomes predicates for seven bits at a time (R2P); by comparisons, an instruction or two for each.
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $1, $2; setp.ne.b32 p, t, 0; selp.f32 $0, $3, $4, p; }",
        "=f,r,r,f,f",
        [bits, bit, x, other],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def where_seen(x, line, first, other, scores: gl.constexpr):
    """x (rows, columns), laid out as `scores`, where a row sees the place `first` + column, elsewhere `other`. `line`
    has what `note_sight` or `pack_sequences` notes."""
    # A thread has two of each eight columns: a bit for each of them is all that it keeps of a row's sight.
    BITS: gl.constexpr = 8 if line.dtype == gl.int16 else 16
    MASK: gl.constexpr = (1 << BITS) - 1
    COLUMNS: gl.constexpr = x.shape[1]
    layout: gl.constexpr = eights(gl.num_warps(), COLUMNS)
    pairs: gl.constexpr = gl.SliceLayout(1, layout)
    sight = line.load(gl.SliceLayout(1, pairs)).to(gl.int32)
    low, end = (sight & MASK) - first, ((sight >> BITS) & MASK) + 1 - first
    low, end = gl.minimum(gl.maximum(low, 0), COLUMNS), gl.minimum(gl.maximum(end, 0), COLUMNS)
    rest = gl.arange(0, 8, layout=gl.SliceLayout(0, pairs))
    bits = _from(low[:, None], (rest & 6)[None, :]) & ~_from(end[:, None], (rest & 6)[None, :])
    eight = gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    which = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout))) & 1
    bits, bit = gl.broadcast(bits[:, None, :], 1 << (2 * eight[None, :, None] + which[None, None, :]))
    bits = gl.convert_layout(gl.reshape(bits, x.shape), scores, assert_trivial=True)
    bit = gl.convert_layout(gl.reshape(bit, x.shape), scores, assert_trivial=True)
    return _where_bit(bits, bit, x, other)


@gluon.jit
def share_of(seed_ptr, dropout):
    """Of the weights, that dropout leaves; 1 without."""
    if seed_ptr is None:
        return 1.0
    else:
        return 1.0 - dropout


@gluon.jit
def more_of(seed_ptr, dropout):
    """By what the weights are multiplied that dropout leaves; 1 without."""
    if seed_ptr is None:
        return 1.0
    else:
        return 1.0 / (1.0 - dropout)


@gluon.jit
def note_delta(line, outs, which, douts, stage, pointer, length, share):
    """rowsum(out * dout) of a block of rows, times `share`; to memory too, as many as there are, unless `pointer` is
    None."""
    D: gl.constexpr = douts.shape[2]
    ROWS: gl.constexpr = 256 // D * gl.num_warps() * 2
    PIECES: gl.constexpr = douts.shape[1] // ROWS
    layout: gl.constexpr = vectors(D, gl.num_warps())
    pieces = line._reinterpret(gl.float32, [PIECES, ROWS], line.layout)
    for piece in gl.static_range(PIECES):
        out = chunk_of(outs, which, piece, ROWS).load(layout).to(gl.float32)
        dout = chunk_of(douts, stage, piece, ROWS).load(layout).to(gl.float32)
        delta = gl.sum(out * dout, 1) * share
        pieces.index(piece).store(delta)
        if pointer is not None:
            place = piece * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            gl.store(pointer + place, delta, mask=place < length)


@gluon.jit
def _store_block_turned_back(
    tiles, stage, dqkv_ptr, angles_ptr, head, start, first, length, scale,
    WHICH: gl.constexpr, H: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = tiles.shape[2]
    whole: gl.constexpr = whole_rows(D, gl.num_warps())
    half: gl.constexpr = half_rows(D, gl.num_warps())
    ROWS: gl.constexpr = whole.shape[0]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, half))
    columns = gl.arange(0, D // 2, layout=gl.SliceLayout(0, half))
    # How many there are is not known when compiling: unrolled, this would take more registers than there are.
    for chunk in range((gl.minimum(length - first, tiles.shape[1]) + ROWS - 1) // ROWS):
        place = first + chunk * ROWS + rows
        valid = place < length
        x1, x2 = split(chunk_of(tiles, stage, chunk, ROWS).load(whole), half)
        if scale is not None:
            x1, x2 = x1 * scale, x2 * scale
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
        dtype: gl.constexpr = dqkv_ptr.dtype.element_ty
        store_rows(at, x1.to(dtype), valid, MASKED)
        store_rows(at + D // 2, x2.to(dtype), valid, MASKED)


@gluon.jit
def _store_block_lines(
    tiles, stage, dqkv_ptr, head, start, first, length, scale,
    WHICH: gl.constexpr, H: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = tiles.shape[2]
    ROWS: gl.constexpr = 64
    layout: gl.constexpr = vectors(D, gl.num_warps())
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    dtype: gl.constexpr = dqkv_ptr.dtype.element_ty
    for chunk in range((gl.minimum(length - first, tiles.shape[1]) + ROWS - 1) // ROWS):
        place = first + chunk * ROWS + rows
        x = chunk_of(tiles, stage, chunk, ROWS).load(layout)
        if scale is not None:
            x *= scale
        column = (WHICH * H + head) * D + columns
        at = dqkv_ptr + ((start + place).to(gl.int64)[:, None] * (3 * H * D) + column[None, :])
        store_rows(at, x.to(dtype), place < length, MASKED)


@gluon.jit
def store_block(
    tiles, stage, dqkv_ptr, angles_ptr, head, start, first, length, scale,
    WHICH: gl.constexpr, H: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The gradient of a block of q, k or v, which is 0, 1 or 2, times `scale` unless that is None; where there are
    angles, of turned rows as that of rows before."""
    if angles_ptr is None:
        _store_block_lines(tiles, stage, dqkv_ptr, head, start, first, length, scale, WHICH, H, MASKED)
    else:
        _store_block_turned_back(
            tiles, stage, dqkv_ptr, angles_ptr, head, start, first, length, scale, WHICH, H, MASKED
        )
