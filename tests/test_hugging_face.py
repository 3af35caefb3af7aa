"""Models of transformers as `cramfast.load` reads them: the same logits, whichever class stored them and how.

Their weights are random throughout, norms and biases too, so that nothing can be left out or swapped unseen.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import FP32_TOLERANCE, LENGTHS, VOCAB, batch, logits, pad, padded_logits
from tokenizers import Tokenizer, models

import cramfast
from cramfast.config import PRESETS
from cramfast.data.tokenizer import SPECIAL_TOKENS, SpecialIds
from cramfast.errors import UserError
from cramfast.hugging_face import family_of, read_config, write_config, write_weights
from cramfast.pretrained import load_tokenizer, open_pretrained

pytestmark = [
    pytest.mark.usefixtures("reference"),
    pytest.mark.filterwarnings("ignore:.*freshly initialised:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
]

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, VOCAB))
BERT_HEAD = {"bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight"} | {
    "transform.LayerNorm.bias"
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "intermediate_size": 56,
    "max_position_embeddings": 70,
    "pad_token_id": 0,
}


def bert_config(**settings):
    return transformers.BertConfig(**SIZES, **settings)


def modernbert_config(**settings):
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    return transformers.ModernBertConfig(**SIZES, **ids, **{"local_attention": 8, **settings})


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if re.search(r"norm\.weight$", name, re.IGNORECASE):
                parameter += 1
    return model.eval()


def stored(folder, cls="BertForMaskedLM", config=None, **options):
    """(model, folder) of a random model of this class, saved by transformers."""
    model = randomised(getattr(transformers, cls)(config or bert_config(), **options))
    model.save_pretrained(folder)
    return model, folder


def change(folder, edit):
    """Edit the stored weights by name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(edit(tensors) or tensors, file)


def configure(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refusal(*arguments, call=cramfast.load):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def hidden_differ_by(model, hf_model):
    """The largest difference of the hidden states."""
    ids_BS, mask_BS = pad(batch()[0], LENGTHS)
    theirs = hf_model.base_model(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state[mask_BS]
    return (model.encode(*batch()) - theirs).abs().max()


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertForPreTraining"])
def test_bert_with_its_head(tmp_path, cls):
    hf_model, folder = stored(tmp_path, cls)
    model = cramfast.load(folder)
    assert not model.training and model.config.num_heads == 5
    ids_BS, mask_BS = pad(batch()[0], LENGTHS)
    theirs = hf_model(input_ids=ids_BS, attention_mask=mask_BS.long())
    theirs = theirs.logits if cls == "BertForMaskedLM" else theirs.prediction_logits
    assert (logits(model) - theirs[mask_BS]).abs().max() <= FP32_TOLERANCE
    found = open_pretrained(folder).weights
    assert found.fresh == ()
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in found.dropped} == (
        set() if cls == "BertForMaskedLM" else {"bert.pooler", "cls.seq_relationship"}
    )


@pytest.mark.parametrize(
    ("cls", "options", "dropped"),
    [
        ("BertModel", {}, {"bert.pooler"}),
        ("BertModel", {"add_pooling_layer": False}, set()),
        ("BertForSequenceClassification", {}, {"bert.pooler", "classifier"}),
        ("BertForTokenClassification", {}, {"classifier"}),
        ("BertForQuestionAnswering", {}, {"qa_outputs"}),
    ],
)
def test_bert_without_its_head_says_so(tmp_path, cls, options, dropped):
    hf_model, folder = stored(tmp_path, cls, **options)
    with pytest.warns(UserWarning, match="no prediction head; freshly initialised: cls.predictions") as warned:
        model = cramfast.load(folder)
    assert all(f"cls.predictions.{name}" in str(warned[0].message) for name in BERT_HEAD)
    assert hidden_differ_by(model, hf_model) <= FP32_TOLERANCE
    assert model.head.bias.eq(0).all() and model.head.transform[0].weight.std() > 0.01
    weights = open_pretrained(folder).weights
    assert {re.sub(r"(\.dense)?\.\w+$", "", name) for name in weights.dropped} == dropped


def test_bert_by_its_old_names(tmp_path):
    hf_model, folder = stored(tmp_path)

    def age(tensors):
        names = {name: re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name) for name in tensors}
        aged = {re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", new): tensors[name] for name, new in names.items()}
        assert sum(name.endswith((".gamma", ".beta")) for name in aged) == 2 * (2 + 2 * 4)
        table = {"bert.embeddings.position_ids": torch.arange(70)[None]}
        return aged | table | {"cls.predictions.decoder.bias": aged["cls.predictions.bias"].clone()}

    change(folder, age)
    assert (logits(cramfast.load(folder)) - padded_logits(hf_model)).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("cls", "config"), [("BertForMaskedLM", bert_config), ("ModernBertForMaskedLM", modernbert_config)]
)
def test_there_and_back_are_the_same_weights(tmp_path, cls, config):
    _, folder = stored(tmp_path, cls, config())
    model = cramfast.load(folder)
    written, original = write_weights(model.state_dict(), model.config), load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"global_attn_every_n_layers": 2, "local_attention": 20},
        {"global_attn_every_n_layers": 1},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e4}}},
    ],
)
def test_modernbert(tmp_path, settings):
    hf_model, folder = stored(tmp_path, "ModernBertForMaskedLM", modernbert_config(**settings))
    assert (logits(cramfast.load(folder)) - padded_logits(hf_model)).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize(("local_theta", "expected"), [(2e4, 2e4), (None, 8e4)])
