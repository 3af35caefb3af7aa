"""The optimizer of flat weights: AdamW, with Muon for the matrices of the layers."""

import torch

from ..config import OptimizerOptions
from ..kernels import adamw, muon_direction, muon_update, orthogonalise, update_rates
from .weights import Weights

# A CPU adds up the squares of many numbers one after the other, and loses a percent of a hundred million.
_NORM_PIECE = 2**18


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The norm, a scalar, of a flat tensor (N,)."""
    if gradient.device.type == "cpu":
        gradient = torch.stack(torch._foreach_norm(gradient.split(_NORM_PIECE)))
    return torch.linalg.vector_norm(gradient)


class Optimizer:
    """AdamW (Loshchilov & Hutter, 1711.05101), and Muon (Jordan et al., 2024) where `options.optimizer` says so.

    Weight decay is on matrices alone, not on norms, biases and scalars. Muon's learning rate keeps its ratio to AdamW's
    as that follows its schedule. State: `first`, both kinds of momentum; `second`, AdamW's second moments.
    """

    def __init__(self, weights: Weights, options: OptimizerOptions):
        self.weights, self.options = weights, options
        self.stacks = weights.stacks() if options.optimizer == "muon" else []
        self.adam_from = weights.hidden if self.stacks else 0
        """Where in the flat buffers AdamW's part begins."""
        self.first = torch.zeros_like(weights.master)
        self.second = torch.zeros_like(weights.master[self.adam_from :])
        self.updates = torch.zeros((), device=weights.master.device)

    def update(self, lr: torch.Tensor, loss: torch.Tensor, loss_scale: torch.Tensor, report: torch.Tensor) -> None:
        """Clip the gradient, which is that of the loss times `loss_scale`, and update the weights by it, unless it or
        the loss is not finite. report (3,) gets loss, gradient norm and whether the update was skipped; the others are
        scalars, all on the device; lr is AdamW's."""
        betas = {"beta1": self.options.beta1, "beta2": self.options.beta2}
        norm = norm_of(self.weights.gradient)
        rates = update_rates(norm, loss, loss_scale, lr, self.updates, report, clip=self.options.clip, **betas)
        if self.stacks:
            self._muon(rates)
        weights = self.weights
        matrices, rest = slice(self.adam_from, weights.decayed), slice(weights.decayed, None)
        for part, decay in ((matrices, self.options.weight_decay), (rest, 0.0)):
            working = None if weights.working is None or part is rest else weights.working[part]
            second = self.second[part.start - self.adam_from :][: weights.master[part].numel()]
            buffers = (weights.master[part], weights.gradient[part], self.first[part], second)
            adamw(*buffers, rates, working, **betas, eps=self.options.adam_eps, weight_decay=decay)

    def _muon(self, rates: torch.Tensor) -> None:
        weights, options, hidden = self.weights, self.options, slice(self.adam_from)
        buffers = (weights.gradient[hidden], self.first[hidden])
        like = weights.master if weights.working is None else weights.working
        direction = torch.zeros_like(like[hidden])
        muon_direction(*buffers, rates, direction, beta=options.muon_momentum)
        ratio = options.muon_lr / options.lr
        for stack in self.stacks:
            matrices, part = stack.of(direction), slice(stack.start, stack.end)
            orthogonalise(matrices, out=matrices)
            working = None if weights.working is None else weights.working[part]
            # An update has the same size for matrices of every shape (Jordan et al.).
            scale = ratio * max(1.0, stack.rows / stack.columns) ** 0.5
            settings = {"scale": scale, "weight_decay": ratio * options.weight_decay}
            muon_update(weights.master[part], direction[part], rates, working, **settings)

    def reset(self) -> None:
        """Forget all momentum, as before the first update."""
        for tensor in (self.first, self.second, self.updates):
            tensor.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name, e.g. "exp_avg.layers.0.mlp.0.weight": views, to be read or written."""
        first, second = self.weights.by_name(self.first), self.weights.by_name(self.second, self.adam_from)
        named = {f"exp_avg.{name}": view for name, view in first.items()}
        named |= {f"exp_avg_sq.{name}": view for name, view in second.items()}
        return named | {"updates": self.updates}
