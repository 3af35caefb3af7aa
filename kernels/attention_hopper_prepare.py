"""The warps that prepare tiles for `attention_hopper_tile_forward.py` and `_backward.py`: rotary embedding and masks.

A place in a tile that a group fills is a position, so the angles of all such tiles are the same, and the warps that
turn q and k keep them in registers: fetched for every tile they would be waited for longer than all of the rest takes.
What these warps write is taken away by the copy engine. Their fences wait for whatever they have under way in global
memory, so they begin nothing there themselves.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import angles_of, half_rows, join, turn, whole_rows
from .attention_parts import group_at, sight_of
from .language import fence_async_shared, gl, gluon, mbarrier
from .tiles import chunk_of, split

PART = gl.constexpr(64)  # rows that are turned at a time, at the least


@gluon.constexpr_function
def _taller(layout, rows):
    """`layout` over `rows` rows; those that are more go to the threads that have the others."""
    height, columns = layout.shape
    more = [[height << i, 0] for i in range((rows // height).bit_length() - 1)]
    bases = layout.reg_bases + more, layout.lane_bases, layout.warp_bases
    return gl.DistributedLinearLayout(*bases, [], [max(rows, height), columns])


@gluon.jit
def _pack(cos, sin):
    """Both, float16, in a register."""
    return cos.to(gl.int16, bitcast=True).to(gl.int32) << 16 | (sin.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF)


@gluon.jit
def _unpack(both):
    """cos and sin, float32."""
    # Not pure, or the compiler does it once for all tiles, and keeps what takes twice as many registers and more.
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, high; cvt.f32.f16 $1, low; }",
        "=f,=f,r",
        [both],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _keep(angles_ptr, TILE: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """The angles of each part of a tile, as tall as `layout`."""
    ROWS: gl.constexpr = layout.shape[0]
    place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D // 2, layout=gl.SliceLayout(0, layout))
    kept = ()
    for part in gl.static_range(TILE // ROWS):
        at = angles_ptr + ((part * ROWS + place)[:, None] * D + columns[None, :])
        kept = kept + (_pack(gl.load(at), gl.load(at + D // 2)),)
    return kept


@gluon.jit
def _halve(x):
    """The upper and the lower half of the rows of x."""
    return gl.split(gl.permute(gl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))


@gluon.jit
def _stack(upper, lower):
    return gl.reshape(gl.permute(gl.join(upper, lower), (2, 0, 1)), (2 * upper.shape[0], upper.shape[1]))


@gluon.jit
def _turn_rows(x1, x2, kept, BACK: gl.constexpr, ROWS: gl.constexpr):
    """ROWS at a time: not all angles are to be unpacked at once."""
    if kept.shape[0] > ROWS:
        upper1, lower1 = _halve(x1)
        upper2, lower2 = _halve(x2)
        upper, lower = _halve(kept)
        upper1, upper2 = _turn_rows(upper1, upper2, upper, BACK, ROWS)
        lower1, lower2 = _turn_rows(lower1, lower2, lower, BACK, ROWS)
        return _stack(upper1, lower1), _stack(upper2, lower2)
    else:
        cos, sin = _unpack(kept)
        if BACK:
            x2, x1 = turn(x2, x1, cos, sin)
            return x1, x2
        else:
            return turn(x1, x2, cos, sin)


@gluon.jit
def _turn_part(tiles, stage, part, kept, whole: gl.constexpr, half: gl.constexpr, BACK: gl.constexpr):
    SIZE: gl.constexpr = whole.shape[1]
    lowest: gl.constexpr = whole_rows(SIZE, gl.num_warps())
    x = chunk_of(tiles, stage, part, whole.shape[0])
    x1, x2 = split(x.load(whole), half)
    x1, x2 = _turn_rows(x1, x2, kept, BACK, lowest.shape[0])
    x1, x2 = gl.convert_layout(x1, half, assert_trivial=True), gl.convert_layout(x2, half, assert_trivial=True)
    x.store(join(x1, x2, whole))


@gluon.jit
def _turn_tiles(q_tiles, k_tiles, stage, kept, whole: gl.constexpr, half: gl.constexpr, BACK: gl.constexpr):
    # The threads meet before a part is stored, and before one is loaded from where the last was stored: with q's and
    # k's in turn, one meeting serves as both.
    for part in gl.static_range(q_tiles.shape[1] // whole.shape[0]):
        _turn_part(q_tiles, stage, part, kept[part], whole, half, BACK)
        _turn_part(k_tiles, stage, part, kept[part], whole, half, BACK)


@gluon.jit
def _turn_full(angles_ptr, q_tiles, k_tiles, barriers, turns, BACKWARD: gl.constexpr):
    """Turns q and k of every tile; backward also the gradients that take their places, back."""
    full, _, ready, done, back = barriers
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    whole: gl.constexpr = _taller(whole_rows(D, gl.num_warps()), PART)
    half: gl.constexpr = _taller(half_rows(D, gl.num_warps()), PART)
    kept = _keep(angles_ptr, TILE, D, half)
    for i in range(turns + BACKWARD):
        if i < turns:
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            _turn_tiles(q_tiles, k_tiles, stage, kept, whole, half, False)
            fence_async_shared()
            mbarrier.arrive(ready.index(stage), count=1)
        if BACKWARD:  # known when compiling, unlike i  # noqa: SIM102
            if i > 0:
                stage = (i - 1) % STAGES
                mbarrier.wait(done.index(stage), ((i - 1) // STAGES) & 1)
                _turn_tiles(q_tiles, k_tiles, stage, kept, whole, half, True)
                fence_async_shared()
                mbarrier.arrive(back.index(stage), count=1)


@gluon.jit
def _prepare_masked(
    groups_ptr, bounds_ptr, angles_ptr, tiles, notes, barriers, turns, T, window,
    H: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """For tiles with a mask: notes the sight of each row, its first place in the low byte and how many in the high one,
    and its position in its sequence; turns q and k."""
    q_tiles, k_tiles = tiles[0], tiles[1]
    sights, positions = notes
    full, _, ready, _, _ = barriers
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
        start, length = group_at(groups_ptr, (program + i * programs) // H, TILE)
        valid = place < length
        low, size = sight_of(bounds_ptr, start, place, valid, T, window, WINDOWED)
        first = gl.load(bounds_ptr + start + place, mask=valid, other=0) - start
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        sights.index(stage).store((low | (size.to(gl.int32) << 8)).to(gl.int16))
        if angles_ptr is not None:
            positions.index(stage).store(gl.where(valid, place - first, 0).to(gl.int8))
            cos, sin = angles_of(angles_ptr, positions, stage, 0, columns, D, CHUNK, half)
            for chunk in range(TILE // CHUNK):
                cos32, sin32 = cos.to(gl.float32), sin.to(gl.float32)
                # Those of the next chunk, long before they are used.
                following = (chunk + 1) % (TILE // CHUNK)
                cos, sin = angles_of(angles_ptr, positions, stage, following, columns, D, CHUNK, half)
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
def prepare(
    groups_ptr, bounds_ptr, angles_ptr, tiles, notes, barriers, turns, T, window,
    H: gl.constexpr, WINDOWED: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Makes every tile ready for the multipliers; where neither groups nor angles are given, none need it."""
    if groups_ptr is None:
        _turn_full(angles_ptr, tiles[0], tiles[1], barriers, turns, BACKWARD)
    else:
        _prepare_masked(groups_ptr, bounds_ptr, angles_ptr, tiles, notes, barriers, turns, T, window, H, WINDOWED)
