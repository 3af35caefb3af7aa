"""`--init-from`: training that starts from weights that exist, with their tokenizer, and resumes exactly."""

import shutil
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from test_hugging_face import SIZES, randomised, wordpiece
from test_pretrain import document, final_weights, flags, read_json, updates

import cramfast
from cramfast import pretrain
from cramfast.config import PRESETS, PretrainOptions, resolve

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(map(document, range(60))))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of transformers with its head, and the vocab.txt of old."""
    folder = tmp_path_factory.mktemp("bert") / "some-bert"
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    randomised(model).save_pretrained(folder)
    wordpiece(SIZES["vocab_size"], folder)
    return folder


@pytest.fixture
def start(corpus, tmp_path, tmp_path_factory, monkeypatch, capsys):
    """Runs the command from a model into tmp_path/NAME; returns (code, out, err)."""
    monkeypatch.setenv("CRAMFAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, model, steps=STEPS, **settings):
        capsys.readouterr()
        settings = {"preset": None, "vocab_size": None, "evals": 1, "init_from": model} | settings
        code = pretrain.main(flags(corpus, name and tmp_path / name, steps, **settings))
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_training_starts_from_the_weights_and_the_tokenizer(start, bert, tmp_path):
    # With rates this small no weight of size 0.01 to 1 moves by more than a rounding.
    code, said, _ = start("run", bert, lr=1e-12, muon_lr=1e-12)
    assert code == 0
    assert f"starting from {bert}" in said and "some-bert, " in said
    initial, trained = cramfast.load(bert), cramfast.load(tmp_path / "run")
    assert trained.config == initial.config
    for name, tensor in initial.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-7)
    vocabulary = read_json(tmp_path / "run/final/tokenizer.json")["model"]["vocab"]
    assert list(vocabulary) == (bert / "vocab.txt").read_text().splitlines()


def test_training_moves_them(start, bert, tmp_path):
    assert start("run", bert)[0] == 0
    initial, trained = (cramfast.load(place).state_dict() for place in (bert, tmp_path / "run"))
    assert not torch.equal(initial["layers.0.attention.qkv.weight"], trained["layers.0.attention.qkv.weight"])
    assert not torch.equal(initial["head.bias"], trained["head.bias"])
    # Of the token types pretraining has the first.
    types = "embeddings.token_types.weight"
    assert not torch.equal(initial[types][0], trained[types][0])


def test_a_run_of_cramfast_goes_on_in_another(start, tmp_path):
    assert start("first", None, preset="cramfast-tiny", vocab_size=512)[0] == 0
    assert start("second", tmp_path / "first", checkpoint_every="2steps")[0] == 0
    first, second = (tmp_path / name / "final" for name in ("first", "second"))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    # Where the first one ended, and not where a model begins: at the entropy of 512 entries or above.
    assert updates(tmp_path / "second")[0]["loss"] < updates(tmp_path / "first")[0]["loss"] - 0.1
    # A checkpoint has its tokenizer from the run.
    shutil.rmtree(tmp_path / "second" / "final")
    assert start("third", tmp_path / "second" / f"checkpoint-{STEPS}")[0] == 0


@pytest.mark.parametrize("model", ["with its head", "without"])
def test_it_resumes_to_the_same_weights(start, bert, tmp_path, model):
    if model == "without":
        transformers.BertModel.from_pretrained(bert).save_pretrained(tmp_path / "base")
        wordpiece(SIZES["vocab_size"], tmp_path / "base")
        bert = tmp_path / "base"
    assert start("whole", bert, checkpoint_every="2steps", keep_checkpoints=9)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for left in ("final", f"checkpoint-{STEPS}", "checkpoint-4"):
        shutil.rmtree(tmp_path / "cut" / left)
    (tmp_path / "cut" / "summary.json").unlink()
    code, said, _ = start("cut", bert, checkpoint_every="2steps", keep_checkpoints=9)
    assert code == 0
    assert ("not there, so random: cls.predictions.bias" in said) == (model == "without")
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole")


def test_other_weights_are_another_run(start, bert, tmp_path):
    shutil.copytree(bert, tmp_path / "some-bert")
    assert start("run", tmp_path / "some-bert", steps=2)[0] == 0
    # Where they lie is no part of it, what they are is.
    assert "is finished" in start("run", bert, steps=2)[1]
    assert start(None, bert, steps=2)[0] == 0
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    randomised(model, seed=1).save_pretrained(tmp_path / "some-bert")
    code, _, complaint = start("run", tmp_path / "some-bert", steps=2)
    assert code == 2 and "init_from is" in complaint
    assert start(None, tmp_path / "some-bert", steps=2)[0] == 0
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert len(names) == 2 and all(name.startswith("some-bert-") for name in names)


@pytest.mark.parametrize(
    "settings",
    [{"preset": "bert-mini"}, {"vocab_size": 300}, {"tokenizer": "tokenizer.json"}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_the_folder_decides_cannot_be_given(start, bert, tmp_path, settings):
    code, _, complaint = start("run", bert, **settings)
    ((name, value),) = settings.items()
    assert code == 2 and f"--{name.replace('_', '-')} {value}: --init-from" in complaint
    assert not (tmp_path / "run").exists()


def test_sequences_longer_than_the_model_takes_are_refused(start, bert, tmp_path):
    code, _, complaint = start("run", bert, max_length=71)
    assert code == 2 and f"--max-length 71: {bert} takes 2 to 70" in complaint
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer_is_refused(start, bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bare", ignore=shutil.ignore_patterns("vocab.txt"))
    code, _, complaint = start("run", tmp_path / "bare")
    assert code == 2 and "holds no tokenizer" in complaint
    assert not (tmp_path / "run").exists()


def test_what_was_dropped_is_said(start, tmp_path):
    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZES))
    model.save_pretrained(tmp_path / "both")
    wordpiece(SIZES["vocab_size"], tmp_path / "both")
    said = start("run", tmp_path / "both", steps=2)[1]
    assert "left out: " in said and "bert.pooler.dense.weight" in said and "cls.seq_relationship.bias" in said


def test_the_recipe_goes_by_the_width_of_the_model():
    config = replace(PRESETS["bert-mini"], vocab_size=300)
    resolved = resolve(PretrainOptions(init_from="somewhere"), has_gpu=False, initial=config)
    assert resolved.preset is None and resolved.text.vocab_size == 300
    assert resolved.optimizer.lr == resolve(PretrainOptions(preset="bert-mini"), has_gpu=False).optimizer.lr
