"""How a training step is measured: seconds by the GPU's clock after warm-up, memory, energy; nothing that is wrong.

Every variant works for some seconds before its clock starts, so that the card's limit on power acts on all alike.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from cramfast import kernels
from cramfast.device import EnergyMeter

from .check import WrongResult
from .measure import refusal_of
from .steps import Outcome, StepPeer, StepWork, Training, masked_batch

_FIRST_STEPS = 4
_STEPS_TO_ESTIMATE = 3
_WARM_SECONDS = 2.0
_ROUNDS = 10
_ROUND_SECONDS = 0.25
_PART_SEQUENCES = 32
# bf16 moves the loss of 1000 tokens by 4e-5 and the norm by 3e-4, and averages out over more. A fresh model without
# attention, or with it missing in one layer, is off by 2e-3 and by 1e-1 or 1e-2.
_LOSS_TOLERANCE = 5e-4
_NORM_TOLERANCE = 5e-3


def measure_step(benchmark, machine, work: StepWork, peer: StepPeer, dtype: torch.dtype) -> None:
    """Check the first step of `peer` and time those that follow into `benchmark`, whose extra_info becomes the record.

    Raises WrongResult instead of timing what is wrong, and Refused where a peer, other than this project, fails.
    """
    expected = _expected(work, machine.device)
    training = Training(work, masked_batch(work, machine.device), dtype)
    machine.release()
    before = machine.allocated_bytes()
    with machine.limited_to(work.memory):
        with refusal_of(peer, work.work):
            step, outcome, start_peak = start(machine, peer, training)
        errors = guard(work, peer, outcome, expected)
        clock(benchmark, machine, peer, training, step, before, start_peak)
    record_errors(benchmark, errors)
    if peer.is_ours:
        benchmark.extra_info.update(microbatch=work.microbatch or work.sequences, activations=work.activations)


def clock(
    benchmark, machine, peer: StepPeer, training, step: Callable[[], Outcome], before: int, start_peak: int
) -> None:
    """Time `step`, a call of which is one step or, of finetuning, a pass of several, into `benchmark`.

    before: bytes that were held before it was started; start_peak: the most that it took to start.
    """
    work, steps = training.work, training.work.steps
    seconds = _estimate(machine, step)
    for _ in range(math.ceil(_WARM_SECONDS / seconds)):
        step()
    held = machine.allocated_bytes() - before
    peak = held + machine.peak_bytes(step)
    joules = _time(benchmark, machine, step, seconds)

    tokens = training.tokens
    seconds = benchmark.stats.stats.median / steps if benchmark.stats else None
    benchmark.group = work.work
    benchmark.extra_info.update(
        work=work.work,
        who=peer.who,
        dtype=str(training.dtype).removeprefix("torch."),
        seconds=seconds,
        bytes=None,
        flops=work.flops(),
        peak_mib=round((max(peak, start_peak) if peer.graphs else peak) / 2**20, 1),
        tokens=tokens,
        tokens_per_s=tokens / seconds if seconds else None,
        joules_per_mtoken=None if joules is None else joules / steps / tokens * 1e6,
        timed_by="events",
        backend=kernels.choose("varlen_attention", machine.device, training.dtype).backend if peer.is_ours else None,
    )


def record_errors(benchmark, errors: tuple[float, float]) -> None:
    """What the guard found, for the record."""
    benchmark.extra_info.update(loss_error=float(f"{errors[0]:.2e}"), gradient_norm_error=float(f"{errors[1]:.2e}"))


def start(machine, peer: StepPeer, training: Training) -> tuple[Callable[[], Outcome], Outcome, int]:
    """The peer's step after its first calls, the outcome of the very first, and the most memory until then."""
    made = []

    def start() -> None:
        step = peer.start(training)
        made.extend((step, step()))
        for _ in range(_FIRST_STEPS - 1):
            step()

    peak = machine.peak_bytes(start)
    machine.synchronize()
    return *made, peak


def _estimate(machine, step: Callable[[], Outcome]) -> float:
    """Seconds of one step, roughly."""
    start = machine.clock()
    for _ in range(_STEPS_TO_ESTIMATE):
        step()
    return max((machine.clock() - start) / _STEPS_TO_ESTIMATE, 1e-6)


def _time(benchmark, machine, step: Callable[[], Outcome], seconds: float) -> float | None:
    """Run the rounds; returns the joules of one step, None where the card does not tell."""
    taken = 0

    def counted() -> None:
        nonlocal taken
        taken += 1
        step()

    machine.synchronize()
    meter = EnergyMeter(machine.device)
    benchmark.pedantic(counted, rounds=_ROUNDS, iterations=math.ceil(_ROUND_SECONDS / seconds))
    machine.synchronize()
    joules = meter.joules()
    return None if joules is None else joules / taken


@cache
def _expected(work: StepWork, device: torch.device) -> tuple[float, float]:
    """Loss and gradient norm of the first step in fp32, by the ordinary model in eager PyTorch, part by part."""
    batch, ordinary = masked_batch(work, device), work.ordinary
    model = ordinary.build(work.config).to(device).train()
    total = 0.0
    for part in batch.parts(_PART_SEQUENCES):
        loss = ordinary.loss(model, ordinary.arguments(part)) * (len(part.labels) / len(batch.labels))
        loss.backward()
        total += loss.item()
    return total, nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def guard(
    work: StepWork,
    peer: StepPeer,
    outcome: Outcome,
    expected: tuple[float, float],
    tolerances: tuple[float, float] = (_LOSS_TOLERANCE, _NORM_TOLERANCE),
) -> tuple[float, float]:
    """Relative errors of the first step's loss and gradient norm. Raises WrongResult above what rounding explains."""
    errors = []
    pairs = ((outcome.loss, expected[0]), (outcome.gradient_norm, expected[1]))
    for name, (found, right), tolerance in zip(("loss", "gradient norm"), pairs, tolerances, strict=True):
        error = abs(float(found) / right - 1)
        if not error <= tolerance:  # NaN never passes
            raise WrongResult(
                f"{peer.who} on {work.work}: the first step's {name} is {float(found):.5g}, in fp32 {right:.5g}; "
                f"a relative error of at most {tolerance:g} is allowed"
            )
        errors.append(error)
    return errors[0], errors[1]
