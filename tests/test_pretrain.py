"""`python -m cramfast.pretrain` from text to a trained model, on runs of seconds.

Processes get one thread: a second one gains nothing at this size, and where the cores are busy it waits in vain.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked_runs import ForkedRun
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import cramfast
from cramfast import pretrain
from cramfast.evaluate import mlm as mlm_module
from cramfast.train import run as run_module
from cramfast.train import step as step_module
from cramfast.train.checkpoint import latest_checkpoint
from cramfast.train.progress import read_metrics
from cramfast.train.step import TrainStep

ROOT = Path(__file__).parents[1]
# This clone, and wherever else packages come from.
PYTHONPATH = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
STEPS, FEWER = 90, 13
LENGTH, BATCH = 32, 4
SETTINGS = {
    "preset": "cramfast-tiny",
    "vocab_size": 512,
    "heldout_fraction": 0.1,
    "max_length": LENGTH,
    "batch_size": BATCH,
    "microbatch_size": BATCH // 2,
    "optimizer": "adamw",  # on a CPU, Muon takes longer than the rest of an update
    "device": "cpu",
    "evals": 3,
    "log_every": "1steps",
}
SHORTER = {"steps": FEWER, "optimizer": "muon"}
NOUNS = (
    "river",
    "mountain",
    "teacher",
    "garden",
    "window",
    "letter",
    "doctor",
    "farmer",
    "soldier",
    "market",
    "castle",
)
ADJECTIVES = ("old", "quiet", "golden", "broken", "distant", "clever", "heavy", "green")
# Every verb has its own preposition: a word that its neighbours tell, as in real text.
VERBS = {
    "watches": "from",
    "follows": "across",
    "paints": "beside",
    "repairs": "behind",
    "visits": "before",
    "remembers": "after",
    "carries": "over",
    "builds": "near",
}


def document(number: int) -> str:
    choice = random.Random(number).choice
    sentences = []
    for _ in range(4 + number % 6):
        verb = choice(list(VERBS))
        subject, other = (f"the {choice(ADJECTIVES)} {choice(NOUNS)}" for _ in range(2))
        sentences.append(f"{subject} {verb} {other} {VERBS[verb]} the {choice(NOUNS)}.")
    return " ".join(sentences)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(map(document, range(300))))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def flags(corpus: Path, out: Path | None, steps: int = STEPS, **settings) -> list[str]:
    """Flags of a run; a setting of None leaves its flag out."""
    settings = {"data": corpus, "out": out, "budget": f"{steps * BATCH * LENGTH}tokens", **SETTINGS, **settings}
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cramfast.pretrain", *words]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"CRAMFAST_CACHE": str(cache), "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def run_process(cache: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), env=environment(cache), cwd=cwd, capture_output=True, text=True)


def start_process(cache: Path, *words: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*words), env=environment(cache), stdout=pipe, stderr=pipe, text=True)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run_here(cache, capsys, monkeypatch):
    """Runs the command in this process, which has torch loaded already."""
    monkeypatch.setenv("CRAMFAST_CACHE", str(cache))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        code = pretrain.main(list(words))
        return Outcome(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def updates(out: Path) -> list[dict]:
    return [record for record in records(out) if "loss" in record]


def losses(out: Path) -> list[tuple[int, str, float]]:
    """What of metrics.jsonl depends on the computation alone, line by line."""
    return [
        (record["step"], name, record[name])
        for record in records(out)
        for name in ("loss", "heldout_loss", "heldout_accuracy")
        if name in record
    ]


def final_weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    out: Path
    printed: str
    startup: float
    """Seconds from its start to its first record."""


@pytest.fixture(scope="module")
def reference(corpus, cache, tmp_path_factory) -> Reference:
    out = tmp_path_factory.mktemp("reference") / "run"
    began = time.time()
    done = run_process(cache, *flags(corpus, out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Reference(out, done.stdout, (out / "config.json").stat().st_mtime - began)


@pytest.fixture(scope="module")
def shorter(corpus, cache, tmp_path_factory) -> Path:
    """Of a run as uninterrupted, of fewer steps, by Muon."""
    folder = tmp_path_factory.mktemp("shorter")
    run = ForkedRun(flags(corpus, folder / "run", **SHORTER), environment(cache), folder)
    _, errors = run.communicate()
    assert (run.returncode, errors) == (0, "")
    return folder / "run"


# What a run gives


def test_a_run_learns(reference):
    summary = read_json(reference.out / "summary.json")
    # A model that knows no more than how often words occur comes to that entropy. In so few steps of so few tokens the
    # seed decides whether it is 0.4 nats less or 0.9.
    assert summary["heldout_loss"] < summary["unigram_entropy"] - 0.25
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * BATCH * LENGTH
    assert summary["skipped_steps"] == 0


def test_a_run_writes_its_files(reference):
    names = {path.name for path in reference.out.iterdir()} - {"tensorboard"}
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "final", "summary.json"}
    assert (reference.out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in (reference.out / "final").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    config = read_json(reference.out / "config.json")
    assert config["settings"]["preset"] == "cramfast-tiny"
    assert config["environment"]["torch"] == torch.__version__


def test_the_model_of_a_run_loads_and_predicts(reference):
    model = cramfast.load(reference.out)
    ids = torch.arange(5, 15)
    hidden = model.encode(ids, torch.tensor([0, 10], dtype=torch.int32), 10)
    assert model.predict(hidden).shape == (10, read_json(reference.out / "config.json")["model"]["vocab_size"])


def test_metrics_have_every_field_of_every_update(reference):
    found = updates(reference.out)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    wanted = {"step", "tokens", "seconds", "loss", "lr", "batch", "tokens_per_s", "mfu", "memory_mib", "joules"}
    assert all(wanted <= record.keys() for record in found)
    assert [record["tokens"] for record in found] == [BATCH * LENGTH * step for step in range(1, STEPS + 1)]
    assert {record["batch"] for record in found} == {BATCH * LENGTH}
    assert max(record["lr"] for record in found) == 1.7e-3
    seconds = [record["seconds"] for record in found]
    assert seconds[0] == 0  # the first update is outside the budget
    assert seconds == sorted(seconds)
    assert all(record["tokens_per_s"] > 0 and record["mfu"] > 0 for record in found[1:])
    assert all(record["memory_mib"] > 0 for record in found)


def test_heldout_text_is_measured_as_often_as_asked(reference):
    measured = [record for record in records(reference.out) if "heldout_loss" in record]
    assert [record["step"] for record in measured] == [STEPS // 3, 2 * STEPS // 3, STEPS]
    summary = read_json(reference.out / "summary.json")
    for name in ("heldout_loss", "heldout_accuracy"):
        assert measured[-1][name] == summary[name]
    assert 0 < measured[-1]["heldout_accuracy"] < 1
    for record in measured:
        said = f"held-out loss {record['heldout_loss']:.4f}, accuracy {record['heldout_accuracy']:.1%}"
        assert said in reference.printed


def check_closing_words(printed: str, out: Path) -> None:
    summary = read_json(out / "summary.json")
    assert f"held-out loss     {summary['heldout_loss']:.4f}" in printed
    assert f"held-out accuracy {summary['heldout_accuracy']:.1%}" in printed
    assert f"unigram entropy   {summary['unigram_entropy']:.4f}" in printed
    assert str(out / "final") in printed
    assert printed.count("[MASK]") == 3
    assert printed.count("guesses: ") == 3
    assert len(summary["examples"]) == 3


def test_a_run_closes_with_the_losses_the_place_and_three_examples(reference):
    check_closing_words(reference.printed, reference.out)


def test_the_same_command_says_that_the_run_is_finished(reference, corpus, run_here):
    before = {path: path.stat().st_mtime_ns for path in reference.out.rglob("*")}
    outcome = run_here(*flags(corpus, reference.out))
    assert outcome.code == 0
    assert "is finished" in outcome.out
    check_closing_words(outcome.out, reference.out)
    assert {path: path.stat().st_mtime_ns for path in reference.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("seed", 3, "seed is 0 there, 3 here"),
        ("lr", 2e-3, "lr is 0.0017 there, 0.002 here"),
        ("budget", "99tokens", "budget is"),
        ("heldout_fraction", 0.2, "heldout_fraction is 0.1 there, 0.2 here"),
        ("preset", "bert-mini", "preset is cramfast-tiny there, bert-mini here"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(reference, corpus, run_here, setting, value, named):
    outcome = run_here(*flags(corpus, reference.out, **{setting: value}))
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert named in outcome.err
    assert str(reference.out) in outcome.err


def test_how_often_things_are_stored_changes_no_result(shorter, corpus, tmp_path, run_here):
    out = tmp_path / "run"
    often = flags(corpus, out, checkpoint_every="3steps", keep_checkpoints=3, log_every="10steps", **SHORTER)
    assert run_here(*often).code == 0
    assert final_weights(out) == final_weights(shorter)
    assert len(updates(out)) < FEWER
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (6, 9, 12)}


def test_without_out_the_settings_name_the_folder(corpus, tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 0, 1):
        assert run_here(*flags(corpus, None, steps=2, seed=seed)).code == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    assert all(name.startswith("cramfast-tiny-") for name in names)


def test_exactly_the_rate_of_the_tokens_is_masked(corpus, tmp_path, run_here, monkeypatch):
    masked = []
    original = step_module.mask_tokens

    def spy(input_ids, cu_seqlens, count, **settings):
        ids, positions, labels = original(input_ids, cu_seqlens, count, **settings)
        masked.append((int(settings["step"]), input_ids.numel(), len(positions.unique()), int((labels == -100).sum())))
        return ids, positions, labels

    monkeypatch.setattr(step_module, "mask_tokens", spy)
    assert run_here(*flags(corpus, tmp_path / "run", steps=5, mask_rate=0.3)).code == 0
    tokens = BATCH // 2 * LENGTH
    assert masked == [(microbatch, tokens, round(0.3 * tokens), 0) for microbatch in range(10)]


def test_whole_words_are_hidden_on_request_in_training_alone(corpus, tmp_path, run_here, monkeypatch):
    tables = {step_module: [], mlm_module: []}
    for module, found in tables.items():

        def spy(*inputs, original=module.mask_tokens, found=found, **settings):
            found.append(settings.get("continues"))
            return original(*inputs, **settings)

        monkeypatch.setattr(module, "mask_tokens", spy)
    out = tmp_path / "run"
    outcome = run_here(*flags(corpus, out, steps=5), "--whole-words")
    assert (outcome.code, outcome.err) == (0, "")
    assert read_json(out / "config.json")["settings"]["batches"]["whole_words"] is True
    tokenizer = Tokenizer.from_file(str(out / "final" / "tokenizer.json"))
    pieces = map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))
    expected = torch.tensor([piece.startswith("##") for piece in pieces])
    assert expected.any() and len(tables[step_module]) == 5 * BATCH // SETTINGS["microbatch_size"]
    assert all(torch.equal(table, expected) for table in tables[step_module])
    assert tables[mlm_module] == [None]


def test_whole_words_need_pieces_that_continue_one(corpus, tmp_path, run_here):
    tokenizer, special = Tokenizer(models.BPE(unk_token="[UNK]")), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([corpus.read_text()], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = flags(corpus, tmp_path / "run", steps=2, tokenizer=tmp_path / "tokenizer.json")
    outcome = run_here(*given, "--whole-words")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "--whole-words: needs a WordPiece tokenizer" in outcome.err
    assert not (tmp_path / "run").exists()
    assert run_here(*given).code == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "cramming"},
        {"layout": "packed"},
        {"layout": "documents"},
        {"layout": "packed", "order": "full-stops"},
        {"dtype": "bfloat16"},
        {"preset": "bert-mini"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_recipes_layouts_orders_and_dtypes_train(corpus, tmp_path, run_here, monkeypatch, settings):
    out, seen, fill = tmp_path / "run", [], run_module.fill_examples

    def watched(*arguments):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return fill(*arguments)

    monkeypatch.setattr(run_module, "fill_examples", watched)
    # In bfloat16 an update takes seconds on a CPU without instructions for it.
    steps = 3 if "dtype" in settings else 12
    outcome = run_here(*flags(corpus, out, steps=steps, evals=1, **settings))
    assert (outcome.code, outcome.err) == (0, "")
    found = [record["loss"] for record in updates(out)]
    assert len(found) == steps
    assert found[-1] < found[0]
    stored = read_json(out / "config.json")["settings"]
    flat = {**stored, **stored["batches"]}
    assert {name: flat[name] for name in settings} == settings
    assert len(read_json(out / "summary.json")["examples"]) == 3
    assert seen == [torch.bfloat16 if "dtype" in settings else torch.float32]


def test_the_batch_is_ramped_up(corpus, tmp_path, run_here):
    out = tmp_path / "run"
    ramped = flags(corpus, out, steps=20, recipe="cramming", batch_size=8, microbatch_size=2, batch_ramp=0.6)
    assert run_here(*ramped).code == 0
    batches = [record["batch"] // LENGTH for record in updates(out)]
    assert batches == sorted(batches)
    assert set(batches) == {2, 4, 6, 8}
    tokens = read_json(out / "summary.json")["tokens"]
    assert tokens == LENGTH * sum(batches)


def test_a_batch_that_is_no_multiple_of_the_microbatch_is_rounded_up_aloud(corpus, tmp_path, run_here):
    out = tmp_path / "run"
    outcome = run_here(*flags(corpus, out, steps=6, batch_size=10, microbatch_size=4))
    assert outcome.code == 0
    assert "12 sequences instead of 10" in outcome.out
    assert {record["batch"] for record in updates(out)} == {12 * LENGTH}


# Budgets


def test_a_budget_of_time_ends_in_time(corpus, tmp_path, run_here):
    out = tmp_path / "run"
    assert run_here(*flags(corpus, out, budget="2s", batch_size=None, microbatch_size=None, evals=1)).code == 0
    last = updates(out)[-1]
    # The last update may begin just before the end and take as long as one takes on a busy machine.
    assert 2 <= last["seconds"] < 5
    assert last["lr"] < 1e-3
    assert read_json(out / "summary.json")["steps"] == last["step"] > 1


def test_a_budget_of_flops_ends_with_the_update_that_spends_it(corpus, tmp_path, run_here):
    out = tmp_path / "run"
    assert run_here(*flags(corpus, out, budget="1e10flops")).code == 0
    summary = read_json(out / "summary.json")
    assert summary["flops"] >= 1e10
    # Updates differ in their sequences' lengths alone, by much less than half.
    assert summary["flops"] - 1.5 * summary["flops"] / summary["steps"] < 1e10


@pytest.mark.parametrize("budget", ["8000tokens", "8e10flops"])
def test_a_batch_that_suits_the_budget_is_found(corpus, tmp_path, run_here, budget):
    out = tmp_path / "run"
    settings = {"batch_size": None, "microbatch_size": None, "evals": 1}
    assert run_here(*flags(corpus, out, budget=budget, **settings)).code == 0
    plan = read_json(out / "config.json")["decided"]
    assert {record["batch"] for record in updates(out)} == {plan["unit"] * plan["units"] * LENGTH}
    assert len(updates(out)) > 10


@pytest.mark.parametrize("microbatch_size", [7, 16, 32])
def test_a_batch_that_is_found_never_exceeds_the_text(tmp_path, run_here, monkeypatch, microbatch_size):
    text = tmp_path / "small.txt"
    text.write_text("\n\n".join(map(document, range(40))))
    monkeypatch.setattr("cramfast.train.plan.suitable_batch", lambda tokens: 10**9)  # as for a budget of weeks
    settings = {"batch_size": None, "microbatch_size": microbatch_size, "heldout_fraction": 0.2}
    outcome = run_here(*flags(text, tmp_path / "run", budget="4000tokens", **settings))
    assert (outcome.code, outcome.err) == (0, "")


# Stopping and going on


def wait_until(holds, process: subprocess.Popen | ForkedRun, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.01)


def last_record(out: Path) -> dict:
    """The last whole line of metrics.jsonl, to which a run may be adding another."""
    return next(reversed(read_metrics(out / "metrics.jsonl")), {"step": 0})


def last_step(out: Path) -> int:
    return last_record(out)["step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(shorter, corpus, cache, tmp_path, run_here, number):
    out = tmp_path / "run"
    process = ForkedRun(flags(corpus, out, **SHORTER), environment(cache), tmp_path)
    wait_until(lambda: last_step(out) >= FEWER // 4, process)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == ""
    assert f"saved {out}" in printed
    assert not (out / "final").exists()
    stopped_at = last_step(out)
    assert latest_checkpoint(out).name == f"checkpoint-{stopped_at}"

    outcome = run_here(*flags(corpus, out, **SHORTER))
    assert (outcome.code, outcome.err) == (0, "")
    assert f"resuming at step {stopped_at}" in outcome.out
    assert final_weights(out) == final_weights(shorter)
    assert losses(out) == losses(shorter)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_a_signal_while_tokenising_leaves_no_half_written_cache(tmp_path, number):
    text, cache = tmp_path / "large.txt", tmp_path / "cache"
    text.write_text("\n\n".join(map(document, range(20_000))))
    process = ForkedRun(flags(text, tmp_path / "run"), environment(cache), tmp_path)
    wait_until(lambda: cache.exists() and any(cache.iterdir()), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == ""
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "run").exists()


def interrupt(monkeypatch, number: int, when, times: int = 1) -> None:
    """Sends this process a signal in the first update for which `when(updates so far)` holds, its work half done."""
    update, numbers = TrainStep.update, itertools.count(1)
    signals = [number] * times

    def interrupted(self, lr):
        result = update(self, lr)
        if when(next(numbers)):
            while signals:
                signal.raise_signal(signals.pop())
        return result

    monkeypatch.setattr(TrainStep, "update", interrupted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_run_on_a_gpu_is_the_same_without_graphs_and_with_a_stop(corpus, tmp_path, run_here, monkeypatch, dtype):
    folders = whole, plain, stopped = [tmp_path / name for name in ("whole", "plain", "stopped")]
    words = [flags(corpus, out, steps=40, device="cuda", dtype=dtype) for out in folders]
    outcome = run_here(*words[0])
    assert (outcome.code, outcome.err) == (0, "")
    assert "no CUDA graphs" not in outcome.out
    outcome = run_here(*words[1], "--no-graphs")
    assert (outcome.code, outcome.err) == (0, "")
    assert "no CUDA graphs: not asked for" in outcome.out
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGINT, lambda count: count == 17)
        assert run_here(*words[2]).code == 130
    assert 0 < last_step(stopped) < 40
    outcome = run_here(*words[2])
    assert (outcome.code, outcome.err) == (0, "")
    assert "resuming at step 17" in outcome.out
    for out in (plain, stopped):
        assert final_weights(out) == final_weights(whole)
        assert losses(out) == losses(whole)


def test_a_second_signal_in_the_middle_of_an_update_spoils_nothing(shorter, corpus, tmp_path, run_here, monkeypatch):
    out = tmp_path / "run"
    interrupt(monkeypatch, signal.SIGINT, lambda count: count == FEWER // 2, times=2)
    outcome = run_here(*flags(corpus, out, checkpoint_every="5steps", **SHORTER))
    assert (outcome.code, outcome.err) == (130, "")
    assert run_here(*flags(corpus, out, **SHORTER)).code == 0
    assert final_weights(out) == final_weights(shorter)
    assert losses(out) == losses(shorter)


@pytest.mark.parametrize("decided", [{"activations": "layers"}, {}])
def test_a_resumed_run_trains_as_it_was_planned(corpus, tmp_path, run_here, monkeypatch, decided):
    out, command = tmp_path / "run", flags(corpus, tmp_path / "run", steps=8)
    interrupt(monkeypatch, signal.SIGTERM, lambda count: count == 4)
    assert run_here(*command).code == 128 + signal.SIGTERM
    config = read_json(out / "config.json")
    assert config["decided"].pop("activations") == "keep"
    config["decided"] |= decided
    (out / "config.json").write_text(json.dumps(config))

    seen = set()
    update = TrainStep.update
    monkeypatch.setattr(TrainStep, "update", lambda self, lr: seen.add(self.model.activations) or update(self, lr))
    assert run_here(*command).code == 0
    planned = decided.get("activations", "keep")
    assert seen == {planned}
    assert read_json(out / "config.json")["decided"]["activations"] == planned


def test_what_layers_save_changes_no_loss_of_a_run(corpus, tmp_path, run_here):
    runs = {kind: tmp_path / kind for kind in ("auto", "lean", "layers")}
    for kind, out in runs.items():
        assert run_here(*flags(corpus, out, steps=8, activations=kind, memory_limit="11GB")).code == 0
    assert read_json(runs["layers"] / "config.json")["decided"]["activations"] == "layers"
    assert losses(runs["auto"]) == losses(runs["lean"]) == losses(runs["layers"])


def test_time_spent_before_an_interruption_counts(corpus, tmp_path, run_here, monkeypatch):
    out = tmp_path / "run"
    short = flags(corpus, out, budget="2s", evals=1)
    interrupt(monkeypatch, signal.SIGTERM, lambda count: count > 1 and updates(out)[-1]["seconds"] > 1)
    assert run_here(*short).code == 128 + signal.SIGTERM
    assert run_here(*short).code == 0
    seconds = [record["seconds"] for record in updates(out)]
    assert seconds == sorted(seconds)
    assert 2 <= seconds[-1] < 5  # the last update may begin just before the end


def test_a_run_killed_after_its_last_checkpoint_measures_the_heldout_loss_once(
    shorter, corpus, tmp_path, run_here, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("cramfast.train.run.save_model", lambda *_: 1 / 0)
        run_here(*flags(corpus, out, checkpoint_every=f"{FEWER}steps", **SHORTER))
    assert latest_checkpoint(out).name == f"checkpoint-{FEWER}"
    assert run_here(*flags(corpus, out, **SHORTER)).code == 0
    assert final_weights(out) == final_weights(shorter)
    assert losses(out) == losses(shorter)


def test_a_folder_left_by_a_run_killed_while_it_wrote_its_settings_is_used(corpus, tmp_path, run_here):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.partial").write_text('{"settings": {"pre')
    outcome = run_here(*flags(corpus, out, steps=2))
    assert (outcome.code, outcome.err) == (0, "")


def test_a_damaged_newest_checkpoint_is_named_and_nothing_is_lost(corpus, tmp_path, run_here):
    out = tmp_path / "run"
    assert run_here(*flags(corpus, out, steps=6, checkpoint_every="3steps")).code == 0
    (out / "summary.json").unlink()
    damaged = out / "checkpoint-6" / "trainer.json"
    for text in ('{"step": 6', '{"step": 6}', '{"unknown": 1}'):
        damaged.write_text(text)
        outcome = run_here(*flags(corpus, out, steps=6))
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1
        assert str(damaged) in outcome.err
    assert (out / "checkpoint-3").is_dir()


def entries(folder: Path) -> set[tuple[str, int]]:
    """Names in a folder with the time of their last change."""
    found = set()
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # gone already
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def has_come_to(moment: str, out: Path, cache: Path, before: set[tuple[str, int]], step: int) -> bool:
    """Whether a process has; `before`: what the folders held at its start, `step`: how far training is to be."""
    new = {name for name, _ in (entries(out) | entries(cache)) - before}
    if moment == "starting":
        return True
    if moment == "tokenising" and any(".partial-" in name for name in new):
        return True
    if "metrics.jsonl" not in new:  # the first thing that training touches
        return False
    if moment == "saving":
        return any(name.startswith(".checkpoint-") for name in new)
    if moment == "finishing":
        last = last_record(out)
        return last["step"] == STEPS and "heldout_loss" in last
    return last_step(out) >= step


def test_twenty_kills_change_nothing(reference, corpus, tmp_path):
    """kill -9 at random moments of every phase; a phase is awaited, for it takes as long as the machine is slow."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    longest = {"tokenising": 0.05, "starting": reference.startup, "training": 0.1, "saving": 0.03, "finishing": 0.2}
    chance = random.Random(0)
    middle = ["starting"] * 4 + ["training"] * 6 + ["saving"] * 5
    chance.shuffle(middle)
    for moment in ["tokenising"] * 3 + middle + ["finishing"] * 2:
        saved = latest_checkpoint(out)
        step = (int(saved.name.removeprefix("checkpoint-")) if saved else 0) + chance.randint(1, 6)
        before = entries(out) | entries(cache)
        words = flags(corpus, out, checkpoint_every="3steps")
        if moment == "starting":  # of which most is to import
            process = start_process(cache, *words)
        else:
            process = ForkedRun(words, environment(cache), tmp_path)
        wait_until(functools.partial(has_come_to, moment, out, cache, before, step), process)
        time.sleep(chance.uniform(0, longest[moment]))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before it was killed while {moment}"
        assert errors == ""

    process = ForkedRun(flags(corpus, out, checkpoint_every="3steps"), environment(cache), tmp_path)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert f"resuming at step {STEPS}" in printed
    assert final_weights(out) == final_weights(reference.out)
    assert losses(out) == losses(reference.out)
    assert [name for name, _ in entries(cache) if ".partial" in name] == []


