"""The kernel of `mask_tokens` gives the masks of its definition, bit for bit: native on a GPU, interpreted without one.

All memory that it allocates is poisoned before it is written. The interpreter takes some 10 ms for a sequence.
"""

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import parametrize_pairs
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.kernels import choose, mask_tokens, mask_tokens_reference

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned")

FIRST, END, MASK, VOCABULARY = 5, 95, 4, 100
MIXED = (1, 17, 63, 64, 100, 127, 128, 200, 256, 384, 512)
SPECIAL = torch.cat((torch.arange(FIRST), torch.arange(END, VOCABULARY)))
CONTINUES = (torch.arange(VOCABULARY) % 3 == 0).to(DEVICE)
# By its name in the package, `mask_tokens` is the function.
LONG = importlib.import_module("cramfast.kernels.mask_tokens")._LONG


def batch(lengths, specials=0.1, dtype=torch.int64):
    """Random ids, this share of them special, and where the sequences begin and end."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    ids = torch.randint(FIRST, END, (total,), generator=generator)
    special = torch.rand(total, generator=generator) < specials
    ids = torch.where(special, SPECIAL[ids % len(SPECIAL)], ids)
    return ids.to(DEVICE, dtype), torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


def options(**changed):
    return {"mask_id": MASK, "ordinary": (FIRST, END), "seed": 3, "step": 2} | changed


def assert_masked_as_defined(ids, cu_seqlens, count, **changed):
    before = ids.clone()
    ours = mask_tokens(ids, cu_seqlens, count, **options(**changed))
    theirs = mask_tokens_reference(ids, cu_seqlens, count, **options(**changed))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype and our.device == their.device
        assert torch.equal(our, their)
    assert torch.equal(ids, before)
    return ours


def test_the_kernel_is_what_runs_here():
    assert {choose("mask_tokens", DEVICE, dtype).backend for dtype in (torch.int32, torch.int64)} == {"triton"}


@parametrize_pairs(
    lengths=[(1,), (63,), (100,), (1000,), MIXED, (0, 0, 3, 0, 70, 1, 0)],
    dtype=[torch.int32, torch.int64],
    continues=[None, CONTINUES],
)
def test_sizes(lengths, dtype, continues):
    ids, cu_seqlens = batch(lengths, dtype=dtype)
    for count in (0, math.ceil(len(ids) / 4), len(ids)):
        assert_masked_as_defined(ids, cu_seqlens, count, continues=continues)


@pytest.mark.parametrize("continues", [None, CONTINUES], ids=["tokens", "words"])
def test_long_sequences(continues):
    # Those above take one warp, these four, and tiles of another size; the last tile is cut.
    lengths = (2 * LONG, 3 * LONG + 77, 5)
    assert sum(lengths) > LONG * len(lengths)
    ids, cu_seqlens = batch(lengths)
    for count in (len(ids) // 7, len(ids) // 2):
        assert_masked_as_defined(ids, cu_seqlens, count, continues=continues)


def test_many_short_sequences():
    ids, cu_seqlens = batch((3,) * (10_000 if NATIVE else 150))
    assert_masked_as_defined(ids, cu_seqlens, len(ids) // 4)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("specials", [0.5, 0.95, 1.0])
def test_many_special_tokens(specials, rate):
    ids, cu_seqlens = batch((40, 7, 150, 1), specials)
    _, _, labels = assert_masked_as_defined(ids, cu_seqlens, round(rate * len(ids)), continues=CONTINUES)
    # Surplus places are in the test.
    assert specials + rate <= 1 or (labels == -100).any()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens(lengths):
    ids, cu_seqlens = batch(lengths)
    assert [len(x) for x in assert_masked_as_defined(ids, cu_seqlens, 0)] == [0, 0, 0]


@pytest.mark.parametrize("replace", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.25)])
def test_other_shares_of_masked_and_random_tokens(replace):
    ids, cu_seqlens = batch((100, 28))
    assert_masked_as_defined(ids, cu_seqlens, 100, replace=replace)


@pytest.mark.parametrize("ordinary", [(0, 1), (50, 50), (0, 2**31 - 1)])
def test_other_ordinary_ids(ordinary):
    ids, cu_seqlens = batch((100, 28), dtype=torch.int32)
    assert_masked_as_defined(ids, cu_seqlens, 40, ordinary=ordinary, replace=(0.0, 1.0))


@pytest.mark.parametrize(
    ("seed", "step"), [(0, 0), (-1, -1), (2**32 + 5, 2**40), (2**63 - 1, 2**63 - 1), (-(2**63), -(2**63))]
)
def test_any_seed_and_step(seed, step):
    ids, cu_seqlens = batch((100, 28))
    by_number = assert_masked_as_defined(ids, cu_seqlens, 40, seed=seed, step=step)
    for shape in ((), (1,)):
        tensor = torch.full(shape, step, device=DEVICE)
        by_tensor = assert_masked_as_defined(ids, cu_seqlens, 40, seed=seed, step=tensor)
        assert all(torch.equal(a, b) for a, b in zip(by_number, by_tensor, strict=True))


def test_an_id_outside_the_table_begins_a_word():
    ids, cu_seqlens = batch((100, 28))
    ids[40] = ids[101] = VOCABULARY + 9
    wider = torch.cat((CONTINUES, torch.zeros(20, dtype=torch.bool, device=DEVICE)))
    expected = assert_masked_as_defined(ids, cu_seqlens, 40, continues=wider)
    found = mask_tokens(ids, cu_seqlens, 40, **options(continues=CONTINUES))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_tensors_with_gaps():
    ids, cu_seqlens = batch((100, 28))
    spacious = [torch.stack((x, torch.zeros_like(x)), -1).flatten()[::2] for x in (ids, cu_seqlens, CONTINUES)]
    assert not any(x.is_contiguous() for x in spacious)
    expected = mask_tokens(ids, cu_seqlens, 40, **options(continues=CONTINUES))
    found = assert_masked_as_defined(*spacious[:2], 40, continues=spacious[2])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# One fixture, which only sets the environment, serves all examples.
@given(
    lengths=st.lists(st.one_of(st.integers(0, 20), st.integers(100, 300)), min_size=1, max_size=6),
    rate=st.floats(0, 1),
    specials=st.sampled_from([0.0, 0.1, 0.6]),
    continues=st.sampled_from([None, CONTINUES]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@settings(
    max_examples=200 if NATIVE else 20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_batches(lengths, rate, specials, continues, seed):
    ids, cu_seqlens = batch(lengths, specials)
    assert_masked_as_defined(ids, cu_seqlens, round(rate * len(ids)), continues=continues, seed=seed)


def test_the_same_masks_every_time():
    ids, cu_seqlens = batch(MIXED if NATIVE else (100, 28))
    first, *others = (mask_tokens(ids, cu_seqlens, len(ids) // 4, **options()) for _ in range(20))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("continues", [None, CONTINUES], ids=["tokens", "words"])
def test_it_compiles_whole_for_any_batch_and_step(continues):
    torch.compiler.reset()
    counted = CompileCounterWithBackend("inductor" if NATIVE else "aot_eager")

    def run(ids, cu_seqlens, count, step):
        return mask_tokens(ids, cu_seqlens, count, **options(step=step, continues=continues))

    compiled = torch.compile(run, fullgraph=True, backend=counted)
    for number, lengths in enumerate(((9, 20), (20, 0, 31), (3,) * 7, (63,), (10, 20, 30))):
        ids, cu_seqlens = batch(lengths)
        arguments = ids, cu_seqlens, len(ids) // 4, 7 * number
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), run(*arguments), strict=True))
    # One for the first batch, one for all others.
    assert counted.frame_count == 2
    torch.compiler.reset()


@needs_gpu
def test_a_captured_graph_takes_another_step_each_time():
    ids, cu_seqlens = batch(MIXED)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def run():
        return mask_tokens(ids, cu_seqlens, 400, **options(step=step))

    run()  # compiles; a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for number in (5, 6, 2**40):
        step.fill_(number)
        graph.replay()
        expected = mask_tokens(ids, cu_seqlens, 400, **options(step=number))
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@needs_gpu
def test_the_host_does_not_wait():
    ids, cu_seqlens = batch(MIXED)
    step = torch.ones(1, dtype=torch.int64, device=DEVICE)
    mask_tokens(ids, cu_seqlens, 400, **options(step=step))
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask_tokens(ids, cu_seqlens, 400, **options(step=step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
