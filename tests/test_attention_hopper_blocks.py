"""The kernels of `attention_hopper_blocks.py` and `attention_hopper_steps.py` on the CPU, where `gluon_on_cpu` stands
in for Gluon. On a card of compute capability 9.0 all tests of attention run them as they are."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gluon_on_cpu import run
from test_attention_hopper import by_reference, with_dropout

from cramfast.kernels.attention_hopper_blocks import backward_blocks_hopper
from cramfast.kernels.attention_hopper_steps import backward_steps_hopper
from cramfast.kernels.rotary import token_angles, turn
from cramfast.kernels.sequences import group_sequences
from cramfast.model import rotary_tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter for what is not Gluon")

HEADS, BLOCK = 2, 128


@dataclass(frozen=True)
class Kernel:
    """`span`: of its longest sequence; `ragged`: lengths of many kinds; `partitions`: how many its warps are in."""

    function: Any
    span: int
    ragged: tuple[int, ...]
    partitions: int
    notes_delta: bool
    constants: dict[str, int]


BLOCKS = Kernel(
    backward_blocks_hopper,
    span=256,
    ragged=(200, 1, 17, 63, 129, 256, 128, 3, 3, 3, 255, 20),
    partitions=2,
    notes_delta=False,
    constants={"MULTIPLIERS": 8, "MULTIPLIERS_REGISTERS": 224},
)
STEPS = Kernel(
    backward_steps_hopper,
    span=512,
    ragged=(200, 1, 17, 63, 129, 400, 3, 3, 3, 512, 20, 300, 64, 65, 384, 30),
    partitions=4,
    notes_delta=True,
    constants={"MULTIPLIERS_REGISTERS": 208, "LOADERS_REGISTERS": 48},
)
kernels = pytest.mark.parametrize("kernel", [pytest.param(BLOCKS, id="blocks"), pytest.param(STEPS, id="steps")])


def backward(kernel, qkv, dout, lengths, programs, window=None, turned=False, dropout=0.0, slow=None):
    """dqkv by the kernel, of which the partition `slow` is."""
    (total, _, _, size), span = qkv.shape, max(lengths)
    masked = len({*lengths}) > 1 or span % BLOCK > 0 or window is not None
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    groups = bounds = angles = None
    if masked:
        groups, bounds = group_sequences(cu_seqlens, total, span, BLOCK)
    if turned:
        tables = rotary_tables(kernel.span, size, 10_000.0)
        angles = token_angles(*tables, bounds, total if masked else span)
        qkv = turn(qkv, cu_seqlens, *tables)
    (out, lse), dqkv = with_dropout(qkv.float(), lengths, window, dropout), torch.full_like(qkv, float("nan"))
    seed = torch.tensor([1]) if dropout else None
    deltas = [torch.full_like(lse, float("nan"))] if kernel.notes_delta else []
    tensors = (dout, qkv, out.to(qkv.dtype), lse, groups, bounds, angles, seed, dqkv, *deltas)
    scalars = (total, span, -1 if window is None else window, size**-0.5, dropout)
    constants = kernel.constants | {"H": HEADS, "D": size, "WINDOWED": window is not None}
    run(kernel.function, programs, *tensors, *scalars, num_warps=4, slow=slow, **constants)
    return dqkv


def batch(lengths, size=64, dtype=torch.bfloat16):
    """qkv, and a gradient for the output."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, size, generator=generator).to(dtype)
    return qkv, torch.randn(sum(lengths), HEADS, size, generator=generator).to(dtype)


def assert_as_exact_as_the_reference(kernel, lengths, size, dtype, **options):
    qkv, dout = batch(lengths, size, dtype)
    _, exact = by_reference(qkv, dout, lengths, size, torch.float64, **options)
    _, of_dtype = by_reference(qkv, dout, lengths, size, dtype, **options)
    found = backward(kernel, qkv, dout, lengths, programs=3, **options)
    for which in range(3):
        error, allowed = (found - exact)[:, which].norm(), 2 * (of_dtype - exact)[:, which].norm()
        assert error <= allowed, "qkv"[which]


