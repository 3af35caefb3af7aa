"""What only a GPU shows of attention: full sizes, graphs, streams, memory, and that the host waits for nothing.

Shapes: T tokens, H heads, D head size.
"""

import functools
import gc

import pytest
import torch
from test_attention import (
    BF16,
    DEVICE,
    HALF,
    MARKS,
    MIXED,
    PATHS,
    assert_alike,
    assert_as_exact_as_the_reference,
    batch,
    boundaries,
    needs_gpu,
    randn,
    results,
    rotary,
    same,
)

import cramfast.kernels.attention as file
from cramfast.kernels import varlen_attention

pytestmark = [*MARKS, needs_gpu]

HEADS = 12
# Every way through the kernels, at a size that fills a GPU.
FULL = {path: 20 * lengths for path, lengths in PATHS.items()}
paths = pytest.mark.parametrize("path", FULL)
OPTIONS = {"plain": {}, "rotary": rotary(512, 64), "dropout": {"dropout_p": 0.2}, "window": {"window": 20}}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def ragged(low, high, total):
    """Lengths between the two, `total` in sum."""
    generator = torch.Generator().manual_seed(high)
    lengths = []
    while total > 0:
        lengths.append(min(total, int(torch.randint(low, high + 1, (1,), generator=generator))))
        total -= lengths[-1]
    return tuple(lengths)


