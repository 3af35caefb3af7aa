"""The benchmark suite's own arithmetic, ledger and report, on a machine without a GPU."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import (
    bars,
    ledger,
    report,
    tables,
    test_embedding,
    test_geglu_product,
    test_gelu,
    test_layer_norm,
    test_mask_tokens,
    test_mlm_loss,
)
from bench.cases import BOTH, DIRECTIONS, FORWARD, Sizes, fit
from bench.check import Call, WrongResult, guard, relative_errors
from bench.measure import input_sets, iterations_per_round, measure, warmup_rounds
from bench.peers import CRAMFAST, EAGER, Peer

ROOT = Path(__file__).parents[1]
LONG = ("step", "finetune", "accelerate", "startup")
SIZES = Sizes(torch.device("cpu"), torch.bfloat16, tokens=300, hidden=64, intermediate=48, vocabulary=128, positions=16)
FACTORIES = {
    "layer_norm": test_layer_norm.layer_norm_case,
    "add_layer_norm": test_layer_norm.add_layer_norm_case,
    "gelu": test_gelu.gelu_case,
    "geglu": test_gelu.geglu_case,
    "mlm_loss": test_mlm_loss.mlm_loss_case,
    "mlm_loss-sparse": test_mlm_loss.sparse_case,
    "embed-uniform": test_embedding.uniform_case,
    "embed-text": test_embedding.text_case,
}
ONLY_FORWARD = {
    "geglu_product": test_geglu_product.forward_case,
    "geglu_product_backward": test_geglu_product.backward_case,
}
EVERY = FACTORIES | ONLY_FORWARD
CALLS = [*itertools.product(FACTORIES, DIRECTIONS), *itertools.product(ONLY_FORWARD, (FORWARD,))]
ENVIRONMENT = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cramfast": "0.1.0",
    "revision": "0123456789ab",
    "date": "2026-11-24",
}
MACHINE = {
    "node": "secret-host",
    "machine": "x86_64",
    "system": "Linux",
    "cpu": {"brand_raw": "a CPU", "flags": ["sse"]},
}
HEAD = "# title\n\n"
README = HEAD + "".join(f"<!-- bench:{m} -->\n<!-- /bench -->\n" for m in ("limits", "layer_norm"))


# What is measured


@pytest.mark.parametrize(
    "factory, passes",
    [
        (test_layer_norm.layer_norm_case, {FORWARD: 2 * 768, BOTH: 5 * 768}),
        (test_layer_norm.add_layer_norm_case, {FORWARD: 4 * 768, BOTH: 8 * 768}),
        (test_gelu.gelu_case, {FORWARD: 2 * 3072, BOTH: 5 * 3072}),
        (test_gelu.geglu_case, {FORWARD: 3072 + 1536, BOTH: 2 * (3072 + 1536) + 3072}),
    ],
)
def test_bytes_are_those_of_the_definition(factory, passes):
    case = factory(Sizes(torch.device("cpu"), torch.bfloat16))
    assert case.bytes == {direction: 65_536 * elements * 2 for direction, elements in passes.items()}


def test_an_embedding_counts_a_row_for_each_token_and_its_tables_once():
    case = test_embedding._case(SIZES, "", torch.tensor([5, 5, 9] * 100), torch.arange(300) % 16)
    ids, rows, tables = 2 * 300 * 8, 300 * 64 * 2, (128 + 16) * 64 * 2
    assert case.bytes[FORWARD] == ids + 2 * rows
    assert case.bytes[BOTH] == case.bytes[FORWARD] + ids + 2 * rows + tables


def test_a_fifth_of_pretraining_text_is_the_mask_token():
    ids = test_embedding.text_case(replace(SIZES, tokens=20_000)).make(0).tensors["input_ids"]
    assert (ids == 4).float().mean() == pytest.approx(0.2 + 0.8 / (5 * sum(1 / n for n in range(1, 129))), abs=0.02)


def test_works_are_named_after_operator_direction_and_size():
    sizes = Sizes(torch.device("cpu"), torch.bfloat16)
    assert test_layer_norm.layer_norm_case(sizes).work(BOTH) == "layer_norm/fwd+bwd/65536x768"
    assert test_gelu.geglu_case(sizes, "tanh").work(BOTH) == "geglu/fwd+bwd/65536x3072-tanh"
    assert test_embedding.text_case(sizes).work(FORWARD) == "embed/fwd/65536x768x32768-text"


def test_predicted_rows_among_others_have_the_loss_of_a_head_on_all_tokens():
    sizes = replace(SIZES, dtype=torch.float64)
    sparse, dense = test_mlm_loss.sparse_case(sizes), test_mlm_loss.dense_case(sizes)
    losses = [case.eager(**case.make(0).tensors) for case in (sparse, dense)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # which eager PyTorch computes in fp32
    labels = dense.make(0).tensors["labels"]
    assert len(labels) == sizes.tokens and (labels != -100).sum() == sizes.tokens // 4
    assert [case.name for case in (sparse, dense)] == ["75x64x128-sparse", "300x64x128-dense"]
    assert all(dense.flops[direction] == 4 * sparse.flops[direction] for direction in DIRECTIONS)


@pytest.mark.parametrize(("free_gib", "tokens"), [(139, 65_536), (79, 32_768)])
def test_a_head_on_all_tokens_shrinks_where_its_logits_do_not_fit(free_gib, tokens):
    _, sizes = fit(test_mlm_loss.dense_case, Sizes(torch.device("cpu"), torch.bfloat16), free_gib * 2**30)
    assert sizes.tokens == tokens


@pytest.mark.parametrize("factory", [test_mlm_loss.sparse_case, test_mlm_loss.dense_case])
def test_no_bar_speaks_of_cases_that_are_there_for_comparison(factory):
    work = factory(SIZES).work(BOTH)
    assert not any(bar.applies(ledger.Record(work, "cramfast", "bfloat16", 1.0)) for bar in bars.BARS)


def test_tokens_shrink_until_the_case_fits_into_memory():
    case, sizes = fit(test_gelu.gelu_case, Sizes(torch.device("cpu"), torch.bfloat16), 8 * 2**30)
    assert sizes.tokens == 32_768
    assert case.name == "32768x3072"


@pytest.mark.parametrize("factory", EVERY.values(), ids=EVERY)
def test_inputs_repeat_with_their_seed_and_are_never_zeros(factory):
    case = factory(SIZES)
    one, again, other = (case.make(seed) for seed in (0, 0, 1))
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
        if tensor.is_floating_point():
            assert not torch.equal(tensor, other.tensors[name])
            assert tensor.std() > 0.01


# How it is measured


class Cpu:
    """A CPU in the place of `bench.gpu.Gpu`: no graphs, and so little free memory that limits are measured small."""

    device, cache_bytes, free_bytes = torch.device("cpu"), 2**16, 2**26

    def clock(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def capture(self, call):
        call()
        return call, "events"

    def peak_bytes(self, call) -> int:
        call()
        return 2**20

    def allocated_bytes(self) -> int:
        return 3 * 2**20

    def limited_to(self, limit: int | None):
        return nullcontext()

    def release(self) -> None:
        pass


def test_other_input_sets_touch_twice_the_cache_between_two_uses_of_one():
    cache = 60 * 2**20
    assert input_sets(set_bytes=192 * 2**20, cache_bytes=cache) == 2
    assert input_sets(set_bytes=10 * 2**20, cache_bytes=cache) == 13


@pytest.mark.parametrize("seconds", [2e-6, 50e-6, 1.3e-3, 40e-3])
@pytest.mark.parametrize("sets", [2, 3, 8])
def test_a_round_lasts_five_milliseconds_and_uses_every_set_equally(seconds, sets):
    iterations = iterations_per_round(seconds, sets)
    assert iterations * seconds >= 5e-3
    assert iterations % sets == 0
    assert (iterations - sets) * seconds < 5e-3


def test_a_clock_that_shows_nothing_does_not_ask_for_endless_rounds():
    assert iterations_per_round(0.0, 2) == 10_000


@pytest.mark.parametrize(("seconds", "rounds"), [(5e-3, 20), (9e-3, 12), (1.0, 1), (0.0, 100)])
def test_a_card_is_under_load_for_a_tenth_of_a_second_before_rounds_count(seconds, rounds):
    assert warmup_rounds(seconds) == rounds


class Rounds:
    """pytest-benchmark's fixture without its statistics."""

    stats = None

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, rounds, warmup_rounds, iterations, teardown):
        for _ in range(warmup_rounds + rounds):
            for _ in range(iterations):
                target()
            if teardown is not None:
                teardown()


