"""What a training step is measured on and who takes it: forward, backward, clip and AdamW on one batch.

T tokens of an unpadded batch, B sequences, M predictions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from cramfast import kernels
from cramfast.config import Activations, ModelConfig, OptimizerOptions, byte_count
from cramfast.data.batches import Batch, Cursor
from cramfast.data.random_words import random_words, special_ids_of
from cramfast.model import Bert
from cramfast.train.memory import plan_memory
from cramfast.train.step import TrainStep

from . import lengths
from .peers import CRAMFAST, absence

INITIAL_SEED = 0
_MASK_SEED = 0
_MASK_RATE = 0.25
# A learning rate at which many steps on one batch stay finite.
OPTIMIZER = OptimizerOptions(lr=1e-4, weight_decay=0.01, clip=1.0)
_SHARE_OF_FREE_MEMORY = 0.8
# Weights, gradients and moments of 150 M parameters, and as much again for what is made on the way.
_MODEL_MIB = 4096


@dataclass(frozen=True)
class MaskedBatch:
    """input_ids (T,) and, with a share of them hidden, masked_ids (T,); positions (M,) of the predicted ones, rising,
    and labels (M,). cu_seqlens int32 (B+1,)."""

    input_ids: torch.Tensor
    masked_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @property
    def counts(self) -> torch.Tensor:
        """Tokens of each sequence (B,)."""
        return self.cu_seqlens.diff()

    def parts(self, sequences: int) -> Iterator["MaskedBatch"]:
        """The batch as batches of at most so many sequences."""
        ends = self.cu_seqlens.tolist()
        for first in range(0, len(ends) - 1, sequences):
            start, stop = ends[first], ends[min(first + sequences, len(ends) - 1)]
            inside = (self.positions >= start) & (self.positions < stop)
            yield replace(
                self,
                input_ids=self.input_ids[start:stop],
                masked_ids=self.masked_ids[start:stop],
                positions=self.positions[inside] - start,
                labels=self.labels[inside],
                cu_seqlens=self.cu_seqlens[first : first + sequences + 1] - start,
            )


def _all_of_the_sequence(counts: torch.Tensor, config: ModelConfig) -> float:
    return int(counts.square().sum()) / int(counts.sum())


@dataclass(frozen=True)
class Ordinary:
    """A model as people train it today; its variants are called `<name>-eager` and `<name>-compile`.

    `build(config)`: on the CPU, with the weights that every variant starts from. `arguments(batch)`: what it is called
    with; it returns the mean loss, or a mapping that has it as `loss`. `mean_attended(counts (B,), config)`: how many
    tokens a token attends to. The work is skipped where one of its `modules` is not found.
    """

    name: str
    build: Callable[[ModelConfig], nn.Module]
    arguments: Callable[[MaskedBatch], dict[str, torch.Tensor]]
    mean_attended: Callable[[torch.Tensor, ModelConfig], float] = _all_of_the_sequence
    modules: tuple[str, ...] = ()
    package: str = ""

    def missing(self) -> str | None:
        """Why this model cannot run here; None when it can."""
        return absence(self.modules, self.package)

    def loss(self, model: nn.Module, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss, a scalar, of the model called with `arguments`."""
        output = model(**arguments)
        return output if isinstance(output, torch.Tensor) else output["loss"]


