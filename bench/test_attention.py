"""Attention inside each sequence of an unpadded batch, against what PyTorch and flash-attn have for it.

B sequences, S their length where it is equal or padded, H heads, D the head size.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cramfast import kernels
from cramfast.model import rotary_tables

from . import lengths
from .cases import BOTH, DIRECTIONS, FORWARD, Case, Inputs, Sizes
from .peers import CRAMFAST, Outputs, Peer, Tensors

_HEAD_SIZE = 64
_ROPE_THETA = 10_000.0
# Two sequences of 1024 tokens have 200 MB of scores in fp64, and backward holds several tensors like that.
_PART_TOKENS = 2048
# The memory-efficient kernel copies a mask whose rows are no multiple of this.
_PADDED_TO = 8

_EQUAL = {f"all-{length}": (partial(lengths.equal, length), length) for length in (64, 128, 256, 512, 1024)}
_RAGGED = {
    "ragged-16-128": (partial(lengths.uniform, 16, 128), 128),
    "ragged-32-512": (partial(lengths.uniform, 32, 512), 512),
    "documents": (partial(lengths.drawn, lengths.DOCUMENTS), lengths.DOCUMENTS[-1]),
    "mnli-pairs": (partial(lengths.drawn, lengths.MNLI_PAIRS), lengths.MNLI_PAIRS[-1]),
}
_BATCHES = _EQUAL | _RAGGED
_ROTARY = ("all-128", "all-1024", "ragged-16-128")
_DROPPED = ("all-128", "all-512", "ragged-16-128", "ragged-32-512")
# BERT's.
_DROPOUT = 0.1


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention over these sequences: cu_seqlens int32 (B+1,), none longer than max_seqlen. dropout: of its weights."""

    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    dropout: float = 0.0


def attention_case(sizes: Sizes, name: str, rotary: bool = False, dropout: float = 0.0) -> AttentionCase:
    """qkv (T, 3, H, D) → (T, H, D). Forward reads qkv and writes the output; backward reads qkv and the output's
    gradient and writes that of qkv. Forward is two matrix products over a sequence, backward five.

    With dropout the reference is what chance makes on average, from which each draw of PyTorch's is as far away as of
    anyone who drops as much: the guard then sees gross faults, while the kernels' tests know the very weights.
    """
    draw, longest = _BATCHES[name]
    heads, max_seqlen = sizes.hidden // _HEAD_SIZE, min(longest, sizes.tokens)
    drawn = draw(sizes.tokens)
    total, attended = int(drawn.sum()), int(drawn.square().sum())
    cu_seqlens = F.pad(drawn.cumsum(0), (1, 0)).to(sizes.device, torch.int32)
    given, chance = {"max_seqlen": max_seqlen}, {"dropout_p": dropout}
    if rotary:
        tables = rotary_tables(max_seqlen, _HEAD_SIZE, _ROPE_THETA)
        given |= {name: table.to(sizes.device) for name, table in zip(("cos", "sin"), tables, strict=True)}

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        tensors = {"qkv": normal(total, 3, heads, _HEAD_SIZE), "cu_seqlens": cu_seqlens.clone()}
        return Inputs(tensors, (normal(total, heads, _HEAD_SIZE),))

    row, product = sizes.tensor_bytes(total, heads, _HEAD_SIZE), 2 * heads * _HEAD_SIZE * attended
    return AttentionCase(
        "varlen_attention",
        _case_name(name + "-rotary" * rotary + "-dropout" * (dropout > 0), sizes.tokens),
        sizes.dtype,
        make,
        eager=partial(kernels.varlen_attention_reference, **given, **chance),
        ours=partial(kernels.varlen_attention, **given, **chance),
        reference=partial(kernels.varlen_attention_reference, **given),
        rows=("qkv",),
        parts=_whole_sequences,
        bytes={FORWARD: 4 * row, BOTH: 11 * row},
        flops={FORWARD: 2 * product, BOTH: 7 * product},
        handed_over=_handed_over(sizes, drawn, max_seqlen),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        dropout=dropout,
    )


def _handed_over(sizes: Sizes, counts: torch.Tensor, max_seqlen: int) -> str | None:
    """Who serves sequences of these lengths if they are too long for the kernels."""
    if max_seqlen <= kernels.LONGEST:
        return None
    dense = bool((counts == max_seqlen).all())
    return kernels.choose_long(sizes.device, sizes.dtype, _HEAD_SIZE, dense=dense).backend