class GeluThatOverwrites(torch.autograd.Function):
    """GELU whose backward leaves zeros in its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        copy = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(torch.nn.functional.gelu(copy), copy, grad)
        x.detach().zero_()
        return gradient


def test_inputs_that_a_peer_overwrites_are_put_back_before_the_next_call():
    seen, benchmark = [], Rounds()

    def watched(x):
        seen.append((len(x), x.std().item()))
        return GeluThatOverwrites.apply(x)

    def separate(inputs):
        return replace(inputs, tensors={"x": inputs.tensors["x"].detach().clone()})

    case, tiny = test_gelu.gelu_case(SIZES), test_gelu.gelu_case(replace(SIZES, tokens=2))
    peer = Peer("peer", lambda case: watched, prepare=separate, overwrites=("x",))
    measure(benchmark, Cpu(), case, tiny, BOTH, peer, {})
    spreads = [spread for rows, spread in seen if rows == SIZES.tokens]
    assert len(spreads) > 20 * benchmark.extra_info["input_sets"]
    assert min(spreads) > 0.5
    assert benchmark.extra_info["error_ratio"] <= 2


def test_host_time_is_that_of_the_small_case_whose_function_may_differ(reference):
    benchmark = Rounds()
    case, tiny = (test_mask_tokens.mask_tokens_case(replace(SIZES, tokens=tokens)) for tokens in (640, 64))
    measure(benchmark, Cpu(), case, tiny, FORWARD, CRAMFAST, {})
    assert benchmark.extra_info["host_seconds"] > 0


def checked(case, peer, direction=BOTH) -> float:
    inputs = case.make(0)
    call = Call(peer.load(case), peer.prepare(inputs), direction)
    call()
    return guard(case, peer, call, inputs, {})


@pytest.mark.parametrize(("name", "direction"), CALLS)
def test_the_guard_passes_what_is_right(name, direction, reference):
    assert checked(EVERY[name](SIZES), CRAMFAST, direction) <= 2
    assert checked(EVERY[name](SIZES), EAGER, direction) == 1


def test_pytorchs_errors_are_measured_once_for_all_peers():
    asked = []

    def eager(x):
        asked.append(x.dtype)
        return torch.nn.functional.gelu(x)

    case, known = replace(test_gelu.gelu_case(SIZES), eager=eager), {}
    for who in ("one", "another"):
        for direction in (FORWARD, BOTH):
            inputs = case.make(0)
            call = Call(lambda x: torch.nn.functional.gelu(x.double()).to(x.dtype), inputs, direction)
            call()
            assert 0 < guard(case, Peer(who, None), call, inputs, known) <= 2
    assert asked == [SIZES.dtype] * 2 and len(known) == 2


def test_the_reference_by_chunks_is_the_reference(monkeypatch):
    case = test_embedding.text_case(replace(SIZES, dtype=torch.float64))
    inputs = case.make(0)
    call = Call(case.eager, inputs, BOTH)
    call()
    results = {"output 0": call.outputs[0]} | {f"gradient of {k}": g for k, g in call.gradients.items()}
    monkeypatch.setattr("bench.check._CHUNK", 77)
    (errors,) = relative_errors(case, inputs, BOTH, [results])
    assert set(errors) == set(results)
    assert max(errors.values()) < 1e-12


class Scaled(torch.autograd.Function):
    """The identity forward, with a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (lambda y: y * 1.05, "output 0"),
        (lambda y: y.masked_fill(torch.arange(300)[:, None] == 299, math.nan), "output 0"),
        (Scaled.apply, "gradient of x"),
    ],
    ids=("scaled", "nan", "gradient"),
)
def test_the_guard_rejects_a_wrong_kernel(wrong, complaint):
    case = test_layer_norm.layer_norm_case(SIZES)
    peer = Peer("sloppy", lambda case: lambda **tensors: wrong(case.eager(**tensors)))
    with pytest.raises(WrongResult, match=rf"sloppy on layer_norm/fwd\+bwd/300x64: {complaint} has relative error"):
        checked(case, peer)


