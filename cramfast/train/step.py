"""One training step: gradients of several microbatches, then one clipped update. Never waits for the device.

Everything that a microbatch or an update reads and writes lies in tensors that stay where they are: weights, gradient,
moments, the batch, and the numbers that change from step to step. So each runs as one CUDA graph. Gradients are taken
of 16-bit working copies of the matrices, which the update writes, and added up in the float32 of the parameters.

On a GPU a rehearsal comes first, of a microbatch and an update in which no kernel runs: it finds out what there is to
compile, and leaves everything as it was.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from ..config import Activations, OptimizerOptions
from ..data.batches import Batch
from ..data.tokenizer import SpecialIds
from ..kernels import compiling_ahead, mask_tokens
from ..model import Bert
from .graphs import Graphs
from .optimizer import Optimizer
from .weights import Weights

_GROWTH_INTERVAL = 2000
_FIRST_SCALE = 2.0**16


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device: mean loss in nats, gradient norm before clipping, and 1.0 if the update was skipped."""

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    skipped: torch.Tensor


class StaticBatch:
    """A microbatch at fixed addresses: as many tokens as the others have, and room for `sequences` sequences.

    Sequences that a batch lacks are empty ones at its end.
    """

    def __init__(self, tokens: int, sequences: int, device: torch.device):
        self.input_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.full((sequences + 1,), tokens, dtype=torch.int32, device=device)

    def fill(self, batch: Batch) -> None:
        ends = batch.cu_seqlens.numel()
        self.input_ids.copy_(batch.input_ids, non_blocking=True)
        self.cu_seqlens[:ends].copy_(batch.cu_seqlens, non_blocking=True)
        self.cu_seqlens[ends:].fill_(self.input_ids.numel())


class LossAndGradients(nn.Module):
    """A model's loss and its gradients in one call: what the backward pass computes again sees the same weights."""

    def __init__(self, model: nn.Module, autocast: torch.autocast):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, leaves: list[torch.Tensor], share: torch.Tensor, scale: torch.Tensor, *arguments):
        """`share` of the loss of the model on `arguments`, and its gradients times `scale`."""
        with self.autocast:
            loss = self.model(*arguments) * share
        return loss.detach(), torch.autograd.grad(loss * scale, leaves, allow_unused=True)


class Step:
    """The gradients of a model's loss, added up, and the update by them, all on tensors that stay where they are.

    dtype: that of the matrix products, by autocast; float16 brings loss scaling with it. A step whose loss or
    gradients are not finite changes nothing but the loss scale. graphs: whether a GPU runs it as CUDA graphs.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions, dtype: torch.dtype, graphs: bool = True):
        self.model, self.options = model, options
        self.device = next(model.parameters()).device
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.weights = Weights(model, dtype)
        self.optimizer = Optimizer(self.weights, options)
        self.graphs = Graphs(self.device, graphs)
        self._scaled = dtype == torch.float16
        self.loss_scale, self.good_steps = self._scalar(), self._scalar()
        self._start_loss_scale()
        self._lr, self._share, self._loss = self._scalar(), self._scalar(1.0), self._scalar()
        self._report = torch.zeros(3, device=self.device)
        self._leaves = {f"model.{name}": leaf for name, leaf in self.weights.leaves.items()}
        self._both = LossAndGradients(model, self.autocast)

    def _start_loss_scale(self) -> None:
        self.loss_scale.fill_(_FIRST_SCALE if self._scaled else 1.0)
        self.good_steps.zero_()

    def _scalar(self, value: float = 0.0) -> torch.Tensor:
        return torch.full((), value, device=self.device)

    def _differentiate(self, first: bool, *arguments) -> None:
        """Add the loss of the model on `arguments` and its gradient; the `first` gradient takes the place of what was
        there. Work for a graph."""
        self.weights.start_gradient(anew=first)
        arguments = ([*self._leaves.values()], self._share, self.loss_scale, *arguments)
        loss, gradients = functional_call(self._both, self._leaves, arguments)
        self.weights.take(gradients)
        self._loss += loss

    def rehearse(self, differentiate: Callable[[], None]) -> None:
        """Compile the kernels of `differentiate`, some calls of `_differentiate`, and of an update, before the first
        gradient of an update. Both are done but for the kernels, whose results are anything; none of it stays."""

        def work() -> None:
            differentiate()
            # An operator without a kernel runs as ever, and skips this update.
            self._loss.fill_(torch.nan)
            self._update()

        states = [(tensor, tensor.clone()) for tensor in (self.loss_scale, self.good_steps, self._report)]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), compiling_ahead():
                self.graphs.run_aside(work)
        finally:
            self._loss.zero_()
            for tensor, before in states:
                tensor.copy_(before)

    def update(self, lr: float) -> StepResult:
        """Clip the accumulated gradient, update the weights, forget the gradient."""
        self._lr.fill_(lr)
        self.graphs.run("update", self._update)
        return StepResult(*self._report.clone().unbind())

    def _update(self) -> None:
        self.optimizer.update(self._lr, self._loss, self.loss_scale, self._report)
        if self._scaled:
            _, _, skipped = self._report
            self._adapt_loss_scale(skipped)
        self._loss.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs beside the model: views by name, to be read or written."""
        return self.optimizer.tensors() | {"loss_scale": self.loss_scale, "good_steps": self.good_steps}

    def _adapt_loss_scale(self, skipped: torch.Tensor) -> None:
        """Halve the scale after an overflow, double it after 2000 steps without (Micikevicius et al., 1710.03740)."""
        good = (self.good_steps + 1) * (1 - skipped)
        grown = good >= _GROWTH_INTERVAL
        factor = torch.where(grown, 2.0, 1.0 - 0.5 * skipped)
        self.loss_scale.copy_((self.loss_scale * factor).clamp(min=1.0))
        self.good_steps.copy_(torch.where(grown, 0.0, good))


