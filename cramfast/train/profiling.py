"""Where the time of a training step goes: measured, put in order, printed.

The time of a step is measured without the profiler, which slows it down; kernels, which it does not slow down, are
timed by it, inside CUDA graphs too. What is left of the step is idle. On a CPU the operators of PyTorch stand for
kernels, each without the time of those that it calls, and the step is the profiled one.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from ..config import PRESETS, Activations, ModelConfig, PretrainOptions, resolve
from ..data.batches import Batch, Cursor
from ..data.random_words import random_words, special_ids_of
from ..data.tokenizer import SpecialIds
from ..device import (
    copy_rate,
    environment,
    has_gpu,
    matmul_rate,
    operator_backends,
    peak_memory_mib,
    pick_device,
    pick_dtype,
)
from ..errors import UserError
from ..kernels import every_launch
from ..model import Bert
from .checkpoint import write_json
from .floors import StepSizes, Work, definition
from .kinds import Kind, classify, own_kernels
from .memory import usable_bytes
from .plan import check_mask_rate, plan_microbatch
from .step import TrainStep

# The first compiles and captures graphs, the others bring caches and clocks to where they stay.
_WARM_UP = 3
# A learning rate at which many steps on one batch stay finite.
_LEARNING_RATE = 1e-4
_UPDATE = "cramfast update"


@dataclass(frozen=True)
class Limits:
    """What the device reaches at best: FLOP/s of a matrix product, bytes a second that a copy reads and writes."""

    matmul_rate: float
    copy_rate: float


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran: its name, what it was for, and how long it took."""

    name: str
    kind: Kind
    seconds: float


@dataclass(frozen=True)
class Row:
    """All kernels of a kind in one step. work: what the definition asks for; None: it asks for none of this."""

    kind: Kind
    seconds: float
    kernels: float
    work: Work | None


@dataclass(frozen=True)
class Profile:
    """A step's time by kind. seconds: of the whole step. flops: by definition, of which MFU is a share. settings and
    environment: what it was measured with, as JSON. kernels: those of all profiled steps."""

    settings: dict
    environment: dict
    limits: Limits
    sizes: StepSizes
    seconds: float
    steps: int
    flops: float
    peak_mib: float
    work: dict[Kind, Work]
    kernels: Sequence[Kernel]

    def rows(self) -> list[Row]:
        """The kinds that took time, longest first, then what is left of the step."""
        seconds, counts = defaultdict(float), defaultdict(int)
        for kernel in self.kernels:
            seconds[kernel.kind] += kernel.seconds / self.steps
            counts[kernel.kind] += 1
        order = sorted(seconds, key=seconds.get, reverse=True)
        rows = [Row(kind, seconds[kind], counts[kind] / self.steps, self.work.get(kind)) for kind in order]
        return [*rows, Row(Kind.IDLE, max(0.0, self.seconds - sum(seconds.values())), 0, None)]

    def floor(self, work: Work) -> float:
        """Seconds that `work` takes at the limits of the device."""
        return work.seconds(self.limits.matmul_rate, self.limits.copy_rate)

    @property
    def floor_seconds(self) -> float:
        """Seconds of a step in which every operator runs at its limit."""
        return sum(map(self.floor, self.work.values()))

    @property
    def tokens_per_second(self) -> float:
        return self.sizes.tokens / self.seconds

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.limits.matmul_rate


def profile(options: PretrainOptions, steps: int, out: Path | None) -> None:
    """Run `python -m cramfast.profile`. Of `options` the model, device, dtype and microbatch count; steps: as many are
    timed, and as many profiled. out: a JSON file to write. Raises UserError for bad input."""
    options = resolve(options, has_gpu(options.device))
    if steps < 1:
        raise UserError(f"--steps {steps}: expected at least 1")
    _check_out(out)
    found = measure(options, steps)
    show(found, Console(highlight=False, soft_wrap=True))
    if out is not None:
        try:
            write_json(out, as_json(found))
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from error


def _check_out(out: Path | None) -> None:
    """Before the measurement, which takes longer, raise UserError for a file that cannot be written."""
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder; expected the name of a JSON file")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")


