"""The benchmark of a whole training step on a machine without a GPU: its models, batches, guard, bars and tables."""

import math
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_bench import ROOT, Cpu, Rounds, bench, command, entry, written

from bench import bars, hugging_face, ledger, measure_step, plots, steps, tables, test_step
from bench.check import WrongResult
from bench.hugging_face import HF_BERT, HF_MODERNBERT, MODERNBERT_BASE
from bench.measure import Refused
from bench.plain import PLAIN, PlainBert
from bench.steps import OURS, Outcome, StepPeer, StepWork, Training, masked_batch
from cramfast.config import PRESETS
from cramfast.hugging_face import write_weights
from cramfast.model import Bert

CPU = torch.device("cpu")
_SMALL = {"vocab_size": 211, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 32}
CRAMMED = StepWork(
    "crammed-6x16", replace(PRESETS["crammed-bert"], intermediate_size=48, **_SMALL), PLAIN, 6, 16, mib_per_place=0.01
)
BERT = StepWork(
    "bert-ragged",
    replace(PRESETS["bert-base"], intermediate_size=64, **_SMALL),
    HF_BERT,
    6,
    16,
    mib_per_place=0.01,
    shortest=3,
)
MODERNBERT = StepWork(
    "modernbert-2x144",
    replace(MODERNBERT_BASE, intermediate_size=48, **_SMALL | {"num_layers": 4, "max_positions": 256}),
    HF_MODERNBERT,
    2,
    144,
    mib_per_place=0.01,
)


@pytest.fixture(params=[CRAMMED, BERT], ids=lambda work: work.name)
def work(request, reference) -> StepWork:
    """A work that this project takes part in."""
    if missing := request.param.ordinary.missing():
        pytest.skip(missing)
    return request.param


@pytest.fixture
def hasty(monkeypatch):
    """Measures for milliseconds."""
    monkeypatch.setattr(measure_step, "_WARM_SECONDS", 0.01)
    monkeypatch.setattr(measure_step, "_ROUND_SECONDS", 0.001)


def eager_of(work: StepWork) -> StepPeer:
    return steps.ordinary_peers(work.ordinary)[0]


def start(work: StepWork, peer: StepPeer, dtype=torch.float32):
    return peer.start(Training(work, masked_batch(work, CPU), dtype))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ours(work: StepWork) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of this project's model."""
    batch, model = masked_batch(work, CPU), steps.initial_bert(work.config)
    loss = model(batch.masked_ids, batch.cu_seqlens, batch.max_seqlen, batch.positions, batch.labels)
    loss.backward()
    return loss.item(), gradients(model)


