"""Settings as frozen dataclasses, the model presets and the training recipes. Imports nothing heavy."""

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from .errors import UserError

Layout = Literal["packed", "documents"]
Order = Literal["shuffled", "full-stops"]
Activations = Literal["keep", "lean", "layers"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `Bert`. Sizes are in elements; `intermediate_size` is the width after the activation.

    window: tokens that local layers see on either side; None: no layer is local. With a window, every `global_every`th
    layer, from the first one on, sees the whole sequence; the others turn by `local_rope_theta`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    norm: Literal["pre", "post"] = "pre"
    first_norm: bool = False
    norm_bias: bool = False
    norm_eps: float = 1e-5
    linear_bias: bool = False
    activation: Literal["gelu", "geglu"] = "geglu"
    positions: Literal["learned", "sinusoidal", "rotary"] = "rotary"
    rope_theta: float = 10_000.0
    token_types: int = 0
    head_transform: bool = True
    decoder_bias: bool = False
    initializer_range: float = 0.02
    window: int | None = None
    global_every: int = 3
    local_rope_theta: float = 10_000.0

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        if self.token_types and self.positions == "rotary":
            raise UserError("token types are added to position embeddings, which rotary positions have none of")
        if self.window is not None and (self.window < 0 or self.global_every < 1):
            raise UserError(f"window {self.window}, global every {self.global_every}: expected at least 0 and 1")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def wide_size(self) -> int:
        """Width of the feed-forward network before its activation, which of GEGLU takes two halves."""
        return self.intermediate_size * (2 if self.activation == "geglu" else 1)

    def is_local(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, sees a window alone."""
        return self.window is not None and layer % self.global_every != 0

    def flops_per_token(self, predicted: float, mean_attended: float) -> float:
        """Floating-point operations of forward + backward for one token, by definition: 6 per weight of every matrix
        product, nothing for elementwise work. predicted: share of tokens that reach the vocabulary; mean_attended:
        average number of tokens that a token attends to."""
        C = self.hidden_size
        layer = 4 * C * C + C * (self.wide_size + self.intermediate_size)
        head = C * self.vocab_size + (C * C if self.head_transform else 0)
        return 6 * (self.num_layers * (layer + 2 * C * mean_attended) + predicted * head)


def _bert(layers: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=30_522,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        intermediate_size=4 * hidden,
        norm="post",
        norm_bias=True,
        norm_eps=1e-12,
        linear_bias=True,
        activation="gelu",
        positions="learned",
        token_types=2,
        decoder_bias=True,
    )


def _cramfast(layers: int, hidden: int, heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=heads, intermediate_size=2 * hidden
    )


PRESETS: dict[str, ModelConfig] = {
    "bert-base": _bert(12, 768),
    "bert-large": _bert(24, 1024),
    "bert-small": _bert(4, 512),
    "bert-mini": _bert(4, 256),
    "crammed-bert": replace(
        _cramfast(16, 768, 12, 32_768),
        first_norm=True,
        norm_bias=True,
        norm_eps=1e-12,
        positions="sinusoidal",
        head_transform=False,
    ),
    "cramfast-base": _cramfast(16, 768, 12, 32_768),
    "cramfast-small": _cramfast(8, 512, 8, 32_768),
    "cramfast-tiny": _cramfast(2, 256, 4, 4_096),
}

Preset = Literal[
    "bert-base",
    "bert-large",
    "bert-small",
    "bert-mini",
    "crammed-bert",
    "cramfast-base",
    "cramfast-small",
    "cramfast-tiny",
]


@dataclass(frozen=True)
class TextOptions:
    """What text is read, and how it becomes tokens. These settings, with the text, decide the token cache."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs (plain, .gz, .xz, .zst), .jsonl, .parquet, or hf:NAME[/CONFIG][@SPLIT]. Nothing: the
    English of the running Python's own documentation."""
    heldout_data: tuple[str, ...] = ()
    """Held-out text, given like --data. Nothing: documents split off --data by a hash of their text."""
    heldout_fraction: float | None = None
    """Share of the documents split off as held-out text. None: 0.01, of the built-in corpus 0.05."""
    document_per: Literal["blank-line", "line"] = "blank-line"
    """What ends a document in a text file."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and hf: data."""
    lowercase: bool = True
    """Lower-case the text."""
    strip_accents: bool = True
    """Remove accents."""
    ascii_only: bool = True
    """Remove characters outside ASCII."""
    max_tokens_per_char: float | None = None
    """Drop documents with at least this many tokens a character (the paper: 0.25). None: the recipe's."""
    vocab_size: int | None = None
    """WordPiece entries to train. None: the preset's."""
    tokenizer: Path | None = None
    """An existing tokenizer.json to use instead of training one."""


@dataclass(frozen=True)
class BatchOptions:
    """How tokens become batches."""

    layout: Layout | None = None
    """packed: slices of the stream of all documents; documents: pieces of one document each. None: the recipe's."""
    order: Order | None = None
    """shuffled, or full-stops: sequences with most full stops first (packed only). None: the recipe's."""
    max_length: int = 128
    """Longest sequence, in tokens."""
    batch_size: int | None = None
    """Sequences of --max-length (or their worth in tokens) per update. None: what suits recipe and budget."""
    batch_ramp: float | None = None
    """Share of the budget over which the batch grows linearly to --batch-size; 0: constant. None: the recipe's."""
    microbatch_size: int | None = None
    """Sequences per forward and backward pass. None: what suits the device; halved when memory runs out."""
    mask_rate: float | None = None
    """Share of the tokens predicted. None: the recipe's."""
    whole_words: bool = False
    """Hide all pieces of a word together (WordPiece). The held-out loss hides single pieces in any case."""


@dataclass(frozen=True)
class OptimizerOptions:
    """How weights are updated. None: the recipe's value."""

    optimizer: Literal["adamw", "muon"] | None = None
    """muon: Muon for the matrices of the layers, AdamW for the rest. adamw: AdamW for all. None: the recipe's."""
    lr: float | None = None
    """Peak learning rate of AdamW. None: the recipe's, by the width of the model."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, which does not depend on the width of the model."""
    muon_momentum: float = 0.95
    """Muon's momentum."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.98
    """AdamW's second moment decay."""
    adam_eps: float = 1e-12
    """AdamW's epsilon."""
    weight_decay: float | None = None
    """Decoupled weight decay, on matrices only. None: the recipe's."""
    clip: float | None = None
    """Largest global gradient norm."""


@dataclass(frozen=True)
class RunOptions:
    """Where things go and how often; these never change the result of a run."""

    out: Path | None = None
    """Folder of the run. The same command with the same folder resumes. None: runs/PRESET-HASH, by the settings."""
    cache: Path | None = None
    """Folder for tokenised text. None: $CRAMFAST_CACHE or ~/.cache/cramfast."""
    checkpoint_every: str = "10m"
    """Time (30s, 10m, 1h) or number of updates (500steps) between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: str = "1s"
    """Time or number of updates between lines of metrics.jsonl."""
    graphs: bool = True
    """Run each step as a CUDA graph: less work for the host, the same numbers."""


@dataclass(frozen=True)
class PretrainOptions:
    """Pretrain an encoder on text within a budget."""

    preset: Preset | None = None
    """Model. None: cramfast-small on a GPU, cramfast-tiny on a CPU."""
    init_from: str | None = None
    """Start from the weights, the model and the tokenizer of a cramfast run, a Hugging Face folder or a hub id, in
    place of --preset."""
    recipe: Literal["cramfast", "cramming"] = "cramfast"
    """cramfast: Muon and AdamW, 2 % warm-up, second half decaying, a batch that suits the budget. cramming: the
    paper's."""
    budget: str | None = None
    """24h, 10m, 90s, 5e9tokens or 2e17flops. None: 3m on a GPU, 75s on a CPU."""
    seed: int = 0
    """Seed of weights, order and masks."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the matrix products. auto: bfloat16, float16 with loss scaling on older GPUs, float32 on a CPU."""
    activations: Literal["auto", "keep", "lean", "layers"] = "auto"
    """What the forward pass leaves for the backward pass: keep: all it reads; lean: not what it writes again in
    passing; layers: each layer's input alone, a quarter slower. auto: on a GPU the fastest that fits, else keep."""
    memory_limit: str | None = None
    """GPU memory that the run may take, like 11GB or 10.5GiB; it decides the microbatch, and no more is ever taken.
    None: what is free. A CPU has no such limit."""
    evals: int = 10
    """Times the held-out loss and accuracy are measured over the budget."""
    text: TextOptions = field(default_factory=TextOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Recipe:
    """What `--recipe` decides, for every flag left at None."""

    schedule: Literal["trapezoid", "triangle"]
    optimizer: Literal["adamw", "muon"]
    lr: float
    lr_by_width: bool
    """Whether `lr` is meant for 768 hidden units and grows as 1/sqrt(width) for narrower models."""
    weight_decay: float
    clip: float
    layout: Layout
    order: Order
    batch_size: int | None
    batch_ramp: float
    mask_rate: float
    max_tokens_per_char: float

    def peak_lr(self, hidden_size: int) -> float:
        """The learning rate for a model of this width, to two digits."""
        return float(f"{self.lr * (768 / hidden_size) ** 0.5:.1e}") if self.lr_by_width else self.lr


RECIPES: dict[str, Recipe] = {
    "cramfast": Recipe(
        schedule="trapezoid",
        optimizer="muon",
        lr=1e-3,
        lr_by_width=True,
        # Muon's updates are as large for large weights as for small ones. With a tenth of this, weights grow to three
        # times the size and attention so sharp that little of it can be finetuned to anything else.
        weight_decay=0.1,
        clip=1.0,
        layout="documents",
        order="shuffled",
        batch_size=None,
        batch_ramp=0.0,
        mask_rate=0.25,
        max_tokens_per_char=1.0,
    ),
    "cramming": Recipe(
        schedule="triangle",
        optimizer="adamw",
        lr=1e-3,
        lr_by_width=False,
        weight_decay=0.01,
        clip=0.5,
        layout="packed",
        order="full-stops",
        batch_size=8192,
        batch_ramp=0.6,
        mask_rate=0.25,
        max_tokens_per_char=0.25,
    ),
}


def resolve(options: PretrainOptions, has_gpu: bool, initial: ModelConfig | None = None) -> PretrainOptions:
    """Fill every None that the recipe, the preset or the kind of device decides, and refuse impossible combinations.

    initial: the model that --init-from names; then there is no preset. What depends on the machine (batch_size of the
    cramfast recipe, microbatch_size, memory_limit) stays None.
    """
    recipe = RECIPES[options.recipe]
    preset = None if initial else options.preset or ("cramfast-small" if has_gpu else "cramfast-tiny")
    model = initial or PRESETS[preset]
    text, batches, optimizer = options.text, options.batches, options.optimizer
    heldout_fraction = 0.01 if text.data else 0.05
    text = _fill(text, recipe, vocab_size=model.vocab_size, heldout_fraction=heldout_fraction)
    batches = _fill(batches, recipe)
    if options.batches.batch_size and options.batches.batch_ramp is None:
        # A batch size asked for by name is held; only the recipe's own is ramped up to.
        batches = replace(batches, batch_ramp=0.0)
    if options.batches.layout == "documents" and options.batches.order is None:
        batches = replace(batches, order="shuffled")
    resolved = replace(
        options,
        preset=preset,
        budget=options.budget or ("3m" if has_gpu else "75s"),
        text=text,
        batches=batches,
        optimizer=_fill(optimizer, recipe, lr=recipe.peak_lr(model.hidden_size)),
    )
    _check(resolved, model)
    return resolved


def _fill(settings, recipe: Recipe, **defaults):
    """`settings` with each None taken from `defaults` or the recipe's field of the same name, where there is one."""
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)} | defaults
    missing = {
        f.name: values[f.name] for f in fields(settings) if getattr(settings, f.name) is None and f.name in values
    }
    return replace(settings, **missing)


def _check(options: PretrainOptions, model: ModelConfig) -> None:
    """Raise UserError for values out of range and combinations that cannot work."""
    text, batches, optimizer, run = options.text, options.batches, options.optimizer, options.run
    limit, name = model.max_positions, options.preset or options.init_from
    _require(2 <= batches.max_length <= limit, f"--max-length {batches.max_length}: {name} takes 2 to {limit}")
    _require(0 < batches.mask_rate < 1, f"--mask-rate {batches.mask_rate}: expected a share between 0 and 1")
    _require(0 <= batches.batch_ramp <= 1, f"--batch-ramp {batches.batch_ramp}: expected a share from 0 to 1")
    for name in ("batch_size", "microbatch_size"):
        value = getattr(batches, name)
        _require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: expected at least 1")
    _require(
        batches.order == "shuffled" or batches.layout == "packed",
        f"--order {batches.order} needs --layout packed: pieces of documents are not sorted",
    )
    _require(
        0 < text.heldout_fraction < 1, f"--heldout-fraction {text.heldout_fraction}: expected a share between 0 and 1"
    )
    _require(text.max_tokens_per_char > 0, f"--max-tokens-per-char {text.max_tokens_per_char}: expected more than 0")
    _require(
        text.vocab_size >= 256 or options.init_from is not None,
        f"--vocab-size {text.vocab_size}: expected at least 256",
    )
    _require(0 < optimizer.lr < math.inf, f"--lr {optimizer.lr}: expected a number above 0")
    _require(0 < optimizer.muon_lr < math.inf, f"--muon-lr {optimizer.muon_lr}: expected a number above 0")
    _require(optimizer.clip > 0, f"--clip {optimizer.clip}: expected more than 0")
    for name in ("weight_decay", "adam_eps"):
        value = getattr(optimizer, name)
        _require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: expected 0 or more")
    for name in ("beta1", "beta2", "muon_momentum"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"--{name.replace('_', '-')} {value}: expected a number from 0 to below 1")
    _require(0 <= options.seed < 2**63, f"--seed {options.seed}: expected a number from 0 to below 2^63")
    _require(options.evals >= 1, f"--evals {options.evals}: expected at least 1")
    _require(run.keep_checkpoints >= 1, f"--keep-checkpoints {run.keep_checkpoints}: expected at least 1")
    Interval.parse("--checkpoint-every", run.checkpoint_every)
    Interval.parse("--log-every", run.log_every)
    Budget.parse(options.budget)
    if options.memory_limit is not None:
        byte_count("--memory-limit", options.memory_limit)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>[a-z]+)", re.IGNORECASE)


