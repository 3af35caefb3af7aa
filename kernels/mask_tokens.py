"""Choosing the tokens to predict, and hiding them: BERT's 80/10/10 masking with an exact count.

A sequence of n of the T tokens gets its share, count · n / T, rounded up or down so that the shares add up to count:
32 of every 128 at count = T/4. Those before it have floor((begin · count + offset) / T) together, `begin` being its
first token and `offset` a random number below T, so where its positions stand among all is known without a look at
the others: one kernel does everything, a program to a sequence, and no program waits for another.

Each token has a random score of 30 bits, special tokens all have one that is higher; the share goes to the lowest
scores, of equal ones to the first. A program finds the limit by bisection, which ends as soon as it parts the right
number from the rest: about log2(n) passes over a sequence that is in the cache, 30 where equal scores meet the limit.
The pieces of a word have one score, if whole words are asked for, and so come together.

What a sequence cannot place on ordinary tokens goes to special ones of its own. To find it an ordinary token elsewhere
would take a second kernel, after all programs have counted, for sequences that are rare: those with fewer ordinary
tokens than their share.

Random numbers are splitmix64's, a hash of a key and a counter: the key comes from (seed, step), the counter from a
token's index in the batch. So the same arguments give the same masks on every device and after every resume, and all
of it is integer arithmetic. Sources: Devlin et al., BERT, 1810.04805; Steele et al., "Fast splittable pseudorandom
number generators", 2014.
"""

import functools

import torch

from .arguments import checking, expect_device, expect_indices, expect_int, say
from .attention_arguments import check_sequences, expect_sequences
from .dispatch import pick, register
from .language import tl, triton
from .launch import Launch, catalogue, contiguous, dtype_of
from .operator import define
from .sequences import sequence_positions

