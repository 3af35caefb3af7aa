"""`cramfast.accelerate` beside the untouched models of transformers, tiny and with random weights.

B sequences of S places; "real" marks those that are not padding.
"""

import copy
import inspect
import warnings

import pytest
import torch
from conftest import NATIVE
from torch import nn

import cramfast
from cramfast.accelerated import VERSIONS
from cramfast.accelerated.batch import count, predictions, unpadded

transformers = pytest.importorskip("transformers")

BATCH, PLACES, VOCABULARY = 4, 20, 99
LENGTHS = (20, 3, 11, 7)
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = _SIZES | {"intermediate_size": 80, "max_position_embeddings": 32, "pad_token_id": 0}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
# Of ModernBERT's four layers the second and third see 4 tokens on either side.
_MODERN = _SIZES | {"intermediate_size": 80, "num_hidden_layers": 4, "local_attention": 8} | _SPECIAL
_DISTIL = {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 80}
SETTINGS = {
    "Bert": _BERT,
    "Roberta": _BERT | {"pad_token_id": 1, "type_vocab_size": 2},
    "DistilBert": _DISTIL | {"max_position_embeddings": 32},
    "Electra": _BERT | {"embedding_size": 48, "summary_last_dropout": 0.0},
    "ModernBert": _MODERN,
}
_DROPOUTS = {
    "DistilBert": ("dropout", "attention_dropout", "seq_classif_dropout"),
    "ModernBert": ("embedding_dropout", "attention_dropout", "mlp_dropout"),
}
_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
TYPED = ("Bert", "Roberta", "Electra")
# fp64 in another order of sums; ModernBERT's tables of rotary embedding are fp32 there.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
ROTARY_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def tolerance(name):
    return ROTARY_TOLERANCE if name == "ModernBert" else TOLERANCE


def made(name, head="ForMaskedLM", dropout=0.0, dtype=torch.float64, **options):
    """A model in training mode whose weights are large enough for every part of it to count."""
    torch.manual_seed(0)
    dropouts = dict.fromkeys(_DROPOUTS.get(name, _BERT_DROPOUTS), dropout)
    config = getattr(transformers, f"{name}Config")(**SETTINGS[name] | dropouts | options)
    model = getattr(transformers, name + head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).train()


def mask_of(kind):
    """int64 (B, S)."""
    right = torch.arange(PLACES) < torch.tensor(LENGTHS)[:, None]
    masks = {"right": right, "left": right.flip(1), "full": torch.ones_like(right)}
    masks["both"] = torch.stack([row if number % 2 else row.flip(0) for number, row in enumerate(right)])
    masks["between"] = right & (torch.arange(PLACES) % 5 != 2)
    return masks[kind].long()


