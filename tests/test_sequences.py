"""How a batch is cut into groups: against the same greed, told in Python. Native on a GPU, interpreted without one.

Shapes: T tokens, B sequences.
"""

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cramfast.kernels import sequence_positions
from cramfast.kernels.sequences import group_sequences

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
pytestmark = pytest.mark.usefixtures("triton_kernels")

# How the docstring of the file cuts a batch: a lane of the program for each window, and windows no smaller than this.
LANES, WINDOW = 128, 512
MIXED = (1, 17, 63, 64, 100, 127, 128, 200, 256, 384, 512)
LIMITS = (64, 128)


def boundaries(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


def greedy(lengths, limit):
    """The groups as (begin, end): of the sequences that begin in one window, in order, as many as fit."""
    window = max(WINDOW, -(-sum(lengths) // LANES))
    groups, latest = [], None
    for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        if begin == end:
            continue
        if begin // window == latest and end - groups[-1][0] <= limit:
            groups[-1] = (groups[-1][0], end)
        else:
            groups.append((begin, end))
        latest = begin // window
    # Sorting keeps the order of equals.
    return sorted(groups, key=lambda group: (group[0] - group[1]) // limit)


def assert_grouped(lengths, limit, longest=None):
    total, cu_seqlens = sum(lengths), boundaries(lengths)
    groups, bounds = group_sequences(cu_seqlens, total, longest or max(lengths, default=0) or 1, limit)
    assert groups.dtype == bounds.dtype == torch.int32
    assert groups.shape[1:] == (2,) and bounds.shape == (2, total)
    sequence, _ = sequence_positions(cu_seqlens, total)
    assert torch.equal(bounds, torch.stack((cu_seqlens[sequence], cu_seqlens[sequence + 1])))
    count, slots = int(groups[0, 0]), len(groups) - 1
    assert count <= slots
    found = [tuple(group) for group in groups[1 : 1 + count].tolist()]
    assert found == greedy(lengths, limit)
    # Both might be wrong alike. What the kernels need: every token once, sequences whole, a long one alone.
    ends = cu_seqlens.tolist()
    begins, stops = [sorted(places) for places in zip(*found, strict=True)] if found else ([], [])
    assert [0, *stops] == [*begins, total]
    assert {*begins, *stops} <= {*ends}
    alone = {*itertools.pairwise(ends)}
    assert all(end - begin <= limit or (begin, end) in alone for begin, end in found)
    sizes = [-(-(end - begin) // limit) for begin, end in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "lengths",
    [
        (),
        (0,),
        (0, 0, 0),
        (1,),
        (0, 0, 5, 0, 17, 0, 0, 0, 30, 0, 0),
        (20,) * 7,
        (64,) * 9,
        (1, 64) * 5,
        (32, 33, 32, 32, 33),
        (1, 128, 128, 1, 0, 127, 1, 1),
        MIXED,
        MIXED[::-1],
    ],
    ids=lambda lengths: f"{len(lengths)} sequences, {sum(lengths)} tokens",
)
def test_groups_are_those_of_greed(lengths, limit):
    assert_grouped(lengths, limit)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_group_ends_with_its_window(limit):
    # A sequence ends with the first window, one reaches into the second and ends there in the middle of a group, and
    # sequences without a token lie on the edge.
    for last in (12, 13, 40):
        assert_grouped((50,) * 10 + (last, 0, 0, 5, 5, 500, 0, 3), limit)


@pytest.mark.parametrize("longest", [200, 256, 257, 512])
def test_room_for_longer_sequences_changes_nothing(longest):
    assert_grouped((0, 100, 5, 200, 64, 65, 3, 128, 129), 64, longest)


@pytest.mark.parametrize("sequences", [20, pytest.param(10_000, marks=needs_gpu)])
def test_one_long_sequence_among_short_ones(sequences):
    assert_grouped((3,) * sequences + (512,) + (3,) * sequences, 64)


# Past 65,536 tokens the windows grow. Interpreted, the longest lane decides how long that takes.
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    ("total", "longest"),
    [(70_000, 512), pytest.param(70_000, 20, marks=needs_gpu), pytest.param(1_000_000, 128, marks=needs_gpu)],
)
def test_batches_of_many_windows(total, longest, limit):
    number, lengths = random.Random(total), []
    while total > 0:
        lengths.append(min(total, number.randint(longest // 2, longest)))
        total -= lengths[-1]
    assert_grouped(lengths, limit)


def test_every_sequence_a_single_token():
    assert_grouped((1,) * (10_000 if NATIVE else 130), 64)


# Short sequences make groups of many, long ones make many windows.
LENGTHS = st.one_of(
    st.lists(st.integers(0, 80), max_size=20),
    st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(30, 70), st.integers(100, 512)), max_size=12),
)


@given(lengths=LENGTHS, limit=st.sampled_from(LIMITS))
@example(lengths=[30, 34, 1, 63, 64, 65], limit=64)
# One fixture, which only sets the environment, serves all examples.
@settings(
    max_examples=300 if NATIVE else 15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_batches(lengths, limit):
    assert_grouped(lengths, limit)


def test_a_compiled_caller_gets_the_same():
    torch.compiler.reset()
    compiled = torch.compile(group_sequences, fullgraph=True, backend="aot_eager")
    for lengths in ((30, 34, 0, 1, 63), (5,) * 20):
        arguments = boundaries(lengths), sum(lengths), 64, 64
        (groups, bounds), (expected, expected_bounds) = compiled(*arguments), group_sequences(*arguments)
        count = 1 + int(expected[0, 0])
        assert groups.shape == expected.shape
        assert groups[0, 0] == expected[0, 0] and torch.equal(groups[1:count], expected[1:count])
        assert torch.equal(bounds, expected_bounds)
    torch.compiler.reset()


@needs_gpu
def test_the_host_does_not_wait():
    cu_seqlens = boundaries(MIXED)
    group_sequences(cu_seqlens, sum(MIXED), 512, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        group_sequences(cu_seqlens, sum(MIXED), 512, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