@dataclass(frozen=True)
class StepWork:
    """One batch of one model: `sequences` of `length` tokens, or of `shortest` to `length`, uniformly.

    `mib_per_place`: memory that the hungriest variant takes for a place of the padded batch, measured on an H200.
    Of this project's step, `activations`: what the model saves for the backward pass, as `Bert` takes it; `microbatch`:
    sequences that it computes at a time (None: all of them); `memory`: bytes of the card that it may take (None: what
    there is).
    """

    name: str
    config: ModelConfig
    ordinary: Ordinary
    sequences: int
    length: int
    mib_per_place: float
    shortest: int | None = None
    activations: Activations = "keep"
    microbatch: int | None = None
    memory: int | None = None
    operator: str = "step"
    steps = 1
    """How many one call takes."""

    @property
    def work(self) -> str:
        return f"{self.operator}/train/{self.name}"

    def counts(self) -> torch.Tensor:
        """Tokens of each sequence, int64 (B,), the same every time."""
        places = self.sequences * self.length
        if self.shortest is None:
            return lengths.equal(self.length, places)
        return lengths.uniform(self.shortest, self.length, places)[: self.sequences]

    def flops(self) -> int:
        """Of one step, by definition: only real tokens count, and only predicted ones reach the vocabulary."""
        counts = self.counts()
        tokens = int(counts.sum())
        attended = self.ordinary.mean_attended(counts, self.config)
        return round(tokens * self.config.flops_per_token(_predicted(tokens) / tokens, attended))


def on_a_card_of(memory: str, work: StepWork) -> StepWork:
    """The work as pretraining plans it for a card of `memory`, like 8GB: its microbatch and what its layers save."""
    limit = byte_count("memory", memory)
    plan = plan_memory(work.config, work.length, _MASK_RATE, torch.bfloat16, limit)
    name, microbatch = f"{work.name}-{memory.lower()}", min(plan.sequences, work.sequences)
    return replace(work, name=name, activations=plan.activations, microbatch=microbatch, memory=limit)


