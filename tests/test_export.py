"""Exported folders as the rest of the world loads them: transformers, its pipelines, sentence-transformers, ONNX."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_model import FP32_TOLERANCE, random_bert
from tokenizers import Tokenizer, models, pre_tokenizers

import cramfast
from cramfast import export as command
from cramfast import exporting
from cramfast.config import PRESETS
from cramfast.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from cramfast.errors import UserError
from cramfast.exporting import TEXTS, export
from cramfast.train.checkpoint import save_model

pytestmark = pytest.mark.usefixtures("reference")

STOCK = tuple(sorted(set(PRESETS) - {"crammed-bert"}))
SENTENCES = ["The moon is above Paris.", "no end", "Walked, stack; In 1969?"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    options = {"lowercase": True, "strip_accents": True, "ascii_only": True}
    train_tokenizer(lambda: iter(TEXTS), 211, **options).save(str(path))
    return path


def trained(folder, name, tokenizer_file, **changes):
    """A `final` of the preset, in two layers unless `changes` say otherwise; returns (folder, model)."""
    size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    config = replace(PRESETS[name], **({"vocab_size": size, "num_layers": 2} | changes))
    model = random_bert(config)
    save_model(folder / name, model, tokenizer_file)
    return folder / name, model


@pytest.fixture(scope="module", params=["bert-mini", "cramfast-tiny"])
def exported(request, tmp_path_factory, tokenizer_file):
    """(folder, model) for a model of either architecture."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAMFAST_KERNELS", "reference")
        final, model = trained(folder, request.param, tokenizer_file)
        export(final, folder / "out", lambda stage: None)
    return folder / "out", model


@torch.no_grad()
def own_logits(model, ids):
    """Logits (S, V) of one sequence ids (S,)."""
    return model.predict(model.encode(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)))


def run(*flags):
    return command.main([str(flag) for flag in flags])


