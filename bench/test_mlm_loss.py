"""The masked-language-modelling loss on predicted rows: decoder product and cross-entropy, M rows × C × V entries."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cramfast import kernels

from .cases import BOTH, DIRECTIONS, FORWARD, Case, Inputs, Sizes
from .peers import CRAMFAST, STANDARD, Peer

# One token in four is predicted.
_PREDICTED = 4
# As the weights of a model start: the logits spread by about 0.5.
_WEIGHT_STD = 0.02
# How many tensors of logits in fp64 the reference holds at once.
_LOGITS_OF_THE_REFERENCE = 5
# Vocabularies of BERT and ModernBERT beside this project's own: neither is a multiple of a tile.
_VOCABULARIES = (32_768, 30_522, 50_368)


def mlm_loss_case(sizes: Sizes, vocabulary: int | None = None, memory: str = "fast") -> Case:
    """hidden (M, C), weight (V, C) → the mean loss. Forward is one product of M × C × V, backward two more.

    The loss comes with one dimension, as results with rows do.
    """
    m, c, v = max(1, sizes.tokens // _PREDICTED), sizes.hidden, vocabulary or sizes.vocabulary
    product = 2 * m * c * v
    return Case(
        "mlm_loss",
        f"{m}x{c}x{v}" + ("" if memory == "fast" else f"-{memory}"),
        sizes.dtype,
        partial(_make, sizes, m, c, v),
        eager=_eager,
        ours=_with_a_dimension(partial(kernels.mlm_loss, memory=memory)),
        reference=_with_a_dimension(kernels.mlm_loss_reference),
        rows=("hidden", "labels"),
        parts=_whole,
        flops={FORWARD: product, BOTH: 3 * product},
        scratch_bytes=_LOGITS_OF_THE_REFERENCE * 8 * m * v,
    )


def _make(sizes: Sizes, m: int, c: int, v: int, seed: int) -> Inputs:
    normal = sizes.normal(seed)
    generator = torch.Generator(sizes.device).manual_seed(seed)
    tensors = {
        "hidden": normal(m, c),
        "weight": normal(v, c) * _WEIGHT_STD,
        "labels": torch.randint(v, (m,), generator=generator, device=sizes.device),
    }
    return Inputs(tensors, (torch.ones(1, device=sizes.device),))


def _whole(inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
    """All rows at once, for a mean is over all of them."""
    yield slice(None), inputs


def _with_a_dimension(loss: Callable) -> Callable:
    return lambda hidden, weight, labels: loss(hidden, weight, labels).reshape(1)


def _eager(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels).reshape(1)


def _liger(case: Case) -> Callable:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return _with_a_dimension(lambda *inputs: LigerFusedLinearCrossEntropyFunction.apply(*inputs)[0])


def _cut(case: Case) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return _with_a_dimension(linear_cross_entropy)


# Both add the weight's gradient up in 16 bits, and cut cross-entropy leaves out what is too small to matter there.
_ROUGH = 30.0
LIGER = Peer("liger", _liger, ("liger_kernel",), "liger-kernel", allowance=_ROUGH, host=False)
CUT = Peer("cut-cross-entropy", _cut, ("cut_cross_entropy",), "cut-cross-entropy", allowance=_ROUGH, host=False)
PEERS = (*STANDARD, LIGER, CUT)
_ROWS = [(vocabulary, peer) for vocabulary in _VOCABULARIES for peer in PEERS]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("vocabulary, peer", _ROWS, ids=[f"{v}-{peer.who}" for v, peer in _ROWS])
def test_mlm_loss(measured, vocabulary, peer, direction):
    measured(partial(mlm_loss_case, vocabulary=vocabulary), direction, peer)


@pytest.mark.parametrize("vocabulary", _VOCABULARIES)
def test_mlm_loss_in_little_memory(measured, vocabulary):
    measured(partial(mlm_loss_case, vocabulary=vocabulary, memory="low"), BOTH, CRAMFAST)
