"""Accelerated models whose layers are CUDA graphs for shapes that come again, beside the same without graphs.

On a CPU a graph is the work that was captured, which a replay does once more.
"""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from conftest import NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_accelerate import VOCABULARY, made
from test_accelerate_tape import AMP, DEVICE, assert_close
from torch.utils.checkpoint import checkpoint

import cramfast
from cramfast.accelerated import graphs as module
from cramfast.accelerated.batch import Batch
from cramfast.accelerated.graphs import Replays, Shape, replays_of

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("triton_kernels", "embed_by_reference"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # Triton's interpreter
]


class Imitated:
    """`Graphs` that need no GPU."""

    def __init__(self, device):
        self.obstacle, self.work = None, {}

    def run_aside(self, work):
        work()

    def capture(self, key, work):
        self.work[key] = work
        return True

    def replay(self, key):
        self.work[key]()

    def forget(self):
        self.work.clear()


@pytest.fixture(autouse=True)
def replayed(monkeypatch):
    """How often forward and backward passes were replayed."""
    kind, counts = module.Graphs if NATIVE else Imitated, Counter()

    class Counted(kind):
        def replay(self, key):
            counts[key[1]] += 1
            super().replay(key)

    monkeypatch.setattr(module, "Graphs", Counted)
    if not NATIVE:  # whose interpreter computes what shapes are filled with, too
        monkeypatch.setattr(module, "_LEAST_STEP", 32)
    return counts


def model_of(name="Bert", graphs=True, dtype=torch.float32, layers=1, **options):
    options["n_layers" if name == "DistilBert" else "num_hidden_layers"] = layers
    model = made(name, "ForSequenceClassification", dtype=dtype, **options).to(DEVICE)
    cramfast.accelerate(model, graphs=graphs)
    return model


