import math

import numpy as np
import pytest

from cramfast.config import Budget
from cramfast.train.schedule import Spent, batch_microbatches, fraction, lr_factor, suitable_batch

GRID = np.linspace(0, 1, 1001).tolist()


@pytest.mark.parametrize(
    ("f", "factor"), [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (0.875, 0.5), (0.9, 0.4), (1.0, 0.0)]
)
def test_triangle(f, factor):
    assert lr_factor("triangle", f) == pytest.approx(factor)


def test_triangle_is_the_papers_formula():
    assert [lr_factor("triangle", f) for f in GRID] == [min(0.25 + f, 4 * (1 - f)) for f in GRID]


@pytest.mark.parametrize(
    ("f", "factor"), [(0.01, 0.5), (0.02, 1.0), (0.3, 1.0), (0.5, 1.0), (0.6, 0.8), (0.75, 0.5), (0.9, 0.2), (1.0, 0.0)]
)
def test_trapezoid(f, factor):
    assert lr_factor("trapezoid", f) == pytest.approx(factor)


def test_the_first_update_of_the_trapezoid_moves_the_weights():
    assert 0 < lr_factor("trapezoid", 0.0) <= 0.05


@pytest.mark.parametrize(("schedule", "rises_to", "falls_from"), [("triangle", 0.75, 0.75), ("trapezoid", 0.02, 0.5)])
def test_the_learning_rate_rises_once_and_falls_once(schedule, rises_to, falls_from):
    factors = np.array([lr_factor(schedule, f) for f in GRID])
    change, middle = np.diff(factors), np.convolve(GRID, [0.5, 0.5], "valid")
    assert (change[middle < rises_to] >= 0).all()
    assert (change[(middle > rises_to) & (middle < falls_from)] == 0).all()
    assert (change[middle > falls_from] < 0).all()
    assert factors.max() == pytest.approx(1.0)
    assert factors.min() >= 0


@pytest.mark.parametrize("schedule", ["triangle", "trapezoid"])
def test_the_learning_rate_depends_on_the_fraction_alone(schedule):
    forward = [lr_factor(schedule, f) for f in GRID]
    assert [lr_factor(schedule, f) for f in reversed(GRID)] == forward[::-1]


@pytest.mark.parametrize("ramp", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("full", [1, 7, 64])
def test_the_batch_grows_linearly_and_is_full_at_the_ramps_end(ramp, full):
    sizes = [batch_microbatches(f, full, ramp) for f in GRID]
    assert min(sizes) >= 1
    assert sizes == sorted(sizes)
    # A whole number of microbatches is at most half of one from the line, the first being the least.
    assert all(abs(size - max(1, full * min(1, f / ramp))) <= 0.5 for size, f in zip(sizes, GRID, strict=True))
    assert all(size == full for size, f in zip(sizes, GRID, strict=True) if f >= ramp)


def test_without_a_ramp_the_batch_is_always_full():
    assert {batch_microbatches(f, 12, 0.0) for f in GRID} == {12}


@pytest.mark.parametrize(("total", "batch"), [(9.3e7, 65_536), (9e9, 8192 * 128)])
def test_the_suitable_batch_goes_through_the_two_known_points(total, batch):
    assert suitable_batch(total) == batch


def test_the_suitable_batch_grows_with_the_run_and_has_three_significant_bits():
    batches = [suitable_batch(total) for total in np.geomspace(1, 1e12, 400)]
    assert batches == sorted(batches)
    assert batches[0] >= 1
    assert all(batch / 2 ** max(0, batch.bit_length() - 3) % 1 == 0 for batch in batches)


@pytest.mark.parametrize("total", [0.0, 0.5])
def test_the_suitable_batch_of_hardly_any_tokens_is_one(total):
    assert suitable_batch(total) == 1


@pytest.mark.parametrize(
    ("text", "spent", "share"),
    [
        ("10m", Spent(seconds=150.0, tokens=10**12, flops=1e20), 0.25),
        ("1e6tokens", Spent(seconds=1e9, tokens=250_000, flops=1e20), 0.25),
        ("4e15flops", Spent(seconds=1e9, tokens=10**12, flops=1e15), 0.25),
        ("90s", Spent(seconds=90.0), 1.0),
        ("90s", Spent(seconds=900.0), 1.0),
        ("1e6tokens", Spent(tokens=1_000_001), 1.0),
        ("4e15flops", Spent(flops=math.inf), 1.0),
        ("90s", Spent(), 0.0),
    ],
)
def test_the_fraction_counts_what_the_budget_counts(text, spent, share):
    assert fraction(Budget.parse(text), spent) == share
