"""Finetuning once: epochs of training, an evaluation after each, the numbers of the last."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import TrainingFailed
from ..train.schedule import warm_cosine
from .examples import BatchMaker, Examples
from .metrics import evaluate
from .step import FinetuneStep
from .table import in_percent

_STEPS_BETWEEN_LINES = 25


@dataclass(frozen=True)
class Training:
    """What is trained on and evaluated. dev: splits by name; pad: the id that fills batches."""

    name: str
    train: Examples
    dev: dict[str, Examples]
    metrics: tuple[str, ...]
    pad: int
    seed: int


@dataclass(frozen=True)
class Epoch:
    """loss: the mean of the batches'; scores: metrics by split after it."""

    loss: float
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class SeedResult:
    """scores: those of the last epoch. seconds: of everything; train_seconds: without the evaluations."""

    scores: dict[str, dict[str, float]]
    epochs: list[Epoch]
    steps: int
    seconds: float
    train_seconds: float


class Trail:
    """Losses of some steps ago: the device always has work in its queue while somebody looks at them."""

    def __init__(self, device: torch.device):
        self.kept = 2 if device.type == "cuda" else 0
        self._waiting: deque = deque()

    def add(self, loss: torch.Tensor) -> float | None:
        """The loss that was added `kept` calls ago, once it is computed; None while there is none."""
        if not self.kept:
            return loss.item()
        host = torch.empty((), pin_memory=True)
        host.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((host, event))
        if len(self._waiting) <= self.kept:
            return None
        host, event = self._waiting.popleft()
        event.synchronize()
        return host.item()


def train(step: FinetuneStep, training: Training, show: Callable[[float, str], None]) -> SeedResult:
    """Train a step from its beginning and evaluate it. `show` hears (share done, a line about it).

    Raises TrainingFailed when the loss is no number any more.
    """
    protocol, began = step.protocol, time.monotonic()
    few = step.wants_few_shapes
    maker = BatchMaker(training.train, protocol.batch_size, protocol.max_length, training.pad, filled=few)
    epochs, train_seconds = [], 0.0
    for number in range(protocol.epochs):
        epoch_began = time.monotonic()
        loss = _epoch(step, maker, training, number, show)
        train_seconds += time.monotonic() - epoch_began
        if not math.isfinite(loss):
            raise TrainingFailed(f"{training.name}: the loss is not finite after epoch {number + 1}; try a lower --lr")
        scores = {
            split: evaluate(training.metrics, step.predict(examples), examples.labels)
            for split, examples in training.dev.items()
        }
        epochs.append(Epoch(loss, scores))
        line = f"{training.name}  epoch {number + 1}/{protocol.epochs}  loss {loss:.3f}  {in_percent(scores)}"
        show((number + 1) / protocol.epochs, line)
    seconds = time.monotonic() - began
    steps = len(maker) * protocol.epochs
    return SeedResult(epochs[-1].scores, epochs, steps, round(seconds, 2), round(train_seconds, 2))


def _epoch(
    step: FinetuneStep, maker: BatchMaker, training: Training, epoch: int, show: Callable[[float, str], None]
) -> float:
    """One pass over the training examples; returns the mean of the batches' losses, for which alone it waits."""
    protocol, trail = step.protocol, Trail(step.device)
    updates, before = len(maker) * protocol.epochs, len(maker) * epoch
    total, began = torch.zeros((), device=step.device), time.monotonic()
    for number, batch in enumerate(maker.epoch(training.seed, epoch), 1):
        lr = protocol.lr * warm_cosine(before + number - 1, updates, protocol.warmup)
        result = step(batch.pin() if step.device.type == "cuda" else batch, lr)
        total += result.loss
        if number % _STEPS_BETWEEN_LINES == 0 and (loss := trail.add(result.loss)) is not None:
            rate = (number - trail.kept * _STEPS_BETWEEN_LINES) / max(time.monotonic() - began, 1e-6)
            line = f"{training.name}  epoch {epoch + 1}/{protocol.epochs}  loss {loss:.3f}  {rate:.1f} steps/s"
            show((before + number) / updates, line)
    return total.item() / len(maker)