# Memory and numbers that run out


def limit_memory(monkeypatch, most_tokens: int) -> None:
    accumulate = TrainStep.accumulate

    def limited(self, batch, *arguments):
        if batch.input_ids.numel() > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        accumulate(self, batch, *arguments)

    monkeypatch.setattr(TrainStep, "accumulate", limited)


def test_out_of_memory_halves_the_microbatch_and_keeps_the_batch(corpus, tmp_path, run_here, monkeypatch):
    small, halved = tmp_path / "small", tmp_path / "halved"
    assert run_here(*flags(corpus, small, steps=8, batch_size=8, microbatch_size=2)).code == 0
    limit_memory(monkeypatch, 2 * LENGTH)
    outcome = run_here(*flags(corpus, halved, steps=8, batch_size=8, microbatch_size=8))
    assert (outcome.code, outcome.err) == (0, "")
    assert "out of memory: the microbatch goes from 8 to 4 sequences" in outcome.out
    assert "from 4 to 2 sequences" in outcome.out
    assert {record["batch"] for record in updates(halved)} == {8 * LENGTH}
    assert final_weights(halved) == final_weights(small)


def test_memory_that_runs_out_in_mid_update_costs_no_tokens(corpus, tmp_path, run_here, monkeypatch):
    small, halved = tmp_path / "small", tmp_path / "halved"
    assert run_here(*flags(corpus, small, steps=8, batch_size=8, microbatch_size=2)).code == 0
    accumulate, calls = TrainStep.accumulate, []

    def runs_out_once(self, batch, *arguments):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        accumulate(self, batch, *arguments)

    monkeypatch.setattr(TrainStep, "accumulate", runs_out_once)
    assert run_here(*flags(corpus, halved, steps=8, batch_size=8, microbatch_size=4)).code == 0
    assert len(calls) == 2 + 4 * len(updates(small))
    assert final_weights(halved) == final_weights(small)


