"""A tiny encoder and tiny tasks, for the tests of finetuning."""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from cramfast.config import PRESETS, ModelConfig
from cramfast.data.tokenizer import train_tokenizer
from cramfast.model import Bert
from cramfast.train.checkpoint import save_model

WORDS = ("good", "bad", "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "slowly", "now", "here")


def tiny_config(vocab_size: int = 256, preset: str = "cramfast-tiny", **changes) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
    return replace(PRESETS[preset], vocab_size=vocab_size, **sizes | changes)


def make_checkpoint(folder: Path, **changes) -> Path:
    """A run's folder with the random weights of a tiny encoder in `final`."""
    texts = [" ".join(WORDS)] * 4
    tokenizer = train_tokenizer(lambda: iter(texts), 256, lowercase=True, strip_accents=True, ascii_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(7)
    save_model(folder / "final", Bert(tiny_config(tokenizer.get_vocab_size(), **changes)), folder / "tokenizer.json")
    return folder


def sentence(chance: random.Random, words: int = 6) -> str:
    return " ".join(chance.choices(WORDS[2:], k=words))


def good_or_bad(count: int, seed: int, pair: bool = False) -> list[dict]:
    """Rows whose label is 1 where "good" stands among other words, 0 where "bad" does."""
    chance, rows = random.Random(seed), []
    for number in range(count):
        label = number % 2
        words = sentence(chance, chance.randint(2, 8)).split()
        words.insert(chance.randint(0, len(words)), ("bad", "good")[label])
        second = sentence(chance) if pair else None
        rows.append({"idx": number, "sentence1": " ".join(words), "sentence2": second, "label": label})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
