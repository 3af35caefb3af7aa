"""A whole pretraining run: text to tokens, the folder of the run, training, the closing summary."""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..config import PRESETS, RECIPES, PretrainOptions, resolve
from ..data.batches import DocumentPieces, PackedPieces, PieceSource
from ..data.prepare import default_cache, prepare
from ..data.shards import Dataset, TokenStream
from ..data.tokenizer import SpecialIds, continuing_ids, special_ids
from ..device import environment, has_gpu, matmul_rate, operator_backends, pick_device, pick_dtype
from ..errors import TrainingFailed, UserError
from ..evaluate.mlm import Example, HeldOut, Score, fill_examples
from ..model import Bert
from ..pretrained import Pretrained, load_tokenizer, open_pretrained
from .checkpoint import save_model, write_json
from .loop import Setup, State, Stopped, StopSignals, Trainer
from .memory import predict_bytes, usable_bytes
from .plan import BatchPlan, check_mask_rate, plan_batch
from .progress import Display, duration, plot_loss
from .settings import as_json, differences, digest
from .step import TrainStep


def pretrain(options: PretrainOptions) -> int:
    """Run `python -m cramfast.pretrain`; returns the exit code. Raises UserError for bad input."""
    display, signals = Display(), StopSignals()
    try:
        return _pretrain(options, display, signals)
    except Stopped as stop:
        display.say(f"stopped by {stop}")
        return 128 + stop.number
    except TrainingFailed as failure:
        display.say(f"training stopped: {failure}")
        return 1
    except OSError as error:  # a full disk, a folder taken away
        raise UserError(f"{error.filename or 'writing'}: {error.strerror}") from error


def _pretrain(options: PretrainOptions, display: Display, signals: StopSignals) -> int:
    initial = _open_initial(options, display)
    options = resolve(options, has_gpu(options.device), initial.config if initial else None)
    device = pick_device(options.device)
    dtype = pick_dtype(device, options.dtype)
    operator_backends(device)  # refuses what CRAMFAST_KERNELS cannot have
    options = replace(options, device=device.type, dtype=str(dtype).removeprefix("torch."))
    dataset = _open_dataset(options, initial, display)
    settings = _settings(options, dataset, initial)
    folder = options.run.out or Path("runs") / f"{_name(options)}-{digest(settings)[:8]}"
    decided = _open_folder(folder, settings)
    if (folder / "summary.json").is_file():
        display.say(f"{folder} is finished; give another --out, or delete it, to train again")
        _print_summary(display, folder, dataset)
        return 0
    special = special_ids(dataset.tokenizer)
    setup = _set_up(options, initial, dataset, special, folder, device, dtype, decided, display)
    _write_config(setup, settings, device, dataset)
    trainer = Trainer(setup, display, signals)
    _print_start(display, setup, trainer.state)
    try:
        score = trainer.train()
    except Stopped as stop:
        if not stop.at_once:
            display.say(f"saved {folder}; the same command goes on from there")
        raise
    _finish(setup, trainer.state, score, dataset, special)
    _print_summary(display, folder, dataset)
    return 0


def _open_initial(options: PretrainOptions, display: Display) -> Pretrained | None:
    """What --init-from names. UserError for flags that say something else about it."""
    if options.init_from is None:
        return None
    given = {"preset": options.preset, "tokenizer": options.text.tokenizer, "vocab-size": options.text.vocab_size}
    for flag, value in given.items():
        if value is not None:
            raise UserError(f"--{flag} {value}: --init-from brings model and tokenizer; leave one of the two out")
    initial = open_pretrained(options.init_from)
    display.say(f"starting from {initial.folder}")
    for what, names in (("left out", initial.weights.dropped), ("not there, so random", initial.weights.fresh)):
        if names:
            display.say(f"  {what}: {', '.join(names)}")
    return initial


def _name(options: PretrainOptions) -> str:
    """The model in a word."""
    return options.preset or Path(options.init_from).resolve().name


