"""What is committed under bench/results holds what the project claims, and the README repeats it rightly."""

import json
import re
from pathlib import Path

import pytest

from bench import bars, glue, ledger, report
from cramfast.downstream.table import medians
from cramfast.train.progress import read_metrics

ROOT = Path(__file__).parents[1]
H200 = ROOT / "bench" / "results" / "nvidia-h200"


def final_loss(name: str) -> float:
    return [r["heldout_loss"] for r in read_metrics(H200 / name / "metrics.jsonl") if "heldout_loss" in r][-1]


def test_cramming_at_a_constant_batch_reaches_its_loss():
    config = json.loads((H200 / "pretrain-cramming-shuffled" / "config.json").read_text())
    settings, last = config["settings"], read_metrics(H200 / "pretrain-cramming-shuffled" / "metrics.jsonl")[-1]
    assert (settings["preset"], settings["recipe"], settings["budget"]) == ("crammed-bert", "cramming", "9e7tokens")
    assert (settings["batches"]["batch_size"], settings["batches"]["batch_ramp"]) == (1024, 0.0)
    assert config["environment"]["device"] == "NVIDIA H200"
    assert last["tokens"] >= 9e7
    assert final_loss("pretrain-cramming-shuffled") <= 3.9


def test_the_default_recipe_gets_far_in_150_seconds():
    config = json.loads((H200 / "crammed-bert-150s" / "config.json").read_text())
    settings, records = config["settings"], read_metrics(H200 / "crammed-bert-150s" / "metrics.jsonl")
    assert (settings["preset"], settings["recipe"], settings["budget"]) == ("crammed-bert", "cramfast", "150s")
    assert settings["optimizer"]["optimizer"] == "muon"
    assert config["environment"]["device"] == "NVIDIA H200"
    assert records[-1]["heldout_loss"] <= 3.4
    assert 150 <= records[-1]["seconds"] <= 151
    assert_said(records[-2:])


def assert_said(records: list[dict]) -> None:
    """The README tells how a run ended, whose last records these are: of an update, and of the held-out text."""
    (update, heldout), text = records, " ".join((ROOT / "README.md").read_text().split())
    accuracy = f"{heldout['heldout_accuracy']:.1%}".replace("%", " %")
    ended = f"to a held-out loss of {heldout['heldout_loss']:.2f} and an accuracy of {accuracy}"
    assert re.search(rf"{update['tokens'] / 1e6:.1f} million tokens[^.]*, {re.escape(ended)}", text), ended


def test_eight_minutes_of_pretraining_help_on_every_task():
    config = json.loads((H200 / "pretrain-cramfast-base" / "config.json").read_text())
    settings = config["settings"]
    records = read_metrics(H200 / "pretrain-cramfast-base" / "metrics.jsonl")
    assert (settings["preset"], settings["recipe"]) == ("cramfast-base", "cramfast")
    assert records[-1]["seconds"] >= 480
    assert_said(records[-2:])
    finetuned = json.loads((H200 / ledger.GLUE).read_text())
    assert {config["environment"]["device"], finetuned["environment"]["device"]} == {"NVIDIA H200"}
    rows = finetuned["rows"]
    assert {len(task["seeds"]) for row in rows.values() for task in row["tasks"].values()} == {3}
    pretrained, random = medians(rows[glue.PRETRAINED]), medians(rows[glue.RANDOM])
    assert pretrained.keys() == random.keys()
    assert all(pretrained[number] > random[number] for number in random)
    least = {
        ("cola", "dev", "matthews"): 0.12,
        ("sst2", "dev", "accuracy"): 0.84,
        ("mrpc", "dev", "f1"): 0.82,
        ("stsb", "dev", "pearson"): 0.65,
        ("mnli", "matched", "accuracy"): 0.58,
    }
    assert all(pretrained[number] >= share for number, share in least.items())


def test_200_steps_on_real_text_are_those_of_the_reference():
    runs = [H200 / f"{name}-200-steps" for name in ("kernels", "reference")]
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    assert configs[0]["settings"] == configs[1]["settings"]
    assert {config["environment"]["device"] for config in configs} == {"NVIDIA H200"}
    ours, theirs = (
        {r["step"]: r["heldout_loss"] for r in read_metrics(run / "metrics.jsonl") if "heldout_loss" in r}
        for run in runs
    )
    assert list(ours) == list(theirs) == list(range(20, 201, 20))
    # bfloat16 rounds both, each in its own way, while the loss falls from 7.5 to 5.6.
    assert all(abs(ours[step] - theirs[step]) <= 0.03 for step in ours)
    assert abs(sum(ours.values()) - sum(theirs.values())) / len(ours) <= 0.01