def captured(function):
    """A graph of function(), and what it returns, which every replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles; a capture may not
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return graph, found


@pytest.mark.parametrize(
    "lengths",
    [64 * (128,), 32 * (256,), 16 * (512,), ragged(16, 128, 8192), ragged(32, 512, 8192)],
    ids=["all-128", "all-256", "all-512", "ragged-16-128", "ragged-32-512"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_batches_as_models_have_them(lengths, turned):
    tables = rotary(max(lengths), 64) if turned else {}
    assert_as_exact_as_the_reference(lengths, HEADS, 64, BF16, **tables)


@paths
def test_tensors_that_vector_loads_do_not_fit(path):
    lengths = FULL[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    shifted = torch.empty(qkv.numel() + 1, dtype=HALF, device=DEVICE)[1:].view(qkv.shape).copy_(qkv)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 == 2
    assert_alike(*(results(varlen_attention, x, grad, *arguments) for x in (shifted, qkv)))


@paths
@options
def test_the_host_waits_for_nothing(path, options):
    lengths = FULL[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    results(varlen_attention, qkv, grad, *arguments, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(varlen_attention, qkv, grad, *arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("max_seqlen", [64, 128, 512])
@pytest.mark.parametrize("turned", [False, True])
def test_a_graph_serves_batches_cut_in_another_way(max_seqlen, turned):
    # As many tokens and sequences every time, in other places.
    ways = [tuple(min(n, max_seqlen) for n in way) for way in (MIXED, MIXED[::-1], MIXED[5:] + MIXED[:5])]
    total = sum(ways[0])
    ways.append((max_seqlen,) * (total // max_seqlen) + (total % max_seqlen,))
    ways[-1] += (0,) * (len(MIXED) - len(ways[-1]))
    (qkv, grad), cu_seqlens = batch(ways[0], HEADS), boundaries(ways[0])
    tables = rotary(max_seqlen, 64) if turned else {}
    graph, found = captured(lambda: results(varlen_attention, qkv, grad, cu_seqlens, max_seqlen, **tables))
    for seed, way in enumerate((*ways, ways[0])):
        qkv.copy_(randn(*qkv.shape, seed=100 + seed))
        cu_seqlens.copy_(boundaries(way))
        graph.replay()
        assert same(found, results(varlen_attention, qkv, grad, cu_seqlens, max_seqlen, **tables))


@paths
@pytest.mark.parametrize("options", [{}, rotary(512, 64)], ids=["plain", "rotary"])
def test_gradients_accumulate_in_a_graph_as_they_do_in_eager_code(path, options):
    lengths, sums = FULL[path], []
    arguments = boundaries(lengths), max(lengths)
    for graphed in (True, False):
        qkv, grad = batch(lengths)
        qkv.requires_grad_().grad = torch.zeros_like(qkv)

        def accumulate(qkv=qkv, grad=grad):
            varlen_attention(qkv, *arguments, **options).backward(grad)

        step = captured(accumulate)[0].replay if graphed else accumulate
        qkv.grad.zero_()
        for seed in range(5):
            with torch.no_grad():
                qkv.copy_(randn(*qkv.shape, seed=100 + seed))
            step()
        sums.append(qkv.grad)
    graphed, eager = sums
    assert graphed.any()
    assert torch.equal(graphed, eager)


@paths
def test_every_replay_drops_anew_and_backward_what_forward_dropped(path):
    lengths = FULL[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    graph, (out, dqkv) = captured(lambda: results(varlen_attention, qkv, grad, *arguments, dropout_p=0.5))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(out.clone())
        # The output is linear in the values as long as the same weights are dropped: <out, dout> = <v, dv>.
        out_side, value_side = (out.double() * grad).sum(), (qkv[:, 2].double() * dqkv[:, 2]).sum()
        # Every product carries the rounding of one factor, and they add up like a random walk.
        size = (out.double() * grad).norm() + (qkv[:, 2].double() * dqkv[:, 2]).norm()
        assert abs(out_side - value_side) <= 5 * torch.finfo(HALF).eps * size
    assert not any(torch.equal(a, b) for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])))


@paths
@options
def test_kernels_run_in_the_current_stream(path, options):
    lengths = FULL[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    torch.manual_seed(0)
    expected = results(varlen_attention, qkv, grad, *arguments, **options)
    late = torch.zeros_like(qkv)
    late_edges = torch.zeros_like(arguments[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.manual_seed(0)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which a kernel of another stream would read the zeros
        late.copy_(qkv)
        late_edges.copy_(arguments[0])
        found = results(varlen_attention, late, grad, late_edges, arguments[1], **options)
    stream.synchronize()
    assert same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@paths
def test_kernels_run_on_the_device_of_their_tensors(path):
    lengths = FULL[path]
    (qkv, grad), arguments = batch(lengths), (boundaries(lengths), max(lengths))
    tables = rotary(max(lengths), 64)
    expected = results(varlen_attention, qkv, grad, *arguments, **tables)
    other = torch.device("cuda", 1)
    tables = {name: table.to(other) for name, table in tables.items()}
    found = results(varlen_attention, qkv.to(other), grad.to(other), arguments[0].to(other), arguments[1], **tables)
    assert all(x.device == other for x in found)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert same([x.to(DEVICE) for x in found], expected)


def requested(function):
    """What function() returns, and how many bytes its tensors took in all at the worst."""
    gc.collect()  # or what earlier tests left is freed meanwhile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = function()
    return found, torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@paths
def test_memory_is_taken_for_results_alone(path, monkeypatch):
    lengths = FULL[path]
    (qkv, grad), arguments = batch(lengths, HEADS), (boundaries(lengths), max(lengths))
    results(varlen_attention, qkv, grad, *arguments)
    of_groups = [0]

    def counted(function, *arguments):
        tensors = function(*arguments)
        of_groups.append(sum(x.nbytes for x in tensors))
        return tensors

    for name in ("group_sequences", "pack_sequences"):
        monkeypatch.setattr(file, name, functools.partial(counted, getattr(file, name)))
    qkv.requires_grad_()
    out, forward = requested(lambda: varlen_attention(qkv, *arguments))
    of_rows = 4 * HEADS * len(qkv)  # a number in fp32 for each row and head: lse, or delta
    assert forward == out.nbytes + of_rows + of_groups[-1]
    _, backward = requested(lambda: torch.autograd.grad(out, qkv, grad))
    # Where blocks are gone over twice they need delta: always if long, else on cards for which other ways are not.
    assert qkv.nbytes + (of_rows if path.startswith("long") else 0) <= backward <= qkv.nbytes + of_rows


def test_more_elements_than_32_bits_count():
    if torch.cuda.get_device_properties(DEVICE).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    for lengths, max_seqlen in (((63, 40), 64), ((127, 70), 128), ((255, 130), 256)):
        sequences = -(-(2**31) // (3 * HEADS * 64 * sum(lengths))) + 1
        many = lengths * sequences
        qkv = torch.randn(sum(many), 3, HEADS, 64, dtype=HALF, device=DEVICE)
        assert qkv.numel() > 2**31
        grad = torch.randn(sum(many), HEADS, 64, dtype=HALF, device=DEVICE)
        found = results(varlen_attention, qkv, grad, boundaries(many), max_seqlen, **rotary(max_seqlen, 64))
        # Two of these lengths are too much for one group, so the others change not a bit of it.
        last = slice(-10 * sum(lengths), None)
        few = results(
            varlen_attention, qkv[last], grad[last], boundaries(10 * lengths), max_seqlen, **rotary(max_seqlen, 64)
        )
        assert same([x[last] for x in found], few)
        assert all(x.isfinite().all() for x in found)
        del qkv, grad, found
        torch.cuda.empty_cache()
