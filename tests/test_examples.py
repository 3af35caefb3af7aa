"""The scripts of examples/, tiny and on whatever device there is, and what the README shows of models and layers."""

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

_TINY = ["--layers", "2", "--hidden", "64", "--steps", "3", "--batch", "4", "--length", "24"]


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.mark.parametrize("section", ["A Hugging Face model on these kernels", "Fused layers in your own model"])
def test_what_the_readme_shows(section, capsys):
    pytest.importorskip("transformers")
    text = (Path(__file__).parents[1] / "README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["loss"].isfinite()


@pytest.mark.parametrize("more", [[], ["--untouched"]])
def test_pretraining_of_hugging_faces_bert(more, capsys):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    loss = importlib.import_module("pretrain_hf_bert").main(_TINY + more)
    # A fresh model has all 30,522 tokens equally likely.
    assert loss == pytest.approx(math.log(30_522), abs=0.5)
    assert ("fused: 2 × attention of BertLayer" in capsys.readouterr().out) == (not more)


def test_an_encoder_of_ones_own():
    torch.manual_seed(0)
    example = importlib.import_module("own_encoder")
    assert example.main(_TINY) == pytest.approx(math.log(example.VOCABULARY), abs=0.5)


@pytest.mark.slow
def test_glue_with_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = tmp_path / "model"
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(model)
    rows = [{"sentence1": f"a {word} film", "label": label} for label, word in enumerate(["bad", "good"])] * 4
    rows += [{"sentence1": "good film", "sentence2": "a film", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--train", f"{tmp_path}/rows.jsonl", "--dev", f"{tmp_path}/rows.jsonl", "--out", f"{tmp_path}/out"]
    options = ["--batch", "3", "--epochs", "1", *([] if torch.cuda.is_available() else ["--cpu"])]
    metrics = importlib.import_module("glue_trainer").main(["--model", str(model), *files, *options])
    assert 0 <= metrics["eval_accuracy"] <= 1
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "BertForSequenceClassification"
