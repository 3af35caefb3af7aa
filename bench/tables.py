"""Results as text: the table at the end of a run, the README's tables, a comparison of two revisions."""

import re
from collections.abc import Iterable

from .cases import BOTH, FORWARD
from .ledger import LIMITS, STARTUP, Device, Module, Record

OURS = "cramfast"
# In the place of a who's name: the fastest that was measured besides this project.
BEST = "best"
_ORDER = (OURS, "torch-eager", "torch-compile")
_RIVALS = {"torch-compile": "× compile", "torch-eager": "× eager"}
_STEP_HEAD = ("who", "ms a step", "tokens/s", "MFU", "peak GiB", "J per M tokens")
_CARD_HEAD = ("memory", "microbatch", "activations", "tokens/s", "of all", "MFU", "peak GiB", "J per M tokens")
# The end of a case on the memory of a smaller card.
_CARD = re.compile(r"-(\d+)gb$")
_REGRESSION = 1.05


def run_table(device: Device, ran: set[tuple[str, str, str]]) -> list[str]:
    """Lines of work, who, µs, share of copy bandwidth and speed against the best peer, of the records that ran."""
    records = sorted((r for r in device.records if (r.work, r.who, r.dtype) in ran), key=by_work)
    rows = [("work", "who", "dtype", "µs", "of copy", "× best", "")]
    for record in records:
        share, speed = device.copy_share(record), _speed(device, record, BEST)
        note = record.note if record.tokens_per_s is None else _pace(device, record)
        measured = (micros(record.seconds), percent(share), times(speed), note)
        rows.append((record.work, record.who, record.dtype, *measured))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_aligned(row, widths).rstrip() for row in rows]


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = (cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
    return "  ".join(cells)


def _pace(device: Device, record: Record) -> str:
    """A training step's tokens a second, share of the matmul peak, memory and energy."""
    _, _, pace, share, peak, joules = _step_row(device, record)
    named = ((pace, "tokens/s"), (share, "of matmul"), (peak, "GiB"), (joules, "J per M tokens"))
    return ", ".join(f"{value} {unit}" for value, unit in named if value)


def module_tables(name: str, devices: list[Device], plot_folder: str) -> str:
    """The README's text for one module: for every device its tables, its environment and its plot."""
    parts = []
    for device in devices:
        if module := device.modules.get(name):
            parts += [*_tables(device, module), _environment(module.environment)]
            if module.has_plot:
                parts.append(f"![{name} on {module.environment['device']}]({plot_folder}/{device.folder}/{name}.png)")
    return "\n\n".join(parts) or "Nothing measured yet."


def _tables(device: Device, module: Module) -> list[str]:
    if module.name == LIMITS:
        return [_limits_table(module)]
    if module.name == STARTUP:
        return [_startup_table(module)]
    return _step_tables(device, module) if module.is_of_steps else _operator_tables(device, module)


def _limits_table(module: Module) -> str:
    rows = [(r.operator, r.case, r.dtype, rate(r)) for r in sorted(module.records, key=by_work)]
    return markdown(("limit", "size", "dtype", "rate"), rows)


def _startup_table(module: Module) -> str:
    rows = [(r.case, r.dtype, r.direction, f"{r.seconds:.1f}") for r in sorted(module.records, key=by_work)]
    return markdown(("model", "dtype", "compiled kernels", "seconds"), rows)


def _operator_tables(device: Device, module: Module) -> list[str]:
    """A table for each operator, case and dtype, with a row for each who.

    Speeds are those against torch.compile and eager PyTorch, or, where neither is among the peers, the best of them.
    """
    tables = []
    rivals = {BEST: "× best"} if _RIVALS.keys().isdisjoint(r.who for r in module.records) else _RIVALS
    for operator, case, dtype in dict.fromkeys(
        (r.operator, r.case, r.dtype) for r in sorted(module.records, key=by_work)
    ):
        records = [r for r in module.records if (r.operator, r.case, r.dtype) == (operator, case, dtype)]
        whos = _ordered({r.who for r in records})
        rows = [_row(device, [r for r in records if r.who == who], tuple(rivals)) for who in whos]
        head = (
            "who",
            "fwd µs",
            "fwd+bwd µs",
            "of copy: fwd",
            "of copy: fwd+bwd",
            *rivals.values(),
            "extra MiB",
            "host µs",
        )
        tables.append(f"**`{operator}`** {case}, {dtype}\n\n{markdown(*_told(head, rows))}")
    return tables


def _told(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows without the columns that are empty in every row."""
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return tuple(head[column] for column in kept), [tuple(row[column] for column in kept) for row in rows]


def _row(device: Device, records: list[Record], rivals: tuple[str, ...]) -> tuple[str, ...]:
    """One who's row. Speeds against `rivals`, memory and host time are those of fwd+bwd, or of fwd if that is all."""
    by_direction = {record.direction: record for record in records}
    forward, both = by_direction.get(FORWARD), by_direction.get(BOTH)
    whole = both or forward
    note = next((f" ({record.note})" for record in records if record.note), "")
    return (
        (f"**{whole.who}**" if whole.who == OURS else whole.who) + note,
        micros(forward and forward.seconds),
        micros(both and both.seconds),
        percent(forward and device.copy_share(forward)),
        percent(both and device.copy_share(both)),
        *(times(_speed(device, whole, rival)) for rival in rivals),
        "" if whole.peak_mib is None else f"{whole.peak_mib:.0f}",
        micros(whole.host_seconds),
    )


def _step_tables(device: Device, module: Module) -> list[str]:
    """A table for each case and dtype of training steps, with a row for each who and its speed against each other; for
    the memory of smaller cards, a table of all cards."""
    tables = []
    every = sorted(module.records, key=by_work)
    records = [r for r in every if not _CARD.search(r.case)]
    for operator, case, dtype in dict.fromkeys((r.operator, r.case, r.dtype) for r in records):
        of_case = [r for r in records if (r.operator, r.case, r.dtype) == (operator, case, dtype)]
        rivals = [r.who for r in of_case if r.who != OURS]
        per_sequence = any(record.sequences_per_s for record in of_case)
        head = (*_STEP_HEAD, *(("sequences/s",) if per_sequence else ()), *(f"× {who}" for who in rivals))
        rows = [
            _step_row(device, record)
            + ((thousands(record.sequences_per_s),) if per_sequence else ())
            + tuple(times(device.speed(record, who)) for who in rivals)
            for record in of_case
        ]
        tables.append(f"**`{operator}`** {case}, {dtype}\n\n{markdown(head, rows)}")
    return tables + _card_tables(device, [r for r in every if _CARD.search(r.case)])


def _card_tables(device: Device, records: list[Record]) -> list[str]:
    """A table for each case and dtype, with a row for each card."""
    tables = []
    for case, dtype in dict.fromkeys((_CARD.sub("", r.case), r.dtype) for r in records):
        rows = [_card_row(device, r) for r in records if (_CARD.sub("", r.case), r.dtype) == (case, dtype)]
        title = f"**`step`** {case} in the memory of smaller cards, {dtype}"
        tables.append(f"{title}\n\n{markdown(_CARD_HEAD, rows)}")
    return tables


def _card_row(device: Device, record: Record) -> tuple[str, ...]:
    """A step in the memory of a smaller card, and its speed as a share of that in all memory."""
    everywhere = device.find(_CARD.sub("", record.work), record.who, record.dtype)
    share = everywhere and record.tokens_per_s / everywhere.tokens_per_s
    _, _, pace, *measured = _step_row(device, record)
    memory = f"{_CARD.search(record.case)[1]} GB"
    return memory, str(record.microbatch), record.activations, pace, percent(share), *measured


def _step_row(device: Device, record: Record) -> tuple[str, ...]:
    ran = "" if record.backend in (None, "triton") else f" ({record.backend})"
    return (
        (f"**{record.who}**" if record.who == OURS else record.who) + ran,
        f"{record.seconds * 1e3:.1f}",
        thousands(record.tokens_per_s),
        percent(device.matmul_share(record)),
        "" if record.peak_mib is None else f"{record.peak_mib / 1024:.1f}",
        "" if record.joules_per_mtoken is None else f"{record.joules_per_mtoken:,.0f}",
    )


def _speed(device: Device, record: Record, rival: str) -> float | None:
    """How many times as fast the record is as `rival`, a who or BEST; None where that was not measured."""
    if rival != BEST:
        return device.speed(record, rival)
    best = device.best(record.work, record.dtype, besides=OURS)
    return None if best is None else best.seconds / record.seconds


def _environment(environment: dict) -> str:
    return (
        f"{environment['device']}, driver {environment['driver'] or 'unknown'}, torch {environment['torch']}, "
        f"triton {environment['triton']}, revision {environment['revision'] or 'unknown'}, {environment['date']}."
    )


def comparison(before: list[Device], after: list[Device]) -> str:
    """This project's times at two revisions, in the order of the results; regressions of over 5 % are marked."""
    earlier = {device.folder: device for device in before}
    rows = []
    for device in after:
        for record in sorted(device.records, key=by_work):
            old = earlier.get(device.folder, Device("", {})).find(record.work, OURS, record.dtype)
            if record.who == OURS and old is not None:
                ratio = record.seconds / old.seconds
                mark = "**slower**" if ratio > _REGRESSION else ""
                work = f"{record.work} {record.dtype}"
                rows.append((device.folder, work, micros(old.seconds), micros(record.seconds), f"{ratio:.2f}", mark))
    return markdown(("device", "work", "before µs", "after µs", "ratio", ""), rows) if rows else "Nothing to compare."


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def by_work(record: Record) -> tuple:
    # Numbers by size: a sequence length of 1024 comes after one of 64.
    case = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", record.case)]
    return record.operator, case, record.dtype, record.direction, *_rank(record.who)


def _ordered(whos: Iterable[str]) -> list[str]:
    return sorted(whos, key=_rank)


def _rank(who: str) -> tuple[int, str]:
    return (_ORDER.index(who) if who in _ORDER else len(_ORDER), who)


def micros(seconds: float | None) -> str:
    """Seconds as µs with three digits or more; empty for what was not measured."""
    if seconds is None:
        return ""
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}".replace("%", " %")


def thousands(value: float | None) -> str:
    """A rate rounded to hundreds; empty for what was not measured."""
    return "" if value is None else f"{round(value, -2):,.0f}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def rate(record: Record) -> str:
    """Work per second: TFLOP/s where there are FLOPs, else TB/s."""
    if record.flops:
        return f"{record.flops / record.seconds / 1e12:.0f} TFLOP/s"
    return f"{record.bytes / record.seconds / 1e12:.2f} TB/s"
