"""A whole pretraining run: text to tokens, the folder of the run, training, the closing summary."""

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..config import PRESETS, RECIPES, Budget, ModelConfig, PretrainOptions, resolve
from ..data.batches import BatchBuilder, Cursor, DocumentPieces, PackedPieces, PieceSource
from ..data.prepare import default_cache, prepare
from ..data.shards import Dataset, TokenStream
from ..data.tokenizer import SpecialIds, special_ids
from ..device import environment, has_gpu, matmul_rate, pick_device, pick_dtype
from ..errors import UserError
from ..evaluate.mlm import Example, HeldOut, fill_examples
from ..kernels import OPERATORS, choose
from ..model import Bert
from .checkpoint import save_model, write_json
from .loop import BatchPlan, Setup, State, Stopped, StopSignals, Trainer, TrainingFailed
from .optimizer import adamw
from .progress import Display, duration, plot_loss
from .schedule import suitable_batch
from .step import TrainStep

_CPU_MICROBATCH_TOKENS = 4096
_MOST_MICROBATCH_TOKENS = 65_536
_TOKENS_PER_GIB = 1024


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
    options = resolve(options, has_gpu(options.device))
    device = pick_device(options.device)
    dtype = pick_dtype(device, options.dtype)
    _check_operators(device)
    options = replace(options, device=device.type, dtype=str(dtype).removeprefix("torch."))
    cache = options.run.cache or default_cache()
    began = time.monotonic()
    with display.preparing() as report:
        dataset = prepare(options.text, cache.expanduser(), report, display.say)
    config = replace(PRESETS[options.preset], vocab_size=dataset.vocab_size)
    train = dataset.manifest["splits"]["train"]
    display.say(
        f"{train['tokens']:,} tokens of {train['documents']:,} documents, {dataset.vocab_size:,} word pieces "
        f"(in {time.monotonic() - began:.1f} s, {dataset.folder})"
    )

    settings = _settings(options, dataset)
    folder = options.run.out or Path("runs") / f"{options.preset}-{_digest(settings)[:8]}"
    decided = _open_folder(folder, settings)
    if (folder / "summary.json").is_file():
        display.say(f"{folder} is finished; give another --out, or delete it, to train again")
        _print_summary(display, folder, dataset)
        return 0
    special = special_ids(dataset.tokenizer)
    setup = _set_up(options, config, dataset, special, folder, device, dtype, decided, display)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "config.json",
            {
                "settings": settings,
                "decided": asdict(setup.plan),
                "model": asdict(config),
                "environment": environment(device),
            },
        )
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from error
    trainer = Trainer(setup, display, signals)
    _print_start(display, setup, trainer.state)
    try:
        heldout_loss = trainer.train()
    except Stopped as stop:
        if not stop.at_once:
            display.say(f"saved {folder}; the same command goes on from there")
        raise
    _finish(setup, trainer.state, heldout_loss, dataset, special)
    _print_summary(display, folder, dataset)
    return 0


def _check_operators(device: torch.device) -> None:
    """Raise UserError when CRAMFAST_KERNELS asks for what cannot run."""
    try:
        for operator in OPERATORS:
            choose(operator, device)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _settings(options: PretrainOptions, dataset: Dataset) -> dict:
    """Everything that the result of a run depends on, as JSON; where it is stored is not part of it."""
    settings = asdict(replace(options, run=None))
    settings["tokens"] = dataset.folder.name
    return json.loads(json.dumps(settings, default=str))


def _digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _open_folder(folder: Path, settings: dict) -> BatchPlan | None:
    """Make the folder of the run, or check that it holds a run with these settings; then return its batch plan."""
    path = folder / "config.json"
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); give another --out") from error
        if not isinstance(stored, dict) or not {"settings", "decided"} <= stored.keys():
            raise UserError(f"--out {folder}: its config.json is not that of a run; give another --out")
        differing = _differences(stored["settings"], settings)
        if differing:
            raise UserError(
                f"--out {folder} holds a run with other settings: {'; '.join(differing)}; give another --out"
            )
        return BatchPlan(**stored["decided"])
    # A run that was killed while it wrote config.json has left half of it.
    if folder.is_dir() and any(path.name != ".config.json.partial" for path in folder.iterdir()):
        raise UserError(f"--out {folder}: the folder is not empty and holds no run; give another --out")
    return None


