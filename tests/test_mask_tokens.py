"""Which tokens `mask_tokens` chooses, what becomes of them, and that chance decides it evenly and repeatably.

Statistical bounds are 5 standard deviations, a false alarm in 1.7 million; the seeds are fixed, so none comes and goes.
"""

import math

import pytest
import torch

from cramfast.kernels import mask_tokens, sequence_positions

FIRST, END, MASK = 5, 995, 4
pytestmark = pytest.mark.usefixtures("reference")

SPECIAL = torch.cat((torch.arange(FIRST), torch.arange(END, 1000)))
SIZES = (1, 2, 63, 100, 128, 1000, 16384)
RATES = (0.0, 0.15, 0.25, 0.3, 0.5, 1.0)


def batch(lengths, special_every=None):
    """Ordinary tokens, with a special one at every `special_every`-th place."""
    total = sum(lengths)
    ids = torch.randint(FIRST, END, (total,), generator=torch.Generator().manual_seed(total))
    if special_every:
        ids[::special_every] = SPECIAL.repeat(total)[: len(ids[::special_every])]
    return ids, torch.tensor((0, *lengths)).cumsum(0).int()


def mask(ids, cu_seqlens, count, seed=0, **options):
    options = {"mask_id": MASK, "ordinary": (FIRST, END), "seed": seed} | options
    return mask_tokens(ids, cu_seqlens, count, **options)


def chosen_per_sequence(positions, cu_seqlens, total):
    sequence, _ = sequence_positions(cu_seqlens, total)
    return torch.bincount(sequence[positions], minlength=cu_seqlens.numel() - 1)


