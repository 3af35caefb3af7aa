"""The first thing a newcomer types, as they type it: no flags, no GPU, no token cache."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cramfast

ROOT = Path(cramfast.__file__).parents[1]


@pytest.mark.slow
def test_the_default_run_learns_within_two_minutes(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CRAMFAST_CACHE": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "cramfast.pretrain"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    elapsed = time.monotonic() - began
    assert (run.returncode, run.stderr) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_loss"] <= summary["unigram_entropy"] - 0.5, run.stdout
    assert elapsed <= 120
    assert f"{summary['heldout_loss']:.4f} nats" in run.stdout
    assert f"{summary['unigram_entropy']:.4f} nats" in run.stdout
    assert f"held-out accuracy {summary['heldout_accuracy']:.1%}" in run.stdout
    assert f"{folder.relative_to(tmp_path)}/final" in run.stdout
    assert len(re.findall(r"\[MASK\].*\n    guesses: ", run.stdout)) == len(summary["examples"]) == 3
