"""How one work is measured: GPU time of a call with the cache cold, its memory, and the host time to enqueue it.

One call on each of several input sets is captured as one CUDA graph and replayed: launch overhead is not counted, and
no set finds itself in the cache. pytest-benchmark runs the rounds, with the GPU's clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from textwrap import shorten

import torch

from cramfast import kernels

from .cases import BOTH, Case
from .check import Call, guard
from .peers import CRAMFAST, Peer
from .steps import StepPeer

_ROUNDS = 20
# A card keeps its highest clock for some 50 ms, until what it draws meets its limit: an H200 goes on with 1.65 GHz for
# 1.98. Work that takes longer than a benchmark sees that one.
_WARMUP_SECONDS = 0.1
_MOST_WARMUP_ROUNDS = 100
# Reading the clock waits for the GPU, which then waits for the next launch: some 10 µs, 0.2 % of such a round.
_ROUND_SECONDS = 5e-3
_MOST_ITERATIONS = 10_000
# Inputs that a call destroys are put back between rounds, so a round uses every set once; eight make it long enough.
_SETS_IF_OVERWRITTEN = 8
_BURSTS = 11
# Few enough launches that the queue never fills and the host never waits.
_CALLS_PER_BURST = 10
_REASON_CHARACTERS = 160


class Refused(Exception):
    """A peer does not run a case on this machine; the message, one line, says whose refusal it is and the reason."""


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many input sets take turns: between two uses of one, the others touch twice the cache or more."""
    return 1 + max(1, math.ceil(2 * cache_bytes / set_bytes))


def iterations_per_round(call_seconds: float, sets: int) -> int:
    """Calls in a round: at least 5 ms of them, every input set equally often."""
    wanted = min(_MOST_ITERATIONS, _ROUND_SECONDS / max(call_seconds, 1e-9))
    return sets * max(1, math.ceil(wanted / sets))


def warmup_rounds(round_seconds: float) -> int:
    """Rounds before those that count."""
    return min(_MOST_WARMUP_ROUNDS, math.ceil(_WARMUP_SECONDS / max(round_seconds, 1e-9)))


def measure(
    benchmark, machine, case: Case, tiny: Case, direction: str, peer: Peer, known: dict[tuple, dict[str, float]]
) -> None:
    """Check `peer` on the case and time it into `benchmark`, whose extra_info becomes the record of the results.

    `tiny` is the same operator on few tokens, for host time. known: as `guard` keeps it. Raises WrongResult instead of
    timing what is wrong, and Refused where a peer, other than this project, cannot be called.
    """
    with refusal_of(peer, case.work(direction)):
        function = peer.load(case)
    overwrites = peer.overwrites if direction == BOTH else ()
    inputs = case.make(0)
    sets = _SETS_IF_OVERWRITTEN if overwrites else input_sets(inputs.nbytes, machine.cache_bytes)
    calls = [Call(function, peer.prepare(inputs if i == 0 else case.make(i)), direction) for i in range(sets)]
    restore = _restorer(calls, overwrites)

    with refusal_of(peer, case.work(direction)):
        replay, timed_by = machine.capture(lambda: [call() for call in calls])
    calls[0].poison()
    restore()
    replay()
    error_ratio = guard(case, peer, calls[0], inputs, known)
    results_bytes = sum(result.nbytes for result in (*calls[0].outputs, *calls[0].gradients.values()))
    restore()

    seconds = _estimate(machine, replay, restore) / sets
    iterations = sets if overwrites else iterations_per_round(seconds, sets)
    # pytest-benchmark counts calls; every sets-th one replays them all.
    turns = cycle([replay] + [lambda: None] * (sets - 1))
    benchmark.group = case.work(direction)
    benchmark.pedantic(
        lambda: next(turns)(),
        rounds=_ROUNDS,
        warmup_rounds=warmup_rounds(iterations * seconds),
        iterations=iterations,
        teardown=restore if overwrites else None,
    )
    for call in calls:
        call.forget()
    benchmark.extra_info.update(
        work=case.work(direction),
        who=peer.who,
        dtype=str(case.dtype).removeprefix("torch."),
        seconds=benchmark.stats.stats.median if benchmark.stats else None,
        bytes=case.bytes.get(direction),
        flops=case.flops.get(direction),
        peak_mib=round(machine.peak_bytes(calls[0]) / 2**20, 2),
        results_mib=round(results_bytes / 2**20, 2),
        host_seconds=_host_seconds(machine, tiny, direction, peer),
        timed_by=timed_by,
        backend=_backend(case, machine) if peer is CRAMFAST else None,
        input_sets=sets,
        error_ratio=round(error_ratio, 3),
    )


@contextmanager
def refusal_of(peer: Peer | StepPeer, work: str) -> Iterator[None]:
    """What a peer raises, as its refusal. Packages and backends have dozens of ways to say that they cannot."""
    try:
        yield
    except Exception as error:
        if peer.who == CRAMFAST.who:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"{peer.who} on {work}: {shorten(reason, _REASON_CHARACTERS)}") from error


def _restorer(calls: list[Call], overwrites: tuple[str, ...]) -> Callable[[], None]:
    """A function that gives every call its overwritten inputs back, from one copy of the first call's."""
    pristine = {name: calls[0].inputs.tensors[name].detach().clone() for name in overwrites}

    @torch.no_grad()
    def restore() -> None:
        for call in calls:
            for name, values in pristine.items():
                call.inputs.tensors[name].copy_(values)

    return restore


def _estimate(machine, replay: Callable[[], object], restore: Callable[[], None]) -> float:
    """Seconds of one replay, roughly: those of the second."""
    replay()
    restore()
    start = machine.clock()
    replay()
    seconds = machine.clock() - start
    restore()
    return seconds


def _host_seconds(machine, tiny: Case, direction: str, peer: Peer) -> float | None:
    """Median host time to enqueue one call, outside any graph, on tensors so small that the GPU keeps up."""
    if not peer.host:
        return None
    call = Call(peer.load(tiny), peer.prepare(tiny.make(0)), direction)
    call()
    seconds = []
    for _ in range(_BURSTS):
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS_PER_BURST):
            call()
        seconds.append((time.perf_counter() - start) / _CALLS_PER_BURST)
    machine.synchronize()
    return statistics.median(seconds)


def _backend(case: Case, machine) -> str:
    """Who computes this project's side of the case; the case knows where its size is handed over to others."""
    return case.handed_over or kernels.choose(case.part_of or case.operator, machine.device, case.dtype).backend
