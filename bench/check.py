"""The guard before every timing: a result that is wrong is not timed.

Outputs and every gradient are compared with the definition in fp64 by relative L2 error. The rule: at most twice the
error of plain PyTorch in the same dtype, because that much is rounding and order of summation; NaN never passes.
Results that are integers have to be the definition's.
"""

import math
from collections.abc import Iterator

import torch

from .cases import BOTH, Case, Inputs
from .peers import EAGER, Peer

# fp64 holds a handful of tensors per row: 4096 rows of 3072 stay below 1 GiB.
_CHUNK = 4096


class WrongResult(AssertionError):
    """A peer's output or gradient is wrong; the message says whose, which and by how much."""


class Call:
    """One peer on one set of inputs: calling it computes `outputs` and, for fwd+bwd, `gradients` by input name.

    Backward is `torch.autograd.grad` with the given output gradients; forward alone runs without autograd.
    """

    def __init__(self, function, inputs: Inputs, direction: str):
        self.function, self.inputs, self.direction = function, inputs, direction
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.gradients: dict[str, torch.Tensor] = {}
        self._wanted = {}
        if direction == BOTH:
            self._wanted = {k: t.requires_grad_() for k, t in inputs.tensors.items() if t.is_floating_point()}

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.direction == BOTH):
            outputs = self.function(**self.inputs.tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = ()
        if self.direction == BOTH:
            gradients = torch.autograd.grad(outputs, tuple(self._wanted.values()), self.inputs.grad_outputs)
        self.outputs = tuple(output.detach() for output in outputs)
        # Detached at once: a view of what is overwritten later could not be any more.
        self.gradients = {name: gradient.detach() for name, gradient in zip(self._wanted, gradients, strict=True)}

    def forget(self) -> None:
        """Drop the results, so that their memory is free."""
        self.outputs, self.gradients = (), {}

    def poison(self) -> None:
        """Fill the results with NaN, or the least integer, so that an element which the next replay leaves unwritten
        shows."""
        given = (*self.inputs.tensors.values(), *self.inputs.grad_outputs)
        kept = {tensor.untyped_storage().data_ptr() for tensor in given}
        for result in (*self.outputs, *self.gradients.values()):
            if result.untyped_storage().data_ptr() not in kept:
                result.fill_(math.nan if result.is_floating_point() else torch.iinfo(result.dtype).min)


def guard(case: Case, peer: Peer, call: Call, inputs: Inputs, known: dict[tuple, dict[str, float]]) -> float:
    """The largest error of `call`'s results as a multiple of PyTorch's. Raises WrongResult above the peer's allowance.

    `inputs` are the case's own, from which the peer's were prepared. PyTorch itself only has to be finite. known:
    PyTorch's errors by what was asked of it, to which this case's are added: one measurement serves all peers.
    """
    who, work = peer.who, case.work(call.direction)
    if who == EAGER.who:
        for name, result in _results(call.outputs, call.gradients).items():
            if not bool(result.isfinite().all()):
                raise WrongResult(f"{who} on {work}: {name} is not finite")
        return 1.0
    mine = _results(*peer.restore(inputs, call.outputs, call.gradients))
    if case.exact:
        for name, error in relative_errors(case, inputs, call.direction, [mine])[0].items():
            if error:
                raise WrongResult(f"{who} on {work}: {name} is not that of the definition")
        return 0.0
    candidates, asked = [mine], (work, case.dtype)
    if asked not in known:
        yardstick = Call(case.eager, inputs, call.direction)
        yardstick()
        candidates.append(_results(yardstick.outputs, yardstick.gradients))
    errors, *of_yardstick = relative_errors(case, inputs, call.direction, candidates)
    if of_yardstick:
        (known[asked],) = of_yardstick
    worst = 0.0
    for name, error in errors.items():
        allowed = known[asked][name]
        if name in mine and mine[name].numel() == 1:
            # Of a single number, unlike of many, PyTorch can be right by luck.
            allowed = max(allowed, torch.finfo(case.dtype).eps / 4)
        if not error <= peer.allowance * allowed:
            raise WrongResult(
                f"{who} on {work}: {name} has relative error {error:.1e}, PyTorch {allowed:.1e}; "
                f"at most {peer.allowance:g}× is allowed"
            )
        worst = max(worst, error / allowed if error else 0.0)
    return worst


def relative_errors(
    case: Case, inputs: Inputs, direction: str, candidates: list[dict[str, torch.Tensor]]
) -> list[dict[str, float]]:
    """‖result − reference‖ / ‖reference‖ of every named result of each candidate, the reference in fp64 by parts."""
    squares: dict[str, torch.Tensor] = {}
    differences: list[dict[str, torch.Tensor]] = [{} for _ in candidates]
    totals: dict[str, torch.Tensor] = {}

    def compare(name: str, expected: torch.Tensor, rows: slice) -> None:
        squares[name] = squares.get(name, 0) + expected.square().sum()
        for difference, candidate in zip(differences, candidates, strict=True):
            error = (candidate[name][rows].double() - expected).square().sum()
            difference[name] = difference.get(name, 0) + error

    for rows, part in case.parts(inputs) if case.parts else _by_rows(case, inputs):
        chunk = Call(case.reference, _widened(part), direction)
        chunk()
        for name, expected in _results(chunk.outputs, chunk.gradients).items():
            if name.removeprefix("gradient of ") in case.rows or name.startswith("output"):
                compare(name, expected, rows)
            else:  # a parameter's gradient needs all rows
                totals[name] = totals.get(name, 0) + expected
    for name, expected in totals.items():
        compare(name, expected, slice(None))
    return [{name: math.sqrt(d[name].item() / squares[name].item()) for name in squares} for d in differences]


def _results(outputs: tuple[torch.Tensor, ...], gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {f"output {i}": output for i, output in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def _by_rows(case: Case, inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
    """The inputs a few thousand rows at a time, the parameters with each."""
    for start in range(0, inputs.tensors[case.rows[0]].shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        tensors = {name: tensor[rows] if name in case.rows else tensor for name, tensor in inputs.tensors.items()}
        yield rows, Inputs(tensors, tuple(gradient[rows] for gradient in inputs.grad_outputs))


def _widened(inputs: Inputs) -> Inputs:
    """The inputs, floating-point ones in fp64."""

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double() if tensor.is_floating_point() else tensor

    tensors = {name: widen(tensor) for name, tensor in inputs.tensors.items()}
    return Inputs(tensors, tuple(map(widen, inputs.grad_outputs)))
