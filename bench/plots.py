"""Plots of the results: one figure a module and device, one panel a work, one bar a peer."""

from pathlib import Path

from .cases import BOTH
from .ledger import Device, Module, Record
from .tables import OURS, by_work, micros, percent, thousands

# Two colours of Okabe and Ito's palette, which people with colour blindness tell apart, and a neutral grey.
_OURS_COLOUR, _PEER_COLOUR, _LIMIT_COLOUR = "#0072B2", "#B0B0B0", "#D55E00"
# Beyond this many only forward + backward is shown: it is what a training step pays.
_MOST_PANELS = 12
_OPERATOR_LABEL = "GPU time a call, µs; dashed: its bytes at the speed of a device-to-device copy"
_STEP_LABEL = "tokens a second; in brackets: the step's FLOPs of the rate of a large matrix product"
_BAR_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 0.27, 0.62, 8.0


def draw(device: Device, module: Module, path: Path) -> None:
    """What each who takes or reaches in every work, written to `path` as PNG: of operators GPU time a call in µs and a
    line at what the bytes take at copy speed, of training steps tokens a second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    works: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(module.records, key=by_work):
        works.setdefault((record.work, record.dtype), []).append(record)
    if len(works) > _MOST_PANELS:
        works = {key: records for key, records in works.items() if records[0].direction == BOTH} or works
    if module.is_of_steps:
        # Who runs alone is compared with nobody.
        works = {key: records for key, records in works.items() if len(records) > 1} or works
    heights = [_PANEL_INCHES + _BAR_INCHES * len(records) for records in works.values()]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(works), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    panel, label = (_step_panel, _STEP_LABEL) if module.is_of_steps else (_panel, _OPERATOR_LABEL)
    for axes, ((work, dtype), records) in zip(panels, works.items(), strict=True):
        panel(axes, device, f"{work}, {dtype}", records)
    panels[-1].set_xlabel(label, fontsize=9)
    figure.suptitle(f"{module.environment['device']}, revision {module.environment['revision']}", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _panel(axes, device: Device, title: str, records: list[Record]) -> None:
    times = [record.seconds * 1e6 for record in records]
    _bars(axes, title, records, times)
    limit, rate = 0.0, device.copy_rate()
    if rate and records[0].bytes:
        limit = records[0].bytes / rate * 1e6
        axes.axvline(limit, color=_LIMIT_COLOUR, linestyle="--", linewidth=1.2)
    for place, record in enumerate(records):
        share = device.copy_share(record)
        text = f" {micros(record.seconds)} µs" + (f" ({percent(share)} of copy)" if share else "")
        # A little short of the line, a bar's text would lie on it.
        near = 0.9 * limit < times[place] < limit
        axes.text(limit if near else times[place], place, text, va="center", fontsize=8)


def _step_panel(axes, device: Device, title: str, records: list[Record]) -> None:
    rates = [record.tokens_per_s for record in records]
    _bars(axes, title, records, rates)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for place, record in enumerate(records):
        share = device.matmul_share(record)
        text = f" {thousands(record.tokens_per_s)}" + (f" ({percent(share)} of matmul)" if share else "")
        axes.text(rates[place], place, text, va="center", fontsize=8)


def _bars(axes, title: str, records: list[Record], values: list[float]) -> None:
    """A bar a record, this project's in its colour, with room for a text behind each."""
    colours = [_OURS_COLOUR if record.who == OURS else _PEER_COLOUR for record in records]
    axes.barh([record.who for record in records], values, color=colours, height=0.75)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.25)
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
