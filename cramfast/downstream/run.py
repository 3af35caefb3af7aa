"""A whole finetuning run: the encoder, its tasks, every seed of each, the closing table."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .. import load
from ..config import ModelConfig
from ..data.tokenizer import open_tokenizer, special_ids
from ..device import environment, operator_backends, pick_device, pick_dtype
from ..errors import TrainingFailed, UserError
from ..model import Bert
from ..train.progress import Display, duration
from ..train.settings import as_json, digest
from .classifier import Classifier
from .examples import Examples, encode
from .results import Results
from .settings import FinetuneOptions, check
from .step import FinetuneStep
from .table import in_percent, medians, percent, plain_table, remark
from .tasks import GLUE, Rows, Task, TaskData, chosen_tasks, load_task
from .training import Training, train


def finetune(options: FinetuneOptions) -> int:
    """Run `python -m cramfast.finetune`; returns the exit code. Raises UserError for bad input."""
    display = Display()
    try:
        return _finetune(options, display)
    except TrainingFailed as failure:
        display.say(f"finetuning stopped: {failure}")
        return 1


def _finetune(options: FinetuneOptions, display: Display) -> int:
    check(options)
    device = pick_device(options.device)
    dtype = pick_dtype(device, options.dtype)
    operator_backends(device)  # refuses what CRAMFAST_KERNELS cannot have
    options = replace(options, device=device.type, dtype=str(dtype).removeprefix("torch."))
    encoder = Encoder.open(options)
    settings = _settings(options, encoder)
    folder = options.out or _default_folder(options.checkpoint, settings)
    results = Results(folder, settings, {"checkpoint": str(options.checkpoint), "environment": environment(device)})
    tasks, seeds = chosen_tasks(options.data), range(options.seed, options.seed + options.seeds)
    runner = Runner(options, encoder, results, display, device, dtype)
    display.say(_opening(options, encoder, folder))
    for task in tasks:
        runner.run(task, [seed for seed in seeds if not results.has(task.name, seed)])
    display.say("\n" + _closing(options, results, tasks))
    display.say(f"saved      {results.path}")
    return 0


class Encoder:
    """What is finetuned: an architecture with its tokenizer, and the pretrained weights unless none are wanted."""

    def __init__(self, pretrained: Bert, tokenizer: Tokenizer, random: bool):
        self.config: ModelConfig = pretrained.config
        self.tokenizer, self.special = tokenizer, special_ids(tokenizer)
        self.weights = None if random else pretrained.state_dict()

    @classmethod
    def open(cls, options: FinetuneOptions) -> "Encoder":
        """Raises UserError for a checkpoint or tokenizer that is missing or does not fit."""
        pretrained = load(options.checkpoint)
        tokenizer = open_tokenizer(options.tokenizer or _tokenizer_beside(options.checkpoint))
        size, places = tokenizer.get_vocab_size(), pretrained.config.max_positions
        if size > pretrained.config.vocab_size:
            rows = pretrained.config.vocab_size
            raise UserError(f"--checkpoint {options.checkpoint}: embeds {rows} tokens, its tokenizer has {size}")
        if options.protocol.max_length > places:
            raise UserError(f"--max-length {options.protocol.max_length}: {options.checkpoint} takes at most {places}")
        return cls(pretrained, tokenizer, options.random_weights)

    def model(self) -> Bert:
        """The encoder, from its pretrained weights or, by torch's generator, from random ones. On the CPU."""
        model = Bert(self.config)
        if self.weights is not None:
            model.load_state_dict(self.weights)
        return model

    def fingerprint(self) -> dict[str, str | None]:
        """Digests of the weights, None for random ones, and of the tokenizer."""
        weights = None
        if self.weights is not None:
            hashed = hashlib.sha256()
            for tensor in self.weights.values():
                hashed.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
            weights = hashed.hexdigest()[:16]
        tokenizer = hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]
        return {"pretrained_weights": weights, "tokenizer": tokenizer}


def _tokenizer_beside(checkpoint: Path) -> Path:
    """The tokenizer.json of a model's folder, or of the `final` in a run's."""
    for folder in (checkpoint, checkpoint / "final", checkpoint.parent / "final"):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    raise UserError(f"--checkpoint {checkpoint}: has no tokenizer.json; give --tokenizer FILE")


