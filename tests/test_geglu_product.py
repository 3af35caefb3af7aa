"""GEGLU within the products beside it: native on a card of compute capability 9.0; without a GPU `gluon_on_cpu` stands
in for Gluon.

The rule is that of test_operators.py: against fp64, at most twice the error of plain PyTorch in the same dtype.
Shapes: T rows, C columns of the product's input, I columns of GEGLU's output.
"""

import pytest
import torch
import torch.nn.functional as F
from gluon_on_cpu import run
from pairs import parametrize_pairs
from test_linear import assert_as_exact_as, plain_linear
from test_operators import NATIVE, randn

from cramfast.kernels import add_layer_norm_geglu_linear, add_layer_norm_linear, geglu_linear, geglu_product
from cramfast.kernels.gelu import geglu_reference
from cramfast.kernels.layer_norm import add_layer_norm_reference

SERVED = NATIVE and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus"),
    pytest.mark.skipif(NATIVE and not SERVED, reason="for compute capability 9.0"),
]
needs_hopper = pytest.mark.skipif(not SERVED, reason="needs a CUDA device of compute capability 9.0")

DTYPES = (torch.float16, torch.bfloat16)
# A tile has 128 rows, and columns in 64 or 128; a step has 64 of C.
SIZES = ((1, 16, 16), (63, 64, 96), (128, 64, 128), (300, 80, 208), (700, 208, 64), (900, 64, 208))
if NATIVE:
    SIZES += tuple((rows, columns, 1536) for rows in (100, 1000, 20_000) for columns in (96, 768, 1024))
RUNS = 20 if NATIVE else 2
SERVES = geglu_product._serves
NAMES = ("x", "residual", "norm_weight", "norm_bias", "wide", "wide_bias", "narrow", "narrow_bias")


class _Simulated:
    """In place of a `Launch`: the kernel's Python."""

    def __init__(self, kernel, pointers, scalars, constants, num_warps):
        self.kernel, self.constants, self.num_warps = kernel, constants, num_warps

    def __call__(self, grid, *arguments):
        run(self.kernel, grid, *arguments, num_warps=self.num_warps, **self.constants)


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    if not NATIVE:
        monkeypatch.setattr(geglu_product, "Launch", _Simulated)
        monkeypatch.setattr(geglu_product, "multiprocessors", lambda device: 3)
        monkeypatch.setattr(geglu_product, "_serves", lambda x, weight: x.dtype in DTYPES)
        for launch in (geglu_product.forward_launch, geglu_product.backward_launch):
            monkeypatch.setattr(geglu_product, launch.__name__, launch.__wrapped__)


def factors(size, dtype, seed=0):
    """x or dz (T, C), a weight (2I, C), a weight (C, I) and u (T, 2I)."""
    rows, columns, width = size
    wide = randn(2 * width, columns, seed=seed + 1) / columns**0.5
    narrow = randn(columns, width, seed=seed + 2) / columns**0.5
    u = 2 * randn(rows, 2 * width, seed=seed + 3)
    return [tensor.to(dtype) for tensor in (randn(rows, columns, seed=seed), wide, narrow, u)]


def forward_by_torch(x, weight, approximate):
    u = F.linear(x, weight)
    return u, geglu_reference(u, approximate)


def backward_by_torch(dz, weight, u, approximate):
    u = u.clone().requires_grad_()
    y = geglu_reference(u, approximate)
    y.backward(dz @ weight)
    return u.grad, y.detach()


def assert_right(theirs, ours, exact):
    assert [(y.dtype, y.shape) for y in ours] == [(y.dtype, y.shape) for y in theirs]
    assert_as_exact_as(*(dict(enumerate(results)) for results in (theirs, ours, exact)), 1)


@parametrize_pairs(size=SIZES, dtype=DTYPES, approximate=["none", "tanh"])
def test_forward_is_as_exact_as_torch(size, dtype, approximate):
    x, weight, _, _ = factors(size, dtype)
    ours = geglu_product.product_and_geglu(x, weight, None, approximate)
    exact = forward_by_torch(x.double(), weight.double(), approximate)
    assert_right(forward_by_torch(x, weight, approximate), ours, exact)


@parametrize_pairs(size=SIZES, dtype=DTYPES, approximate=["none", "tanh"], activation=[False, True])
def test_backward_is_as_exact_as_torch(size, dtype, approximate, activation):
    dz, _, weight, u = factors(size, dtype)
    before = u.clone()
    du, y = geglu_product.product_and_geglu_backward(dz, weight, u, approximate, activation)
    assert torch.equal(u, before) and (y is not None) == activation
    results = 1 + activation
    theirs = backward_by_torch(dz, weight, u, approximate)[:results]
    exact = backward_by_torch(dz.double(), weight.double(), u.double(), approximate)[:results]
    assert_right(theirs, (du, y)[:results], exact)
    again, _ = geglu_product.product_and_geglu_backward(dz, weight, u, approximate, activation, in_place=True)
    assert again is u and torch.equal(again, du)


def test_tensors_with_gaps_and_at_odd_addresses():
    x, weight, narrow, u = factors((200, 64, 96), torch.bfloat16)
    expected = geglu_product.product_and_geglu(x, weight, None, "none")
    for change in (lambda t: t.repeat_interleave(2, 1)[:, ::2], lambda t: F.pad(t.flatten(), (1, 0))[1:].view(t.shape)):
        found = geglu_product.product_and_geglu(change(x), change(weight), None, "none")
        assert all(map(torch.equal, found, expected))
        gradients = geglu_product.product_and_geglu_backward(change(x), change(narrow), change(u), "none", True)
        assert all(map(torch.equal, gradients, geglu_product.product_and_geglu_backward(x, narrow, u, "none", True)))


