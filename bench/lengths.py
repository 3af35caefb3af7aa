"""Lengths of the sequences in a batch: equal, uniform, or as real text has them.

Of real text only quantiles of the lengths are kept: the i-th of n + 1 is what a share of i/n of the sequences does not
exceed. They were counted in November 2026 with `cramfast.data`, its WordPiece of 32,768 entries (lower-cased, without
accents, ASCII only) trained on the whole of the 140 MB of English that DOCUMENTS comes from.
"""

import torch

# The pieces of at most 128 tokens, a [CLS] in front of each, that the documents layout cuts the training documents
# into: 248,281 pieces of 19,561 documents (English and Simple English Wikipedia, books before 1930), on average 122.8.
DOCUMENTS = (2, 44, 104, *[128] * 30)

# [CLS] premise [SEP] hypothesis [SEP] of 19,636 training pairs of MNLI, cut at 128 tokens as finetuning does (0.3 % are
# longer), on average 39.0.
# fmt: off
MNLI_PAIRS = (
    5, 14, 16, 18, 20, 21, 23, 24, 26, 27, 28, 30, 31, 32, 34, 35, 36,
    38, 39, 40, 42, 44, 45, 47, 49, 51, 53, 56, 59, 63, 68, 78, 128,
)

# [CLS] sentence [SEP] of the 67,349 training sentences of SST-2, on average 13.2.
SST2_SENTENCES = (
    3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8, 8, 9, 9, 10,
    11, 11, 12, 13, 14, 15, 16, 18, 19, 21, 23, 25, 27, 31, 37, 67,
)
# fmt: on


def equal(length: int, tokens: int) -> torch.Tensor:
    """As many sequences of `length` as `tokens` hold; where they hold none, one of them all. int64 (B,)."""
    return torch.full((max(1, tokens // length),), min(length, tokens))


def uniform(low: int, high: int, tokens: int) -> torch.Tensor:
    """Lengths uniform from `low` to `high`, int64 (B,), `tokens` in all: the last one is cut. The same every time."""
    return _cut(torch.randint(low, high + 1, (tokens // low + 1,), generator=_generator()), tokens)


def drawn(quantiles: tuple[int, ...], tokens: int) -> torch.Tensor:
    """Lengths of the distribution that has these quantiles, else as `uniform`."""
    knots = torch.tensor(quantiles, dtype=torch.float64)
    share = torch.rand(tokens // quantiles[0] + 1, dtype=torch.float64, generator=_generator())
    place = share * (len(knots) - 1)
    below = place.long()
    return _cut(knots[below].lerp(knots[below + 1], place - below).round().long(), tokens)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _cut(lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first lengths, `tokens` in all."""
    ends = lengths.cumsum(0)
    before = int((ends < tokens).sum())
    return torch.cat((ends[:before], torch.tensor([tokens]))).diff(prepend=torch.tensor([0]))
