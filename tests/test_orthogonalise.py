"""Muon's orthogonalisation against its definition, and the symmetric product that it is made of.

The rule is that of test_operators.py: against fp64, at most twice the error of PyTorch in the same dtype, in relative
L2. Shapes: N matrices of m rows and n columns.
"""

import importlib
import types

import pytest
import torch
from test_operators import DEVICE, DTYPES, NATIVE, needs_gpu, randn
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.kernels import choose, orthogonalise, orthogonalise_reference

# By its name in the package, `orthogonalise` is the function.
FILE = importlib.import_module("cramfast.kernels.orthogonalise")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

TILINGS = {"large": FILE._LARGE, "small": FILE._SMALL}
NARROW = (torch.float16, torch.bfloat16)
# Tall, wide, just past a tile, square, one row, one element.
SHAPES = ((2, 96, 64), (3, 40, 130), (1, 257, 129), (2, 48, 48), (2, 1, 7), (1, 1, 1))
MODEL_SHAPES = ((16, 2304, 768), (16, 768, 768), (16, 3072, 768), (16, 768, 1536))
RUNS = 20 if NATIVE else 2


@pytest.fixture(params=TILINGS)
def tiling(request, monkeypatch):
    """Runs the kernels as on the cards of either kind."""
    monkeypatch.setattr(FILE, "tiling_for", lambda _: TILINGS[request.param])
    return TILINGS[request.param]


def assert_as_exact_as_torch(update):
    ours = orthogonalise(update)
    theirs = orthogonalise_reference(update, dtype=ours.dtype)
    exact = orthogonalise_reference(update.double())
    assert ours.shape == update.shape and ours.is_contiguous()
    assert ours.dtype == (torch.bfloat16 if NATIVE and update.dtype == torch.float32 else update.dtype)
    error, allowed = (ours - exact).norm(), 2 * (theirs - exact).norm()
    # One rounding costs eps / 4 or so, and is never too much.
    least = torch.finfo(ours.dtype).eps / 4 * exact.norm()
    assert error <= max(allowed, least), f"{error}, torch {allowed / 2}"


def test_the_kernel_is_what_runs_here():
    assert {choose("orthogonalise", DEVICE, dtype).backend for dtype in DTYPES} == {"triton"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_torch(tiling, shape, dtype):
    assert_as_exact_as_torch(randn(*shape, dtype=dtype))


@needs_gpu
@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_matrices_of_models(shape):
    assert_as_exact_as_torch(randn(*shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_matrices_of_few_directions(spread, dtype):
    """Updates of training: most of the norm in some singular values."""
    update = randn(2, 96, 4) @ randn(2, 4, 160, seed=1) + spread * randn(2, 96, 160, seed=2)
    assert_as_exact_as_torch(update.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 96, 64), (2, 64, 160)])
def test_singular_values_come_near_1(shape, dtype):
    left, _, right = torch.linalg.svd(randn(*shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.1, 1.0, min(shape[1:]), dtype=torch.float64, device=DEVICE)
    result = orthogonalise((left * values @ right).to(dtype)).double()
    found = torch.linalg.svdvals(result)
    assert found.min() > 0.6 and found.max() < 1.3
    # Its singular vectors are those of the update: both projections are symmetric, but for rounding.
    projected = left.mT @ result @ right.mT
    assert (projected - torch.diag_embed(projected.diagonal(dim1=1, dim2=2))).norm() < 0.05 * projected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_an_update_does_not_matter(dtype):
    update = randn(2, 40, 24, dtype=dtype)
    expected = orthogonalise(update)
    # Powers of two, by which little rounds, and sums of squares that fp16 does not hold.
    for factor in (2.0**-4, 2.0**13):
        difference = orthogonalise(update * factor).double() - expected.double()
        # One rounding more, and in fp32 the 1e-7 that is added to a norm of 2.
        assert difference.norm() <= (torch.finfo(expected.dtype).eps + 1e-6) * expected.double().norm()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps(steps):
    update = randn(2, 40, 24, dtype=torch.float16)
    exact = orthogonalise_reference(update.double(), steps)
    theirs = orthogonalise_reference(update, steps, dtype=torch.float16)
    assert (orthogonalise(update, steps) - exact).norm() <= 2 * (theirs - exact).norm()


def test_one_step_is_the_polynomial_of_the_singular_values():
    left, _, right = torch.linalg.svd(randn(1, 24, 40, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.1, 1.0, 24, dtype=torch.float64, device=DEVICE)
    s = values / values.norm()
    expected = left * (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ right
    found = orthogonalise_reference(left * values @ right, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # eps in the norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype):
    update = randn(3, 40, 24, dtype=dtype)
    update[1] = 0
    result = orthogonalise(update)
    assert not result[1].any()
    assert result.isfinite().all() and result[0].any() and result[2].any()
    assert torch.equal(result[::2], orthogonalise(update[::2]))


@pytest.mark.parametrize("shape", [(0, 40, 24), (0, 24, 40)])
def test_no_matrices(shape):
    assert orthogonalise(torch.empty(shape, device=DEVICE)).shape == shape


@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 20, 50)])
def test_transposed_and_strided_updates(tiling, shape):
    count, rows, columns = shape
    update = randn(*shape, dtype=torch.float16)
    expected = orthogonalise(update)
    wide = randn(2 * count, rows, 2 * columns, seed=1, dtype=torch.float16)
    wide[::2, :, ::2] = update
    turned = update.mT.contiguous().mT
    for strided in (wide[::2, :, ::2], turned):
        assert not strided.is_contiguous()
        result = orthogonalise(strided)
        assert result.is_contiguous()
        # The norm may add up in another order.
        assert (result.double() - expected.double()).norm() <= torch.finfo(torch.float16).eps * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 20, 50)])
