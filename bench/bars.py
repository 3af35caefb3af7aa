"""The bars: what the kernels have to reach, as data, and whether a results folder says they do."""

from dataclasses import dataclass, replace

from .ledger import Device, Record
from .tables import BEST, OURS

COPY = "share of copy bandwidth"
MATMUL = "share of the matmul peak"
SPEED = "speed"
HOST = "host time"
EXTRA = "memory beside the results"
MEMORY = "less memory"
TIME = "time"
_COMPARED = {SPEED: "seconds", HOST: "host_seconds", MEMORY: "peak_mib"}


def _suffix(case: str) -> str:
    """The named part of a case: "65536x3072-tanh" → "-tanh"."""
    return "-" + case.split("-", 1)[1] if "-" in case else ""


@dataclass(frozen=True)
class Bar:
    """At least `least` of `measure` for this project on `work` (operator/direction, or one case's full name).

    `suffix` picks cases by the end of their name: None any, "" those without one. SPEED compares GPU seconds, HOST
    host seconds with those of `against`, whose case ends in `against_suffix` where that differs; MEMORY is how many
    times this project's peak goes into that of `against`. EXTRA is how many times the memory that a call takes, its
    results aside, goes into `limit` MiB, TIME how many times its time goes into `limit` seconds. Against BEST, the
    fastest peer that was measured counts, and the verdict names those of `among` that were not.
    """

    work: str
    measure: str
    least: float
    against: str = ""
    suffix: str | None = None
    against_suffix: str | None = None
    among: tuple[str, ...] = ()
    limit: float = 0.0

    def applies(self, record: Record) -> bool:
        if record.who != OURS or self.work not in (record.work, f"{record.operator}/{record.direction}"):
            return False
        return self.suffix is None or _suffix(record.case) == self.suffix

    @property
    def operator(self) -> str:
        return self.work.split("/")[0]

    @property
    def names_a_case(self) -> bool:
        return self.work.count("/") > 1


def _attention(case: str, least: float) -> Bar:
    """A bar against the best peer, of which flash-attn-4 is one, though few machines have it."""
    return Bar(f"varlen_attention/fwd+bwd/{case}", SPEED, least, BEST, among=("flash-attn-4",))


def _rotary(case: str) -> Bar:
    """Rotary embedding costs at most 5 % on top of this project's own time without it."""
    return Bar(f"varlen_attention/fwd+bwd/{case}-rotary", SPEED, 1 / 1.05, OURS, against_suffix=_suffix(case))


def _step(case: str, measure: str, least: float, against: str = "", lean: bool = False) -> Bar:
    """A bar on a training step; lean: on the one that saves fewer activations, beside the same peer."""
    if lean:
        return Bar(f"step/train/{case}-lean", measure, least, against, against_suffix=_suffix(case))
    return Bar(f"step/train/{case}", measure, least, against)


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
    Bar("geglu_product/fwd", SPEED, 1.0, "cramfast-apart"),
    Bar("geglu_product_backward/fwd", SPEED, 1.0, "cramfast-apart"),
    Bar("embed/fwd", COPY, 0.80),
    Bar("embed/fwd+bwd", SPEED, 2.0, "torch-eager"),
    _attention("all-64", 2.2),
    _attention("all-128", 1.3),
    _attention("all-256", 1.1),
    _attention("all-512", 0.95),
    _attention("ragged-16-128", 2.0),
    _attention("ragged-32-512", 1.2),
    _rotary("all-128"),
    _rotary("ragged-16-128"),
    Bar("mlm_loss/fwd+bwd", SPEED, 1.1, "torch-compile", suffix=""),
    Bar("mlm_loss/fwd+bwd", EXTRA, 1.0, suffix="", limit=300),
    Bar("mlm_loss/fwd+bwd", SPEED, 1.2, "liger", suffix="-low", against_suffix=""),
    Bar("mlm_loss/fwd+bwd", EXTRA, 1.0, suffix="-low", limit=64),
    _step("crammed-bert-512x128", SPEED, 1.22, "plain-compile"),
    _step("crammed-bert-512x128", SPEED, 1.25, "cramming-original"),
    _step("crammed-bert-512x128", MATMUL, 0.60),
    _step("crammed-bert-512x128", SPEED, 1.22, "plain-compile", lean=True),
    _step("crammed-bert-512x128", MEMORY, 1 / 0.65, "plain-compile", lean=True),
    _step("crammed-bert-128x128", SPEED, 1.35, "plain-compile"),
    _step("bert-base-ragged-16-128", SPEED, 3.5, "hf-eager"),
    _step("bert-base-ragged-16-128", SPEED, 2.3, "hf-compile"),
    Bar("startup/cold", TIME, 1.0, limit=20.0),
    Bar("startup/warm", TIME, 1.0, limit=5.0),
    Bar("finetune/train/cramfast-base-mnli", SPEED, 2.5, "hf-eager"),
    Bar("finetune/train/cramfast-base-sst2", SPEED, 2.5, "hf-eager"),
    Bar("accelerate/train/bert-base-ragged-16-128", SPEED, 2.5, "hf-eager"),
    Bar("accelerate/train/bert-base-ragged-16-128", MEMORY, 2.0, "hf-eager"),
    Bar("accelerate/train/glue-mnli", SPEED, 1.8, "hf-eager"),
)