def batch_of(*lengths, seed=1):
    """Arguments of a classifier of sequences that are so long."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 2}
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


def loss_of(model, arguments):
    with torch.autocast(DEVICE, AMP):
        return model(**arguments).loss


def gradients_of(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def step(model, arguments):
    """Loss and gradients of one batch."""
    model.zero_grad()
    loss = loss_of(model, arguments)
    loss.backward()
    return loss.detach(), gradients_of(model)


def assert_same(mine, theirs):
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-2, atol=1e-3)
    assert_close(mine[1], theirs[1])


BATCHES = [batch_of(*lengths) for lengths in ((5, 10, 2), (10, 10, 10), (2, 3, 10), (22, 22, 22), (1, 2, 1))]


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert"])
def test_losses_and_gradients_are_those_without_graphs(name, replayed):
    graphed, plain = model_of(name, layers=2), model_of(name, layers=2, graphs=False)
    for arguments in (*BATCHES, BATCHES[3]):
        assert_same(step(graphed, arguments), step(plain, arguments))
    # All but the fourth batch are of one shape, which the second batch records.
    assert replayed == {"forward": 4, "backward": 4}


def test_a_model_in_16_bits(replayed):
    graphed, plain = model_of(dtype=AMP), model_of(dtype=AMP, graphs=False)
    for arguments in BATCHES[:3]:
        assert_same(step(graphed, arguments), step(plain, arguments))
    assert replayed["backward"] == 2


def test_gradients_are_collected_and_belong_to_nobody_else(replayed):
    model, plain = model_of(), model_of(graphs=False)
    step(model, BATCHES[0])
    for each in (model, plain):
        each.zero_grad()
        for arguments in BATCHES[:3]:
            loss_of(each, arguments).backward()
    assert replayed["backward"] == 3
    assert_close(gradients_of(model), gradients_of(plain))
    kept = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in kept]
    step(model, BATCHES[1])
    assert all(torch.equal(grad, value) for grad, value in zip(kept, values, strict=True))


def test_gradients_of_the_layers_come_in_one_allocation():
    """Which autograd takes over as they are: copies of each would cost what the graphs save."""
    model = model_of()
    for arguments in BATCHES[:2]:
        step(model, arguments)
    model.zero_grad()
    loss_of(model, BATCHES[0]).backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in model.bert.encoder.parameters()}
    assert len(storages) == 1


def test_updated_weights_count(replayed):
    losses = {}
    for graphs in (True, False):
        model = model_of(graphs=graphs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses[graphs] = []
        for arguments in 2 * BATCHES[:3]:
            losses[graphs].append(step(model, arguments)[0])
            optimizer.step()
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=2e-2, atol=2e-3)
    assert replayed["backward"] == 5
    assert losses[True][0] != losses[True][3]


def test_dropout_is_drawn_again_in_every_replay():
    model = model_of(dropout=0.3)
    losses = [step(model, BATCHES[0])[0].item() for _ in range(5)]
    assert len(set(losses)) == 5


def test_passes_that_overlap_are_computed_without_graphs(replayed):
    model, plain = model_of(), model_of(graphs=False)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    before = replayed["forward"]
    for each in (model, plain):
        each.zero_grad()
        first, second = (loss_of(each, arguments) for arguments in BATCHES[:2])
        (first + 2 * second).backward()
    assert replayed["forward"] == before + 1
    assert_close(gradients_of(model), gradients_of(plain))
    del first, second
    step(model, BATCHES[2])
    assert replayed["forward"] == before + 2


def test_a_result_that_is_kept_is_no_obstacle(replayed):
    """As in a loop whose loss is there until the next one takes its name."""
    model, plain, kept = model_of(), model_of(graphs=False), []
    for arguments in BATCHES[:3]:
        for each in (model, plain):
            each.zero_grad()
            kept.append(loss_of(each, arguments))
            kept[-1].backward()
        assert_close(gradients_of(model), gradients_of(plain))
    assert replayed == {"forward": 2, "backward": 2}


def test_parameters_that_layers_share_have_one_gradient(replayed):
    model, plain = model_of(layers=2), model_of(layers=2, graphs=False)
    for each in (model, plain):
        first, second = each.bert.encoder.layer
        second.output.dense = first.output.dense
        second.attention.output.LayerNorm.weight = first.attention.output.LayerNorm.weight
    for arguments in BATCHES[:3]:
        assert_same(step(model, arguments), step(plain, arguments))
    assert replayed["backward"] == 2


def test_a_result_that_nobody_needs_any_more_makes_room(replayed):
    model = model_of()
    for arguments in BATCHES[:2]:
        step(model, arguments)
    before = replayed["forward"]
    loss_of(model, BATCHES[0])
    loss_of(model, BATCHES[1])
    assert replayed["forward"] == before + 2


def test_a_second_backward_pass_is_an_error(replayed):
    model = model_of(layers=2)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    loss = loss_of(model, BATCHES[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward pass .* accelerate\(model, graphs=False\) keeps"):
        loss.backward()
    loss = loss_of(model, BATCHES[0])
    loss.backward(retain_graph=True)
    loss_of(model, BATCHES[1])
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss_of(model, BATCHES[1]), [*model.parameters()], create_graph=True)
    assert replayed["backward"] == 3


def test_parameters_changed_before_the_backward_pass_are_an_error():
    model = model_of(dtype=AMP)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    loss = loss_of(model, BATCHES[0])
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameters were changed between a forward pass and its backward pass"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_model(reentrant, replayed):
    model, plain = model_of(dropout=0.2), model_of(dropout=0.2, graphs=False)
    for number, arguments in enumerate(BATCHES[:3]):
        gradients = []
        for each in (model, plain):
            torch.manual_seed(number)
            each.zero_grad()
            start = torch.ones((), device=DEVICE, requires_grad=True)

            def run(scale, each=each, arguments=arguments):
                return scale * loss_of(each, arguments)

            checkpoint(run, start, use_reentrant=reentrant).backward()
            gradients.append(gradients_of(each))
        assert_close(*gradients)
    # One looks at what is saved.
    assert replayed["backward"] == (2 if reentrant else 0)


def test_recording_takes_no_random_numbers():
    losses = []
    for graphs in (True, False):
        model = model_of(dropout=0.3, graphs=graphs)
        torch.manual_seed(5)
        losses.append(torch.stack([step(model, arguments)[0] for arguments in BATCHES[:3]]))
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)


def frozen(model):
    model.bert.encoder.layer[0].attention.requires_grad_(False)


def replaced(model):
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = torch.nn.Parameter(0.5 * dense.weight.detach())


def moved(model):
    for parameter in model.parameters():
        parameter.data = 0.5 * parameter.data


def other_norm(model):
    model.bert.encoder.layer[0].output.LayerNorm.eps = 0.5


@pytest.mark.parametrize("change", [frozen, replaced, moved, other_norm])
def test_a_changed_model_is_recorded_anew(change, replayed):
    model, plain = model_of(), model_of(graphs=False)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    before = step(model, BATCHES[0])
    for each in (model, plain):
        change(each)
    count = replayed["forward"]
    for arguments in BATCHES[:3]:
        changed = step(model, arguments)
        assert_same(changed, step(plain, arguments))
    assert replayed["forward"] == count + 2
    assert not torch.equal(before[0], step(model, BATCHES[0])[0]) or change is frozen


def test_a_change_while_a_backward_pass_is_due():
    model, plain = model_of(), model_of(graphs=False)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    for each in (model, plain):
        each.zero_grad()
        first = loss_of(each, BATCHES[0])
        each.eval()
        (first + loss_of(each, BATCHES[1])).backward()
    assert_close(gradients_of(model), gradients_of(plain))


def test_what_is_not_finite_does_no_harm_later():
    model, plain = model_of(), model_of(graphs=False)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    weight = model.bert.embeddings.word_embeddings.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert step(model, batch_of(10, 10, 10))[0].isnan()
    with torch.no_grad():
        weight.copy_(kept)
    assert_same(step(model, BATCHES[2]), step(plain, BATCHES[2]))


def test_where_there_are_no_graphs(replayed):
    checkpointed, model, frozen_embeddings = model_of(), model_of(), model_of()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    frozen_embeddings.bert.embeddings.requires_grad_(False)
    for arguments in BATCHES[:3]:
        step(checkpointed, arguments)
        step(frozen_embeddings, arguments)
        with torch.no_grad():
            loss_of(model, arguments)
        step(model_of(graphs=False), arguments)
    assert not replayed
    assert Shape.of(flat_batch(3, 500), module._MOST_TOKENS + 1) is None
    assert Shape.of(flat_batch(3, 513), 600) is None


def test_undo_lets_go_of_the_graphs(replayed):
    model = made("Bert", "ForSequenceClassification", dtype=torch.float32).to(DEVICE)
    untouched = set(model.bert.__dict__)
    accelerated = cramfast.accelerate(model)
    for arguments in BATCHES[:2]:
        step(model, arguments)
    assert replayed["forward"] == 1
    accelerated.undo()
    assert set(model.bert.__dict__) == untouched


def test_copies_have_graphs_of_their_own(replayed):
    model = model_of()
    for arguments in BATCHES[:2]:
        step(model, arguments)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.bert.encoder.layer[0].output.dense.weight.mul_(2)
    count = replayed["forward"]
    plain = model_of(graphs=False)
    for arguments in BATCHES[:3]:
        assert_same(step(model, arguments), step(plain, arguments))
    with torch.no_grad():
        plain.bert.encoder.layer[0].output.dense.weight.mul_(2)
    for arguments in BATCHES[:3]:
        assert_same(step(copied, arguments), step(plain, arguments))
    assert replayed["forward"] == count + 3 + 2


def test_a_model_that_is_gone_leaves_nothing():
    model = model_of()
    for arguments in BATCHES[:2]:
        step(model, arguments)
    recordings = weakref.ref(replays_of(model.bert, model.device))
    assert recordings()._recorded
    del model
    gc.collect()
    assert recordings() is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), None])
def test_what_cannot_be_recorded_runs_as_it_is(error, monkeypatch, replayed):
    def refuse(self, key, work):
        if error is not None:
            raise error
        self.obstacle = "refused"
        return False

    monkeypatch.setattr(module.Graphs, "capture", refuse)
    model, plain = model_of(), model_of(graphs=False)
    for arguments in BATCHES[:4]:
        assert_same(step(model, arguments), step(plain, arguments))
    assert not replayed


def test_so_many_shapes_and_no_more(monkeypatch):
    monkeypatch.setattr(module, "_MOST_SHAPES", 2)
    model, plain = model_of(), model_of(graphs=False)
    batches = [batch_of(*(9,) * count) for count in (1, 2, 3)]
    for arguments in 2 * batches:
        assert_same(step(model, arguments), step(plain, arguments))
    recorded = replays_of(model.bert, next(model.parameters()).device)._recorded
    assert {key[0].sequences for key in recorded} == {1, 2}


def flat_batch(sequences, longest):
    """As far as its shape goes."""
    ends = torch.zeros(sequences + 1, dtype=torch.int32)
    return Batch((sequences, longest), torch.empty(0), None, None, None, ends, longest)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=64))
def test_a_shape_holds_its_batch_and_little_more(lengths):
    total, longest = sum(lengths), max(lengths)
    shape = Shape.of(flat_batch(len(lengths), longest), total)
    if total > module._MOST_TOKENS:
        assert shape is None
        return
    assert total <= shape.tokens <= total + shape.spare
    assert shape.tokens - total < max(64, total / 8)
    assert shape.longest >= longest and shape.sequences == len(lengths)
    # What is filled fits into the other sequences, not all of which can be full.
    assert shape.tokens - total <= shape.fillers * shape.longest
    assert shape.tokens < (shape.sequences + shape.fillers) * shape.longest


def test_there_are_few_shapes():
    shapes = {Shape.of(flat_batch(32, 100), tokens) for tokens in range(700, 2000)}
    assert len(shapes) <= 16


def test_replays_are_for_one_model_and_device():
    base = torch.nn.Identity()
    one = replays_of(base, torch.device("cpu"))
    assert isinstance(one, Replays)
    assert replays_of(base, torch.device("cpu")) is one
    assert replays_of(base, torch.device("meta")) is not one
    # Whoever loads it may have no such device.
    assert pickle.loads(pickle.dumps(one)) is None
    assert replays_of(copy.deepcopy(base), torch.device("cpu")) is not one


def test_a_model_that_moved_lets_go_of_the_graphs():
    model = model_of()
    for arguments in BATCHES[:2]:
        step(model, arguments)
    replays = replays_of(model.bert, model.device)
    assert replays._recorded
    model.to(AMP).eval()
    with torch.no_grad():
        loss_of(model, BATCHES[0])
    assert not replays._recorded and not replays.gradients