def test_out(tiling, shape, dtype):
    update = randn(*shape, dtype=dtype)
    expected, before = orthogonalise(update, 2), update.clone()
    for out_dtype in (torch.float32, *NARROW):
        whole = torch.full((shape[0], shape[1] + 1, shape[2] + 1), torch.nan, dtype=out_dtype, device=DEVICE)
        turned = torch.full((shape[0], shape[2], shape[1]), torch.nan, dtype=out_dtype, device=DEVICE).mT
        for out in (whole[:, 1:, 1:], turned, torch.empty(shape, dtype=out_dtype, device=DEVICE)):
            assert orthogonalise(update, 2, out=out) is out
            # A product may go another way into other strides.
            eps = max(torch.finfo(x).eps for x in (out_dtype, expected.dtype))
            assert (out.double() - expected.double()).norm() <= eps * expected.double().norm()
        assert whole[:, 0].isnan().all() and whole[:, :, 0].isnan().all()
    assert torch.equal(update, before)
    assert torch.equal(orthogonalise(update, 2, out=update), expected.to(dtype))


def test_out_of_the_reference(reference):
    update = randn(2, 24, 40)
    out = torch.empty(2, 24, 40, dtype=torch.bfloat16, device=DEVICE)
    assert orthogonalise(update, out=out) is out
    assert torch.equal(out, orthogonalise(update).bfloat16())


def test_the_same_every_time():
    update = randn(2, 300, 144, dtype=torch.float16)
    results = [orthogonalise(update) for _ in range(RUNS)]
    assert all(torch.equal(results[0], result) for result in results)


def symmetric(p, tiling, scale, shift, down):
    side = p.shape[2] if down else p.shape[1]
    out = torch.full((p.shape[0], side, side), torch.nan, dtype=p.dtype, device=DEVICE)
    FILE._symmetric(p, out, tiling, scale, shift, down)
    return out


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.25, -1.5)])
@pytest.mark.parametrize(("side", "depth"), [(16, 16), (48, 208), (144, 80), (272, 16)])
@pytest.mark.parametrize(("name", "down"), [("large", False), ("large", True), ("small", False)])
def test_symmetric_products(name, down, side, depth, scale, shift, dtype):
    rows = randn(2, side, depth, dtype=dtype)
    ours = symmetric(rows.mT.contiguous() if down else rows, TILINGS[name], scale, shift, down)
    unit = torch.eye(side, device=DEVICE, dtype=torch.float64).expand(2, -1, -1)
    exact = scale * (rows.double() @ rows.double().mT) + shift * unit
    theirs = torch.baddbmm(unit.to(dtype), rows, rows.mT, beta=shift, alpha=scale)
    assert torch.equal(ours, ours.mT)
    error, allowed = (ours - exact).norm(), 2 * (theirs - exact).norm()
    assert error <= max(allowed, torch.finfo(dtype).eps / 4 * exact.norm()), f"{error}, torch {allowed / 2}"