def _differences(stored: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for name in stored.keys() | now.keys():
        there, here = stored.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += _differences(there, here)
        elif there != here:
            found.append(f"{name} is {there} there, {here} here")
    return sorted(found)


def _set_up(
    options: PretrainOptions,
    config: ModelConfig,
    dataset: Dataset,
    special: SpecialIds,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    decided: BatchPlan | None,
    display: Display,
) -> Setup:
    """Model, optimizer, batches, and a batch size where none was given."""
    torch.manual_seed(options.seed)
    model = Bert(config).to(device).train()
    step = TrainStep(model, adamw(model, options.optimizer), special, options.optimizer.clip, dtype, options.seed)
    stream, heldout = dataset.split("train"), dataset.split("heldout")
    pieces = _pieces(stream, options, dataset, special)
    plan = decided or _plan(options, step, stream, pieces, display)
    length = options.batches.max_length
    batch = plan.unit * plan.units
    if not round(options.batches.mask_rate * plan.unit * length):
        raise UserError(
            f"--mask-rate {options.batches.mask_rate}: hides none of the {plan.unit * length} tokens of a microbatch"
        )
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


def _pieces(stream: TokenStream, options: PretrainOptions, dataset: Dataset, special: SpecialIds) -> PieceSource:
    batches = options.batches
    if batches.layout == "documents":
        return DocumentPieces(stream, batches.max_length, options.seed, special.cls)
    full_stop = dataset.tokenizer.token_to_id(".")
    return PackedPieces(stream, batches.max_length, options.seed, batches.order, -1 if full_stop is None else full_stop)


def _plan(
    options: PretrainOptions, step: TrainStep, stream: TokenStream, pieces: PieceSource, display: Display
) -> BatchPlan:
    """The microbatch that the device is given at first, and how many of them make the batch."""
    length = options.batches.max_length
    largest = options.batches.microbatch_size or max(1, _microbatch_tokens(step.device) // length)
    batch = options.batches.batch_size
    if batch is None:
        total = _expected_tokens(options, step, stream, pieces, min(largest * length, len(stream)))
        batch = max(1, min(suitable_batch(total), len(stream)) // length)
    units = -(-batch // largest)
    if options.batches.batch_size is None:
        return BatchPlan(batch // units, units)
    unit = -(-batch // units)
    if unit * units != batch:
        display.say(f"the batch is {unit * units} sequences instead of {batch}: {units} microbatches of {unit}")
    return BatchPlan(unit, units)


def _microbatch_tokens(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_MICROBATCH_TOKENS
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return min(_MOST_MICROBATCH_TOKENS, int(memory_gib * _TOKENS_PER_GIB))


def _expected_tokens(
    options: PretrainOptions, step: TrainStep, stream: TokenStream, pieces: PieceSource, tokens: int
) -> float:
    """Tokens that the budget will pay for; a budget of time is converted by timing three microbatches of `tokens`."""
    budget, batches = Budget.parse(options.budget), options.batches
    if budget.unit == "tokens":
        return budget.amount
    if budget.unit == "flops":
        return budget.amount / step.model.config.flops_per_token(batches.mask_rate, batches.max_length)
    while True:
        try:
            return budget.amount * _tokens_per_second(step, stream, pieces, tokens, batches)
        except torch.OutOfMemoryError:
            step.reset()
            torch.cuda.empty_cache()
            tokens //= 2
            if tokens < batches.max_length:
                raise TrainingFailed("out of memory with one sequence: choose a smaller --preset") from None


def _tokens_per_second(step: TrainStep, stream: TokenStream, pieces: PieceSource, tokens: int, batches) -> float:
    batch = BatchBuilder(stream, pieces, tokens, batches.max_length).build(Cursor())
    times = []
    for number in range(4):
        start = time.perf_counter()
        step.accumulate(batch, batches.mask_rate, number, 1.0)
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step.reset()
    return tokens / min(times[1:])


def _finish(setup: Setup, state: State, heldout_loss: float, dataset: Dataset, special: SpecialIds) -> None:
    model, folder = setup.step.model.eval(), setup.folder
    save_model(folder / "final", model, dataset.folder / "tokenizer.json")
    plot_loss(folder, setup.unigram_entropy)
    examples = fill_examples(model, dataset.tokenizer, special, dataset.split("heldout"))
    seconds = state.spent.seconds
    summary = {
        "heldout_loss": heldout_loss,
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
        f"{options.preset}, {parameters / 1e6:.1f} M parameters, on {options.device} in {options.dtype}; "
        f"{options.recipe} recipe, {options.batches.layout} sequences of {options.batches.max_length}, "
        f"batch {batch}{ramp} ({state.microbatch} at a time), lr {options.optimizer.lr:g} "
        f"{RECIPES[options.recipe].schedule}, budget {options.budget}"
    )


def _print_summary(display: Display, folder: Path, dataset: Dataset) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    energy = f", {summary['joules'] / 1000:,.1f} kJ" if summary["joules"] else ""
    display.say(
        f"\nheld-out loss     {summary['heldout_loss']:.4f} nats  (15 % hidden)\n"
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