@pytest.mark.parametrize("name", ["pretrain-cramming-shuffled", "pretrain-cramming-sorted"])
def test_the_readme_says_what_the_results_say(name):
    row = f"`bench/results/nvidia-h200/{name}` | {final_loss(name):.2f} |"
    assert row in (ROOT / "README.md").read_text()


def test_preparing_the_corpus_stays_within_its_limits():
    (path,) = (ROOT / "bench" / "results").glob("cpu-2-cores/data.json")
    result = json.loads(path.read_text())
    assert result["text_bytes"] > 30e6  # the 140 MB corpus, compressed
    assert result["prepare_seconds"] <= 120
    assert result["prepare_peak_mib"] <= 1.5 * 1024
    assert min(result["loader_tokens_per_s"].values()) >= 5e6


def test_the_readme_and_the_benchmark_results_agree():
    assert report.disagreement(ROOT / "bench" / "results", ROOT / "README.md") is None


def test_every_plot_that_the_readme_shows_is_there():
    for plot in re.findall(r"\]\((bench/results/[^)]+\.png)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / plot).exists(), plot


# What the README says is missed: the eager call's way through Python, and a torch.compile that leaves less to gain. Of
# attention, an SDPA that leaves less than a copy would take for sequences of 64; rotary embedding, which costs more
# than 5 %. Of the loss, its speed in little memory against Liger, whose time for one of the vocabularies was 6.4 to
# 8.6 ms in six runs, for it waits for the host.
KNOWN_MISSES = {
    ("layer_norm/fwd", bars.HOST, "torch-eager"),
    ("layer_norm/fwd+bwd", bars.HOST, "torch-eager"),
    ("add_layer_norm/fwd+bwd", bars.SPEED, "torch-compile"),
    ("varlen_attention/fwd+bwd/all-64", bars.SPEED, "best"),
    ("varlen_attention/fwd+bwd/all-128-rotary", bars.SPEED, "cramfast"),
    ("varlen_attention/fwd+bwd/ragged-16-128-rotary", bars.SPEED, "cramfast"),
    ("mlm_loss/fwd+bwd", bars.SPEED, "liger"),
}


def test_every_bar_holds_on_an_h200_but_those_known_to_be_missed():
    (device,) = (device for device in ledger.load(ROOT / "bench" / "results") if device.folder == "nvidia-h200")
    verdicts = bars.evaluate(device)
    missed = {(v.bar.work, v.bar.measure, v.bar.against) for v in verdicts if v.measured is not None and not v.held}
    assert missed == KNOWN_MISSES
    # apex is on no package index; everything else was there.
    assert {v.bar.against for v in verdicts if v.measured is None} == {"apex"}


def test_what_was_measured_on_an_h200_ran_as_kernels_of_clean_revisions():
    for name in ("layer_norm", "gelu", "geglu_product", "embedding", "attention", "mlm_loss", "mask_tokens", "limits"):
        module = json.loads((H200 / f"{name}.json").read_text())
        assert module["environment"]["device"] == "NVIDIA H200"
        assert module["commit_info"] == {"id": module["environment"]["revision"], "dirty": False}
        for info in (entry["extra_info"] for entry in module["benchmarks"]):
            # These two read a value back on the host, which no graph can hold.
            assert info["timed_by"] == "graph" or (
                info["work"].startswith("mlm_loss/") and info["who"] in ("liger", "cut-cross-entropy")
            )
            # Longer sequences than the kernels take.
            ours = "sdpa" if "/all-1024" in info["work"] else "triton"
            assert info["backend"] == (ours if info["who"] == "cramfast" else None)


def test_steps_measured_on_an_h200_are_of_one_clean_revision_and_right():
    module = json.loads((H200 / "step.json").read_text())
    assert module["environment"]["device"] == "NVIDIA H200"
    assert module["commit_info"] == {"id": module["environment"]["revision"], "dirty": False}
    for info in (entry["extra_info"] for entry in module["benchmarks"]):
        assert info["loss_error"] <= 5e-4 and info["gradient_norm_error"] <= 5e-3
        assert info["backend"] == ("triton" if info["who"] == "cramfast" else None)
