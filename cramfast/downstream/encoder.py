"""What is finetuned: an encoder as it was before, and the tokenizer that goes with it."""

import hashlib
from dataclasses import dataclass

from tokenizers import Tokenizer

from ..data.tokenizer import SpecialIds, open_tokenizer, special_ids
from ..errors import UserError
from ..model import Bert
from ..pretrained import Pretrained, load_tokenizer, open_pretrained
from .settings import FinetuneOptions


@dataclass(frozen=True)
class Encoder:
    """A pretrained model and its tokenizer. random: it gives its architecture alone, and weights are drawn anew."""

    pretrained: Pretrained
    tokenizer: Tokenizer
    special: SpecialIds
    random: bool

    @classmethod
    def open(cls, options: FinetuneOptions) -> "Encoder":
        """Raises UserError for a checkpoint or tokenizer that is missing, damaged or does not fit."""
        pretrained = open_pretrained(options.checkpoint)
        tokenizer = _tokenizer(options, pretrained)
        entries, config = tokenizer.get_vocab_size(), pretrained.config
        if entries > config.vocab_size:
            rows = config.vocab_size
            raise UserError(f"--tokenizer {options.tokenizer}: has {entries} entries, the encoder embeds {rows}")
        if options.protocol.max_length > config.max_positions:
            most = config.max_positions
            raise UserError(f"--max-length {options.protocol.max_length}: {options.checkpoint} takes at most {most}")
        return cls(pretrained, tokenizer, special_ids(tokenizer), options.random_weights)

    def model(self) -> Bert:
        """The encoder on the CPU. What is drawn comes from torch's generator."""
        return Bert(self.pretrained.config) if self.random else self.pretrained.model()

    def fingerprint(self) -> dict[str, str | bool]:
        """What tells this encoder from others. Weights that are not used are not asked for."""
        weights = repr(self.pretrained.config) if self.random else self.pretrained.digest()
        parts = {"encoder": weights, "tokenizer": self.tokenizer.to_str()}
        return {"random_weights": self.random} | {
            name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()
        }


def _tokenizer(options: FinetuneOptions, pretrained: Pretrained) -> Tokenizer:
    if options.tokenizer is not None:
        return open_tokenizer(options.tokenizer)
    try:
        return load_tokenizer(pretrained.folder)
    except UserError as error:
        raise UserError(f"{error}; give --tokenizer FILE") from error
