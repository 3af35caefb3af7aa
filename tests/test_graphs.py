"""Training steps as CUDA graphs: the same numbers, bit for bit, as the same work without them.

The first tests need no GPU: whichever way work takes, it is done once.
"""

import contextlib
import gc
import types
from dataclasses import replace

import pytest
import torch

from cramfast.config import PRESETS, OptimizerOptions
from cramfast.data.batches import Batch, Cursor
from cramfast.data.tokenizer import SpecialIds
from cramfast.model import Bert
from cramfast.train import graphs as module
from cramfast.train.checkpoint import load_checkpoint, save_checkpoint
from cramfast.train.graphs import Graphs
from cramfast.train.step import TrainStep

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")

VOCABULARY = 512
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, VOCABULARY))
OPTIONS = OptimizerOptions(lr=1e-3, weight_decay=0.01, clip=1.0)
FAMILIES = ("bert-mini", "crammed-bert", "cramfast-tiny")
TOKENS, LONGEST, RATE = 2048, 64, 0.25
PARTS = (1, 3, 2, 1, 2)  # microbatches of one update after the other


# Which way work takes


class Recorded:
    """A CUDA graph that needs no GPU: replaying it does the work."""

    def __init__(self, work):
        self.replay = work


@pytest.fixture
def recording(monkeypatch):
    """`Graphs` as on a GPU, of graphs that are `Recorded`; capturing work of a key in `refused` fails."""
    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    graphs = Graphs(torch.device("cuda"))
    graphs.refused = set()

    def capture(key, work):
        if key in graphs.refused:
            graphs.obstacle = "refused"
            return False
        graphs._graphs[key] = Recorded(work)
        return True

    graphs.capture = capture
    return graphs


@pytest.mark.parametrize("refused", [set(), {0}, {1}, {5}, {0, 1, 5}])
def test_work_is_done_once_a_call(recording, refused):
    recording.refused = refused
    done = []
    keys = [0, 0, 1, 0, 1, 5, *range(40), *range(40), 0, 5]
    for key in keys:
        recording.run(key, lambda key=key: done.append(key))
    assert done == keys
    assert len(recording._graphs) <= module._MOST_GRAPHS
    assert (recording.obstacle is None) == (not refused)
    assert not refused & recording._graphs.keys()


def test_what_is_forgotten_is_captured_again(recording):
    done = []
    for key in (0, 1, 0):
        recording.run(key, lambda key=key: done.append(key))
    pool = recording._pool
    recording.forget()
    assert not recording._graphs and recording._pool is not pool
    for key in (1, 0, 1):
        recording.run(key, lambda key=key: done.append(key))
    assert done == [0, 1, 0, 1, 0, 1]
    assert recording._graphs.keys() == {0, 1}


@pytest.mark.parametrize(
    ("device", "enabled", "obstacle"), [("cpu", True, "cpu device"), ("cuda", False, "not asked for")]
)
def test_where_there_are_none_it_says_why(device, enabled, obstacle):
    graphs, done = Graphs(torch.device(device), enabled), []
    for key in (0, 1, 0):
        graphs.run(key, lambda key=key: done.append(key))
    graphs.forget()
    assert done == [0, 1, 0]
    assert graphs.obstacle == obstacle


# On a GPU


def make_step(graphs: bool, dtype=torch.bfloat16, family: str = "cramfast-tiny", activations="keep", **settings):
    torch.manual_seed(0)
    # Heads of 64, for which there are kernels, in every family.
    config = replace(PRESETS[family], vocab_size=VOCABULARY, hidden_size=256, num_heads=4, num_layers=2)
    model = Bert(replace(config, intermediate_size=512), activations=activations).to(DEVICE).train()
    return TrainStep(model, OPTIONS, SPECIAL, dtype, seed=0, graphs=graphs, **settings)


