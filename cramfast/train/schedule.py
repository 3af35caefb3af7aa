"""Schedules: pure functions of the fraction of the budget that is spent."""

import math
from dataclasses import dataclass

from ..config import Budget

_WARM_UP = 0.02
_DECAY_FROM = 0.5


@dataclass(frozen=True)
class Spent:
    """What a run has used so far. Seconds count from the end of its first update."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0


def fraction(budget: Budget, spent: Spent) -> float:
    """Share of the budget that is spent, at most 1."""
    return min(1.0, getattr(spent, budget.unit) / budget.amount)


def lr_factor(schedule: str, f: float) -> float:
    """Learning rate at fraction f of the budget, as a share of its peak.

    trapezoid: up over the first 2 %, flat to one half, then straight down to 0. triangle: the cramming paper's,
    min(0.25 + f, 4 (1 − f)) (2212.14034, section 4.3).
    """
    if schedule == "triangle":
        return min(0.25 + f, 4 * (1 - f))
    return min(max(f, 1e-3) / _WARM_UP, 1.0, (1 - f) / (1 - _DECAY_FROM))


def warm_cosine(update: int, updates: int, warmup: float) -> float:
    """Learning rate of update number `update`, from 0, of `updates`, as a share of its peak: straight up over the first
    `warmup` of them, then down to 0 along half a cosine."""
    rising = round(warmup * updates)
    if update < rising:
        return (update + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (update - rising) / (updates - rising))


def batch_microbatches(f: float, full: int, ramp: float) -> int:
    """Microbatches in the batch at fraction f: growing linearly to `full` at f = ramp, never below one."""
    share = 1.0 if ramp == 0 else min(1.0, f / ramp)
    return max(1, round(share * full))


def suitable_batch(total_tokens: float) -> int:
    """Tokens per update that suit a run of `total_tokens`.

    A power law through two points known to work: 65,536 for 9.3e7 tokens (the best of the short runs tried) and
    8192 × 128 for the 9e9 tokens of the cramming paper's day. Rounded to three significant bits: it divides well.
    """
    wanted = max(1.0, 1.09 * total_tokens**0.6)
    step = 2 ** max(0, math.floor(math.log2(wanted)) - 2)
    return int(round(wanted / step) * step)