def test_the_guard_rejects_pytorch_where_it_is_not_finite():
    case = replace(test_gelu.gelu_case(SIZES), eager=lambda x: x / 0)
    with pytest.raises(WrongResult, match="torch-eager on gelu/fwd/300x96: output 0 is not finite"):
        checked(case, EAGER, FORWARD)


def test_poison_shows_what_a_replay_leaves_unwritten_and_spares_the_inputs():
    case = test_layer_norm.add_layer_norm_case(SIZES)
    call = Call(lambda x, residual, weight, bias: (x, x + residual), replace(case, rows=()).make(0), FORWARD)
    call()
    call.poison()
    assert call.outputs[0].isfinite().all()  # it is an input
    assert call.outputs[1].isnan().all()


def test_masking_is_right_in_every_token_or_not_at_all(reference):
    case = test_mask_tokens.mask_tokens_case(SIZES)
    assert checked(case, CRAMFAST, FORWARD) == 0
    assert checked(case, EAGER, FORWARD) == 1
    for place in range(3):

        def wrong(place=place, **tensors):
            results = [result.clone() for result in case.ours(**tensors)]
            results[place][7] += 1
            return tuple(results)

        sloppy = Peer("sloppy", lambda case, wrong=wrong: wrong)
        with pytest.raises(
            WrongResult, match=f"sloppy on mask_tokens/fwd/18x16: output {place} is not that of the def"
        ):
            checked(case, sloppy, FORWARD)


