"""LayerNorm, alone and fused with the residual addition before it."""

from functools import cache

import pytest
import torch.nn.functional as F

from cramfast import kernels

from .cases import BOTH, DIRECTIONS, FORWARD, Case, Inputs, Sizes
from .peers import STANDARD, Peer


def layer_norm_case(sizes: Sizes) -> Case:
    """x (T, C): forward reads x and writes y; backward reads x and dy and writes dx."""
    t, c = sizes.tokens, sizes.hidden

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        return Inputs({"x": normal(t, c), "weight": normal(c), "bias": normal(c)}, (normal(t, c),))

    return Case(
        "layer_norm",
        f"{t}x{c}",
        sizes.dtype,
        make,
        eager=_eager,
        ours=kernels.layer_norm,
        reference=kernels.layer_norm_reference,
        rows=("x",),
        bytes={FORWARD: 2 * sizes.tensor_bytes(t, c), BOTH: 5 * sizes.tensor_bytes(t, c)},
    )


def add_layer_norm_case(sizes: Sizes) -> Case:
    """x, residual (T, C) → y, s, with gradients at both: 4 passes forward; backward s, dy, ds in, one gradient out."""
    t, c = sizes.tokens, sizes.hidden

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        tensors = {"x": normal(t, c), "residual": normal(t, c), "weight": normal(c), "bias": normal(c)}
        return Inputs(tensors, (normal(t, c), normal(t, c)))

    return Case(
        "add_layer_norm",
        f"{t}x{c}",
        sizes.dtype,
        make,
        eager=_add_eager,
        ours=kernels.add_layer_norm,
        reference=kernels.add_layer_norm_reference,
        rows=("x", "residual"),
        bytes={FORWARD: 4 * sizes.tensor_bytes(t, c), BOTH: 8 * sizes.tensor_bytes(t, c)},
    )


def _eager(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def _add_eager(x, residual, weight, bias):
    s = x + residual
    return F.layer_norm(s, weight.shape, weight, bias), s


def _liger(case: Case):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def _apex(case: Case):
    from apex.contrib.layer_norm import FastLayerNorm
    from torch.func import functional_call

    norm = cache(FastLayerNorm)
    return lambda x, weight, bias: functional_call(norm(x.shape[-1]), {"weight": weight, "bias": bias}, (x,))


# Liger sums weight gradients row after row, which in fp32 rounds more often than PyTorch's tree does.
LIGER = Peer("liger", _liger, ("liger_kernel",), "liger-kernel", allowance=4.0)
APEX = Peer("apex", _apex, ("apex", "fast_layer_norm"), "apex FastLayerNorm")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", (*STANDARD, LIGER, APEX), ids=lambda peer: peer.who)
def test_layer_norm(measured, peer, direction):
    measured(layer_norm_case, direction, peer)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", STANDARD, ids=lambda peer: peer.who)
def test_add_layer_norm(measured, peer, direction):
    measured(add_layer_norm_case, direction, peer)
