"""The held-out masked-language-modelling loss and accuracy, and filled-in examples."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from ..data.batches import BatchBuilder, Cursor, PieceSource
from ..data.shards import TokenStream
from ..data.tokenizer import SpecialIds
from ..kernels import mask_tokens
from ..model import Bert

# Whatever the training rate, evaluation hides 15 % of the tokens, all behind the mask token, always the same ones.
RATE = 0.15
_SEED = 15
# The label where a sequence had no ordinary token left to hide.
_IGNORED = -100
BATCH_TOKENS = 16_384
"""Tokens that are scored at a time."""
# Enough for a standard error near 0.01 nats on a GPU; a CPU would spend its budget on them.
_MOST_TOKENS = {"cuda": 262_144, "cpu": 16_384}


@dataclass(frozen=True)
class Score:
    """loss: mean cross-entropy in nats; accuracy: share of the predictions whose likeliest token is the right one."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class HeldOut:
    """A fixed set of held-out batches, masked."""

    batches: list[tuple]
    """(input_ids, cu_seqlens, max_seqlen, positions, labels) as the model takes them."""

    @classmethod
    def build(
        cls, stream: TokenStream, pieces: PieceSource, max_length: int, special: SpecialIds, device: torch.device
    ) -> "HeldOut":
        """The first 262,144 tokens (16,384 on a CPU) of the held-out stream in the order of `pieces`."""
        tokens = max(max_length, min(BATCH_TOKENS, len(stream) // max_length * max_length))
        builder, cursor, batches = BatchBuilder(stream, pieces, tokens, max_length), Cursor(), []
        for number in range(max(1, min(_MOST_TOKENS[device.type], len(stream)) // tokens)):
            batch = builder.build(cursor).to(device)
            input_ids, positions, labels = mask_tokens(
                batch.input_ids,
                batch.cu_seqlens,
                round(RATE * tokens),
                mask_id=special.mask,
                ordinary=special.ordinary,
                seed=_SEED,
                step=number,
                replace=(1.0, 0.0),
            )
            batches.append((input_ids, batch.cu_seqlens, batch.max_seqlen, positions, labels))
            cursor = batch.next
        return cls(batches)

    def score(self, model: Bert, autocast: torch.autocast) -> Score:
        """Loss and accuracy over the hidden tokens of all batches."""
        with autocast:
            scores = [model.score(*batch) for batch in self.batches]
        losses, correct = (torch.cat(parts).double().sum() for parts in zip(*scores, strict=True))
        count = sum((labels != _IGNORED).sum() for *_, labels in self.batches)
        return Score(*(torch.stack((losses, correct)) / count.clamp(min=1)).tolist())


@dataclass(frozen=True)
class Example:
    """A held-out sentence with one word hidden: what stood there, and the model's first guesses with probabilities."""

    text: str
    answer: str
    guesses: list[tuple[str, float]]


@torch.no_grad()
def fill_examples(
    model: Bert, tokenizer: Tokenizer, special: SpecialIds, stream: TokenStream, count: int = 3, context: int = 12
) -> list[Example]:
    """`count` examples from different held-out documents, a whole word hidden amid `context` tokens on either side."""
    device = next(model.parameters()).device
    examples, starts = [], [0, *stream.document_ends[:-1].tolist()]
    # Documents are visited from far apart, so that the examples differ in kind.
    for document in sorted(range(len(starts)), key=lambda i: (i * 0.618) % 1):
        tokens = stream.take(torch.arange(starts[document], int(stream.document_ends[document]) - 1)[:512].numpy())
        words = [tokenizer.id_to_token(int(token)) for token in tokens]
        place = _word_to_hide(words, context)
        if place is None:
            continue
        low, high = max(0, place - context), place + context + 1
        while words[low].startswith("##"):
            low += 1
        hidden = torch.from_numpy(tokens.copy())
        hidden[place] = special.mask
        ids = torch.cat((torch.tensor([special.cls]), hidden[low:high])).to(device)
        ends = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        rows = model.encode(ids, ends, len(ids))[place - low + 1][None]
        share, guess = model.predict(rows).float().softmax(-1)[0].topk(3)
        text = f"{_decode(tokenizer, hidden[low:place])} [MASK] {_decode(tokenizer, hidden[place + 1 : high])}"
        names = [tokenizer.id_to_token(int(token)) for token in guess]
        examples.append(Example(text, words[place], list(zip(names, share.tolist(), strict=True))))
        if len(examples) == count:
            break
    return examples


def _word_to_hide(words: list[str], context: int) -> int | None:
    """The middle-most place of an ordinary, unbroken word of at least four letters."""
    middle = len(words) // 2
    for place in sorted(range(1, len(words) - 1), key=lambda i: abs(i - middle)):
        unbroken = words[place].isalpha() and not words[place + 1].startswith("##")
        if unbroken and len(words[place]) >= 4 and place >= min(4, context):
            return place
    return None


def _decode(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)