def test_masking_reads_and_writes_every_id_once():
    case = test_mask_tokens.mask_tokens_case(Sizes(torch.device("cpu"), torch.bfloat16))
    assert case.work(FORWARD) == "mask_tokens/fwd/512x128"
    assert case.bytes == {FORWARD: 2 * (65_536 + 16_384) * 8}


def test_plain_masking_hides_a_quarter_of_every_sequence():
    case = test_mask_tokens.mask_tokens_case(replace(SIZES, positions=100, vocabulary=30_000))
    ids = case.make(0).tensors["input_ids"]
    torch.manual_seed(0)
    hidden, positions, labels = case.eager(**case.make(0).tensors)
    assert torch.equal(ids[positions], labels)
    assert (positions // 100).bincount().tolist() == [25] * 3 and len(positions.unique()) == 75
    assert (hidden == 4).sum() == 3 * 20
    assert set(torch.where(hidden != ids)[0].tolist()) <= set(positions.tolist())
    assert (hidden != ids).sum() in (65, 66)  # 3 × 2 are replaced, possibly by what stood there


def test_poison_fills_integers_with_what_no_result_is():
    case = test_mask_tokens.mask_tokens_case(SIZES)
    call = Call(case.eager, case.make(0), FORWARD)
    call()
    call.poison()
    assert all((output < -(2**60)).all() for output in call.outputs)


def test_ligers_gradients_come_back_as_those_of_the_packed_input():
    case = test_gelu.geglu_case(SIZES, "tanh")
    liger = replace(test_gelu.LIGER, load=lambda case: lambda a, b: torch.nn.functional.gelu(a, approximate="tanh") * b)
    assert checked(case, liger) <= 2


def test_a_peer_that_is_not_installed_is_missing_by_name():
    peer = Peer("peer", lambda case: None, ("no_such_module_anywhere",), "the-peer")
    assert peer.missing() == "the-peer is not installed"
    assert CRAMFAST.missing() is None


# Running it


def bench(*words: str, python=("-m", "pytest"), **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, *python, "bench", "--benchmark-only", "-q", "-p", "no:cacheprovider", *words]
    fixed = {"CUDA_VISIBLE_DEVICES": "", "CRAMFAST_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
    # In a process that xdist has started, pytest-benchmark takes itself for disabled.
    environment = os.environ | fixed | {"PYTEST_XDIST_WORKER": ""} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_gpu_the_suite_says_so_in_one_line():
    done = bench()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("bench: skipped, ")]) == 1
    assert "failed" not in done.stdout and "error" not in done.stdout


