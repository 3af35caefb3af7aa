"""Finetuning of `cramfast-base` by this project and by Hugging Face's Trainer's loop: the same weights, the same
sequences, batches of 16, dropout 0.1. Sequences are as long as those of MNLI and of SST-2."""

import pytest

from cramfast.config import PRESETS

from . import lengths
from .finetuning import OURS, TRAINER, FinetuneWork

MNLI = FinetuneWork("cramfast-base-mnli", PRESETS["cramfast-base"], lengths.MNLI_PAIRS)
SST2 = FinetuneWork("cramfast-base-sst2", PRESETS["cramfast-base"], lengths.SST2_SENTENCES)

_ROWS = [(work, peer) for work in (MNLI, SST2) for peer in (OURS, TRAINER)]


@pytest.mark.parametrize("work, peer", _ROWS, ids=[f"{work.name}-{peer.who}" for work, peer in _ROWS])
def test_finetune(finetune_measured, work, peer):
    finetune_measured(work, peer)