def test_modernbert_by_the_settings_of_transformers_4(tmp_path, local_theta, expected):
    hf_model, folder = stored(
        tmp_path, "ModernBertForMaskedLM", modernbert_config(global_rope_theta=8e4, local_rope_theta=expected)
    )
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"], settings["layer_types"]
    settings |= {"global_attn_every_n_layers": 3, "global_rope_theta": 8e4, "local_rope_theta": local_theta}
    (folder / "config.json").write_text(json.dumps(settings))
    model = cramfast.load(folder)
    assert (model.config.rope_theta, model.config.local_rope_theta) == (8e4, expected)
    assert (logits(model) - padded_logits(hf_model)).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("cls", "fresh", "dropped"),
    [
        ("ModernBertModel", {"head.dense.weight", "head.norm.weight", "decoder.bias"}, set()),
        # Its head is one of the same shape, of which the decoder is gone.
        ("ModernBertForSequenceClassification", {"decoder.bias"}, {"classifier.weight", "classifier.bias"}),
    ],
)
def test_modernbert_without_its_head_says_so(tmp_path, cls, fresh, dropped):
    hf_model, folder = stored(tmp_path, cls, modernbert_config())
    weights = open_pretrained(folder).weights
    assert ({*weights.fresh}, {*weights.dropped}) == (fresh, dropped)
    assert hidden_differ_by(cramfast.load(folder), hf_model) <= FP32_TOLERANCE


def test_stock_configs():
    assert read_config(transformers.BertConfig().to_dict()) == PRESETS["bert-base"]
    config = read_config(transformers.ModernBertConfig().to_dict())
    assert (config.window, config.global_every, config.rope_theta, config.local_rope_theta) == (64, 3, 160_000, 10_000)
    assert [number for number in range(config.num_layers) if not config.is_local(number)] == [*range(0, 22, 3)]
    assert (config.num_layers, config.hidden_size, config.intermediate_size, config.max_positions) == (
        *(22, 768, 1152, 8192),
    )


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"crammed-bert"}))
def test_configs_there_and_back(name):
    for config in (PRESETS[name], replace(PRESETS[name], num_heads=4, max_positions=77, initializer_range=0.01)):
        settings = write_config(config, SPECIAL)
        assert read_config(json.loads(json.dumps(settings))) == config
        # What transformers makes of it, and stores again, says the same.
        theirs = transformers.AutoConfig.for_model(**settings)
        assert read_config(theirs.to_dict()) == config


def test_local_layers_there_and_back():
    config = replace(PRESETS["cramfast-base"], window=50, global_every=4, rope_theta=9e4, local_rope_theta=3e3)
    settings = write_config(config, SPECIAL)
    assert read_config(settings) == config
    # transformers 4 knows none of these two.
    older = {name: value for name, value in settings.items() if name not in ("rope_parameters", "layer_types")}
    assert read_config(older) == config
    theirs = transformers.AutoConfig.for_model(**settings)
    assert theirs.sliding_window == 50
    assert [kind == "full_attention" for kind in theirs.layer_types] == [i % 4 == 0 for i in range(16)]


