"""AdamW over flat buffers, against PyTorch's: native on a GPU, interpreted without one.

The rule: against AdamW in fp64, an update's error is at most twice that of `torch.optim.AdamW` in fp32, in relative L2,
for weights and moments.
"""

import importlib
import itertools
import math

import pytest
import torch
from test_operators import DEVICE, NATIVE, needs_gpu, randn

from cramfast.kernels import (
    OPERATORS,
    adamw,
    adamw_rates,
    adamw_reference,
    choose,
    update_rates,
    update_rates_reference,
)

FILE = importlib.import_module("cramfast.kernels.adamw")
SELFTEST = importlib.import_module("cramfast.kernels.selftest")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

# One element, multiples of 16 and of the block and not, more than one block.
SIZES = (1, 1000, 4096 + 16, 1024, 3 * 1024 + 7)
NARROW = (torch.float16, torch.bfloat16)
BETAS = {"beta1": 0.9, "beta2": 0.98}
OPTIONS = {**BETAS, "eps": 1e-12, "weight_decay": 0.01}
RUNS = 20 if NATIVE else 3


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(float(value), device=DEVICE)


def rates_of(lr: float = 1e-3, updates: int = 1, factor: float = 1.0, skipped: float = 0.0) -> torch.Tensor:
    return adamw_rates(*map(scalar, (lr, updates, factor, skipped)), **BETAS)


def start(size: int) -> dict[str, torch.Tensor]:
    """Weights and moments in the middle of training."""
    return {"weight": randn(size), "first": randn(size, seed=1), "second": randn(size, seed=2).square()}


def fresh(size: int) -> dict[str, torch.Tensor]:
    zeros = {name: torch.zeros(size, device=DEVICE) for name in ("first", "second")}
    return {"weight": randn(size), **zeros}


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def update(function, state, gradient, rates, working=None, **changes) -> None:
    """In place."""
    tensors = (state["weight"], gradient, state["first"], state["second"], rates, working)
    function(*tensors, **{**OPTIONS, **changes})


def by_torch(state, gradients, lrs, factors, dtype, weight_decay=0.01, eps=1e-12) -> dict[str, torch.Tensor]:
    """What torch.optim.AdamW makes of a fresh state in `dtype`."""
    weight = state["weight"].to(dtype, copy=True).requires_grad_()
    options = {"betas": tuple(BETAS.values()), "eps": eps, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([weight], foreach=False, fused=False, **options)
    for gradient, lr, factor in zip(gradients, lrs, factors, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient.to(dtype) * factor
        optimizer.step()
    moments = optimizer.state[weight]
    return {"weight": weight.detach(), "first": moments["exp_avg"], "second": moments["exp_avg_sq"]}


def assert_as_exact_as(theirs, ours, exact) -> None:
    for name, true in exact.items():
        assert ours[name].dtype == torch.float32 and ours[name].isfinite().all()
        error, allowed = (ours[name] - true).norm(), 2 * (theirs[name] - true).norm()
        # A rounding or two of a few elements are never too much.
        least = torch.finfo(torch.float32).eps / (1 if true.numel() == 1 else 4) * true.norm()
        assert error <= max(allowed, least), f"{name}: {error}, torch {allowed / 2}"


def test_the_kernel_is_what_runs_here(monkeypatch):
    assert choose("adamw", DEVICE, torch.float32).backend == "triton"
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    for dtype in (torch.float64, *NARROW):
        assert choose("adamw", DEVICE, dtype).backend == "reference"


@pytest.mark.parametrize("function", [adamw, adamw_reference])
@pytest.mark.parametrize(("eps", "weight_decay"), [(1e-12, 0.01), (1e-8, 0.0), (1e-3, 0.5)])
@pytest.mark.parametrize("size", SIZES)
def test_as_exact_as_torch_over_several_updates(size, eps, weight_decay, function):
    gradients = [randn(size, seed=10 + i) for i in range(5)]
    # Powers of two, by which nothing rounds: torch knows no factor.
    lrs, factors = (1e-3, 3e-3, 1e-2, 0.0, 1e-4), (1.0, 0.25, 2.0**-16, 1.0, 4.0)
    ours = fresh(size)
    for count, (gradient, lr, factor) in enumerate(zip(gradients, lrs, factors, strict=True), start=1):
        update(function, ours, gradient, rates_of(lr, count, factor), eps=eps, weight_decay=weight_decay)
    arguments = (fresh(size), gradients, lrs, factors)
    exact = by_torch(*arguments, torch.float64, weight_decay, eps)
    assert_as_exact_as(by_torch(*arguments, torch.float32, weight_decay, eps), ours, exact)


@pytest.mark.parametrize("updates", [1, 2, 10, 100, 10_000, 1_000_000])
def test_the_first_updates_are_corrected_for_moments_that_start_at_zero(updates):
    rates = rates_of(lr=0.1, updates=updates).double()
    expected = torch.tensor([0.1, 0.1 / (1 - 0.9**updates), (1 - 0.98**updates) ** -0.5, 1.0, 0.0])
    # Each rounded once; lr as a float32 to begin with.
    torch.testing.assert_close(rates.cpu(), expected.double(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.3, 2.0**-20])
def test_the_gradient_counts_times_the_factor(factor):
    state, gradient = start(1000), randn(1000, seed=5)
    ours, theirs = copied(state), copied(state)
    update(adamw, ours, gradient, rates_of(factor=factor))
    update(adamw, theirs, gradient * scalar(factor), rates_of())
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], state[name])


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_without_a_gradient_weights_decay_alone(weight_decay):
    state = fresh(1000)
    before = copied(state)
    update(adamw, state, torch.zeros_like(state["weight"]), rates_of(lr=0.1), weight_decay=weight_decay)
    expected = before["weight"].double() * (1 - 0.1 * weight_decay)
    torch.testing.assert_close(state["weight"].double(), expected, rtol=2**-22 if weight_decay else 0, atol=0)
    assert not state["first"].any() and not state["second"].any()


