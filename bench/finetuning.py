"""What finetuning is measured on and who does it: a pass over batches of 16 sequences as long as a task's are.

Both classify with the same encoder and head, from the same weights: this project's without padding and in CUDA graphs,
Hugging Face's ModernBERT as its Trainer drives it, every batch padded to its longest sequence. B sequences of a batch,
S tokens of the longest one, T of all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from cramfast.config import ModelConfig, OptimizerOptions
from cramfast.data.random_words import random_words, special_ids_of
from cramfast.downstream.classifier import Classifier
from cramfast.downstream.examples import BatchMaker, Examples
from cramfast.downstream.settings import Protocol
from cramfast.downstream.step import FinetuneStep
from cramfast.hugging_face import write_config, write_weights

from . import lengths
from .peers import CRAMFAST, absence
from .steps import Ordinary, Outcome, StepPeer, TorchStep, initial_bert

OUTPUTS = 3
_PROTOCOL = Protocol()
# The protocol's AdamW, with the clipping that the Trainer has by default.
_TRAINER = OptimizerOptions(lr=_PROTOCOL.lr, beta1=0.9, beta2=0.98, adam_eps=1e-6, weight_decay=0.0, clip=1.0)


@dataclass(frozen=True)
class FinetuneWork:
    """A pass over `steps` batches of `sequences` each, as long as `quantiles`, as of `bench.lengths`, say.

    `build(config, dropout)`: Hugging Face's classifier, on the CPU, its weights always the same; None: `hf_classifier`.
    `tolerances`: of the first step's loss and gradient norm without dropout, relative. bf16 moves the loss of 16
    sequences by 1.2e-4 and the norm by 3e-4. A fresh encoder without attention in one layer is off by 3e-2 in the norm,
    a head without its tanh too; a mean that is not one by 3e-2 in the loss already.
    """

    name: str
    config: ModelConfig
    quantiles: tuple[int, ...]
    steps: int = 32
    sequences: int = 16
    operator: str = "finetune"
    build: Callable[[ModelConfig, float], nn.Module] | None = None
    tolerances: tuple[float, float] = (1e-3, 5e-3)

    @property
    def work(self) -> str:
        return f"{self.operator}/train/{self.name}"

    @property
    def tokens(self) -> float:
        """Real tokens of a step, on average."""
        return int(self.counts().sum()) / self.steps

    def classifier(self, dropout: float) -> nn.Module:
        """Hugging Face's, on the CPU."""
        return (self.build or hf_classifier)(self.config, dropout)

    def counts(self) -> torch.Tensor:
        """Tokens of each sequence of the pass, int64, the same every time."""
        sequences = self.steps * self.sequences
        return lengths.drawn(self.quantiles, sequences * _PROTOCOL.max_length)[:sequences]

    def flops(self) -> int:
        """Of a step on average, by definition: only real tokens count, and the classifier's few rows do not."""
        counts = self.counts()
        attended = int(counts.square().sum()) / int(counts.sum())
        return round(self.tokens * self.config.flops_per_token(0.0, attended))

    def examples(self) -> Examples:
        """Ordinary words by Zipf's law, with classes that say nothing about them; always the same."""
        counts = self.counts().numpy()
        ids = random_words(special_ids_of(self.config.vocab_size), int(counts.sum())).numpy().astype(np.int32)
        labels = np.random.default_rng(0).integers(0, OUTPUTS, len(counts))
        return Examples(ids, np.zeros_like(ids), np.concatenate(([0], np.cumsum(counts))), labels)


@dataclass(frozen=True)
class FinetuneTraining:
    """What a variant starts from: the work, the device, the dtype of the matrix products, and the dropout."""

    work: FinetuneWork
    device: torch.device
    dtype: torch.dtype
    dropout: float = _PROTOCOL.dropout

    @property
    def tokens(self) -> float:
        """Real tokens of a step, on average."""
        return self.work.tokens


def initial_classifier(config: ModelConfig, dropout: float) -> Classifier:
    """This project's classifier with the weights that every variant starts from, on the CPU."""
    return Classifier(initial_bert(config), OUTPUTS, _PROTOCOL.pooling, dropout)


