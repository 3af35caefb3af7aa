"""Tasks from files to the table: rows and their labels, metrics, the command, results that go on, and the report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from finetuning import good_or_bad, make_checkpoint, write_rows

from cramfast import finetune
from cramfast.downstream import rows as row_files
from cramfast.downstream.metrics import evaluate, measure
from cramfast.downstream.results import Results
from cramfast.downstream.settings import DataOptions
from cramfast.downstream.table import HEAD, cells, medians, plain_table, remark
from cramfast.downstream.tasks import GLUE, chosen_tasks, load_task
from cramfast.errors import UserError

HASTY = ("--seeds", "1", "--epochs", "1", "--max-length", "16", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def glue_dir(tmp_path_factory) -> Path:
    """Small tasks under GLUE's names."""
    folder = tmp_path_factory.mktemp("glue")
    for task, pair in (("sst2", False), ("mrpc", True)):
        write_rows(folder / task / "train.jsonl", good_or_bad(60, 0, pair))
        write_rows(folder / task / "dev.jsonl", good_or_bad(20, 1, pair))
    three = [row | {"label": number % 3} for number, row in enumerate(good_or_bad(40, 0, pair=True))]
    for name in ("train", "dev_matched", "dev_mismatched_1k_tokenized"):
        write_rows(folder / "mnli" / f"{name}.jsonl", three)
    scores = [row | {"label": 2.5 + 2 * (row["label"] - 0.5)} for row in good_or_bad(40, 0, pair=True)]
    write_rows(folder / "stsb" / "train.jsonl", scores)
    write_rows(folder / "stsb" / "dev.jsonl", scores[:10])
    return folder


def run(checkpoint, *words) -> int:
    return finetune.main(["--checkpoint", str(checkpoint), *map(str, words)])


def stored(out: Path) -> dict:
    return json.loads((out / "glue.json").read_text())


# Rows and labels


def own(folder: Path, train: list[dict], dev: list[dict], kind: str = "class"):
    options = DataOptions(
        train=write_rows(folder / "my.jsonl", train), dev=write_rows(folder / "dev.jsonl", dev), label_kind=kind
    )
    return load_task(chosen_tasks(options)[0], options)


def labelled(*labels) -> list[dict]:
    return [{"sentence1": f"text {number}", "label": label} for number, label in enumerate(labels)]


def test_integers_are_classes_as_they_are(tmp_path):
    data = own(tmp_path, labelled(2, 0, 1.0, "1"), labelled(0, 2))
    assert data.outputs == 3 and data.train.labels == [2, 0, 1, 1] and data.dev["dev"].labels == [0, 2]
    assert data.train.second is None and data.task.name == "my"


def test_words_are_classes_by_their_order(tmp_path):
    data = own(tmp_path, labelled("spam", "ham", "spam", "7"), labelled("ham"))
    assert data.names == ("7", "ham", "spam") and data.train.labels == [2, 1, 2, 0]


def test_scores_are_any_numbers(tmp_path):
    data = own(tmp_path, labelled(-1, 2.5, "3e2"), labelled(0), "score")
    assert (
        data.outputs == 1 and data.train.labels == [-1.0, 2.5, 300.0] and isinstance(data.dev["dev"].labels[0], float)
    )
    assert data.task.metrics == ("pearson", "spearman")