@dataclass(frozen=True)
class Verdict:
    """One bar on one work of one device: `measured` is None where a record that it needs is not there.

    `rival` tells what `against` leaves open: who was BEST, or another case. `without`: who of the bar's `among` was not
    measured.
    """

    bar: Bar
    device: str
    work: str
    measured: float | None
    rival: str = ""
    without: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        return self.measured is not None and self.measured >= self.bar.least

    def __str__(self) -> str:
        bar = self.bar
        what = bar.measure + (f" against {bar.against}" if bar.against else "")
        what += f" ({self.rival})" if self.rival else ""
        least = f"bar {_value(bar, bar.least)}" + (f" (without {', '.join(self.without)})" if self.without else "")
        if self.measured is None:
            return f"absent  {self.device}  {self.work}: {what} not measured, {least}"
        word = "held  " if self.held else "MISSED"
        return f"{word}  {self.device}  {self.work}: {what} {_value(bar, self.measured)}, {least}"


def evaluate(device: Device, bars: tuple[Bar, ...] = BARS) -> list[Verdict]:
    """Every bar on every work that it speaks of; a bar whose work was not measured has one verdict, absent.

    Bars on single cases of an operator are silent until something of it was measured: before, a line each says nothing.
    """
    measured = {record.operator for record in device.records}
    verdicts = []
    for bar in bars:
        records = [record for record in device.records if bar.applies(record)]
        verdicts += [_verdict(device, bar, record) for record in records]
        if not records and (bar.operator in measured or not bar.names_a_case):
            verdicts.append(Verdict(bar, device.folder, bar.work, None))
    return verdicts


def _verdict(device: Device, bar: Bar, record: Record) -> Verdict:
    """The bar on this record of ours."""
    verdict = Verdict(bar, device.folder, f"{record.work} {record.dtype}", None)
    if bar.measure == COPY:
        return replace(verdict, measured=device.copy_share(record))
    if bar.measure == MATMUL:
        return replace(verdict, measured=device.matmul_share(record))
    if bar.measure == EXTRA:
        return replace(verdict, measured=_memory_left(bar, record))
    if bar.measure == TIME:
        return replace(verdict, measured=bar.limit / record.seconds)
    other = _other(device, bar, record)
    if other is None:
        return verdict
    rival = other.who if bar.against == BEST else other.case if other.work != record.work else ""
    without = tuple(who for who in bar.among if device.find(other.work, who, record.dtype) is None)
    return replace(verdict, measured=_ratio(bar, record, other), rival=rival, without=without)


def _other(device: Device, bar: Bar, record: Record) -> Record | None:
    """What the bar compares the record with."""
    if bar.against == BEST:
        return device.best(record.work, record.dtype, besides=OURS)
    work = record.work
    if bar.against_suffix is not None:
        work = work.removesuffix(_suffix(record.case)) + bar.against_suffix
    return device.find(work, bar.against, record.dtype)


def _ratio(bar: Bar, record: Record, other: Record) -> float | None:
    """How many times what the bar looks at, a clock or memory, goes into that of the other."""
    field = _COMPARED[bar.measure]
    mine, theirs = getattr(record, field), getattr(other, field)
    return None if mine is None or theirs is None else theirs / mine


def _memory_left(bar: Bar, record: Record) -> float | None:
    if record.peak_mib is None or record.results_mib is None:
        return None
    return bar.limit / max(record.peak_mib - record.results_mib, 1.0)


def _value(bar: Bar, value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if bar.measure in (COPY, MATMUL) else f"{value:.2f}×"


def summary(devices: list[Device]) -> str:
    """The README's text: how many bars each device holds, and every one that it does not."""
    parts = []
    for device in devices:
        verdicts = evaluate(device)
        others = [f"- `{verdict}`" for verdict in verdicts if not verdict.held]
        held = f"{len(verdicts) - len(others)} of {len(verdicts)} bars held on {device.folder}"
        parts.append("\n".join([f"{held}; not held:\n", *others] if others else [f"{held}."]))
        without = sorted({who for verdict in verdicts for who in verdict.without})
        if without:
            parts.append(f"The best peers on {device.folder} are without {', '.join(without)}, not measured there.")
    return "\n\n".join(parts) or "Nothing measured yet."
