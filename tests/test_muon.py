"""Muon's two passes around the orthogonalisation, and the update that they make with it.

The rule: against the definition in fp64, at most twice the error of the definition in fp32, in relative L2.
"""

import importlib
import math

import pytest
import torch
from test_operators import DEVICE, NATIVE, needs_gpu, randn

from cramfast.config import ModelConfig, OptimizerOptions
from cramfast.kernels import (
    adamw_rates,
    choose,
    muon_direction,
    muon_direction_reference,
    muon_update,
    muon_update_reference,
    orthogonalise_reference,
)
from cramfast.model import Bert
from cramfast.train.optimizer import Optimizer
from cramfast.train.weights import Weights

arithmetic = importlib.import_module("cramfast.kernels.orthogonalise").arithmetic
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

SIZES = (1, 1000, 4096 + 16, 3 * 1024 + 7)
NARROW = (torch.float16, torch.bfloat16)
RUNS = 20 if NATIVE else 2


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(float(value), device=DEVICE)


def rates_of(lr: float = 1e-3, factor: float = 0.5, skipped: float = 0.0) -> torch.Tensor:
    return adamw_rates(*map(scalar, (lr, 3, factor, skipped)), beta1=0.9, beta2=0.98)


def assert_as_exact(ours, theirs, exact) -> None:
    assert ours.isfinite().all()
    error, allowed = (ours.double() - exact).norm(), 2 * (theirs.double() - exact).norm()
    least = torch.finfo(ours.dtype).eps / (1 if exact.numel() == 1 else 4) * exact.norm()
    assert error <= max(allowed, least), f"{error}, definition {allowed / 2}"


def directions(function, size: int, dtype, updates: int = 3, wide=torch.float32):
    momentum, direction = torch.zeros(size, device=DEVICE, dtype=wide), torch.empty(size, device=DEVICE, dtype=dtype)
    for seed in range(updates):
        function(randn(size, seed=seed).to(wide), momentum, rates_of(), direction, beta=0.95)
    return momentum, direction


def test_the_kernels_are_what_runs_here():
    assert choose("muon", DEVICE, torch.float32).backend == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("size", SIZES)
def test_momentum_and_direction(size, dtype):
    ours, theirs = directions(muon_direction, size, dtype), directions(muon_direction_reference, size, dtype)
    exact = directions(muon_direction_reference, size, torch.float64, wide=torch.float64)
    for each in zip(ours, theirs, exact, strict=True):
        assert_as_exact(*each)


def test_the_direction_is_nesterovs():
    gradient, momentum = randn(100), randn(100, seed=1)
    after, direction = momentum.clone(), torch.empty_like(momentum)
    muon_direction(gradient, after, rates_of(factor=0.25), direction, beta=0.9)
    torch.testing.assert_close(after, 0.9 * momentum + 0.25 * gradient)
    torch.testing.assert_close(direction, 1024 * (0.25 * gradient + 0.9 * after))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("copy", [None, *NARROW])
