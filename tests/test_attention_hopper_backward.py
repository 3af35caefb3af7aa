"""The kernel of `attention_hopper_blocks.py` on the CPU, where `gluon_on_cpu` stands in for Gluon. On a card of compute
capability 9.0 all tests of attention run it as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from gluon_on_cpu import run
from test_attention_hopper import by_reference

from cramfast.kernels.attention_hopper_blocks import backward_blocks_hopper
from cramfast.kernels.long_attention import turn
from cramfast.kernels.rotary import token_angles
from cramfast.kernels.sequences import group_sequences
from cramfast.model import rotary_tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter for what is not Gluon")

HEADS, BLOCK, SPAN = 2, 128, 256
EQUAL, RAGGED = (256,) * 3, (200, 1, 17, 63, 129, 256, 128, 3, 3, 3, 255, 20)


def forward(qkv, lengths, window):
    """(out, lse) in the dtype of qkv (T, 3, H, D), whose q and k are turned; lse as the kernels have it."""
    outs, lses = [], []
    for part in qkv.split(lengths):
        token = torch.arange(len(part))
        q, k, v = part.permute(1, 2, 0, 3)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if window is not None:
            scores = scores.where((token[:, None] - token[None, :]).abs() <= window, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1) / math.log(2))
    return torch.cat(outs), torch.cat(lses, dim=1)


def backward(qkv, dout, lengths, size, programs, window=None, turned=False):
    """dqkv by the kernel."""
    total, span = qkv.shape[0], max(lengths)
    masked = len({*lengths}) > 1 or span % BLOCK > 0 or window is not None
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    groups = bounds = angles = None
    if masked:
        groups, bounds = group_sequences(cu_seqlens, total, span, BLOCK)
    if turned:
        tables = rotary_tables(SPAN, size, 10_000.0)
        angles = token_angles(*tables, bounds, total if masked else span)
        qkv = turn(qkv, cu_seqlens, *tables)
    (out, lse), dqkv = forward(qkv.float(), lengths, window), torch.full_like(qkv, float("nan"))
    tensors = (dout, qkv, out.to(qkv.dtype), lse, groups, bounds, angles, dqkv)
    scalars = (total, span, -1 if window is None else window, size**-0.5)
    constants = {"WINDOWED": window is not None, "MULTIPLIERS": 8, "MULTIPLIERS_REGISTERS": 224}
    run(backward_blocks_hopper, programs, *tensors, *scalars, H=HEADS, D=size, num_warps=4, **constants)
    return dqkv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "size", "options"),
    [
        pytest.param(EQUAL, 64, {}, id="full blocks"),
        pytest.param(EQUAL, 64, {"turned": True}, id="full blocks, rotary"),
        pytest.param((128,) * 3, 32, {"turned": True}, id="one block each, rotary, heads of 32"),
        pytest.param(RAGGED, 64, {}, id="ragged"),
        pytest.param(RAGGED, 64, {"turned": True}, id="ragged, rotary"),
        pytest.param(RAGGED, 32, {"turned": True, "window": 20}, id="ragged, rotary, window, heads of 32"),
        pytest.param(EQUAL, 64, {"window": 130}, id="a window of more than a block"),
        pytest.param(EQUAL, 64, {"window": 0}, id="a window of the token alone"),
        pytest.param((129,), 64, {"turned": True}, id="a block and a token"),
        pytest.param((192,) * 2, 64, {"turned": True}, id="half blocks"),
    ],
)
def test_results_are_as_exact_as_the_reference(lengths, size, options, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, size, generator=generator).to(dtype)
    dout = torch.randn(sum(lengths), HEADS, size, generator=generator).to(dtype)
    _, exact = by_reference(qkv, dout, lengths, size, torch.float64, **options)
    _, of_dtype = by_reference(qkv, dout, lengths, size, dtype, **options)
    found = backward(qkv, dout, lengths, size, programs=3, **options)
    for which in range(3):
        error, allowed = (found - exact)[:, which].norm(), 2 * (of_dtype - exact)[:, which].norm()
        assert error <= allowed, "qkv"[which]


@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["full", "ragged"])
def test_who_does_the_work_does_not_matter(lengths):
    """Rings that go round many times, not once, or not at all."""
    qkv, dout = torch.randn(sum(lengths), 3, HEADS, 64).bfloat16(), torch.randn(sum(lengths), HEADS, 64).bfloat16()
    first = backward(qkv, dout, lengths, 64, programs=1, turned=True)
    for programs in (7, 30):
        assert torch.equal(backward(qkv, dout, lengths, 64, programs=programs, turned=True), first)


def test_a_sequence_that_is_no_number_leaves_other_groups_alone():
    lengths = (200, 256, 130)
    qkv, dout = torch.randn(sum(lengths), 3, HEADS, 64).bfloat16(), torch.randn(sum(lengths), HEADS, 64).bfloat16()
    qkv[:200] = float("nan")
    assert backward(qkv, dout, lengths, 64, programs=2, turned=True)[200:].isfinite().all()