class OurPass:
    """This project's finetuning steps; the result of a call is that of its first step."""

    def __init__(self, training: FinetuneTraining):
        work, device = training.work, training.device
        protocol = replace(_PROTOCOL, dropout=training.dropout)
        model = initial_classifier(work.config, training.dropout).to(device).train()
        self.step = FinetuneStep(model, protocol, training.dtype)
        length, filled = protocol.max_length, self.step.wants_few_shapes
        pad = special_ids_of(work.config.vocab_size).pad
        maker = BatchMaker(work.examples(), work.sequences, length, pad, filled)
        made = map(maker.make, np.arange(work.steps * work.sequences).reshape(work.steps, work.sequences))
        self.batches = [batch.pin() if device.type == "cuda" else batch for batch in made]

    def __call__(self) -> Outcome:
        first, *_ = [self.step(batch, _PROTOCOL.lr) for batch in self.batches]
        return Outcome(first.loss, first.gradient_norm)


class TrainerPass(TorchStep):
    """The same by Hugging Face's model; its batches were padded and brought to the device before."""

    def __init__(self, training: FinetuneTraining):
        model = training.work.classifier(training.dropout).to(training.device).train()
        super().__init__(HF, model, _TRAINER, training.dtype)
        self.batches = padded_batches(training.work, training.device)

    def __call__(self) -> Outcome:
        first, *_ = [self.take(arguments) for arguments in self.batches]
        return first


def hf_classifier(config: ModelConfig, dropout: float) -> nn.Module:
    """ModernBertForSequenceClassification with the weights and the head of `initial_classifier`."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    ours = initial_classifier(config, dropout)
    dropouts = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
    settings = write_config(config, special_ids_of(config.vocab_size)) | dict.fromkeys(dropouts, dropout)
    settings |= {"num_labels": OUTPUTS, "classifier_pooling": "mean"}
    model = ModernBertForSequenceClassification(ModernBertConfig.from_dict(settings))
    stored = write_weights(ours.encoder.state_dict(), config)
    encoder = {name.removeprefix("model."): w for name, w in stored.items() if name.startswith("model.")}
    model.model.load_state_dict(encoder)
    # Its own head is dense + GELU + norm; the dropout behind the head is the model's.
    model.head = nn.Sequential(nn.Dropout(dropout), ours.dense, nn.Tanh())
    model.classifier = ours.out
    return model


def padded_batches(work: FinetuneWork, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Ids and the mask of the real tokens, int64 (B, S), and labels (B,) of every batch."""
    examples, batches = work.examples(), []
    counts = work.counts().view(work.steps, work.sequences).to(device)
    labels = torch.from_numpy(examples.labels).view(work.steps, work.sequences).to(device)
    ids = torch.from_numpy(examples.ids).to(device).long().split(counts.sum(1).tolist())
    for flat, lengths_B, labels_B in zip(ids, counts, labels, strict=True):
        real = torch.arange(int(lengths_B.max()), device=device) < lengths_B[:, None]
        padded = torch.zeros_like(real, dtype=torch.int64)
        padded[real] = flat
        batches.append({"input_ids": padded, "attention_mask": real.long(), "labels": labels_B})
    return batches


@dataclass(frozen=True)
class FinetunePeer(StepPeer):
    """`start(training)` takes a `FinetuneTraining`; the peer is skipped where one of its `modules` is not found."""

    start: Callable[[FinetuneTraining], Callable[[], Outcome]]
    modules: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why this peer cannot run here; None when it can."""
        return absence(self.modules, "transformers")


HF = Ordinary("hf", hf_classifier, lambda batch: batch)
OURS = FinetunePeer(CRAMFAST.who, OurPass, graphs=True)
TRAINER = FinetunePeer("hf-eager", TrainerPass, modules=("transformers",))


def expected_outcome(work: FinetuneWork, device: torch.device) -> tuple[float, float]:
    """Loss and gradient norm of the first batch in fp32 without dropout, by Hugging Face's model."""
    model = work.classifier(0.0).to(device).train()
    loss = HF.loss(model, padded_batches(work, device)[0])
    loss.backward()
    return loss.item(), nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
