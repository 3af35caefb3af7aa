"""GEGLU in the products beside it, against the same one after the other: T tokens, C columns, I after the activation.

Backward is a work of its own, of a gradient and of what the forward pass saved, since weights' gradients are apart from
it in training too.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cramfast.kernels.geglu_product import product_and_geglu, product_and_geglu_backward
from cramfast.kernels.gelu import geglu, geglu_reference

from .cases import FORWARD, Case, Inputs, Sizes
from .peers import STANDARD, Peer


def forward_case(sizes: Sizes) -> Case:
    """x (T, C), weight (2I, C) → u (T, 2I), geglu(u) (T, I)."""
    t, c, i = sizes.tokens, sizes.hidden, sizes.intermediate
    shapes = {"x": (t, c), "weight": (2 * i, c)}
    return _case("geglu_product", sizes, shapes, partial(_forward, geglu_reference), _forward_ours, 2 * i, 3 * i)


def backward_case(sizes: Sizes) -> Case:
    """dz (T, C), weight (C, I), u (T, 2I) → the gradient of u (T, 2I), where z = geglu(u) weightᵀ."""
    t, c, i = sizes.tokens, sizes.hidden, sizes.intermediate
    shapes = {"dz": (t, c), "weight": (c, i), "u": (t, 2 * i)}
    return _case("geglu_product_backward", sizes, shapes, _backward, _backward_ours, i, 5 * i)


def _case(operator: str, sizes: Sizes, shapes: dict, plain, ours, columns: int, held: int) -> Case:
    """columns: of the product. held: elements in a row of what a peer holds beside its inputs."""
    t, c, i = sizes.tokens, sizes.hidden, sizes.intermediate
    return Case(
        operator,
        f"{t}x{c}x{2 * i}",
        sizes.dtype,
        partial(_make, sizes, shapes),
        eager=plain,
        ours=ours,
        reference=plain,
        rows=tuple(name for name in shapes if name != "weight"),
        part_of="geglu",
        flops={FORWARD: 2 * t * c * columns},
        scratch_bytes=4 * sizes.tensor_bytes(t, held),
    )


def _make(sizes: Sizes, shapes: dict[str, tuple[int, int]], seed: int) -> Inputs:
    """Random tensors, the weight such that products have about the size of their factors."""
    normal = sizes.normal(seed)
    inputs = {name: normal(*shape) for name, shape in shapes.items()}
    return Inputs(inputs | {"weight": inputs["weight"] * sizes.hidden**-0.5})


def _forward(activation, x, weight):
    u = F.linear(x, weight)
    return u, activation(u)


def _backward(dz, weight, u):
    dy = dz @ weight
    gate, value = u.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.gelu_backward(dy * value, gate), dy * F.gelu(gate)), dim=-1)


def _backward_apart(dz, weight, u):
    return torch.ops.cramfast.geglu_backward(dz @ weight, u, "none", False)[0]


def _forward_ours(x, weight):
    return product_and_geglu(x, weight, None, "none")


def _backward_ours(dz, weight, u):
    return product_and_geglu_backward(dz, weight, u, "none")[0]


# The products by cuBLAS, and this project's kernel for what is between them.
APART_FORWARD = Peer("cramfast-apart", lambda case: partial(_forward, geglu), host=False)
APART_BACKWARD = Peer("cramfast-apart", lambda case: _backward_apart, host=False)


@pytest.mark.parametrize("peer", (*STANDARD, APART_FORWARD), ids=lambda peer: peer.who)
def test_forward(measured, peer):
    measured(forward_case, FORWARD, peer)


@pytest.mark.parametrize("peer", (*STANDARD, APART_BACKWARD), ids=lambda peer: peer.who)
def test_backward(measured, peer):
    measured(backward_case, FORWARD, peer)
