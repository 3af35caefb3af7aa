import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import parametrize_pairs

from cramfast.data.batches import (
    Batch,
    BatchBuilder,
    Cursor,
    DocumentPieces,
    PackedPieces,
    Prefetcher,
    shuffled,
)
from cramfast.data.shards import TokenStream

CLS = 1
FIRST = 10  # token i of every stream below is FIRST + i, so a batch tells where its tokens come from


def make_stream(lengths, shards: int = 1) -> TokenStream:
    tokens = FIRST + np.arange(sum(lengths), dtype=np.uint32)
    return TokenStream(np.array_split(tokens, shards), np.cumsum(lengths).astype(np.uint64))


def random_lengths(documents: int = 60, longest: int = 50) -> list[int]:
    return np.random.default_rng(0).integers(1, longest + 1, size=documents).tolist()


def make_pieces(layout: str, stream: TokenStream, length: int, seed: int = 0):
    if layout == "documents":
        return DocumentPieces(stream, length, seed, prefix=CLS)
    if layout == "full-stops":
        return PackedPieces(stream, length, seed, order="full-stops", full_stop=FIRST + 3)
    return PackedPieces(stream, length, seed)


def make_builder(layout: str, stream: TokenStream, tokens: int, length: int, seed: int = 0) -> BatchBuilder:
    return BatchBuilder(stream, make_pieces(layout, stream, length, seed), tokens, length)


def batches(builder: BatchBuilder, cursor: Cursor = Cursor()):  # noqa: B008 (it is frozen)
    """The endless batches from `cursor` on."""
    while True:
        batch = builder.build(cursor)
        yield batch
        cursor = batch.next


def take(builder: BatchBuilder, number: int, cursor: Cursor = Cursor()) -> list[Batch]:  # noqa: B008
    return list(itertools.islice(batches(builder, cursor), number))


def sequences(batch: Batch) -> list[list[int]]:
    ids, ends = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
    return [ids[begin:end] for begin, end in itertools.pairwise(ends)]


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.cu_seqlens, other.cu_seqlens)
        and (one.max_seqlen, one.attended, one.next) == (other.max_seqlen, other.attended, other.next)
    )


LAYOUTS = ["shuffled", "full-stops", "documents"]


# Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000, 4097, 100_000])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_shuffled_is_a_permutation(size, seed):
    assert sorted(shuffled(np.arange(size), size, seed, epoch=3).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [16, 17, 1000, 4097])
