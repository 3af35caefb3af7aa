"""AdamW over a model's flat weights."""

import torch

from ..config import OptimizerOptions
from ..kernels import adamw, adamw_rates
from .weights import Weights


class AdamW:
    """AdamW with weight decay on matrices, none on norms, biases and scalars (Loshchilov & Hutter, 1711.05101)."""

    def __init__(self, weights: Weights, options: OptimizerOptions):
        self.weights, self.options = weights, options
        self.first, self.second = torch.zeros_like(weights.master), torch.zeros_like(weights.master)
        self.updates = torch.zeros((), device=weights.master.device)

    def update(self, lr: torch.Tensor, factor: torch.Tensor, skipped: torch.Tensor) -> None:
        """Update the weights by `factor` times their gradient, unless `skipped` is 1, and forget the gradient. All
        three are scalars on the device."""
        weights, options = self.weights, self.options
        betas = {"beta1": options.beta1, "beta2": options.beta2}
        self.updates += 1 - skipped
        rates = adamw_rates(lr, self.updates, factor, skipped, **betas)
        buffers = (weights.master, weights.gradient, self.first, self.second)
        matrices, rest = slice(weights.decayed), slice(weights.decayed, None)
        for part, working, decay in ((matrices, weights.working, options.weight_decay), (rest, None, 0.0)):
            pieces = (buffer[part] for buffer in buffers)
            adamw(*pieces, rates, working, **betas, eps=options.adam_eps, weight_decay=decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name, e.g. "exp_avg.layers.0.mlp.0.weight": views, to be read or written."""
        moments = {"exp_avg": self.first, "exp_avg_sq": self.second}
        named = {
            f"{kind}.{name}": view
            for kind, flat in moments.items()
            for name, view in self.weights.by_name(flat).items()
        }
        return named | {"updates": self.updates}