def test_memory_that_runs_out_for_heldout_text_is_taken_from_the_step(corpus, tmp_path, run_here, monkeypatch):
    plain, short = tmp_path / "plain", tmp_path / "short"
    assert run_here(*flags(corpus, plain, steps=8, evals=2)).code == 0
    score, calls = mlm_module.HeldOut.score, []

    def runs_out_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(*arguments)

    monkeypatch.setattr(mlm_module.HeldOut, "score", runs_out_once)
    outcome = run_here(*flags(corpus, short, steps=8, evals=2))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("out of memory while scoring held-out text") == 1 and len(calls) == 3
    assert final_weights(short) == final_weights(plain)
    assert losses(short) == losses(plain)


def test_memory_too_small_for_one_sequence_ends_the_run_in_one_line(corpus, tmp_path, run_here, monkeypatch):
    limit_memory(monkeypatch, LENGTH - 1)
    outcome = run_here(*flags(corpus, tmp_path / "run"))
    assert outcome.code == 1
    assert "out of memory with one sequence" in outcome.out.splitlines()[-1]
    assert "Traceback" not in outcome.out + outcome.err


@pytest.mark.parametrize(("sequences", "code"), [(3, 0), (0.5, 1)])
def test_memory_may_run_out_while_the_batch_is_sought(corpus, tmp_path, run_here, monkeypatch, sequences, code):
    limit_memory(monkeypatch, int(sequences * LENGTH))
    found = flags(corpus, tmp_path / "run", budget="2s", batch_size=None, microbatch_size=None, evals=1)
    outcome = run_here(*found)
    assert (outcome.code, outcome.err) == (code, "")
    assert code == 0 or "out of memory with one sequence" in outcome.out.splitlines()[-1]


