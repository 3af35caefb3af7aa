import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_operators import DEVICE

from cramfast import doctor as command
from cramfast import kernels
from cramfast.device import pick_device, pick_dtype
from cramfast.kernels import OPERATORS, selftest

ROOT = Path(__file__).parents[1]
PEERS = ("flash-attn", "apex (NVIDIA's)", "liger-kernel", "tensorboard")


def without_gpu(**environment) -> dict[str, str]:
    """The environment of a process."""
    paths = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return os.environ | paths | environment


def doctor(*flags, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cramfast.doctor", *flags]
    return subprocess.run(command, env=without_gpu(**environment), capture_output=True, text=True)


def findings(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The table by its first column; what is wrapped over several lines is put together again."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    column = done.stdout.index(torch.__version__.split("+")[0], done.stdout.index("torch")) - done.stdout.index("torch")
    rows, name = {}, ""
    for line in done.stdout.splitlines():
        name = line[:column].strip() or name
        rows[name] = f"{rows.get(name, '')} {line[column:].strip()}".strip()
    return rows


# A process takes seconds to load torch.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, os, sys
from cramfast import doctor
results = []
for flags, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = doctor.main(flags)
    results.append((code, out.getvalue(), err.getvalue()))
    for name in environment:
        del os.environ[name]
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def done_with(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """What the command does without anything, and with each of these in the environment or as a flag."""
    wide = {"COLUMNS": "500"}
    given = {
        "": ([], {}),
        "cache": ([], wide | {"CRAMFAST_CACHE": str(tmp_path_factory.mktemp("cache") / "a" / "b")}),
        "triton": ([], wide | {"CRAMFAST_KERNELS": "triton"}),
        "nonsense": ([], wide | {"CRAMFAST_KERNELS": "nonsense"}),
        "--test": (["--test"], {}),
    }
    script = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps([*given.values()])]
    done = subprocess.run(script, env=without_gpu(), capture_output=True, text=True, check=True)
    results = zip(given.items(), json.loads(done.stdout), strict=True)
    return {name: subprocess.CompletedProcess(call, *result) for (name, call), result in results}


@pytest.fixture(scope="module")
def found(done_with) -> dict[str, str]:
    return findings(done_with[""])


def test_every_operator_has_a_backend_and_a_reason(found):
    for name in OPERATORS:
        backend, _, reason = found[name].partition(" ")
        assert backend in ("triton", "reference")
        assert reason.startswith("(")
        assert len(reason) > 4


def test_who_attends_past_the_kernels(found):
    assert found["attention past 512"] == found["past 512, one length"] == "sdpa (cpu device)"


def test_long_attention_is_chosen_for_what_training_here_uses(monkeypatch):
    given = []
    choice = types.SimpleNamespace(backend="varlen-attn", reason="flash-attn is not installed")
    monkeypatch.setattr(kernels, "choose_long", lambda *arguments: given.append(arguments) or choice)
    names, rows = zip(*command._operators(), strict=True)
    place = names.index("attention past 512")
    assert names[place - 1] == "varlen_attention"
    assert names[place + 1] == "past 512, one length"
    assert rows[place] == rows[place + 1] == "varlen-attn (flash-attn is not installed)"
    device = pick_device()
    assert given == [(device, pick_dtype(device), 64), (device, pick_dtype(device), 64, 0.0, True)]


def test_versions_and_what_a_machine_without_a_gpu_does(found):
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert {"triton", "driver"} <= found.keys()
    assert found["matrix products in"] == "float32"
    assert found["card"].startswith("none (")
    assert "CPU threads" in found["card"]


def test_disk_and_shared_memory(found):
    assert "GiB free" in found["token cache"]
    assert "GiB free" in found["here"]
    assert "shared memory" in found or not Path("/dev/shm").is_dir()


def test_the_cache_need_not_exist(done_with):
    _, environment = done_with["cache"].args
    cache = environment["CRAMFAST_CACHE"]
    assert cache in findings(done_with["cache"])["token cache"]
    assert not Path(cache).exists()


def test_every_peer_is_found_or_not(found):
    for name in PEERS:
        assert found[name]


def write_module(folder: Path, name: str, text: str) -> None:
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True)
    for parent in (path, *path.parents):
        if parent == folder:
            break
        (parent / "__init__.py").touch()
    (path / "__init__.py").write_text(text)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (
            {"liger_kernel": "", "apex.normalization": "", "flash_attn": "raise ImportError('undefined\\nsymbol')"},
            {
                "liger-kernel": "installed",
                "apex (NVIDIA's)": "installed",
                "flash-attn": "does not import: undefined symbol",
            },
        ),
        (
            {"apex": "", "flash_attn": "import no_such_thing"},
            {"apex (NVIDIA's)": "not installed", "flash-attn": "does not import: No module named 'no_such_thing'"},
        ),
    ],
)
def test_peers_that_are_there_broken_or_another_project(tmp_path, modules, expected):
    for name, text in modules.items():
        write_module(tmp_path, name, text)
    rows = findings(doctor(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), COLUMNS="200"))
    for peer, finding in expected.items():
        # Where the real one is installed as well, its version stands in place of "installed".
        assert rows[peer] == finding or (finding == "installed" and rows[peer][0].isdigit())


