"""The benchmark of finetuning on a machine without a GPU, and the table of GLUE that the report makes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import Cpu, command, entry, written
from test_bench_step import Watched
from test_glue import results_of

from bench import bars, glue, ledger, lengths, measure_finetune, measure_step, tables, test_finetune
from bench.check import WrongResult
from bench.finetuning import (
    OURS,
    TRAINER,
    FinetuneTraining,
    FinetuneWork,
    TrainerPass,
    expected_outcome,
    padded_batches,
)
from cramfast.config import PRESETS

CPU = torch.device("cpu")
_SMALL = {"vocab_size": 211, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
WORK = FinetuneWork("small", replace(PRESETS["cramfast-base"], **_SMALL), lengths.SST2_SENTENCES, steps=3)

pytest.importorskip("transformers")


@pytest.fixture
def hasty(monkeypatch):
    """Measures for milliseconds."""
    monkeypatch.setattr(measure_step, "_WARM_SECONDS", 0.01)
    monkeypatch.setattr(measure_step, "_ROUND_SECONDS", 0.001)


def run(peer) -> dict:
    benchmark = Watched()
    measure_finetune.measure_finetune(benchmark, Cpu(), WORK, peer, torch.float32)
    return benchmark.extra_info


def test_lengths_are_those_of_the_tasks():
    for work, mean in ((test_finetune.MNLI, 39.0), (test_finetune.SST2, 13.2)):
        counts = work.counts()
        assert len(counts) == 512 and counts.max() <= 128
        assert counts.float().mean() == pytest.approx(mean, rel=0.06)
        assert work.tokens == counts.sum() / 32


def test_both_are_given_the_same_sequences():
    examples, padded = WORK.examples(), padded_batches(WORK, CPU)
    assert len(padded) == 3 and len(examples) == 48
    flat = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in padded])
    assert np.array_equal(flat.numpy(), examples.ids)
    assert np.array_equal(torch.cat([batch["labels"] for batch in padded]).numpy(), examples.labels)
    # Padded to the longest of the batch, and no further.
    assert all(batch["attention_mask"].any(0).all() for batch in padded)


def test_first_steps_agree_and_dropout_changes_them(reference):
    expected = expected_outcome(WORK, CPU)
    for peer in (OURS, TRAINER):
        first = peer.start(FinetuneTraining(WORK, CPU, torch.float32, dropout=0.0))()
        assert float(first.loss) == pytest.approx(expected[0], rel=1e-6)
        assert float(first.gradient_norm) == pytest.approx(expected[1], rel=1e-4)
        dropped = peer.start(FinetuneTraining(WORK, CPU, torch.float32))()
        assert float(dropped.gradient_norm) != pytest.approx(expected[1], rel=1e-3)


def test_passes_agree_from_first_to_last(reference):
    training = FinetuneTraining(WORK, CPU, torch.float32, dropout=0.0)
    ours, theirs = OURS.start(training), TRAINER.start(training)
    theirs.clip = float("inf")
    for _ in range(3):
        ours()
        theirs()
    assert torch.allclose(ours.step.model.out.weight, theirs.model.classifier.weight, atol=2e-6)
    assert torch.allclose(ours.step.model.dense.weight, theirs.model.head[1].weight, atol=2e-6)


def test_a_measurement_says_what_it_measured(reference, hasty):
    for peer in (OURS, TRAINER):
        info = run(peer)
        assert info["work"] == "finetune/train/small" and info["who"] == peer.who
        assert info["tokens"] == WORK.tokens and info["flops"] == WORK.flops()
        assert info["loss_error"] < 1e-5 and info["gradient_norm_error"] < 1e-4
        assert info["backend"] == ("reference" if peer is OURS else None)
        assert "sequences_per_s" in info


def test_a_pass_is_several_steps(reference, hasty):
    class Timed(Watched):
        class stats:
            class stats:
                median = 6.0

    benchmark = Timed()
    measure_finetune.measure_finetune(benchmark, Cpu(), WORK, OURS, torch.float32)
    info = benchmark.extra_info
    assert info["seconds"] == 2.0 and info["sequences_per_s"] == 8.0 and info["tokens_per_s"] == WORK.tokens / 2


def test_a_classifier_of_another_kind_is_not_timed(reference, hasty):
    def other(training):
        step = TrainerPass(training)
        step.model.config.classifier_pooling = "cls"
        return step

    with pytest.raises(WrongResult, match="hf-eager on finetune/train/small: the first step's"):
        run(replace(TRAINER, start=other))


def test_every_work_has_its_peers():
    rows = {(work.work, peer.who) for work, peer in test_finetune._ROWS}
    works = {f"finetune/train/cramfast-base-{task}" for task in ("mnli", "sst2")}
    assert rows == {(work, who) for work in works for who in ("cramfast", "hf-eager")}


# What becomes of the results


def finetune_entry(who: str, seconds: float) -> dict:
    given = {"tokens_per_s": 624 / seconds, "sequences_per_s": 16 / seconds, "timed_by": "events", "flops": 10**11}
    return entry("finetune/train/cramfast-base-mnli", who, seconds, **given)


def test_bars_and_tables_of_finetuning(tmp_path):
    ledger.save(tmp_path, "finetune", written(finetune_entry("cramfast", 0.004), finetune_entry("hf-eager", 0.02)))
    (device,) = ledger.load(tmp_path)
    said = [str(verdict) for verdict in bars.evaluate(device) if verdict.bar.operator == "finetune"]
    name = "nvidia-h200  finetune/train/cramfast-base"
    assert said == [
        f"held    {name}-mnli bfloat16: speed against hf-eager 5.00×, bar 2.50×",
        f"absent  {name}-sst2: speed against hf-eager not measured, bar 2.50×",
    ]
    text = tables.module_tables("finetune", [device], "results")
    assert "**`finetune`** cramfast-base-mnli, bfloat16" in text
    assert "| who | ms a step | tokens/s | MFU | peak GiB | J per M tokens | sequences/s | × hf-eager |" in text
    assert "| **cramfast** | 4.0 | 156,000 |  |  |  | 4,000 | 5.00 |" in text


def finetuned(folder: Path, random: bool, seeds: int = 3, lr: float = 4e-5, **tasks: float) -> Path:
    """A folder as cramfast.finetune leaves it."""
    content = results_of(**{name: (value,) * seeds for name, value in tasks.items()})
    for task in content["tasks"].values():
        for seed in task["seeds"].values():
            seed |= {"steps": 10, "seconds": 1.0, "epochs": []}
    environment = {"device": "NVIDIA H200", "torch": "2.11.0", "revision": "cafe", "date": "2026-11-26"}
    settings = {"protocol": {"lr": lr}, "tokenizer": "t", "device": "cuda", "dtype": "bfloat16"}
    settings |= {"random_weights": random, "encoder": "r" if random else "p"}
    content |= {"checkpoint": "runs/x/final", "environment": environment, "settings": settings}
    folder.mkdir()
    (folder / "glue.json").write_text(json.dumps(content))
    return folder


def join(folder: Path, *words) -> int:
    return glue.main([*map(str, words), "--to", str(folder / "results" / "nvidia-h200" / "glue.json")])


def test_results_of_several_folders_become_the_readmes_table(tmp_path):
    pretrained = [finetuned(tmp_path / "a", False, cola=0.4, mrpc=0.8), finetuned(tmp_path / "b", False, mnli=0.75)]
    random = finetuned(tmp_path / "c", True, cola=0.0)
    assert join(tmp_path, "--pretrained", *pretrained, "--random", random) == 0
    (tmp_path / "README.md").write_text("<!-- bench:glue -->\n<!-- /bench -->\n")
    assert command(tmp_path) == 0 and command(tmp_path, "--check") == 0
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[1] == "|  | MNLI m/mm | SST-2 | STS-B | RTE | QNLI | QQP | MRPC | CoLA | average |"
    assert lines[3] == "| **pretrained** | 75.0/75.0 | – | – | – | – | – | 80.0 | 40.0 | 67.5 |"
    assert lines[4] == "| random weights | –/– | – | – | – | – | – | – | 0.0 | 0.0 |"
    assert lines[6] == (
        "In percent, medians of 3 seeds; bfloat16. The average is over 4 of 9 numbers; missing: SST-2, STS-B, RTE, "
        "QNLI, QQP. Rows of training/evaluation: mnli 1,000/10/10, mrpc 1,000/10, cola 1,000/10. NVIDIA H200, "
        "torch 2.11.0, revision cafe, 2026-11-26."
    )


def test_without_results_of_finetuning_the_report_says_so(tmp_path):
    ledger.save(tmp_path, "gelu", written(entry("gelu/fwd/65536x3072", "cramfast", 1e-4)))
    assert glue.tables_of(ledger.load(tmp_path)) == "Nothing measured yet."


@pytest.mark.parametrize(
    "random, lr, flag, complaint",
    [
        (True, 4e-5, "--pretrained", "--pretrained: runs/x/final was finetuned from other weights"),
        (False, 4e-5, "--random", "--random: runs/x/final was finetuned from other weights"),
        (False, 1e-3, "--pretrained", "do not belong together: lr is 4e-05 there, 0.001 here"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(tmp_path, capsys, random, lr, flag, complaint):
    first, other = finetuned(tmp_path / "a", False, cola=0.4), finetuned(tmp_path / "b", random, lr=lr, cola=0.4)
    words = ("--pretrained", first, other) if flag == "--pretrained" else ("--pretrained", first, "--random", other)
    assert join(tmp_path, *words) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