def test_no_architecture_fits_crammed_bert():
    message = refusal(PRESETS["crammed-bert"], call=family_of)
    assert "ModernBertForMaskedLM" in message and "positions is 'sinusoidal' instead of 'rotary'" in message


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files(tmp_path, safe):
    hf_model, folder = stored(tmp_path)
    hf_model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    if not safe:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: Path(file).stem + ".bin" for name, file in index["weight_map"].items()}
        for shard in shards:
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert (logits(cramfast.load(folder)) - padded_logits(hf_model)).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(tmp_path, zipped):
    hf_model, folder = stored(tmp_path)
    (folder / "model.safetensors").unlink()
    state = hf_model.state_dict()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert (logits(cramfast.load(folder)) - padded_logits(hf_model)).abs().max() <= FP32_TOLERANCE


def test_loading_needs_no_transformers(tmp_path):
    _, folder = stored(tmp_path)
    code = f"import sys; sys.modules['transformers'] = None; import cramfast; cramfast.load({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_16_bit_weights_become_float32(tmp_path):
    hf_model, folder = stored(tmp_path)
    change(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    model = cramfast.load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    theirs = hf_model.base_model.embeddings.word_embeddings.weight
    assert torch.equal(model.embeddings.tokens.weight, theirs.half().float())


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_hostile_pickle_is_refused_unread(tmp_path, write):
    _, folder = stored(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    write({"bert.pooler.dense.bias": Hostile(trap)}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert str(folder / "pytorch_model.bin") in message and "refused" in message and "safetensors" in message
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_a_pickle_without_weights_is_refused(tmp_path, content):
    _, folder = stored(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert str(folder / "pytorch_model.bin") in refusal(folder)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_truncated_weights_are_refused(tmp_path, kept):
    _, folder = stored(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(folder)
    assert str(file) in message and "damaged" in message


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "model.py"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, place):
    _, folder = stored(tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"bert.embeddings.word_embeddings.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert place in refusal(folder)


@pytest.mark.parametrize("cls", ["RobertaForMaskedLM", "GPT2LMHeadModel"])
def test_another_architecture_is_refused_by_name(tmp_path, cls):
    config = getattr(transformers, cls).config_class()
    config.architectures = [cls]
    config.save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert str(tmp_path / "config.json") in message and cls in message and config.model_type in message
    assert "bert and modernbert" in message


@pytest.mark.parametrize(
    ("cls", "settings", "part"),
    [
        ("Bert", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("Bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("Bert", {"is_decoder": True}, "is_decoder"),
        ("Bert", {"hidden_size": "40"}, "hidden_size is '40'"),
        ("Bert", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("Bert", {"num_attention_heads": 7}, "not a multiple of 7 heads"),
        ("Bert", {"model_type": None, "architectures": None}, "model_type is None"),
        ("ModernBert", {"hidden_activation": "silu"}, "hidden_activation"),
        ("ModernBert", {"mlp_bias": True}, "mlp_bias"),
        ("ModernBert", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("ModernBert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
    ],
)
def test_what_a_bert_cannot_be_is_refused(tmp_path, cls, settings, part):
    _, folder = stored(tmp_path, f"{cls}Model", bert_config() if cls == "Bert" else modernbert_config())
    configure(folder, **settings)
    message = refusal(folder)
    assert str(folder / "config.json") in message and part in message


def test_weights_that_do_not_fit_are_listed(tmp_path):
    _, folder = stored(tmp_path)
    norm = "bert.encoder.layer.2.output.LayerNorm.bias"

    def spoil(tensors):
        for number in range(4):
            tensors[f"stranger.{number}"] = tensors.pop(f"bert.encoder.layer.{number}.attention.self.key.bias")
        tensors[norm] = torch.zeros(41)
        tensors["bert.embeddings.LayerNorm.bias"] = torch.zeros(40, dtype=torch.int64)

    change(folder, spoil)
    message = refusal(folder)
    assert str(folder / "model.safetensors") in message
    assert "4 missing: bert.encoder.layer.0.attention.self.key.bias" in message
    assert "4 unknown: stranger.0, stranger.1, stranger.2, ..." in message
    assert f"1 of the wrong shape: {norm} (41,) instead of (40,)" in message
    assert "1 not floating-point: bert.embeddings.LayerNorm.bias" in message


def test_half_a_head_is_refused(tmp_path):
    _, folder = stored(tmp_path)
    change(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "cls.predictions.bias"})
    assert "1 missing: cls.predictions.bias" in refusal(folder)


def test_a_decoder_of_its_own_is_refused(tmp_path):
    _, folder = stored(tmp_path)
    change(folder, lambda tensors: tensors.update({"cls.predictions.decoder.weight": torch.ones(VOCAB, 40)}))
    assert "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight" in refusal(folder)


def wordpiece(size, folder, lowercase=True):
    """BERT's old vocab.txt of `size` entries: letters, a few words, numbers."""
    words = ["unaffable", "the", "un", "##aff", "##able", "Wand", "wand", "##ern", ",", "!", "é", "e", "中"]
    entries = [*SPECIAL_TOKENS, *words, *(f"[unused{number}]" for number in range(size - len(words) - 5))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))


@pytest.mark.parametrize("lowercase", [True, False])
def test_an_old_vocabulary_reads_as_in_transformers(tmp_path, lowercase):
    _, folder = stored(tmp_path)
    wordpiece(VOCAB, folder, lowercase)
    ours = load_tokenizer(folder)
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    for text in ("UNaffable, the Wandern!", "é中the [MASK] un", "", "two  words\x00"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    pair, expected = ours.encode("the wand", "un, un"), theirs("the wand", "un, un")
    assert (pair.ids, pair.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    assert cramfast.load(folder).config.vocab_size == ours.get_vocab_size() == VOCAB


def test_tokenizer_json_comes_before_an_old_vocabulary(tmp_path):
    _, folder = stored(tmp_path)
    wordpiece(VOCAB, folder)
    numbers = {entry: number for number, entry in enumerate([*SPECIAL_TOKENS, *map(str, range(VOCAB - 5))])}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("17").ids == [22]
    assert load_tokenizer(folder).truncation is None


@pytest.mark.parametrize(
    ("entries", "fits"), [(VOCAB, True), (VOCAB - 127, True), (VOCAB - 128, False), (VOCAB + 1, False)]
)
def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, entries, fits):
    _, folder = stored(tmp_path)
    wordpiece(entries, folder)
    if fits:
        cramfast.load(folder)
    else:
        message = refusal(folder)
        assert str(folder) in message and f"{entries} entries" in message and f"vocab_size of {VOCAB}" in message


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    _, folder = stored(tmp_path)
    assert "tokenizer.json or vocab.txt" in refusal(folder, call=load_tokenizer)


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
    _, folder = stored(tmp_path)
    (folder / "vocab.txt").write_text("\n".join(map(str, range(VOCAB))))
    assert str(folder / "vocab.txt") in refusal(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model, `somebody/model`; the patterns of files that were asked for."""
    _, source = stored(tmp_path / "source")
    asked = []

    def download(name, allow_patterns):
        if name != "somebody/model":
            raise ConnectionError("there is no net")
        asked.extend(allow_patterns)
        target = tmp_path / "cache"
        target.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in source.glob(pattern):
                shutil.copyfile(file, target / file.name)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return source, asked


def test_a_model_of_the_hub(hub):
    source, asked = hub
    ours, theirs = (cramfast.load(place).state_dict() for place in ("somebody/model", source))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(pattern.endswith(".bin") for pattern in asked)


def test_pickled_weights_of_the_hub_where_there_are_no_others(hub):
    source, asked = hub
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert cramfast.load("somebody/model").config.hidden_size == 40
    assert "pytorch_model.bin" in asked


def test_weights_of_another_architecture_are_not_fetched(hub):
    source, asked = hub
    configure(source, model_type="roberta", architectures=["RobertaForMaskedLM"])
    assert "roberta" in refusal("somebody/model")
    assert not any(pattern.endswith((".safetensors", ".bin")) for pattern in asked)


def test_a_hub_out_of_reach_says_why(hub, monkeypatch):
    message = refusal("nobody/model")
    assert "nobody/model: no such folder" in message and "there is no net" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal("nobody/model")


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere", "~/model", "a b"])
def test_what_can_be_no_hub_id_is_a_missing_folder(hub, name):
    assert refusal(name) == f"{name}: no such folder"