@pytest.mark.parametrize(
    "train, dev, kind, complaint",
    [
        (labelled(0, 1), labelled(1, 2), "class", r"dev\.jsonl:2: label 2 is not one of 0 to 1"),
        (labelled(0, 1), labelled("x"), "class", r"dev\.jsonl:1: label 'x' is not one of 0 to 1"),
        (labelled(0, 1, -1), labelled(0), "class", r"my\.jsonl:3: label -1 is below 0"),
        (labelled(1, 2, 3), labelled(1), "class", r"my\.jsonl:3: label 3, but no training row has 0"),
        (labelled(0, 0), labelled(0), "class", r"my\.jsonl: every label is 0; there is nothing to learn"),
        (labelled("a", "b"), labelled("c"), "class", r"dev\.jsonl:1: label 'c' is in no training row; they have a, b"),
        (labelled(1, "high"), labelled(1), "score", r"my\.jsonl:2: label 'high' is not a number"),
        (labelled(1, "nan"), labelled(1), "score", r"my\.jsonl:2: label 'nan' is not a number"),
        (labelled(0, 1), [{"sentence1": "a"}], "class", r"dev\.jsonl:1: no label"),
        ([{"label": 1}], labelled(1), "class", r"my\.jsonl:1: no sentence1"),
        ([{"sentence1": 5, "label": 1}], labelled(1), "class", r"my\.jsonl:1: sentence1 is not text"),
        ([], labelled(1), "class", r"my\.jsonl: holds no rows"),
        (
            [row | {"sentence2": None if i else "b"} for i, row in enumerate(labelled(0, 1))],
            labelled(1),
            "class",
            r"my\.jsonl:2: no sentence2",
        ),
        (labelled(0, 1), [{"sentence1": "a", "sentence2": "b", "label": 0}], "class", r"my\.jsonl: has no sentence2"),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path, train, dev, kind, complaint):
    with pytest.raises(UserError, match=complaint):
        own(tmp_path, train, dev, kind)


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.jsonl", '{"sentence1": "a", "label": 0}\n\n{broken\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: not a JSON object"),
        ("a.csv", "text,label\na,0\n", r"a\.csv:1: no column sentence1; the header has text, label"),
        ("a.tsv", "sentence1,label\na,0\n", r"a\.tsv:1: no column sentence1"),
        ("a.csv", "sentence1,label\na,0\nb\n", r"a\.csv:3: no label"),
        ("a.csv", "", r"a\.csv: holds no rows"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    options = DataOptions(train=tmp_path / name, dev=tmp_path / name)
    with pytest.raises(UserError, match=complaint):
        load_task(chosen_tasks(options)[0], options)


def test_tables_are_read_with_and_without_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('sentence1,sentence2,label\n"one, two","say ""so""",yes\nb,c,no\n')
    (tmp_path / "a.tsv").write_text('label\tsentence1\nyes\t5" long\nno\tb\n')
    (row, _), (other, _) = (list(row_files.read_rows(tmp_path / name, None)) for name in ("a.csv", "a.tsv"))
    assert (row.first, row.second, row.label) == ("one, two", 'say "so"', "yes")
    assert (other.first, other.second, str(other.place)) == ('5" long', None, f"{tmp_path / 'a.tsv'}:2")


def test_glue_tasks_come_from_a_folder(glue_dir):
    options = DataOptions(task=("mrpc", "mnli"), glue_dir=glue_dir)
    tasks = chosen_tasks(options)
    assert [task.name for task in tasks] == ["mnli", "mrpc"]
    mnli, mrpc = (load_task(task, options) for task in tasks)
    assert list(mnli.dev) == ["matched", "mismatched"] and mnli.outputs == 3
    assert list(mrpc.dev) == ["dev"] and len(mrpc.train) == 60 and len(mrpc.train.second) == 60
    assert {task.name for task in chosen_tasks(DataOptions(task=("all",)))} == set(GLUE)


def test_mnli_may_lack_its_mismatched_rows(tmp_path, glue_dir):
    for name in ("train", "dev_matched"):
        write_rows(tmp_path / "mnli" / f"{name}.jsonl", [json.loads((glue_dir / "mnli/train.jsonl").open().readline())])
    assert list(load_task(GLUE["mnli"], DataOptions(task=("mnli",), glue_dir=tmp_path)).dev) == ["matched"]
    (tmp_path / "mnli" / "dev_matched.jsonl").unlink()
    with pytest.raises(UserError, match=r"mnli: has no dev_matched\.jsonl"):
        load_task(GLUE["mnli"], DataOptions(task=("mnli",), glue_dir=tmp_path))
    with pytest.raises(UserError, match=r"has no folder rte"):
        load_task(GLUE["rte"], DataOptions(task=("rte",), glue_dir=tmp_path))


def test_glue_tasks_come_from_the_hub(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(name, task, split):
        asked.append((name, task, split))
        return [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, 2)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task(GLUE["mnli"], DataOptions(task=("mnli",)))
    splits = ("train", "validation_matched", "validation_mismatched")
    assert asked == [("nyu-mll/glue", "mnli", split) for split in splits]
    assert data.train.second == ["b"] * 3

    def offline(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"cola@train: cannot be loaded \(no network\); give --glue-dir"):
        load_task(GLUE["cola"], DataOptions(task=("cola",)))


# Metrics


def test_metrics_are_those_computed_by_hand():
    labels, predictions = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 0])
    # 2 true positives, 1 false positive, 2 false negatives, 3 true negatives.
    assert measure("accuracy", predictions, labels) == pytest.approx(5 / 8)
    assert measure("f1", predictions, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert measure("matthews", predictions, labels) == pytest.approx((2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5))
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    assert measure("pearson", x, y) == pytest.approx(1 / math.sqrt(14 / 3 * 2))
    assert measure("spearman", x, y) == pytest.approx(0.5)


def test_constant_predictions_count_nothing_and_crash_nothing(recwarn):
    zeros, labels = np.zeros(4), np.array([0, 1, 2, 3])
    assert measure("pearson", zeros, labels) == measure("spearman", zeros, labels) == 0
    assert measure("matthews", zeros, labels % 2) == measure("f1", zeros, labels % 2) == 0
    assert measure("pearson", zeros[:1], labels[:1]) == 0
    assert not recwarn.list


def test_the_likeliest_class_is_the_prediction():
    outputs = np.array([[0.1, 0.9], [2.0, -1.0]], dtype=np.float32)
    assert evaluate(("accuracy", "f1"), outputs, np.array([1, 1])) == {
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 3),
    }
    assert evaluate(("pearson",), np.array([[1.0], [2.0]]), np.array([3.0, 5.0])) == {"pearson": pytest.approx(1.0)}


