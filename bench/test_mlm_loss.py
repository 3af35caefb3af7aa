"""The masked-language-modelling loss on predicted rows: decoder product and cross-entropy, M rows × C × V entries."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cramfast import kernels

from .cases import BOTH, DIRECTIONS, FORWARD, Case, Inputs, Sizes
from .peers import CRAMFAST, EAGER, STANDARD, Peer

# One token in four is predicted.
_PREDICTED = 4
_IGNORED = -100
# As the weights of a model start: the logits spread by about 0.5.
_WEIGHT_STD = 0.02
# How many tensors of logits in fp64 the reference holds at once.
_LOGITS_OF_THE_REFERENCE = 5
# Plain PyTorch holds logits and their gradient in 16 bits, and logits, log-softmax and their gradient in fp32.
_BYTES_OF_A_LOGIT = 2 * 2 + 3 * 4
# Vocabularies of BERT and ModernBERT beside this project's own: neither is a multiple of a tile.
_VOCABULARIES = (32_768, 30_522, 50_368)


def mlm_loss_case(sizes: Sizes, vocabulary: int | None = None, memory: str = "fast") -> Case:
    """hidden (M, C), weight (V, C) → the mean loss. Forward is one product of M × C × V, backward two more.

    The loss comes with one dimension, as results with rows do.
    """
    m, c, v = _count(sizes), sizes.hidden, vocabulary or sizes.vocabulary
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


def sparse_case(sizes: Sizes) -> Case:
    """hidden (T, C), positions (M,) of what is predicted, weight (V, C) → the mean loss. The work is that of M rows."""
    case = mlm_loss_case(sizes)

    def make(seed: int) -> Inputs:
        inputs, positions = _make(sizes, sizes.tokens, sizes.hidden, sizes.vocabulary, seed), _predicted(sizes, seed)
        tensors = {"labels": inputs.tensors["labels"][positions], "positions": positions}
        return replace(inputs, tensors=inputs.tensors | tensors)

    return replace(case, name=f"{case.name}-sparse", make=make)


def dense_case(sizes: Sizes) -> Case:
    """The loss of `sparse_case` by a head that runs on all tokens T, labels of those that are not predicted ignored."""
    t, c, v = sizes.tokens, sizes.hidden, sizes.vocabulary
    product = 2 * t * c * v

    def make(seed: int) -> Inputs:
        inputs, positions = _make(sizes, t, c, v, seed), _predicted(sizes, seed)
        labels = inputs.tensors["labels"]
        ignoring = torch.full_like(labels, _IGNORED).index_copy(0, positions, labels[positions])
        return replace(inputs, tensors=inputs.tensors | {"labels": ignoring})

    return Case(
        "mlm_loss",
        f"{t}x{c}x{v}-dense",
        sizes.dtype,
        make,
        eager=_eager,
        flops={FORWARD: product, BOTH: 3 * product},
        # What the graph holds, and once more what a call outside of it takes.
        scratch_bytes=2 * _BYTES_OF_A_LOGIT * t * v,
    )


def _predicted(sizes: Sizes, seed: int) -> torch.Tensor:
    """Those of the T tokens that are predicted, rising."""
    generator = torch.Generator(sizes.device).manual_seed(seed)
    order = torch.randperm(sizes.tokens, generator=generator, device=sizes.device)
    return order[: _count(sizes)].sort().values


def _count(sizes: Sizes) -> int:
    return max(1, sizes.tokens // _PREDICTED)


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
    # The inputs have the order of the arguments, which everybody names otherwise.
    return lambda **inputs: loss(*inputs.values()).reshape(1)


def _eager(hidden, weight, labels, positions=None):
    rows = hidden if positions is None else hidden.index_select(0, positions)
    return F.cross_entropy(F.linear(rows, weight).float(), labels, ignore_index=_IGNORED).reshape(1)


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


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", STANDARD, ids=lambda peer: peer.who)
def test_mlm_loss_of_rows_among_others(measured, peer, direction):
    measured(sparse_case, direction, peer)


def test_mlm_loss_of_all_tokens(measured):
    measured(dense_case, BOTH, EAGER)