NAMED = [
    ((), {"attention", "layer_norm"}),
    (("--all",), {"attention", "layer_norm", "step", "finetune", "accelerate", "startup"}),
    (("-k", "test_step.py or gelu"), {"step", "gelu"}),
    (("bench/test_startup.py",), {"layer_norm", "startup"}),
]
# In one process, of which most is to import.
LIST = """
import sys
import pytest
from test_bench import NAMED
for words, _ in NAMED:
    print("listing", flush=True)
    pytest.main([*sys.argv[1:], "--collect-only", *words])
"""


@pytest.mark.slow
def test_what_takes_long_is_measured_if_it_is_named():
    done = bench(python=("-c", LIST), PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    assert done.returncode == 0, done.stderr
    for (words, modules), listed in zip(NAMED, done.stdout.split("listing\n")[1:], strict=True):
        found = {module for module in ("attention", "layer_norm", "gelu", *LONG) if f"bench/test_{module}.py" in listed}
        assert modules <= found and found.isdisjoint({*LONG} - modules)
        (left_out,) = [line for line in listed.splitlines() if line.startswith("bench: left out")] or [""]
        assert all((module in left_out) == (module not in modules and "-k" not in words) for module in LONG)


@pytest.mark.slow
def test_a_run_on_a_stand_in_machine_ends_in_a_table_and_a_results_file(tmp_path):
    plugin = "import test_bench\nfrom bench import gpu\n\ngpu.find = test_bench.Cpu\n"
    (tmp_path / "cpu_as_machine.py").write_text(plugin)
    options = ["-p", "cpu_as_machine", "--tokens", "256", "--dtype", "float32", "--results", str(tmp_path / "results")]
    words = ["-k", "test_layer_norm.py and add and not compile or limits and copy", "--revision", "cafe"]
    done = bench(*options, *words, PYTHONPATH=os.pathsep.join(map(str, (tmp_path, ROOT / "tests"))))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "add_layer_norm/fwd+bwd/256x768  cramfast " in done.stdout
    (device,) = ledger.load(tmp_path / "results")
    assert set(device.modules) == {"layer_norm", "limits"}
    assert {(r.direction, r.who) for r in device.modules["layer_norm"].records} == {
        (direction, who) for direction in DIRECTIONS for who in ("cramfast", "torch-eager")
    }
    for record in device.modules["layer_norm"].records:
        assert record.timed_by == "events" and record.seconds > 0 and record.host_seconds > 0
        assert device.copy_share(record) > 0
    content = json.loads((tmp_path / "results" / device.folder / "layer_norm.json").read_text())
    assert content["environment"]["revision"] == "cafe"
    assert "data" not in content["benchmarks"][0]["stats"]
    assert content["benchmarks"][0]["stats"]["median"] == content["benchmarks"][0]["extra_info"]["seconds"]


# The ledger


def entry(work, who, seconds, dtype="bfloat16", **info) -> dict:
    extra = {"work": work, "who": who, "dtype": dtype, "seconds": seconds, "timed_by": "graph", "bytes": None} | info
    return {"name": work, "param": who, "params": {"peer": object()}, "extra_info": extra, "stats": {"median": seconds}}


def written(*entries: dict, **environment) -> dict:
    return ledger.document(list(entries), ENVIRONMENT | environment, MACHINE, "5.3.1", "2026-11-24T00:00:00+00:00")


def whos(content: dict) -> dict[str, float]:
    return {e["extra_info"]["who"]: e["extra_info"]["seconds"] for e in content["benchmarks"]}


@pytest.mark.parametrize(
    "card, folder",
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Tesla T4 (rev. 2)", "tesla-t4-rev-2"),
    ],
)
def test_a_device_has_its_folder(card, folder):
    assert ledger.slug(card) == folder


def test_a_document_tells_nothing_about_whose_machine_it_was():
    text = json.dumps(written(entry("gelu/fwd/1x2", "cramfast", 1e-6)))
    assert "secret-host" not in text and "flags" not in text
    assert '"brand_raw": "a CPU"' in text


def test_what_ran_replaces_itself_and_the_rest_of_the_same_revision_stays():
    old = written(entry("w/fwd/1", "cramfast", 5.0), entry("w/fwd/1", "liger", 7.0), date="2026-11-01")
    merged, dropped = ledger.merge(old, written(entry("w/fwd/1", "cramfast", 4.0)))
    assert whos(merged) == {"cramfast": 4.0, "liger": 7.0}
    assert dropped == 0


