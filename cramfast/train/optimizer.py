"""AdamW over a model's parameters."""

import torch
from torch import nn

from ..config import OptimizerOptions


def adamw(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices, none on norms, biases and scalars (Loshchilov & Hutter, 1711.05101)."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.adam_eps, fused=True
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, e.g. "exp_avg.layers.0.mlp.0.weight"."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = value
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        # AdamW keeps its step count where the fused kernel reads it: beside the parameter.
        optimizer.state[parameter][kind] = value.to(parameter.device)