@pytest.mark.parametrize("size", SIZES)
def test_the_weights_follow_the_direction(size, copy, dtype):
    weight, direction = randn(size), randn(size, seed=1, dtype=dtype)
    results = []
    for function, wide in ((muon_update, None), (muon_update_reference, None), (muon_update_reference, torch.float64)):
        ours = weight.to(wide or weight.dtype, copy=True)
        working = None if copy is None else torch.empty(size, dtype=wide or copy, device=DEVICE)
        function(ours, direction, rates_of(lr=0.1), working, scale=0.3, weight_decay=0.05)
        results.append([ours] if working is None else [ours, working])
    for each in zip(*results, strict=True):
        assert_as_exact(*each)
    expected = weight * (1 - 0.1 * 0.05) - 0.1 * 0.3 * direction.float()
    torch.testing.assert_close(results[0][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_skipped_update_changes_nothing(value):
    gradient, rates = torch.full((1000,), value, device=DEVICE), rates_of(skipped=1.0)
    weight, momentum = randn(1000), randn(1000, seed=1)
    direction, working = randn(1000, seed=2, dtype=torch.float16), randn(1000, seed=3, dtype=torch.float16)
    tensors = (weight, momentum, direction, working)
    before = [tensor.clone() for tensor in tensors]
    muon_direction(gradient, momentum, rates, direction, beta=0.95)
    muon_update(weight, torch.full_like(direction, value), rates, working, scale=1.0, weight_decay=0.1)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_it_gives_the_same_bits_every_time():
    first = directions(muon_direction, 5000, torch.float16)
    for _ in range(RUNS):
        again = directions(muon_direction, 5000, torch.float16)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient": torch.zeros(2, 5)}, ValueError, r"gradient has shape \(2, 5\), expected \(N,\)"),
        ({"momentum": torch.zeros(9)}, ValueError, r"momentum has shape \(9,\), expected \(10,\)"),
        ({"momentum": torch.zeros(10).half()}, TypeError, "momentum is float16, expected float32"),
        ({"direction": torch.zeros(20)[::2]}, ValueError, r"direction has stride \(2,\), expected it contiguous"),
        ({"direction": torch.zeros(10).int()}, TypeError, "direction is int32, expected float32 or a 16-bit one"),
        ({"rates": torch.zeros(4)}, ValueError, r"rates has shape \(4,\), expected \(5,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    given = {name: torch.zeros(10) for name in ("gradient", "momentum", "direction")} | {"rates": torch.zeros(5)}
    with pytest.raises(error, match=f"muon: {message}"):
        muon_direction(**(given | change), beta=0.9)


CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
OPTIONS = OptimizerOptions(optimizer="muon", lr=1e-3, muon_lr=0.02, muon_momentum=0.9, weight_decay=0.1, clip=math.inf)


def decided(lr: float) -> tuple[torch.Tensor, ...]:
    """Learning rate, loss, loss scale and a place for the report."""
    return scalar(lr), scalar(0.0), scalar(1.0), torch.zeros(3, device=DEVICE)


def optimized(updates: int = 2) -> tuple[Weights, Optimizer, dict]:
    """The weights of a model after updates by gradients drawn at random, and what they were before the last."""
    torch.manual_seed(0)
    weights = Weights(Bert(CONFIG).to(DEVICE), torch.float32)
    optimizer = Optimizer(weights, OPTIONS)
    for seed in range(updates):
        before = {name: view.clone() for name, view in weights.by_name(weights.master).items()}
        for number, view in enumerate(weights.by_name(weights.gradient).values()):
            view.copy_(randn(*view.shape, seed=100 * seed + number))
        optimizer.update(*decided(1e-3))
    return weights, optimizer, before


def test_muon_moves_the_matrices_of_the_layers_along_orthogonal_directions():
    weights, optimizer, before = optimized()
    after, momentum = weights.by_name(weights.master), weights.by_name(optimizer.first)
    gradients = weights.by_name(weights.gradient)
    hidden = [name for name, place in weights.places.items() if place.end <= weights.hidden]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in hidden} == {"qkv", "out", "0", "2"}
    for name in hidden:
        direction = gradients[name] + 0.9 * momentum[name]
        # Queries, keys and values are matrices of their own.
        parts = direction.unflatten(0, (3, -1)) if name.endswith("qkv.weight") else direction[None]
        scale = 0.02 * max(1.0, parts.shape[1] / parts.shape[2]) ** 0.5
        exact = orthogonalise_reference(parts.double())
        rounded = orthogonalise_reference(parts, dtype=arithmetic(parts))
        expected = before[name] * (1 - 0.02 * 0.1) - scale * exact.flatten(0, 1)
        allowed = 2 * scale * (rounded - exact).norm() + 1e-6 * expected.norm()
        assert (after[name] - expected).norm() <= allowed, name
        assert allowed <= 0.1 * (after[name] - before[name]).norm()


def test_the_rest_is_adamws():
    weights, _, before = optimized(1)
    after = weights.by_name(weights.master)
    rest = [name for name, place in weights.places.items() if place.start >= weights.hidden]
    assert any(name.startswith("embeddings.") for name in rest) and any("norm" in name for name in rest)
    gradients = weights.by_name(weights.gradient)
    for name in rest:
        decay = 0.1 if after[name].ndim == 2 else 0.0
        # The first update of AdamW has the size of its learning rate.
        expected = before[name] * (1 - 1e-3 * decay) - 1e-3 * gradients[name].sign()
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_the_state_is_one_moment_for_muon_and_two_for_adamw():
    weights, optimizer, _ = optimized(1)
    names = set(weights.places)
    hidden = {name for name in names if weights.places[name].end <= weights.hidden}
    tensors = optimizer.tensors()
    assert {name.removeprefix("exp_avg.") for name in tensors if name.startswith("exp_avg.")} == names
    assert {name.removeprefix("exp_avg_sq.") for name in tensors if name.startswith("exp_avg_sq.")} == names - hidden
    assert all(tensors[f"exp_avg.{name}"].shape == weights.places[name].shape for name in names)
    assert all(tensors[f"exp_avg_sq.{name}"].any() for name in names - hidden)


@needs_gpu
def test_an_update_runs_as_a_graph_and_does_not_wait():
    torch.manual_seed(0)
    weights = Weights(Bert(CONFIG).to(DEVICE), torch.bfloat16)
    optimizer = Optimizer(weights, OPTIONS)
    weights.gradient.normal_()
    scalars = decided(1e-3)
    optimizer.update(*scalars)
    start = [tensor.clone() for tensor in (weights.master, optimizer.first, optimizer.second, optimizer.updates)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.update(*scalars)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    eager = weights.master.clone()
    graph = torch.cuda.CUDAGraph()
    for now, then in zip((weights.master, optimizer.first, optimizer.second, optimizer.updates), start, strict=True):
        now.copy_(then)
    with torch.cuda.graph(graph):
        optimizer.update(*scalars)
    graph.replay()
    assert torch.equal(weights.master, eager)
