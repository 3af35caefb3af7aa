"""Checkpoints and saved models: safetensors and JSON, written aside and renamed when complete.

`checkpoint-STEP/` holds config.json and model.safetensors (the model), trainer.safetensors (optimizer, random state)
and trainer.json (the rest of what a resumed run needs). `final/` holds a model and its tokenizer.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import ModelConfig
from ..errors import UserError
from ..model import Bert

_RANDOM = "random."


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `target` once it is complete and on disk."""
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.iterdir():
            path.chmod(aside.stat().st_mode & 0o666)  # safetensors keeps its files from all but their owner
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: dict) -> None:
    """Write JSON so that `path` is either as before or complete."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    _sync(aside)
    aside.replace(path)


def save_model(target: Path, model: Bert, tokenizer: Path) -> None:
    """Save a model with its tokenizer.json as the folder `target`."""
    with folder_aside(target) as folder:
        _write_model(folder, model)
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _write_model(folder: Path, model: Bert) -> None:
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"cramfast": asdict(model.config)}, indent=1) + "\n")


def load_model(folder: Path) -> Bert:
    """The model in a checkpoint or a `final`.

    Raises UserError when there is none, or when weights are missing, unknown or of the wrong shape.
    """
    settings = read_json(folder / "config.json").get("cramfast")
    if settings is None:
        raise UserError(f"{folder / 'config.json'}: not a cramfast model's")
    try:
        config = ModelConfig(**settings)
    except TypeError as error:  # a setting is unknown or missing
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    model = Bert(config)
    _load_weights(model, folder)
    return model.eval()


def model_folder(run: Path) -> Path | None:
    """Where the model of a run is: its `final`, else its newest checkpoint."""
    return run / "final" if (run / "final").is_dir() else latest_checkpoint(run)


def _load_weights(model: Bert, folder: Path) -> None:
    try:
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(f"{folder / 'model.safetensors'}: {' '.join(str(error).split())}") from error


def save_checkpoint(
    run: Path, step: int, model: Bert, tensors: dict[str, torch.Tensor], state: dict, keep: int
) -> Path:
    """Save `checkpoint-STEP` in the folder of a run; delete all but the newest `keep`, and what a killed save left.

    tensors: those that a resumed run needs beside the model; state: JSON, which `load_checkpoint` gives back.
    """
    target = run / f"checkpoint-{step}"
    if target.is_dir():
        return target  # it holds the same; a crash while it is replaced could leave none
    with folder_aside(target) as folder:
        _write_model(folder, model)
        save_file(tensors | _random_state(), folder / "trainer.safetensors")
        (folder / "trainer.json").write_text(json.dumps(state, indent=1) + "\n")
    for old in (*_checkpoints(run)[:-keep], *run.glob(".checkpoint-*.partial")):
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, model: Bert, tensors: dict[str, torch.Tensor]) -> dict:
    """Put a checkpoint back into model and tensors, in place; returns its state. Raises UserError when it is damaged or
    holds other tensors."""
    stored, state = read_tensors(path / "trainer.safetensors"), read_json(path / "trainer.json")
    _load_weights(model, path)
    random = {name: stored.pop(name) for name in [*stored] if name.startswith(_RANDOM)}
    differing = sorted(
        name
        for name in stored.keys() | tensors.keys()
        if name not in stored or name not in tensors or stored[name].shape != tensors[name].shape
    )
    if differing or f"{_RANDOM}cpu" not in random:
        raise UserError(f"{path / 'trainer.safetensors'}: does not fit this model: {(differing or [_RANDOM])[0]}")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
    _restore_random_state(random)
    return state


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = _checkpoints(run)
    return found[-1] if found else None


def _checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _random_state() -> dict[str, torch.Tensor]:
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states[f"{_RANDOM}cpu"])
    if torch.cuda.is_available() and f"{_RANDOM}cuda" in states:
        torch.cuda.set_rng_state(states[f"{_RANDOM}cuda"])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises UserError when it is damaged or not there."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or unreadable: {error}") from error


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError when it is damaged or not there."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or unreadable: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: holds no JSON object")
    return value
