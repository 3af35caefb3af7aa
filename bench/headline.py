"""What a reader wants to know first, from the results: a few lines for the top of the README."""

from dataclasses import dataclass

from cramfast.downstream.table import COLUMNS, medians, percent

from .glue import PRETRAINED, RANDOM
from .ledger import Device
from .tables import OURS, times

_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Claim:
    """`what` runs as fast as the record of `work` says, beside `rivals`: (who, what that is)."""

    what: str
    work: str
    rivals: tuple[tuple[str, str], ...]


_CLAIMS = (
    Claim(
        "a training step of `crammed-bert`, 512 × 128",
        "step/train/crammed-bert-512x128",
        (("plain-compile", "plain PyTorch under torch.compile"), ("cramming-original", "the original code")),
    ),
    Claim(
        "one of `bert-base` on ragged text",
        "step/train/bert-base-ragged-16-128",
        (("hf-compile", "Hugging Face's BERT under torch.compile"), ("hf-eager", "the same in eager mode")),
    ),
    Claim(
        "finetuning Hugging Face's BERT-base after `cramfast.accelerate`",
        "accelerate/train/glue-mnli",
        (("hf-eager", "without"),),
    ),
)


def headline(devices: list[Device]) -> str:
    """A list for every device of which something of this was measured."""
    parts = []
    for device in devices:
        lines = [*_speeds(device), *_scores(device)]
        if lines:
            measured = [module.environment for module in device.modules.values()]
            name = (measured or [device.glue["environment"]])[0]["device"]
            parts.append(f"Measured on one {name}:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) or "Nothing measured yet."


def _speeds(device: Device) -> list[str]:
    lines = []
    for claim in _CLAIMS:
        record = device.find(claim.work, OURS, _DTYPE)
        if record is None:
            continue
        speeds = ((device.speed(record, who), name) for who, name in claim.rivals)
        beside = " and ".join(f"{times(speed)} times as fast as {name}" for speed, name in speeds if speed is not None)
        lines.append(
            f"{claim.what}: {round(record.tokens_per_s, -2):,.0f} tokens/s" + (f", {beside}" if beside else "")
        )
    return lines


def _scores(device: Device) -> list[str]:
    """Those of the tasks that were finetuned, of several numbers the first."""
    if device.glue is None:
        return []
    found = {name: medians(row) for name, row in device.glue["rows"].items()}
    first = [(column.title.split()[0], column.numbers[0]) for column in COLUMNS]
    known = [(title, number) for title, number in first if number in found[PRETRAINED]]
    told = [f"{title} {percent(found[PRETRAINED][number])}{_without(found, number)}" for title, number in known]
    return [f"GLUE of the encoder pretrained [below](#measured-so-far) (of random weights): {', '.join(told)}"]


def _without(found: dict[str, dict], number: tuple) -> str:
    value = found.get(RANDOM, {}).get(number)
    return "" if value is None else f" ({percent(value)})"
