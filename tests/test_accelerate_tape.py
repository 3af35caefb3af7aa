"""Accelerated models whose layers are an autograd node each, beside the same with a node for each operator."""

import copy
import re
from collections import Counter

import pytest
import torch
from conftest import NATIVE
from test_accelerate import BATCH, batch_of, both, made
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cramfast
from cramfast.accelerated import encoder
from cramfast.kernels import Launch, Pass

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("triton_kernels", "embed_by_reference"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # Triton's interpreter
]

DEVICE, AMP = ("cuda", torch.bfloat16) if NATIVE else ("cpu", torch.float16)


@pytest.fixture
def nodes(monkeypatch):
    """How many nodes were made of whole layers."""
    counts = Counter()

    def counted(*arguments):
        counts["layers"] += 1
        return one_node(*arguments)

    one_node = encoder.one_node
    monkeypatch.setattr(encoder, "one_node", counted)
    return counts


def to_device(given):
    return {key: value.to(DEVICE) for key, value in given.items()}


def given_to(name, head):
    given = batch_of(name, labels=head == "ForMaskedLM")
    return to_device(given if "labels" in given else given | {"labels": torch.arange(BATCH) % 2})


def gradients(model, given, autocast=True, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast(DEVICE, AMP, enabled=autocast):
        loss = model(**given).loss
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_close(mine, theirs):
    """Each of a parameter's gradients; about ten roundings to 16 bits lie between, on either side. What cancels, like
    the gradient of a key's bias, is held against the others."""
    least = 1e-3 * torch.stack([grad.norm() for grad in theirs.values() if grad is not None]).norm()
    for name, grad in theirs.items():
        assert (grad is None) == (mine[name] is None), name
        if grad is not None:
            assert mine[name].dtype == grad.dtype
            error = (mine[name] - grad).norm() / grad.norm().clamp(min=least)
            assert error < 10 * torch.finfo(AMP).eps, (name, error)


def assert_same_by_nodes(model, given, monkeypatch, **options):
    mine = gradients(model, given, **options)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "tape_serves", lambda *_: False)
        theirs = gradients(model, given, **options)
    assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("name", "head", "autocast"),
    [
        ("Bert", "ForMaskedLM", True),
        ("Bert", "ForSequenceClassification", False),
        ("DistilBert", "ForSequenceClassification", True),
        ("ModernBert", "ForMaskedLM", False),
        ("ModernBert", "ForSequenceClassification", True),
    ],
)
def test_gradients_are_those_of_a_node_each(name, head, autocast, nodes, monkeypatch):
    """Of masked language modelling, the last layer computes predicted tokens alone."""
    model = made(name, head, dtype=torch.float32 if autocast else AMP).to(DEVICE)
    cramfast.accelerate(model, graphs=False)
    assert_same_by_nodes(model, given_to(name, head), monkeypatch, autocast=autocast)
    assert nodes["layers"] == model.config.num_hidden_layers


def test_layers_without_biases_and_other_forms_of_gelu(nodes, monkeypatch):
    model = made("Bert", dtype=torch.float32, hidden_act="gelu_new").to(DEVICE)
    for layer in model.bert.encoder.layer:
        for module in layer.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.bias = None
    cramfast.accelerate(model, graphs=False)
    assert_same_by_nodes(model, given_to("Bert", "ForMaskedLM"), monkeypatch)
    assert nodes["layers"] == 2


@pytest.mark.parametrize("frozen", ["embeddings|layer.0", "query", "LayerNorm|bias", ""])
def test_frozen_parameters(frozen, nodes, monkeypatch):
    model = made("Bert", "ForSequenceClassification", dtype=torch.float32).to(DEVICE)
    for name, parameter in model.bert.named_parameters():
        parameter.requires_grad_(re.search(frozen, name) is None)
    cramfast.accelerate(model, graphs=False)
    assert_same_by_nodes(model, given_to("Bert", "ForSequenceClassification"), monkeypatch)
    assert nodes["layers"] == 2


def test_what_a_tape_does_not_know_runs_as_before(nodes):
    class Louder(nn.Dropout):
        def forward(self, x):
            return 2 * super().forward(x)

    given = given_to("Bert", "ForMaskedLM")
    relu, louder = made("Bert", dtype=torch.float32, hidden_act="relu"), made("Bert", dtype=torch.float32)
    louder.bert.encoder.layer[1].output.dropout = Louder(0.0)
    for model, untouched in map(both, (relu.to(DEVICE), louder.to(DEVICE))):
        with torch.autocast(DEVICE, AMP):
            torch.testing.assert_close(model(**given).loss, untouched(**given).loss, rtol=1e-2, atol=0)
    single = made("Bert", dtype=torch.float32).to(DEVICE)
    cramfast.accelerate(single, graphs=False)
    if not NATIVE:  # which finds no attention for it when it has to be Triton's
        with pytest.raises(RuntimeError, match="CRAMFAST_KERNELS=triton, but varlen_attention cannot run"):
            single(**given)
    assert nodes["layers"] == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_gradient_checkpointing(name, reentrant, nodes):
    model, given = made(name, dropout=0.2, dtype=torch.float32).to(DEVICE), given_to(name, "ForMaskedLM")
    cramfast.accelerate(model, graphs=False)
    kept = gradients(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, given)
    assert nodes["layers"] == 3 * model.config.num_hidden_layers
    assert all(torch.equal(kept[key], again[key]) for key in kept)


