"""A model and its tokenizer as a folder for others: written aside, loaded back, compared, then given its name."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .config import ModelConfig
from .data.tokenizer import frame_texts, special_ids, special_tokens
from .errors import UserError
from .hugging_face import BERT, Family, family_of, write_config, write_weights
from .model import Bert
from .pretrained import load_tokenizer, open_pretrained
from .train.checkpoint import folder_aside

LARGEST_DIFFERENCE = 1e-4
"""Of two fp32 logits of the same model: sums in another order, passed on through its layers."""

# Some shorter than others, so that they are padded, and one longer than a local layer's window.
TEXTS = (
    "The capital of France is Paris.",
    "A function that calls itself is recursive; without an end it fills the stack.",
    "No.",
    "In 1969, two people walked on the Moon while a third one waited above it. " * 8,
)


@dataclass(frozen=True)
class Exported:
    """What was written. architecture: the stock class, or None; then `reason` says why there is none."""

    folder: Path
    architecture: str | None
    parameters: int
    bytes: int
    difference: float
    dropped: tuple[str, ...]
    """Weights that `checkpoint` has and a `Bert` has no place for."""
    reason: str = ""

    def summary(self) -> str:
        what = self.architecture or "cramfast's own"
        with_what = "transformers" if self.architecture else "cramfast.load"
        lines = [
            f"wrote    {self.folder}: {what}, {self.parameters / 1e6:.1f} M parameters, {self.bytes / 1e6:,.1f} MB",
            f"checked  loaded back with {with_what}: logits differ by at most {self.difference:.1e}",
        ]
        if self.dropped:
            lines.append(f"left out {', '.join(self.dropped)}")
        if self.architecture:
            lines.append(f'load it  transformers.AutoModelForMaskedLM.from_pretrained("{self.folder}")')
        else:
            lines.append(f"note     {self.reason}")
            lines.append(f'load it  cramfast.load("{self.folder}")')
        return "\n".join(lines)


def export(checkpoint: str | Path, target: Path, report: Callable[[str], None]) -> Exported:
    """Write the model that `cramfast.load` finds at `checkpoint`, and its tokenizer, as the folder `target`.

    report: called with the name of each stage. Raises UserError, with nothing written, when there is something at
    `target`, when there is no model or no tokenizer, or when what was written gives other logits.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target}: exists and is not an empty folder; give another --to")
    report(f"reading {checkpoint}")
    found = open_pretrained(checkpoint)
    if found.weights.fresh:
        raise UserError(f"--checkpoint {checkpoint}: holds no prediction head ({found.weights.fresh[0]} is not there)")
    model, tokenizer = found.model(), load_tokenizer(found.folder)
    try:
        family, reason = family_of(model.config), ""
    except UserError as error:
        family, reason = None, str(error)
    try:
        with folder_aside(target.resolve()) as folder:
            report(f"writing {target}")
            _write(folder, model, tokenizer, family)
            report("comparing")
            difference = _difference(model, tokenizer, folder, family)
            if not difference <= LARGEST_DIFFERENCE:
                raise UserError(
                    f"--to {target}: loaded back, its logits differ by {difference:.1e} (allowed are "
                    f"{LARGEST_DIFFERENCE:.0e}); nothing was written"
                )
    except OSError as error:
        raise UserError(f"--to {target}: {error.strerror or error}") from error
    return Exported(
        folder=target,
        architecture=family.architecture if family else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(path.stat().st_size for path in target.iterdir()),
        difference=difference,
        dropped=found.weights.dropped,
        reason=reason,
    )


def _write(folder: Path, model: Bert, tokenizer: Tokenizer, family: Family | None) -> None:
    special, config = special_ids(tokenizer), model.config
    framed = tokenizer.encode("a").ids
    if framed[:1] + framed[-1:] != [special.cls, special.sep]:
        frame_texts(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    weights, settings = model.state_dict(), {"cramfast": asdict(config)}
    if family is not None:
        weights, settings = write_weights(weights, config), write_config(config, special)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", settings),
        ("tokenizer_config.json", _tokenizer_settings(tokenizer, config, family)),
        ("special_tokens_map.json", _special_tokens(tokenizer)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    return {f"{name.strip('[]').lower()}_token": token for name, token in special_tokens(tokenizer).items()}


def _tokenizer_settings(tokenizer: Tokenizer, config: ModelConfig, family: Family | None) -> dict:
    # This class takes tokenizer.json as it is; BertTokenizer would put a normalizer of its own in its place.
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if family is BERT else ["input_ids", "attention_mask"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **_special_tokens(tokenizer),
    }


@torch.no_grad()
def _difference(model: Bert, tokenizer: Tokenizer, folder: Path, family: Family | None) -> float:
    """The largest difference, in fp32, of the logits of TEXTS from those of the model in `folder`."""
    tokenizer.enable_truncation(model.config.max_positions)
    sequences = [tokenizer.encode(text).ids for text in TEXTS]
    theirs = _stock_logits(folder, sequences) if family else _own_logits(open_pretrained(folder).model(), sequences)
    return max(
        float((ours - other).abs().max()) for ours, other in zip(_own_logits(model, sequences), theirs, strict=True)
    )


def _own_logits(model: Bert, sequences: list[list[int]]) -> list[torch.Tensor]:
    """fp32 logits (S, V) of each sequence of S tokens, all in one batch without padding."""
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.tensor([number for sequence in sequences for number in sequence])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return [*model.predict(model.encode(ids, cu_seqlens, max(lengths))).split(lengths)]


def _stock_logits(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The same from transformers, whose tokenizer pads the batch."""
    try:
        from transformers import AutoModelForMaskedLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("an export is tested by loading it with transformers: pip install transformers") from error
    logging.disable_progress_bar()
    model, report = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa", output_loading_info=True)
    left_over = {kind: names for kind, names in report.items() if names}
    if left_over:
        raise UserError(f"transformers does not load it as it should: {left_over}; nothing was written")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    if [row[real].tolist() for row, real in zip(batch["input_ids"], mask, strict=True)] != sequences:
        raise UserError("transformers reads other tokens from the exported tokenizer.json; nothing was written")
    return [logits[real] for logits, real in zip(model.eval().float()(**batch).logits, mask, strict=True)]
