"""How finetuning is measured: as a training step is, by the same clock, a pass over several batches at a time.

Dropout makes every loss another: the guard looks at a first step without it.
"""

from dataclasses import replace

import torch

from .finetuning import FinetunePeer, FinetuneTraining, FinetuneWork, expected_outcome
from .measure import refusal_of
from .measure_step import clock, guard, record_errors, start


def measure_finetune(benchmark, machine, work: FinetuneWork, peer: FinetunePeer, dtype: torch.dtype) -> None:
    """Check the first step of `peer` and time passes over the work's batches into `benchmark`, whose extra_info becomes
    the record. Raises WrongResult instead of timing what is wrong, and Refused where a peer, other than this project,
    fails."""
    training = FinetuneTraining(work, machine.device, dtype)
    expected = expected_outcome(work, machine.device)
    with refusal_of(peer, work.work):
        outcome = peer.start(replace(training, dropout=0.0))()
    errors = guard(work, peer, outcome, expected, work.tolerances)
    machine.release()
    before = machine.allocated_bytes()
    with refusal_of(peer, work.work):
        step, _, start_peak = start(machine, peer, training)
    clock(benchmark, machine, peer, training, step, before, start_peak)
    record_errors(benchmark, errors)
    seconds = benchmark.extra_info["seconds"]
    benchmark.extra_info["sequences_per_s"] = work.sequences / seconds if seconds else None
