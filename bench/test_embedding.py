"""Token embedding (and position embedding, where there is one) fused with its LayerNorm."""

import pytest
import torch
import torch.nn.functional as F

from cramfast import kernels

from .cases import BOTH, DIRECTIONS, FORWARD, Case, Inputs, Sizes
from .peers import STANDARD

_MASK_ID = 4
_MASKED_SHARE = 0.2


def uniform_case(sizes: Sizes) -> Case:
    """Ids uniform over the vocabulary, no positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator)
    return _case(sizes, "", ids)


def text_case(sizes: Sizes) -> Case:
    """What pretraining sees: ids by Zipf's law, a fifth of them the mask token, and learned positions."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, sizes.vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(frequency, sizes.tokens, replacement=True, generator=generator)
    ids[torch.rand(sizes.tokens, generator=generator) < _MASKED_SHARE] = _MASK_ID
    return _case(sizes, "-text", ids, torch.arange(sizes.tokens) % sizes.positions)


def _case(sizes: Sizes, suffix: str, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> Case:
    """Forward reads the ids and one row of the vocabulary's table for each token, and writes y (T, C); the few
    positions are left out. Backward reads dy and those rows again, and writes the tables' dense gradients. Rows that
    tokens share come from the cache, so a copy's rate is no upper limit here.
    """
    t, c, v, p = sizes.tokens, sizes.hidden, sizes.vocabulary, sizes.positions
    indices = {"input_ids": ids} | ({} if position_ids is None else {"position_ids": position_ids})
    tables = {"weight": v} | ({} if position_ids is None else {"position_weight": p})

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        tensors = {name: index.to(sizes.device, copy=True) for name, index in indices.items()}
        tensors |= {name: normal(height, c) for name, height in tables.items()}
        tensors |= {"norm_weight": normal(c), "norm_bias": normal(c)}
        return Inputs(tensors, (normal(t, c),))

    read = sum(index.nbytes for index in indices.values()) + sizes.tensor_bytes(t, c)
    forward = read + sizes.tensor_bytes(t, c)
    return Case(
        "embed",
        f"{t}x{c}x{v}{suffix}",
        sizes.dtype,
        make,
        eager=_eager,
        ours=kernels.embed,
        reference=kernels.embed_reference,
        rows=tuple(indices),
        bytes={FORWARD: forward, BOTH: forward + read + sizes.tensor_bytes(t + sum(tables.values()), c)},
    )


def _eager(input_ids, weight, norm_weight, norm_bias, position_ids=None, position_weight=None):
    rows = F.embedding(input_ids, weight)
    if position_weight is not None:
        rows = rows + F.embedding(position_ids, position_weight)
    return F.layer_norm(rows, norm_weight.shape, norm_weight, norm_bias)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("peer", STANDARD, ids=lambda peer: peer.who)
@pytest.mark.parametrize("factory", (uniform_case, text_case), ids=("uniform", "text"))
def test_embed(measured, factory, peer, direction):
    measured(factory, direction, peer)