def _open_dataset(options: PretrainOptions, initial: Pretrained | None, display: Display) -> Dataset:
    began = time.monotonic()
    cache = options.run.cache or default_cache()
    with display.preparing() as report, tempfile.TemporaryDirectory() as aside:
        text = options.text
        if initial is not None:
            text = replace(text, tokenizer=Path(aside) / "tokenizer.json")
            load_tokenizer(initial.folder).save(str(text.tokenizer))
        dataset = prepare(text, cache.expanduser(), report, display.say)
    train = dataset.manifest["splits"]["train"]
    display.say(
        f"{train['tokens']:,} tokens of {train['documents']:,} documents, {dataset.vocab_size:,} word pieces "
        f"(in {time.monotonic() - began:.1f} s, {dataset.folder})"
    )
    return dataset


def _settings(options: PretrainOptions, dataset: Dataset, initial: Pretrained | None) -> dict:
    """Everything that the result of a run depends on, as JSON; where it is stored is not part of it."""
    settings = asdict(replace(options, run=None))
    settings["tokens"] = dataset.folder.name
    settings["init_from"] = initial.digest() if initial else None
    return as_json(settings)


def _open_folder(folder: Path, settings: dict) -> BatchPlan | None:
    """Check that `folder` is free, or holds a run with these settings; then return that run's batch plan."""
    path = folder / "config.json"
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); give another --out") from error
        if not isinstance(stored, dict) or not {"settings", "decided"} <= stored.keys():
            raise UserError(f"--out {folder}: its config.json is not that of a run; give another --out")
        differing = differences(stored["settings"], settings)
        if differing:
            raise UserError(
                f"--out {folder} holds a run with other settings: {'; '.join(differing)}; give another --out"
            )
        return BatchPlan(**stored["decided"])
    # A run that was killed while it wrote config.json has left half of it.
    if folder.is_dir() and any(path.name != ".config.json.partial" for path in folder.iterdir()):
        raise UserError(f"--out {folder}: the folder is not empty and holds no run; give another --out")
    return None


def _write_config(setup: Setup, settings: dict, device: torch.device, dataset: Dataset) -> None:
    """Make the folder of the run and write its config.json, and the tokenizer that goes with its checkpoints."""
    config = {
        "settings": settings,
        "decided": asdict(setup.plan),
        "model": asdict(setup.step.model.config),
        "environment": environment(device),
    }
    try:
        setup.folder.mkdir(parents=True, exist_ok=True)
        write_json(setup.folder / "config.json", config)
        shutil.copyfile(dataset.folder / "tokenizer.json", setup.folder / "tokenizer.json")
    except OSError as error:
        raise UserError(f"--out {setup.folder}: {error.strerror}") from error


def _set_up(
    options: PretrainOptions,
    initial: Pretrained | None,
    dataset: Dataset,
    special: SpecialIds,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    decided: BatchPlan | None,
    display: Display,
) -> Setup:
    """Model, optimizer, batches, and a batch size where none was given."""
    memory = usable_bytes(device, options.memory_limit)
    torch.manual_seed(options.seed)
    if initial is None:
        with device:  # drawing the weights on a CPU takes seconds
            model = Bert(replace(PRESETS[options.preset], vocab_size=dataset.vocab_size))
    else:
        model = initial.model().to(device)
    model.train()
    continues = _continues(dataset, device) if options.batches.whole_words else None
    settings = {"continues": continues, "graphs": options.run.graphs}
    step = TrainStep(model, options.optimizer, special, dtype, options.seed, **settings)
    stream, heldout = dataset.split("train"), dataset.split("heldout")
    pieces = _pieces(stream, options, dataset, special)
    plan = decided or plan_batch(options, step, stream, pieces, memory, display.say)
    model.activations = plan.activations
    length = options.batches.max_length
    batch = plan.unit * plan.units
    check_mask_rate(options.batches.mask_rate, plan.unit * length)
    if len(stream) < batch * length:
        raise UserError(
            f"--data: its {len(stream):,} training tokens are fewer than the {batch * length:,} of one batch; "
            f"give more text or a smaller --batch-size than {batch}"
        )
    return Setup(
        options=options,
        folder=folder,
        step=step,
        stream=stream,
        pieces=pieces,
        heldout=HeldOut.build(heldout, _pieces(heldout, options, dataset, special), length, special, device),
        plan=plan,
        peak_flops=matmul_rate(device, dtype),
        unigram_entropy=dataset.manifest["unigram_entropy"],
    )


