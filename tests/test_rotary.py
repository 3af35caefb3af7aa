"""Rotary embedding of q and k in one kernel, with its gradient: `turn`, against the definition in fp64.

The rule is that of the kernels: an error at most twice that of the definition in the same dtype.

Shapes: T tokens, H heads, D head size.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.kernels import Launch
from cramfast.kernels.rotary import rotate, tile_angles, turn
from cramfast.kernels.sequences import sequence_positions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
LENGTHS = (1, 0, 63, 100, 17)


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def boundaries(lengths=LENGTHS):
    return torch.tensor((0, *lengths), device=DEVICE).cumsum(0).int()


def tables(positions, head_size, dtype=torch.float32):
    angle = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(0, head_size, 2) / head_size)
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def by_definition(qkv, cu_seqlens, cos, sin):
    _, position = sequence_positions(cu_seqlens, len(qkv))
    q, k, v = qkv.unbind(1)
    return torch.stack([*(rotate(x, cos[position, None], sin[position, None]) for x in (q, k)), v], dim=1)


def results(function, qkv, grad, *arguments):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *arguments)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


@DTYPES
@pytest.mark.parametrize("of_tables", [torch.float32, None])
@pytest.mark.parametrize(("heads", "head_size"), [(1, 64), (3, 32), (2, 96), (2, 40), (1, 6)])
def test_it_is_the_definition_and_so_is_its_gradient(launched, dtype, heads, head_size, of_tables):
    shape = sum(LENGTHS), 3, heads, head_size
    qkv, grad, ends = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), boundaries()
    cos, sin = tables(max(LENGTHS) + 5, head_size, of_tables or dtype)
    ours = results(turn, qkv, grad, ends, cos, sin)
    assert [(name, constants["BACK"]) for name, constants in launched] == [
        ("_turn_kernel", False),
        ("_turn_kernel", True),
    ]
    theirs = results(by_definition, qkv, grad, ends, cos, sin)
    exact = results(by_definition, qkv.double(), grad.double(), ends, cos.double(), sin.double())
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        assert (our - true).norm() <= 2 * (their - true).norm()
        assert torch.equal(our[:, 2], their[:, 2])


def test_tensors_with_gaps():
    qkv, ends, angles = randn(sum(LENGTHS), 3, 2, 64, dtype=torch.float16), boundaries(), tables(100, 32)
    spread = qkv[..., ::2]
    assert torch.equal(turn(spread, ends, *angles), turn(spread.contiguous(), ends, *angles))
    one = torch.ones((), dtype=torch.float16, device=DEVICE)
    (gradient,) = results(turn, spread, one.expand(spread.shape), ends, *angles)[1:]
    (expected,) = results(turn, spread, one.expand(spread.shape).contiguous(), ends, *angles)[1:]
    assert torch.equal(gradient, expected)


def test_other_dtypes_take_the_definition(monkeypatch):
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    monkeypatch.setattr(Launch, "__call__", None)
    qkv, ends, angles = randn(sum(LENGTHS), 3, 2, 32, dtype=torch.float32), boundaries(), tables(100, 32)
    torch.testing.assert_close(turn(qkv, ends, *angles), by_definition(qkv, ends, *angles))


def test_no_tokens():
    qkv = randn(0, 3, 2, 32, dtype=torch.float16)
    out, gradient = results(turn, qkv, qkv, boundaries((0, 0)), *tables(4, 32))
    assert out.shape == gradient.shape == qkv.shape


def test_it_compiles_whole_for_any_number_of_tokens():
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(turn, fullgraph=True, dynamic=True, backend=counted)
    angles = tables(64, 32)
    for lengths in ((4, 6), (30, 1), (17, 40)):
        qkv, ends = randn(sum(lengths), 3, 2, 32, dtype=torch.float16), boundaries(lengths)
        found, expected = (results(function, qkv, qkv, ends, *angles) for function in (compiled, turn))
        assert all(map(torch.equal, found, expected))
    assert counted.frame_count == 1
    torch.compiler.reset()


def test_twenty_times_the_same():
    qkv, ends, angles = randn(sum(LENGTHS), 3, 2, 32, dtype=torch.bfloat16), boundaries(), tables(100, 32)
    first = results(turn, qkv, qkv, ends, *angles)
    for _ in range(19):
        assert all(map(torch.equal, first, results(turn, qkv, qkv, ends, *angles)))


TILE = 128


@DTYPES
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("size", [1.0, 1.3])
def test_even_angles_are_known_as_such_and_continued(head_size, size, dtype):
    whole = [size * table for table in tables(TILE, head_size)]
    for positions in (TILE // 2 + 1, 100, TILE, TILE + 40):
        cos, sin = (size * table for table in tables(positions, head_size))
        angles = tile_angles(cos, sin, TILE)
        assert angles.dtype == torch.float16 and angles.shape == (TILE + 1, head_size)
        assert (angles[TILE] == 1).all()
        rows = min(positions, TILE)
        assert torch.equal(angles[:rows], torch.cat((cos, sin), dim=1)[:rows].half())
        # Half a unit of float16 for rounding, half for what continues past the last.
        assert (angles[:TILE].float() - torch.cat(whole, dim=1)).abs().max() <= size * 2**-11
    coarse = tile_angles(*(table.to(dtype) for table in whole), TILE)
    assert torch.equal(coarse[:TILE], torch.cat([table.to(dtype) for table in whole], dim=1).half())
    assert (coarse[TILE] == 0).all()  # rounded too much to be told from others


def test_other_angles_are_told_apart():
    cos, sin = tables(TILE, 64)
    phase = torch.linspace(0, 3, 32, device=DEVICE)
    shifted = cos * phase.cos() - sin * phase.sin(), sin * phase.cos() + cos * phase.sin()
    assert (tile_angles(*shifted, TILE)[TILE] == 1).all()
    one_off, other = cos.clone(), sin.clone()
    one_off[77, 3] += 1e-3
    other[1, 31] = float("nan")
    by_column = torch.arange(TILE, device=DEVICE)[:, None] // 16 * torch.linspace(0, 1, 32, device=DEVICE)
    for uneven in (
        (one_off, sin),
        (cos, other),
        (by_column.cos(), by_column.sin()),
        (0 * cos, 0 * sin),
        tables(TILE // 2, 64),  # too few to continue
    ):
        assert (tile_angles(*uneven, TILE)[TILE] == 0).all()
