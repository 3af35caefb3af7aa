"""Models that exist: those of cramfast and of Hugging Face, in a folder or on the hub, and their tokenizers."""

import hashlib
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .config import ModelConfig
from .data.tokenizer import bert_tokenizer, open_tokenizer
from .errors import UserError
from .hugging_face import StoredWeights, read_config, read_weights
from .model import Bert
from .train.checkpoint import load_model, model_folder, read_json, read_tensors

# In this order, whichever is there first; an index names the files of a model that is stored in several.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", *_WEIGHTS[1::2])
_SAFE_FILES = ("model.safetensors", "model-*.safetensors")
_PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-*.bin")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Embeddings are often given rows beyond the vocabulary, up to the next multiple of 128.
_SPARE_ROWS = 128


@dataclass(frozen=True)
class Pretrained:
    """What a folder holds: a config, weights, and where they are."""

    folder: Path
    config: ModelConfig
    weights: StoredWeights

    def model(self) -> Bert:
        """The model, in evaluation mode; what the folder lacks (`weights.fresh`) is random."""
        model = Bert(self.config)
        model.load_state_dict(self.weights.tensors, strict=False)
        return model.eval()

    def digest(self) -> str:
        """A hash of the config and the weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.weights.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load(path: str | Path) -> Bert:
    """The `Bert` of a folder or a hub id, as `cramfast.load` takes them, in evaluation mode on the CPU.

    Warns of weights that the folder lacks: those of a prediction head that was not stored.
    """
    pretrained = open_pretrained(path)
    if pretrained.weights.fresh:
        names = ", ".join(pretrained.weights.fresh)
        warnings.warn(f"{path}: holds no prediction head; freshly initialised: {names}", stacklevel=3)
    return pretrained.model()


def open_pretrained(path: str | Path) -> Pretrained:
    """Read and check what `load` takes. Raises UserError for anything that does not fit together."""
    folder = _locate(path)
    settings = read_json(folder / "config.json")
    if "cramfast" in settings or not {"model_type", "architectures"} & settings.keys():
        model = load_model(folder)
        found = Pretrained(folder, model.config, StoredWeights(model.state_dict(), (), ()))
    else:
        config = _read_config(folder, settings)
        found = Pretrained(folder, config, _read_weights(folder, config))
    tokenizer = _find_tokenizer(folder)
    if tokenizer is not None:
        _expect_vocabulary(tokenizer, found)
    return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer beside the model that `load` takes: its tokenizer.json, or one built from BERT's old vocab.txt.

    It neither truncates nor pads. Raises UserError when there is none, or when it lacks one of BERT's special tokens.
    """
    folder = _locate(path)
    tokenizer = _find_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: holds no tokenizer (no tokenizer.json or vocab.txt)")
    return tokenizer


def _locate(path: str | Path) -> Path:
    """The folder with the weights."""
    folder = Path(path)
    if folder.is_dir():
        found = folder if _weights_file(folder) is not None else model_folder(folder)
        if found is None:
            raise UserError(f"{folder}: holds no model (no {', '.join(_WEIGHTS[::2])}, final/ or checkpoint-STEP/)")
        if _weights_file(found) is None:
            raise UserError(f"{found / _WEIGHTS[0]}: damaged: not there")
        return found
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"{path}: no such folder")
    return _download(str(path))


def _download(name: str) -> Path:
    """The folder of a model of the hub, in the cache of huggingface_hub. What is not loaded is refused before its
    weights are fetched; pickled weights are fetched only where there are no others."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        hint = "to get it from the Hugging Face hub, pip install huggingface_hub"
        raise UserError(f"{name}: no such folder; {hint}") from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES))
        _read_config(folder, read_json(folder / "config.json"))
        snapshot_download(name, allow_patterns=_SAFE_FILES)
        if not any((folder / file).is_file() for file in _WEIGHTS[:2]):
            snapshot_download(name, allow_patterns=_PICKLED_FILES)
    except UserError:
        raise
    except Exception as error:  # the hub and its transports raise dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such folder, and the Hugging Face hub does not give it: {reason}") from error
    if _weights_file(folder) is None:
        raise UserError(f"{name}: this model of the hub has no weights of PyTorch ({', '.join(_WEIGHTS[::2])})")
    return folder


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def _read_config(folder: Path, settings: dict) -> ModelConfig:
    try:
        return read_config(settings)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def _read_weights(folder: Path, config: ModelConfig) -> StoredWeights:
    file = _weights_file(folder)
    try:
        return read_weights(_stored_tensors(file), config)
    except UserError as error:
        about = "" if str(error).startswith(str(folder)) else f"{file}: "
        raise UserError(f"{about}{error}") from error


def _stored_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one of _WEIGHTS."""
    if file.suffix != ".json":
        return read_tensors(file) if file.suffix == ".safetensors" else _unpickled(file)
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{file}: damaged: names no files (weight_map)")
    tensors = {}
    for name in sorted({*map(str, shards.values())}):
        # An index names its neighbours; a path would lead elsewhere.
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{file}: names {name}, which is no file of weights beside it")
        tensors |= _stored_tensors(file.with_name(name))
    return tensors


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, of which nothing but tensors is ever built."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors, or is damaged"
        raise UserError(f"{file}: refused, since {reason}; get the model as model.safetensors") from error
    except Exception as error:  # damage shows in as many ways as there are formats
        raise UserError(f"{file}: damaged or unreadable: {' '.join(str(error).split())}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: holds no weights by name")
    return tensors


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    if folder.name.startswith("checkpoint-") and not (folder / "tokenizer.json").is_file():
        folder = folder.absolute().parent  # the checkpoints of a run share its tokenizer
    if (folder / "tokenizer.json").is_file():
        return open_tokenizer(folder / "tokenizer.json", "")
    vocabulary = folder / "vocab.txt"
    if not vocabulary.is_file():
        return None
    settings = folder / "tokenizer_config.json"
    return bert_tokenizer(vocabulary, read_json(settings) if settings.is_file() else {})


def _expect_vocabulary(tokenizer: Tokenizer, found: Pretrained) -> None:
    """Raise UserError when tokenizer and embedding are of different vocabularies."""
    entries, rows = max(tokenizer.get_vocab().values()) + 1, found.config.vocab_size
    if not entries <= rows < entries + _SPARE_ROWS:
        raise UserError(
            f"{found.folder}: its tokenizer has {entries:,} entries, its config.json a vocab_size of {rows:,}; "
            f"they belong to different models"
        )
