"""The planner: peaks against measured ones, what it picks for a card, and the projection that rests on it."""

from dataclasses import replace

import pytest
import torch

from bench.projection import CARDS, project, projection_table
from cramfast.config import PRESETS, PretrainOptions, byte_count, resolve
from cramfast.errors import UserError
from cramfast.model import Bert
from cramfast.train.memory import (
    MOST_TOKENS,
    parameter_counts,
    plan_memory,
    predict_bytes,
    relative_speed,
    usable_bytes,
)
from cramfast.train.weights import Weights

BF16 = torch.bfloat16
GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# torch.cuda.max_memory_allocated of TrainStep in bfloat16 with AdamW, a quarter of the tokens predicted, each in a
# process of its own on an NVIDIA H100 with torch 2.11.
MEASURED = [
    ("crammed-bert", 512 * 128, "keep", "fast", 23.010),
    ("crammed-bert", 512 * 128, "lean", "fast", 17.315),
    ("crammed-bert", 512 * 128, "layers", "fast", 6.764),
    ("crammed-bert", 256 * 128, "lean", "fast", 9.865),
    ("crammed-bert", 128 * 128, "keep", "fast", 7.563),
    ("crammed-bert", 128 * 128, "lean", "fast", 6.139),
    ("crammed-bert", 64 * 512, "keep", "fast", 12.712),
    ("crammed-bert", 32 * 128, "lean", "low", 3.084),
    ("bert-base", 512 * 128, "keep", "fast", 19.681),
    ("bert-base", 512 * 128, "lean", "fast", 19.681),
    ("bert-base", 128 * 128, "layers", "low", 2.700),
    ("bert-large", 64 * 128, "keep", "fast", 11.885),
    ("cramfast-base", 512 * 128, "keep", "fast", 22.993),
    ("cramfast-base", 512 * 128, "layers", "low", 6.771),
    ("cramfast-base", 128 * 512, "lean", "fast", 17.299),
    ("cramfast-small", 512 * 128, "lean", "low", 5.728),
]


@pytest.mark.parametrize("preset, tokens, activations, loss, gib", MEASURED)
def test_the_predicted_peak_is_the_measured_one(preset, tokens, activations, loss, gib):
    predicted = predict_bytes(PRESETS[preset], tokens, 0.25, BF16, activations, loss) / GIB
    assert predicted == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted_as_the_model_has_them(preset):
    with torch.device("meta"):
        sizes = [(parameter.numel(), parameter.ndim) for parameter in Bert(PRESETS[preset]).parameters()]
    matrices = sum(size for size, ndim in sizes if ndim >= 2)
    assert parameter_counts(PRESETS[preset]) == (sum(size for size, _ in sizes), matrices)


@pytest.mark.parametrize("preset", ["cramfast-tiny", "bert-mini"])
def test_parameters_are_counted_as_weights_lays_them_out(preset):
    weights = Weights(Bert(PRESETS[preset]), BF16)
    parameters, matrices = parameter_counts(PRESETS[preset])
    assert 0 <= len(weights.master) - parameters < 64 * len(weights.places)
    assert 0 <= len(weights.working) - matrices < 64 * len(weights.places)


