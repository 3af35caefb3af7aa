"""Who is measured: this project and what people use today, all on the same inputs."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import Case, Inputs

Tensors = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """One implementation of a case's operator.

    `load(case)` returns it as a function of the inputs by name. Its top-level `modules` must be found, or it is skipped
    by the name of its `package`. A peer that takes its inputs in another form has `prepare` (a case's inputs → its own)
    and `restore` (the case's inputs, its own outputs and gradients → the case's outputs and gradients). `overwrites`
    names own inputs that its backward pass destroys. `allowance`: how many times PyTorch's error its error may be.
    `host`: whether host time is measured.
    """

    who: str
    load: Callable[[Case], Callable]
    modules: tuple[str, ...] = ()
    package: str = ""
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    restore: Callable[[Inputs, Outputs, Tensors], tuple[Outputs, Tensors]] = lambda _, outputs, gradients: (
        outputs,
        gradients,
    )
    overwrites: tuple[str, ...] = ()
    allowance: float = 2.0
    host: bool = True

    def missing(self) -> str | None:
        """Why this peer cannot run here; None when it can."""
        return absence(self.modules, self.package)


def absence(modules: tuple[str, ...], package: str) -> str | None:
    """That `package` is not installed, where one of its top-level modules is not found; else None."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{package} is not installed" if absent else None


def _compiled(case: Case) -> Callable:
    # Every case compiles the same few functions; without a reset they would count towards the recompile limit.
    torch._dynamo.reset()
    return torch.compile(case.eager, fullgraph=True, dynamic=False)


CRAMFAST = Peer("cramfast", lambda case: case.ours)
EAGER = Peer("torch-eager", lambda case: case.eager)
# Host time is taken on tiny tensors, for which it would have to be compiled again.
COMPILED = Peer("torch-compile", _compiled, host=False)
STANDARD = (CRAMFAST, EAGER, COMPILED)
