"""Choosing the tokens to predict, and hiding them: BERT's 80/10/10 masking with an exact count.

A sequence of n of the T tokens gets its share, count · n / T, rounded up or down so that the shares add up to count:
32 of every 128 at count = T/4. Which tokens of a sequence are predicted is random. Of them 80 % become the mask token,
10 % a random ordinary token, 10 % stay. Special tokens are never chosen while ordinary ones are left.

Randomness is a hash of (seed, step, token index, purpose), so the same arguments give the same masks on every device
and after every resume. Source: Devlin et al., BERT, 1810.04805; the hash is splitmix64's finaliser.
"""

import torch

from .dispatch import pick
from .sequences import sequence_positions

_RANK, _OFFSET, _ACTION, _TOKEN = range(4)
_IGNORED = -100
_MASK64 = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mask_tokens_reference(input_ids, cu_seqlens, count, *, mask_id, ordinary, seed, step=0, replace=(0.8, 0.1)):
    """The definition, on any device; see `mask_tokens`."""
    total = input_ids.numel()
    sequence, _ = sequence_positions(cu_seqlens, total)
    token = torch.arange(total, device=input_ids.device)

    def uniform(index, purpose):
        return _uniform(index, _key(seed, step, purpose))

    first, end = ordinary
    special = (input_ids < first) | (input_ids >= end)
    starts = cu_seqlens.long()
    # Sorting by sequence + score ranks each sequence's tokens at random; specials score highest and come last.
    score = torch.where(special, 1 - 2.0**-20, uniform(token, _RANK) * (1 - 2.0**-19))
    order = torch.argsort(sequence + score, stable=True)
    rank = torch.empty_like(order)
    rank[order] = token - starts[sequence[order]]
    # One random offset rounds every share; the sum telescopes to count.
    offset = (uniform(token[:1], _OFFSET) * total).long()
    share = ((starts * count + offset) // max(total, 1)).diff()
    # A sequence with fewer ordinary tokens than its share leaves places, which go to ordinary tokens elsewhere.
    preference = torch.where(special, 2, (rank >= share[sequence]).int())
    positions = torch.argsort(preference, stable=True)[:count].sort().values

    original = input_ids[positions].long()
    labels = torch.where(special[positions], _IGNORED, original)
    action = uniform(positions, _ACTION)
    random_id = first + (uniform(positions, _TOKEN) * (end - first)).long()
    masked_share, random_share = replace
    replacement = torch.where(action < masked_share + random_share, random_id, original)
    replacement = torch.where(action < masked_share, mask_id, replacement)
    replacement = torch.where(special[positions], original, replacement)
    return input_ids.index_copy(0, positions, replacement.to(input_ids.dtype)), positions, labels


def mask_tokens(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    count: int,
    *,
    mask_id: int,
    ordinary: tuple[int, int],
    seed: int,
    step: int = 0,
    replace: tuple[float, float] = (0.8, 0.1),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose exactly `count` of the T tokens to predict, and hide them.

    input_ids: int (T,); cu_seqlens: int32 (B+1,). ordinary: (first, end) of the ids that may be chosen and drawn; all
    others are special tokens. `replace` gives the shares that become `mask_id` and a random id; the rest stay.
    (seed, step) decide everything random. Returns (masked ids (T,), positions int64 (count,) rising, labels int64
    (count,)). Where fewer than `count` ordinary tokens exist the surplus positions hold special tokens, unchanged, with
    label −100. Raises ValueError for a count outside 0..T.
    """
    if not 0 <= count <= input_ids.numel():
        raise ValueError(f"mask_tokens: count {count} is outside 0..{input_ids.numel()}, the number of tokens")
    run = pick("mask_tokens", input_ids, mask_tokens_reference)
    return run(
        input_ids,
        cu_seqlens,
        count,
        mask_id=mask_id,
        ordinary=ordinary,
        seed=seed,
        step=step,
        replace=replace,
    )


def _key(*parts: int) -> int:
    """One signed 64-bit key from several integers, on the host."""
    key = 0
    for part in parts:
        key = (_finalise(key ^ (part & _MASK64)) + _INCREMENT) & _MASK64
    return key - (1 << 64) if key >> 63 else key


def _finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MULTIPLIERS[0]) & _MASK64
    z = ((z ^ (z >> 27)) * _MULTIPLIERS[1]) & _MASK64
    return z ^ (z >> 31)


def _uniform(index: torch.Tensor, key: int) -> torch.Tensor:
    """float64 in [0, 1) from int64 indices under one key: splitmix64 in wrapping signed arithmetic."""
    first, second = (multiplier - (1 << 64) for multiplier in _MULTIPLIERS)
    z = index * (_INCREMENT - (1 << 64)) + key
    z = (z ^ _shift(z, 30)) * first
    z = (z ^ _shift(z, 27)) * second
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64, which torch shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
