"""Settings of finetuning as frozen dataclasses. Imports nothing heavy."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UserError

TaskName = Literal["cola", "sst2", "mrpc", "stsb", "mnli", "qnli", "qqp", "rte", "wnli", "all"]
Pooling = Literal["mean", "cls"]
LabelKind = Literal["class", "score"]


@dataclass(frozen=True)
class DataOptions:
    """What an encoder is finetuned on."""

    task: tuple[TaskName, ...] = ()
    """GLUE tasks, or all of them."""
    glue_dir: Path | None = None
    """Folder with TASK/train.jsonl and TASK/dev.jsonl (mnli: dev_matched.jsonl and dev_mismatched.jsonl). None:
    nyu-mll/glue through Hugging Face datasets."""
    train: Path | None = None
    """Training rows of a task of your own instead: .jsonl, .csv or .tsv with sentence1, label and, for pairs,
    sentence2."""
    dev: Path | None = None
    """Rows that it is evaluated on."""
    label_kind: LabelKind = "class"
    """Whether its labels are classes (numbers from 0, or words) or scores (any numbers)."""


@dataclass(frozen=True)
class Protocol:
    """How an encoder is finetuned; the defaults are the cramming paper's, the same for every task."""

    lr: float = 4e-5
    """Peak learning rate of AdamW."""
    epochs: int = 5
    """Passes over the training rows; the result is that after the last."""
    batch_size: int = 16
    """Rows per update."""
    max_length: int = 128
    """Longest input in tokens; of a pair the longer sentence is cut first."""
    dropout: float = 0.1
    """Share of activations and attention weights dropped in training."""
    warmup: float = 0.1
    """Share of the updates in which the learning rate rises; after them it falls to zero along a cosine."""
    pooling: Pooling = "mean"
    """What of the encoder's output is classified: the mean of all tokens, or the first token's."""


@dataclass(frozen=True)
class FinetuneOptions:
    """Finetune an encoder on GLUE or on a task of your own, and evaluate it."""

    checkpoint: Path
    """The encoder: a run of cramfast.pretrain or a folder with a model."""
    data: DataOptions = field(default_factory=DataOptions)
    protocol: Protocol = field(default_factory=Protocol)
    seeds: int = 5
    """How often each task is finetuned; the result is the median."""
    seed: int = 0
    """The first seed, of the classifier's weights, the order and the dropout; the others follow it."""
    random_weights: bool = False
    """Take only architecture and tokenizer from --checkpoint, to see what pretraining is worth."""
    tokenizer: Path | None = None
    """The encoder's tokenizer.json. None: the one beside its weights."""
    out: Path | None = None
    """Folder of the results. The same command with the same folder goes on. None: CHECKPOINT/glue-HASH, by the
    settings."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the matrix products. auto: bfloat16, float16 with loss scaling on older GPUs, float32 on a CPU."""
    graphs: bool = True
    """Run each step as a CUDA graph: less work for the host."""


def check(options: FinetuneOptions) -> None:
    """Raise UserError for values out of range and combinations that cannot work."""
    data, protocol = options.data, options.protocol
    own = data.train is not None or data.dev is not None
    _require(bool(data.task) or own, "nothing to finetune on: give --task, or --train and --dev")
    _require(not (data.task and own), "--task and --train are two kinds of data: give one of them")
    _require(not own or None not in (data.train, data.dev), "a task of your own needs both --train and --dev")
    _require(not own or data.glue_dir is None, "--glue-dir is for --task; --train and --dev name their files")
    _require(data.label_kind == "class" or own, "--label-kind is for --train; GLUE's tasks have kinds of their own")
    _require(0 < protocol.lr < math.inf, f"--lr {protocol.lr}: expected a number above 0")
    _require(0 <= protocol.dropout < 1, f"--dropout {protocol.dropout}: expected a share from 0 to below 1")
    _require(0 <= protocol.warmup <= 1, f"--warmup {protocol.warmup}: expected a share from 0 to 1")
    for name in ("epochs", "batch_size"):
        value = getattr(protocol, name)
        _require(value >= 1, f"--{name.replace('_', '-')} {value}: expected at least 1")
    _require(protocol.max_length >= 5, f"--max-length {protocol.max_length}: expected at least 5")
    _require(options.seeds >= 1, f"--seeds {options.seeds}: expected at least 1")
    _require(0 <= options.seed < 2**32, f"--seed {options.seed}: expected a number from 0 to below 2^32")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
