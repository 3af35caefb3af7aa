"""What is committed under bench/results holds what the project claims, and the README repeats it rightly."""

import json
import re
import sys
from pathlib import Path

import pytest

from cramfast.train.progress import read_metrics

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # pytest puts tests/ there; the bench package lies in the root

from bench import report  # noqa: E402

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
