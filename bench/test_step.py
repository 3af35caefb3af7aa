"""A whole training step of this project and of what people use today: the same weights, the same masked batch.

A quarter of the tokens is predicted. In the memory of smaller cards, beyond which the allocator gives nothing, this
project's step runs alone, as pretraining plans it. Of ModernBERT, which this project trains in no form of its own, only
the peers are measured.
"""

import pytest

from cramfast.config import PRESETS

from .hugging_face import HF_BERT, HF_MODERNBERT, MODERNBERT_BASE
from .original import ORIGINAL
from .plain import PLAIN
from .steps import OURS, StepWork, on_a_card_of, ordinary_peers

_CRAMMED = {"config": PRESETS["crammed-bert"], "ordinary": PLAIN, "length": 128, "mib_per_place": 0.64}
CRAMMED_512 = StepWork("crammed-bert-512x128", sequences=512, **_CRAMMED)
CRAMMED_512_LEAN = StepWork("crammed-bert-512x128-lean", sequences=512, activations="lean", **_CRAMMED)
CRAMMED_128 = StepWork("crammed-bert-128x128", sequences=128, **_CRAMMED)
BERT_RAGGED = StepWork("bert-base-ragged-16-128", PRESETS["bert-base"], HF_BERT, 512, 128, 0.8, shortest=16)
MODERNBERT = StepWork("modernbert-base-256x128", MODERNBERT_BASE, HF_MODERNBERT, 256, 128, 1.1)

SMALL_CARDS = [on_a_card_of(memory, CRAMMED_512) for memory in ("8GB", "11GB", "12GB", "16GB", "24GB")]

_ROWS = [(work, OURS) for work in (CRAMMED_512, CRAMMED_512_LEAN, CRAMMED_128, BERT_RAGGED, *SMALL_CARDS)]
_ROWS += [(w, peer) for w in (CRAMMED_512, CRAMMED_128, BERT_RAGGED, MODERNBERT) for peer in ordinary_peers(w.ordinary)]
_ROWS += [(work, ORIGINAL) for work in (CRAMMED_512, CRAMMED_128)]


@pytest.mark.parametrize("work, peer", _ROWS, ids=[f"{work.name}-{peer.who}" for work, peer in _ROWS])
def test_step(step_measured, work, peer):
    step_measured(work, peer)