def poison(monkeypatch, steps) -> None:
    """The gradient of the updates `steps` is not a number."""
    accumulate, parts = TrainStep.accumulate, SETTINGS["batch_size"] // SETTINGS["microbatch_size"]

    def poisoned(self, batch, mask_rate, microbatch, share):
        accumulate(self, batch, mask_rate, microbatch, share)
        if microbatch // parts + 1 in steps:
            self.weights.gradient[0] = math.nan

    monkeypatch.setattr(TrainStep, "accumulate", poisoned)


def test_one_update_that_is_not_finite_is_skipped_and_counted(corpus, tmp_path, run_here, monkeypatch):
    out = tmp_path / "run"
    poison(monkeypatch, {4})
    outcome = run_here(*flags(corpus, out, steps=8))
    assert (outcome.code, outcome.err) == (0, "")
    assert [record["skipped"] for record in updates(out)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [record["loss"] is None for record in updates(out)] == [step == 4 for step in range(1, 9)]
    assert read_json(out / "summary.json")["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in cramfast.load(out).state_dict().values())


def test_nine_in_a_row_go_on(corpus, tmp_path, run_here, monkeypatch):
    out = tmp_path / "run"
    poison(monkeypatch, set(range(3, 12)) | set(range(13, 22)))
    assert run_here(*flags(corpus, out, steps=24)).code == 0
    assert read_json(out / "summary.json")["skipped_steps"] == 18


def test_ten_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(corpus, tmp_path, run_here, monkeypatch):
    out, good = tmp_path / "run", tmp_path / "good"
    assert run_here(*flags(corpus, good, steps=24, checkpoint_every="7steps", keep_checkpoints=99)).code == 0
    with monkeypatch.context() as patch:
        poison(patch, range(8, 1000))
        outcome = run_here(*flags(corpus, out, steps=24, checkpoint_every="7steps"))
    assert (outcome.code, outcome.err) == (1, "")
    last = outcome.out.splitlines()[-1]
    assert "10 updates in a row" in last
    assert str(latest_checkpoint(out)) in last
    assert updates(out)[-1]["step"] == 17
    kept, wanted = cramfast.load(out).state_dict(), cramfast.load(good / "checkpoint-7").state_dict()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert run_here(*flags(corpus, out, steps=24)).code == 0


def test_ten_in_a_row_stop_a_run_across_an_interruption(corpus, tmp_path, run_here, monkeypatch):
    out = tmp_path / "run"
    poison(monkeypatch, range(8, 1000))
    interrupt(monkeypatch, signal.SIGTERM, lambda count: count == 12)
    assert run_here(*flags(corpus, out, steps=24)).code == 128 + signal.SIGTERM
    assert run_here(*flags(corpus, out, steps=24)).code == 1
    assert updates(out)[-1]["step"] == 17


# Bad input


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


BAD = {
    "unknown flag": (["--batch-sise", "4"], ["--batch-sise", "--batch-size"]),
    "unknown word": (["fast"], ["fast"]),
    "bad choice": (["--preset", "bert-huge"], ["--preset", "bert-huge"]),
    "bad number": (["--lr", "quick"], ["--lr", "quick"]),
    "bad whole number": (["--max-length", "31.5"], ["--max-length", "31.5"]),
    "value missing": (["--budget"], ["--budget"]),
    "bad budget": (["--budget", "soon"], ["--budget soon", "24h"]),
    "bad interval": (["--checkpoint-every", "5"], ["--checkpoint-every 5", "500steps"]),
    "missing file": (["--data", "nowhere.txt"], ["nowhere.txt"]),
    "missing held-out file": (["--heldout-data", "nowhere.txt"], ["nowhere.txt"]),
    "missing tokenizer": (["--tokenizer", "nowhere.json"], ["--tokenizer nowhere.json"]),
    "impossible combination": (["--order", "full-stops"], ["--order full-stops", "--layout packed"]),
    "impossible value": (["--mask-rate", "1.5"], ["--mask-rate 1.5"]),
    "impossible dtype": (["--dtype", "float16", "--device", "cpu"], ["--dtype float16", "GPU"]),
    "negative seed": (["--seed", "-1"], ["--seed -1"]),
    "negative epsilon": (["--adam-eps", "-1"], ["--adam-eps"]),
    "less text than a batch": (["--batch-size", "100000"], ["100000"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tmp_path, run_here, monkeypatch, case):
    words, named = BAD[case]
    monkeypatch.chdir(tmp_path)
    needed = {"--data": str(corpus), "--vocab-size": "512", "--device": "cpu", "--out": "run", "--cache": "cache"}
    for flag, value in needed.items():
        if flag not in words:
            words = [*words, flag, value]
    outcome = run_here(*words)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert all(word in outcome.err for word in named), outcome.err
    assert not Path("run").exists()
    assert [name for name in listing(tmp_path) if ".partial" in name] == []


@pytest.mark.parametrize("case", ["unknown flag", "missing file"])
def test_bad_input_ends_the_process_with_code_2_and_no_traceback(cache, tmp_path, case):
    words, named = BAD[case]
    done = run_process(cache, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in named)
    assert listing(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(corpus, tmp_path, run_here):
    outcome = run_here(*flags(corpus, tmp_path / "run", device="cuda"))
    assert outcome.code == 2
    assert outcome.err.startswith("cramfast.pretrain: --device cuda: ")
    assert len(outcome.err.splitlines()) == 1
    assert listing(tmp_path) == []


FOREIGN = {
    "any file": {"notes.txt": "mine"},
    "a model of another library": {"config.json": '{"model_type": "bert"}', "pytorch_model.bin": ""},
    "a list": {"config.json": "[]"},
    "damaged": {"config.json": '{"settings": {'},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(corpus, tmp_path, run_here, kind):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in FOREIGN[kind].items():
        (out / name).write_text(text)
    outcome = run_here(*flags(corpus, out))
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert str(out) in outcome.err
    assert {path.name: path.read_text() for path in out.iterdir()} == FOREIGN[kind]


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_in_the_place_of_the_folder_is_refused(corpus, tmp_path, run_here, inside):
    file = tmp_path / "file"
    file.write_text("mine")
    outcome = run_here(*flags(corpus, file / "run" if inside else file))
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert f"--out {file}" in outcome.err
    assert file.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_cannot_be_written_is_refused(corpus, tmp_path, run_here, exists):
    out = tmp_path / "locked" if exists else tmp_path / "locked" / "run"
    (tmp_path / "locked").mkdir(mode=0o555)
    outcome = run_here(*flags(corpus, out))
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert f"--out {out}" in outcome.err


# Help


def test_help_comes_in_two_seconds(cache):
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = run_process(cache, "--help")
        seconds.append(time.monotonic() - began)
        assert done.returncode == 0
    assert min(seconds) < 2
    for flag in ("--preset", "--data", "--budget", "--recipe", "--out", "--batch-size", "--mask-rate", "--whole-words"):
        assert flag in done.stdout


HELP = """
import sys
from cramfast.pretrain import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
heavy = {"torch", "numpy", "tokenizers", "datasets", "matplotlib", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_loads_nothing_heavy(cache):
    done = subprocess.run([sys.executable, "-c", HELP], env=environment(cache), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