def make_batch(number: int, tokens: int = TOKENS) -> Batch:
    """As many tokens each time, in 33 sequences or some dozens more."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(*SPECIAL.ordinary, (tokens,), generator=generator)
    lengths, least = [], (LONGEST, 40, 8)[number % 3]
    while sum(lengths) < tokens:
        length = int(torch.randint(least, LONGEST + 1, (), generator=generator))
        lengths.append(min(length, tokens - sum(lengths)))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    if NATIVE:
        ids, ends = ids.pin_memory(), ends.pin_memory()
    return Batch(ids, ends, LONGEST, 0, Cursor())


def gradient(step: TrainStep) -> torch.Tensor:
    """The whole buffer, copied."""
    return step.weights.gradient.clone()


def state(step: TrainStep) -> dict[str, torch.Tensor]:
    """All that training goes on with, copied."""
    tensors = {"weights": step.weights.master, "working": step.weights.working, **step.tensors()}
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}


def same_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def train(step: TrainStep, parts=PARTS, first: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    """Updates of so many microbatches each; their losses, norms and whether they were skipped (updates, 3)."""
    results, number = [], first
    for update, count in enumerate(parts):
        for _ in range(count):
            step.accumulate(make_batch(number, tokens), RATE, number, 1 / count)
            number += 1
        result = step.update(1e-3 * (1 + update))
        results.append((result.loss, result.gradient_norm, result.skipped))
    return torch.stack([torch.stack(result) for result in results])


def assert_graphed(step: TrainStep) -> None:
    assert step.graphs.obstacle is None
    # A first microbatch, one that is added, and the update, at the least.
    assert len(step.graphs._graphs) >= 3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_in_graphs_is_training_without(family, dtype):
    graphed, eager = (make_step(graphs, dtype, family) for graphs in (True, False))
    assert torch.equal(train(graphed), train(eager))
    assert_graphed(graphed)
    assert eager.graphs.obstacle == "not asked for" and not eager.graphs._graphs
    assert same_bits(state(graphed), state(eager))
    assert len({room for _, room in graphed._batches}) > 1


@needs_gpu
@pytest.mark.parametrize("activations", ["lean", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_saved_for_the_backward_pass(family, activations):
    graphed, eager = (make_step(graphs, family=family, activations=activations) for graphs in (True, False))
    assert torch.equal(train(graphed), train(eager))
    assert_graphed(graphed)
    assert same_bits(state(graphed), state(eager))


@needs_gpu
def test_whole_words_in_graphs():
    continues = (torch.arange(VOCABULARY) % 3 == 1).to(DEVICE)
    graphed, eager = (make_step(graphs, continues=continues) for graphs in (True, False))
    assert torch.equal(train(graphed), train(eager))
    assert_graphed(graphed)
    assert same_bits(state(graphed), state(eager))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulate_in_graphs_as_they_do_without(dtype):
    graphed, eager = (make_step(graphs, dtype) for graphs in (True, False))
    for parts in (1, 3, 2, 4):
        for number in range(parts):
            for step in (graphed, eager):
                step.accumulate(make_batch(number), RATE, number, 1 / parts)
            assert torch.equal(gradient(graphed), gradient(eager))
            assert torch.equal(graphed._loss, eager._loss)
        assert gradient(graphed).any() and gradient(graphed).isfinite().all()
        for step in (graphed, eager):
            step.update(1e-3)
    assert_graphed(graphed)


@needs_gpu
def test_a_microbatch_replaces_what_an_update_left():
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    train(graphed)
    train(eager)
    for view in graphed.weights.by_name(graphed.weights.gradient).values():
        view.fill_(torch.nan)
    for step in (graphed, eager):
        step.accumulate(make_batch(0), RATE, 0, 1.0)
    assert_graphed(graphed)
    assert torch.equal(gradient(graphed), gradient(eager))


@needs_gpu
def test_a_skipped_update_in_a_graph_changes_nothing():
    step = make_step(True)
    train(step)
    before = state(step)
    step.accumulate(make_batch(0), RATE, 0, 1.0)
    step.weights.gradient[5] = torch.inf
    assert step.update(1e-3).skipped == 1
    assert same_bits(state(step), before)
    assert train(step)[:, 2].sum() == 0


@needs_gpu
@pytest.mark.parametrize("scale", [2.0**16, 2.0**40])
def test_loss_scaling_in_graphs(scale):
    parts = (1, 2) * 15
    graphed, eager = (make_step(graphs, torch.float16) for graphs in (True, False))
    results = []
    for step in (graphed, eager):
        step.loss_scale.fill_(scale)
        results.append(train(step, parts))
    assert results[0].nan_to_num().equal(results[1].nan_to_num())
    assert_graphed(graphed)
    assert same_bits(state(graphed), state(eager))
    skipped = results[0][:, 2].sum().item()
    assert graphed.loss_scale == scale / 2**skipped
    assert graphed.good_steps > 0
    assert skipped > 0 or scale == 2.0**16


@needs_gpu
def test_other_work_between_the_updates_disturbs_nothing():
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    kept, wanted = [], []
    for round_ in range(4):
        wanted.append(train(eager, (2, 1), first=3 * round_))
        kept.append(train(graphed, (2, 1), first=3 * round_))
        batch = make_batch(50 + round_)
        ids, ends = batch.input_ids.to(DEVICE), batch.cu_seqlens.to(DEVICE)
        places = torch.arange(0, TOKENS, 5, device=DEVICE)
        losses = [step.model.score(ids, ends, LONGEST, places, ids[places])[0] for step in (graphed, eager)]
        garbage = torch.full((64, 2**20), torch.nan, device=DEVICE)
        assert torch.equal(*losses)
        del garbage
    assert_graphed(graphed)
    # What an update reports stays as it was then.
    assert torch.equal(torch.cat(kept), torch.cat(wanted))
    assert same_bits(state(graphed), state(eager))


@needs_gpu
def test_weights_that_are_loaded_are_those_that_graphs_use(tmp_path):
    step = make_step(True)
    train(step, (1, 2))
    path = save_checkpoint(tmp_path, 2, step.model, step.tensors(), {}, keep=1)
    results = train(step, (2, 1), first=10)
    wanted = state(step)
    load_checkpoint(path, step.model, step.tensors())
    step.weights.refresh()
    assert torch.equal(train(step, (2, 1), first=10), results)
    assert same_bits(state(step), wanted)

    other = make_step(True)
    train(other, (3,), first=20)
    load_checkpoint(path, other.model, other.tensors())
    other.weights.refresh()
    assert torch.equal(train(other, (2, 1), first=10), results)
    assert same_bits(state(other), wanted)
    assert_graphed(other)


@needs_gpu
def test_shapes_beyond_the_most_graphs_run_without(monkeypatch):
    monkeypatch.setattr(module, "_MOST_GRAPHS", 2)
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    assert torch.equal(train(graphed), train(eager))
    assert len(graphed.graphs._graphs) == 2
    assert same_bits(state(graphed), state(eager))


def reads_back(step: TrainStep, when) -> None:
    """The model waits for the device in its forward pass, on batches for which `when(tokens)` holds."""
    forward = step.model.forward

    def reading(input_ids, *arguments):
        loss = forward(input_ids, *arguments)
        if when(input_ids.numel()):
            loss.item()
        return loss

    step.model.forward = reading


@needs_gpu
def test_a_model_that_cannot_be_captured_trains_without_graphs():
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    reads_back(graphed, lambda _: True)
    assert torch.equal(train(graphed), train(eager))
    assert graphed.graphs.obstacle
    assert len(graphed.graphs.obstacle.splitlines()) == 1
    assert same_bits(state(graphed), state(eager))


@needs_gpu
def test_a_shape_that_cannot_be_captured_comes_after_others():
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    reads_back(graphed, lambda tokens: tokens == TOKENS // 2)
    for tokens in (TOKENS, TOKENS // 2, TOKENS, TOKENS // 2):
        assert torch.equal(train(graphed, tokens=tokens), train(eager, tokens=tokens))
    assert graphed.graphs.obstacle
    assert same_bits(state(graphed), state(eager))


@needs_gpu
def test_a_capture_that_failed_leaves_random_numbers_and_the_stream_as_they_were():
    graphs, drawn, stream = Graphs(DEVICE), [], torch.cuda.current_stream()
    graphs.run(0, lambda: torch.rand(4, device=DEVICE).sum().item())
    assert graphs.obstacle
    assert torch.cuda.current_stream() == stream
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(torch.rand(4, device=DEVICE))
    assert torch.equal(*drawn)


@needs_gpu
def test_references_train_alike_with_graphs_and_without(reference):
    graphed, eager = (make_step(graphs, torch.float32) for graphs in (True, False))
    # torch's own index operations are not the same every time.
    results = [train(step, (1, 2)) for step in (graphed, eager)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)
    for name, tensor in state(eager).items():
        assert (state(graphed)[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


@needs_gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_device(dtype, graphs):
    step = make_step(graphs, dtype)
    batches = [make_batch(number) for number in range(6)]
    torch.cuda.synchronize()

    def run():
        for number, batch in enumerate(batches):
            step.accumulate(batch, RATE, number, 1 / 3)
            if number % 3 == 2:
                result = step.update(1e-3)
        return result

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.loss)
    assert not graphs or step.graphs.obstacle is None


def reserved() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@needs_gpu
def test_reset_gives_the_memory_of_graphs_back():
    step = make_step(True)
    # What libraries keep for good is taken by a first, small one.
    train(step, (2,), tokens=256)
    step.reset()
    before = reserved()
    train(step, (2,), tokens=32 * TOKENS)
    assert_graphed(step)
    taken = reserved() - before
    assert taken > 64 * 2**20
    step.reset()
    assert not step.graphs._graphs
    assert reserved() - before <= taken / 10


@needs_gpu
def test_training_goes_on_in_graphs_after_a_reset():
    """As when memory runs out: half an update is forgotten, and smaller microbatches follow."""
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    results = []
    for step in (graphed, eager):
        first = train(step, (1, 2))
        step.accumulate(make_batch(90), RATE, 90, 0.5)
        step.reset()
        results.append(torch.cat((first, train(step, (2, 4, 2), first=10, tokens=TOKENS // 2))))
    assert torch.equal(*results)
    assert_graphed(graphed)
    assert {key[0] for key in graphed.graphs._graphs if key != "update"} == {TOKENS // 2}
    assert same_bits(state(graphed), state(eager))


@needs_gpu
def test_memory_that_runs_out_in_a_capture_is_for_the_caller_to_handle():
    graphed, eager = (make_step(graphs) for graphs in (True, False))
    results = []
    for step in (graphed, eager):
        first = train(step, (1,))
        forward, calls = step.model.forward, []

        def runs_out(*arguments, forward=forward, calls=calls):
            calls.append(arguments)
            loss = forward(*arguments)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

        step.model.forward = runs_out
        with pytest.raises(torch.OutOfMemoryError):
            step.accumulate(make_batch(1, 2 * TOKENS), RATE, 1, 1.0)
        step.reset()
        results.append(torch.cat((first, train(step, (2, 1), first=10))))
    assert graphed.graphs.obstacle is None
    assert torch.equal(*results)
    assert same_bits(state(graphed), state(eager))