def test_order_differs_by_seed_and_epoch_alone(size):
    index = np.arange(size)
    orders = {shuffled(index, size, seed, epoch).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert shuffled(index, size, 3, 4).tobytes() == shuffled(index, size, 3, 4).tobytes()


def test_any_part_of_the_order_can_be_asked_for():
    whole = shuffled(np.arange(1000), 1000, 5, 1)
    index = np.array([999, 0, 500, 500])
    assert shuffled(index, 1000, 5, 1).tolist() == whole[index].tolist()
    assert shuffled(index[:0], 1000, 5, 1).tolist() == []


def test_order_looks_random():
    size = 4096
    order = np.concatenate([shuffled(np.arange(size), size, seed, 0) for seed in range(10)])
    place = np.tile(np.arange(size), 10)
    # The correlation of n random pairs has the standard deviation 1 / √n; five of them.
    assert abs(np.corrcoef(place, order)[0, 1]) < 5 / len(order) ** 0.5
    # A random permutation keeps a place with probability 1/size: about 10 in 10 of them, as a Poisson count.
    assert (place == order).sum() < 10 + 5 * 10**0.5


# Pieces of each layout


@pytest.mark.parametrize(("size", "length"), [(7, 3), (100, 16), (96, 16), (5, 5), (5, 16), (1, 2), (1000, 2)])
@pytest.mark.parametrize("layout", ["shuffled", "full-stops"])
def test_packed_pieces_tile_the_repeated_stream(layout, size, length):
    pieces = make_pieces(layout, make_stream([size]), length)
    for epoch in range(length + 2):
        starts, lengths = pieces.locate(epoch, np.arange(pieces.count(epoch)))
        begin = -(-epoch * size // length) * length
        assert sorted(starts.tolist()) == [at - epoch * size for at in range(begin, (epoch + 1) * size, length)]
        assert set(lengths.tolist()) <= {length}


@pytest.mark.parametrize(("size", "length"), [(7, 3), (100, 16), (96, 16)])
@pytest.mark.parametrize("layout", ["shuffled", "full-stops"])
def test_packed_last_piece_is_topped_up_from_the_beginning(layout, size, length):
    builder = make_builder(layout, make_stream([size]), tokens=length, length=length)
    # After `length` repetitions the pieces come out even.
    seen = take(builder, size)
    assert seen[-1].next == Cursor(epoch=length)
    for batch in seen:
        (tokens,) = sequences(batch)
        assert tokens == [FIRST + (tokens[0] - FIRST + i) % size for i in range(length)]
    counts = Counter(token for batch in seen for token in batch.input_ids.tolist())
    assert counts == {FIRST + i: length for i in range(size)}


@pytest.mark.parametrize("length", [2, 3, 16, 64])
def test_document_pieces_cut_every_document_from_its_start(length):
    lengths = random_lengths()
    pieces = make_pieces("documents", make_stream(lengths), length)
    starts, sizes = pieces.locate(0, np.arange(pieces.count(0)))
    expected, begin = [], 0
    for document in lengths:
        expected += [(begin + at, min(length - 1, document - at)) for at in range(0, document, length - 1)]
        begin += document
    assert sorted(zip(starts.tolist(), sizes.tolist(), strict=True)) == expected


@pytest.mark.parametrize("layout", ["shuffled", "documents"])
def test_pieces_come_in_another_order_every_epoch(layout):
    pieces = make_pieces(layout, make_stream([16] * 100), 16)
    orders = {pieces.locate(epoch, np.arange(pieces.count(epoch)))[0].tobytes() for epoch in range(5)}
    assert len(orders) == 5


# Batches


def by_the_rule(layout: str, stream: TokenStream, tokens: int, length: int, number: int) -> list[list[list[int]]]:
    """Sequences of the first batches as the module's docstring says them, one piece at a time."""
    pieces = make_pieces(layout, stream, length)
    prefix = [] if layout != "documents" else [CLS]
    epochs = (pieces.locate(epoch, np.arange(pieces.count(epoch))) for epoch in itertools.count())
    waiting = (
        [FIRST + (start + i) % len(stream) for i in range(size)]
        for starts, sizes in epochs
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
    )
    found, rest = [], []
    for _ in range(number):
        batch, room = [], tokens
        while room:
            piece = prefix + (rest or next(waiting))
            batch.append(piece[:room])
            rest = piece[max(room, len(prefix)) :]
            room -= len(batch[-1])
        found.append(batch)
    return found


@parametrize_pairs(layout=LAYOUTS, tokens=[2, 3, 16, 17, 1000], length=[2, 5, 16], shards=[1, 3])
def test_batches_follow_the_rule(layout, tokens, length, shards):
    stream = make_stream(random_lengths(documents=15), shards)
    builder = make_builder(layout, stream, tokens, length)
    first_epoch = list(itertools.takewhile(lambda batch: batch.next.epoch == 0, batches(builder)))
    number = len(first_epoch) + 5
    found = [sequences(batch) for batch in take(builder, number)]
    assert found == by_the_rule(layout, stream, tokens, length, number)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [2, 1024])
def test_shape_of_a_batch(layout, tokens):
    for batch in take(make_builder(layout, make_stream(random_lengths()), tokens, length=16), 5):
        assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
        assert batch.input_ids.shape == (tokens,)
        lengths = batch.cu_seqlens.diff()
        assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, tokens)
        assert lengths.min() >= 1
        assert lengths.max() <= batch.max_seqlen == 16
        assert batch.attended == (lengths.long() ** 2).sum()


def test_documents_do_not_mix_and_begin_with_the_prefix():
    lengths = random_lengths()
    ends = np.cumsum(lengths)
    for batch in take(make_builder("documents", make_stream(lengths), tokens=100, length=16), 50):
        for first, *tokens in sequences(batch):
            assert first == CLS
            places = np.array(tokens, dtype=np.int64) - FIRST
            assert np.all(np.diff(places) == 1)
            assert len(set(np.searchsorted(ends, places, side="right").tolist())) <= 1


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(2, 20),
    tokens=st.integers(2, 60),
    seed=st.integers(0, 2**32),
    shards=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_every_document_token_is_met_once_an_epoch(lengths, length, tokens, seed, shards):
    builder = make_builder("documents", make_stream(lengths, shards), tokens, length, seed)
    size, met = sum(lengths), []
    for batch in batches(builder):
        assert batch.input_ids.shape == (tokens,)
        assert batch.cu_seqlens.diff().max() <= length
        met += [token for sequence in sequences(batch) for token in sequence[1:]]
        if len(met) >= 2 * size:
            break
    everything = list(range(FIRST, FIRST + size))
    assert sorted(met[:size]) == sorted(met[size : 2 * size]) == everything