@pytest.mark.parametrize("mode", ["triton", "nonsense"])
def test_a_wrong_choice_of_kernels_is_a_finding(done_with, mode):
    rows = findings(done_with[mode])
    assert all(
        f"none: CRAMFAST_KERNELS={mode}" in rows[name]
        for name in (*OPERATORS, "attention past 512", "past 512, one length")
    )


def test_wrong_flags_are_one_line():
    done = doctor("--cure")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--cure" in done.stderr
    assert done.stdout == ""


def test_testing_without_a_kernel_says_how_to_get_one(done_with):
    done = done_with["--test"]
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "cramfast.doctor: --test: no operator runs as a kernel here; TRITON_INTERPRET=1 interprets them on a CPU"
    ]
    for name in OPERATORS:
        assert re.search(rf"^{name} +reference \(.+\)$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("operator", ["adamw", "muon"])
def test_the_cases_of_the_updates_are_right(triton_kernels, operator):
    module = sys.modules[selftest.__module__]
    worst = module._worst_error(*module._CASES[operator], torch.device(DEVICE), torch.float32)
    assert 0 < worst <= 1


WRONG = """
import math, sys, torch
from cramfast import doctor
from cramfast.kernels import selftest
module = sys.modules["cramfast.kernels.selftest"]
module.OPERATORS, module._TOKENS = ("gelu",), {"cpu": 25}
kernel, reference, inputs = module._CASES["gelu"]
for factor in (0.0, 0.5, math.nan):
    module._CASES["gelu"] = (lambda x: kernel(x) * (1 + factor), reference, inputs)
    print("factor", factor)
    print("code", doctor.main(["--test"]))
"""


@pytest.fixture(scope="module")
def tested() -> dict[str, str]:
    """What a test says of a kernel whose results are wrong by a factor."""
    environment = without_gpu(TRITON_INTERPRET="1", CRAMFAST_KERNELS="auto")
    done = subprocess.run([sys.executable, "-c", WRONG], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *parts = done.stdout.split("factor ")
    return {factor: said for factor, _, said in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize(("factor", "code", "verdict"), [(0.0, 0, "right"), (0.5, 1, "WRONG"), (math.nan, 1, "WRONG")])
def test_every_dtype_of_an_operator_is_right_or_wrong(tested, factor, code, verdict):
    said = tested[str(factor)]
    assert said.splitlines()[-1] == f"code {code}"
    for dtype in ("float32", "float16"):
        assert re.search(rf"^gelu +{dtype} +{verdict}, .+ of the allowed error, [\d.]+ s$", said, re.MULTILINE)