class TrainStep(Step):
    """The step of pretraining: several microbatches, masked on the device, then one update; the rest as `Step`.

    continues: bool (V,) on the model's device, True for ids that continue a word; with it words are masked whole.
    """

    def __init__(
        self,
        model: Bert,
        options: OptimizerOptions,
        special: SpecialIds,
        dtype: torch.dtype,
        seed: int,
        *,
        continues: torch.Tensor | None = None,
        graphs: bool = True,
    ):
        super().__init__(model, options, dtype, graphs)
        self.special, self.seed, self.continues = special, seed, continues
        self._microbatch = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._batches: dict[tuple[int, int], StaticBatch] = {}
        self._first = True
        self._rehearsed: Activations | None = None

    def accumulate(self, batch: Batch, mask_rate: float, microbatch: int, share: float) -> None:
        """Add the gradient of one microbatch, `share` of the step's tokens. `microbatch`, a count over the whole run,
        decides with the seed which tokens are masked."""
        tokens, count = batch.input_ids.numel(), round(mask_rate * batch.input_ids.numel())
        # Powers of two: the number of sequences differs from batch to batch, that of graphs stays small.
        sequences = 1 << (batch.cu_seqlens.numel() - 2).bit_length()
        shape = (tokens, sequences)
        if self.device.type == "cuda" and self._first and self._rehearsed != self.model.activations:
            self.rehearse_microbatch(*shape, batch.max_seqlen)
        static = self._batches.get(shape)
        if static is None:
            static = self._batches[shape] = StaticBatch(*shape, self.device)
        static.fill(batch)
        self._microbatch.fill_(microbatch)
        self._share.fill_(share)
        key = (*shape, batch.max_seqlen, count, first := self._first)
        self.graphs.run(key, lambda: self._add_gradient(static, batch.max_seqlen, count, first))
        self._first = False

    def rehearse_microbatch(self, tokens: int, sequences: int, max_seqlen: int) -> None:
        """Compile what microbatches of this shape need, by one that is smaller: all that kernels depend on is how many
        tokens there are to a sequence."""
        parts = math.gcd(tokens, sequences)
        tokens, sequences = tokens // parts, sequences // parts
        batch = StaticBatch(tokens, sequences, self.device)
        batch.cu_seqlens.copy_(torch.arange(sequences + 1, device=self.device) * tokens // sequences)
        # Masking makes up no positions and labels now that could be those of a microbatch.
        places = torch.arange(tokens, device=self.device)

        def differentiate() -> None:
            self._mask(batch, tokens)
            for first in (True, False):
                self._differentiate(first, batch.input_ids, batch.cu_seqlens, max_seqlen, places, batch.input_ids)

        self.rehearse(differentiate)
        self._rehearsed = self.model.activations

    def _add_gradient(self, batch: StaticBatch, max_seqlen: int, count: int, first: bool) -> None:
        input_ids, positions, labels = self._mask(batch, count)
        self._differentiate(first, input_ids, batch.cu_seqlens, max_seqlen, positions, labels)

    def _mask(self, batch: StaticBatch, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return mask_tokens(
            batch.input_ids,
            batch.cu_seqlens,
            count,
            mask_id=self.special.mask,
            ordinary=self.special.ordinary,
            seed=self.seed,
            step=self._microbatch,
            continues=self.continues,
        )

    def update(self, lr: float) -> StepResult:
        result = super().update(lr)
        self._first = True
        return result

    def discard(self) -> None:
        """Forget the gradients accumulated so far."""
        self._first = True
        self._loss.zero_()

    def reset(self) -> None:
        """Forget the gradients accumulated so far, and give back the memory that microbatches of their size took."""
        self.discard()
        self.graphs.forget()
        self._batches.clear()
        torch.cuda.empty_cache()
