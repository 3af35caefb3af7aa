"""Tokens to measure on, where what they say makes no difference."""

import torch

from .tokenizer import SpecialIds


def special_ids_of(vocab_size: int) -> SpecialIds:
    """Special ids of a vocabulary that has no tokenizer: the first five, in the order that a trained one gives them."""
    return SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, vocab_size))


def random_words(special: SpecialIds, count: int) -> torch.Tensor:
    """int64 (count,) ordinary ids by Zipf's law, which is how often an embedding's rows are met in text; always the
    same, on the CPU."""
    first, end = special.ordinary
    frequency = 1 / torch.arange(1, end - first + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return first + torch.multinomial(frequency, count, replacement=True, generator=generator)