def test_dropout_is_drawn_again_for_each_layer_and_pass():
    torch.manual_seed(0)
    model, given = made("Bert", "Model", dropout=0.3, dtype=AMP).to(DEVICE), to_device(batch_of("Bert", labels=False))
    cramfast.accelerate(model, graphs=False)
    seeds = []

    def recorded(self, *arguments):
        seeds.append(seed(self, *arguments))
        return seeds[-1]

    seed = Pass.seed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pass, "seed", recorded)
        first, second = (model(**given).last_hidden_state for _ in range(2))
        drawn = len(seeds)
        model.eval()
        assert torch.equal(*(model(**given).last_hidden_state for _ in range(2)))
    assert not torch.equal(first, second)
    assert len({seed[0].item() for seed in seeds}) == 4  # of two layers, whose dropouts share one
    assert all(seed.data_ptr() % 16 == 0 for seed in seeds)
    assert len(seeds) == drawn


def test_gradients_are_collected_over_several_passes():
    model, given = made("Bert", dtype=torch.float32).to(DEVICE), given_to("Bert", "ForMaskedLM")
    cramfast.accelerate(model, graphs=False)
    once = gradients(model, given)
    with torch.autocast(DEVICE, AMP):
        loss = model(**given).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * once[name], rtol=1e-5, atol=1e-7)
    with torch.autocast(DEVICE, AMP):
        loss = model(**given).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


def test_without_gradients():
    model, given = made("Bert", "Model", dtype=torch.float32).to(DEVICE), to_device(batch_of("Bert", labels=False))
    cramfast.accelerate(model, graphs=False)
    with torch.autocast(DEVICE, AMP):
        trained = model(**given).last_hidden_state
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                output = model.eval()(**given).last_hidden_state
            assert not output.requires_grad and torch.equal(output, trained)
        # What was made in inference mode does no harm later.
        model.train()(**given).last_hidden_state.float().sum().backward()


class _Counted(TorchDispatchMode):
    """Counts operations of torch, without those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.operations[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def costs_of(layers, monkeypatch, name="Bert"):
    """(operations of torch, kernels launched, nodes of autograd) of a step with so many layers, with all dropouts."""
    model = made(name, "ForSequenceClassification", dropout=0.1, dtype=torch.float32, num_hidden_layers=layers)
    given, launches = given_to(name, "ForSequenceClassification"), []
    cramfast.accelerate(model.to(DEVICE), graphs=False)
    monkeypatch.setattr(Launch, "__call__", lambda *arguments: launches.append(arguments))
    with _Counted() as counted:
        with torch.autocast(DEVICE, AMP):
            loss = model(**given).loss
        waiting, seen = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions if following is not None]
        loss.backward()
    inner = [node for node in seen if "AccumulateGrad" not in type(node).__name__]
    return sum(counted.operations.values()), len(launches), len(inner)


def test_what_a_layer_costs_the_host(monkeypatch):
    """The time of a step on a short batch is the host's: each of these takes it as long as the GPU needs for more."""
    few, more = (costs_of(layers, monkeypatch) for layers in (2, 4))
    operations, launches, nodes = ((y - x) / 2 for x, y in zip(few, more, strict=True))
    # 4 products forward and 8 back, and allocations: 4 for weights, one to five for each kernel. On a CPU two
    # conversions for each product with a result of 32 bits.
    assert operations <= (46 if NATIVE else 54), operations
    assert launches <= (13 if NATIVE else 11), launches
    assert nodes == 1


def test_copies_run_on_their_own_weights_and_undo_restores():
    model, given = made("Bert", dtype=AMP).to(DEVICE), given_to("Bert", "ForMaskedLM")
    accelerated = cramfast.accelerate(model, graphs=False)
    copied = copy.deepcopy(model)
    before = model(**given).loss
    with torch.no_grad():
        copied.bert.encoder.layer[0].output.dense.weight.mul_(2)
    assert torch.equal(model(**given).loss, before) and not torch.equal(copied(**given).loss, before)
    assert accelerated.undo()(**given).logits is not None
