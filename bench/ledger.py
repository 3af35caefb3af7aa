"""The results folder: `<device>/<module>.json` in pytest-benchmark's layout, one environment a file.

A record is an entry of `benchmarks`; what it measured stands in its `extra_info`. Records are told apart by work, who
and dtype.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

GLUE = "glue.json"
"""The file of a device's folder that `bench.glue` writes."""
LIMITS, STARTUP = "limits", "startup"
"""Modules whose numbers stand for themselves, and are not compared with anybody's."""
# What tells nothing about whose machine it was.
_MACHINE = ("machine", "system", "python_implementation", "python_version")
_CPU = ("arch", "brand_raw", "count")


def slug(device: str) -> str:
    """The folder name of a card: "NVIDIA H200" → nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def document(entries: list[dict], environment: dict, machine_info: dict, version: str, datetime: str) -> dict:
    """One module's file from pytest-benchmark's entries, without raw samples, host names or users."""
    revision = environment["revision"]
    machine = {key: machine_info[key] for key in _MACHINE if key in machine_info}
    machine["cpu"] = {key: machine_info["cpu"][key] for key in _CPU if key in machine_info.get("cpu", {})}
    return {
        "environment": environment,
        "machine_info": machine,
        "commit_info": {"id": revision, "dirty": bool(revision) and revision.endswith("-dirty")},
        # Parameters may be any object; their ids, in `param`, are what can be read back.
        "benchmarks": sorted((entry | {"params": None} for entry in entries), key=_key),
        "datetime": datetime,
        "version": version,
    }


def merge(old: dict | None, new: dict) -> tuple[dict, int]:
    """`new` with the records that only `old` has, and how many of those were dropped.

    They stay if they come from the same device, software and revision; of an unknown revision nobody can say.
    """
    if old is None:
        return new, 0
    measured = {_key(entry) for entry in new["benchmarks"]}
    others = [entry for entry in old["benchmarks"] if _key(entry) not in measured]
    if not _same_code_and_machine(old["environment"], new["environment"]):
        return new, len(others)
    return new | {"benchmarks": sorted(new["benchmarks"] + others, key=_key)}, 0


def _same_code_and_machine(one: dict, other: dict) -> bool:
    return one["revision"] is not None and one | {"date": None} == other | {"date": None}


def _key(entry: dict) -> tuple[str, str, str]:
    info = entry["extra_info"]
    return info["work"], info["who"], info["dtype"]


def save(results: Path, module: str, new: dict) -> str:
    """Merge one module's document into the folder; returns a line about it. A crash never leaves half a file."""
    path = results / slug(new["environment"]["device"]) / f"{module}.json"
    old = json.loads(path.read_text()) if path.exists() else None
    merged, dropped = merge(old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(merged, indent=1) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    note = f" ({dropped} records of another revision or machine dropped)" if dropped else ""
    return f"{len(new['benchmarks'])} measured, {len(merged['benchmarks'])} records in {path}{note}"


@dataclass(frozen=True)
class Record:
    """What one entry measured. Seconds are per call; `bytes` and `flops` come from the definition of the work;
    `results_mib` of `peak_mib` are the outputs and gradients themselves. Training steps have `tokens_per_s` and
    `joules_per_mtoken`, both of real tokens, those of finetuning `sequences_per_s` as well, and their `peak_mib` is all
    that the allocator held for them; this project's tell how many sequences they compute at a time, `microbatch`, and
    what the layers save, `activations`.

    `backend` is what ran for this project: "triton", "reference" where there is no kernel for the card, or
    the name of who it hands over to.
    """

    work: str
    who: str
    dtype: str
    seconds: float
    bytes: int | None = None
    flops: int | None = None
    peak_mib: float | None = None
    results_mib: float | None = None
    host_seconds: float | None = None
    tokens_per_s: float | None = None
    sequences_per_s: float | None = None
    joules_per_mtoken: float | None = None
    microbatch: int | None = None
    activations: str | None = None
    timed_by: str = "graph"
    backend: str | None = None

    @property
    def note(self) -> str:
        """What a reader has to know about the record; empty where all is as usual."""
        timed = "" if self.timed_by == "graph" else f"by {self.timed_by}"
        ran = "" if self.backend in (None, "triton") else self.backend
        return ", ".join(filter(None, (ran, timed)))

    @property
    def operator(self) -> str:
        return self.work.split("/")[0]

    @property
    def direction(self) -> str:
        return self.work.split("/")[1]

    @property
    def case(self) -> str:
        return self.work.split("/", 2)[2]


_FIELDS = {field.name for field in fields(Record)}


@dataclass(frozen=True)
class Module:
    """One results file: its records and the environment they come from."""

    name: str
    environment: dict
    records: tuple[Record, ...]

    @property
    def is_of_steps(self) -> bool:
        """Whether training steps were measured, of which tokens a second are told."""
        return all(record.tokens_per_s is not None for record in self.records)

    @property
    def has_plot(self) -> bool:
        return self.name not in (LIMITS, STARTUP)

    @classmethod
    def from_json(cls, name: str, content: dict) -> "Module":
        infos = (entry["extra_info"] for entry in content["benchmarks"])
        records = tuple(Record(**{key: info[key] for key in info if key in _FIELDS}) for info in infos)
        return cls(name, content["environment"], records)


@dataclass(frozen=True)
class Device:
    """All modules measured on one card. `folder` is its slug; `glue` what `bench.glue` wrote of finetuning there."""

    folder: str
    modules: dict[str, Module]
    glue: dict | None = None

    @property
    def records(self) -> Iterable[Record]:
        return (record for module in self.modules.values() for record in module.records)

    def find(self, work: str, who: str, dtype: str) -> Record | None:
        return next((r for r in self.records if (r.work, r.who, r.dtype) == (work, who, dtype)), None)

    def copy_rate(self) -> float | None:
        """Bytes a second of the device-to-device copy; None when it has not been measured."""
        return max((r.bytes / r.seconds for r in self.records if r.operator == "copy"), default=None)

    def copy_share(self, record: Record) -> float | None:
        """The record's definition bytes a second as a share of the copy's."""
        rate = self.copy_rate()
        return None if rate is None or not record.bytes else record.bytes / record.seconds / rate

    def matmul_share(self, record: Record) -> float | None:
        """The record's definition FLOPs a second as a share of those of a large matrix product in its dtype."""
        rates = (r.flops / r.seconds for r in self.records if (r.operator, r.dtype) == ("matmul", record.dtype))
        rate = max(rates, default=None)
        return None if rate is None or not record.flops else record.flops / record.seconds / rate

    def speed(self, record: Record, who: str) -> float | None:
        """How many times as fast as `who` on the same work; None when that was not measured."""
        other = self.find(record.work, who, record.dtype)
        return None if other is None else other.seconds / record.seconds

    def best(self, work: str, dtype: str, besides: str) -> Record | None:
        """The fastest record of a work by another than `besides`; None where there is none."""
        others = (r for r in self.records if (r.work, r.dtype) == (work, dtype) and r.who != besides)
        return min(others, key=lambda record: record.seconds, default=None)


def load(results: Path) -> list[Device]:
    """Every device in the folder that has benchmark files, by name."""
    texts = {path.relative_to(results): path.read_text() for path in sorted(results.glob("*/*.json"))}
    return from_texts(texts)


def from_texts(texts: dict[Path, str]) -> list[Device]:
    """Devices from file texts by `<device>/<module>.json`; files in another layout are not ours to read."""
    devices: dict[str, dict[str, Module]] = {}
    glue: dict[str, dict] = {}
    for path, text in texts.items():
        content, folder = json.loads(text), path.parent.name
        if "benchmarks" in content:
            devices.setdefault(folder, {})[path.stem] = Module.from_json(path.stem, content)
        elif path.name == GLUE:
            devices.setdefault(folder, {})
            glue[folder] = content
    return [Device(folder, modules, glue.get(folder)) for folder, modules in sorted(devices.items())]