BF16, HALF = torch.bfloat16, torch.float16


@kernels
@pytest.mark.parametrize(
    ("ragged", "size", "dtype", "options"),
    [
        pytest.param(False, 64, BF16, {}, id="full"),
        pytest.param(False, 64, HALF, {"turned": True}, id="full, rotary"),
        pytest.param(False, 64, BF16, {"window": 129}, id="full, a window of more than a block"),
        pytest.param(False, 64, HALF, {"window": 0}, id="full, a window of the token alone"),
        pytest.param(True, 64, HALF, {}, id="ragged", marks=pytest.mark.thorough),
        pytest.param(True, 64, BF16, {"turned": True}, id="ragged, rotary"),
        pytest.param(
            True,
            32,
            HALF,
            {"turned": True, "window": 20},
            id="ragged, rotary, window, heads of 32",
            marks=pytest.mark.thorough,
        ),
        pytest.param(False, 64, HALF, {"dropout": 0.3}, id="full, dropout"),
        pytest.param(True, 64, BF16, {"dropout": 0.1}, id="ragged, dropout"),
        pytest.param(True, 32, BF16, {"dropout": 0.5, "turned": True, "window": 70}, id="ragged, all, heads of 32"),
    ],
)
def test_results_are_as_exact_as_the_reference(kernel, ragged, size, dtype, options):
    lengths = kernel.ragged if ragged else (kernel.span,) * 3
    assert_as_exact_as_the_reference(kernel, lengths, size, dtype, **options)


@kernels
@pytest.mark.parametrize(
    ("lengths", "size"),
    [((128,) * 3, 32), ((129,), 64), ((192,) * 2, 64)],
    ids=["a block", "and a token", "half a block"],
)
def test_so_are_those_of_one_block_and_more(kernel, lengths, size):
    assert_as_exact_as_the_reference(kernel, lengths, size, torch.bfloat16, turned=True)


@kernels
@pytest.mark.parametrize(
    ("ragged", "options"),
    [
        pytest.param(False, {"turned": True}, id="full, rotary", marks=pytest.mark.thorough),
        pytest.param(False, {"window": 70, "dropout": 0.1}, id="full, window, dropout"),
        pytest.param(True, {"turned": True, "window": 70}, id="ragged, rotary, window"),
        pytest.param(True, {"dropout": 0.1}, id="ragged, dropout", marks=pytest.mark.thorough),
    ],
)
def test_who_does_the_work_does_not_matter(kernel, ragged, options):
    """Rings that go round many times, not once, or not at all."""
    lengths = kernel.ragged[:8] if ragged else (kernel.span,) * 3
    qkv, dout = batch(lengths)
    first = backward(kernel, qkv, dout, lengths, programs=1, **options)
    assert first.isfinite().all()
    for programs in (7, 30):
        assert torch.equal(backward(kernel, qkv, dout, lengths, programs=programs, **options), first)


@kernels
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="all", marks=pytest.mark.thorough), pytest.param({"window": 70}, id="window")],
)
def test_nobody_relies_on_another_being_fast(kernel, options):
    lengths = (kernel.span, 129, 30)
    qkv, dout = batch(lengths)
    usual = backward(kernel, qkv, dout, lengths, programs=1, **options)
    for slow in range(kernel.partitions):
        assert torch.equal(backward(kernel, qkv, dout, lengths, programs=1, slow=slow, **options), usual)


@kernels
def test_a_sequence_that_is_no_number_leaves_other_groups_alone(kernel):
    lengths = (kernel.span - 56, kernel.span, 130)
    qkv, dout = batch(lengths)
    qkv[: lengths[0]] = float("nan")
    assert backward(kernel, qkv, dout, lengths, programs=2, turned=True)[lengths[0] :].isfinite().all()
