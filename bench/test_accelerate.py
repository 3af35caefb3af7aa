"""Hugging Face's BERT-base untouched and after `cramfast.accelerate`, in eager PyTorch.

A step of pretraining on the batch of `test_step.py`, and finetuning in the loop of its Trainer: batches of 32, dropout
0.1, sequences as long as those of MNLI, padded to the longest of their batch.
"""

from dataclasses import replace

import pytest

from cramfast.config import PRESETS

from . import lengths
from .accelerated import FINETUNE_PEERS, OPERATOR, STEP_PEERS, bert_classifier
from .finetuning import FinetuneWork
from .test_step import BERT_RAGGED

PRETRAINING = replace(BERT_RAGGED, operator=OPERATOR)
# A fresh BERT has nearly the same first token in all sequences, so that what bf16 does to it does not average out: it
# moves the loss by 9e-4 and the norm by 3e-3. Without attention in one layer the norm is off by 7e-2, without the
# pooler's tanh by 3e-1.
FINETUNING = FinetuneWork(
    "glue-mnli",
    PRESETS["bert-base"],
    lengths.MNLI_PAIRS,
    sequences=32,
    operator=OPERATOR,
    build=bert_classifier,
    tolerances=(3e-3, 1e-2),
)


@pytest.mark.parametrize("peer", STEP_PEERS, ids=lambda peer: peer.who)
def test_pretraining(step_measured, peer):
    step_measured(PRETRAINING, peer)


@pytest.mark.parametrize("peer", FINETUNE_PEERS, ids=lambda peer: peer.who)
def test_finetuning(finetune_measured, peer):
    finetune_measured(FINETUNING, peer)
