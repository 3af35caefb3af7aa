"""Weights in flat buffers: where they lie, their 16-bit copies, and the gradients that products add to them.

A model that trains so must have the gradients that plain autograd has, whatever it saves for the backward pass.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from cramfast.config import PRESETS, ModelConfig, OptimizerOptions
from cramfast.data.batches import Batch, Cursor
from cramfast.data.tokenizer import SpecialIds
from cramfast.kernels import choose, mask_tokens
from cramfast.model import Bert
from cramfast.train.checkpoint import load_checkpoint, save_checkpoint
from cramfast.train.step import TrainStep
from cramfast.train.weights import Weights

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
FAMILIES = ("bert-base", "crammed-bert", "cramfast-base")
VOCABULARY = 97
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, VOCABULARY))
OPTIONS = OptimizerOptions(lr=1e-3, weight_decay=0.01, clip=1.0)
NARROW = (torch.bfloat16, torch.float16)
RATE = 0.25
ALIGNMENT = 64  # elements: a cache line of 16-bit numbers


@pytest.fixture(params=["reference", "kernels"])
def path(request, monkeypatch):
    """Runs the references, or every kernel that there is for a dtype, interpreted where there is no GPU."""
    kernels = request.param == "kernels"
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto" if kernels else "reference")
    if kernels and not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for operator in ("embed", "layer_norm", "add_layer_norm", "gelu", "geglu", "mlm_loss", "adamw"):
        assert (choose(operator, DEVICE, torch.float32).backend == "triton") == kernels


def tiny(family: str) -> ModelConfig:
    sizes = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 48, "num_layers": 2, "max_positions": 32}
    return replace(PRESETS[family], vocab_size=VOCABULARY, **sizes)


def odd(family: str) -> ModelConfig:
    """Sizes of which few are a multiple of the alignment."""
    return replace(tiny(family), hidden_size=36, intermediate_size=30, vocab_size=53)


def make_model(config: ModelConfig, seed: int = 0, **settings) -> Bert:
    """Every parameter random, so that each has a part in the loss that shows."""
    torch.manual_seed(seed)
    model = Bert(config, **settings).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(DEVICE)


def make_step(config: ModelConfig, dtype=torch.float32, seed: int = 0, **settings) -> TrainStep:
    return TrainStep(make_model(config, seed, **settings), OPTIONS, SPECIAL, dtype, seed=0, graphs=False)


def make_batch(number: int, lengths=(5, 1, 9, 5, 2)) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(*SPECIAL.ordinary, (sum(lengths),), generator=generator)
    return Batch(ids, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), 0, Cursor())


def accumulated(step: TrainStep, numbers=(0,)) -> dict[str, torch.Tensor]:
    for number in numbers:
        step.accumulate(make_batch(number), RATE, number, 1 / len(numbers))
    found = {name: view.clone() for name, view in step.weights.by_name(step.weights.gradient).items()}
    step.reset()
    return found


def by_autograd(model: Bert, dtype: torch.dtype, numbers=(0,)) -> dict[str, torch.Tensor]:
    """The same gradients of a model that knows no buffers, added up in its parameters' dtype."""
    total = None
    for number in numbers:
        batch = make_batch(number)
        ids, cu_seqlens = batch.input_ids.to(DEVICE), batch.cu_seqlens.to(DEVICE)
        options = {"mask_id": SPECIAL.mask, "ordinary": SPECIAL.ordinary, "seed": 0, "step": number}
        ids, positions, labels = mask_tokens(ids, cu_seqlens, round(RATE * ids.numel()), **options)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype in NARROW):
            loss = model(ids, cu_seqlens, batch.max_seqlen, positions, labels) / len(numbers)
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        found = [g / scale for g in torch.autograd.grad(loss * scale, list(model.parameters()))]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return dict(zip((name for name, _ in model.named_parameters()), total, strict=True))


