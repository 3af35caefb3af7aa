"""How large the batch is, in how many microbatches it is computed, and what their layers save."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import Activations, BatchOptions, Budget, ModelConfig, PretrainOptions
from ..data.batches import BatchBuilder, Cursor, PieceSource
from ..data.shards import TokenStream
from ..errors import TrainingFailed, UserError
from .memory import MemoryPlan, plan_memory
from .schedule import suitable_batch
from .step import TrainStep

_CPU_MICROBATCH_TOKENS = 4096


@dataclass(frozen=True)
class BatchPlan:
    """Sequences in a microbatch as planned, microbatches in the full batch, and what the layers save."""

    unit: int
    units: int
    activations: Activations = "keep"


def plan_batch(
    options: PretrainOptions,
    step: TrainStep,
    stream: TokenStream,
    pieces: PieceSource,
    memory: int | None,
    say: Callable[[str], None],
) -> BatchPlan:
    """The plan of `--batch-size`, `--microbatch-size` and `--activations`, or of what suits recipe, budget and device.

    memory: bytes that the run may take of a GPU; None: no such limit. Leaves the model with the plan's activations.
    """
    length, batch = options.batches.max_length, options.batches.batch_size
    first = plan_microbatch(options, step.model.config, memory, options.batches.microbatch_size)
    step.model.activations = first.activations
    if batch is None:
        total = _expected_tokens(options, step, stream, pieces, min(first.sequences * length, len(stream)))
        batch = max(1, min(suitable_batch(total), len(stream)) // length)
    units = -(-batch // first.sequences)
    if options.batches.batch_size is None:
        unit = batch // units
    else:
        unit = -(-batch // units)
        if unit * units != batch:
            say(f"the batch is {unit * units} sequences instead of {batch}: {units} microbatches of {unit}")
    # A microbatch that is smaller than it had to be may have room for more.
    step.model.activations = plan_microbatch(options, step.model.config, memory, unit).activations
    return BatchPlan(unit, units, step.model.activations)


def plan_microbatch(
    options: PretrainOptions, config: ModelConfig, memory: int | None, sequences: int | None
) -> MemoryPlan:
    """The microbatch that fits into `memory` bytes, of just so many `sequences` where they are given. options:
    resolved, down to the dtype."""
    length = options.batches.max_length
    activations = None if options.activations == "auto" else options.activations
    if memory is None:
        return MemoryPlan(sequences or max(1, _CPU_MICROBATCH_TOKENS // length), activations or "keep", 0)
    return plan_memory(
        config,
        length,
        options.batches.mask_rate,
        getattr(torch, options.dtype),
        memory,
        activations=activations,
        sequences=sequences,
    )


def check_mask_rate(rate: float, tokens: int) -> None:
    """Raise UserError when none of the `tokens` of a microbatch is predicted."""
    if not round(rate * tokens):
        raise UserError(f"--mask-rate {rate}: hides none of the {tokens} tokens of a microbatch")


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
    step.discard()
    return tokens / min(times[1:])