class Runner:
    """Finetunes on one task after the other. Tasks of as many outputs share a step, so that its graphs serve all."""

    def __init__(
        self,
        options: FinetuneOptions,
        encoder: Encoder,
        results: Results,
        display: Display,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.options, self.encoder, self.results, self.display = options, encoder, results, display
        self.device, self.dtype = device, dtype
        self.step: FinetuneStep | None = None

    def run(self, task: Task, seeds: list[int]) -> None:
        """Train and evaluate once for each seed, and record what comes out."""
        if not seeds:
            self.display.say(f"{task.name}: every seed is finished")
            return
        data = load_task(task, self.options.data)
        splits = {"train": data.train, **data.dev}
        examples = {name: self._encode(task.name, name, rows) for name, rows in splits.items()}
        self.display.say(f"{task.name}: " + ", ".join(f"{len(e):,} {name}" for name, e in examples.items()) + " rows")
        for seed in seeds:
            self._seed(data, examples, seed)

    def _encode(self, task: str, name: str, rows: Rows) -> Examples:
        line = f"{task}: tokenising {name}"
        with self.display.bar(line) as update:
            length = self.options.protocol.max_length
            encoder = self.encoder
            report = _share_of(update, len(rows), line)
            return encode(rows, encoder.tokenizer, encoder.special, length, report)

    def _seed(self, data: TaskData, examples: dict[str, Examples], seed: int) -> None:
        self._restart(data.outputs, seed)
        name, dev = f"{data.task.name} seed {seed}", {split: examples[split] for split in data.dev}
        training = Training(name, examples["train"], dev, data.task.metrics, self.encoder.special.pad, seed)
        with self.display.bar(f"{name}: the first steps compile and warm up ...") as update:
            result = train(self.step, training, update)
        if self.device.type == "cuda" and self.step.graphs.obstacle is not None:
            self.display.say(f"no CUDA graphs: {self.step.graphs.obstacle}")
        facts = {"train_rows": len(examples["train"]), "dev_rows": {split: len(e) for split, e in dev.items()}}
        facts |= {"classes": list(data.names)}
        self.results.record(data.task.name, facts, seed, asdict(result))
        self.display.say(f"{name}: {in_percent(result.scores)}  ({duration(result.seconds)})")

    def _restart(self, outputs: int, seed: int) -> None:
        """A step at its beginning: the encoder's weights, and a head and dropout by the seed."""
        protocol = self.options.protocol
        torch.manual_seed(seed)
        classifier = Classifier(self.encoder.model(), outputs, protocol.pooling, protocol.dropout)
        if self.step is not None and self.step.model.outputs == outputs:
            self.step.restart(classifier)
            return
        self.step = None  # its memory is free before the next one takes as much
        self.step = FinetuneStep(classifier.to(self.device).train(), protocol, self.dtype, self.options.graphs)


def _share_of(update: Callable[[float, str], None], total: int, line: str) -> Callable[[int], None]:
    return lambda done: update(done / total, line)


def _settings(options: FinetuneOptions, encoder: Encoder) -> dict:
    """Everything that the numbers depend on but task and seed, as JSON."""
    data = replace(options.data, task=())
    paths = {name: path.resolve() for name, path in vars(data).items() if isinstance(path, Path)}
    settings = {
        "model": asdict(encoder.config),
        **encoder.fingerprint(),
        "data": asdict(replace(data, **paths)),
        "protocol": asdict(options.protocol),
        "device": options.device,
        "dtype": options.dtype,
    }
    return as_json(settings)


def _default_folder(checkpoint: Path, settings: dict) -> Path:
    """Beside the checkpoint, or among the runs where that cannot be written."""
    name = f"glue-{digest(settings)[:8]}"
    if os.access(checkpoint, os.W_OK):
        return checkpoint / name
    return Path("runs") / f"{checkpoint.resolve().name}-{name}"


def _opening(options: FinetuneOptions, encoder: Encoder, folder: Path) -> str:
    protocol, weights = options.protocol, "random weights of" if options.random_weights else "weights of"
    return (
        f"{weights} {options.checkpoint} on {options.device} in {options.dtype}; AdamW {protocol.lr:g}, "
        f"{protocol.epochs} epochs, batch {protocol.batch_size}, length {protocol.max_length}, dropout "
        f"{protocol.dropout:g}, {protocol.pooling} pooling; results in {folder}"
    )


def _closing(options: FinetuneOptions, results: Results, tasks: list[Task]) -> str:
    """The table of GLUE as far as it is in the folder, and lines for tasks that have no place in it."""
    found, lines = medians(results.content), []
    seeds = {len(entry["seeds"]) for entry in results.content["tasks"].values()}
    counts = "/".join(map(str, sorted(seeds)))
    if any(task.name in GLUE for task in tasks):
        name = options.checkpoint.as_posix() + (", random weights" if options.random_weights else "")
        of_seeds = "One seed" if counts == "1" else f"Medians of {counts} seeds"
        lines += [plain_table({name: found}), f"{of_seeds}, in percent. {remark(found)}".rstrip()]
    for task in tasks:
        if task.name not in GLUE or task.name == "wnli":
            values = ((metric, found[task.name, split, metric]) for split, _ in task.splits for metric in task.metrics)
            said = ", ".join(f"{metric} {percent(value)}" for metric, value in values)
            lines.append(f"{task.name}: {said} (median of {len(results.content['tasks'][task.name]['seeds'])})")
    return "\n".join(lines)