@pytest.mark.parametrize("tiles", range(1, 7))
def test_the_tiles_are_the_triangle(tiles):
    # Of ones, so that every element is the depth, and NaN where nothing was written.
    tiling = FILE.Tiling(16, 16, 4, 1, down=True)
    p = torch.ones(1, 16 * tiles, 16, dtype=torch.float16, device=DEVICE)
    assert (symmetric(p, tiling, 1.0, 0.0, False) == 16).all()


def test_which_products_go_down_the_columns(monkeypatch):
    seen, launch = [], FILE.symmetric_launch
    monkeypatch.setattr(FILE, "symmetric_launch", lambda *options: seen.append(options[1]) or launch(*options))
    for setting in TILINGS.values():
        monkeypatch.setattr(FILE, "tiling_for", lambda _, setting=setting: setting)
        for shape in ((1, 48, 32), (1, 32, 48)):
            orthogonalise(randn(*shape), 1)
    assert seen == [True, False] + 6 * [False]


def test_there_is_no_gradient(reference):
    assert not orthogonalise(randn(1, 8, 8).requires_grad_()).requires_grad


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 48, 32), (2, 20, 40)])
def test_compiled_as_one_graph(shape, out_dtype):
    counter = CompileCounterWithBackend("aot_eager")
    update = randn(*shape, dtype=torch.float16)
    expected = orthogonalise(update)
    out = None if out_dtype is None else torch.empty(shape, dtype=out_dtype, device=DEVICE)
    result = torch.compile(orthogonalise, backend=counter, fullgraph=True)(update, out=out)
    assert counter.frame_count == 1
    assert torch.equal(result, expected.to(result.dtype))
    assert out is None or torch.equal(out, result)


def test_the_operator_passes_opcheck():
    update = randn(2, 40, 24, dtype=torch.float16)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.cramfast.orthogonalise.default, (update, 2, torch.float16), test_utils=tests)


@needs_gpu
@pytest.mark.parametrize("shape", [(4, 768, 256), (4, 200, 300)])
def test_captured_in_a_graph(shape):
    update, out = randn(*shape), torch.empty(shape, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        orthogonalise(update, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        orthogonalise(update, out=out)
    for seed in (1, 2):
        update.copy_(randn(*shape, seed=seed))
        graph.replay()
        assert torch.equal(out, orthogonalise(update).float())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (75, (torch.float16, torch.float16, torch.float16)),
        (80, (torch.bfloat16, torch.float16, torch.bfloat16)),
    ],
)
def test_gpus_compute_in_16_bits(monkeypatch, capability, expected):
    monkeypatch.setattr(FILE, "capability_of", lambda _: capability)
    updates = [types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype) for dtype in DTYPES]
    assert tuple(map(FILE.arithmetic, updates)) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"update": torch.ones(2, 4, 4, dtype=torch.int64)}, TypeError, "update is int64, expected a floating dtype"),
        ({"update": torch.ones(4, 4)}, ValueError, r"update has shape \(4, 4\), expected \(N, m, n\)"),
        ({"update": torch.ones(2, 0, 4)}, ValueError, r"update has shape \(2, 0, 4\), expected \(N, m, n\)"),
        ({"steps": 0}, ValueError, "steps is 0, expected at least 1"),
        ({"steps": 5.0}, TypeError, "steps is of type float, expected int"),
        ({"out": torch.ones(2, 4, 4, dtype=torch.int64)}, TypeError, "out is int64, expected a floating dtype"),
        ({"out": torch.ones(2, 4, 5)}, ValueError, r"out has shape \(2, 4, 5\), expected \(2, 4, 4\)"),
        ({"out": torch.ones(2, 4, 4, device="meta")}, ValueError, "out is on meta, expected .+ like the other tensors"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"update": torch.ones(2, 4, 4), "steps": 5, "out": None} | change
    moved = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for name, x in arguments.items()
    }
    with pytest.raises(error, match=f"^orthogonalise: {message}"):
        orthogonalise(moved["update"], moved["steps"], out=moved["out"])
