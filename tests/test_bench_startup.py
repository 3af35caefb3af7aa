"""The benchmark of the time to a run's first update, on a machine without a GPU."""

import json
import shutil
import sys

import pytest
import torch
from test_bench import entry, written

from bench import bars, ledger, tables
from bench.startup import COLD, WARM, Starter, StartupWork, measure_startup

ON_CPU = ("--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--max-length", "32", "--vocab-size", "400")


@pytest.fixture
def starter(tmp_path) -> Starter:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The encoder number {i} reads a sentence about number {i * i}." for i in range(400)))
    return Starter("cramfast-tiny", tmp_path / "start", (*ON_CPU, "--data", str(text)))


# In place of a run whose first update takes seconds: it comes at once.
STAND_IN = """
import pathlib, sys
run = pathlib.Path(sys.argv[1])
run.mkdir(parents=True)
(run / "metrics.jsonl").write_text("{}\\n")
"""


class Starts:
    """pytest-benchmark's fixture for rounds with a setup, each after something was compiled."""

    stats = None

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds):
        self.empty = []
        for _ in range(rounds):
            (target.compiled / "of an earlier run").mkdir(parents=True)
            if setup:
                setup()
            self.empty.append(not target.compiled.exists())
            target()
            shutil.rmtree(target.compiled, ignore_errors=True)


def test_a_start_ends_with_the_first_update_and_the_next_is_a_new_run(starter):
    for _ in range(2):
        starter()
        first, *_ = (starter.folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(first)["step"] == 1
        assert not (starter.folder / "run" / "summary.json").exists()


@pytest.mark.parametrize("cache", [COLD, WARM])
def test_compiled_kernels_are_there_or_not(starter, cache):
    starter.command = [sys.executable, "-c", STAND_IN, str(starter.folder / "run")]
    benchmark = Starts()
    measure_startup(benchmark, StartupWork("cramfast-tiny", cache), torch.float32, torch.device("cpu"), starter)
    assert benchmark.empty == [cache == COLD] * 3
    assert benchmark.extra_info["work"] == f"startup/{cache}/cramfast-tiny"


def test_a_run_that_fails_is_no_start(starter):
    starter.command += ["--nonsense"]
    with pytest.raises(RuntimeError, match=r"ended with 2 before its first update: .*--nonsense"):
        starter()


def test_bars_are_in_seconds_and_the_table_shows_them(tmp_path):
    entries = [entry(f"startup/{cache}/x", "cramfast", seconds) for cache, seconds in ((COLD, 16.0), (WARM, 6.25))]
    ledger.save(tmp_path, "startup", written(*entries))
    (device,) = ledger.load(tmp_path)
    found = {v.bar.work: (v.held, v.measured) for v in bars.evaluate(device) if v.bar.measure == bars.TIME}
    assert found == {"startup/cold": (True, 1.25), "startup/warm": (False, 0.8)}
    text = tables.module_tables("startup", [device], "results")
    assert "| x | bfloat16 | cold | 16.0 |" in text and "| x | bfloat16 | warm | 6.2 |" in text and ".png" not in text