def measure(options: PretrainOptions, steps: int) -> Profile:
    """Train on one microbatch again and again, and see where the time goes. options: resolved. Raises UserError where
    it does not fit or cannot run."""
    device = pick_device(options.device)
    dtype = pick_dtype(device, options.dtype)
    backends = operator_backends(device)
    batches, config = options.batches, PRESETS[options.preset]
    options = replace(options, dtype=str(dtype).removeprefix("torch."))
    plan = plan_microbatch(options, config, usable_bytes(device, None), batches.microbatch_size)
    sequences, activations = plan.sequences, plan.activations
    tokens = sequences * batches.max_length
    check_mask_rate(batches.mask_rate, tokens)
    limits = _limits(device, dtype)
    try:
        run, step = _training(config, activations, options, sequences, device, dtype)
        seconds = _time(run, steps, device)
        peak_mib = peak_memory_mib(device)
        events, profiled_seconds = _record(run, steps, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"--microbatch-size {sequences}: out of memory; choose a smaller one") from error
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # Without Triton there are none.
        own = own_kernels(every_launch(dtype, 10 * major + minor)) if "triton" in backends else {}
        kinds = classify([name for name, _, _ in events], own)
    else:
        seconds = profiled_seconds
        kinds = classify([name for name, _, _ in events], {})
        kinds = [Kind.OPTIMIZER if update else kind for kind, (_, _, update) in zip(kinds, events, strict=True)]
    sizes = _sizes(step, batches.mask_rate, sequences, batches.max_length)
    settings = {
        "preset": options.preset,
        "microbatch_size": sequences,
        "max_length": batches.max_length,
        "mask_rate": batches.mask_rate,
        "dtype": options.dtype,
        "device": device.type,
        "activations": activations,
        "without_graphs": step.graphs.obstacle,
    }
    return Profile(
        settings=settings,
        environment=environment(device),
        limits=limits,
        sizes=sizes,
        seconds=seconds,
        steps=steps,
        flops=tokens * config.flops_per_token(sizes.predicted / tokens, batches.max_length),
        peak_mib=peak_mib,
        work=definition(config, sizes),
        kernels=[Kernel(name, kind, took) for kind, (name, took, _) in zip(kinds, events, strict=True)],
    )


def _limits(device: torch.device, dtype: torch.dtype) -> Limits:
    limits = Limits(matmul_rate(device, dtype), copy_rate(device))
    if device.type == "cuda":
        # What was measured on is no part of the step's memory.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return limits


def _training(
    config: ModelConfig,
    activations: Activations,
    options: PretrainOptions,
    sequences: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Callable[[], None], TrainStep]:
    """A function that takes one step, which it has done a few times, and what it steps with."""
    torch.manual_seed(options.seed)
    model = Bert(config, activations=activations).to(device).train()
    special = special_ids_of(config.vocab_size)
    optimizer = replace(options.optimizer, lr=_LEARNING_RATE)
    step = TrainStep(model, optimizer, special, dtype, options.seed)
    batch = _random_batch(special, sequences, options.batches.max_length).to(device)
    taken = 0

    def run() -> None:
        nonlocal taken
        step.accumulate(batch, options.batches.mask_rate, taken, 1.0)
        with record_function(_UPDATE):
            step.update(_LEARNING_RATE)
        taken += 1

    for _ in range(_WARM_UP):
        run()
    return run, step


def _random_batch(special: SpecialIds, sequences: int, length: int) -> Batch:
    ends = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    return Batch(random_words(special, sequences * length), ends, length, sequences * length**2, Cursor())


def _sizes(step: TrainStep, mask_rate: float, sequences: int, length: int) -> StepSizes:
    weights = step.weights
    lowest = weights.master if weights.working is None else weights.working
    return StepSizes(
        tokens=sequences * length,
        predicted=round(mask_rate * sequences * length),
        attended=sequences * length**2,
        itemsize=lowest.dtype.itemsize,
        parameters=weights.master.numel(),
        working=0 if weights.working is None else weights.working.numel(),
        matrices=tuple((stack.count, stack.rows, stack.columns) for stack in step.optimizer.stacks),
    )


