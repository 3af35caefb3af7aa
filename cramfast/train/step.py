"""One training step: gradients of several microbatches, then one clipped update. Never waits for the device."""

from dataclasses import dataclass

import torch

from ..data.batches import Batch
from ..data.tokenizer import SpecialIds
from ..kernels import mask_tokens
from ..model import Bert

_GROWTH_INTERVAL = 2000


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device: mean loss in nats, gradient norm before clipping, and 1.0 if the update was skipped."""

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    skipped: torch.Tensor


class TrainStep:
    """Accumulates gradients and updates the weights.

    dtype: that of the matrix products, by autocast; float16 brings loss scaling with it. A step whose loss or
    gradients are not finite changes nothing but the loss scale.
    """

    def __init__(
        self, model: Bert, optimizer: torch.optim.AdamW, special: SpecialIds, clip: float, dtype: torch.dtype, seed: int
    ):
        self.model, self.optimizer, self.special, self.clip, self.seed = model, optimizer, special, clip, seed
        self.device = next(model.parameters()).device
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        scaled = dtype == torch.float16
        self.loss_scale = torch.full((), 2.0**16 if scaled else 1.0, device=self.device)
        self.good_steps = torch.zeros((), device=self.device)
        self._scaled = scaled
        self._losses: list[torch.Tensor] = []

    def accumulate(self, batch: Batch, mask_rate: float, microbatch: int, share: float) -> None:
        """Add the gradient of one microbatch, `share` of the step's tokens. `microbatch`, a count over the whole run,
        decides with the seed which tokens are masked."""
        batch = batch.to(self.device)
        count = round(mask_rate * batch.input_ids.numel())
        input_ids, positions, labels = mask_tokens(
            batch.input_ids,
            batch.cu_seqlens,
            count,
            mask_id=self.special.mask,
            ordinary=self.special.ordinary,
            seed=self.seed,
            step=microbatch,
        )
        with self.autocast:
            loss = self.model(input_ids, batch.cu_seqlens, batch.max_seqlen, positions, labels) * share
        (loss * self.loss_scale).backward()
        self._losses.append(loss.detach())

    def update(self, lr: float) -> StepResult:
        """Clip the accumulated gradient, update the weights, forget the gradient."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.loss_scale
        loss = torch.stack(self._losses).sum()
        skipped = (~torch.isfinite(norm + loss)).float()
        # The fused optimizer divides gradients by `grad_scale` and does nothing where `found_inf` is 1.
        self.optimizer.grad_scale = self.loss_scale * (norm / self.clip).clamp(min=1.0)
        self.optimizer.found_inf = skipped
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self._scaled:
            self._adapt_loss_scale(skipped)
        result = StepResult(loss, norm, skipped)
        self.reset()
        return result

    def reset(self) -> None:
        """Forget the gradients accumulated so far."""
        self.optimizer.zero_grad(set_to_none=True)
        self._losses = []

    def _adapt_loss_scale(self, skipped: torch.Tensor) -> None:
        """Halve the scale after an overflow, double it after 2000 steps without (Micikevicius et al., 1710.03740)."""
        self.good_steps = (self.good_steps + 1) * (1 - skipped)
        grown = self.good_steps >= _GROWTH_INTERVAL
        factor = torch.where(grown, 2.0, 1.0 - 0.5 * skipped)
        self.loss_scale = (self.loss_scale * factor).clamp(min=1.0)
        self.good_steps = torch.where(grown, 0.0, self.good_steps)