# The table


def results_of(**tasks) -> dict:
    """task → the value of every metric, seed by seed."""
    content = {}
    for name, values in tasks.items():
        task = GLUE[name]
        seeds = {
            str(seed): {"scores": {split: dict.fromkeys(task.metrics, value) for split, _ in task.splits}}
            for seed, value in enumerate(values)
        }
        content[name] = {"seeds": seeds, "train_rows": 1000, "dev_rows": {split: 10 for split, _ in task.splits}}
    return {"tasks": content}


def test_the_table_is_the_papers():
    everything = medians(results_of(**dict.fromkeys(GLUE, (0.5, 0.9, 0.6))))
    assert HEAD == ("MNLI m/mm", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA", "average")
    assert cells(everything) == ("60.0/60.0", *["60.0"] * 8) and remark(everything) == ""
    lines = plain_table({"mine": everything}).splitlines()
    assert lines[0].split() == ["MNLI", "m/mm", *HEAD[1:]] and lines[1].split()[0] == "mine"
    assert len(lines[0]) == len(lines[1])


def test_matched_and_mismatched_count_twice_and_what_is_missing_not_at_all():
    found = medians(results_of(mnli=(0.8,), cola=(0.5,), wnli=(0.1,)))
    assert cells(found) == ("80.0/80.0", "–", "–", "–", "–", "–", "–", "50.0", "70.0")
    assert remark(found) == ("The average is over 3 of 9 numbers; missing: SST-2, STS-B, RTE, QNLI, QQP, MRPC.")
    del found["mnli", "mismatched", "accuracy"]
    assert cells(found)[0] == "80.0/–" and cells(found)[-1] == "65.0"


# The command


def test_the_command_ends_in_a_table_and_a_file(checkpoint, glue_dir, tmp_path, capsys):
    words = ("--task", "sst2", "stsb", "mnli", "--glue-dir", glue_dir, "--out", tmp_path, *HASTY, "--seeds", "2")
    assert run(checkpoint, *words) == 0
    said, content = capsys.readouterr().out, stored(tmp_path)
    assert "MNLI m/mm" in said and "The average is over 4 of 9 numbers; missing: RTE, QNLI, QQP, MRPC, CoLA." in said
    assert "sst2: 60 train, 20 dev rows" in said and f"saved      {tmp_path / 'glue.json'}" in said
    assert set(content["tasks"]) == {"sst2", "stsb", "mnli"}
    entry = content["tasks"]["mnli"]
    assert entry["train_rows"] == 40 and entry["dev_rows"] == {"matched": 40, "mismatched": 40}
    assert set(entry["seeds"]) == {"0", "1"}
    seed = entry["seeds"]["1"]
    assert seed["scores"] == seed["epochs"][-1]["scores"] and seed["steps"] == 3 and seed["seconds"] > 0
    assert 0.5 < seed["epochs"][0]["loss"] < 2
    assert content["settings"]["protocol"]["lr"] == 4e-5


def test_a_task_of_ones_own_is_learned(checkpoint, tmp_path, capsys):
    names = ("no", "yes")
    for name, count, seed in (("train", 200, 0), ("dev", 60, 1)):
        lines = [f"{row['sentence1']},{names[row['label']]}" for row in good_or_bad(count, seed)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["sentence1,label", *lines]) + "\n")
    files = ("--train", tmp_path / "train.csv", "--dev", tmp_path / "dev.csv", "--out", tmp_path / "out")
    assert run(checkpoint, *files, *HASTY, "--epochs", "10", "--lr", "2e-3", "--pooling", "cls") == 0
    entry = stored(tmp_path / "out")["tasks"]["train"]
    assert entry["classes"] == ["no", "yes"]
    assert entry["seeds"]["0"]["scores"]["dev"]["accuracy"] > 0.9
    said = capsys.readouterr().out
    assert "train: accuracy 9" in said or "train: accuracy 100.0" in said
    assert "MNLI" not in said