def _amount(flag: str, text: str, units: tuple[str, ...], example: str) -> tuple[float, str]:
    """(number, unit) of "5e9tokens"; times come in seconds with unit "seconds". `units` are the others allowed."""
    match = _AMOUNT.fullmatch(text.strip())
    unit = match["unit"].lower() if match else ""
    scale = _SECONDS.get(unit, 1)
    unit = "seconds" if unit in _SECONDS else unit if unit.endswith("s") else unit + "s"
    if match is None or unit not in ("seconds", *units) or not 0 < float(match["number"]) < math.inf:
        raise UserError(f"{flag} {text}: expected {example}")
    return float(match["number"]) * scale, unit


_BYTES = {"mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}


def byte_count(flag: str, text: str) -> int:
    """Bytes of "11GB" or "10.5GiB", as `flag` gives them."""
    match = _AMOUNT.fullmatch(text.strip())
    scale = _BYTES.get(match["unit"].lower()) if match else None
    count = float(match["number"]) * scale if scale else 0.0
    if not 1 <= count < math.inf:
        raise UserError(f"{flag} {text}: expected an amount like 11GB or 10.5GiB")
    return int(count)


@dataclass(frozen=True)
class Budget:
    """How much a run may spend of one resource; `unit` is "seconds", "tokens" or "flops"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        return cls(*_amount("--budget", text, ("tokens", "flops"), "a budget like 24h, 10m, 5e9tokens or 2e17flops"))


@dataclass(frozen=True)
class Interval:
    """How often something happens; `unit` is "seconds" or "steps"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, flag: str, text: str) -> "Interval":
        return cls(*_amount(flag, text, ("steps",), "an interval like 30s, 10m or 500steps"))