def error(found: dict, exact: dict) -> float:
    """Relative, in L2, of all of them."""
    return (sum((found[n] - exact[n]).norm() ** 2 for n in exact) / sum(exact[n].norm() ** 2 for n in exact)).sqrt()


# Where they lie


@pytest.mark.parametrize("config", [tiny, odd])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_a_view_of_the_flat_master(family, config):
    model = make_model(config(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = {name: id(parameter) for name, parameter in model.named_parameters()}
    weights = Weights(model, torch.float32)
    assert addresses == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert weights.places.keys() == addresses.keys() == weights.by_name(weights.master).keys()
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() == weights.master.untyped_storage().data_ptr()
        assert parameter.storage_offset() == weights.places[name].start
        assert parameter.shape == weights.places[name].shape
        assert parameter.is_contiguous()
    model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    for name, view in weights.by_name(weights.master).items():
        assert torch.equal(view, before[name] + 1)


@pytest.mark.parametrize("config", [tiny, odd])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_buffers(family, config):
    model = make_model(config(family))
    weights = Weights(model, torch.bfloat16)
    places = [*weights.places.values()]
    assert places[0].start == 0
    for place, following in itertools.pairwise(places):
        assert following.start == place.start + -(-place.shape.numel() // ALIGNMENT) * ALIGNMENT
    assert all(place.start % ALIGNMENT == 0 for place in places)
    assert 0 <= weights.master.numel() - places[-1].end < ALIGNMENT
    assert weights.master.numel() % ALIGNMENT == 0
    for name, place in weights.places.items():
        matrix, embedding = len(place.shape) == 2, name.startswith("embeddings.")
        assert (place.end <= weights.hidden) == (matrix and not embedding), name
        assert (weights.hidden <= place.start < weights.decayed) == (matrix and embedding), name
        assert (place.start >= weights.decayed) == (not matrix), name
    hidden = [place.shape for place in places if place.end <= weights.hidden]
    runs = [shape for i, shape in enumerate(hidden) if i == 0 or hidden[i - 1] != shape]
    assert len(runs) == len(set(runs))
    assert weights.master.shape == weights.gradient.shape
    assert weights.working.shape == (weights.decayed,)


@pytest.mark.parametrize("config", [tiny, odd])
@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_are_views_that_cover_exactly_the_matrices_of_the_layers(family, config):
    weights = Weights(make_model(config(family)), torch.bfloat16)
    for flat in (weights.master, weights.gradient, weights.working):
        flat.copy_(torch.randn(flat.shape))
        stacks = [stack.of(flat) for stack in weights.stacks()]
        wanted = {n: view for n, view in weights.by_name(flat).items() if weights.places[n].end <= weights.hidden}
        assert all(stack.dim() == 3 and stack.stride(2) == 1 for stack in stacks)
        assert sum(stack.numel() for stack in stacks) == sum(view.numel() for view in wanted.values())
        addresses = {matrix.data_ptr(): matrix for stack in stacks for matrix in stack}
        assert len(addresses) == sum(len(stack) for stack in stacks)
        for name, view in wanted.items():
            # Queries, keys and values are matrices of their own, where that leaves their rows whole.
            matrix = addresses[view.data_ptr()]
            rows = len(matrix)
            assert len(view) in ((rows, 3 * rows) if name.endswith("qkv.weight") else (rows,)), name
            assert torch.equal(matrix, view[:rows])
        before = flat[weights.hidden :].clone()
        for stack in stacks:
            stack.zero_()
        assert not any(view.any() for view in wanted.values())
        assert torch.equal(flat[weights.hidden :], before)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_what_the_forward_pass_takes(dtype):
    model = make_model(odd("bert-base"))
    weights = Weights(model, dtype)
    gradients = weights.by_name(weights.gradient)
    for name, parameter in model.named_parameters():
        leaf = weights.leaves[name]
        assert leaf.is_leaf and leaf.requires_grad
        assert leaf.main_grad.data_ptr() == gradients[name].data_ptr() and leaf.main_grad.dtype == torch.float32
        if dtype == torch.float32 or parameter.ndim < 2:
            assert leaf is parameter
        else:
            assert leaf.dtype == dtype and torch.equal(leaf, parameter.to(dtype))
            assert leaf.untyped_storage().data_ptr() == weights.working.untyped_storage().data_ptr()
    assert (weights.working is None) == (dtype == torch.float32)


# Working copies


def assert_rounded(weights: Weights) -> None:
    copies = weights.by_name(weights.working)
    assert copies.keys() == {name for name, place in weights.places.items() if len(place.shape) == 2}
    for name, master in weights.by_name(weights.master).items():
        if name in copies:
            assert torch.equal(copies[name], master.to(copies[name].dtype)), name


@pytest.mark.usefixtures("path", "bf16_as_on_gpus")
@pytest.mark.parametrize("dtype", NARROW)
def test_working_copies_are_the_weights_rounded(dtype, tmp_path):
    step = make_step(tiny("cramfast-base"), dtype)
    assert_rounded(step.weights)
    start = step.weights.working.clone()
    for number in range(3):
        step.accumulate(make_batch(number), RATE, number, 1.0)
        assert step.update(1e-2).skipped == 0
        assert_rounded(step.weights)
    trained = step.weights.working.clone()
    assert not torch.equal(trained, start)

    step.accumulate(make_batch(9), RATE, 9, 1.0)
    step.weights.gradient[5] = torch.nan
    assert step.update(1e-2).skipped == 1
    assert_rounded(step.weights)
    assert torch.equal(step.weights.working, trained)

    saved = save_checkpoint(tmp_path, 3, step.model, step.tensors(), {}, keep=1)
    other = make_step(tiny("cramfast-base"), dtype, seed=1)
    assert not torch.equal(other.weights.working, trained)
    load_checkpoint(saved, other.model, other.tensors())
    other.weights.refresh()
    assert_rounded(other.weights)
    assert torch.equal(other.weights.working, trained)


# Gradients


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("numbers", [pytest.param((0,), marks=pytest.mark.thorough), (0, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd(family, numbers):
    ours = accumulated(make_step(tiny(family)), numbers)
    theirs = by_autograd(make_model(tiny(family)), torch.float32, numbers)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.any(), name
        # The same sums, which a product that adds to what is there may take in another order.
        assert (ours[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.usefixtures("path", "bf16_as_on_gpus")
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_16_bits_are_as_exact_as_those_of_autograd(family, dtype, monkeypatch):
    step = make_step(tiny(family), dtype)
    ours = {name: gradient.double() / step.loss_scale for name, gradient in accumulated(step, (0, 1)).items()}
    theirs = by_autograd(make_model(tiny(family)), dtype, (0, 1))
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")  # which alone knows float64
    exact = by_autograd(make_model(tiny(family)).double(), torch.float64, (0, 1))
    assert error(ours, exact) <= 2 * error(theirs, exact)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_for_the_backward_pass_does_not_show(family):
    keep, lean, layers = (
        accumulated(make_step(tiny(family), activations=activations), (0, 1))
        for activations in ("keep", "lean", "layers")
    )
    for name, gradient in keep.items():
        assert gradient.any(), name
        assert torch.equal(layers[name], gradient), name
        # The outputs that are computed again may be rounded elsewhere.
        assert (lean[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.usefixtures("path", "bf16_as_on_gpus")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.thorough), torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_in_16_bits_does_not_show_either(family, dtype):
    keep, lean, layers = (
        accumulated(make_step(tiny(family), dtype, activations=activations))
        for activations in ("keep", "lean", "layers")
    )
    for name, gradient in keep.items():
        assert torch.equal(layers[name], gradient), name
    # Few elements, if any, are rounded to the other neighbour.
    assert error(lean, keep) <= torch.finfo(dtype).eps / 4
