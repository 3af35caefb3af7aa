"""The Triton kernels of attention against PyTorch: native on a GPU, interpreted without one.

The rule: against the reference in fp64, an error at most twice that of the reference in the same dtype, in relative L2,
for the output and the gradient of qkv. All memory that is allocated on the way is NaN before it is written.

Shapes: T tokens, S places in one sequence, H heads, D head size.
"""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.config import PRESETS
from cramfast.kernels import Launch, choose, mask_tokens, varlen_attention, varlen_attention_reference
from cramfast.layers import UnpaddedSelfAttention
from cramfast.model import Bert

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
MARKS = [
    pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus"),
    # What no token sees is computed and not used, whatever it comes to; numpy, which interprets, warns of it.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered"),
]
pytestmark = MARKS

HALF, BF16 = torch.float16, torch.bfloat16
DTYPES = (HALF, BF16)
HEAD_SIZES = (32, 64, 96, 128)
MIXED = (1, 17, 63, 64, 100, 127, 128, 200, 256, 384, 512)
# A batch for each way through the kernels, at head size 64 on compute capability 9.0: the tile, or blocks, that its
# longest sequence leads to, with masks or, where all are as long and fill tiles or blocks, without. Some ways are the
# same on other cards.
PATHS = {
    "tiles of 64": (64, 64),
    "tiles of 64 with masks": (64, 20, 0, 40, 7, 33),
    "tiles of 128": (128, 128),
    "tiles of 128 with masks": (128, 100, 20, 0, 30),
    "blocks": (256,),
    "blocks with masks": (140, 20, 30, 0, 64),
}
if NATIVE:  # the interpreter takes those before for all lengths
    PATHS |= {"long blocks": (384,), "long blocks with masks": (260, 20, 30, 0, 64)}
DENSE = [path for path in PATHS if "masks" not in path]
paths = pytest.mark.parametrize("path", PATHS)
ATTENTION_FILE = importlib.import_module("cramfast.kernels.attention")


def randn(*shape, dtype=HALF, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def boundaries(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


def rotary(positions, head_size, dtype=torch.float32):
    angle = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(0, head_size, 2) / head_size)
    return {"cos": angle.cos().to(DEVICE, dtype), "sin": angle.sin().to(DEVICE, dtype)}


def batch(lengths, heads=1, head_size=64, dtype=HALF):
    """qkv, and a gradient for the output."""
    total = sum(lengths)
    return randn(total, 3, heads, head_size, dtype=dtype), randn(total, heads, head_size, dtype=dtype, seed=1)


def results(attend, qkv, grad, *arguments, **options):
    """The output of attend(qkv, ...), then the gradient of qkv, given that of the output."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv, *arguments, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def assert_as_exact(ours, theirs, exact):
    """The rule."""
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        error, allowed = (our.double() - true).norm(), 2 * (their.double() - true).norm()
        # Rounding a result once makes an error of about eps / 5: less is luck.
        assert error <= max(allowed, torch.finfo(our.dtype).eps / 4 * true.norm()), f"{error}, torch {allowed / 2}"


def assert_as_exact_as_the_reference(lengths, heads=1, head_size=64, dtype=HALF, max_seqlen=None, **options):
    qkv, grad = batch(lengths, heads, head_size, dtype)
    ours = results(varlen_attention, qkv, grad, boundaries(lengths), max_seqlen or max(lengths), **options)
    arguments = boundaries(lengths), max(lengths)  # padding no further
    theirs = results(varlen_attention_reference, qkv, grad, *arguments, **options)
    exact = results(varlen_attention_reference, qkv.double(), grad.double(), *arguments, **options)
    assert_as_exact(ours, theirs, exact)


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def assert_alike(results, others):
    """Two kernels' results of the same sums, added up in any order in fp32 and then rounded."""
    for a, b in zip(results, others, strict=True):
        assert (a.double() - b.double()).norm() <= torch.finfo(a.dtype).eps * b.double().norm()


def test_uninitialised_memory_is_poisoned():
    qkv, _ = batch((3,))
    for fresh in (torch.empty_like(qkv), qkv.new_empty(7), qkv.new_empty(7, dtype=torch.float32)):
        assert fresh.isnan().all()


def test_the_kernels_are_what_runs_here():
    assert {choose("varlen_attention", DEVICE, dtype).backend for dtype in DTYPES} == {"triton"}


@paths
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_through_the_kernels(path, dtype):
    assert_as_exact_as_the_reference(PATHS[path], dtype=dtype)


@pytest.mark.parametrize("path", DENSE)
def test_sequences_that_fill_tiles_or_blocks_need_no_masks(path, monkeypatch):
    lengths = PATHS[path] if NATIVE else PATHS[path][:1]
    qkv, grad, arguments = *batch(lengths), (boundaries(lengths), lengths[0])
    # A window as wide as the sequence asks for masks that leave nothing out.
    masked = results(varlen_attention, qkv, grad, *arguments, window=lengths[0])

    def group(*_):
        raise AssertionError("grouped")

    for name in ("group_sequences", "pack_sequences"):
        monkeypatch.setattr(ATTENTION_FILE, name, group)
    dense = results(varlen_attention, qkv, grad, *arguments)
    with pytest.raises(AssertionError, match="grouped"):
        varlen_attention(qkv, *arguments, window=lengths[0])
    exact = results(varlen_attention_reference, qkv.double(), grad.double(), *arguments)
    theirs = results(varlen_attention_reference, qkv, grad, *arguments)
    assert_as_exact(masked, theirs, exact)
    assert_as_exact(dense, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "head_size"),
    [
        (lengths, head_size)
        # T of 1, 63, 100 and 1000, in one sequence where one may be as long.
        for lengths in ((1,), (63,), (100,), (64,) * 15 + (40,), (512, 488))
        for head_size in HEAD_SIZES
        if NATIVE or (len(lengths) == 1 and head_size == 32) or (len(lengths) == 16 and head_size == 64)
    ],
)
def test_batches_of_every_size(lengths, head_size, dtype):
    assert_as_exact_as_the_reference(lengths, 1, head_size, dtype)