def theirs(work: StepWork) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the ordinary model."""
    model = work.ordinary.build(work.config).train()
    loss = work.ordinary.loss(model, work.ordinary.arguments(masked_batch(work, CPU)))
    loss.backward()
    return loss.item(), gradients(model)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        scale = other[name].norm() + 1e-6
        assert (gradient - other[name]).norm() <= 1e-4 * scale, name


# The models


def test_the_plain_model_is_crammed_bert(reference):
    (loss, found), (expected_loss, expected) = theirs(CRAMMED), ours(CRAMMED)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)


def test_the_plain_model_has_the_parameters_of_the_preset():
    with torch.device("meta"):
        model, bert = PlainBert(PRESETS["crammed-bert"]), Bert(PRESETS["crammed-bert"])
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in bert.named_parameters()}


def test_hugging_faces_bert_is_bert(reference):
    pytest.importorskip("transformers")
    (loss, found), (expected_loss, expected) = theirs(BERT), ours(BERT)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    # A key's bias shifts all of a query's scores alike: its gradient is nothing but rounding.
    key_bias = {name for name in found if name.endswith("self.key.bias")}
    assert max(found[name].abs().max() for name in key_bias) < 1e-7
    expected = write_weights(expected, BERT.config)
    assert_close(*({k: g for k, g in each.items() if k not in key_bias} for each in (found, expected)))


def test_modernbert_has_the_size_and_the_windows_that_are_counted(reference):
    transformers = pytest.importorskip("transformers")
    config, base = hugging_face.hf_modernbert(MODERNBERT.config).config, transformers.ModernBertConfig()
    assert (config.local_attention, config.layer_types) == (base.local_attention, base.layer_types[:4])
    assert config.num_hidden_layers == 4 and config.hidden_size == 32
    mine = MODERNBERT_BASE
    assert (base.vocab_size, base.hidden_size, base.num_hidden_layers) == (50_368, mine.hidden_size, mine.num_layers)
    assert (base.intermediate_size, base.num_attention_heads) == (mine.intermediate_size, mine.num_heads)
    # Two of four layers see everything; in the others token i those from i - 64 to i + 64.
    seen = sum(abs(i - j) <= 64 for i in range(144) for j in range(144)) / 144
    counts = torch.tensor([144, 144])
    assert HF_MODERNBERT.mean_attended(counts, MODERNBERT.config) == pytest.approx((2 * 144 + 2 * seen) / 4)


# The batch


def test_a_batch_is_masked_as_the_training_step_masks_its_first(work):
    batch = masked_batch(work, CPU)
    hidden = (batch.masked_ids != batch.input_ids).nonzero()[:, 0]
    assert set(hidden.tolist()) <= set(batch.positions.tolist())
    assert torch.equal(batch.labels, batch.input_ids[batch.positions])
    assert len(batch.positions) == round(0.25 * len(batch.input_ids))
    assert batch.input_ids.min() >= 5 and batch.input_ids.max() < work.config.vocab_size


def test_equal_sequences_fill_the_batch_and_ragged_ones_half_of_it():
    assert CRAMMED.counts().tolist() == [16] * 6
    counts = test_step.BERT_RAGGED.counts()
    assert len(counts) == 512 and counts.min() >= 16 and counts.max() <= 128
    assert int(counts.sum()) / (512 * 128) == pytest.approx(0.56, abs=0.02)


def test_parts_of_a_batch_are_the_batch(work):
    batch = masked_batch(work, CPU)
    parts = list(batch.parts(4))
    assert [len(part.counts) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.masked_ids for part in parts]), batch.masked_ids)
    assert torch.equal(torch.cat([part.counts for part in parts]), batch.counts)
    for part in parts:
        assert torch.equal(part.labels, part.input_ids[part.positions])
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def test_padding_is_masked_out_and_not_predicted():
    batch = masked_batch(BERT, CPU)
    arguments = HF_BERT.arguments(batch)
    real = arguments["attention_mask"].bool()
    assert real.shape == (6, 16) and real.sum(1).tolist() == batch.counts.tolist()
    assert torch.equal(arguments["input_ids"][real], batch.masked_ids)
    assert (arguments["labels"][~real] == -100).all()
    assert torch.equal(arguments["labels"][arguments["labels"] != -100], batch.labels)
    assert "attention_mask" not in HF_BERT.arguments(masked_batch(CRAMMED, CPU))


def test_flops_count_real_tokens_and_predicted_ones():
    work, config = test_step.CRAMMED_512, PRESETS["crammed-bert"]
    assert work.flops() == pytest.approx(65_536 * config.flops_per_token(0.25, 128))
    assert work.flops() / 65_536 == pytest.approx(623e6, rel=0.01)
    ragged = test_step.BERT_RAGGED
    counts = ragged.counts().double()
    attended = (counts.square().sum() / counts.sum()).item()
    assert ragged.flops() == pytest.approx(
        counts.sum().item() * ragged.config.flops_per_token(0.25, attended), rel=1e-4
    )


@pytest.mark.parametrize(
    "work, tokens, free_gib, name",
    [
        (test_step.CRAMMED_512, 65_536, 139, "crammed-bert-512x128"),
        (test_step.BERT_RAGGED, 65_536, 78, "bert-base-ragged-16-128"),
        (test_step.CRAMMED_512, 65_536, 31, "crammed-bert-512x128@256"),
        (test_step.CRAMMED_512, 16_384, 139, "crammed-bert-512x128@128"),
        (test_step.CRAMMED_128, 16_384, 1, "crammed-bert-128x128@1"),
    ],
)
def test_sequences_are_halved_until_the_batch_fits_and_the_name_tells(work, tokens, free_gib, name):
    fitted = steps.fit(work, tokens, free_gib * 2**30)
    assert fitted.work == f"step/train/{name}"
    assert len(fitted.counts()) == fitted.sequences


# The steps


def test_first_steps_agree_and_later_ones_learn(work):
    expected = measure_step._expected(work, CPU)
    for peer in (OURS, eager_of(work)):
        step = start(work, peer)
        first = step()
        assert float(first.loss) == pytest.approx(expected[0], rel=1e-5)
        assert float(first.gradient_norm) == pytest.approx(expected[1], rel=1e-4)
        losses = [float(step().loss) for _ in range(30)]
        assert losses[-1] < expected[0] - 0.02


def test_a_first_step_in_bfloat16_passes_the_guard(work):
    expected = measure_step._expected(work, CPU)
    for peer in (OURS, eager_of(work)):
        errors = measure_step.guard(work, peer, start(work, peer, torch.bfloat16)(), expected)
        assert max(errors) > 0


def test_modernbert_runs_as_it_is_called(reference):
    pytest.importorskip("transformers")
    expected = measure_step._expected(MODERNBERT, CPU)
    errors = measure_step.guard(MODERNBERT, eager_of(MODERNBERT), start(MODERNBERT, eager_of(MODERNBERT))(), expected)
    assert max(errors) < 1e-4


def test_the_compiled_variant_compiles_the_whole_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model).__name__) or model)
    _, peer = steps.ordinary_peers(PLAIN)
    assert peer.who == "plain-compile"
    start(CRAMMED, peer)()
    assert compiled == ["PlainBert"]


def test_every_work_has_its_peers():
    rows = {(work.name, peer.who) for work, peer in test_step._ROWS}
    for work in ("crammed-bert-512x128", "crammed-bert-128x128"):
        peers = {"plain-eager", "plain-compile", "cramming-original"}
        assert {who for name, who in rows if name == work} == {"cramfast"} | peers
    assert {who for name, who in rows if name == "modernbert-base-256x128"} == {"hf-eager", "hf-compile"}
    assert {who for name, who in rows if name == "bert-base-ragged-16-128"} == {"cramfast", "hf-eager", "hf-compile"}


# The guard


@pytest.mark.parametrize(
    "loss, norm, complaint",
    [(5.1, 2.0, "loss"), (5.0, 2.1, "gradient norm"), (math.nan, 2.0, "loss"), (5.0, math.nan, "gradient norm")],
)
def test_the_guard_rejects_another_loss_or_gradient(loss, norm, complaint):
    outcome = Outcome(torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(WrongResult, match=f"cramfast on step/train/crammed-6x16: the first step's {complaint} is"):
        measure_step.guard(CRAMMED, OURS, outcome, (5.0, 2.0))


def test_a_model_with_other_weights_is_not_timed(reference, hasty, monkeypatch):
    measure_step._expected(CRAMMED, CPU)
    monkeypatch.setattr(steps, "INITIAL_SEED", 1)
    with pytest.raises(WrongResult, match="plain-eager on step/train/crammed-6x16"):
        run(CRAMMED, eager_of(CRAMMED))


def test_a_model_without_positions_is_not_timed(reference, hasty):
    def without(training):
        step = steps.OrdinaryStep(training, compiled=False)
        torch.nn.init.zeros_(step.model.embeddings.positions.scale)
        return step

    with pytest.raises(WrongResult, match="plain-eager on step/train/crammed-6x16"):
        run(CRAMMED, StepPeer("plain-eager", without))


# Measuring


class Watched(Rounds):
    """Rounds that count the steps taken."""

    def __init__(self):
        super().__init__()
        self.taken = 0

    def pedantic(self, target, rounds, iterations):
        for _ in range(rounds * iterations + 1):  # as pytest-benchmark, once more for the result
            target()
            self.taken += 1


def run(work, peer, machine=None, dtype=torch.float32) -> dict:
    benchmark = Watched()
    measure_step.measure_step(benchmark, machine or Cpu(), work, peer, dtype)
    return benchmark.extra_info | {"taken": benchmark.taken}


def test_a_measurement_says_what_it_measured(work, hasty):
    for peer in (OURS, eager_of(work)):
        info = run(work, peer)
        assert info["work"] == f"step/train/{work.name}" and info["who"] == peer.who
        assert info["dtype"] == "float32" and info["timed_by"] == "events"
        assert info["tokens"] == int(work.counts().sum()) and info["flops"] == work.flops()
        assert info["bytes"] is None and info["joules_per_mtoken"] is None
        assert info["backend"] == ("reference" if peer is OURS else None)
        assert info["loss_error"] < 1e-5 and info["gradient_norm_error"] < 1e-4


def test_energy_is_that_of_the_steps_that_were_timed(reference, hasty, monkeypatch):
    class Meter:
        def __init__(self, device):
            pass

        def joules(self):
            return 60.0

    monkeypatch.setattr(measure_step, "EnergyMeter", Meter)
    info = run(CRAMMED, OURS)
    assert info["joules_per_mtoken"] == pytest.approx(60.0 / info["taken"] / 96 * 1e6)


def test_peak_memory_is_all_that_is_held_and_of_graphs_that_of_their_capture(reference, hasty):
    class Growing(Cpu):
        """Holds 10 MiB before and 30 once a variant has started, which takes 200 MiB for a moment."""

        def __init__(self):
            self.peaks, self.held = iter((200, 7)), iter((10, 30))

        def allocated_bytes(self):
            return next(self.held) * 2**20

        def peak_bytes(self, call):
            call()
            return next(self.peaks) * 2**20

    assert run(CRAMMED, OURS, Growing())["peak_mib"] == 200
    assert run(CRAMMED, eager_of(CRAMMED), Growing())["peak_mib"] == 27


def test_a_compiled_peer_trains_as_the_eager_one(work, hasty, monkeypatch):
    compiled, compile_model = [], torch.compile

    def compile_quickly(model):
        compiled.append(model)
        return compile_model(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    eager, compiling = (run(work, peer) for peer in steps.ordinary_peers(work.ordinary))
    assert len(compiled) == 1 and compiling["who"].endswith("-compile")
    assert compiling["loss_error"] == pytest.approx(eager["loss_error"], abs=1e-5)


def test_a_step_in_microbatches_is_that_of_the_whole_batch(reference, hasty):
    """The guard compares it with the ordinary model on the batch as masked, part by part."""
    info = run(replace(CRAMMED, microbatch=4), OURS)
    assert (info["microbatch"], info["activations"]) == (4, "keep")
    assert info["loss_error"] < 1e-5 and info["gradient_norm_error"] < 1e-4


def test_on_a_smaller_card_the_step_is_the_planner_s_and_the_allocator_gives_no_more(reference, hasty, monkeypatch):
    limits = []

    class Card(Cpu):
        @contextmanager
        def limited_to(self, limit):
            limits.append(limit)
            yield

    plan = SimpleNamespace(sequences=2, activations="lean")
    monkeypatch.setattr(steps, "plan_memory", lambda config, *_: plan if config is CRAMMED.config else None)
    work = steps.on_a_card_of("8GB", CRAMMED)
    assert (work.work, work.flops()) == (f"step/train/{CRAMMED.name}-8gb", CRAMMED.flops())
    info = run(work, OURS, Card())
    assert limits == [8 * 10**9]
    assert (info["microbatch"], info["activations"]) == (2, "lean")
    assert info["loss_error"] < 1e-5


def test_the_cards_of_the_benchmark_get_what_fits_them():
    sizes = [(work.memory, work.microbatch, work.activations) for work in test_step.SMALL_CARDS]
    assert [memory for memory, *_ in sizes] == [gb * 10**9 for gb in (8, 11, 12, 16, 24)]
    assert sizes == sorted(sizes, key=lambda size: size[1])
    assert all(512 % microbatch == 0 for _, microbatch, _ in sizes)


def test_a_peer_that_fails_refuses_by_name(reference):
    def fail(training):
        raise torch.OutOfMemoryError("no memory left\nat all")

    with pytest.raises(Refused, match=r"^plain-eager on step/train/crammed-6x16: no memory left$"):
        run(CRAMMED, StepPeer("plain-eager", fail))
    with pytest.raises(torch.OutOfMemoryError):
        run(CRAMMED, replace(OURS, start=fail))


@pytest.mark.slow
def test_a_run_on_a_stand_in_machine_ends_in_a_results_file(tmp_path):
    plugin = """