@given(size=st.integers(1, 100), length=st.integers(2, 20), tokens=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_every_packed_token_is_met_once_a_repetition(size, length, tokens, seed):
    builder = make_builder("shuffled", make_stream([size]), tokens, length, seed)
    # `length` repetitions are `size` pieces.
    met = []
    for batch in batches(builder):
        assert batch.input_ids.shape == (tokens,)
        met += batch.input_ids.tolist()
        if len(met) >= size * length:
            break
    assert Counter(met[: size * length]) == {FIRST + i: length for i in range(size)}


# Repeating and resuming


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_a_function_of_the_settings(layout):
    stream = make_stream(random_lengths())
    first, again = (take(make_builder(layout, stream, 100, 16, seed=7), 40) for _ in range(2))
    assert all(map(same, first, again))


@pytest.mark.parametrize("layout", ["shuffled", "documents"])
def test_another_seed_gives_other_batches(layout):
    stream = make_stream(random_lengths())
    one, other = (take(make_builder(layout, stream, 100, 16, seed), 10) for seed in (0, 1))
    assert not any(map(same, one, other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [3, 100, 3000])
def test_any_cursor_resumes_to_the_same_batches(layout, tokens):
    stream = make_stream(random_lengths(), shards=3)
    through = take(make_builder(layout, stream, tokens, 16), 40)
    for stopped in range(30):
        cursor = Cursor(**vars(through[stopped].next))
        resumed = take(make_builder(layout, stream, tokens, 16), 5, cursor)
        assert all(map(same, through[stopped + 1 : stopped + 6], resumed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_size_of_the_batch_may_change_between_batches(layout):
    stream = make_stream(random_lengths())
    pieces = make_pieces(layout, stream, 16)
    cursor, met = Cursor(), []
    while cursor.epoch == 0:
        batch = BatchBuilder(stream, pieces, 2 + len(met) % 97, 16).build(cursor)
        met += [token for token in batch.input_ids.tolist() if token != CLS]
        cursor = batch.next
    assert set(met) == set(range(FIRST, FIRST + len(stream)))


# Full stops


@pytest.mark.parametrize("size", [1000, 90_000])  # below and above the number of pieces counted at once
def test_sequences_with_most_full_stops_come_first(size):
    length = 4
    tokens = np.random.default_rng(0).integers(0, 5, size=size)
    stream = TokenStream([tokens], np.array([size]))
    builder = BatchBuilder(stream, PackedPieces(stream, length, 0, "full-stops", full_stop=3), size, length)
    (batch,) = take(builder, 1)
    stops = (batch.input_ids.reshape(-1, length) == 3).sum(dim=1)
    assert torch.all(stops[:-1] >= stops[1:])
    expected = tokens.reshape(-1, length)[np.argsort(-(tokens.reshape(-1, length) == 3).sum(axis=1), kind="stable")]
    assert batch.input_ids.tolist() == expected.ravel().tolist()


def test_full_stops_are_counted_anew_every_epoch():
    tokens = np.random.default_rng(0).integers(0, 5, size=1001)
    stream = TokenStream([tokens], np.array([1001]))
    pieces = PackedPieces(stream, 4, 0, "full-stops", full_stop=3)
    for epoch in (0, 1, 2, 0):
        starts, _ = pieces.locate(epoch, np.arange(pieces.count(epoch)))
        stops = (np.take(tokens, starts[:, None] + np.arange(4), mode="wrap") == 3).sum(axis=1)
        assert np.all(np.diff(stops) <= 0)


# Prefetching


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefetched_batches_are_the_built_ones(layout, depth):
    builder = make_builder(layout, make_stream(random_lengths()), 100, 16)
    start = take(builder, 3)[-1].next
    prefetcher = Prefetcher(builder.build, start, depth)
    found = [prefetcher.next() for _ in range(30)]
    prefetcher.close()
    assert all(map(same, found, take(builder, 30, start)))


def test_what_building_raises_arrives_after_the_batches_before_it():
    builder = make_builder("documents", make_stream(random_lengths()), 100, 16)
    fine = take(builder, 3)

    def build(cursor):
        if cursor == fine[-1].next:
            raise OSError("the disk is gone")
        return builder.build(cursor)

    prefetcher = Prefetcher(build, Cursor())
    assert all(map(same, [prefetcher.next() for _ in range(3)], fine))
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.next()
    prefetcher.close()


@pytest.mark.parametrize("taken", [0, 1, 10])
@pytest.mark.parametrize("wait", [0, 0.05])  # with the queue still filling, and full
def test_closing_ends_the_thread(taken, wait):
    before = set(threading.enumerate())
    builder = make_builder("shuffled", make_stream(random_lengths()), 100, 16)
    prefetcher = Prefetcher(builder.build, Cursor(), depth=2)
    (thread,) = set(threading.enumerate()) - before
    for _ in range(taken):
        prefetcher.next()
    time.sleep(wait)
    prefetcher.close()
    assert not thread.is_alive()
    prefetcher.close()


def test_closing_after_an_error_that_nobody_took():
    def build(cursor):
        raise ValueError

    before = set(threading.enumerate())
    prefetcher = Prefetcher(build, Cursor())
    prefetcher.close()
    assert set(threading.enumerate()) <= before


def test_batch_on_a_device():
    (batch,) = take(make_builder("documents", make_stream(random_lengths()), 100, 16), 1)
    assert same(batch.to(torch.device("cpu")), batch)


# Rate


@pytest.mark.parametrize("layout", ["shuffled", "documents"])
def test_five_million_tokens_a_second(layout):
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(16, 401, size=12_000))
    ends = ends[ends <= 2_000_000]
    stream = TokenStream([rng.integers(5, 30_000, size=ends[-1]).astype(np.uint16)], ends.astype(np.uint64))
    tokens, number = 65_536, 16
    builder = make_builder(layout, stream, tokens, length=128)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        take(builder, number)
        best = max(best, number * tokens / (time.perf_counter() - start))
    assert best >= 5e6