def test_what_is_no_number_stays_in_its_row():
    x, weight, narrow, u = factors((200, 64, 64), torch.float16)
    x[77, 3] = torch.nan
    du, _ = geglu_product.product_and_geglu_backward(x, narrow, u, "none")
    for result in (*geglu_product.product_and_geglu(x, weight, None, "none"), du):
        assert result[77].isnan().all() and not torch.cat((result[:77], result[78:])).isnan().any()


def test_the_same_every_time():
    x, weight, narrow, u = factors((1000, 192, 256), torch.bfloat16)
    results = [
        (
            *geglu_product.product_and_geglu(x, weight, None, "none"),
            *geglu_product.product_and_geglu_backward(x, narrow, u, "none", True),
        )
        for _ in range(RUNS)
    ]
    assert all(torch.equal(ours, first) for found in results for ours, first in zip(found, results[0], strict=True))


# The layer


def block(inputs, **options):
    return add_layer_norm_geglu_linear(*map(inputs.get, NAMES), **options)


def block_apart(inputs, recompute=False):
    u, s = add_layer_norm_linear(*map(inputs.get, NAMES[:6]), recompute=recompute)
    return geglu_linear(u, *map(inputs.get, NAMES[6:]), recompute=recompute), s


def block_by_torch(inputs):
    y, s = add_layer_norm_reference(*map(inputs.get, NAMES[:4]), 1e-5)
    u = plain_linear(y, *map(inputs.get, NAMES[4:6]))
    return plain_linear(geglu_reference(u), *map(inputs.get, NAMES[6:])), s


def block_inputs(rows, dtype, columns=64, width=96, biased=False):
    x, wide, narrow, _ = factors((rows, columns, width), dtype)
    inputs = {"x": x, "residual": randn(rows, columns, dtype=dtype, seed=5), "wide": wide, "narrow": narrow}
    inputs |= {"norm_weight": 1 + 0.1 * randn(columns, seed=6), "norm_bias": randn(columns, seed=7)}
    return inputs | ({"wide_bias": randn(2 * width, seed=8), "narrow_bias": randn(columns, seed=9)} if biased else {})


def evaluate(function, inputs, collect: bool, **options):
    """Outputs, gradients and, where they are to be collected, those of the weights."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    weights = [leaves[name] for name in ("wide", "narrow")]
    for weight in weights if collect else ():
        weight.main_grad = torch.full_like(weight, torch.nan, dtype=torch.float32)
        weight.replaces_main_grad = True
    outputs = function(leaves, **options)
    grads = [randn(*y.shape, dtype=torch.float16, seed=20 + i).to(y.dtype) for i, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, [*leaves.values()], grads, allow_unused=True)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    if collect:
        assert named["dwide"] is None and named["dnarrow"] is None
        named |= {"dwide": weights[0].main_grad, "dnarrow": weights[1].main_grad}
    return named | {f"output {i}": y.detach() for i, y in enumerate(outputs)}


def assert_layer_is_right(inputs, **options):
    ours = evaluate(block, inputs, collect=True, **options)
    dtype = {name: inputs[name].to(inputs["x"].dtype) for name in ("norm_weight", "norm_bias")}
    theirs = evaluate(block_by_torch, inputs | dtype, collect=False)
    exact = evaluate(block_by_torch, {name: tensor.double() for name, tensor in inputs.items()}, collect=False)
    assert_as_exact_as(theirs, ours, exact, len(inputs["x"]))


@parametrize_pairs(
    rows=[1, 100, *([5000] if NATIVE else [])],
    dtype=[torch.float32, *DTYPES],
    biased=[False, True],
    recompute=[False, True],
)
def test_the_layer_is_as_exact_as_torch(rows, dtype, biased, recompute):
    assert_layer_is_right(block_inputs(rows, dtype, biased=biased), recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_sizes_that_the_kernels_do_not_take(recompute, monkeypatch):
    monkeypatch.setattr(geglu_product, "_serves", SERVES)
    assert_layer_is_right(block_inputs(63, torch.float16, columns=40, width=24), recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_not_collected_goes_through_autograd(recompute):
    inputs = block_inputs(100, torch.float16)
    ours, theirs = (evaluate(f, inputs, collect=False, recompute=recompute) for f in (block, block_apart))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_hopper
@pytest.mark.parametrize(("mode", "dtype", "fused"), [
    ("auto", torch.bfloat16, True),
    ("auto", torch.float32, False),
    ("reference", torch.bfloat16, False),
])  # fmt: skip
def test_where_the_layer_is_fused(mode, dtype, fused, monkeypatch):
    monkeypatch.setenv("CRAMFAST_KERNELS", mode)
    launched = []
    for name in ("forward_launch", "backward_launch"):
        launch = getattr(geglu_product, name)
        monkeypatch.setattr(geglu_product, name, lambda *rest, launch=launch: launched.append(launch) or launch(*rest))
    evaluate(block, block_inputs(100, dtype), collect=True)
    assert len(launched) == (2 if fused else 0)


@needs_hopper
def test_the_layer_takes_no_more_memory_than_its_parts():
    inputs, peaks = block_inputs(20_000, torch.bfloat16, 768, 1536), []
    for function in (block_apart, block):
        evaluate(function, inputs, collect=True)
        torch.cuda.reset_peak_memory_stats()
        evaluate(function, inputs, collect=True)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0]


def test_an_unknown_form_of_gelu_is_refused():
    inputs = block_inputs(3, torch.float16)
    with pytest.raises(ValueError, match="approximate is 'erf', expected one of"):
        block(inputs, approximate="erf")
