"""What the kernels of `attention_hopper.py` are put together from: layouts, rows on their way to shared memory and
back, rotary embedding, masks, and the warps that prepare tiles.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_parts import group_at, sight_of
from .language import async_copy, fence_async_shared, gl, gluon, mbarrier
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
def eights(warps):
    """Layout of scores (16 * warps, 128) as a matrix product leaves them, their columns in eights: (.., 16, 8)."""
    registers = [[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0]]
    lanes, rows = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]], 16 * warps
    of_warps = [[16 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [rows, 16, 8])


@gluon.jit
def make_barriers(STAGES: gl.constexpr, MOVERS: gl.constexpr):
    """(full, ready, done), each for every stage: completed by all copies of the movers' warps, by the preparers, and by
    the multipliers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * MOVERS)
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(done.index(stage), count=1)
    return full, ready, done


@gluon.jit
def join(x1, x2, layout: gl.constexpr):
    x = gl.reshape(gl.permute(gl.join(x1, x2), (0, 2, 1)), (x1.shape[0], 2 * x1.shape[1]))
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def turn(x1, x2, cos, sin):
    return (x1 * cos - x2 * sin).to(x1.dtype), (x2 * cos + x1 * sin).to(x1.dtype)


@gluon.jit
def angles_of(angles_ptr, positions, stage, chunk, columns, D: gl.constexpr, CHUNK: gl.constexpr, layout: gl.constexpr):
    """cos and sin for a chunk's rows, (CHUNK, D / 2), float16. They are read again for every tile: registers are
    scarcer than cache."""
    if positions is None:
        position = chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    else:
        PIECES: gl.constexpr = positions.shape[1] // CHUNK
        pieces = positions._reinterpret(gl.int8, [positions.shape[0] * PIECES, CHUNK], positions.layout)
        position = pieces.index(stage * PIECES + chunk).load(gl.SliceLayout(1, layout)).to(gl.int32)
    at = angles_ptr + (position[:, None] * D + columns[None, :])
    return gl.load(at, eviction_policy="evict_last"), gl.load(at + D // 2, eviction_policy="evict_last")


@gluon.jit
def prepare(
    groups_ptr, bounds_ptr, angles_ptr, tiles, notes, barriers, turns, T, window,
    H: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Turns q and k of every tile, and notes the sight of each row, its first place in the low byte and how many in
    the high one, and its position in its sequence."""
    q_tiles, k_tiles = tiles[0], tiles[1]
    sights, positions = notes
    full, ready, _ = barriers
    WARPS: gl.constexpr = gl.num_warps()
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    whole: gl.constexpr = whole_rows(D, WARPS)
    half: gl.constexpr = half_rows(D, WARPS)
    CHUNK: gl.constexpr = whole.shape[0]
    place = gl.arange(0, TILE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    columns = gl.arange(0, D // 2, layout=gl.SliceLayout(0, half))
    program, programs = gl.program_id(0), gl.num_programs(0)
    for i in range(turns):
        stage = i % STAGES
        if groups_ptr is not None:
            start, length = group_at(groups_ptr, (program + i * programs) // H, TILE)
            valid = place < length
            low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
            first = gl.load(bounds_ptr + start + place, mask=valid, other=0) - start
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if groups_ptr is not None:
            sights.index(stage).store((low | (size.to(gl.int32) << 8)).to(gl.int16))
            if angles_ptr is not None:
                positions.index(stage).store(gl.where(valid, place - first, 0).to(gl.int8))
        if angles_ptr is not None:
            cos, sin = angles_of(angles_ptr, positions, stage, 0, columns, D, CHUNK, half)
            for chunk in range(TILE // CHUNK):
                cos32, sin32 = cos.to(gl.float32), sin.to(gl.float32)
                # Those of the next chunk, long before they are used.
                cos, sin = angles_of(
                    angles_ptr, positions, stage, (chunk + 1) % (TILE // CHUNK), columns, D, CHUNK, half
                )
                q, k = chunk_of(q_tiles, stage, chunk, CHUNK), chunk_of(k_tiles, stage, chunk, CHUNK)
                q1, q2 = split(q.load(whole), half)
                k1, k2 = split(k.load(whole), half)
                q1, q2 = turn(q1, q2, cos32, sin32)
                k1, k2 = turn(k1, k2, cos32, sin32)
                q.store(join(q1, q2, whole))
                k.store(join(k1, k2, whole))
        fence_async_shared()
        mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def seen_of(sights, scores: gl.constexpr):
    """Which places each row sees, from what `prepare` notes, in the layout `scores`."""
    # In eights, as `seen_by_tile` does it: which eight it is, is known when compiling.
    layout: gl.constexpr = eights(gl.num_warps())
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    sight = sights.load(of_rows).to(gl.int32)
    low, size = sight & 0xFF, ((sight >> 8) & 0xFF).to(gl.uint32)
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
    place = gl.arange(0, line.shape[0], layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    if MASKED:
        async_copy.async_copy_global_to_shared(line, pointer + start + place, mask=place < length)
    else:
        async_copy.async_copy_global_to_shared(line, pointer + start + place)


@gluon.jit
def store_rows(pointer, x, valid, MASKED: gl.constexpr):
    if MASKED:
        gl.store(pointer, x, mask=valid[:, None])
    else:
        gl.store(pointer, x)
