"""Rotary embedding in tiles that groups fill, for `attention_hopper.py`.

A place in such a tile is a position, so the angles of all tiles are the same, and the warps that turn q and k keep them
in registers: fetched for every tile they would be waited for longer than all of the rest takes. What these warps write
is taken away by the copy engine. Their fences wait for whatever they have under way in global memory, so they begin
nothing there themselves.

Symbols in comments: D head size.
"""

from .attention_hopper_parts import half_rows, join, turn, whole_rows
from .language import fence_async_shared, gl, gluon, mbarrier
from .tiles import chunk_of, split

PART = gl.constexpr(64)  # rows that are turned at a time, at the least


@gluon.constexpr_function
def taller(layout, rows):
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
    # Before a part is stored all of its threads have to have it: they meet, which is when q's and k's follow each other
    # as often as there are parts of both.
    for part in gl.static_range(q_tiles.shape[1] // whole.shape[0]):
        _turn_part(q_tiles, stage, part, kept[part], whole, half, BACK)
        _turn_part(k_tiles, stage, part, kept[part], whole, half, BACK)


@gluon.jit
def turn_full(angles_ptr, q_tiles, k_tiles, barriers, turns, BACKWARD: gl.constexpr):
    """Turns q and k of every tile; backward also the gradients that take their places, back."""
    full, _, ready, done, back = barriers
    STAGES: gl.constexpr = q_tiles.shape[0]
    TILE: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    whole: gl.constexpr = taller(whole_rows(D, gl.num_warps()), PART)
    half: gl.constexpr = taller(half_rows(D, gl.num_warps()), PART)
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
