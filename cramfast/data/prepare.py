"""From text to a token dataset, found again by its settings: the cache that training reads from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..config import TextOptions
from ..errors import UserError
from .shards import (
    FORMAT,
    SPLITS,
    DamagedShards,
    Dataset,
    SplitWriter,
    file_entry,
    token_dtype,
    unigram_entropy,
    write_manifest,
)
from .text import Source, open_sources
from .tokenizer import open_tokenizer, special_ids, train_tokenizer

# WordPiece is trained on the first this many characters; more text does not change the frequent words.
_TRAINING_CHARACTERS = 256_000_000
# Characters and texts handed to the tokenizers library at once: enough for all cores, little memory.
_BATCH_CHARACTERS = 2_000_000
_BATCH_TEXTS = 20_000

Report = Callable[[str, int, int | None], None]
"""Called with (stage, bytes of source read, bytes in all or None) while the work goes on."""


def default_cache() -> Path:
    """Where token datasets are kept unless --cache says otherwise: $CRAMFAST_CACHE or ~/.cache/cramfast."""
    return Path(os.environ.get("CRAMFAST_CACHE", Path.home() / ".cache" / "cramfast"))


def prepare(options: TextOptions, cache: Path, report: Report, say: Callable[[str], None]) -> Dataset:
    """The dataset of `options`, from `cache` where it is there and sound, else built.

    Raises UserError for bad input, leaving nothing behind.
    """
    sources = open_sources(options.data, options.document_per, options.text_field)
    heldout = (
        open_sources(options.heldout_data, options.document_per, options.text_field) if options.heldout_data else []
    )
    key = _key(options, sources, heldout)
    folder = cache / f"tokens-{key}"
    if folder.exists():
        try:
            return Dataset.open(folder)
        except DamagedShards as damage:
            say(f"{damage}; building it again")
            shutil.rmtree(folder)
    _remove_abandoned(cache, key)
    partial = cache / f"tokens-{key}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{cache}: cannot write the token cache: {error.strerror} (choose with --cache)") from error
    try:
        _build(partial, options, sources, heldout, report)
        _rename(partial, folder)
    except OSError as error:
        raise UserError(f"{error.filename or cache}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Dataset.open(folder)


def _key(options: TextOptions, sources: list[Source], heldout: list[Source]) -> str:
    """A hash of everything that the tokens depend on."""
    settings = asdict(options)
    for name in ("data", "heldout_data", "document_per", "text_field"):
        del settings[name]  # the sources' identities say these more exactly
    if options.tokenizer is not None:
        settings["tokenizer"] = hashlib.sha256(open_tokenizer(options.tokenizer).to_str().encode()).hexdigest()
    identity = [[source.identity() for source in group] for group in (sources, heldout)]
    described = json.dumps([FORMAT, settings, identity], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _remove_abandoned(cache: Path, key: str) -> None:
    """Delete what builders of this dataset that no longer run have left."""
    for folder in cache.glob(f"tokens-{key}.partial-*"):
        number = folder.name.rsplit("-", 1)[1]
        if number.isdecimal() and not _runs_elsewhere(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs_elsewhere(number: int) -> bool:
    """Whether there is another process of this number. One of our own number is gone: in a container numbers recur."""
    if number == os.getpid():
        return False
    if os.name != "posix":
        return True  # there is no harmless way to ask there
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return True


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same content
            raise


def _build(folder: Path, options: TextOptions, sources: list[Source], heldout: list[Source], report: Report) -> None:
    if options.tokenizer is not None:
        tokenizer = open_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer(
            lambda: _sample(sources, report),
            options.vocab_size,
            lowercase=options.lowercase,
            strip_accents=options.strip_accents,
            ascii_only=options.ascii_only,
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    dtype = token_dtype(vocab_size)
    writers = {split: SplitWriter(folder, split, dtype, vocab_size) for split in SPLITS}
    try:
        dropped = _write(tokenizer, writers, options, sources, heldout, report)
        _require_text(writers, options)
        splits = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.release()
    write_manifest(
        folder,
        {
            "source": [source.identity() for source in chain(sources, heldout)],
            "options": json.loads(json.dumps(asdict(options), default=str)),
            "vocab_size": vocab_size,
            "dtype": dtype.name,
            "tokenizer": file_entry(folder / "tokenizer.json"),
            "dropped_documents": dropped,
            "unigram_entropy": unigram_entropy(writers["train"].counts),
            "splits": splits,
        },
    )


def _write(
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    options: TextOptions,
    sources: list[Source],
    heldout: list[Source],
    report: Report,
) -> int:
    """Tokenise every document into its split; returns how many the filter dropped."""
    separator = special_ids(tokenizer).sep
    dropped = 0
    groups = [("tokenising", sources, 0.0 if heldout else options.heldout_fraction)]
    if heldout:
        groups.append(("tokenising the held-out text", heldout, 1.0))
    for stage, group, fraction in groups:
        for texts in _batched(_documents(group, stage, report)):
            for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
                tokens = np.array([*encoding.ids, separator])
                if len(tokens) == 1:
                    continue
                if len(tokens) - 1 >= options.max_tokens_per_char * len(text):
                    dropped += 1
                    continue
                writers["heldout" if is_heldout(text, fraction) else "train"].add(tokens)
    return dropped


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: decided by a hash of its text, so it never depends on the rest of the corpus."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _require_text(writers: dict[str, SplitWriter], options: TextOptions) -> None:
    data = " ".join(options.data) or "the built-in corpus"
    if not writers["train"].documents:
        raise UserError(f"--data {data}: no document is left to train on (empty, or all dropped by the filters)")
    if not writers["heldout"].documents:
        if options.heldout_data:
            raise UserError(f"--heldout-data {' '.join(options.heldout_data)}: holds no text")
        raise UserError(
            f"--data {data}: none of its {writers['train'].documents} documents was held out; "
            f"raise --heldout-fraction (now {options.heldout_fraction:g}) or give --heldout-data"
        )


def _sample(sources: list[Source], report: Report) -> Iterator[str]:
    """The texts that the tokenizer is trained on."""
    left = _TRAINING_CHARACTERS
    for text in _documents(sources, "training the tokenizer", report):
        yield text
        left -= len(text)
        if left <= 0:
            return


def _documents(sources: list[Source], stage: str, report: Report) -> Iterator[str]:
    sizes = [source.size for source in sources]
    total = None if None in sizes else sum(sizes)
    before = 0
    for source in sources:
        source.bytes_read = 0
        for text in source:
            report(stage, before + source.bytes_read, total)
            yield text
        before += source.bytes_read


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, length = [], 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= _BATCH_CHARACTERS or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
