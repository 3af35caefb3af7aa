"""What a person sees of a run: the live line, metrics.jsonl, loss.png, TensorBoard."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Without a terminal a line is printed this often instead of a bar.
_PLAIN_SECONDS = 10.0
METRICS = "metrics.jsonl"
"""The file of a run with a line for every record."""


class Display:
    """Prints lines, and keeps one bar beneath them where the output is a terminal."""

    def __init__(self):
        self.console = Console(highlight=False, soft_wrap=True)
        self._last_line = -math.inf

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A `report` function for `data.prepare`: a bar with MB/s and the time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        stage_now, began, task = None, 0.0, None
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:

            def report(stage: str, done: int, total: int | None) -> None:
                nonlocal stage_now, began, task
                now = time.monotonic()
                if stage != stage_now:
                    stage_now, began = stage, now
                    size = "" if total is None else f" ({total / 1e6:,.1f} MB)"
                    self.say(f"{stage}{size}")
                    if task is not None:
                        bar.remove_task(task)
                    task = bar.add_task(stage, total=total, rate="")
                    self._last_line = now
                rate = f"{done / 1e6 / max(now - began, 1e-3):.1f} MB/s"
                bar.update(task, completed=done, rate=rate)
                if not self.console.is_terminal and now - self._last_line > _PLAIN_SECONDS:
                    self._last_line = now
                    left = "" if not total or not done else f", {(total - done) / done * (now - began):.0f} s left"
                    self.say(f"{stage}: {done / 1e6:,.0f} MB read, {rate}{left}")

            yield report

    @contextmanager
    def training(self) -> Iterator[Callable[[dict, float, float], None]]:
        """A function to call with (metrics record, fraction of the budget spent, seconds left)."""
        with self.bar("the first update compiles and warms up ...") as update:
            yield lambda record, fraction, left: update(fraction, _training_line(record, left))

    @contextmanager
    def bar(self, line: str) -> Iterator[Callable[[float, str], None]]:
        """A function to call with (share that is done, a line about it); `line` stands there at first."""
        columns = (BarColumn(bar_width=20), TextColumn("{task.percentage:5.1f}%"), TextColumn("{task.fields[line]}"))
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=1.0, line=line)

            def update(share: float, line: str) -> None:
                bar.update(task, completed=share, line=line)
                now = time.monotonic()
                if not self.console.is_terminal and now - self._last_line > _PLAIN_SECONDS:
                    self._last_line = now
                    self.say(f"{share:6.1%}  {line}")

            yield update


def _training_line(record: dict, left: float) -> str:
    parts = [
        f"step {record['step']:,}",
        f"loss {record['loss']:.3f}" if record["loss"] is not None else "loss not finite",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:,.0f} tokens/s" if record["tokens_per_s"] else "timing ...",
        f"MFU {record['mfu']:.0%}",
        f"{record['memory_mib'] / 1024:.1f} GiB",
    ]
    if math.isfinite(left):
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Metrics:
    """metrics.jsonl, one record a line, and TensorBoard where it is installed."""

    def __init__(self, run: Path, from_step: int, ended: bool = False):
        """Open for appending; records after `from_step`, left by a run that was cut off, are dropped.

        ended: `from_step` is the last, whose held-out loss, measured after its checkpoint, is dropped as well.
        """
        self.path = run / METRICS
        kept = [record for record in read_metrics(self.path) if record["step"] <= from_step]
        if ended:
            kept = [record for record in kept if record["step"] < from_step or "heldout_loss" not in record]
        aside = self.path.with_name(f".{METRICS}.partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        aside.replace(self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 - open for the life of the run
        self._board = _tensorboard(run, from_step)

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(run: Path, from_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard", purge_step=from_step + 1)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_loss(run: Path, unigram_entropy: float) -> None:
    """Draw loss.png: training and held-out loss over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    records = read_metrics(run / METRICS)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for field, style in (
        ("loss", {"linewidth": 1, "color": "tab:blue", "alpha": 0.7, "label": "training"}),
        ("heldout_loss", {"marker": "o", "color": "tab:orange", "label": "held out, 15 % hidden"}),
    ):
        points = [(record["tokens"], record[field]) for record in records if record.get(field) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.axhline(unigram_entropy, linestyle=":", color="gray", label="unigram entropy of the corpus")
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("loss (nats)")
    axes.set_title(run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    aside = run / ".loss.partial.png"
    figure.savefig(aside)
    pyplot.close(figure)
    aside.replace(run / "loss.png")
