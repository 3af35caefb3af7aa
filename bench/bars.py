"""The bars: what the kernels have to reach, as data, and whether a results folder says they do."""

from dataclasses import dataclass

from .ledger import Device, Record
from .tables import OURS

COPY = "share of copy bandwidth"
SPEED = "speed"
HOST = "host time"


@dataclass(frozen=True)
class Bar:
    """At least `least` of `measure` for this project on `work` (operator/direction).

    `suffix` picks cases by the end of their name: None any, "" those without one. SPEED compares GPU seconds, HOST
    host seconds with those of `against`, whose case ends in `against_suffix` where that differs.
    """

    work: str
    measure: str
    least: float
    against: str = ""
    suffix: str | None = None
    against_suffix: str | None = None

    def applies(self, record: Record) -> bool:
        if record.who != OURS or f"{record.operator}/{record.direction}" != self.work:
            return False
        return self.suffix is None or _suffix(record.case) == self.suffix


BARS = (
    Bar("layer_norm/fwd", COPY, 0.90),
    Bar("layer_norm/fwd+bwd", COPY, 0.85),
    Bar("layer_norm/fwd+bwd", SPEED, 1.3, "torch-compile"),
    Bar("layer_norm/fwd+bwd", SPEED, 3.5, "torch-eager"),
    Bar("layer_norm/fwd+bwd", SPEED, 3.5, "liger"),
    Bar("layer_norm/fwd+bwd", SPEED, 1.0, "apex"),
    Bar("layer_norm/fwd", HOST, 1.0, "torch-eager"),
    Bar("layer_norm/fwd+bwd", HOST, 1.0, "torch-eager"),
    Bar("add_layer_norm/fwd+bwd", COPY, 0.85),
    Bar("add_layer_norm/fwd+bwd", SPEED, 1.3, "torch-compile"),
    Bar("gelu/fwd", COPY, 0.90),
    Bar("gelu/fwd+bwd", COPY, 0.90),
    Bar("geglu/fwd", COPY, 0.90),
    Bar("geglu/fwd+bwd", COPY, 0.90),
    Bar("geglu/fwd+bwd", SPEED, 2.0, "torch-compile", suffix=""),
    Bar("geglu/fwd", SPEED, 1.0, "liger", against_suffix="-tanh"),
    Bar("geglu/fwd+bwd", SPEED, 1.0, "liger", against_suffix="-tanh"),
    Bar("embed/fwd", COPY, 0.80),
    Bar("embed/fwd+bwd", SPEED, 2.0, "torch-eager"),
)


@dataclass(frozen=True)
class Verdict:
    """One bar on one work of one device: `measured` is None where a record that it needs is not there."""

    bar: Bar
    device: str
    work: str
    measured: float | None

    @property
    def held(self) -> bool:
        return self.measured is not None and self.measured >= self.bar.least

    def __str__(self) -> str:
        bar = self.bar
        what = bar.measure + (f" against {bar.against}" if bar.against else "")
        if self.measured is None:
            return f"absent  {self.device}  {self.work}: {what} not measured, bar {_value(bar, bar.least)}"
        word = "held  " if self.held else "MISSED"
        return f"{word}  {self.device}  {self.work}: {what} {_value(bar, self.measured)}, bar {_value(bar, bar.least)}"


def evaluate(device: Device, bars: tuple[Bar, ...] = BARS) -> list[Verdict]:
    """Every bar on every work that it speaks of; a bar whose work was not measured has one verdict, absent."""
    verdicts = []
    for bar in bars:
        records = [record for record in device.records if bar.applies(record)]
        verdicts += [Verdict(bar, device.folder, f"{r.work} {r.dtype}", _measure(device, bar, r)) for r in records]
        if not records:
            verdicts.append(Verdict(bar, device.folder, bar.work, None))
    return verdicts


def _measure(device: Device, bar: Bar, record: Record) -> float | None:
    """The quantity that the bar bounds from below, for this record of ours."""
    if bar.measure == COPY:
        return device.copy_share(record)
    work = record.work
    if bar.against_suffix is not None:
        work = work.removesuffix(_suffix(record.case)) + bar.against_suffix
    other = device.find(work, bar.against, record.dtype)
    if other is None:
        return None
    if bar.measure == SPEED:
        return other.seconds / record.seconds
    if record.host_seconds is None or other.host_seconds is None:
        return None
    return other.host_seconds / record.host_seconds


def _suffix(case: str) -> str:
    """The named part of a case: "65536x3072-tanh" → "-tanh"."""
    return "-" + case.split("-", 1)[1] if "-" in case else ""


def _value(bar: Bar, value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if bar.measure == COPY else f"{value:.2f}×"


def summary(devices: list[Device]) -> str:
    """The README's text: how many bars each device holds, and every one that it does not."""
    parts = []
    for device in devices:
        verdicts = evaluate(device)
        others = [f"- `{verdict}`" for verdict in verdicts if not verdict.held]
        held = f"{len(verdicts) - len(others)} of {len(verdicts)} bars held on {device.folder}"
        parts.append("\n".join([f"{held}; not held:\n", *others] if others else [f"{held}."]))
    return "\n\n".join(parts) or "Nothing measured yet."
