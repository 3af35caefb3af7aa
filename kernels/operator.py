"""One operator, two entrances.

`torch.compile`, `torch.library.opcheck` and everything that intercepts operators see `torch.ops.cramfast.NAME`. Eager
code enters through an autograd function around the same kernels: the dispatcher's way through Python costs more host
time than the kernels take on the GPU.
"""

from collections.abc import Callable

import torch

from .dispatch import DTYPES, register

_library = torch.library.Library("cramfast", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def define(
    name: str, schema: str, implementation: Callable, save: Callable | None = None, gradients: Callable | None = None
):
    """`torch.ops.cramfast.NAME` with this signature in torch's schema language, on every device.

    `implementation` serves as its own shape function: on tensors without data it allocates, and `Launch` does nothing.
    A result that it leaves out (None) is an empty tensor here, since a schema has no optional results. With a gradient:
    save(ctx, inputs, output) keeps what gradients(ctx, *grads), one for each input, is computed from.
    """

    def complete(*arguments):
        results = [arguments[0].new_empty(0) if r is None else r for r in implementation(*arguments)]
        return results[0] if len(results) == 1 else tuple(results)

    _library.define(name + schema)
    _library.impl(name, complete, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cramfast::{name}", complete, lib=_library)
    if gradients is not None:
        torch.library.register_autograd(f"cramfast::{name}", gradients, setup_context=save, lib=_library)
    return getattr(torch.ops.cramfast, name).default


def expect_first_derivative(who: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated itself, as with create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{who} cannot be differentiated twice; CRAMFAST_KERNELS=reference can")


class Operator:
    """An operator with a gradient.

    forward(*inputs) returns a tuple of which the caller gets the first `outputs`; save(ctx, inputs, results) keeps what
    the backward pass needs; gradients(ctx, backward, *grads) returns one gradient for each input by calling `backward`:
    of the pair given, the plain function in eager code and the operator elsewhere.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable,
        save: Callable,
        backward: tuple[Callable, Callable],
        gradients: Callable,
        outputs: int = 1,
        dtypes: tuple[torch.dtype, ...] = DTYPES,
        capability: tuple[int, int] = (7, 5),
    ):
        backward, backward_op = backward
        self.forward, self.outputs = forward, outputs
        self.op = define(
            name,
            schema,
            forward,
            lambda ctx, inputs, output: save(ctx, inputs, _tuple(output)),
            lambda ctx, *grads: gradients(ctx, lambda *arguments: _tuple(backward_op(*arguments)), *grads),
        )
        function = _autograd_function(name, forward, save, backward, gradients, outputs)
        # Past the Python around it, which serves functorch alone.
        self.apply = super(torch.autograd.Function, function).apply
        register(name, self, dtypes, capability)

    def __call__(self, *inputs):
        if type(inputs[0]) not in _PLAIN or torch.compiler.is_compiling():
            results = _tuple(self.op(*inputs))
        elif torch.is_grad_enabled():
            return self.apply(*inputs)
        else:
            results = self.forward(*inputs)
        return results[0] if self.outputs == 1 else results[: self.outputs]


def _tuple(results) -> tuple:
    """What an operator of torch returns, as a tuple: it unpacks those of one."""
    return (results,) if isinstance(results, torch.Tensor) else results


def _autograd_function(name, forward, save, backward, gradients, outputs) -> type[torch.autograd.Function]:
    def forward_and_save(ctx, *inputs):
        results = forward(*inputs)
        save(ctx, inputs, results)
        return results[0] if outputs == 1 else results[:outputs]

    def load_and_backward(ctx, *grads):
        expect_first_derivative(f"{name}: its kernels")
        return gradients(ctx, backward, *grads)

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(load_and_backward)}
    return type(name, (torch.autograd.Function,), methods)