def _time(run: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of a step."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / steps


def _record(run: Callable[[], None], steps: int, device: torch.device) -> tuple[list[tuple[str, float, bool]], float]:
    """(name, seconds, whether in the update, told on a CPU alone) of every kernel of some steps, in the order in which
    they ran; and the seconds of a step under the profiler."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    # There is one cycle; without acc_events torch 2.11 warns that it keeps no others.
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        seconds = _time(run, steps, device)
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [e for e in recorded.events() if e.device_type == kind and not e.is_user_annotation]
    events.sort(key=lambda e: e.time_range.start)
    if not events:
        raise UserError("--device cuda: torch.profiler recorded no kernels; another profiler may hold the card")
    if gpu:
        return [(e.name, e.time_range.elapsed_us() / 1e6, False) for e in events], seconds
    return [(e.name, e.self_cpu_time_total / 1e6, _in_update(e)) for e in events], seconds


def _in_update(event) -> bool:
    while event is not None and event.name != _UPDATE:
        event = event.cpu_parent
    return event is not None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(found: Profile, console: Console) -> None:
    """Print the table and the lines around it."""
    settings, limits = found.settings, found.limits
    console.print(
        f"{settings['preset']}, {settings['microbatch_size']} sequences of {settings['max_length']} tokens, "
        f"{settings['mask_rate']:.0%} predicted, in {settings['dtype']} on {found.environment['device']}, "
        f"activations: {settings['activations']}",
        markup=False,
    )
    if settings["device"] == "cuda" and settings["without_graphs"]:
        console.print(f"without CUDA graphs: {settings['without_graphs']}", markup=False)
    console.print(
        f"limits: matrix products {limits.matmul_rate / 1e12:,.3g} TFLOP/s, copy {limits.copy_rate / 1e12:,.3g} TB/s"
    )
    console.print(_table(found))
    console.print(
        f"{found.seconds * 1e3:,.2f} ms a step, {found.floor_seconds * 1e3:,.2f} ms at its limits; "
        f"{found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}, peak memory {found.peak_mib / 1024:.2f} GiB"
    )


def _table(found: Profile) -> Table:
    what = "kernels" if found.settings["device"] == "cuda" else "operators"
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class")
    for heading in ("ms", "of step", "limit ms", "of limit", what):
        table.add_column(heading, justify="right")
    for row in found.rows():
        floor = None if row.work is None else found.floor(row.work)
        table.add_row(
            row.kind.value,
            f"{row.seconds * 1e3:,.3f}",
            f"{row.seconds / found.seconds:.1%}",
            "" if floor is None else f"{floor * 1e3:,.3f}",
            "" if not floor or not row.seconds else f"{floor / row.seconds:.0%}",
            f"{row.kernels:,.0f}" if row.kernels else "",
        )
    return table


def as_json(found: Profile) -> dict:
    """Everything that was measured, times of one step in seconds; classes and kernels by time."""
    by_name: dict[tuple[str, Kind], list[float]] = defaultdict(list)
    for kernel in found.kernels:
        by_name[kernel.name, kernel.kind].append(kernel.seconds)
    kernels = [
        {"name": name, "class": kind.value, "seconds": sum(times) / found.steps, "count": len(times) / found.steps}
        for (name, kind), times in by_name.items()
    ]
    return {
        "settings": found.settings,
        "environment": found.environment,
        "limits": asdict(found.limits),
        "sizes": asdict(found.sizes),
        "seconds": found.seconds,
        "floor_seconds": found.floor_seconds,
        "tokens_per_s": found.tokens_per_second,
        "mfu": found.mfu,
        "peak_mib": None if math.isnan(found.peak_mib) else found.peak_mib,
        "steps": found.steps,
        "classes": [_row_as_json(found, row) for row in found.rows()],
        "kernels": sorted(kernels, key=lambda kernel: -kernel["seconds"]),
    }


def _row_as_json(found: Profile, row: Row) -> dict:
    values = {"class": row.kind.value, "seconds": row.seconds, "kernels": row.kernels}
    if row.work is not None:
        values |= {"floor_seconds": found.floor(row.work), **asdict(row.work)}
    return values