@pytest.mark.parametrize("name", STOCK)
def test_presets_export_to_stock_classes_and_come_back(tmp_path, tokenizer_file, capsys, name):
    from transformers import AutoModelForMaskedLM

    final, model = trained(tmp_path, name, tokenizer_file)
    out = tmp_path / "out"
    assert run("--checkpoint", final, "--to", out) == 0
    stock, report = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    family = "BertForMaskedLM" if name.startswith("bert") else "ModernBertForMaskedLM"
    assert type(stock).__name__ == family and type(stock).__module__.startswith("transformers.")
    ids = torch.randint(model.config.vocab_size, (3, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = stock.eval()(input_ids=ids).logits
    for row, expected in zip(ids, theirs, strict=True):
        assert (own_logits(model, row) - expected).abs().max() <= FP32_TOLERANCE
    back = cramfast.load(out)
    assert back.config == model.config
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())
    said = capsys.readouterr().out
    assert family in said and "logits differ by at most" in said
    assert f'transformers.AutoModelForMaskedLM.from_pretrained("{out}")' in said


def test_a_model_in_full_size(tmp_path):
    config = PRESETS["cramfast-small"]
    entries = [*SPECIAL_TOKENS, *map(str, range(config.vocab_size - 5))]
    tokenizer = Tokenizer(models.WordPiece({e: i for i, e in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    final, _ = trained(tmp_path, "cramfast-small", tmp_path / "tokenizer.json", num_layers=config.num_layers)
    done = export(final, tmp_path / "out", lambda stage: None)
    assert done.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "out/model.safetensors").values())
    assert done.parameters > 35e6 and 0 < done.difference <= 1e-4


def test_local_layers_are_exported(tmp_path, tokenizer_file):
    from transformers import AutoConfig

    local = {"window": 8, "global_every": 2, "rope_theta": 5e4}
    final, model = trained(tmp_path, "cramfast-tiny", tokenizer_file, num_layers=4, **local)
    assert export(final, tmp_path / "out", lambda stage: None).difference <= 1e-4
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == ["full_attention", "sliding_attention"] * 2
    assert cramfast.load(tmp_path / "out").config == model.config


def test_the_exported_tokenizer_frames_texts(exported, tokenizer_file):
    from transformers import AutoTokenizer

    folder, model = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = Tokenizer.from_file(str(tokenizer_file))
    for text in SENTENCES:
        assert tokenizer(text)["input_ids"] == original.encode(text).ids
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[:: len(original.encode(text).ids) - 1] == [
            "[CLS]",
            "[SEP]",
        ]
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    assert {name: getattr(tokenizer, f"{name}_token") for name in named} == named
    assert tokenizer.model_max_length == model.config.max_positions
    has_types = model.config.token_types > 0
    assert ("token_type_ids" in tokenizer("a", "b")) == has_types
    assert not has_types or tokenizer("a", "b")["token_type_ids"][-2:] == [1, 1]


def test_fill_mask(exported):
    from transformers import pipeline

    folder, model = exported
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "The capital of [MASK] is Paris."
    guesses = pipeline("fill-mask", model=str(folder), device="cpu")(text, top_k=3)
    ids = torch.tensor(tokenizer.encode(text).ids)
    expected = own_logits(model, ids)[ids == tokenizer.token_to_id("[MASK]")].softmax(-1).topk(3)
    assert [guess["token"] for guess in guesses] == expected.indices[0].tolist()
    assert [guess["score"] for guess in guesses] == pytest.approx(expected.values[0].tolist(), rel=1e-3)


@torch.no_grad()
def test_sentence_embeddings(exported):
    library = pytest.importorskip("sentence_transformers")
    folder, model = exported
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    embeddings = library.SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    for text, embedding in zip(SENTENCES, embeddings, strict=True):
        ids = torch.tensor(tokenizer.encode(text).ids)
        hidden = model.encode(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        # The mean of hidden states, which are of size 1.
        assert np.abs(embedding - hidden.mean(0).numpy()).max() <= FP32_TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_onnx(exported, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers import AutoModelForMaskedLM

    folder, model = exported
    stock = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(5, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        program = torch.onnx.export(stock, kwargs=arguments, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (theirs, *_) = session.run(None, {name: tensor.numpy() for name, tensor in arguments.items()})
    for row, expected in zip(ids, theirs, strict=True):
        assert np.abs(own_logits(model, row).numpy() - expected).max() <= FP32_TOLERANCE


def test_crammed_bert_is_for_cramfast_and_says_why(tmp_path, tokenizer_file, capsys):
    final, model = trained(tmp_path, "crammed-bert", tokenizer_file, num_layers=2)
    out = tmp_path / "out"
    assert run("--checkpoint", final, "--to", out) == 0
    said = capsys.readouterr().out
    assert "positions is 'sinusoidal' instead of 'rotary'" in said and f'cramfast.load("{out}")' in said
    assert "AutoModel" not in said
    back = cramfast.load(out)
    assert back.config == model.config
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_other_special_tokens_and_no_template(tmp_path):
    from transformers import AutoTokenizer

    entries = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(60)), "<mask>"]
    tokenizer = Tokenizer(models.WordPiece({e: i for i, e in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    final, _ = trained(tmp_path, "cramfast-tiny", tmp_path / "tokenizer.json", num_layers=1)
    export(final, tmp_path / "out", lambda stage: None)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("7 8")["input_ids"] == [0, 11, 12, 2]
    assert (loaded.mask_token, loaded.pad_token_id) == ("<mask>", 1)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert (settings["pad_token_id"], settings["cls_token_id"], settings["sep_token_id"]) == (1, 0, 2)


def test_a_pooler_is_left_out_and_named(tmp_path, tokenizer_file, capsys):
    from transformers import BertConfig, BertForPreTraining

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    BertForPreTraining(BertConfig(vocab_size=size, **sizes)).save_pretrained(tmp_path / "both")
    (tmp_path / "both/tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    assert run("--checkpoint", tmp_path / "both", "--to", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "left out " in said and "bert.pooler.dense.weight" in said and "cls.seq_relationship.bias" in said


def left_behind(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_never_overwritten(tmp_path, tokenizer_file, capsys, kind):
    final, _ = trained(tmp_path, "cramfast-tiny", tokenizer_file, num_layers=1)
    out = tmp_path / "out"
    (out if kind == "folder" else tmp_path).mkdir(exist_ok=True)
    mine = out / "mine.txt" if kind == "folder" else out
    mine.write_text("mine")
    assert run("--checkpoint", final, "--to", out) == 2
    assert f"--to {out}: exists" in capsys.readouterr().err
    assert mine.read_text() == "mine" and left_behind(tmp_path) == {"cramfast-tiny", "out"}


def test_an_empty_folder_is_filled(tmp_path, tokenizer_file):
    final, _ = trained(tmp_path, "cramfast-tiny", tokenizer_file, num_layers=1)
    (tmp_path / "out").mkdir()
    export(final, tmp_path / "out", lambda stage: None)
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["bert-mini", "cramfast-tiny"])
def test_an_export_that_computes_something_else_is_removed(tmp_path, tokenizer_file, monkeypatch, name):
    final, _ = trained(tmp_path, name, tokenizer_file)

    def swapped(tensors, config):
        key = "layers.1.attention.qkv.weight"
        query, rest = tensors[key].tensor_split([config.hidden_size])
        return original(tensors | {key: torch.cat((query.flip(0), rest))}, config)

    original = exporting.write_weights
    monkeypatch.setattr(exporting, "write_weights", swapped)
    with pytest.raises(UserError, match=r"logits differ by \d.*nothing was written"):
        export(final, tmp_path / "out", lambda stage: None)
    assert left_behind(tmp_path) == {name}


def test_an_export_that_lacks_weights_is_removed(tmp_path, tokenizer_file, monkeypatch):
    final, _ = trained(tmp_path, "cramfast-tiny", tokenizer_file)
    original = exporting.write_weights

    def incomplete(*given):
        return {name: tensor for name, tensor in original(*given).items() if name != "head.norm.weight"}

    monkeypatch.setattr(exporting, "write_weights", incomplete)
    with pytest.raises(UserError, match=r"transformers does not load it.*head\.norm\.weight"):
        export(final, tmp_path / "out", lambda stage: None)
    assert left_behind(tmp_path) == {"cramfast-tiny"}


def test_without_transformers_the_command_names_it(tmp_path, tokenizer_file, monkeypatch, capsys):
    final, _ = trained(tmp_path, "cramfast-tiny", tokenizer_file)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("--checkpoint", final, "--to", tmp_path / "out") == 2
    assert "pip install transformers" in capsys.readouterr().err
    assert left_behind(tmp_path) == {"cramfast-tiny"}


def test_a_model_without_a_head_is_not_exported(tmp_path, tokenizer_file, capsys):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    BertModel(BertConfig(vocab_size=size, **sizes)).save_pretrained(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    assert run("--checkpoint", tmp_path / "base", "--to", tmp_path / "out") == 2
    assert "holds no prediction head" in capsys.readouterr().err
    assert left_behind(tmp_path) == {"base"}


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
def test_what_is_missing_is_named(tmp_path, tokenizer_file, capsys, missing):
    final, _ = trained(tmp_path, "cramfast-tiny", tokenizer_file, num_layers=1)
    (final / ("model.safetensors" if missing == "model" else "tokenizer.json")).unlink()
    assert run("--checkpoint", final, "--to", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert str(final) in said and f"no {missing}" in said and len(said.splitlines()) == 1
    assert left_behind(tmp_path) == {"cramfast-tiny"}