def test_finished_seeds_are_not_trained_again(checkpoint, glue_dir, tmp_path, capsys):
    words = ("--task", "sst2", "--glue-dir", glue_dir, "--out", tmp_path, *HASTY)
    assert run(checkpoint, *words) == 0
    first = stored(tmp_path)
    assert run(checkpoint, *words, "--seeds", "2", "--task", "sst2", "mrpc") == 0
    second = stored(tmp_path)
    assert second["tasks"]["sst2"]["seeds"]["0"] == first["tasks"]["sst2"]["seeds"]["0"]
    assert [set(second["tasks"][task]["seeds"]) for task in ("sst2", "mrpc")] == [{"0", "1"}] * 2
    capsys.readouterr()
    assert run(checkpoint, *words) == 0
    assert "finished before: sst2" in capsys.readouterr().out
    assert stored(tmp_path) == second


def test_a_seed_gives_the_same_whatever_was_trained_before(checkpoint, glue_dir, tmp_path):
    words = ("--task", "mrpc", "--glue-dir", glue_dir, *HASTY)
    assert run(checkpoint, *words, "--out", tmp_path / "a", "--seeds", "2") == 0
    assert run(checkpoint, *words, "--out", tmp_path / "b", "--seed", "1") == 0
    one, other = (stored(tmp_path / name)["tasks"]["mrpc"]["seeds"] for name in ("a", "b"))
    assert one["1"]["epochs"] == other["1"]["epochs"] != one["0"]["epochs"]


def test_random_weights_take_the_architecture_alone(checkpoint, glue_dir, tmp_path):
    words = ("--task", "sst2", "--glue-dir", glue_dir, *HASTY)
    assert run(checkpoint, *words, "--out", tmp_path / "a") == 0
    assert run(checkpoint, *words, "--out", tmp_path / "b", "--random-weights") == 0
    one, other = (stored(tmp_path / name) for name in ("a", "b"))
    assert (one["settings"]["random_weights"], other["settings"]["random_weights"]) == (False, True)
    losses = [content["tasks"]["sst2"]["seeds"]["0"]["epochs"][0]["loss"] for content in (one, other)]
    assert losses[0] != losses[1]


