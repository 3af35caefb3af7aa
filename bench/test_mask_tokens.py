"""Choosing the tokens to predict and hiding them: B sequences of S tokens, a quarter of them predicted."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from cramfast import kernels

from .cases import FORWARD, Case, Inputs, Sizes
from .peers import CRAMFAST, EAGER

_RATE = 0.25
_MASK_ID = 4
# Below are special tokens; each sequence begins with one.
_FIRST = 5
_CLS = 2
_REPLACE = (0.8, 0.1)


def mask_tokens_case(sizes: Sizes) -> Case:
    """ids (T,) → ids with some of them hidden (T,), positions (M,), labels (M,): each is read or written once."""
    length = sizes.positions
    sequences = max(1, sizes.tokens // length)
    total, count = sequences * length, round(_RATE * sequences * length)
    settings = {"mask_id": _MASK_ID, "ordinary": (_FIRST, sizes.vocabulary), "seed": 0}

    def make(seed: int) -> Inputs:
        generator = torch.Generator(sizes.device).manual_seed(seed)
        ids = torch.randint(_FIRST, sizes.vocabulary, (sequences, length), generator=generator, device=sizes.device)
        ids[:, 0] = _CLS
        ends = torch.arange(0, total + 1, length, dtype=torch.int32, device=sizes.device)
        return Inputs({"input_ids": ids.flatten(), "cu_seqlens": ends})

    return Case(
        "mask_tokens",
        f"{sequences}x{length}",
        torch.int64,
        make,
        eager=partial(_eager, length=length, vocabulary=sizes.vocabulary),
        ours=partial(kernels.mask_tokens, count=count, **settings),
        reference=partial(kernels.mask_tokens_reference, count=count, **settings),
        rows=("input_ids",),
        parts=_whole,
        bytes={FORWARD: (2 * total + 2 * count) * torch.int64.itemsize},
        exact=True,
    )


def _whole(inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
    """All sequences at once, for their shares depend on what the others got."""
    yield slice(None), inputs


def _eager(input_ids, cu_seqlens, length, vocabulary):
    """Sequences of one length, special tokens like any other: the same number of each is predicted, first in the order
    of random numbers."""
    ids = input_ids.view(-1, length)
    count = round(_RATE * length)
    masked, drawn = (round(share * count) for share in _REPLACE)
    places = torch.rand(ids.shape, device=ids.device).argsort(dim=1)[:, :count]
    labels = ids.gather(1, places)
    random = torch.randint(_FIRST, vocabulary, (ids.shape[0], drawn), dtype=ids.dtype, device=ids.device)
    hidden = ids.scatter(1, places[:, :masked], _MASK_ID).scatter_(1, places[:, masked : masked + drawn], random)
    positions = places + torch.arange(0, ids.numel(), length, device=ids.device)[:, None]
    return hidden.flatten(), positions.flatten(), labels.flatten()


@pytest.mark.parametrize("peer", (CRAMFAST, EAGER), ids=lambda peer: peer.who)
def test_mask_tokens(measured, peer):
    measured(mask_tokens_case, FORWARD, peer)