def saved_bytes(config, activations, ends) -> int:
    """Bytes of the tensors that autograd holds after a forward pass over sequences with these ends, but parameters."""
    model = Bert(config, activations=activations).to(DEVICE, BF16)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    held, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    input_ids = torch.arange(5, 5 + ends[-1], device=DEVICE)
    positions = torch.arange(0, ends[-1], 4, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        loss = model(input_ids, cu_seqlens, max(ends), positions, input_ids[positions])
    assert loss.isfinite()
    return sum(held.values())


@pytest.mark.parametrize("activations", ["keep", "lean"])
@pytest.mark.parametrize("preset", ["cramfast-tiny", "bert-mini"])
def test_a_layer_is_predicted_to_save_what_autograd_saves(triton_kernels, bf16_as_on_gpus, preset, activations):
    small = replace(PRESETS[preset], vocab_size=512, hidden_size=128, num_heads=4, intermediate_size=256)
    one, two = replace(small, num_layers=1), replace(small, num_layers=2)
    # The longest is said to be one that needs its angles by token.
    ends = [0, 20, 84, 160]
    # Without tokens there is the state alone.
    more, none = (
        predict_bytes(two, tokens, 0.25, BF16, activations) - predict_bytes(one, tokens, 0.25, BF16, activations)
        for tokens in (ends[-1], 0)
    )
    saved = saved_bytes(two, activations, ends) - saved_bytes(one, activations, ends)
    assert more - none == pytest.approx(saved, rel=0.005)


def plan(gb: float, preset: str = "crammed-bert", length: int = 128, **options):
    return plan_memory(PRESETS[preset], length, 0.25, BF16, int(gb * 1e9), **options)


# Each of these ran on an NVIDIA H100 whose allocator was held to the limit, held-out text included.
@pytest.mark.parametrize(
    "gb, sequences, activations",
    [(8, 128, "lean"), (11, 128, "keep"), (12, 256, "lean"), (16, 256, "keep"), (24, 256, "keep"), (48, 512, "keep")],
)
def test_what_is_picked_for_a_card(gb, sequences, activations):
    found = plan(gb)
    assert (found.sequences, found.activations) == (sequences, activations)
    assert found.peak == predict_bytes(PRESETS["crammed-bert"], sequences * 128, 0.25, BF16, activations)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("length", [128, 512])
def test_more_memory_is_never_slower_and_always_enough(preset, length):
    speeds = []
    for gb in (8, 9, 10, 11, 12, 16, 20, 24, 32, 48, 80, 141):
        found = plan(gb, preset, length)
        assert found.peak < gb * 1e9
        assert found.sequences * length <= MOST_TOKENS
        speeds.append(relative_speed(found.activations, found.sequences * length))
    assert speeds == sorted(speeds)
    assert speeds[-1] == 1


def test_smaller_microbatches_come_before_layers_that_are_repeated():
    assert relative_speed("keep", MOST_TOKENS) == 1
    assert relative_speed("keep", 128 * 128) == pytest.approx(0.936, abs=0.005)
    assert relative_speed("lean", 8192) > relative_speed("layers", MOST_TOKENS)
    assert {plan(gb).activations for gb in (6, 8, 11, 12, 16, 24)} == {"keep", "lean"}


@pytest.mark.parametrize("activations", ["keep", "lean", "layers"])
def test_activations_asked_for_are_kept(activations):
    found = plan(12, activations=activations)
    assert found.activations == activations
    assert found.peak < 12e9


def test_of_the_sequences_asked_for_only_the_activations_are_picked():
    assert [plan(gb, sequences=256).activations for gb in (80, 12, 8)] == ["keep", "lean", "layers"]
    assert {plan(gb, sequences=256).sequences for gb in (80, 12, 8)} == {256}


def test_sequences_that_fit_in_no_way_are_left_to_be_halved():
    assert plan(4, sequences=512).activations == "layers"


def test_too_little_for_one_sequence_says_what_the_least_is():
    with pytest.raises(UserError, match=r"^--memory-limit: 1\.86 GiB .* takes at least \d\.\d\dGiB; [^\n]*$") as error:
        plan(2)
    least = byte_count("--memory-limit", str(error.value).split("at least ")[1].split(";")[0])
    assert plan(least / 1e9).sequences == 1
    with pytest.raises(UserError):
        plan(0.99 * least / 1e9)


@pytest.mark.parametrize(
    "text, count",
    [("11GB", 11 * 10**9), ("10.5GiB", 10.5 * GIB), ("512 mib", 512 * 2**20), ("1e3MB", 10**9)],
)
def test_limits_that_are_amounts_of_bytes(text, count):
    assert byte_count("--memory-limit", text) == count


@pytest.mark.parametrize("text", ["", "11", "GB", "11 apples", "0GB", "-3GB", "11GBs", "1e999GB", "nanGB"])
def test_limits_that_are_not(text):
    with pytest.raises(UserError, match=r"^--memory-limit .*: expected an amount like 11GB or 10\.5GiB$"):
        resolve(PretrainOptions(memory_limit=text), has_gpu=False)


def test_a_cpu_has_no_limit():
    assert usable_bytes(torch.device("cpu"), None) is None
    assert usable_bytes(torch.device("cpu"), "11GB") is None


@pytest.mark.parametrize("limit, usable", [(None, 20 * GIB - 2**28), ("11GiB", 11 * GIB), ("24GiB", 20 * GIB - 2**28)])
def test_a_gpu_gives_what_is_free_or_allowed(monkeypatch, limit, usable):
    fractions = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 22 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    assert usable_bytes(torch.device("cuda", 0), limit) == usable
    assert fractions == {None: [], "11GiB": [0.5], "24GiB": [1.0]}[limit]


def test_the_projection_for_the_h200_is_what_was_measured_there():
    card = next(card for card in CARDS if card.name.startswith("H200"))
    assert project("crammed-bert", card).tokens_per_s == pytest.approx(807_000, rel=0.1)


def test_every_card_is_projected_with_a_plan_that_fits_it():
    for card in CARDS:
        projected = project("crammed-bert", card)
        assert projected.plan.peak < card.memory * 1e9
        assert f"| {card.name} |" in projection_table()