def _continues(dataset: Dataset, device: torch.device) -> torch.Tensor:
    """bool (V,), True for ids that continue a word."""
    continues = continuing_ids(dataset.tokenizer)
    if not any(continues):
        raise UserError("--whole-words: needs a WordPiece tokenizer; no piece of this one begins with ##")
    return torch.tensor(continues, device=device)


def _pieces(stream: TokenStream, options: PretrainOptions, dataset: Dataset, special: SpecialIds) -> PieceSource:
    batches = options.batches
    if batches.layout == "documents":
        return DocumentPieces(stream, batches.max_length, options.seed, special.cls)
    full_stop = dataset.tokenizer.token_to_id(".")
    return PackedPieces(stream, batches.max_length, options.seed, batches.order, -1 if full_stop is None else full_stop)


def _finish(setup: Setup, state: State, score: Score, dataset: Dataset, special: SpecialIds) -> None:
    model, folder = setup.step.model.eval(), setup.folder
    save_model(folder / "final", model, dataset.folder / "tokenizer.json")
    plot_loss(folder, setup.unigram_entropy)
    with setup.step.autocast:  # as training and the held-out loss: there may be no kernel for float32
        examples = fill_examples(model, dataset.tokenizer, special, dataset.split("heldout"))
    seconds = state.spent.seconds
    summary = {
        "heldout_loss": score.loss,
        "heldout_accuracy": score.accuracy,
        "unigram_entropy": setup.unigram_entropy,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "tokens": state.spent.tokens,
        "seconds": round(seconds, 2),
        "flops": state.spent.flops,
        "joules": round(state.joules, 1) or None,
        "examples": [asdict(example) for example in examples],
    }
    write_json(folder / "summary.json", summary)


def _print_start(display: Display, setup: Setup, state: State) -> None:
    options, model = setup.options, setup.step.model
    parameters = sum(p.numel() for p in model.parameters())
    batch = setup.plan.unit * setup.plan.units
    ramp = f", reached at {options.batches.batch_ramp:.0%}" if options.batches.batch_ramp else ""
    display.say(
        f"{_name(options)}, {parameters / 1e6:.1f} M parameters, on {options.device} in {options.dtype}; "
        f"{options.recipe} recipe, {options.batches.layout} sequences of {options.batches.max_length}, "
        f"batch {batch}{ramp} ({_microbatch(setup, state)}), lr {options.optimizer.lr:g} "
        f"{RECIPES[options.recipe].schedule}, budget {options.budget}"
    )


def _microbatch(setup: Setup, state: State) -> str:
    """The microbatch in words, on a GPU with what its layers save and the memory that it should take."""
    words, step, options = f"{state.microbatch} at a time", setup.step, setup.options
    if step.device.type == "cpu":
        return words
    tokens, activations = state.microbatch * options.batches.max_length, setup.plan.activations
    dtype = getattr(torch, options.dtype)
    peak = predict_bytes(step.model.config, tokens, options.batches.mask_rate, dtype, activations)
    return f"{words}, activations {activations}, {peak / 2**30:.1f} GiB predicted"


def _print_summary(display: Display, folder: Path, dataset: Dataset) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    energy = f", {summary['joules'] / 1000:,.1f} kJ" if summary["joules"] else ""
    display.say(
        f"\nheld-out loss     {summary['heldout_loss']:.4f} nats  (15 % hidden)\n"
        f"held-out accuracy {summary['heldout_accuracy']:.1%}  (of the hidden tokens, by first guess)\n"
        f"unigram entropy   {summary['unigram_entropy']:.4f} nats  (of the training text)\n"
        f"trained           {summary['steps']:,} updates, {summary['tokens']:,} tokens in "
        f"{duration(summary['seconds'])}{energy}\n"
        f"saved             {folder / 'final'}  (curves: {folder / 'loss.png'})"
    )
    for example in summary["examples"]:
        _print_example(display, Example(**example))


def _print_example(display: Display, example: Example) -> None:
    guesses = ", ".join(f"{word} {share:.0%}" for word, share in example.guesses)
    display.say(f"\n  {example.text}\n    guesses: {guesses}  (it was: {example.answer})")