@pytest.mark.parametrize("other", [{"revision": "ffff"}, {"device": "NVIDIA L4"}, {"torch": "2.13.0"}])
def test_records_of_another_revision_or_machine_are_dropped(other):
    old = written(entry("w/fwd/1", "cramfast", 5.0), entry("w/fwd/1", "liger", 7.0), **other)
    merged, dropped = ledger.merge(old, written(entry("w/fwd/1", "cramfast", 4.0)))
    assert whos(merged) == {"cramfast": 4.0}
    assert dropped == 1


def test_records_of_an_unknown_revision_are_not_mixed():
    old = written(entry("w/fwd/1", "liger", 7.0), revision=None)
    assert ledger.merge(old, written(entry("w/fwd/1", "cramfast", 4.0), revision=None))[1] == 1


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    ledger.save(tmp_path, "gelu", written(entry("w/fwd/1", "cramfast", 5.0)))
    path = tmp_path / "nvidia-h200" / "gelu.json"
    before = path.read_text()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        ledger.save(tmp_path, "gelu", written(entry("w/fwd/1", "cramfast", 4.0)))
    assert path.read_text() == before


# The report


def results(folder: Path, ours=50e-6, eager_host=60e-6) -> Path:
    """A results folder with a copy at 4 TB/s and LayerNorm, ours forward + backward three times `ours`."""
    copy = entry("copy/fwd/512MiB", "torch-eager", 2.5e-4, bytes=10**9)
    norm = {"bytes": 192_000_000, "host_seconds": 20e-6, "peak_mib": 96.4}
    both = norm | {"bytes": 480_000_000}
    ledger.save(folder, "limits", written(copy))
    ledger.save(
        folder,
        "layer_norm",
        written(
            entry("layer_norm/fwd/65536x768", "cramfast", ours, **norm),
            entry("layer_norm/fwd+bwd/65536x768", "cramfast", 3 * ours, **both),
            entry("layer_norm/fwd+bwd/65536x768", "torch-compile", 180e-6, **(both | {"host_seconds": None})),
            entry("layer_norm/fwd+bwd/65536x768", "torch-eager", 540e-6, **(both | {"host_seconds": eager_host})),
            entry("layer_norm/fwd+bwd/65536x768", "liger", 540e-6, timed_by="events", **both),
        ),
    )
    return folder


def command(folder: Path, *flags: str) -> int:
    return report.main(["--results", str(folder / "results"), "--readme", str(folder / "README.md"), *flags])


def test_the_report_fills_the_readme_and_the_check_then_agrees(tmp_path, capsys):
    results(tmp_path / "results")
    (tmp_path / "README.md").write_text(README)
    assert command(tmp_path, "--check") == 1
    assert "bench:limits" in capsys.readouterr().out
    assert command(tmp_path) == 0
    assert command(tmp_path, "--check") == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(HEAD)
    assert "| copy | 512MiB | bfloat16 | 4.00 TB/s |" in text
    assert "| **cramfast** | 50.0 | 150 | 96 % | 80 % | 1.20 | 3.60 | 96 | 20.0 |" in text
    assert "| liger (by events) |  | 540 |  | 22 % | 0.33 | 1.00 | 96 | 20.0 |" in text
    assert "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, revision 0123456789ab, 2026-11-24." in text
    assert "(results/nvidia-h200/layer_norm.png)" in text
    assert (tmp_path / "results" / "nvidia-h200" / "layer_norm.png").stat().st_size > 5000


def test_the_check_names_the_first_line_that_differs(tmp_path, capsys):
    results(tmp_path / "results")
    (tmp_path / "README.md").write_text(README)
    command(tmp_path)
    results(tmp_path / "results", ours=40e-6)
    capsys.readouterr()
    assert command(tmp_path, "--check") == 1
    said = capsys.readouterr().out
    assert "bench:layer_norm" in said and "50.0" in said and "40.0" in said


def test_without_results_the_readme_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)
    assert command(tmp_path) == 0
    assert (tmp_path / "README.md").read_text().count("Nothing measured yet.") == 2