def _case_name(batch: str, tokens: int) -> str:
    """The batch's own name at the size that results are compared at; elsewhere the tokens are part of it."""
    return batch + ("" if tokens == Sizes.tokens else f"@{tokens}")


def _whole_sequences(inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
    """The inputs a few sequences at a time."""
    qkv, cu_seqlens = inputs.tensors["qkv"], inputs.tensors["cu_seqlens"]
    boundaries = cu_seqlens.tolist()
    first = 0
    while first < len(boundaries) - 1:
        last = max(first + 1, bisect_right(boundaries, boundaries[first] + _PART_TOKENS) - 1)
        rows = slice(boundaries[first], boundaries[last])
        tensors = {"qkv": qkv[rows], "cu_seqlens": cu_seqlens[first : last + 1] - boundaries[first]}
        yield rows, Inputs(tensors, tuple(gradient[rows] for gradient in inputs.grad_outputs))
        first = last


@dataclass(frozen=True)
class Layout:
    """How a peer takes q, k, v and the gradient of its output: three tensors, each by `lay` from (T, H, D).

    `flat` leads back to (T, H, D). Both are given cu_seqlens too; `beside` makes of it what else the peer is given.
    """

    lay: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    flat: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    beside: Callable[[torch.Tensor], Tensors] = lambda cu_seqlens: {}

    def prepare(self, inputs: Inputs) -> Inputs:
        cu_seqlens = inputs.tensors["cu_seqlens"]
        parts = zip("qkv", inputs.tensors["qkv"].detach().unbind(1), strict=True)
        tensors = {name: self.lay(part.contiguous(), cu_seqlens) for name, part in parts}
        gradients = tuple(self.lay(gradient, cu_seqlens) for gradient in inputs.grad_outputs)
        return Inputs(tensors | self.beside(cu_seqlens), gradients)

    def restore(self, inputs: Inputs, outputs: Outputs, gradients: Tensors) -> tuple[Outputs, Tensors]:
        cu_seqlens = inputs.tensors["cu_seqlens"]
        outputs = tuple(self.flat(output, cu_seqlens) for output in outputs)
        if gradients:
            gradients = {"qkv": torch.stack([self.flat(gradients[name], cu_seqlens) for name in "qkv"], dim=1)}
        return outputs, gradients


def _batched(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as (B, S, H, D), of sequences of equal length."""
    return x.unflatten(0, (cu_seqlens.numel() - 1, -1))


def _pad(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(T, H, D) → (B, H, S, D), laid out as (B, S, H, D). What follows a sequence, not zeros, is its padding."""
    token = cu_seqlens[:-1, None] + torch.arange(_padded_length(cu_seqlens), device=x.device)
    return x[token.clamp(max=len(x) - 1)].transpose(1, 2)


def _padded_length(cu_seqlens: torch.Tensor) -> int:
    return -(-int(cu_seqlens.diff().max()) // _PADDED_TO) * _PADDED_TO


def _real(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Which places of a padded batch hold a token of the sequence, bool (B, S)."""
    return torch.arange(_padded_length(cu_seqlens), device=cu_seqlens.device) < cu_seqlens.diff()[:, None]


class PaddedLayout(Layout):
    """(B, H, S, D), S the longest length; beside it the mask of the real keys, bool (B, 1, 1, S)."""

    def prepare(self, inputs: Inputs) -> Inputs:
        padded = super().prepare(inputs)
        real = _real(inputs.tensors["cu_seqlens"])[:, None, :, None]
        # Queries in the padding have to leave no trace in the gradients of keys and values.
        return Inputs(padded.tensors, tuple(gradient * real for gradient in padded.grad_outputs))


_FLAT = Layout(lambda x, _: x, lambda y, _: y, lambda cu_seqlens: {"cu_seqlens": cu_seqlens})
_BATCH = Layout(_batched, lambda y, _: y.flatten(0, 1))
_BATCH_OF_HEADS = Layout(lambda x, cu: _batched(x, cu).transpose(1, 2), lambda y, _: y.transpose(1, 2).flatten(0, 1))
_PADDED = PaddedLayout(
    _pad, lambda y, cu: y.transpose(1, 2)[_real(cu)], lambda cu: {"attn_mask": _real(cu)[:, None, None, :]}
)
_ONE_OF_HEADS = Layout(lambda x, _: x.transpose(0, 1)[None], lambda y, _: y[0].transpose(0, 1))


def _sdpa_by(backend: SDPBackend) -> Callable[[AttentionCase], Callable]:
    def load(case):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=case.dropout)

        return attend

    return load


def _sdpa_padded(case: AttentionCase) -> Callable:
    return lambda q, k, v, attn_mask: F.scaled_dot_product_attention(q, k, v, attn_mask, case.dropout)


def _varlen_attn(case: AttentionCase) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    longest = case.max_seqlen
    return lambda q, k, v, cu_seqlens: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def _flex(case: AttentionCase) -> Callable:
    """All sequences as one, of which a token sees its own document; which blocks that touches is found out before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counts = case.cu_seqlens.diff()
    document = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def same_document(batch, head, query, key):
        return document[query] == document[key]

    mask = create_block_mask(same_document, None, None, len(document), len(document), device=document.device)
    torch._dynamo.reset()  # what earlier cases compiled would count towards the recompile limit
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def _flash(case: AttentionCase) -> Callable:
    from flash_attn import flash_attn_varlen_func

    longest = (case.max_seqlen,) * 2
    return lambda q, k, v, cu_seqlens: flash_attn_varlen_func(q, k, v, *(cu_seqlens,) * 2, *longest, case.dropout)


def _flash_4(case: AttentionCase) -> Callable:
    from flash_attn.cute import flash_attn_varlen_func

    longest = {f"max_seqlen_{x}": case.max_seqlen for x in "qk"}

    def attend(q, k, v, cu_seqlens):
        return _first(flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **longest))

    return attend


def _flash_4_equal(case: AttentionCase) -> Callable:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _first(result) -> torch.Tensor:
    """The output without the log-sum-exp, which flash-attn-4 returns beside it."""
    return result[0] if isinstance(result, tuple) else result


def _peer(who: str, load: Callable, layout: Layout, **settings) -> Peer:
    return Peer(who, load, prepare=layout.prepare, restore=layout.restore, **settings)


_VARLEN = _peer("varlen-attn", _varlen_attn, _FLAT)
_FLASH_2 = _peer("flash-attn", _flash, _FLAT, modules=("flash_attn",), package="flash-attn")
_FLASH_4 = {"modules": ("flash_attn",), "package": "flash-attn-4"}
PEERS_OF_EQUAL = (
    CRAMFAST,
    _peer("sdpa-cudnn", _sdpa_by(SDPBackend.CUDNN_ATTENTION), _BATCH_OF_HEADS),
    _peer("sdpa-flash", _sdpa_by(SDPBackend.FLASH_ATTENTION), _BATCH_OF_HEADS),
    _peer("sdpa-efficient", _sdpa_by(SDPBackend.EFFICIENT_ATTENTION), _BATCH_OF_HEADS),
    _VARLEN,
    _FLASH_2,
    _peer("flash-attn-4", _flash_4_equal, _BATCH, **_FLASH_4),
)
PEERS_OF_RAGGED = (
    CRAMFAST,
    _peer("sdpa-padded", _sdpa_padded, _PADDED),
    _VARLEN,
    # A mask of blocks is for batches that need a mask; each takes ten seconds to compile.
    _peer("flex-attention", _flex, _ONE_OF_HEADS, host=False),
    _FLASH_2,
    _peer("flash-attn-4", _flash_4, _FLAT, **_FLASH_4),
)
# The others have no dropout.
_DROPPING = ("cramfast", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-padded", "flash-attn")
_ROWS = [(name, peer) for name in _EQUAL for peer in PEERS_OF_EQUAL]
_ROWS += [(name, peer) for name in _RAGGED for peer in PEERS_OF_RAGGED]
_ROWS_OF_DROPOUT = [(name, peer) for name, peer in _ROWS if name in _DROPPED and peer.who in _DROPPING]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name, peer", _ROWS, ids=[f"{name}-{peer.who}" for name, peer in _ROWS])
def test_varlen_attention(measured, name, peer, direction):
    measured(partial(attention_case, name=name), direction, peer)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", _ROTARY)
def test_rotary(measured, name, direction):
    measured(partial(attention_case, name=name, rotary=True), direction, CRAMFAST)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name, peer", _ROWS_OF_DROPOUT, ids=[f"{name}-{peer.who}" for name, peer in _ROWS_OF_DROPOUT])
def test_dropout(measured, name, peer, direction):
    measured(partial(attention_case, name=name, dropout=_DROPOUT), direction, peer)
