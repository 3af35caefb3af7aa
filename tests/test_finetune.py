"""Finetuning an encoder: batches and their fillers, the classifier, the step, and what only a GPU shows of them."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from finetuning import tiny_config

from cramfast.config import PRESETS
from cramfast.downstream.classifier import Classifier
from cramfast.downstream.examples import BatchMaker, Examples, encode, evaluation_batches, ladder
from cramfast.downstream.settings import Protocol
from cramfast.downstream.step import FinetuneStep
from cramfast.downstream.tasks import Rows
from cramfast.downstream.training import Training, train
from cramfast.model import Bert
from cramfast.train.schedule import warm_cosine

NATIVE = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
DEVICE = torch.device("cuda" if NATIVE else "cpu")
PAD, CLS, SEP = 0, 2, 3
LENGTH = 16


def make_examples(count: int, seed: int = 0, outputs: int = 2, pair: bool = False, vocabulary: int = 64) -> Examples:
    """Random words; the class is that of the first one, the score tells how many have large ids."""
    chance, ids, types, lengths, labels = np.random.default_rng(seed), [], [], [], []
    for _ in range(count):
        words = chance.integers(5, vocabulary, chance.integers(1, LENGTH - 2))
        second = len(words) // 2 if pair else len(words)
        ids += [CLS, *words, SEP]
        types += [0] * (second + 1) + [1] * (len(words) + 1 - second)
        lengths.append(len(words) + 2)
        labels.append(2 * (words > vocabulary / 2).mean() - 1 if outputs == 1 else words[0] % outputs)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    dtype = np.float32 if outputs == 1 else np.int64
    return Examples(np.array(ids, np.int32), np.array(types, np.int32), ends, np.array(labels, dtype))


def make_classifier(outputs: int = 2, pooling="mean", dropout: float = 0.0, seed: int = 0, **changes) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Bert(tiny_config(64, **changes)), outputs, pooling, dropout)


# On a GPU with heads of 64, for which there are kernels.
SIZES = {"hidden_size": 128, "intermediate_size": 128} if NATIVE else {}


def make_step(outputs: int = 2, graphs: bool = True, dtype=torch.float32, seed: int = 0, **settings) -> FinetuneStep:
    """A step of a tiny classifier."""
    protocol = Protocol(**{"lr": 1e-3, "dropout": 0.0, "max_length": LENGTH} | settings)
    classifier = make_classifier(outputs, protocol.pooling, protocol.dropout, seed, **SIZES)
    return FinetuneStep(classifier.to(DEVICE).train(), protocol, dtype, graphs)


def batches(examples: Examples, size: int = 16, filled: bool = True) -> BatchMaker:
    return BatchMaker(examples, size, LENGTH, PAD, filled)


def arguments(batch) -> tuple:
    inputs = (batch.part("input_ids").long(), batch.part("token_types"), batch.part("cu_seqlens"))
    return (*inputs, batch.shape.max_length, batch.part("labels"), batch.part("weights"))


# Batches


class Letters:
    """A tokenizer with a token for each letter."""

    def encode_batch_fast(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [type("Encoding", (), {"ids": [ord(letter) for letter in text]}) for text in texts]


class Special:
    cls, sep = CLS, SEP


def encoded(first: str, second: str | None, length: int) -> tuple[str, list[int]]:
    rows = Rows([first], None if second is None else [second], [0])
    examples = encode(rows, Letters(), Special(), length, lambda done: None)
    assert len(examples.ids) == len(examples.types) == examples.ends[-1] <= length
    named = {CLS: "<", SEP: "|"}
    return "".join(named.get(token) or chr(token) for token in examples.ids), examples.types.tolist()


@pytest.mark.parametrize(
    "first, second, length, said",
    [
        ("abc", None, 9, "<abc|"),
        ("abcdefgh", None, 6, "<abcd|"),
        ("", None, 6, "<|"),
        ("abc", "xyz", 9, "<abc|xyz|"),
        ("abcdefgh", "xy", 9, "<abcd|xy|"),
        ("ab", "uvwxyz", 9, "<ab|uvwx|"),
        ("abcdef", "uvwxyz", 10, "<abcd|uvw|"),
        ("abc", "", 5, "<ab||"),
    ],
)
def test_inputs_are_cut_at_the_longer_sentence(first, second, length, said):
    text, types = encoded(first, second, length)
    assert text == said
    before = text.index("|") + 1
    assert types == [0] * before + [1] * (len(text) - before)


@pytest.mark.parametrize("batch_size, length", [(16, 128), (16, 16), (1, 5), (3, 7), (32, 512), (128, 64)])
def test_a_ladder_is_short_and_holds_the_longest_batch(batch_size, length):
    sizes = ladder(batch_size, length)
    assert sizes == sorted(set(sizes)) and 1 <= len(sizes) <= 14
    assert batch_size * length <= sizes[-1] < batch_size * length + 16
    assert all(size % 16 == 0 for size in sizes)
    assert all(large <= max(1.3 * small, small + 32) for small, large in pairwise(sizes))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("filled", [True, False])
def test_an_epoch_has_every_example_once_and_fillers_weigh_nothing(outputs, filled):
    examples, seen = make_examples(37, outputs=outputs), []
    maker = batches(examples, 8, filled)
    assert len(maker) == 5
    for batch in maker.epoch(0, 0):
        ids, ends = batch.part("input_ids"), batch.part("cu_seqlens").tolist()
        labels, weights = batch.part("labels"), batch.part("weights")
        assert len(ids) == ends[-1] and (len(ids) in maker.sizes if filled else len(ids) == batch.tokens)
        assert max(np.diff(ends)) <= batch.shape.max_length
        assert min(np.diff(ends)[: batch.shape.rows]) >= 1  # a first token for every row
        assert weights.sum() == pytest.approx(1)
        assert (ids[batch.tokens :] == PAD).all()
        real = ends[: batch.sequences + 1]
        assert real[-1] == batch.tokens and (weights > 0).sum() == batch.sequences
        seen += [
            (*ids[begin:end].tolist(), label)
            for begin, end, label in zip(real, real[1:], labels.tolist(), strict=False)
        ]
    wanted = [
        (*examples.ids[begin:end].tolist(), label)
        for begin, end, label in zip(examples.ends, examples.ends[1:], examples.labels.tolist(), strict=False)
    ]
    assert sorted(seen) == sorted(wanted)


def test_the_order_follows_seed_and_epoch():
    maker = batches(make_examples(40), 40)
    orders = [next(maker.epoch(*key)).buffer.tolist() for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]


def test_evaluation_has_every_example_once_by_length():
    examples = make_examples(50)
    found = list(evaluation_batches(examples, 64))
    rows = np.concatenate([rows for rows, *_ in found])
    assert sorted(rows) == list(range(50))
    assert (np.diff(examples.lengths[rows]) <= 0).all()
    assert all(len(ids) <= 64 and ends[-1] == len(ids) for _, (ids, _, ends), _ in found)


# The classifier


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("preset", ["cramfast-tiny", "crammed-bert", "bert-mini"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_batch_with_fillers_is_its_sequences_one_by_one(reference, outputs, preset, pooling):
    examples = make_examples(13, outputs=outputs, pair=True)
    model = make_classifier(outputs, pooling, preset=preset)
    rows = np.arange(5, 12)  # short of one sequence
    batch = batches(examples, 8).make(rows)
    logits = model.logits(*arguments(batch)[:4], rows=8)[:7]
    loss = model(*arguments(batch))
    found = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    alone = [batches(examples, 1, filled=False).make(rows[i : i + 1]) for i in range(7)]
    expected = torch.cat([model.logits(*arguments(one)[:4], rows=1) for one in alone])
    mean_loss = sum(model(*arguments(one)) for one in alone) / 7
    wanted = torch.autograd.grad(mean_loss, model.parameters(), allow_unused=True)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert loss.item() == pytest.approx(mean_loss.item(), rel=1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-5 * max(1.0, other.norm())


@pytest.mark.parametrize("preset, told", [("bert-mini", True), ("cramfast-tiny", False)])
def test_second_sentences_have_a_type_where_the_encoder_has_types(reference, preset, told):
    model, batch = make_classifier(preset=preset).eval(), batches(make_examples(4, pair=True), 4).make(np.arange(4))
    before = model(*arguments(batch))
    batch.part("token_types").zero_()
    assert (model(*arguments(batch)) != before) == told


def test_losses_are_squared_errors_and_cross_entropies(reference):
    for outputs in (1, 3):
        model, batch = make_classifier(outputs), batches(make_examples(4, outputs=outputs), 4).make(np.arange(4))
        logits = model.logits(*arguments(batch)[:4], rows=4).tolist()
        labels = batch.part("labels").tolist()
        if outputs == 1:
            losses = [(row[0] - label) ** 2 for row, label in zip(logits, labels, strict=True)]
        else:
            losses = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(logits, labels, strict=True)]
        assert model(*arguments(batch)).item() == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_dropout_is_of_training_alone(reference):
    model, batch = make_classifier(dropout=0.5), batches(make_examples(8), 8).make(np.arange(8))
    assert model.encoder.dropout == 0.5
    losses = {model.train()(*arguments(batch)).item() for _ in range(3)}
    assert len(losses) == 3
    assert len({model.eval()(*arguments(batch)).item() for _ in range(3)}) == 1


# Training


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [warm_cosine(update, 100, 0.1) for update in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 1 and 0 < rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5) and all(a >= b for a, b in pairwise(rates[10:]))
    assert warm_cosine(0, 1, 0.0) == warm_cosine(0, 1, 1.0) == 1


def run(step: FinetuneStep, outputs: int = 2, seed: int = 0, rows: int = 250):
    metrics = ("pearson",) if outputs == 1 else ("accuracy",)
    dev = {"dev": make_examples(100, seed=1, outputs=outputs)}
    return train(step, Training("test", make_examples(rows, outputs=outputs), dev, metrics, PAD, seed), lambda *_: None)


@pytest.mark.parametrize("outputs, pooling", [(2, "mean"), (2, "cls"), (1, "mean")])
def test_a_task_that_can_be_learned_is(reference, outputs, pooling):
    result = run(make_step(outputs, lr=2e-3, epochs=10, pooling=pooling), outputs, rows=600)
    (score,) = result.scores["dev"].values()
    assert score > 0.8, result.epochs
    assert result.epochs[-1].loss < 0.6 * result.epochs[0].loss
    assert len(result.epochs) == 10 and result.steps == 10 * 38


def test_a_seed_decides_everything(reference):
    def weights(seed):
        step = make_step(epochs=1, dropout=0.1, seed=seed)
        run(step, seed=seed, rows=60)
        return step.weights.master.clone()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_step_that_starts_again_is_a_new_one(reference):
    step = make_step(epochs=1)
    run(step, rows=60)
    step.restart(make_classifier(**SIZES))
    fresh = make_step(epochs=1)
    assert run(step, rows=60).epochs == run(fresh, rows=60).epochs
    assert torch.equal(step.weights.master, fresh.weights.master)


def test_the_update_is_adamw_without_decay_and_clipping(reference):
    step, batch = make_step(), batches(make_examples(16)).make(np.arange(16))
    peer = make_classifier(**SIZES).to(DEVICE)
    used = [p for name, p in peer.named_parameters() if not name.startswith("encoder.head.")]
    optimizer = torch.optim.AdamW(used, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for _ in range(3):
        step(batch, 1e-3)
        optimizer.zero_grad()
        peer(*arguments(batch.to(DEVICE))).backward()
        optimizer.step()
    for (name, one), other in zip(step.model.named_parameters(), peer.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), name


def test_predictions_are_in_the_order_of_the_examples(reference):
    step, examples = make_step(3), make_examples(70, outputs=3)
    found = step.predict(examples)
    assert step.model.training
    step.model.eval()
    for row in (0, 33, 69):
        one = batches(examples, 1, filled=False).make(np.array([row]))
        logits = step.model.logits(*arguments(one.to(DEVICE))[:4], rows=1)
        assert np.allclose(found[row], logits.detach().cpu().numpy()[0], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("preset", ["cramfast-tiny", "bert-mini"])
def test_the_kernels_take_filled_batches(triton_kernels, bf16_as_on_gpus, monkeypatch, preset, pooling):
    examples, results = make_examples(7, outputs=3, pair=True), []
    for kernels, dtype in (("reference", torch.float32), ("triton", torch.bfloat16)):
        monkeypatch.setenv("CRAMFAST_KERNELS", kernels)
        model = make_classifier(3, pooling, preset=preset, hidden_size=64, num_layers=1).to(DEVICE).train()
        step = FinetuneStep(model, Protocol(max_length=LENGTH, pooling=pooling), dtype, graphs=False)
        results.append(step(batches(examples, 8).make(np.arange(7)), 1e-3))
    (exact, rounded) = results
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=1e-3)
    assert rounded.gradient_norm.item() == pytest.approx(exact.gradient_norm.item(), rel=2e-2)


# On a GPU


def gpu_step(graphs: bool, **settings) -> FinetuneStep:
    protocol = Protocol(**{"lr": 1e-4, "dropout": 0.0} | settings)
    torch.manual_seed(0)
    config = replace(PRESETS["cramfast-tiny"], vocab_size=512)
    model = Classifier(Bert(config), 2, protocol.pooling, protocol.dropout).to(DEVICE).train()
    return FinetuneStep(model, protocol, torch.bfloat16, graphs)


def losses_of(step: FinetuneStep, examples: Examples, epochs: int = 2) -> list[float]:
    maker, found = BatchMaker(examples, 16, 128, PAD, filled=True), []
    for epoch in range(epochs):
        found += [step(batch.pin(), 1e-4).loss for batch in maker.epoch(0, epoch)]
    return torch.stack(found).tolist()


@needs_gpu
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_steps_in_graphs_are_steps_without(pooling):
    examples = make_examples(330, vocabulary=512)
    graphed, eager = (gpu_step(graphs, pooling=pooling) for graphs in (True, False))
    assert losses_of(graphed, examples) == losses_of(eager, examples)
    assert graphed.graphs.obstacle is None and len(graphed.graphs._graphs) == len(graphed._batches) + 1 >= 3
    assert eager.graphs.obstacle == "not asked for"
    assert torch.equal(graphed.weights.master, eager.weights.master)


@needs_gpu
def test_every_replay_drops_anew():
    step, batch = gpu_step(True, dropout=0.5), BatchMaker(make_examples(16), 16, 128, PAD, filled=True).make(range(16))
    losses = [step(batch.pin(), 0.0).loss.item() for _ in range(20)]
    assert len(step.graphs._graphs) == 2
    assert len(set(losses[2:])) > 9


@needs_gpu
def test_attention_weights_are_dropped_anew_in_every_replay():
    step, batch = gpu_step(True, dropout=0.0), BatchMaker(make_examples(16), 16, 128, PAD, filled=True).make(range(16))
    for layer in step.model.encoder.layers:
        layer.attention.dropout = 0.5
    losses = [step(batch.pin(), 0.0).loss.item() for _ in range(20)]
    assert len(step.graphs._graphs) == 2
    assert len(set(losses[2:])) > 9  # in bf16 some may come out alike


@needs_gpu
def test_a_seed_gives_the_same_numbers_again_in_graphs():
    step, examples, found = gpu_step(True, dropout=0.1), make_examples(330, vocabulary=512), []
    for _ in range(3):
        torch.manual_seed(0)
        config = step.model.encoder.config
        step.restart(Classifier(Bert(config), 2, "mean", 0.1))
        found.append(losses_of(step, examples))
    assert found[1] == found[2]


@needs_gpu
def test_a_step_of_finetuning_never_waits_for_the_device():
    step, maker = gpu_step(True, dropout=0.1), BatchMaker(make_examples(64), 16, 128, PAD, filled=True)
    prepared = [batch.pin() for batch in maker.epoch(0, 0)]
    for batch in prepared:
        step(batch, 1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in prepared:
            result = step(batch, 1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.loss)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_task_is_learned_on_a_gpu(dtype):
    result = run(make_step(lr=2e-3, epochs=12, dtype=dtype, dropout=0.1), rows=600)
    assert result.scores["dev"]["accuracy"] > 0.8, result.epochs
