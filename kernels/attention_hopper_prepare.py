"""The warps that prepare tiles for `attention_hopper_tile_forward.py` and `_backward.py`: rotary embedding and masks.

How q and k are turned against each other is all that scores know of rotary embedding. So the rows of a tile are turned
by the angles of their places in it, as if one sequence filled it, and these are the same for all tiles: the warps that
turn them keep them in registers. Fetched for every tile they would be waited for longer than all of the rest takes.
Of tables of which this is not true, as `tile_angles` tells, the angles of each row's position are fetched.

What these warps write is taken away by the copy engine, or by others. Their fences wait for whatever they have under
way in global memory, so they begin little there themselves.

Symbols in comments: T tokens of the batch, H heads, D head size.
"""

from .attention_hopper_parts import half_rows, join, line_of, notes_at, turn, whole_rows
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
def _angles_at(angles_ptr, position, D: gl.constexpr, layout: gl.constexpr):
    columns = gl.arange(0, D // 2, layout=gl.SliceLayout(0, layout))
    at = angles_ptr + (position[:, None] * D + columns[None, :])
    return _pack(gl.load(at), gl.load(at + D // 2))


@gluon.jit
def _rows_of(part, layout: gl.constexpr):
    return part * layout.shape[0] + gl.arange(0, layout.shape[0], layout=gl.SliceLayout(1, layout))


@gluon.jit
def _keep(angles_ptr, TILE: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """The angles of the places in a tile, in parts as tall as `layout`."""
    kept = ()
    for part in gl.static_range(TILE // layout.shape[0]):
        kept = kept + (_angles_at(angles_ptr, _rows_of(part, layout), D, layout),)
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
def _turn_by_position(
    q_tiles, k_tiles, stage, angles_ptr, places_ptr, slots, tile,
    whole: gl.constexpr, half: gl.constexpr, BACK: gl.constexpr,
):  # fmt: skip
    """The same by angles that are fetched."""
    TILE: gl.constexpr = q_tiles.shape[1]
    for part in gl.static_range(TILE // whole.shape[0]):
        position = notes_at(places_ptr, slots, tile, _rows_of(part, half), TILE) >> 16
        kept = _angles_at(angles_ptr, position, q_tiles.shape[2], half)
        _turn_part(q_tiles, stage, part, kept, whole, half, BACK)
        _turn_part(k_tiles, stage, part, kept, whole, half, BACK)


@gluon.jit
def _prepare(
    places_ptr, angles_ptr, tiles, sights, barriers, turns, slots,
    H: gl.constexpr, BACKWARD: gl.constexpr, BY_POSITION: gl.constexpr,
):  # fmt: skip
    q_tiles, k_tiles = tiles[0], tiles[1]
    full, rest, ready, done = barriers
    MASKED: gl.constexpr = places_ptr is not None
    TURNS: gl.constexpr = angles_ptr is not None
    RETURNS: gl.constexpr = TURNS and BACKWARD
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    whole: gl.constexpr = _taller(whole_rows(D, gl.num_warps()), PART)
    half: gl.constexpr = _taller(half_rows(D, gl.num_warps()), PART)
    program, programs = gl.program_id(0), gl.num_programs(0)
    if TURNS and not BY_POSITION:
        kept = _keep(angles_ptr, TILE, D, half)
    for i in range(turns + RETURNS):
        if i < turns:
            stage, tile = i % STAGES, (program + i * programs) // H
            if MASKED:
                note = notes_at(places_ptr, slots, tile, line_of(TILE), TILE)
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            if MASKED:
                sights.index(stage).store(note.to(gl.int16))
            if BY_POSITION:
                _turn_by_position(q_tiles, k_tiles, stage, angles_ptr, places_ptr, slots, tile, whole, half, False)
            elif TURNS:
                _turn_tiles(q_tiles, k_tiles, stage, kept, whole, half, False)
            if not MASKED:
                mbarrier.wait(rest.index(stage), (i // STAGES) & 1)
            fence_async_shared()
            mbarrier.arrive(ready.index(stage), count=1)
        if RETURNS:  # known when compiling, unlike i  # noqa: SIM102
            if i > 0:
                stage, tile = (i - 1) % STAGES, (program + (i - 1) * programs) // H
                mbarrier.wait(done.index(stage), ((i - 1) // STAGES) & 1)
                if BY_POSITION:
                    _turn_by_position(q_tiles, k_tiles, stage, angles_ptr, places_ptr, slots, tile, whole, half, True)
                else:
                    _turn_tiles(q_tiles, k_tiles, stage, kept, whole, half, True)
                fence_async_shared()
                mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def prepare(
    places_ptr, angles_ptr, tiles, sights, barriers, turns, slots, H: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Makes every tile ready for the multipliers: notes what each row sees, the first place in the low byte and the
    last in the high one, and turns q and k. Backward it also turns back the gradients that take their places."""
    if places_ptr is not None and angles_ptr is not None:  # known when compiling, unlike what angles there are
        if gl.load(angles_ptr + tiles[0].shape[1] * tiles[0].shape[2]) == 0:
            _prepare(places_ptr, angles_ptr, tiles, sights, barriers, turns, slots, H, BACKWARD, True)
        else:
            _prepare(places_ptr, angles_ptr, tiles, sights, barriers, turns, slots, H, BACKWARD, False)
    else:
        _prepare(places_ptr, angles_ptr, tiles, sights, barriers, turns, slots, H, BACKWARD, False)
