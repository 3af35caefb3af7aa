"""How large the batch is, and in how many microbatches it is computed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import BatchOptions, Budget, PretrainOptions
from ..data.batches import BatchBuilder, Cursor, PieceSource
from ..data.shards import TokenStream
from ..errors import TrainingFailed
from .schedule import suitable_batch
from .step import TrainStep

_CPU_MICROBATCH_TOKENS = 4096
_MOST_MICROBATCH_TOKENS = 65_536
_TOKENS_PER_GIB = 1024


@dataclass(frozen=True)
class BatchPlan:
    """Sequences in a microbatch as planned, and microbatches in the full batch."""

    unit: int
    units: int


def plan_batch(
    options: PretrainOptions, step: TrainStep, stream: TokenStream, pieces: PieceSource, say: Callable[[str], None]
) -> BatchPlan:
    """The plan of `--batch-size` and `--microbatch-size`, or of what suits recipe, budget and device."""
    length = options.batches.max_length
    largest = options.batches.microbatch_size or max(1, _microbatch_tokens(step.device) // length)
    batch = options.batches.batch_size
    if batch is None:
        total = _expected_tokens(options, step, stream, pieces, min(largest * length, len(stream)))
        batch = max(1, min(suitable_batch(total), len(stream)) // length)
    units = -(-batch // largest)
    if options.batches.batch_size is None:
        return BatchPlan(batch // units, units)
    unit = -(-batch // units)
    if unit * units != batch:
        say(f"the batch is {unit * units} sequences instead of {batch}: {units} microbatches of {unit}")
    return BatchPlan(unit, units)


def _microbatch_tokens(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_MICROBATCH_TOKENS
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return min(_MOST_MICROBATCH_TOKENS, int(memory_gib * _TOKENS_PER_GIB))


def _expected_tokens(
    options: PretrainOptions, step: TrainStep, stream: TokenStream, pieces: PieceSource, tokens: int
) -> float:
    """Tokens that the budget will pay for; a budget of time is converted by timing three microbatches of `tokens`."""
    budget, batches = Budget.parse(options.budget), options.batches
    if budget.unit == "tokens":
        return budget.amount
    if budget.unit == "flops":
        return budget.amount / step.model.config.flops_per_token(batches.mask_rate, batches.max_length)
    while True:
        try:
            return budget.amount * _tokens_per_second(step, stream, pieces, tokens, batches)
        except torch.OutOfMemoryError:
            step.reset()
            torch.cuda.empty_cache()
            tokens //= 2
            if tokens < batches.max_length:
                raise TrainingFailed("out of memory with one sequence: choose a smaller --preset") from None


def _tokens_per_second(
    step: TrainStep, stream: TokenStream, pieces: PieceSource, tokens: int, batches: BatchOptions
) -> float:
    batch = BatchBuilder(stream, pieces, tokens, batches.max_length).build(Cursor())
    times = []
    for number in range(4):
        start = time.perf_counter()
        step.accumulate(batch, batches.mask_rate, number, 1.0)
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step.reset()
    return tokens / min(times[1:])
