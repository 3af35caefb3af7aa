"""What kernels share whose work comes in tiles: which comes next, and in Gluon their rows in shared memory and
registers."""

from .language import gl, gluon, tl, triton


@triton.jit
def tile_at(number, down, across, GROUP: tl.constexpr):
    """(i, j) of one of down x across tiles. GROUP of them, one below the other, come before those beside them: as many
    as stay in the cache."""
    first = number // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    return first + number % (GROUP * across) % height, number % (GROUP * across) // height


@gluon.constexpr_function
def vectors(size, warps):
    """Layout of rows of `size` columns in vectors of eight, a thread's rows `256 // size * warps` apart."""
    return gl.BlockedLayout([1, 8], [256 // size, size // 8], [warps, 1], [1, 0])


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, COUNT: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """COUNT tiles (ROWS, D) of 16-bit numbers for each of STAGES, laid out for matrix products."""
    layout: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16, 2)
    tiles = ()
    for _ in gl.static_range(COUNT):
        tiles = tiles + (gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], layout),)
    return tiles


@gluon.jit
def split(x, layout: gl.constexpr):
    """The halves of the columns of x, in a layout that moves nothing."""
    x1, x2 = gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return gl.convert_layout(x1, layout, assert_trivial=True), gl.convert_layout(x2, layout, assert_trivial=True)


@gluon.jit
def chunk_of(tiles, stage, chunk, CHUNK: gl.constexpr):
    """Rows from chunk * CHUNK on, CHUNK of them, of a stage's tile."""
    STAGES: gl.constexpr = tiles.shape[0]
    PIECES: gl.constexpr = tiles.shape[1] // CHUNK
    pieces = tiles._reinterpret(tiles.dtype, [STAGES * PIECES, CHUNK, tiles.shape[2]], tiles.layout)
    return pieces.index(stage * PIECES + chunk)
