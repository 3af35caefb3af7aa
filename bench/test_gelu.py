"""GELU and its gated form."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cramfast import kernels

from .cases import BOTH, DIRECTIONS, FORWARD, Case, Inputs, Sizes
from .peers import STANDARD, Outputs, Peer, Tensors


def gelu_case(sizes: Sizes) -> Case:
    """x (T, 2I), the width of a feed-forward layer: forward x in, y out; backward x and dy in, dx out."""
    t, width = sizes.tokens, 2 * sizes.intermediate
    passes = sizes.tensor_bytes(t, width)
    return Case(
        "gelu",
        f"{t}x{width}",
        sizes.dtype,
        partial(_make, sizes, width),
        eager=_gelu_eager,
        ours=kernels.gelu,
        reference=kernels.gelu_reference,
        rows=("x",),
        bytes={FORWARD: 2 * passes, BOTH: 5 * passes},
    )


def geglu_case(sizes: Sizes, approximate: str = "none") -> Case:
    """x (T, 2I) → (T, I): forward reads 2I and writes I a token; backward reads 2I + I and writes 2I."""
    t, i = sizes.tokens, sizes.intermediate
    passes = sizes.tensor_bytes(t, i)
    return Case(
        "geglu",
        f"{t}x{2 * i}" + ("-tanh" if approximate == "tanh" else ""),
        sizes.dtype,
        partial(_make, sizes, i),
        eager=lambda x: _geglu_eager(x, approximate),
        ours=lambda x: kernels.geglu(x, approximate),
        reference=lambda x: kernels.geglu_reference(x, approximate),
        rows=("x",),
        bytes={FORWARD: 3 * passes, BOTH: 8 * passes},
    )


def _make(sizes: Sizes, width: int, seed: int) -> Inputs:
    """x (T, 2I) and the gradient of a result (T, width)."""
    normal = sizes.normal(seed)
    return Inputs({"x": normal(sizes.tokens, 2 * sizes.intermediate)}, (normal(sizes.tokens, width),))


def _gelu_eager(x):
    return F.gelu(x)


def _geglu_eager(x, approximate):
    gate, value = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * value


def _liger(case: Case):
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return lambda a, b: LigerGELUMulFunction.apply(a, b)


def _halves(inputs: Inputs) -> Inputs:
    """Liger takes the halves apart, as two tensors."""
    a, b = (half.detach().contiguous() for half in inputs.tensors["x"].chunk(2, dim=-1))
    return Inputs({"a": a, "b": b}, inputs.grad_outputs)


def _joined(inputs: Inputs, outputs: Outputs, gradients: Tensors) -> tuple[Outputs, Tensors]:
    return outputs, {"x": torch.cat((gradients["a"], gradients["b"]), -1)} if gradients else {}


# Its backward writes the gradients over a and b. Left alone they would shrink towards zero from call to call.
LIGER = Peer(
    "liger",
    _liger,
    ("liger_kernel",),
    "liger-kernel",
    prepare=_halves,
    restore=_joined,
    overwrites=("a", "b"),
)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", STANDARD, ids=lambda peer: peer.who)
def test_gelu(measured, peer, direction):
    measured(gelu_case, direction, peer)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", STANDARD, ids=lambda peer: peer.who)
def test_geglu(measured, peer, direction):
    measured(geglu_case, direction, peer)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", (*STANDARD, LIGER), ids=lambda peer: peer.who)
def test_geglu_tanh(measured, peer, direction):
    measured(partial(geglu_case, approximate="tanh"), direction, peer)