@pytest.mark.parametrize("function", [adamw, adamw_reference])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_working_copies_are_the_new_weights_rounded(size, dtype, function):
    state, gradient = start(size), randn(size, seed=5)
    with_copy, without = copied(state), copied(state)
    working = torch.full((size,), torch.nan, dtype=dtype, device=DEVICE)
    update(function, with_copy, gradient, rates_of(), working)
    update(function, without, gradient, rates_of())
    assert torch.equal(working, with_copy["weight"].to(dtype))
    assert all(torch.equal(with_copy[name], without[name]) for name in state)
    assert not torch.equal(with_copy["weight"], state["weight"])


@pytest.mark.parametrize("function", [adamw, adamw_reference])
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, *NARROW])
@pytest.mark.parametrize("size", [1000, 4096 + 16])
def test_a_skipped_update_changes_nothing(size, dtype, value, function):
    state, gradient = start(size), randn(size, seed=5)
    gradient[size // 2] = value
    # Not the weights rounded, so that it shows when they are written.
    working = None if dtype is None else torch.full((size,), 7.0, dtype=dtype, device=DEVICE)
    before, rates = copied(state), rates_of(factor=value, skipped=1.0)
    before_gradient = gradient.clone()
    update(function, state, gradient, rates, working)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert torch.equal(gradient.nan_to_num(), before_gradient.nan_to_num())
    assert working is None or (working == 7).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_and_what_lies_around_stay_as_they_were(size):
    around = {name: torch.full((size + 64,), torch.nan, device=DEVICE) for name in ("weight", "first", "second")}
    copies = torch.full((size + 64,), torch.nan, dtype=torch.float16, device=DEVICE)
    state, gradient = start(size), randn(size, seed=5)
    for name, tensor in state.items():
        around[name][32 : 32 + size] = tensor
    inside = {name: tensor[32 : 32 + size] for name, tensor in around.items()}
    before = gradient.clone()
    update(adamw, inside, gradient, rates_of(), copies[32 : 32 + size])
    update(adamw, state, gradient, rates_of())
    assert torch.equal(gradient, before)
    for name, tensor in state.items():
        assert torch.equal(inside[name], tensor)
    for tensor in (*around.values(), copies):
        assert tensor[:32].isnan().all() and tensor[32 + size :].isnan().all()
        assert tensor[32 : 32 + size].isfinite().all()


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_buffers_that_start_anywhere(offset):
    state, gradient = start(1000 + offset), randn(1000 + offset, seed=5)
    aligned = {name: tensor[offset:].clone() for name, tensor in state.items()}
    update(adamw, {name: tensor[offset:] for name, tensor in state.items()}, gradient[offset:], rates_of())
    update(adamw, aligned, gradient[offset:].clone(), rates_of())
    assert all(torch.equal(state[name][offset:], aligned[name]) for name in state)
    assert all(torch.equal(state[name][:offset], start(1000 + offset)[name][:offset]) for name in state)


def test_nothing_to_update():
    state = {name: torch.empty(0, device=DEVICE) for name in ("weight", "first", "second")}
    update(adamw, state, torch.empty(0, device=DEVICE), rates_of(), torch.empty(0, device=DEVICE).half())
    assert state["weight"].shape == (0,)


def test_the_same_every_time():
    results = []
    for _ in range(RUNS):
        state = start(3 * 1024 + 7)
        working = torch.empty(3 * 1024 + 7, dtype=torch.float16, device=DEVICE)
        update(adamw, state, randn(3 * 1024 + 7, seed=5), rates_of(), working)
        results.append({**state, "working": working})
    assert all(torch.equal(found[name], results[0][name]) for found in results for name in found)


def test_double_precision_takes_the_reference(monkeypatch):
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    state = {name: tensor.double() for name, tensor in fresh(1000).items()}
    gradients = [randn(1000, seed=10 + i).double() for i in range(3)]
    exact = by_torch(state, gradients, (1e-3,) * 3, (1.0,) * 3, torch.float64)
    for count, gradient in enumerate(gradients, start=1):
        update(adamw, state, gradient, rates_of(1e-3, count))
    for name, true in exact.items():
        # The rates are float32.
        torch.testing.assert_close(state[name], true, rtol=1e-6, atol=1e-9)


def test_weights_that_want_a_gradient_are_updated_without_one():
    state = start(1000)
    state["weight"].requires_grad_()
    before = state["weight"].detach().clone()
    update(adamw, state, randn(1000, seed=5), rates_of())
    assert state["weight"].is_leaf
    assert not torch.equal(state["weight"], before)


@needs_gpu
def test_captured_in_a_graph():
    state, other, gradient = start(4096), start(4096), randn(4096, seed=5)
    scalars = [scalar(value) for value in (1e-3, 1, 1.0, 0.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(adamw, copied(state), gradient, adamw_rates(*scalars, **BETAS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(adamw, state, gradient, adamw_rates(*scalars, **BETAS))
    for lr, updates, factor, skipped in ((1e-3, 1, 1.0, 0.0), (1e-2, 2, 0.5, 1.0), (1e-2, 2, 0.25, 0.0)):
        for place, value in zip(scalars, (lr, updates, factor, skipped), strict=True):
            place.fill_(value)
        graph.replay()
        update(adamw, other, gradient, rates_of(lr, updates, factor, skipped))
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_the_doctor_tests_it(monkeypatch):
    assert set(OPERATORS) == SELFTEST._CASES.keys() | SELFTEST._EXACT.keys()
    monkeypatch.setattr(SELFTEST, "OPERATORS", ("adamw",))
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    ran = {finding.dtype: finding for finding in SELFTEST.selftest(DEVICE) if finding.worst is not None}
    assert ran.keys() == {torch.float32}
    assert not ran[torch.float32].wrong


@pytest.mark.parametrize("spoilt", ["weight", "first", "second", "working"])
def test_the_doctor_finds_a_wrong_one(spoilt, monkeypatch):
    def wrong(weight, gradient, first, second, rates, working=None, **options):
        adamw(weight, gradient, first, second, rates, working, **options)
        tensors = {"weight": weight, "first": first, "second": second, "working": working}
        if tensors[spoilt] is not None:
            tensors[spoilt][7] += 1

    case = (SELFTEST._update(wrong, update_rates), *SELFTEST._CASES["adamw"][1:])
    assert not SELFTEST._worst_error(*case, DEVICE, torch.float32) <= 1


FLOATS = {"weight": (8,), "gradient": (8,), "first": (8,), "second": (8,), "rates": (5,), "working": (8,)}
WRONG = [
    *(
        ({name: lambda: torch.ones(9)}, ValueError, rf"{name} has shape \(9,\), expected \(8,\)")
        for name in ("gradient", "first", "second", "working")
    ),
    *(
        ({name: lambda: torch.ones(8, dtype=torch.float64)}, TypeError, f"{name} is float64, expected float32")
        for name in ("gradient", "first", "second")
    ),
    *(
        ({name: lambda: torch.ones(16)[::2]}, ValueError, rf"{name} has stride \(2,\), expected it contiguous")
        for name in ("weight", "gradient", "first", "second", "working")
    ),
    *(
        ({name: lambda: torch.ones(8, device="meta")}, ValueError, f"{name} is on meta, expected .+ like the other")
        for name in ("gradient", "first", "second", "working")
    ),
    ({"weight": lambda: torch.ones(2, 4)}, ValueError, r"weight has shape \(2, 4\), expected \(N,\)"),
    ({"weight": lambda: torch.tensor(1.0)}, ValueError, r"weight has shape \(\), expected \(N,\)"),
    ({"weight": lambda: torch.ones(8).half()}, TypeError, "weight is float16, expected float32"),
    ({"weight": lambda: torch.ones(8).long()}, TypeError, "weight is int64, expected float32"),
    ({"rates": lambda: torch.ones(4)}, ValueError, r"rates has shape \(4,\), expected \(5,\)"),
    ({"rates": lambda: torch.ones(5).double()}, TypeError, "rates is float64, expected float32"),
    ({"rates": lambda: torch.ones(5, device="meta")}, ValueError, "rates is on meta, expected"),
    ({"rates": lambda: torch.ones(10)[::2]}, ValueError, r"rates has stride \(2,\), expected it contiguous"),
    ({"working": lambda: torch.ones(8).long()}, TypeError, "working is int64, expected float32 or a 16-bit one"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=itertools.count())
def test_wrong_arguments(change, error, message):
    arguments = {name: torch.ones(shape) for name, shape in FLOATS.items()}
    arguments |= {name: make() for name, make in change.items()}
    moved = {name: x if x.is_meta else x.to(DEVICE) for name, x in arguments.items()}
    if DEVICE.type == "cuda":  # a copy there has no gaps
        for name, x in arguments.items():
            if not x.is_contiguous():
                moved[name] = torch.ones(2 * len(x), device=DEVICE)[::2]
    with pytest.raises(error, match=f"^adamw: {message}"):
        adamw(*moved.values(), **OPTIONS)
    assert all((x == 1).all() for x in moved.values() if not x.is_meta)


DECISIONS = {
    "clipped": (8.0, 2.5, 1.0, 2.0),
    "clipped and scaled": (8.0 * 1024, 2.5, 1024.0, 2.0),
    "small": (0.5, 2.5, 1.0, 0.0),
    "zero": (0.0, 0.0, 1.0, 0.0),
    "the thousandth": (3.0, 2.5, 1.0, 999.0),
    "infinite norm": (math.inf, 2.5, 65536.0, 2.0),
    "NaN in the norm": (math.nan, 2.5, 1.0, 2.0),
    "NaN loss": (1.0, math.nan, 1.0, 2.0),
    "infinite loss": (1.0, -math.inf, 1.0, 0.0),
}


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("case", DECISIONS)
def test_an_update_is_decided_as_by_the_definition(triton_kernels, poisoned, case, clip):
    norm, loss, loss_scale, updates = DECISIONS[case]
    found, right = (
        [*map(scalar, (norm, loss, loss_scale, 0.01, updates)), torch.zeros(3, device=DEVICE)] for _ in "12"
    )
    rates = update_rates(*found, clip=clip, **BETAS)
    expected = update_rates_reference(*right, clip=clip, **BETAS)
    skipped = case.startswith(("infinite", "NaN"))
    assert rates[4] == skipped and found[4] == updates + (not skipped)
    if not skipped:
        assert torch.allclose(rates, expected, rtol=2e-7, atol=0)
        assert rates[3] == (1 / loss_scale if clip == math.inf or norm / loss_scale < 1 else 1 / norm)
    for tensor, other in zip(found, right, strict=True):
        assert torch.equal(tensor.nan_to_num(7e30), other.nan_to_num(7e30))


def test_a_decision_names_what_does_not_fit():
    given = {name: scalar(1.0) for name in ("gradient_norm", "loss", "loss_scale", "lr", "updates")}
    given["report"] = torch.zeros(3, device=DEVICE)
    for name, tensor, error in (
        ("lr", torch.zeros(1, device=DEVICE), ValueError),
        ("updates", torch.zeros((), dtype=torch.int64, device=DEVICE), TypeError),
        ("report", torch.zeros(5, device=DEVICE), ValueError),
    ):
        with pytest.raises(error, match=f"adamw: {name} "):
            update_rates(**(given | {name: tensor}), clip=1.0, **BETAS)
