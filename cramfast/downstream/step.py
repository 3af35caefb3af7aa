"""One step of finetuning, and predictions. Never waits for the device while it trains."""

import numpy as np
import torch

from ..config import OptimizerOptions
from ..train.step import Step, StepResult
from .classifier import Classifier
from .examples import Examples, FlatBatch, Shape, evaluation_batches
from .settings import Protocol

_EVALUATION_TOKENS = {"cuda": 16_384, "cpu": 4_096}


class FinetuneStep(Step):
    """A batch's gradient and AdamW's update by it, as in the cramming paper without weight decay and clipping.

    Each shape of batch, of which `BatchMaker` has few, is a CUDA graph. Dropout is another in every replay: its random
    numbers, those of the attention weights included, come from torch's generator, which graphs advance.
    """

    def __init__(self, model: Classifier, protocol: Protocol, dtype: torch.dtype, graphs: bool = True):
        options = OptimizerOptions(
            optimizer="adamw", lr=protocol.lr, beta1=0.9, beta2=0.98, adam_eps=1e-6, weight_decay=0.0, clip=float("inf")
        )
        super().__init__(model, options, dtype, graphs)
        self.protocol = protocol
        self._batches: dict[Shape, FlatBatch] = {}
        self._rehearsed = False

    @property
    def wants_few_shapes(self) -> bool:
        """Whether batches are to be filled up to few shapes, each of which becomes a graph."""
        return self.graphs.obstacle is None

    def __call__(self, batch: FlatBatch, lr: float) -> StepResult:
        """Train on one batch, which lies on the CPU, pinned where the device is a GPU."""
        if self.wants_few_shapes:
            static = self._batches.get(batch.shape)
            if static is None:
                static = self._batches[batch.shape] = FlatBatch.empty(batch.shape, batch.is_score, self.device)
            static.buffer.copy_(batch.buffer, non_blocking=True)
        else:
            static = batch.to(self.device)
        if self.device.type == "cuda" and not self._rehearsed:
            self.rehearse(lambda: self._gradient(static))
            self._rehearsed = True
        if self.wants_few_shapes:
            self.graphs.run(batch.shape, lambda: self._gradient(static))
        else:
            self._gradient(static)
        return self.update(lr)

    def _gradient(self, batch: FlatBatch) -> None:
        inputs = (batch.part("input_ids").long(), batch.part("token_types"), batch.part("cu_seqlens"))
        self._differentiate(True, *inputs, batch.shape.max_length, batch.part("labels"), batch.part("weights"))

    def restart(self, model: Classifier) -> None:
        """Begin anew from the weights of another classifier of this architecture; graphs stay as they are."""
        self.model.load_state_dict(model.state_dict())
        self.weights.refresh()
        self.optimizer.reset()
        self._start_loss_scale()

    @torch.no_grad()
    def predict(self, examples: Examples) -> np.ndarray:
        """fp32 (N, K): the outputs for every example, without dropout."""
        self.model.eval()
        found = np.zeros((len(examples), self.model.outputs), dtype=np.float32)
        logits = []
        for rows, inputs, longest in evaluation_batches(examples, _EVALUATION_TOKENS[self.device.type]):
            inputs = [tensor.to(self.device) for tensor in inputs]
            # A GPU's kernels are compiled for the longest sequence, and those of training are there already.
            longest = self.protocol.max_length if self.device.type == "cuda" else longest
            with self.autocast:
                logits.append((rows, self.model.logits(*inputs, longest, len(rows))))
        for rows, values in logits:
            found[rows] = values.cpu().numpy()
        self.model.train()
        return found