def batch_of(name, kind="right", labels=True):
    """Arguments of a masked-language-modelling model, padding included: its ids are ordinary ones."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, VOCABULARY, (BATCH, PLACES), generator=generator), mask_of(kind)
    # Padding tokens among the real ones, whose embeddings' gradients transformers leaves out.
    ids[:, 0] = SETTINGS[name].get("pad_token_id", 0)
    given = {"input_ids": ids, "attention_mask": mask}
    if name in TYPED:
        given["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    if labels:
        chosen = (torch.rand(ids.shape, generator=generator) < 0.4) & mask.bool()
        given["labels"] = torch.where(chosen, ids.flip(1), -100)
    return given


def both(model, logits=None):
    """The model accelerated, and an untouched copy."""
    untouched = copy.deepcopy(model)
    cramfast.accelerate(model, logits)
    return model, untouched


def assert_same_loss(output, expected, name):
    # That of ModernBERT is fp32.
    torch.testing.assert_close(output.loss.double(), expected.loss.double(), **tolerance(name))


def assert_same_gradients(model, untouched, **tolerances):
    for (name, mine), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(
                mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerances
            )


@pytest.mark.parametrize("kind", ["right", "left", "both", "full", "between"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_of_masked_language_modelling(name, kind):
    model, untouched = both(made(name))
    given = batch_of(name, kind)
    if (name, kind) == ("ModernBert", "between"):
        with pytest.warns(UserWarning, match="padding between its tokens"):
            output = model(**given)
    else:
        output = model(**given)
        assert output.logits is None
    expected = untouched(**given)
    assert_same_loss(output, expected, name)
    output.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, untouched, **tolerance(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_without_a_mask_all_is_real(name):
    model, untouched = both(made(name))
    given = batch_of(name, "full")
    del given["attention_mask"]
    assert_same_loss(model(**given), untouched(**given), name)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_evaluation_there_are_logits(name):
    model, untouched = both(made(name).eval())
    given, real = batch_of(name), mask_of("right").bool()
    output, expected = model(**given), untouched(**given)
    torch.testing.assert_close(output.logits[real], expected.logits[real], **tolerance(name))
    torch.testing.assert_close(output.loss, expected.loss, **tolerance(name))
    without = {key: value for key, value in given.items() if key != "labels"}
    torch.testing.assert_close(model(**without).logits, output.logits, rtol=0, atol=0)
    assert isinstance(model(**given, return_dict=False), tuple)


def test_logits_as_asked():
    given = batch_of("Bert")
    always, never = made("Bert"), made("Bert").eval()
    cramfast.accelerate(always, logits=True)
    cramfast.accelerate(never, logits=False)
    assert always(**given).logits.shape == (BATCH, PLACES, VOCABULARY)
    assert never(**given).logits is None
    (loss,) = never(**given, return_dict=False)
    torch.testing.assert_close(loss, always(**given).loss, **TOLERANCE)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("head", ["Model", "ForTokenClassification", "ForSequenceClassification", "ForMultipleChoice"])
def test_other_heads(name, head):
    model, untouched = both(made(name, head))
    real = mask_of("right").bool()
    given = batch_of(name, labels=False)
    if head == "ForTokenClassification":
        given["labels"] = torch.where(real, torch.arange(PLACES) % 2, -100)
    elif head == "ForSequenceClassification":
        given["labels"] = torch.arange(BATCH) % 2
    elif head == "ForMultipleChoice":
        given = {key: value.unflatten(0, (2, 2)) for key, value in given.items()}
        given["labels"] = torch.tensor([0, 1])
    output, expected = model(**given), untouched(**given)
    if head == "Model":
        mine, theirs = output.last_hidden_state, expected.last_hidden_state
        assert not mine[~real].any()
        pairs = [(mine[real], theirs[real])]
        if "pooler_output" in expected:
            pairs.append((output.pooler_output, expected.pooler_output))
    else:
        padded = head == "ForTokenClassification"
        pairs = [(output.loss, expected.loss)]
        pairs.append((output.logits[real], expected.logits[real]) if padded else (output.logits, expected.logits))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **tolerance(name))
    weight = torch.randn(pairs[0][0].shape, dtype=torch.float64)
    sum((mine * weight).sum() for mine, _ in pairs[:1]).backward()
    sum((theirs * weight).sum() for _, theirs in pairs[:1]).backward()
    assert_same_gradients(model, untouched, **tolerance(name))


def test_pretraining_heads():
    model, untouched = both(made("Bert", "ForPreTraining"))
    given = batch_of("Bert") | {"next_sentence_label": torch.arange(BATCH) % 2}
    torch.testing.assert_close(model(**given).loss, untouched(**given).loss, **TOLERANCE)
    model, untouched = both(made("Electra", "ForPreTraining"))
    given = batch_of("Electra") | {"labels": torch.arange(PLACES).repeat(BATCH, 1) % 2}
    torch.testing.assert_close(model(**given).loss, untouched(**given).loss, **TOLERANCE)


def assert_errs_at_most_twice_as_much(model, untouched, exact):
    """In all gradients together, against those of `exact`."""
    errors = []
    for each in (model, untouched):
        pairs = zip(each.parameters(), exact.parameters(), strict=True)
        errors.append(torch.cat([(p.grad.cpu().double() - e.grad).flatten() for p, e in pairs]).norm())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_kernels_err_at_most_twice_as_much(name, triton_kernels):
    """On a GPU in bf16, else interpreted in fp16."""
    device, dtype = ("cuda", torch.bfloat16) if NATIVE else ("cpu", torch.float16)
    exact, given = made(name), batch_of(name)
    model, untouched = both(copy.deepcopy(exact).to(device, dtype))
    exact(**given).loss.backward()
    for each in (model, untouched):
        each(**{key: value.to(device) for key, value in given.items()}).loss.backward()
    assert_errs_at_most_twice_as_much(model, untouched, exact)


@pytest.mark.parametrize("name", SETTINGS)
def test_dropout_is_the_models_own(name):
    model = made(name, "ForSequenceClassification", dropout=0.3)
    cramfast.accelerate(model)
    given = batch_of(name, labels=False)
    first, second = (model(**given).logits for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = model(**given).logits
    torch.manual_seed(3)
    assert torch.equal(model(**given).logits, first)
    model.eval()
    assert torch.equal(model(**given).logits, model(**given).logits)


@pytest.mark.parametrize("only", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_drops(only):
    model = made("Bert", "Model", **{only: 0.3})
    cramfast.accelerate(model)
    given = batch_of("Bert", labels=False)
    assert not torch.equal(*(model(**given).last_hidden_state for _ in range(2)))


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_and_what_is_saved_stay(name, tmp_path):
    model = made(name, dtype=torch.float32)
    before = {key: (tensor, tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    parameters = [*model.parameters()]
    cramfast.accelerate(model)
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after)
    for key, (same, copied) in before.items():
        assert after[key] is same and torch.equal(same, copied)
    assert all(x is y for x, y in zip(parameters, model.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    given = batch_of(name)
    assert "forward" not in again.__dict__ and again.config.architectures == [type(model).__name__]
    torch.testing.assert_close(again.train()(**given).loss, model(**given).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_undo_restores_bitwise(name):
    model, given = made(name), batch_of(name)
    expected = model(**given)
    accelerated = cramfast.accelerate(model)
    assert model(**given).logits is None
    assert accelerated.undo() is model and "forward" not in model.__dict__
    output = model(**given)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    cramfast.accelerate(model)
    assert model(**given).logits is None


def test_a_deep_copy_runs_on_its_own_weights():
    model, given = made("Bert"), batch_of("Bert")
    cramfast.accelerate(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.cls.predictions.bias.fill_(9.0).zero_()
        copied.bert.embeddings.word_embeddings.weight.mul_(2)
    assert not torch.equal(copied(**given).loss, model(**given).loss)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(**given).loss, model(**given).loss)


def test_the_signature_stays():
    model = made("Bert")
    before = inspect.signature(model.forward)
    cramfast.accelerate(model)
    assert inspect.signature(model.forward) == before
    given = batch_of("Bert")
    assert (
        torch.equal(model(given["input_ids"], given["attention_mask"]).logits, model(**given, return_dict=True).loss)
        is False
    )


def test_it_says_what_it_did():
    accelerated = cramfast.accelerate(made("Bert", hidden_act="relu"))
    assert accelerated.swapped == (
        "embeddings of BertModel",
        "2 × attention of BertLayer",
        "5 × LayerNorm",
        "prediction head and loss, when given labels",
    )
    assert accelerated.left[0] == "2 × ReLU"
    assert str(accelerated).splitlines()[1] == "  fused: embeddings of BertModel"
    left = cramfast.accelerate(made("ModernBert", "ForTokenClassification")).left
    assert left[0] == "head of ModernBertForTokenClassification, on padded hidden states"


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert"])
def test_other_activations_run_as_they_are(name):
    option = {"DistilBert": "activation", "ModernBert": "hidden_activation"}.get(name, "hidden_act")
    for activation in ("relu", "gelu_new"):
        model, untouched = both(made(name, **{option: activation}))
        given = batch_of(name)
        assert_same_loss(model(**given), untouched(**given), name)


def test_what_needs_the_models_own_forward_gets_it():
    model, untouched = both(made("Bert", "Model"))
    given = batch_of("Bert", labels=False)
    ids, mask = given["input_ids"], given["attention_mask"]
    embedded = model.embeddings.word_embeddings(ids).detach()
    cases = [
        ({"input_ids": ids, "output_hidden_states": True}, "output_hidden_states is given"),
        ({"inputs_embeds": embedded, "attention_mask": mask}, "inputs_embeds is given"),
        ({"input_ids": ids, "position_ids": torch.arange(PLACES).flip(0)[None]}, "position_ids is given"),
        ({"input_ids": ids, "attention_mask": mask.flip(1)}, "a sequence begins with padding"),
        ({"input_ids": ids, "attention_mask": mask * torch.tensor([[1], [1], [0], [1]])}, "a sequence has no token"),
    ]
    if not transformers.__version__.startswith("4."):  # which takes others
        cases.append(({"input_ids": ids, "attention_mask": mask[:, None, None].bool()}, "attention_mask has shape"))
    for arguments, reason in cases:
        with pytest.warns(UserWarning, match=f"^cramfast.accelerate: BertModel runs as before: {reason}"):
            output = model(**arguments)
        expected = untouched(**arguments)
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    with (
        pytest.warns(UserWarning, match="input_ids have 33 places, the model 32"),
        pytest.raises((IndexError, RuntimeError)),
    ):
        model(torch.ones(1, 33, dtype=torch.long))


def test_labels_on_padding_are_an_error():
    model, given = made("Bert"), batch_of("Bert")
    cramfast.accelerate(model)
    given["labels"][1, 5:8] = 3
    for training in (True, False):
        with pytest.raises(ValueError, match="labels count 3 places of padding, expected -100"):
            model.train(training)(**given)


def test_nothing_predicted_is_a_loss_of_zero():
    model, given = made("Bert"), batch_of("Bert")
    cramfast.accelerate(model)
    given["labels"].fill_(-100)
    loss = model(**given).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters())


def test_modernberts_loss_over_the_items_of_several_batches():
    model, untouched = both(made("ModernBert"))
    given = batch_of("ModernBert") | {"num_items_in_batch": torch.tensor(57)}
    assert_same_loss(model(**given), untouched(**given), "ModernBert")


class _Adapter(nn.Linear):
    pass


def test_what_is_not_supported_is_named():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    decoder = made("Bert", "Model", is_decoder=True)
    adapted, twice = made("Bert"), made("Bert")
    adapted.bert.encoder.layer[1].attention.self.query = _Adapter(64, 64)
    cramfast.accelerate(twice)
    for model, message in (
        (gpt2, "GPT2LMHeadModel is not supported; expected a model around one of BertModel, RobertaModel"),
        (nn.Linear(2, 2), "Linear is not supported"),
        (torch.compile(made("Bert"), backend="eager"), "OptimizedModule is not supported"),
        (made("Bert", "ForQuestionAnswering"), "BertForQuestionAnswering is not supported"),
        (decoder, "is_decoder is set"),
        (adapted, "a _Adapter in place of a torch.nn.Linear"),
        (twice, "forward of this BertModel is replaced already"),
    ):
        with pytest.raises(ValueError, match=message):
            cramfast.accelerate(model)
    assert "forward" not in adapted.__dict__ and "forward" not in adapted.bert.__dict__
    relative = made("Bert")
    relative.config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="position_embedding_type is relative_key"):
        cramfast.accelerate(relative)


def test_adapters_that_come_later_are_an_error():
    model = made("Bert")
    cramfast.accelerate(model)
    model.bert.encoder.layer[1].attention.self.query = _Adapter(64, 64)
    with pytest.raises(ValueError, match="a _Adapter in place of"):
        model(**batch_of("Bert"))


def test_other_versions_are_an_error(monkeypatch):
    model = made("Bert")
    for version in ("4.56.2", "6.0.0"):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.raises(ValueError, match=f"transformers is {version}, expected 4.57 or later, below 6.0"):
            cramfast.accelerate(model)
    assert VERSIONS == ((4, 57), (6, 0))


def test_scaled_rotary_embedding_is_an_error():
    model = made("ModernBert")
    if not getattr(model.config, "rope_parameters", None):
        pytest.skip("transformers 4 has none")
    model.config.rope_parameters["full_attention"]["rope_type"] = "linear"
    with pytest.raises(ValueError, match="rotary embedding of type linear, expected default"):
        cramfast.accelerate(model)


def test_counts_and_predictions_of_a_batch():
    real = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()
    labels = torch.tensor([[7, -100, 5, -100, 4], [-100, 3, -100, -100, -100]])
    counts = count(real, labels)
    assert (counts.tokens, counts.longest, counts.shortest) == (5, 3, 2)
    assert (counts.late, counts.pieces, counts.predicted, counts.stray) == (1, 2, 4, 1)
    ids = torch.arange(10).view(2, 5)
    batch = unpadded(ids, real, counts, torch.arange(5), ids + 10)
    assert batch.input_ids.tolist() == [1, 2, 4, 5, 6] and batch.positions.tolist() == [1, 2, 4, 0, 1]
    assert batch.token_types.tolist() == [11, 12, 14, 15, 16]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.max_seqlen == 3
    rows, found = predictions(batch, labels.where(real, -100), count(real, labels.where(real, -100)))
    assert rows.tolist() == [1, 2, 4] and found.tolist() == [5, 4, 3]
    assert torch.equal(batch.padded(batch.input_ids[:, None])[..., 0], ids * real)


def test_calls_that_fit_warn_of_nothing():
    model = made("Bert")
    cramfast.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch_of("Bert"))


def test_a_class_of_ones_own_keeps_its_forward():
    class OwnForMaskedLM(transformers.BertForMaskedLM):
        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]

    torch.manual_seed(0)
    model, untouched = both(OwnForMaskedLM(transformers.BertConfig(**SETTINGS["Bert"])).eval())
    ids, mask = batch_of("Bert")["input_ids"], mask_of("right")
    torch.testing.assert_close(model(ids, mask), untouched(ids, mask))
    with pytest.warns(UserWarning, match="begins with padding"):
        assert torch.equal(model(ids, mask.flip(1)), untouched(ids, mask.flip(1)))