_NAME = "mask_tokens"
_IGNORED = -100
# Scores are 30 bits, so that this one and the next are 32-bit integers.
_SPECIAL = 1 << 30
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mask_tokens_reference(
    input_ids, cu_seqlens, count, *, mask_id, ordinary, seed, step=0, replace=(0.8, 0.1), continues=None
):
    """The definition, on any device; see `mask_tokens`."""
    total, (first, end) = input_ids.numel(), ordinary
    sequence, place = sequence_positions(cu_seqlens, total)
    starts, token = cu_seqlens.long(), torch.arange(total, device=input_ids.device)
    special = (input_ids < first) | (input_ids >= end)
    key = _key(seed, step, input_ids.device)

    word = token
    if continues is not None:
        words = (~continues[input_ids] | (place == 0)).cumsum(0)
        word = starts[sequence] + words - words[starts[sequence]]  # a number that no other sequence has
    score = torch.where(special, _SPECIAL, _shift(_random_reference(key, 2 * word + 1), 34))
    rank = torch.empty_like(token)
    rank[torch.argsort(sequence * 2**31 + score, stable=True)] = place
    offset = _scaled_reference(_shift(_random_reference(key, 0), 32), total)
    share = ((starts * count + offset) // max(total, 1)).diff()
    # The chosen ones first, each kind in its order: a shape that no value decides.
    positions = torch.argsort((rank >= share[sequence]).int(), stable=True)[:count]

    original, special = input_ids[positions].long(), special[positions]
    bits = _random_reference(key, 2 * positions + 2)
    masked_below, replaced_below = _thresholds(replace)
    action = _shift(bits, 32)
    replacement = torch.where(
        action < replaced_below, first + _scaled_reference(bits & 0xFFFFFFFF, end - first), original
    )
    replacement = torch.where(action < masked_below, mask_id, replacement)
    replacement = torch.where(special, original, replacement)
    labels = torch.where(special, _IGNORED, original)
    return input_ids.index_copy(0, positions, replacement.to(input_ids.dtype)), positions, labels


@triton.jit
def _random(key, counter):
    """64 random bits, unsigned, for each `counter`; a key is such bits itself."""
    z = key + counter * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _scaled(bits, size):
    """Random numbers of 32 bits as ones from 0 to `size` - 1, int64."""
    return ((bits * size.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _look(ids_ptr, continues_ptr, key, token, begin, stop, words, first, end, vocabulary, SPECIAL: tl.constexpr):
    """(ids, scores, words) of some tokens of the sequence from `begin` to `stop`; past it the score is the highest.
    words: how many words began before these tokens, returned with those that begin among them."""
    inside = token < stop
    ids = tl.load(ids_ptr + token, mask=inside, other=0).to(tl.int64)
    counter = token
    if continues_ptr is not None:
        known = inside & (token > begin) & (ids >= 0) & (ids < vocabulary)
        opens = 1 - tl.load(continues_ptr + ids, mask=known, other=0).to(tl.int32)
        # The words of a sequence are numbered like its first tokens, so that no other sequence has their numbers.
        counter = begin + words + tl.cumsum(opens, 0) - 1
        words += tl.sum(opens, 0)
    score = (_random(key, 2 * counter.to(tl.uint64) + 1) >> 34).to(tl.int32)
    score = tl.where((ids < first) | (ids >= end), SPECIAL, score)
    return ids, tl.where(inside, score, SPECIAL + 1), words


@triton.jit
def _limit(
    ids_ptr,
    continues_ptr,
    key,
    begin,
    stop,
    share,
    first,
    end,
    vocabulary,
    SPECIAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """The score up to which tokens are chosen, and how many have a lower one, at most `share`. If that is not all of
    it, tokens with this very score make up for the rest."""
    low, below, high = 0, 0, SPECIAL + 1
    while (below != share) & (high - low > 1):
        middle = low + (high - low) // 2
        found, words = 0, 0
        for tile in range(begin, stop, TILE):
            token = tile + tl.arange(0, TILE)
            _, score, words = _look(
                ids_ptr, continues_ptr, key, token, begin, stop, words, first, end, vocabulary, SPECIAL
            )
            found += tl.sum((score < middle).to(tl.int32), 0)
        fits = found <= share
        low = tl.where(fits, middle, low)
        below = tl.where(fits, found, below)
        high = tl.where(fits, high, middle)
    return low, below


@triton.jit
def _mask_kernel(
    ids_ptr,  # (total,)
    cu_ptr,  # (B + 1,)
    step_ptr,  # (1,) or None: in place of `step`
    continues_ptr,  # (vocabulary,) or None
    masked_ptr,  # (total,)
    positions_ptr,  # (count,)
    labels_ptr,  # (count,)
    total,
    count,
    seed,
    step,
    mask_id,
    first,
    end,
    masked_below,
    replaced_below,
    vocabulary,
    SPECIAL: tl.constexpr,
    IGNORED: tl.constexpr,
    TILE: tl.constexpr,
):
    begin = tl.load(cu_ptr + tl.program_id(0))
    stop = tl.load(cu_ptr + tl.program_id(0) + 1)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    key = _random(_random(seed.to(tl.uint64), 1), step.to(tl.uint64))
    offset = _scaled(_random(key, 0) >> 32, total)
    place = (begin.to(tl.int64) * count + offset) // total
    share = ((stop.to(tl.int64) * count + offset) // total - place).to(tl.int32)
    limit, below = _limit(ids_ptr, continues_ptr, key, begin, stop, share, first, end, vocabulary, SPECIAL, TILE)
    left, words = share - below, 0
    for tile in range(begin, stop, TILE):
        token = tile + tl.arange(0, TILE)
        ids, score, words = _look(
            ids_ptr, continues_ptr, key, token, begin, stop, words, first, end, vocabulary, SPECIAL
        )
        equal = (score == limit).to(tl.int32)
        chosen = (score < limit) | ((score == limit) & (tl.cumsum(equal, 0) <= left))
        left -= tl.sum(equal, 0)
        slot = place + tl.cumsum(chosen.to(tl.int32), 0) - 1
        place += tl.sum(chosen.to(tl.int32), 0)

        bits = _random(key, 2 * token.to(tl.uint64) + 2)
        action = (bits >> 32).to(tl.int64)
        drawn = first + _scaled(bits & 0xFFFFFFFF, end - first)
        replacement = tl.where(action < masked_below, mask_id, tl.where(action < replaced_below, drawn, ids))
        hidden = chosen & (score < SPECIAL)
        tl.store(masked_ptr + token, tl.where(hidden, replacement, ids), mask=token < stop)
        tl.store(positions_ptr + slot, token.to(tl.int64), mask=chosen)
        tl.store(labels_ptr + slot, tl.where(hidden, ids, IGNORED), mask=chosen)


# A warp alone need not wait for others in every pass. Where most sequences are longer, four share the work.
_LONG = 512


@functools.lru_cache
def launch_for(ids, step, continues, long) -> Launch:
    """The kernel for `ids` of a dtype; step, continues: the dtypes of these tensors, or None. `long`: for batches of
    sequences of more than 512 tokens on average."""
    num_warps = 4 if long else 1
    pointers = (ids, torch.int32, step, continues, ids, torch.int64, torch.int64)
    constants = {"SPECIAL": _SPECIAL, "IGNORED": _IGNORED, "TILE": 128 * num_warps}
    return Launch(_mask_kernel, pointers, ("i64",) * 10, constants, num_warps)


@catalogue
def _launches(_dtype, _capability):
    yield launch_for(torch.int64, None, None, False)
    yield launch_for(torch.int64, None, None, True)
    yield launch_for(torch.int32, torch.int64, torch.bool, True)


def _mask(ids, cu_seqlens, step_at, continues, count, step, seed, mask_id, first, end, masked_below, replaced_below):
    ids, cu_seqlens, continues = contiguous(ids, cu_seqlens, continues)
    total, sequences = ids.shape[0], cu_seqlens.shape[0] - 1
    masked, positions, labels = torch.empty_like(ids), *(ids.new_empty(count, dtype=torch.int64) for _ in range(2))
    if total == 0:
        return masked, positions, labels
    long = bool(total > _LONG * sequences)  # under torch.compile a guard
    launch = launch_for(ids.dtype, dtype_of(step_at), dtype_of(continues), long)
    tensors = (ids, cu_seqlens, step_at, continues, masked, positions, labels)
    vocabulary = 0 if continues is None else continues.shape[0]
    numbers = (total, count, seed, step, mask_id, first, end, masked_below, replaced_below, vocabulary)
    launch(sequences, *tensors, *numbers)
    return masked, positions, labels


_mask_op = define(
    "mask_tokens",
    "(Tensor ids, Tensor cu_seqlens, Tensor? step_at, Tensor? continues, SymInt count, SymInt step, int seed, "
    "int mask_id, int first, int end, int masked_below, int replaced_below) -> (Tensor, Tensor, Tensor)",
    _mask,
)


def _mask_on_gpu(input_ids, cu_seqlens, count, *, mask_id, ordinary, seed, step, replace, continues):
    """`mask_tokens` by the kernel."""
    run = _mask_op if torch.compiler.is_compiling() else _mask
    step_at, step = (step, 0) if isinstance(step, torch.Tensor) else (None, step)
    numbers = (count, step, seed, mask_id, *ordinary, *_thresholds(replace))
    return run(input_ids, cu_seqlens, step_at, continues, *numbers)


register(_NAME, _mask_on_gpu)


def mask_tokens(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    count: int,
    *,
    mask_id: int,
    ordinary: tuple[int, int],
    seed: int,
    step: int | torch.Tensor = 0,
    replace: tuple[float, float] = (0.8, 0.1),
    continues: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose exactly `count` of the T tokens to predict, and hide them.

    input_ids: int32 or int64 (T,); cu_seqlens: int32 (B+1,), rising from 0 to T. ordinary: (first, end) of the ids that
    may be chosen and drawn; all others are special tokens. `replace` gives the shares that become `mask_id` and a
    random id; the rest stay. (seed, step), 64 bits each, decide everything random; a step that is an int64 tensor of
    one element is read on the device, so that a captured CUDA graph takes another one each time. continues: bool (V,),
    True for ids that continue a word, like WordPiece's `##ing`; with it words are chosen whole, the last one of a
    sequence as far as its share reaches.

    Returns (masked ids (T,), positions int64 (count,) rising, labels int64 (count,)). Every sequence of n tokens gets
    count · n / T of the positions, rounded up or down. Where it has fewer ordinary tokens the surplus positions hold
    special tokens of its own, unchanged, with label −100.

    Raises TypeError for a dtype or a type that does not fit, ValueError for a shape, a device or a number. The values
    of cu_seqlens are looked at with CRAMFAST_CHECK=1 only; `continues` must have an entry for every id.
    """
    _expect(input_ids, cu_seqlens, count, mask_id, ordinary, seed, step, replace, continues)
    run = pick(_NAME, input_ids, mask_tokens_reference)
    return run(
        input_ids,
        cu_seqlens,
        count,
        mask_id=mask_id,
        ordinary=ordinary,
        seed=seed,
        step=step,
        replace=replace,
        continues=continues,
    )


def _expect(input_ids, cu_seqlens, count, mask_id, ordinary, seed, step, replace, continues):
    """Everything that `mask_tokens` asks of its arguments."""
    expect_indices(_NAME, "input_ids", input_ids, input_ids)
    total = input_ids.shape[0]
    expect_sequences(_NAME, cu_seqlens, total, max(total, 1), input_ids)
    expect_int(_NAME, "count", count, 0)
    if count > total:
        raise ValueError(f"{_NAME}: count is {count}, expected at most {total}, the number of tokens")
    expect_int(_NAME, "mask_id", mask_id, 0)
    first, end = ordinary
    if not 0 <= first <= end < 2**31:
        raise ValueError(f"{_NAME}: ordinary is {ordinary}, expected (first, end) with 0 <= first <= end < 2**31")
    masked, random = replace
    # 1e-9 lets shares pass whose sum is 1 but for rounding.
    if not (min(masked, random) >= 0 and masked + random <= 1 + 1e-9):
        raise ValueError(f"{_NAME}: replace is {replace}, expected two shares of at most 1 together")
    _expect_64_bits("seed", seed)
    if isinstance(step, torch.Tensor):
        _expect_tensor("step", step, torch.int64, input_ids)
        if step.numel() != 1:
            raise ValueError(f"{_NAME}: step has shape {tuple(step.shape)}, expected one element")
    else:
        _expect_64_bits("step", step)
    if continues is not None:
        _expect_tensor("continues", continues, torch.bool, input_ids)
        if continues.dim() != 1:
            raise ValueError(f"{_NAME}: continues has shape {tuple(continues.shape)}, expected (V,)")
    if checking(cu_seqlens):
        check_sequences(_NAME, cu_seqlens, total, 2**31)


def _expect_64_bits(name: str, value: int) -> None:
    expect_int(_NAME, name, value, -(2**63))
    if value >= 2**63:
        raise ValueError(f"{_NAME}: {name} is {value}, expected less than 2**63")


def _expect_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, like: torch.Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{_NAME}: {name} is {say(tensor.dtype)}, expected {say(dtype)}")
    expect_device(_NAME, name, tensor, like)


def _thresholds(replace: tuple[float, float]) -> tuple[int, int]:
    """Which of the 32-bit numbers make a token the mask token: those below the first; and another token: the second."""
    masked, random = replace
    return round(masked * 2**32), round(min(masked + random, 1.0) * 2**32)


def _key(seed: int, step: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """What all random numbers of one call have in common, an int64 scalar on `device`."""
    one, seed = (torch.full((), value, device=device) for value in (1, seed))
    step = step.reshape(()) if isinstance(step, torch.Tensor) else torch.full((), step, device=device)
    return _random_reference(_random_reference(seed, one), step)


def _random_reference(key: torch.Tensor, counter: torch.Tensor | int) -> torch.Tensor:
    """64 random bits for each `counter`, as in the kernel but in wrapping signed arithmetic."""
    increment, first, second = (constant - (1 << 64) for constant in (_INCREMENT, *_MULTIPLIERS))
    z = key + counter * increment
    z = (z ^ _shift(z, 30)) * first
    z = (z ^ _shift(z, 27)) * second
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64, which torch shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _scaled_reference(bits: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers of 32 bits as ones from 0 to `size` - 1."""
    return (bits * size) >> 32
