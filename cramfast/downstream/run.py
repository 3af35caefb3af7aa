"""A whole finetuning run: the encoder, its tasks, every seed of each, the closing table."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..device import environment, operator_backends, pick_device, pick_dtype
from ..errors import TrainingFailed
from ..train.progress import Display, duration
from ..train.settings import as_json, digest
from .classifier import Classifier
from .encoder import Encoder
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
    display.say(_opening(options, folder))
    finished = [task.name for task in tasks if all(results.has(task.name, seed) for seed in seeds)]
    if finished:
        display.say(f"finished before: {', '.join(finished)}")
    left = {task: [seed for seed in seeds if not results.has(task.name, seed)] for task in tasks}
    # All of it is read before anything is trained: what is wrong with the last task shows at once.
    data = [load_task(task, options.data) for task, seeds_left in left.items() if seeds_left]
    for of_task in data:
        runner.run(of_task, left[of_task.task])
    display.say("\n" + _closing(options, results, tasks))
    display.say(f"saved      {results.path}")
    return 0


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

    def run(self, data: TaskData, seeds: list[int]) -> None:
        """Train and evaluate once for each seed, and record what comes out."""
        name, splits = data.task.name, {"train": data.train, **data.dev}
        examples = {split: self._encode(name, split, rows) for split, rows in splits.items()}
        self.display.say(f"{name}: " + ", ".join(f"{len(e):,} {split}" for split, e in examples.items()) + " rows")
        for seed in seeds:
            self._seed(data, examples, seed)

    def _encode(self, task: str, name: str, rows: Rows) -> Examples:
        line = f"{task}: tokenising {name}"
        with self.display.bar(line) as update:
            encoder, length = self.encoder, self.options.protocol.max_length
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


def _opening(options: FinetuneOptions, folder: Path) -> str:
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
