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


def test_surplus_places_hold_special_tokens_unchanged_and_unlabelled():
    ids, cu_seqlens = batch(ragged(20), special_every=2)
    special = torch.isin(ids, SPECIAL)
    surplus = 7
    masked, positions, labels = mask(ids, cu_seqlens, int((~special).sum()) + surplus)
    assert (positions.diff() > 0).all()
    assert torch.isin(torch.where(~special)[0], positions).all()
    unlabelled = labels == -100
    assert unlabelled.sum() == surplus
    assert torch.equal(special[positions], unlabelled)
    assert torch.equal(labels[~unlabelled], ids[positions[~unlabelled]])
    assert torch.equal(masked[special], ids[special])


@pytest.mark.parametrize("replace", [(0.8, 0.1), (0.5, 0.5), (0.0, 0.3)])
def test_shares_of_masked_random_and_kept_tokens(replace):
    ids, cu_seqlens = batch(6400 * (128,))
    masked, positions, labels = mask(ids, cu_seqlens, ids.numel() // 4, replace=replace)
    n, after = positions.numel(), masked[positions]
    # One draw in END - FIRST gives the token that was there.
    masked_share, random_share = replace[0], replace[1] * (1 - 1 / (END - FIRST))
    hidden, kept = after == MASK, after == labels
    for share, found in [
        (masked_share, hidden),
        (random_share, ~hidden & ~kept),
        (1 - masked_share - random_share, kept),
    ]:
        assert_within_5_deviations(found.sum(), n * share, math.sqrt(n * share * (1 - share)))


def test_replace_can_mask_every_chosen_token():
    ids, cu_seqlens = batch(ragged(200))
    masked, positions, labels = mask(ids, cu_seqlens, 1000, replace=(1.0, 0.0))
    assert (masked[positions] == MASK).all()
    assert torch.equal(labels, ids[positions])


def test_replace_can_keep_every_token():
    ids, cu_seqlens = batch(ragged(200))
    masked, _, _ = mask(ids, cu_seqlens, 1000, replace=(0.0, 0.0))
    assert torch.equal(masked, ids)


def assert_uniform(found, expected, spread=1.0):
    """Pearson's chi-square of counts `found`; `spread`: their variance, as a share of a Poisson count's."""
    freedom = found.numel() - 1
    chi_square = ((found - expected) ** 2).sum() / (expected * spread)
    assert_within_5_deviations(chi_square, freedom, math.sqrt(2 * freedom))


@pytest.mark.parametrize(("length", "count"), [(128, 32), (17, 5)])
def test_every_place_of_a_sequence_is_equally_likely(length, count):
    sequences = 8000
    ids, cu_seqlens = batch(sequences * (length,))
    _, positions, _ = mask(ids, cu_seqlens, sequences * count)
    found = torch.bincount(positions % length, minlength=length).double()
    # Drawing without replacement: a place's count varies by p (1 - p), and the sum over places is fixed.
    rate = count / length
    assert_uniform(found, sequences * rate, (1 - rate) * length / (length - 1))


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
    assert_uniform(found[ordinary], sequences * rate, (1 - rate) * choices / (choices - 1))


@pytest.mark.parametrize("replace", [(0.0, 1.0), (0.8, 0.1)])
def test_random_tokens_are_drawn_uniformly(replace):
    ids, cu_seqlens = batch(1600 * (128,))
    masked, _, _ = mask(ids, cu_seqlens, ids.numel(), replace=replace)
    # Leaving out draws of the token that was there favours no id: the tokens themselves are uniform.
    drawn = masked[(masked != MASK) & (masked != ids)]
    found = torch.bincount(drawn - FIRST, minlength=END - FIRST).double()
    assert_uniform(found, drawn.numel() / (END - FIRST))


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


@pytest.mark.parametrize("count", [-1, 101])
def test_a_count_outside_the_batch_is_refused(count):
    with pytest.raises(ValueError, match=f"count {count} is outside 0..100"):
        mask(*batch((100,)), count)
