"""The kernels of `attention_hopper_tile_forward.py` and `_backward.py` on the CPU, where `gluon_on_cpu` stands in for
Gluon. On a card of compute capability 9.0 all tests of attention run them as they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from gluon_on_cpu import is_kept, run

from cramfast.kernels import varlen_attention_reference
from cramfast.kernels.attention_hopper_tile_backward import backward_tile_hopper
from cramfast.kernels.attention_hopper_tile_forward import forward_tile_hopper
from cramfast.kernels.packing import pack_sequences
from cramfast.kernels.rotary import tile_angles, turn
from cramfast.model import rotary_tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter for what is not Gluon")

HEADS, TILE = 2, 128
RING = {"STAGES": 3, "PREPARERS": 4, "PREPARERS_REGISTERS": 64, "MOVERS": 4, "MOVERS_REGISTERS": 64}
EQUAL, RAGGED = (128,) * 4, (1, 17, 63, 64, 100, 127, 128, 3, 3, 3, 90, 20)


def uneven_tables(size):
    """Whose angles do not rise evenly from a position to the next."""
    angle = torch.randn(TILE, size // 2, generator=torch.Generator().manual_seed(0))
    return angle.cos(), angle.sin()


def tables_for(size, uneven, positions=TILE):
    return uneven_tables(size) if uneven else rotary_tables(positions, size, 10_000.0)


def attention(qkv, dout, lengths, size, programs, window=None, turned=False, uneven=False, dropout=0.0, preparers=4):
    """(out, lse, dqkv) by the kernels."""
    total, masked = qkv.shape[0], not (set(lengths) == {TILE} and window is None)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    count = places = angles = None
    tiles = total // TILE
    if masked:
        count, places = pack_sequences(cu_seqlens, total, TILE, -1 if window is None else window)
        tiles = places.shape[1]
    if turned:
        angles = tile_angles(*tables_for(size, uneven), TILE)
        assert (angles[TILE] == float(not uneven)).all()
    constants = RING | {"H": HEADS, "D": size, "TILE": TILE, "PREPARERS": preparers}
    scalars = (total, tiles, size**-0.5, dropout)
    seed = torch.tensor([1]) if dropout else None
    out, lse, dqkv = torch.empty_like(dout), torch.empty(HEADS, total), torch.empty_like(qkv)
    for result in (out, lse, dqkv):
        result.fill_(float("nan"))
    run(forward_tile_hopper, programs, qkv, count, places, angles, seed, out, lse, *scalars, **constants)
    run(backward_tile_hopper, programs, dout, qkv, lse, count, places, angles, seed, dqkv, *scalars, **constants)
    return out, lse, dqkv


def spots_in_tiles(lengths):
    """Where each token lies: in a tile of so many places, and where there."""
    total = sum(lengths)
    if set(lengths) == {TILE}:
        return torch.arange(total)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    count, places = pack_sequences(cu_seqlens, total, TILE)
    tokens = places[0, : int(count)].flatten()
    return torch.empty(total, dtype=torch.int64).index_put_(
        (tokens[tokens >= 0].long(),), (tokens >= 0).nonzero()[:, 0]
    )


def with_dropout(qkv, lengths, window, dropout, spots=None):
    """(out, lse) in the dtype of qkv (T, 3, H, D), whose q and k are turned, with the weights that the stand-in for
    Gluon keeps; lse as the kernels have it. spots: where tokens lie, if not one after the other."""
    outs, lses = [], []
    spots = torch.arange(len(qkv)) if spots is None else spots
    for part, spot in zip(qkv.split(lengths), spots.split(lengths), strict=True):
        q, k, v = part.permute(1, 2, 0, 3)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if window is not None:
            scores = scores.where((spot[:, None] - spot[None, :]).abs() <= window, float("-inf"))
        kept = [is_kept(head, 0, 0, spot[:, None], 0, spot[None, :], dropout) for head in range(HEADS)]
        weights = scores.softmax(-1) * torch.stack(kept) / (1 - dropout)
        outs.append((weights.to(qkv.dtype) @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1) / math.log(2))
    return torch.cat(outs), torch.cat(lses, dim=1)


def by_reference(qkv, dout, lengths, size, dtype, window=None, turned=False, uneven=False, **dropped):
    leaf = qkv.detach().to(dtype).requires_grad_()
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (table[: max(lengths)].to(wide) for table in tables_for(size, uneven, max(lengths)))
    if dropped:
        out, _ = with_dropout(turn(leaf, cu_seqlens, cos, sin) if turned else leaf, lengths, window, **dropped)
    else:
        tables = {"cos": cos, "sin": sin} if turned else {}
        out = varlen_attention_reference(leaf, cu_seqlens, max(lengths), window=window, **tables)
    out.backward(dout.to(dtype))
    return out.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "size", "options"),
    [
        pytest.param(EQUAL, 64, {}, id="full tiles"),
        pytest.param(EQUAL, 64, {"turned": True}, id="full tiles, rotary"),
        pytest.param(EQUAL, 32, {"turned": True}, id="full tiles, rotary, heads of 32"),
        pytest.param(RAGGED, 64, {}, id="ragged"),
        pytest.param(RAGGED, 64, {"turned": True}, id="ragged, rotary"),
        pytest.param(RAGGED, 32, {"turned": True, "window": 20}, id="ragged, rotary, window, heads of 32"),
        pytest.param(RAGGED, 64, {"turned": True, "uneven": True}, id="ragged, uneven angles"),
        pytest.param(RAGGED, 32, {"turned": True, "uneven": True, "window": 9}, id="ragged, uneven angles, window"),
        pytest.param(EQUAL, 64, {"window": 0}, id="a window of the token alone"),
        pytest.param((5,), 64, {"turned": True}, id="five tokens"),
    ],
)
def test_results_are_as_exact_as_the_reference(lengths, size, options, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, size, generator=generator).to(dtype)
    dout = torch.randn(sum(lengths), HEADS, size, generator=generator).to(dtype)
    exact = by_reference(qkv, dout, lengths, size, torch.float64, **options)
    of_dtype = by_reference(qkv, dout, lengths, size, dtype, **options)
    out, lse, dqkv = attention(qkv, dout, lengths, size, programs=3, **options)
    assert lse.isfinite().all()
    for name, found, torchs, expected in zip(("out", "dqkv"), (out, dqkv), of_dtype, exact, strict=True):
        error, allowed = (found - expected).norm(), 2 * (torchs - expected).norm()
        assert error <= allowed, name


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["full", "ragged"])
def test_who_does_the_work_does_not_matter(lengths, turned):
    """Rings that go round many times, not once, or not at all; and preparers of either number."""
    qkv = torch.randn(sum(lengths), 3, HEADS, 64).bfloat16()
    dout = torch.randn(sum(lengths), HEADS, 64).bfloat16()
    first = attention(qkv, dout, lengths, 64, programs=1, turned=turned)
    for programs, preparers in ((7, 4), (30, 8)):
        others = attention(qkv, dout, lengths, 64, programs=programs, turned=turned, preparers=preparers)
        for found, expected in zip(others, first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["full", "ragged"])
def test_both_passes_leave_out_the_same_weights(lengths):
    dropout = 0.3
    qkv, dout = torch.randn(sum(lengths), 3, HEADS, 64).bfloat16(), torch.randn(sum(lengths), HEADS, 64).bfloat16()
    out, _, dqkv = attention(qkv, dout, lengths, 64, programs=3, dropout=dropout)
    of_dtype, exact = (
        by_reference(qkv, dout, lengths, 64, dtype, dropout=dropout, spots=spots_in_tiles(lengths))
        for dtype in (torch.bfloat16, torch.float64)
    )
    for found, torchs, expected in zip((out, dqkv), of_dtype, exact, strict=True):
        assert (found - expected).norm() <= 2 * (torchs - expected).norm()


def test_a_sequence_that_is_no_number_leaves_other_tiles_alone():
    qkv, dout = torch.randn(256, 3, HEADS, 64).bfloat16(), torch.randn(256, HEADS, 64).bfloat16()
    lengths = (100, 128, 28)
    qkv[100:228] = float("nan")
    out, lse, dqkv = attention(qkv, dout, lengths, 64, programs=2, turned=True)
    others = torch.tensor([True, False, True]).repeat_interleave(torch.tensor(lengths))
    for result in (out[others], lse[:, others], dqkv[others]):
        assert result.isfinite().all()
