"""How tiles are filled with sequences: against first-fit decreasing, told in Python. Native on a GPU, else interpreted.

Shapes: T tokens, B sequences.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cramfast.kernels.packing import pack_sequences

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned")

CHUNK = 64  # sequences that are packed by themselves
LIMITS = (64, 128)


def boundaries(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


def first_fit_decreasing(lengths, limit):
    """Tiles of the numbers of sequences: the longest first, of equals the first, each where first there is room."""
    tiles, left = [], []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        found = next((tile for tile, space in enumerate(left) if space >= length), None)
        if length and found is None:
            tiles.append([number])
            left.append(limit - length)
        elif length:
            tiles[found].append(number)
            left[found] -= length
    return tiles


def laid_out(lengths, limit, window):
    """For each place of each tile the token, the first place it sees, the last, and its position; None if empty."""
    starts = boundaries(lengths).tolist()
    tiles = []
    for chunk in range(0, len(lengths), CHUNK):
        for numbers in first_fit_decreasing(lengths[chunk : chunk + CHUNK], limit):
            places = []
            for number in (chunk + number for number in numbers):
                first, length = len(places), lengths[number]
                for position in range(length):
                    low, end = 0, length
                    if window >= 0:
                        low, end = max(0, position - window), min(length, position + window + 1)
                    places.append((starts[number] + position, first + low, first + end - 1, position))
            tiles.append(places + [None] * (limit - len(places)))
    return tiles


def found_in(token, note):
    return (token, note & 0xFF, note >> 8 & 0xFF, note >> 16) if token >= 0 else None


def assert_packed(lengths, limit=128, window=-1):
    count, places = pack_sequences(boundaries(lengths), sum(lengths), limit, window)
    assert count.dtype == places.dtype == torch.int32
    assert count.shape == (1,) and places.shape[::2] == (2, limit) and int(count) <= places.shape[1]
    tokens, notes = places[:, : int(count)].tolist()
    found = [[found_in(*place) for place in zip(*tile, strict=True)] for tile in zip(tokens, notes, strict=True)]
    assert found == laid_out(lengths, limit, window)
    # Both might be wrong alike. What the kernels need: every token once, and of what is empty nothing seen.
    flat, noted = places[0, : int(count)].flatten(), places[1, : int(count)].flatten()
    assert torch.equal(flat[flat >= 0].sort().values, torch.arange(sum(lengths), device=DEVICE))
    assert (flat[flat < 0] == -1).all() and (noted[flat < 0] == 1).all()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("window", [-1, 0, 5])
@pytest.mark.parametrize(
    "lengths",
    [
        (1,),
        (64,),
        (0, 0, 5, 0, 17, 0, 0),
        (64,) * 9,
        (33, 31, 32, 1, 64, 2, 61),
        (1, 64) * 35,
        (0,) * 70 + (3,),
        (20,) * CHUNK + (0,) * CHUNK + (40, 30),
    ],
    ids=lambda lengths: f"{len(lengths)} sequences, {sum(lengths)} tokens",
)
def test_tiles_are_filled_by_first_fit_decreasing(lengths, window, limit):
    assert_packed(lengths, limit, window)


@pytest.mark.parametrize("sequences", [150, pytest.param(20_000, marks=needs_gpu)])
def test_many_chunks(sequences):
    number = random.Random(sequences)
    assert_packed([number.randint(0, 128) for _ in range(sequences)])


@pytest.mark.parametrize("sequences", [65, pytest.param(100_000, marks=needs_gpu)])
@pytest.mark.parametrize("length", [1, 128])
def test_the_shortest_and_the_longest(length, sequences):
    assert_packed((length,) * sequences)


def test_tiles_of_ragged_sequences_are_nearly_full():
    """Of lengths of 16 to 128, in the order they come in, tiles would be filled by less than three quarters."""
    number = random.Random(0)
    lengths = [number.randint(16, 128) for _ in range(2 * CHUNK)]
    count, _ = pack_sequences(boundaries(lengths), sum(lengths), 128)
    assert sum(lengths) > 0.9 * 128 * int(count)


LENGTHS = st.lists(st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 64)), min_size=1, max_size=90)


@given(lengths=LENGTHS.filter(any), limit=st.sampled_from(LIMITS), window=st.sampled_from((-1, 3)))
@example(lengths=[64] * 64 + [1], limit=64, window=-1)
# One fixture, which only sets the environment, serves all examples.
@settings(
    max_examples=300 if NATIVE else 15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_batches(lengths, limit, window):
    assert_packed(lengths, limit, window)


def test_twenty_times_the_same():
    number = random.Random(1)
    lengths = [number.randint(1, 128) for _ in range(3 * CHUNK if NATIVE else CHUNK + 5)]
    count, places = pack_sequences(boundaries(lengths), sum(lengths), 128)
    for _ in range(20 if NATIVE else 2):
        again, others = pack_sequences(boundaries(lengths), sum(lengths), 128)
        assert torch.equal(again, count) and torch.equal(others[:, : int(count)], places[:, : int(count)])


def test_a_compiled_caller_gets_the_same():
    torch.compiler.reset()
    compiled = torch.compile(pack_sequences, fullgraph=True, backend="aot_eager")
    for lengths in ((30, 34, 0, 1, 63), (5,) * 20):
        arguments = boundaries(lengths), sum(lengths), 64, -1
        (count, places), (expected, expected_places) = compiled(*arguments), pack_sequences(*arguments)
        assert torch.equal(count, expected) and places.shape == expected_places.shape
        assert torch.equal(places[:, : int(count)], expected_places[:, : int(count)])
    torch.compiler.reset()


@needs_gpu
def test_the_host_does_not_wait():
    cu_seqlens = boundaries((5, 60, 128))
    pack_sequences(cu_seqlens, 193, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_sequences(cu_seqlens, 193, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