def test_results_land_beside_the_checkpoint(glue_dir, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "run")
    assert run(checkpoint, "--task", "sst2", "--glue-dir", glue_dir, *HASTY) == 0
    (folder,) = checkpoint.glob("glue-*")
    assert f"results in {folder}" in capsys.readouterr().out and (folder / "glue.json").is_file()


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "nothing to finetune on: give --task, or --train and --dev"),
        (("--task", "cola", "--train", "x.csv", "--dev", "y.csv"), "--task and --train are two kinds of data"),
        (("--train", "x.csv"), "a task of your own needs both --train and --dev"),
        (("--train", "x.csv", "--dev", "y.csv"), "x.csv: No such file or directory"),
        (("--task", "colla"), "--task"),
        (("--task", "cola", "--lr", "0"), "--lr 0.0: expected a number above 0"),
        (("--task", "cola", "--epochs", "0"), "--epochs 0: expected at least 1"),
        (("--task", "cola", "--dropout", "1"), "--dropout 1.0: expected a share"),
        (("--task", "cola", "--max-length", "4"), "--max-length 4: expected at least 5"),
        (("--task", "cola", "--max-length", "65"), "takes at most 64"),
        (("--task", "cola", "--label-kind", "score"), "--label-kind is for --train"),
        (("--task", "cola", "--glue-dir", "/nowhere"), "--glue-dir /nowhere: has no folder cola"),
        (("--task", "cola", "--tokenizer", "/nowhere.json"), "--tokenizer /nowhere.json: no such file"),
    ],
)
def test_what_cannot_be_is_one_line(checkpoint, tmp_path, capsys, words, complaint):
    assert run(checkpoint, "--out", tmp_path / "out", "--max-length", "16", "--device", "cpu", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("cramfast.finetune: ") and complaint in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_is_refused(checkpoint, glue_dir, tmp_path, capsys):
    words = ("--task", "sst2", "--glue-dir", glue_dir, "--out", tmp_path / "out", *HASTY)
    assert run(checkpoint, *words) == 0
    before = stored(tmp_path / "out")
    assert run(checkpoint, *words, "--lr", "1e-3") == 2
    assert "holds results of other settings: lr is 4e-05 there, 0.001 here; give another" in capsys.readouterr().err
    assert run(make_checkpoint(tmp_path / "other", intermediate_size=32), *words) == 2
    assert "encoder is " in capsys.readouterr().err
    assert stored(tmp_path / "out") == before
    (tmp_path / "out" / "glue.json").write_text("{}")
    assert run(checkpoint, *words) == 2
    assert "not results of finetuning; give another --out" in capsys.readouterr().err


def test_no_model_is_one_line(tmp_path, capsys):
    assert run(tmp_path, "--task", "sst2") == 2
    assert "holds no model" in capsys.readouterr().err


def test_two_commands_may_fill_one_folder(tmp_path):
    one, other = (Results(tmp_path, {"lr": 1}, {"checkpoint": "x"}) for _ in range(2))
    one.record("cola", {}, 0, {"scores": 1})
    other.record("cola", {}, 1, {"scores": 2})
    one.record("mrpc", {}, 0, {"scores": 3})
    assert {name: set(entry["seeds"]) for name, entry in stored(tmp_path)["tasks"].items()} == {
        "cola": {"0", "1"},
        "mrpc": {"0"},
    }
    assert one.has("cola", 1) and not one.has("mrpc", 1)


def test_what_is_wrong_with_the_last_task_shows_before_the_first_is_trained(checkpoint, glue_dir, tmp_path, capsys):
    words = ("--task", "sst2", "rte", "--glue-dir", glue_dir, "--out", tmp_path / "out", *HASTY)
    assert run(checkpoint, *words) == 2
    said = capsys.readouterr()
    assert "has no folder rte" in said.err and "seed 0" not in said.out
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(checkpoint, glue_dir, tmp_path, capsys):
    words = ("--task", "stsb", "--glue-dir", glue_dir, "--out", tmp_path / "out", *HASTY, "--epochs", "3")
    assert run(checkpoint, *words, "--lr", "1e25") == 1
    assert "the loss is not finite after epoch" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
