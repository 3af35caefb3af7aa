"""The training loop: from one update to the next until the budget is spent."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..config import RECIPES, Budget, Interval, PretrainOptions
from ..data.batches import BatchBuilder, Cursor, PieceSource, Prefetcher
from ..data.shards import TokenStream
from ..device import EnergyMeter, peak_memory_mib
from ..errors import TrainingFailed, UserError
from ..evaluate.mlm import HeldOut, Score
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .plan import BatchPlan
from .progress import Display, Metrics, plot_loss
from .schedule import Spent, batch_microbatches, fraction, lr_factor
from .step import StepResult, TrainStep

_MOST_SKIPPED_IN_A_ROW = 10
_PLOT_EVERY = Interval(30, "seconds")


class Stopped(Exception):
    """A signal asked the run to stop; `at_once`: amid whatever was going on, so that there is nothing to save."""

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(signal.Signals(number).name)
        self.number, self.at_once = number, at_once


class StopSignals:
    """Turns Ctrl-C and SIGTERM into `Stopped`: at once, or, inside `deferred` work, when `check` is called next.

    A second signal does not wait for that.
    """

    def __init__(self):
        self.deferred = False
        self._pending: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if not self.deferred or self._pending is not None:
            raise Stopped(number, at_once=True)
        self._pending = number

    def check(self) -> None:
        if self._pending is not None:
            raise Stopped(self._pending)


@dataclass
class State:
    """What a resumed run needs beside tensors. `microbatch` is in sequences, `microbatches` counts those ever used."""

    microbatch: int
    step: int = 0
    microbatches: int = 0
    spent: Spent = field(default_factory=Spent)
    cursor: Cursor = field(default_factory=Cursor)
    joules: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def from_json(cls, values: dict) -> "State":
        return cls(**{**values, "spent": Spent(**values["spent"]), "cursor": Cursor(**values["cursor"])})


@dataclass(frozen=True)
class Setup:
    """All that a run trains with. peak_flops is what MFU is a share of, unigram_entropy that of the training text."""

    options: PretrainOptions
    folder: Path
    step: TrainStep
    stream: TokenStream
    pieces: PieceSource
    heldout: HeldOut
    plan: BatchPlan
    peak_flops: float
    unigram_entropy: float


class Trainer:
    """Trains a model until its budget is spent; resumes from the newest checkpoint in the folder of the run."""

    def __init__(self, setup: Setup, display: Display, signals: StopSignals):
        self.setup, self.display, self.signals = setup, display, signals
        self.options, self.step, self.plan = options, step, plan = setup.options, setup.step, setup.plan
        self.model, self.device = step.model, step.device
        self.budget = Budget.parse(options.budget)
        self.schedule = RECIPES[options.recipe].schedule
        self.checkpoint_every = Due(Interval.parse("--checkpoint-every", options.run.checkpoint_every))
        self.plot_every = Due(_PLOT_EVERY)
        self.log_every = Due(Interval.parse("--log-every", options.run.log_every))
        self.state = State(microbatch=plan.unit)
        self._resume()
        self.energy = EnergyMeter(self.device)
        self.joules_before = self.state.joules
        self.clock: float | None = None
        self.seconds_before = self.state.spent.seconds
        self._pending: list[tuple[float, int, StepResult]] = []
        self._rate_from = self.state.spent

    def train(self) -> Score:
        """Run to the end of the budget; returns the final held-out score.

        Raises Stopped, after saving a checkpoint unless it came at once.
        """
        self.metrics = Metrics(self.setup.folder, self.state.step, ended=self._fraction() >= 1)
        self._prefetch()
        self.signals.deferred = True
        try:
            with self.display.training() as show:
                while (spent := self._fraction()) < 1:
                    self.signals.check()
                    if self._update(spent):
                        self._after_update(spent, show)
            self._log(show=lambda *_: None)
            return self._evaluate()
        except Stopped as stop:
            if not stop.at_once:
                self._log(show=lambda *_: None)
                self._save()
            raise
        finally:
            self.batches.close()
            self.metrics.close()

    def _fraction(self) -> float:
        return fraction(self.budget, self.state.spent)

    def _update(self, spent: float) -> bool:
        """One update of the weights; False when memory ran out, and it must start again with a smaller microbatch."""
        state, options = self.state, self.options
        sequences = self.plan.unit * batch_microbatches(spent, self.plan.units, options.batches.batch_ramp)
        parts = sequences // state.microbatch
        lr = options.optimizer.lr * lr_factor(self.schedule, spent)
        attended = 0
        try:
            for part in range(parts):
                batch = self.batches.next()
                self.step.accumulate(batch, options.batches.mask_rate, state.microbatches + part, 1 / parts)
                attended += batch.attended
            result = self.step.update(lr)
        except torch.OutOfMemoryError:
            self._halve_microbatch()
            return False
        tokens = sequences * options.batches.max_length
        flops = tokens * self.model.config.flops_per_token(options.batches.mask_rate, attended / tokens)
        state.step += 1
        state.microbatches += parts
        state.cursor = batch.next
        state.spent = Spent(state.spent.seconds, state.spent.tokens + tokens, state.spent.flops + flops)
        if self.clock is None:
            # Compiling and warming up end with the first update; from here on time counts.
            self._wait()
            if self.device.type == "cuda" and self.step.graphs.obstacle is not None:
                self.display.say(f"no CUDA graphs: {self.step.graphs.obstacle}")
            self.clock = time.monotonic()
            self._rate_from = state.spent
        self._spent_now()
        self._pending.append((lr, tokens, result))
        return True

    def _after_update(self, before: float, show: Callable) -> None:
        """Whatever is due: log, evaluate, save."""
        if self.log_every.now(self.state.step):
            self._log(show)
        after, evals = self._fraction(), self.options.evals
        if after < 1 and math.floor(after * evals) > math.floor(before * evals):
            self._log(show)
            self._evaluate()
        if self.checkpoint_every.now(self.state.step):
            self._log(show)
            self._save()

    def _halve_microbatch(self) -> None:
        self.step.reset()
        self.batches.close()
        old = self.state.microbatch
        smaller = next((size for size in range(old // 2, 0, -1) if old % size == 0), None)
        if smaller is None:
            raise TrainingFailed(
                "out of memory with one sequence a microbatch: lower --max-length or the preset's size"
            )
        self.display.say(f"out of memory: the microbatch goes from {old} to {smaller} sequences, the batch stays")
        self.state.microbatch = smaller
        self._prefetch()

    def _prefetch(self) -> None:
        length = self.options.batches.max_length
        builder = BatchBuilder(self.setup.stream, self.setup.pieces, self.state.microbatch * length, length)
        self.batches = Prefetcher(builder.build, self.state.cursor, pin=self.device.type == "cuda")

    def _log(self, show: Callable) -> None:
        """Read back what the device has computed since the last time, and write one record of it."""
        if not self._pending:
            return
        values = torch.stack([torch.stack((r.loss, r.gradient_norm, r.skipped)) for *_, r in self._pending]).tolist()
        lr, batch, _ = self._pending[-1]
        self._pending = []
        self._count_skipped([skipped for *_, skipped in values])
        finite = [loss for loss, _, skipped in values if not skipped]
        last, now = self._rate_from, self._spent_now()
        seconds = now.seconds - last.seconds if now.tokens > last.tokens else math.inf  # the first update: no rate
        record = {
            "step": self.state.step,
            "tokens": now.tokens,
            "seconds": round(now.seconds, 3),
            "loss": sum(finite) / len(finite) if finite else None,
            "lr": lr,
            "batch": batch,
            "tokens_per_s": (now.tokens - last.tokens) / seconds,
            "mfu": (now.flops - last.flops) / seconds / self.setup.peak_flops,
            "memory_mib": round(peak_memory_mib(self.device), 1),
            "joules": self._joules(),
            "gradient_norm": values[-1][1] if math.isfinite(values[-1][1]) else None,
            "skipped": self.state.skipped,
            "epoch": self.state.cursor.epoch,
        }
        self._rate_from = now
        self.metrics.write(record)
        spent = self._fraction()
        show(record, spent, now.seconds * (1 - spent) / spent if spent else math.inf)
        if self.state.skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            kept = latest_checkpoint(self.setup.folder)
            good = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
            raise TrainingFailed(
                f"the loss or gradient was not finite {self.state.skipped_in_a_row} updates in a row, up to step "
                f"{self.state.step}; {good}; try a lower --lr"
            )

    def _count_skipped(self, skipped: list[float]) -> None:
        for flag in skipped:
            self.state.skipped += int(flag)
            self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if flag else 0

    def _evaluate(self) -> Score:
        self.model.eval()
        score = self._score()
        self.model.train()
        spent = self._spent_now()
        record = {"step": self.state.step, "tokens": spent.tokens, "seconds": round(spent.seconds, 3)}
        self.metrics.write({**record, "heldout_loss": score.loss, "heldout_accuracy": score.accuracy})
        self.display.say(
            f"step {self.state.step:,}  {spent.tokens:,} tokens  "
            f"held-out loss {score.loss:.4f}, accuracy {score.accuracy:.1%}"
        )
        if self.plot_every.now(self.state.step):
            plot_loss(self.setup.folder, self.setup.unigram_entropy)
        self._rate_from = self._spent_now()
        return score

    def _score(self) -> Score:
        try:
            return self.setup.heldout.score(self.model, self.step.autocast)
        except torch.OutOfMemoryError:  # between updates nothing is lost with what the step holds
            self.step.reset()
            self.display.say("out of memory while scoring held-out text: tried again with what the training step held")
        return self.setup.heldout.score(self.model, self.step.autocast)

    def _spent_now(self) -> Spent:
        """The resources spent, with the time it is now."""
        if self.clock is not None:
            seconds = self.seconds_before + time.monotonic() - self.clock
            self.state.spent = replace(self.state.spent, seconds=seconds)
        return self.state.spent

    def _joules(self) -> float | None:
        used = self.energy.joules()
        if used is not None:
            self.state.joules = self.joules_before + used
        return None if used is None else round(self.state.joules, 1)

    def _save(self) -> None:
        self._spent_now()
        tensors, state = self.step.tensors(), asdict(self.state)
        keep = self.options.run.keep_checkpoints
        save_checkpoint(self.setup.folder, self.state.step, self.model, tensors, state, keep)
        self._rate_from = self._spent_now()

    def _resume(self) -> None:
        newest = latest_checkpoint(self.setup.folder)
        if newest is None:
            return
        state = load_checkpoint(newest, self.model, self.step.tensors())
        self.step.weights.refresh()
        try:
            self.state = State.from_json(state)
        except (KeyError, TypeError) as error:
            raise UserError(f"{newest / 'trainer.json'}: damaged: {error}") from error
        share = self._fraction()
        self.display.say(f"resuming at step {self.state.step:,} with {share:.1%} of the budget spent ({newest})")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Due:
    """Says when an interval has passed."""

    def __init__(self, interval: Interval):
        self.interval, self._last = interval, time.monotonic()

    def now(self, step: int) -> bool:
        if self.interval.unit == "steps":
            return step % max(1, int(self.interval.amount)) == 0
        if time.monotonic() - self._last < self.interval.amount:
            return False
        self._last = time.monotonic()
        return True
