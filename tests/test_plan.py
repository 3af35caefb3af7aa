"""How `--batch-size`, `--microbatch-size`, `--activations` and the memory become a plan."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cramfast.config import PRESETS, BatchOptions, PretrainOptions, resolve
from cramfast.errors import UserError
from cramfast.train import plan as planning
from cramfast.train import run as running
from cramfast.train.plan import BatchPlan, plan_batch

PRESET = "crammed-bert"


@pytest.fixture
def step():
    """What planning looks at of a step."""
    return SimpleNamespace(
        model=SimpleNamespace(config=PRESETS[PRESET], activations=None), device=torch.device("cuda", 0)
    )


@pytest.fixture
def planned(step):
    """Plans for a card with so many GB, or a CPU (None), and a text of so many tokens."""

    def run(gb: float | None, tokens: int = 10**9, activations: str = "auto", **batches) -> BatchPlan:
        options = PretrainOptions(
            preset=PRESET, budget="1e10tokens", activations=activations, batches=BatchOptions(**batches)
        )
        options = replace(resolve(options, has_gpu=gb is not None), dtype="bfloat16")
        found = plan_batch(options, step, range(tokens), None, None if gb is None else int(gb * 1e9), lambda text: None)
        assert step.model.activations == found.activations
        return found

    return run


def test_a_batch_is_made_of_the_microbatches_that_fit(planned):
    assert planned(80, batch_size=2048) == BatchPlan(512, 4, "keep")
    assert planned(24, batch_size=2048) == BatchPlan(256, 8, "keep")
    assert planned(12, batch_size=2048) == BatchPlan(256, 8, "lean")
    assert planned(8, batch_size=2048) == BatchPlan(128, 16, "lean")
    assert planned(8, batch_size=2048, activations="keep") == BatchPlan(64, 32, "keep")
    assert planned(12, batch_size=512, max_length=512) == BatchPlan(64, 8, "lean")


def test_a_batch_that_is_found_is_made_of_them_too(planned, monkeypatch):
    monkeypatch.setattr(planning, "suitable_batch", lambda tokens: 1024 * 128)
    assert planned(12) == BatchPlan(256, 4, "lean")
    assert planned(12, tokens=600 * 128) == BatchPlan(200, 3, "lean")


def test_a_microbatch_smaller_than_fits_may_keep_more(planned):
    assert planned(12, batch_size=2048).activations == "lean"
    assert planned(12, batch_size=150) == BatchPlan(150, 1, "keep")


def test_a_microbatch_asked_for_is_taken_as_it_is(planned):
    assert planned(12, batch_size=2048, microbatch_size=512) == BatchPlan(512, 4, "layers")
    assert planned(12, batch_size=2048, microbatch_size=64) == BatchPlan(64, 32, "keep")
    assert planned(4, batch_size=2048, microbatch_size=512) == BatchPlan(512, 4, "layers")


def test_a_cpu_keeps_unless_told_otherwise(planned):
    assert planned(None, batch_size=64) == BatchPlan(32, 2, "keep")
    assert planned(None, batch_size=64, activations="layers") == BatchPlan(32, 2, "layers")


def test_too_little_memory_is_one_line_that_names_the_flag(planned):
    with pytest.raises(UserError, match=r"^--memory-limit: [^\n]*$"):
        planned(2, batch_size=2048)


def test_a_budget_of_time_is_timed_as_the_run_will_train(planned, step, monkeypatch):
    seen = []

    def rate(step, stream, pieces, tokens, batches):
        seen.append((tokens, step.model.activations))
        return 1e6

    monkeypatch.setattr(planning, "_tokens_per_second", rate)
    monkeypatch.setattr(planning.Budget, "parse", lambda text: planning.Budget(3600.0, "seconds"))
    planned(12)
    assert seen == [(256 * 128, "lean")]


def test_a_run_on_a_gpu_begins_with_what_was_picked(step):
    step.model.parameters = lambda: []
    options = resolve(PretrainOptions(preset=PRESET, batches=BatchOptions(batch_size=2048)), has_gpu=True)
    options = replace(options, dtype="bfloat16", device="cuda")
    setup = SimpleNamespace(options=options, step=step, plan=BatchPlan(256, 8, "lean"))
    said = []
    running._print_start(SimpleNamespace(say=said.append), setup, SimpleNamespace(microbatch=256))
    assert "batch 2048 (256 at a time, activations lean, 9.9 GiB predicted)" in said[0]