def test_results_without_a_place_in_the_readme_are_an_error(tmp_path, capsys):
    results(tmp_path / "results")
    (tmp_path / "README.md").write_text(HEAD)
    assert command(tmp_path, "--check") == 2
    assert "no <!-- bench:layer_norm --> section" in capsys.readouterr().err


def test_bars_are_held_missed_or_absent(tmp_path, capsys):
    results(tmp_path / "results", eager_host=19e-6)
    (device,) = ledger.load(tmp_path / "results")
    verdicts = {(v.bar.work, v.bar.measure, v.bar.against): v for v in bars.evaluate(device)}
    assert verdicts["layer_norm/fwd", bars.COPY, ""].held  # 96 % of 90 %
    assert not verdicts["layer_norm/fwd+bwd", bars.COPY, ""].held  # 80 % of 85 %
    assert not verdicts["layer_norm/fwd+bwd", bars.SPEED, "torch-compile"].held  # 1.2 of 1.3
    assert verdicts["layer_norm/fwd+bwd", bars.SPEED, "liger"].held  # 3.6 of 3.5
    assert verdicts["layer_norm/fwd+bwd", bars.HOST, "torch-eager"].measured == pytest.approx(0.95)
    assert verdicts["gelu/fwd", bars.COPY, ""].measured is None
    (tmp_path / "README.md").write_text(README)
    assert command(tmp_path, "--bars") == 0
    said = capsys.readouterr().out
    assert "held    nvidia-h200  layer_norm/fwd/65536x768 bfloat16: share of copy bandwidth 96.0 %, bar 90.0 %" in said
    assert (
        "MISSED  nvidia-h200  layer_norm/fwd+bwd/65536x768 bfloat16: speed against torch-compile 1.20×, bar 1.30×"
        in said
    )
    assert "absent  nvidia-h200  gelu/fwd: " in said
    # The README names those that are not held, and counts the others.
    listed = bars.summary([device])
    not_held = [line for line in said.splitlines() if not line.startswith("held")]
    assert listed.splitlines()[2:] == [f"- `{line}`" for line in not_held]
    assert listed.startswith(f"{len(said.splitlines()) - len(not_held)} of {len(said.splitlines())} bars held")


def test_the_exact_geglu_is_held_against_ligers_tanh_form(tmp_path):
    exact, tanh = "geglu/fwd+bwd/65536x3072", "geglu/fwd+bwd/65536x3072-tanh"
    entries = [entry(exact, "cramfast", 4e-4), entry(tanh, "cramfast", 3e-4), entry(tanh, "liger", 3.5e-4)]
    ledger.save(tmp_path, "gelu", written(*entries))
    (device,) = ledger.load(tmp_path)
    (bar,) = (bar for bar in bars.BARS if bar.work == "geglu/fwd+bwd" and bar.against == "liger")
    assert {v.work.split()[0]: v.held for v in bars.evaluate(device, (bar,))} == {exact: False, tanh: True}


def test_a_regression_against_an_earlier_revision_is_marked(tmp_path, capsys):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    results(tmp_path / "results")
    git("add", "results")
    git("commit", "-qm", "before")
    results(tmp_path / "results", ours=53e-6)
    assert command(tmp_path, "--against", "HEAD") == 0
    assert "| layer_norm/fwd/65536x768 bfloat16 | 50.0 | 53.0 | 1.06 | **slower** |" in capsys.readouterr().out
    results(tmp_path / "results", ours=52e-6)
    assert command(tmp_path, "--against", "HEAD") == 0
    assert "| layer_norm/fwd/65536x768 bfloat16 | 50.0 | 52.0 | 1.04 |  |" in capsys.readouterr().out
    assert command(tmp_path, "--against", "no-such-revision") == 2


def test_the_table_of_a_run_shows_only_what_ran(tmp_path):
    (device,) = ledger.load(results(tmp_path))
    lines = tables.run_table(device, {("layer_norm/fwd+bwd/65536x768", "cramfast", "bfloat16")})
    assert len(lines) == 2
    assert lines[1].split() == ["layer_norm/fwd+bwd/65536x768", "cramfast", "bfloat16", "150", "80", "%", "1.20"]
