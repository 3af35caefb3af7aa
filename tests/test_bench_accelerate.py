"""The benchmark of `cramfast.accelerate` on a machine without a GPU."""

from dataclasses import replace

import pytest
import torch
from test_bench import Cpu
from test_bench_step import Watched

from bench import bars, lengths, measure_finetune, measure_step, test_accelerate
from bench.accelerated import FINETUNE_PEERS, STEP_PEERS, bert_classifier
from bench.finetuning import FinetuneWork
from cramfast.config import PRESETS

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("reference")

_SMALL = {"vocab_size": 211, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
_CONFIG = replace(PRESETS["bert-base"], **_SMALL)
PRETRAINING = replace(test_accelerate.PRETRAINING, config=_CONFIG, sequences=6, length=16, shortest=3)
FINETUNING = replace(test_accelerate.FINETUNING, config=_CONFIG, quantiles=lengths.SST2_SENTENCES, steps=3, sequences=4)


@pytest.fixture
def hasty(monkeypatch):
    """Measures for milliseconds."""
    monkeypatch.setattr(measure_step, "_WARM_SECONDS", 0.01)
    monkeypatch.setattr(measure_step, "_ROUND_SECONDS", 0.001)


@pytest.mark.parametrize("peer", STEP_PEERS, ids=lambda peer: peer.who)
def test_pretraining_is_measured(peer, hasty):
    benchmark = Watched()
    measure_step.measure_step(benchmark, Cpu(), PRETRAINING, peer, torch.float32)
    assert benchmark.extra_info["work"] == "accelerate/train/bert-base-ragged-16-128"
    assert benchmark.extra_info["loss_error"] < 1e-5 and benchmark.extra_info["gradient_norm_error"] < 1e-4


@pytest.mark.parametrize("peer", FINETUNE_PEERS, ids=lambda peer: peer.who)
def test_finetuning_is_measured(peer, hasty):
    benchmark = Watched()
    measure_finetune.measure_finetune(benchmark, Cpu(), FINETUNING, peer, torch.float32)
    assert benchmark.extra_info["work"] == "accelerate/train/glue-mnli"
    assert benchmark.extra_info["loss_error"] < 1e-5 and benchmark.extra_info["gradient_norm_error"] < 1e-4


def test_only_one_of_the_peers_is_accelerated():
    found = []
    for peer in FINETUNE_PEERS:
        training = measure_finetune.FinetuneTraining(FINETUNING, torch.device("cpu"), torch.float32)
        found.append("forward" in peer.start(training).model.bert.__dict__)
    assert found == [True, False]


def test_bars_name_what_is_measured():
    works = {bar.work for bar in bars.BARS if bar.operator == "accelerate"}
    assert works == {test_accelerate.PRETRAINING.work, test_accelerate.FINETUNING.work}


def test_batches_are_of_the_size_that_they_say():
    work: FinetuneWork = test_accelerate.FINETUNING
    assert len(work.counts()) == 32 * 32 and work.sequences == 32
    assert work.build is bert_classifier