def ragged(sequences, shortest=16, longest=128):
    return torch.randint(shortest, longest + 1, (sequences,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_within_5_deviations(value, mean, deviation):
    assert abs(value - mean) <= 5 * deviation


def assert_distributed(found, expected, spread=1.0):
    """Pearson's chi-square of counts `found`; `spread`: their variance, as a share of a Poisson count's."""
    freedom = found.numel() - 1
    chi_square = ((found - expected) ** 2 / (expected * spread)).sum()
    assert_within_5_deviations(chi_square, freedom, math.sqrt(2 * freedom))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("total", SIZES)
def test_exactly_count_places_are_chosen_and_labelled(total, rate):
    count = round(rate * total)
    lengths = (total // 3, total - total // 3)
    ids, cu_seqlens = batch(lengths)
    before = ids.clone()
    masked, positions, labels = mask(ids, cu_seqlens, count)
    assert torch.equal(ids, before)
    assert masked.shape == ids.shape
    assert positions.dtype == labels.dtype == torch.int64
    assert positions.numel() == count
    assert (positions.diff() > 0).all()
    assert torch.equal(labels, ids[positions])
    unchosen = torch.ones(total, dtype=torch.bool)
    unchosen[positions] = False
    assert torch.equal(masked[unchosen], ids[unchosen])


def test_no_tokens():
    ids, cu_seqlens = batch(())
    assert [x.numel() for x in mask(ids, cu_seqlens, 0)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_keep_their_dtype(dtype):
    ids, cu_seqlens = batch((128, 100))
    masked, positions, labels = mask(ids.to(dtype), cu_seqlens, 57)
    assert masked.dtype == dtype
    assert positions.dtype == labels.dtype == torch.int64


@pytest.mark.parametrize("special_every", [None, 64])
def test_a_quarter_of_equal_sequences_is_32_of_every_128(special_every):
    ids, cu_seqlens = batch(500 * (128,), special_every)
    for seed in range(5):
        _, positions, labels = mask(ids, cu_seqlens, ids.numel() // 4, seed)
        assert (chosen_per_sequence(positions, cu_seqlens, ids.numel()) == 32).all()
        assert not torch.isin(labels, SPECIAL).any() and (labels >= 0).all()


@pytest.mark.parametrize(
    "lengths",
    [ragged(200), ragged(16), (100, 17, 0, 64, 1, 127), (512, *100 * (3,)), 300 * (1,)],
    ids=["200 sequences", "16 sequences", "6 sequences", "one long among short", "single tokens"],
)
@pytest.mark.parametrize("rate", [0.15, 0.25, 0.3])
def test_ragged_sequences_give_their_share_to_within_a_token(rate, lengths):
    ids, cu_seqlens = batch(lengths)
    total, count = ids.numel(), round(rate * ids.numel())
    share = count / total * torch.tensor(lengths)
    for seed in range(20):
        _, positions, _ = mask(ids, cu_seqlens, count, seed)
        assert ((chosen_per_sequence(positions, cu_seqlens, total) - share).abs() < 1).all()


def test_special_tokens_are_never_chosen_nor_drawn():
    ids, cu_seqlens = batch(ragged(2000), special_every=3)
    masked, positions, labels = mask(ids, cu_seqlens, ids.numel() // 2, replace=(0.0, 1.0))
    assert not torch.isin(ids[positions], SPECIAL).any()
    assert torch.equal(labels, ids[positions])
    drawn = masked[positions]
    # Every ordinary id, the first and the last too, some 70 times each.
    assert drawn.unique().tolist() == list(range(FIRST, END))


def test_surplus_places_hold_special_tokens_of_the_sequence():
    length, sequences, ordinary, count = 10, 50, (3, 8), 200
    ids, cu_seqlens = batch(sequences * (length,))
    special = torch.ones(sequences, length, dtype=torch.bool)
    special[:, ordinary] = False
    ids[special.flatten()] = SPECIAL[ids[special.flatten()] % len(SPECIAL)]
    masked, positions, labels = mask(ids, cu_seqlens, count, replace=(1.0, 0.0))
    chosen = torch.zeros(sequences * length, dtype=torch.bool)
    chosen[positions] = True
    assert (positions.diff() > 0).all()
    # Four places for two ordinary tokens: they, and two others, in every sequence.
    assert (chosen.view_as(special).sum(1) == 4).all()
    assert chosen.view_as(special)[:, ordinary].all()
    surplus = special.flatten()[positions]
    assert torch.equal(labels, torch.where(surplus, -100, ids[positions]))
    assert torch.equal(masked, torch.where(special.flatten(), ids, MASK))


@pytest.mark.parametrize("replace", [(0.8, 0.1), (0.5, 0.5), (0.0, 0.3)])
def test_shares_of_masked_random_and_kept_tokens(replace):
    ids, cu_seqlens = batch(6400 * (128,))
    masked, positions, labels = mask(ids, cu_seqlens, ids.numel() // 4, replace=replace)
    after = masked[positions]
    hidden, kept = after == MASK, after == labels
    # One draw in END - FIRST gives the token that was there.
    shares = torch.tensor((replace[0], replace[1] * (1 - 1 / (END - FIRST)), 0.0)).double()
    shares[2] = 1 - shares.sum()
    found = torch.stack((hidden.sum(), (~hidden & ~kept).sum(), kept.sum()))
    assert (found[shares == 0] == 0).all()
    expected = positions.numel() * shares
    assert_distributed(found[shares > 0], expected[shares > 0])


def test_what_happens_to_a_token_does_not_depend_on_its_place():
    length, sequences = 64, 8000
    ids, cu_seqlens = batch(sequences * (length,))
    masked, positions, _ = mask(ids, cu_seqlens, ids.numel(), replace=(0.25, 0.0))
    found = torch.bincount(positions[masked == MASK] % length, minlength=length).double()
    # A place's count is binomial; the sum over places is not fixed.
    assert_distributed(found, found.mean(), 0.75)


def test_replace_can_mask_every_chosen_token():
    ids, cu_seqlens = batch(ragged(200))
    masked, positions, labels = mask(ids, cu_seqlens, 1000, replace=(1.0, 0.0))
    assert (masked[positions] == MASK).all()
    assert torch.equal(labels, ids[positions])


def test_replace_can_keep_every_token():
    ids, cu_seqlens = batch(ragged(200))
    masked, _, _ = mask(ids, cu_seqlens, 1000, replace=(0.0, 0.0))
    assert torch.equal(masked, ids)


@pytest.mark.parametrize(("length", "count"), [(128, 32), (17, 5)])
def test_every_place_of_a_sequence_is_equally_likely(length, count):
    sequences = 8000
    ids, cu_seqlens = batch(sequences * (length,))
    _, positions, _ = mask(ids, cu_seqlens, sequences * count)
    found = torch.bincount(positions % length, minlength=length).double()
    # Drawing without replacement: a place's count varies by p (1 - p), and the sum over places is fixed.
    rate = count / length
    assert_distributed(found, sequences * rate, (1 - rate) * length / (length - 1))


@pytest.mark.parametrize("distance", [1, 2, 64])
def test_two_places_are_chosen_independently(distance):
    length, count, sequences = 128, 32, 8000
    ids, cu_seqlens = batch(sequences * (length,))
    _, positions, _ = mask(ids, cu_seqlens, sequences * count)
    chosen = torch.zeros(ids.numel(), dtype=torch.bool)
    chosen[positions] = True
    chosen_BS = chosen.view(sequences, length)
    # Pairs without a place in common. One pair chosen makes another less likely, so the binomial deviation is too wide.
    first = (torch.arange(length - distance) // distance % 2) == 0
    pairs = (chosen_BS[:, : length - distance] & chosen_BS[:, distance:])[:, first]
    n, both = pairs.numel(), count * (count - 1) / (length * (length - 1))
    assert_within_5_deviations(pairs.sum(), n * both, math.sqrt(n * both * (1 - both)))


def test_ordinary_tokens_among_special_ones_are_equally_likely():
    length, sequences, specials = 30, 8000, torch.tensor([0, 13, 29])
    ids, cu_seqlens = batch(sequences * (length,))
    ids.view(sequences, length)[:, specials] = 0
    _, positions, _ = mask(ids, cu_seqlens, 6 * sequences)
    found = torch.bincount(positions % length, minlength=length).double()
    ordinary = torch.ones(length, dtype=torch.bool)
    ordinary[specials] = False
    assert (found[specials] == 0).all()
    rate, choices = 6 / ordinary.sum(), ordinary.sum()
    assert_distributed(found[ordinary], sequences * rate, (1 - rate) * choices / (choices - 1))


@pytest.mark.parametrize("replace", [(0.0, 1.0), (0.8, 0.1)])
def test_random_tokens_are_drawn_uniformly(replace):
    ids, cu_seqlens = batch(1600 * (128,))
    masked, _, _ = mask(ids, cu_seqlens, ids.numel(), replace=replace)
    # Leaving out draws of the token that was there favours no id: the tokens themselves are uniform.
    drawn = masked[(masked != MASK) & (masked != ids)]
    found = torch.bincount(drawn - FIRST, minlength=END - FIRST).double()
    assert_distributed(found, drawn.numel() / (END - FIRST))


def test_what_happens_to_a_token_does_not_depend_on_what_it_is():
    ids, cu_seqlens = batch(ragged(200))
    others = FIRST + (ids - FIRST + 500) % (END - FIRST)
    masked, positions, _ = mask(ids, cu_seqlens, 3000)
    other_masked, other_positions, _ = mask(others, cu_seqlens, 3000)
    assert torch.equal(positions, other_positions)
    assert torch.equal(masked == MASK, other_masked == MASK)


def test_seed_and_step_decide_everything():
    ids, cu_seqlens = batch(ragged(200))
    first = mask(ids, cu_seqlens, 3000, seed=3, step=7)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, mask(ids, cu_seqlens, 3000, seed=3, step=7), strict=True))


@pytest.mark.parametrize(("seed", "step"), [(4, 7), (3, 8), (7, 3), (3 + 2**32, 7), (-3, 7)])
def test_another_seed_or_step_is_another_draw(seed, step):
    ids, cu_seqlens = batch(500 * (128,))
    count = ids.numel() // 4
    masked, positions, _ = mask(ids, cu_seqlens, count, seed=3, step=7)
    other_masked, other_positions, _ = mask(ids, cu_seqlens, count, seed=seed, step=step)
    # Independent draws share a quarter of their places, and being hidden in one says nothing of the other.
    common = positions[torch.isin(positions, other_positions)]
    n = positions.numel()
    assert_within_5_deviations(common.numel(), n / 4, math.sqrt(n * 3 / 16))
    both = ((masked[common] == MASK) & (other_masked[common] == MASK)).sum()
    assert_within_5_deviations(both, 0.64 * common.numel(), math.sqrt(common.numel() * 0.64 * 0.36))


def test_the_draws_of_many_steps_are_independent():
    length, sequences, steps = 128, 200, 40
    ids, cu_seqlens = batch(sequences * (length,))
    times = torch.zeros(ids.numel(), dtype=torch.int64)
    for step in range(steps):
        _, positions, _ = mask(ids, cu_seqlens, ids.numel() // 4, seed=1, step=step)
        times[positions] += 1
    # How often a token is chosen is binomial. Times of which there are few are counted together.
    odds = [math.comb(steps, n) * 0.25**n * 0.75 ** (steps - n) for n in range(steps + 1)]
    expected, found = ids.numel() * torch.tensor(odds).double(), torch.bincount(times, minlength=steps + 1)
    common = expected > 50
    expected, found = (torch.cat((x[common], x[~common].sum()[None])) for x in (expected, found))
    assert_distributed(found, expected)


def test_a_step_may_be_a_tensor():
    ids, cu_seqlens = batch(ragged(20))
    expected = mask(ids, cu_seqlens, 200, step=7)
    for step in (torch.tensor(7), torch.tensor([7])):
        assert all(torch.equal(a, b) for a, b in zip(expected, mask(ids, cu_seqlens, 200, step=step), strict=True))


# Of the ordinary ids those divisible by three continue a word.
CONTINUES = (torch.arange(1000) % 3 == 0) & (torch.arange(1000) >= FIRST) & (torch.arange(1000) < END)


def words_of(ids, cu_seqlens):
    """Which word each token belongs to; special tokens and the first of a sequence begin one."""
    sequence, place = sequence_positions(cu_seqlens, ids.numel())
    return (~CONTINUES[ids] | (place == 0)).cumsum(0) - 1, sequence


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("special_every", [None, 5])
def test_words_are_chosen_whole(rate, special_every):
    ids, cu_seqlens = batch(ragged(100), special_every)
    total = ids.numel()
    count = round(rate * total)
    _, positions, _ = mask(ids, cu_seqlens, count, continues=CONTINUES)
    assert positions.numel() == count and (positions.diff() > 0).all()
    share = count / total * cu_seqlens.diff()
    assert ((chosen_per_sequence(positions, cu_seqlens, total) - share).abs() < 1).all()
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[positions] = True
    ordinary = ~torch.isin(ids, SPECIAL)
    word, sequence = words_of(ids, cu_seqlens)
    size = torch.bincount(word[ordinary], minlength=int(word[-1]) + 1)
    taken = torch.bincount(word[ordinary & chosen], minlength=len(size))
    cut = torch.where((taken > 0) & (taken < size))[0]
    # One word of a sequence at most, and of it the first pieces.
    sequence_of = torch.empty_like(size).index_copy(0, word, sequence)
    assert len(sequence_of[cut].unique()) == len(cut)
    assert all((chosen[ordinary & (word == number)].int().diff() <= 0).all() for number in cut)


def test_words_are_equally_likely():
    words, size, sequences, chosen = 16, 3, 8000, 4
    ids, cu_seqlens = batch(sequences * (words * size,))
    ids = torch.where(torch.arange(ids.numel()) % size == 0, 7, 6)
    _, positions, _ = mask(ids, cu_seqlens, sequences * size * chosen, continues=CONTINUES)
    assert torch.equal(positions.view(-1, size).diff(), torch.ones(sequences * chosen, size - 1).long())
    found = torch.bincount(positions[::size] // size % words, minlength=words).double()
    rate = chosen / words
    assert_distributed(found, sequences * rate, (1 - rate) * words / (words - 1))


def test_a_sequence_may_begin_amid_a_word():
    ids, cu_seqlens = torch.full((60,), 6), torch.tensor([0, 30, 60]).int()
    _, positions, _ = mask(ids, cu_seqlens, 20, continues=CONTINUES)
    # Each sequence is one word, of which the share is the beginning.
    assert positions.tolist() == [*range(10), *range(30, 40)]


def test_without_continuing_ids_words_are_tokens():
    ids, cu_seqlens = batch(ragged(50), special_every=7)
    alone = torch.zeros_like(CONTINUES)
    whole, plain = mask(ids, cu_seqlens, 700, continues=alone), mask(ids, cu_seqlens, 700)
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))


IDS, ENDS = batch((100,))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "count is -1, expected at least 0", {"count": -1}),
        (ValueError, "count is 101, expected at most 100, the number of tokens", {"count": 101}),
        (TypeError, "count is of type float, expected int", {"count": 25.0}),
        (TypeError, "input_ids is float32, expected int32 or int64", {"ids": IDS.float()}),
        (ValueError, r"input_ids has shape \(4, 25\)", {"ids": IDS.view(4, 25)}),
        (TypeError, "cu_seqlens is int64, expected int32", {"cu_seqlens": ENDS.long()}),
        (ValueError, r"cu_seqlens has shape \(1, 2\)", {"cu_seqlens": ENDS[None]}),
        (ValueError, r"cu_seqlens has shape \(1,\)", {"cu_seqlens": ENDS[:1]}),
        (ValueError, "cu_seqlens is on meta, expected cpu", {"cu_seqlens": ENDS.to("meta")}),
        (ValueError, "mask_id is -1, expected at least 0", {"mask_id": -1}),
        (ValueError, r"ordinary is \(7, 5\), expected", {"ordinary": (7, 5)}),
        (ValueError, r"ordinary is \(-1, 5\), expected", {"ordinary": (-1, 5)}),
        (ValueError, r"replace is \(0.8, 0.3\), expected", {"replace": (0.8, 0.3)}),
        (ValueError, r"replace is \(-0.1, 0.3\), expected", {"replace": (-0.1, 0.3)}),
        (ValueError, r"replace is \(nan, 0.0\), expected", {"replace": (math.nan, 0.0)}),
        (TypeError, "seed is of type float, expected int", {"seed": 0.5}),
        (ValueError, f"seed is {2**63}, expected less than", {"seed": 2**63}),
        (ValueError, f"step is {-(2**63) - 1}, expected at least", {"step": -(2**63) - 1}),
        (TypeError, "step is int32, expected int64", {"step": torch.tensor(3).int()}),
        (ValueError, r"step has shape \(2,\), expected one element", {"step": torch.tensor([3, 4])}),
        (ValueError, "step is on meta, expected cpu", {"step": torch.tensor(3).to("meta")}),
        (TypeError, "continues is int64, expected bool", {"continues": CONTINUES.long()}),
        (ValueError, r"continues has shape \(2, 500\), expected", {"continues": CONTINUES.view(2, 500)}),
        (ValueError, "continues is on meta, expected cpu", {"continues": CONTINUES.to("meta")}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(error, message, change):
    arguments = {"ids": IDS, "cu_seqlens": ENDS, "count": 25} | change
    with pytest.raises(error, match=f"^mask_tokens: {message}"):
        mask(**arguments)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((0, 50, 40, 100), r"cu_seqlens\[2\] is 40, expected at least 50"),
        ((0, 50), r"cu_seqlens\[1\] is 50, expected 100, all tokens"),
        ((1, 100), r"cu_seqlens\[0\] is 1, expected 0"),
    ],
)
def test_checking_finds_wrong_boundaries(ends, message, monkeypatch):
    monkeypatch.setenv("CRAMFAST_CHECK", "1")
    mask(IDS, ENDS, 25)
    with pytest.raises(ValueError, match=f"^mask_tokens: {message}"):
        mask(IDS, torch.tensor(ends).int(), 25)
