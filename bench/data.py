"""`python -m bench.data --data FILE`: from cold text to token shards, and the rate at which batches are built.

Writes bench/results/<device>/data.json: seconds and peak memory of the whole preparation, tokenizer included, and
tokens per second of each layout, built on one core by one thread.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cramfast import cli
from cramfast.config import PretrainOptions, TextOptions, resolve
from cramfast.data.batches import BatchBuilder, Cursor, DocumentPieces, PackedPieces, PieceSource
from cramfast.data.prepare import prepare
from cramfast.data.shards import TokenStream
from cramfast.data.tokenizer import special_ids
from cramfast.device import environment, peak_memory_mib

_TOKENS = 65_536
_SECONDS = 3.0


@dataclass(frozen=True)
class DataBenchOptions:
    """Measure text to tokens and tokens to batches."""

    data: tuple[str, ...] = ()
    """Text, as pretrain's --data takes it."""
    results: Path = Path(__file__).parent / "results"
    """Folder of the results."""


def main(argv: list[str] | None = None) -> int:
    return cli.run(DataBenchOptions, measure, "bench.data", argv)


def measure(options: DataBenchOptions) -> int:
    text = resolve(PretrainOptions(preset="crammed-bert", text=TextOptions(data=options.data)), has_gpu=False).text
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        dataset = prepare(text, Path(cache), lambda *_: None, print)
        seconds = time.perf_counter() - began
        stream, special = dataset.split("train"), special_ids(dataset.tokenizer)
        layouts = {
            "packed": PackedPieces(stream, 128, seed=0),
            "documents": DocumentPieces(stream, 128, seed=0, prefix=special.cls),
        }
        cores = os.cpu_count()
        result = {
            "environment": environment(torch.device("cpu")) | {"cores": cores},
            "text_bytes": sum(source.get("bytes", 0) for source in dataset.manifest["source"]),
            "tokens": len(stream),
            "prepare_seconds": round(seconds, 1),
            "prepare_peak_mib": round(peak_memory_mib(torch.device("cpu"))),
            "loader_tokens_per_s": {name: round(_rate(stream, pieces)) for name, pieces in layouts.items()},
        }
    path = options.results / f"cpu-{cores}-cores" / "data.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def _rate(stream: TokenStream, pieces: PieceSource) -> float:
    """Tokens per second of building consecutive batches of 65,536."""
    torch.set_num_threads(1)
    builder, cursor, built = BatchBuilder(stream, pieces, _TOKENS, 128), Cursor(), 0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _SECONDS:
        cursor = builder.build(cursor).next
        built += _TOKENS
    return built / elapsed


if __name__ == "__main__":
    sys.exit(main())