def fit(work: StepWork, tokens: int, free_bytes: int) -> StepWork:
    """The work with at most `tokens` places in its batch, sequences halved until the hungriest variant fits into
    `free_bytes`. Its name tells the sequences where they are not the usual number."""
    sequences = min(work.sequences, max(1, tokens // work.length))
    room = _SHARE_OF_FREE_MEMORY * free_bytes / 2**20 - _MODEL_MIB
    while sequences > 1 and sequences * work.length * work.mib_per_place > room:
        sequences //= 2
    name = work.name if sequences == work.sequences else f"{work.name}@{sequences}"
    return replace(work, name=name, sequences=sequences)


def _predicted(tokens: int) -> int:
    return round(_MASK_RATE * tokens)


def masked_batch(work: StepWork, device: torch.device) -> MaskedBatch:
    """Ordinary words by Zipf's law, masked as `TrainStep` masks its first microbatches; always the same."""
    special, counts = special_ids_of(work.config.vocab_size), work.counts()
    ids = random_words(special, int(counts.sum())).to(device)
    masked, offset = [], 0
    for step, part in enumerate(counts.split(work.microbatch or len(counts))):
        tokens = int(part.sum())
        part_ids, ends = ids[offset : offset + tokens], _ends(part, device)
        options = {"mask_id": special.mask, "ordinary": special.ordinary, "seed": _MASK_SEED, "step": step}
        masked_ids, positions, labels = kernels.mask_tokens(part_ids, ends, _predicted(tokens), **options)
        masked.append((masked_ids, positions + offset, labels))
        offset += tokens
    masked_ids, positions, labels = map(torch.cat, zip(*masked, strict=True))
    return MaskedBatch(ids, masked_ids, positions, labels, _ends(counts, device), work.length)


def _ends(counts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """cu_seqlens of sequences with `counts` tokens."""
    return nn.functional.pad(counts.cumsum(0), (1, 0)).to(device, torch.int32)


def initial_bert(config: ModelConfig) -> Bert:
    """This project's model with the weights that every variant starts from, on the CPU."""
    torch.manual_seed(INITIAL_SEED)
    return Bert(config)


@dataclass(frozen=True)
class Outcome:
    """Of one step: the mean loss in nats, and the gradient's norm before clipping. Scalars, on the device."""

    loss: torch.Tensor
    gradient_norm: torch.Tensor


@dataclass(frozen=True)
class Training:
    """What a variant starts from: the work, its batch on the device, and the dtype of the matrix products."""

    work: StepWork
    batch: MaskedBatch
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.batch.input_ids.device

    @property
    def tokens(self) -> int:
        """Real tokens of a step."""
        return len(self.batch.input_ids)


class OurStep:
    """This project's step. It masks the batch anew each time, which the others are spared; the first time as
    `masked_batch` does."""

    def __init__(self, training: Training):
        work, whole = training.work, training.batch
        self.step = _train_step(training)
        self.batches = []
        for part in whole.parts(work.microbatch or work.sequences):
            attended = int(part.counts.square().sum())
            self.batches.append(Batch(part.input_ids, part.cu_seqlens, part.max_seqlen, attended, Cursor()))
        self.tokens = len(whole.input_ids)
        self.microbatches = 0

    def __call__(self) -> Outcome:
        for batch in self.batches:
            share = len(batch.input_ids) / self.tokens
            self.step.accumulate(batch, _MASK_RATE, self.microbatches, share)
            self.microbatches += 1
        result = self.step.update(OPTIMIZER.lr)
        return Outcome(result.loss, result.gradient_norm)


def _train_step(training: Training) -> TrainStep:
    """The step that `python -m cramfast.pretrain` takes."""
    model = initial_bert(training.work.config).to(training.device).train()
    model.activations = training.work.activations
    special = special_ids_of(training.work.config.vocab_size)
    return TrainStep(model, OPTIMIZER, special, training.dtype, _MASK_SEED)


class TorchStep:
    """The step of an ordinary model: fp32 weights under autocast, fused AdamW, and a gradient scaler for float16.

    call: what is called in the model's place, which has its parameters; None: the model. optimizer: one of its own.
    """

    def __init__(
        self,
        ordinary: Ordinary,
        model: nn.Module,
        options: OptimizerOptions,
        dtype: torch.dtype,
        call: Callable | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.ordinary, self.model, self.clip = ordinary, model, options.clip
        self.call = model if call is None else call
        self.optimizer = optimizer or torch.optim.AdamW(
            model.parameters(),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        kind = next(model.parameters()).device.type
        self.autocast = torch.autocast(kind, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def take(self, arguments: dict[str, torch.Tensor]) -> Outcome:
        with self.autocast:
            loss = self.ordinary.loss(self.call, arguments)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return Outcome(loss.detach(), norm)


class OrdinaryStep(TorchStep):
    """The step of an ordinary model on the batch, which was masked and padded before."""

    def __init__(self, training: Training, compiled: bool):
        ordinary, call = training.work.ordinary, None
        model = ordinary.build(training.work.config).to(training.device).train()
        if compiled:
            # What earlier works compiled would count towards the recompile limit, and make this one's shapes dynamic.
            torch._dynamo.reset()
            call = torch.compile(model)
        self.arguments = ordinary.arguments(training.batch)
        super().__init__(ordinary, model, OPTIMIZER, training.dtype, call)

    def __call__(self) -> Outcome:
        return self.take(self.arguments)


@dataclass(frozen=True)
class StepPeer:
    """One variant of a work. `start(training)` gives its step as a function without arguments.

    `graphs`: whether its activations may live in CUDA graphs, of which the allocator sees only the capture.
    """

    who: str
    start: Callable[[Training], Callable[[], Outcome]]
    graphs: bool = False

    @property
    def is_ours(self) -> bool:
        return self.who == CRAMFAST.who

    def missing(self) -> str | None:
        """Why this variant cannot run here, though the work's model can; None when it can."""
        return None


OURS = StepPeer(CRAMFAST.who, OurStep, graphs=True)


def ordinary_peers(ordinary: Ordinary) -> tuple[StepPeer, StepPeer]:
    """The model in eager PyTorch, and the whole of it under torch.compile in its default mode."""
    return (
        StepPeer(f"{ordinary.name}-eager", lambda training: OrdinaryStep(training, compiled=False)),
        StepPeer(f"{ordinary.name}-compile", lambda training: OrdinaryStep(training, compiled=True)),
    )