FORMS = ({}, {"window": 20}, {"window": 100}, {"softmax_scale": 0.3})


@pytest.mark.parametrize(
    ("head_size", "dtype", "options", "turned"),
    [*itertools.product(HEAD_SIZES, DTYPES, FORMS, (False, True))]
    if NATIVE
    else ((64, HALF, {}, False), (32, BF16, {"window": 20}, True)),
)
def test_all_lengths_in_one_batch(head_size, dtype, options, turned):
    tables = rotary(512, head_size) if turned else {}
    assert_as_exact_as_the_reference(MIXED, 1, head_size, dtype, **options, **tables)


@pytest.mark.parametrize(
    ("heads", "head_size"),
    [(4, 32), (3, 64), (2, 96), (1, 128), pytest.param(12, 64, marks=needs_gpu)],
)
@pytest.mark.parametrize("lengths", [(64, 64), (30, 64, 17)])
@pytest.mark.parametrize("turned", [False, True])
def test_heads_of_every_size_and_number(lengths, heads, head_size, turned):
    tables = rotary(64, head_size) if turned else {}
    assert_as_exact_as_the_reference(lengths, heads, head_size, BF16 if turned else HALF, **tables)


@pytest.mark.parametrize(("longest", "head_size"), [(60, 64), (128, 64), (128, 32), (200, 64)])
@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=["whole", "window"])
def test_angles_need_not_rise_evenly(longest, head_size, options):
    """Tables of something else than one angle for each step from a position to the next, as of places in an image."""
    position = torch.arange(longest)
    angle = torch.cat((position[:, None] // 16, position[:, None] % 16), dim=1).repeat_interleave(head_size // 4, dim=1)
    tables = {"cos": angle.cos().to(DEVICE), "sin": angle.sin().to(DEVICE)}
    lengths = (1, 17, 60, longest, 5, longest // 2)
    assert_as_exact_as_the_reference(lengths, 2, head_size, BF16, **options, **tables)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("lengths", [(0, 0, 5, 17), (5, 0, 0, 0, 17), (5, 17, 0, 0), (0,) * 30 + (64, 5) + (0,) * 30])
def test_sequences_without_a_token(lengths, head_size):
    assert_as_exact_as_the_reference(lengths, head_size=head_size)


@pytest.mark.parametrize("path", [path for path in PATHS if "masks" in path])
def test_groups_past_their_number_are_not_looked_at(path, monkeypatch):
    lengths = PATHS[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    expected = results(varlen_attention, qkv, grad, *arguments)
    group_sequences, pack_sequences = ATTENTION_FILE.group_sequences, ATTENTION_FILE.pack_sequences

    def group(*arguments):
        groups, bounds = group_sequences(*arguments)
        rest = groups[1 + int(groups[0, 0]) :]
        assert rest.numel()
        # Part of a sequence, for which everything would come out otherwise.
        rest.copy_(torch.tensor((3, 9)))
        return groups, bounds

    def pack(*arguments):
        count, places = pack_sequences(*arguments)
        rest = places[:, int(count) :]
        assert rest.numel()
        rest.copy_(torch.tensor((3, 1 << 8), device=rest.device)[:, None, None])
        return count, places

    monkeypatch.setattr(ATTENTION_FILE, "group_sequences", group)
    monkeypatch.setattr(ATTENTION_FILE, "pack_sequences", pack)
    assert same(results(varlen_attention, qkv, grad, *arguments), expected)


@pytest.mark.parametrize("short", [20, pytest.param(300, marks=needs_gpu)])
def test_one_long_sequence_among_short_ones(short):
    assert_as_exact_as_the_reference((3,) * short + (512 if NATIVE else 200,) + (3,) * short, head_size=32)


@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [((1,) * 150, 1), *(pytest.param((3,) * 10_000, n, marks=needs_gpu) for n in (3, 64, 128, 512))],
)
def test_many_short_sequences(lengths, max_seqlen):
    assert_as_exact_as_the_reference(lengths, head_size=32, max_seqlen=max_seqlen)


@pytest.mark.parametrize("max_seqlen", [18, 64, 65, 128, 129, 500, 512])
@pytest.mark.parametrize("head_size", HEAD_SIZES if NATIVE else [64])
def test_room_for_longer_sequences(max_seqlen, head_size):
    assert_as_exact_as_the_reference((5, 17, 0, 9), head_size=head_size, max_seqlen=max_seqlen)
    assert_as_exact_as_the_reference((18,), head_size=head_size, max_seqlen=max_seqlen, **rotary(512, head_size))


@paths
@pytest.mark.parametrize("softmax_scale", [0.02, 2.0])
def test_scores_of_any_size(path, softmax_scale):
    # Scores reach from where all weights are about the same to where one takes all.
    assert_as_exact_as_the_reference(PATHS[path], softmax_scale=softmax_scale)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("path", PATHS if NATIVE else ["tiles of 64 with masks", "blocks"])
def test_scores_far_from_zero(path, sign):
    lengths = PATHS[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    # All scores are around 160 or -160: a maximum that starts at 0, or is not taken off, ends in 0 / 0 or infinity.
    qkv[:, :2, :, 0] = 40
    qkv[:, 0, :, 0] *= sign
    ours = results(varlen_attention, qkv, grad, *arguments, softmax_scale=0.1)
    exact = results(varlen_attention_reference, qkv.double(), grad.double(), *arguments, softmax_scale=0.1)
    # Not beside PyTorch's own error: cuDNN's gradients are NaN here for some lengths.
    for our, true in zip(ours, exact, strict=True):
        assert (our - true).norm() <= torch.finfo(HALF).eps * true.norm()


@pytest.mark.parametrize("window", [0, 1, 20, 70, 2**40])
@pytest.mark.parametrize("lengths", [(64, 64), (17, 64, 30, 5), (128, 50), (200, 30)])
def test_a_window_is_a_mask(lengths, window):
    assert_as_exact_as_the_reference(lengths, head_size=32, window=window)


@pytest.mark.parametrize("window", [1, 100])
@pytest.mark.parametrize("head_size", [64, pytest.param(128, marks=needs_gpu)])
def test_a_window_across_the_blocks_of_a_long_sequence(head_size, window):
    assert_as_exact_as_the_reference((512,) if NATIVE else (320,), head_size=head_size, window=window)


def test_what_lies_outside_the_window_does_not_count():
    lengths, window, token = (200, 30), 5, 100
    qkv, grad = batch(lengths)
    arguments = boundaries(lengths), 200
    before = results(varlen_attention, qkv, grad, *arguments, window=window)
    qkv[token] *= -3
    after = results(varlen_attention, qkv, grad, *arguments, window=window)
    for reach, b, a in zip((window, 2 * window), before, after, strict=True):
        changed = (b != a).flatten(1).any(1).nonzero().flatten().tolist()
        # The gradient of a key is from queries that see it, whose other keys count there.
        assert changed == [*range(token - reach, token + reach + 1)]


TABLES = {
    "rotary tables": rotary,
    "longer tables": lambda positions, *rest: rotary(positions + 100, *rest),
    "other tables": lambda positions, head_size, dtype: {
        name: randn(positions, head_size // 2, dtype=dtype, seed=seed) for seed, name in ((5, "cos"), (6, "sin"))
    },
    "tables with gaps": lambda *shape: {name: table.T.contiguous().T for name, table in rotary(*shape).items()},
}


@paths
@pytest.mark.parametrize(
    ("tables", "dtype", "wide"),
    [*itertools.product(TABLES, DTYPES, (True, False))]
    if NATIVE
    else [*zip(TABLES, (HALF, BF16, BF16, HALF), (True, True, False, False), strict=True)],
)
def test_rotary_embedding_is_that_applied_outside(path, tables, dtype, wide):
    lengths = PATHS[path]
    options = TABLES[tables](max(lengths), 64, torch.float32 if wide else dtype)
    assert_as_exact_as_the_reference(lengths, dtype=dtype, **options)


@paths
def test_angles_of_zero_change_nothing(path):
    lengths = PATHS[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    none = {"cos": torch.ones(max(lengths), 32, device=DEVICE), "sin": torch.zeros(max(lengths), 32, device=DEVICE)}
    turned = results(varlen_attention, qkv, grad, *arguments, **none)
    assert_alike(turned, results(varlen_attention, qkv, grad, *arguments))


@pytest.mark.parametrize(("path", "turned"), [("tiles of 64 with masks", False), ("blocks", True)])
def test_tensors_with_gaps_and_gradients_of_one_number(path, turned):
    lengths = PATHS[path]
    qkv, grad = batch(lengths)
    spread = torch.stack((qkv, qkv), -1)[..., 0]
    edges = torch.stack((boundaries(lengths),) * 2, 1)[:, 0]
    tables = rotary(max(lengths), 64) if turned else {}
    grad = grad[:1, :1, :1].expand_as(grad)
    assert not (spread.is_contiguous() or edges.is_contiguous() or grad.is_contiguous())
    ours = results(varlen_attention, spread, grad, edges, max(lengths), **tables)
    plain = results(varlen_attention, qkv, grad.contiguous(), boundaries(lengths), max(lengths), **tables)
    assert same(ours, plain)
    leaf = qkv.detach().requires_grad_()
    varlen_attention(leaf, boundaries(lengths), max(lengths), **tables).sum().backward()
    ones = torch.ones_like(grad)
    assert torch.equal(leaf.grad, results(varlen_attention, qkv, ones, edges, max(lengths), **tables)[1])


def test_without_gradients_the_output_is_the_same():
    qkv, _ = batch((20, 9))
    arguments = qkv.requires_grad_(), boundaries((20, 9)), 64
    tracked = varlen_attention(*arguments)
    with torch.no_grad():
        plain = varlen_attention(*arguments)
    assert torch.equal(plain, tracked)
    assert tracked.requires_grad and not plain.requires_grad


def test_a_second_derivative_is_refused():
    qkv, _ = batch((20, 9))
    out = varlen_attention(qkv.requires_grad_(), boundaries((20, 9)), 64)
    with pytest.raises(RuntimeError, match=r"varlen_attention: .* differentiated twice"):
        torch.autograd.grad(out.float().square().sum(), qkv, create_graph=True)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_no_tokens(lengths, turned):
    qkv, grad = batch(lengths, 2)
    out, dqkv = results(varlen_attention, qkv, grad, boundaries(lengths), 64, **(rotary(64, 64) if turned else {}))
    assert (out.shape, dqkv.shape) == ((0, 2, 64), (0, 3, 2, 64))


@given(
    lengths=st.lists(
        st.one_of(st.integers(0, 70), st.integers(0, 512 if NATIVE else 100)), min_size=1, max_size=5 if NATIVE else 3
    ),
    heads=st.just(1) if NATIVE else st.integers(1, 2),  # each number is compiled anew
    head_size=st.sampled_from(HEAD_SIZES),
    room=st.sampled_from((0, 1, 50)),
    window=st.one_of(st.none(), st.integers(0, 100)),
    turned=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
# The fixtures set the stage alike for all examples.
@settings(
    max_examples=100 if NATIVE else 8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_batches(lengths, heads, head_size, room, window, turned, dtype):
    max_seqlen = min(max(*lengths, 1) + room, 512)
    tables = rotary(max_seqlen, head_size) if turned else {}
    assert_as_exact_as_the_reference(lengths, heads, head_size, dtype, max_seqlen, window=window, **tables)


@paths
def test_the_same_bits_every_time(path):
    lengths = PATHS[path] * (10 if NATIVE else 1)
    (qkv, grad), arguments = batch(lengths, 12 if NATIVE else 1), (boundaries(lengths), max(lengths))
    tables = rotary(max(lengths), 64)
    first, *others = (results(varlen_attention, qkv, grad, *arguments, **tables) for _ in range(20 if NATIVE else 3))
    assert all(same(first, other) for other in others)


# Two of one batch are too much for one group, so each is alone in its tile or its blocks: where sequences share a tile
# they meet in products of zeros, whose order of additions depends on the place. None is as long as max_seqlen, so that
# a batch of one takes the path with masks too.
ALONE = {64: (40, 63, 33, 50), 128: (70, 127, 65), 256: (200, 65, 90, 255, 70) if NATIVE else (150, 65, 70)}


def by_sequence(results, lengths):
    return [list(parts) for parts in zip(*(result.split(lengths) for result in results), strict=True)]


@pytest.mark.parametrize("max_seqlen", ALONE)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=needs_gpu),
        pytest.param({"window": 30} | rotary(256, 64), id="window, rotary"),
    ],
)
def test_a_sequence_knows_nothing_of_the_others(max_seqlen, options):
    lengths = ALONE[max_seqlen]
    given = by_sequence(batch(lengths, 2 if NATIVE else 1), lengths)
    alone = [results(varlen_attention, *x, boundaries(x[0].shape[:1]), max_seqlen, **options) for x in given]
    for order in (range(len(lengths)), [2, 0, *range(len(lengths) - 1, 2, -1), 1]):
        arranged = [lengths[i] for i in order]
        inputs = [torch.cat(parts) for parts in zip(*(given[i] for i in order), strict=True)]
        found = by_sequence(results(varlen_attention, *inputs, boundaries(arranged), max_seqlen, **options), arranged)
        assert all(same(found[place], alone[i]) for place, i in enumerate(order))


@pytest.mark.parametrize("max_seqlen", ALONE)
def test_what_is_not_finite_stays_in_its_sequence(max_seqlen):
    # In a tile that sequences share it would not: weights of 0 between them do not undo what is not finite.
    lengths, sick = ALONE[max_seqlen], 1
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max_seqlen)
    clean = by_sequence(results(varlen_attention, qkv, grad, *arguments), lengths)
    for tensor in (qkv, grad):
        of_sick = tensor.split(lengths)[sick]
        of_sick[7], of_sick[8] = float("nan"), float("inf")
    found = by_sequence(results(varlen_attention, qkv, grad, *arguments), lengths)
    for place, (before, after) in enumerate(zip(clean, found, strict=True)):
        if place == sick:
            assert all(x.isnan().any() for x in after)
        else:
            assert same(before, after)


@pytest.fixture
def met(monkeypatch):
    """A list of who is met on the way through varlen_attention: the hand-over, the reference, the kernels' groups."""
    names = []

    def watch(name):
        function = getattr(ATTENTION_FILE, name)

        def watched(*arguments, **options):
            names.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(ATTENTION_FILE, name, watched)

    for name in ("long_attention", "varlen_attention_reference", "group_sequences"):
        watch(name)
    return names


@pytest.mark.parametrize(
    ("dtype", "head_size", "max_seqlen"),
    [(torch.float32, 64, 64), (torch.float64, 64, 64), (HALF, 80, 64), (BF16, 16, 64), (HALF, 64, 513)],
)
def test_what_the_kernels_do_not_take_is_handed_over(monkeypatch, met, dtype, head_size, max_seqlen):
    qkv, _ = batch((20, 9), 2, head_size, dtype)
    arguments = qkv, boundaries((20, 9)), max_seqlen
    with pytest.raises(RuntimeError, match="CRAMFAST_KERNELS=triton, but varlen_attention cannot run as Triton"):
        varlen_attention(*arguments)
    assert met == ["long_attention"]
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    met.clear()
    out = varlen_attention(*arguments)
    by_reference = ["long_attention", "varlen_attention_reference"]
    if NATIVE and dtype.itemsize == 2:
        assert met[:1] == by_reference[:1] and "group_sequences" not in met
    else:
        assert met == by_reference
        assert torch.equal(out, varlen_attention_reference(*arguments))


def test_what_the_kernels_take_is_not_handed_over(monkeypatch, met):
    qkv, _ = batch((20, 9), 2)
    arguments = qkv, boundaries((20, 9)), 512
    for mode, expected in (("auto", "group_sequences"), ("reference", "varlen_attention_reference")):
        monkeypatch.setenv("CRAMFAST_KERNELS", mode)
        out = varlen_attention(*arguments)
        assert met == [expected]
        met.clear()
    assert torch.equal(out, varlen_attention_reference(*arguments))


@pytest.mark.parametrize("max_seqlen", [64, 128, 512])
@pytest.mark.parametrize("turned", [False, True])
def test_settings_do_not_depend_on_the_number_of_tokens(monkeypatch, max_seqlen, turned):
    launched = []
    # What would run: a setting is one such object, and compiled once.
    monkeypatch.setattr(Launch, "__call__", lambda self, *_: launched.append(self))
    tables, of_batch = rotary(max_seqlen, 64) if turned else {}, []
    for lengths in ((1,), (17, 5), (max_seqlen - 1, 9, 30) * 100, (3,) * 20_000):
        qkv, grad = batch(lengths)
        results(varlen_attention, qkv, grad, boundaries(lengths), max_seqlen, **tables)
        of_batch.append([*launched])
        launched.clear()
    assert len(of_batch[0]) >= 3  # groups, forward, backward
    assert all(launches == of_batch[0] for launches in of_batch)


def test_the_registered_operators_compute_what_eager_code_does():
    lengths = (30, 9, 0, 20)
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), 64)
    torch.compiler.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    for options in ({}, {"window": 5}, rotary(64, 64)):
        ours = results(compiled, qkv, grad, *arguments, **options)
        assert same(ours, results(varlen_attention, qkv, grad, *arguments, **options))
    torch.compiler.reset()


def test_a_compiled_function_serves_heads_of_other_sizes_and_numbers():
    torch.compiler.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    cu_seqlens = boundaries((9, 20))
    for heads, head_size in ((2, 32), (3, 32), (3, 64)):  # what has changed once is traced as a variable
        qkv, _ = batch((9, 20), heads, head_size)
        tables = rotary(64, head_size)
        expected = varlen_attention(qkv, cu_seqlens, 64, **tables)
        assert torch.equal(compiled(qkv, cu_seqlens, 64, **tables), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("max_seqlen", [64, 128, pytest.param(512, marks=needs_gpu)])
def test_a_layer_compiles_whole_for_any_number_of_tokens(max_seqlen):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = UnpaddedSelfAttention(32, 1).to(DEVICE, HALF)
    counted = CompileCounterWithBackend("inductor" if NATIVE else "aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counted)
    tables = rotary(max_seqlen, 32)
    for lengths in ((9, 20), (max_seqlen, 5, 0, 31), (3,) * 7, (max_seqlen - 1,)):
        x, grad = randn(sum(lengths), 32), randn(sum(lengths), 32, seed=1)
        arguments = boundaries(lengths), max_seqlen
        parameters = [*layer.parameters()]
        found = []
        for call in (compiled, layer):
            leaf = x.detach().requires_grad_()
            out = call(leaf, *arguments, **tables)
            found.append([out.detach(), *torch.autograd.grad(out, [leaf, *parameters], grad)])
        # The same kernels on the same numbers, and the same products.
        assert same(*found)
    # One for the first batch, one for all others.
    assert counted.frame_count == 2
    torch.compiler.reset()


TINY = PRESETS["cramfast-tiny"]
if not NATIVE:
    TINY = replace(TINY, vocab_size=97, hidden_size=64, num_heads=2, intermediate_size=64, num_layers=1)


def losses(steps, lengths, weights=torch.float32, products=torch.float32):
    """The losses of some steps on text with a period of 7, with weights and matrix products in these dtypes."""
    torch.manual_seed(0)
    model = Bert(TINY).to(DEVICE, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-12)
    cu_seqlens, total = boundaries(lengths), sum(lengths)
    text = 5 + torch.arange(total, device=DEVICE) % 7 * 11
    found = []
    for number in range(steps):
        ids, positions, labels = mask_tokens(
            text, cu_seqlens, total // 4, mask_id=4, ordinary=(5, 97), seed=0, step=number
        )
        with torch.autocast(DEVICE.type, products, enabled=products != torch.float32):
            loss = model(ids, cu_seqlens, max(lengths), positions, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().double())
    return torch.stack(found)


def test_training_on_ragged_text_follows_the_curve_of_the_reference(monkeypatch):
    steps, lengths = (50, (128, 100, 20, 30, 65, 128, 1) * 8) if NATIVE else (4, (20, 9, 3))
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    ours = losses(steps, lengths, products=BF16)
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")
    theirs, exact = losses(steps, lengths, products=BF16), losses(steps, lengths, torch.float64)
    assert exact[-1] < exact[0]
    assert not torch.equal(ours, theirs)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
