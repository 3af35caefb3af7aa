"""The held-out score is the cross-entropy and the accuracy of the model's predictions, whoever computes them."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cramfast.config import PRESETS
from cramfast.data.batches import DocumentPieces
from cramfast.data.shards import TokenStream
from cramfast.data.tokenizer import SpecialIds
from cramfast.evaluate import mlm
from cramfast.evaluate.mlm import HeldOut
from cramfast.model import Bert

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, LENGTH, TOKENS = 97, 24, 72
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, VOCAB))
FAMILIES = ("bert-mini", "crammed-bert", "cramfast-tiny")


@pytest.fixture
def heldout(monkeypatch) -> HeldOut:
    """Four batches of 72 tokens; the first document has special tokens alone."""
    monkeypatch.setattr(mlm, "BATCH_TOKENS", TOKENS)
    ids = np.random.default_rng(0).integers(*SPECIAL.ordinary, size=4 * TOKENS)
    ids[:20] = SPECIAL.sep
    stream = TokenStream([ids.astype(np.uint16)], np.array([20, 50, 57, 130, 200, len(ids)], dtype=np.uint64))
    return HeldOut.build(stream, DocumentPieces(stream, LENGTH, 0, SPECIAL.cls), LENGTH, SPECIAL, DEVICE)


def random_bert(name: str) -> Bert:
    """A tiny model of the preset's family, with no weight zero or one."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "max_positions": LENGTH}
    torch.manual_seed(0)
    model = Bert(replace(PRESETS[name], vocab_size=VOCAB, **sizes)).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def half_right(model: Bert, heldout: HeldOut) -> HeldOut:
    """The batches with the model's own guesses for labels, but for every second one."""
    batches = []
    for input_ids, cu_seqlens, max_seqlen, positions, labels in heldout.batches:
        guesses = model.predict(model.encode(input_ids, cu_seqlens, max_seqlen)[positions]).argmax(-1)
        guesses[::2] = labels[::2]
        labels = torch.where(labels == -100, labels, guesses)
        batches.append((input_ids, cu_seqlens, max_seqlen, positions, labels))
    return HeldOut(batches)


@torch.no_grad()
def dense_score(model: Bert, heldout: HeldOut) -> tuple[float, float]:
    """Loss and accuracy from the logits of all tokens of all batches."""
    losses, correct = [], []
    for input_ids, cu_seqlens, max_seqlen, positions, labels in heldout.batches:
        logits = model.predict(model.encode(input_ids, cu_seqlens, max_seqlen)).double()
        counts = labels != -100
        wanted, rows = labels[counts], logits[positions[counts]]
        losses.append(F.cross_entropy(rows, wanted, reduction="none"))
        correct.append(rows.argmax(-1) == wanted)
    return torch.cat(losses).mean().item(), torch.cat(correct).double().mean().item()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_give_the_score_of_all_logits(heldout, name, sparse, monkeypatch):
    model = random_bert(name)
    model.sparse_last_layer = sparse
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")
    heldout = half_right(model, heldout)
    loss, accuracy = dense_score(model, heldout)
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    score = heldout.score(model, nullcontext())
    # Logits carry up to 1e-5 of rounding in fp32.
    assert score.loss == pytest.approx(loss, abs=1e-4)
    assert score.accuracy == accuracy
    assert 0.3 < accuracy < 0.7


def test_every_prediction_of_every_batch_counts_once(heldout):
    class Counting:
        """Finds the n-th prediction that counts n times as hard as the first, and gets each third right."""

        seen = 0

        def score(self, input_ids, cu_seqlens, max_seqlen, positions, labels):
            counts = labels != -100
            number = self.seen + counts.cumsum(0)
            self.seen += int(counts.sum())
            return torch.where(counts, number.float(), 0.0), counts & (number % 3 == 0)

    predictions = sum(int((labels != -100).sum()) for *_, labels in heldout.batches)
    assert len(heldout.batches) == 4
    assert predictions < 4 * round(mlm.RATE * TOKENS)  # some could not be placed on ordinary tokens
    score = heldout.score(Counting(), nullcontext())
    assert score.loss == pytest.approx((predictions + 1) / 2)
    assert score.accuracy == pytest.approx(predictions // 3 / predictions)


@pytest.mark.usefixtures("reference")
def test_nothing_to_predict_is_no_error():
    model = random_bert("cramfast-tiny")
    ids, ends = torch.tensor([2, 3], device=DEVICE), torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    score = HeldOut([(ids, ends, 2, nothing, nothing)]).score(model, nullcontext())
    assert (score.loss, score.accuracy) == (0.0, 0.0)


@pytest.mark.usefixtures("reference")
def test_scores_leave_no_graph_behind(heldout):
    losses, correct = random_bert("bert-mini").score(*heldout.batches[0])
    assert not losses.requires_grad
    assert (losses.dtype, correct.dtype) == (torch.float32, torch.bool)
    assert losses.shape == correct.shape == heldout.batches[0][3].shape