import test_bench
from dataclasses import replace
from bench import gpu, measure_step
from cramfast.config import PRESETS

class Roomy(test_bench.Cpu):
    free_bytes = 2**40

gpu.find = Roomy
measure_step._WARM_SECONDS = measure_step._ROUND_SECONDS = 0.01
small = {"vocab_size": 211, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
PRESETS["crammed-bert"] = replace(PRESETS["crammed-bert"], **small)
"""
    (tmp_path / "small_works.py").write_text(plugin)
    options = ["-p", "small_works", "--tokens", "256", "--dtype", "float32", "--results", str(tmp_path / "results")]
    words = ["-k", "test_step.py and crammed-bert-128x128 and not compile and not original", "--revision", "cafe"]
    done = bench(*options, *words, PYTHONPATH=os.pathsep.join(map(str, (tmp_path, ROOT / "tests"))))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step/train/crammed-bert-128x128: 2 sequences for 128, because of " in done.stdout
    (device,) = ledger.load(tmp_path / "results")
    records = device.modules["step"].records
    assert {(r.work, r.who) for r in records} == {
        ("step/train/crammed-bert-128x128@2", who) for who in ("cramfast", "plain-eager")
    }
    assert all(r.tokens_per_s == pytest.approx(256 / r.seconds) for r in records)


# What becomes of the results


def step_entry(case, who, tokens_per_s, tokens=65_536, **info) -> dict:
    given = {"tokens_per_s": tokens_per_s, "timed_by": "events", "flops": tokens * 600_000_000}
    return entry(f"step/train/{case}", who, tokens / tokens_per_s, **given | info)


def measured(folder) -> ledger.Device:
    """Steps beside a matrix product of 800 TFLOP/s."""
    ledger.save(folder, "limits", written(entry("matmul/fwd/8192x8192x8192", "torch-eager", 1.0, flops=8 * 10**14)))
    entries = [
        step_entry("crammed-bert-512x128", "cramfast", 840_000, peak_mib=16_384.0, joules_per_mtoken=812.4),
        step_entry("crammed-bert-512x128-lean", "cramfast", 780_000, peak_mib=16_384.0),
        step_entry("crammed-bert-512x128", "plain-compile", 600_000, peak_mib=24_576.0, joules_per_mtoken=1133.0),
        step_entry(
            "crammed-bert-512x128-8gb", "cramfast", 630_000, peak_mib=6144.0, microbatch=128, activations="lean"
        ),
        step_entry("crammed-bert-512x128-24gb", "cramfast", 798_000, microbatch=512, activations="keep"),
        step_entry("crammed-bert-128x128", "plain-eager", 300_000, tokens=16_384),
        step_entry("crammed-bert-128x128", "cramfast", 720_000, tokens=16_384),
    ]
    ledger.save(folder, "step", written(*entries))
    return ledger.load(folder)[0]


def test_bars_on_steps_are_held_missed_or_absent(tmp_path):
    said = [str(v) for v in bars.evaluate(measured(tmp_path)) if v.bar.operator == "step"]
    name, rival = "nvidia-h200  step/train/crammed-bert", "crammed-bert-512x128"
    assert said == [
        f"held    {name}-512x128 bfloat16: speed against plain-compile 1.40×, bar 1.22×",
        f"absent  {name}-512x128 bfloat16: speed against cramming-original not measured, bar 1.25×",
        f"held    {name}-512x128 bfloat16: share of the matmul peak 63.0 %, bar 60.0 %",
        f"held    {name}-512x128-lean bfloat16: speed against plain-compile ({rival}) 1.30×, bar 1.22×",
        f"MISSED  {name}-512x128-lean bfloat16: less memory against plain-compile ({rival}) 1.50×, bar 1.54×",
        f"absent  {name}-128x128 bfloat16: speed against plain-compile not measured, bar 1.35×",
        "absent  nvidia-h200  step/train/bert-base-ragged-16-128: speed against hf-eager not measured, bar 3.50×",
        "absent  nvidia-h200  step/train/bert-base-ragged-16-128: speed against hf-compile not measured, bar 2.30×",
    ]


def test_without_a_step_measured_no_bar_on_one_is_spoken_of(tmp_path):
    ledger.save(tmp_path, "gelu", written(entry("gelu/fwd/65536x3072", "cramfast", 1e-4)))
    assert not [v for v in bars.evaluate(ledger.load(tmp_path)[0]) if v.bar.operator == "step"]


def test_tables_of_steps_tell_tokens_share_memory_and_energy(tmp_path):
    text = tables.module_tables("step", [measured(tmp_path)], "results")
    assert "**`step`** crammed-bert-512x128, bfloat16" in text
    assert "| who | ms a step | tokens/s | MFU | peak GiB | J per M tokens | × plain-compile |" in text
    assert "| **cramfast** | 78.0 | 840,000 | 63 % | 16.0 | 812 | 1.40 |" in text
    assert "| plain-compile | 109.2 | 600,000 | 45 % | 24.0 | 1,133 | 1.00 |" in text
    assert "| **cramfast** | 22.8 | 720,000 | 54 % |  |  | 2.40 |" in text
    assert text.count("**`step`** crammed-bert-512x128 in the memory of smaller cards, bfloat16") == 1
    assert "| 8 GB | 128 | lean | 630,000 | 75 % | 47 % | 6.0 |  |\n| 24 GB | 512 | keep | 798,000 | 95 % |" in text
    assert "(results/nvidia-h200/step.png)" in text


def test_the_table_of_a_run_tells_tokens_a_second(tmp_path):
    work = "step/train/crammed-bert-512x128"
    lines = tables.run_table(measured(tmp_path), {(work, "cramfast", "bfloat16")})
    assert lines[1].split()[:3] == [work, "cramfast", "bfloat16"]
    assert lines[1].endswith("840,000 tokens/s, 63 % of matmul, 16.0 GiB, 812 J per M tokens")


def test_the_report_and_the_plot_of_steps(tmp_path, monkeypatch):
    device = measured(tmp_path / "results")
    (tmp_path / "README.md").write_text("".join(f"<!-- bench:{m} -->\n<!-- /bench -->\n" for m in ("limits", "step")))
    assert command(tmp_path) == 0 and command(tmp_path, "--check") == 0
    assert (tmp_path / "results" / "nvidia-h200" / "step.png").stat().st_size > 5000
    titles = []
    monkeypatch.setattr(plots, "_step_panel", lambda axes, device, title, records: titles.append(title))
    plots.draw(device, device.modules["step"], tmp_path / "step.png")
    assert titles == [f"step/train/crammed-bert-{size}, bfloat16" for size in ("128x128", "512x128")]
