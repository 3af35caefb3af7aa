"""Attention's arguments that do not fit: one line says which, what it is, and what was expected.

Shapes: T tokens, B sequences, S places in one sequence, H heads, D head size.
"""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.kernels.attention_arguments import check_sequences, expect_attention

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
ELSEWHERE = "cpu" if NATIVE else "meta"
WIDE, HALF = torch.float64, torch.float16


def qkv(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def table(*shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


def ends(*values, dtype=torch.int32, device=DEVICE):
    return torch.tensor(values, dtype=dtype, device=device)


def arguments(**other):
    """Those of a call in which all fits, but for `other`; "rotary" stands for both tables."""
    fitting = {
        "qkv": qkv(12, 3, 2, 8),
        "cu_seqlens": ends(0, 5, 12),
        "max_seqlen": 7,
        "cos": None,
        "sin": None,
        "softmax_scale": None,
        "window": None,
        "dropout_p": 0.0,
    }
    if "rotary" in other:
        other["cos"] = other["sin"] = other.pop("rotary")
    return fitting | other


LAYOUT = "expected (T, 3, H, D)"
SEQUENCES = "expected (B + 1,)"
# What is given instead, the error, and in its message what is wrong, and what was expected.
CASES = [
    ({"qkv": qkv(12, 3, 2, 8).long()}, TypeError, "qkv is int64", "expected a floating dtype"),
    ({"qkv": qkv(12, 2, 3, 8)}, ValueError, "qkv has shape (12, 2, 3, 8)", LAYOUT),
    ({"qkv": qkv(12, 3, 16)}, ValueError, "qkv has shape (12, 3, 16)", LAYOUT),
    ({"qkv": qkv(2, 6, 3, 2, 8)}, ValueError, "qkv has shape (2, 6, 3, 2, 8)", LAYOUT),
    ({"qkv": qkv(12, 3, 0, 8)}, ValueError, "qkv has shape (12, 3, 0, 8)", LAYOUT),
    ({"qkv": qkv(12, 3, 2, 0)}, ValueError, "qkv has shape (12, 3, 2, 0)", LAYOUT),
    ({"qkv": qkv()}, ValueError, "qkv has shape ()", LAYOUT),
    ({"cu_seqlens": ends(0, 5, 12).long()}, TypeError, "cu_seqlens is int64", "expected int32"),
    ({"cu_seqlens": ends(0, 5, 12).float()}, TypeError, "cu_seqlens is float32", "expected int32"),
    ({"cu_seqlens": ends(0, 5, 12)[None]}, ValueError, "cu_seqlens has shape (1, 3)", SEQUENCES),
    ({"cu_seqlens": ends(12)[0]}, ValueError, "cu_seqlens has shape ()", SEQUENCES),
    ({"cu_seqlens": ends()}, ValueError, "cu_seqlens has shape (0,)", SEQUENCES),
    ({"cu_seqlens": ends(0, device=ELSEWHERE)}, ValueError, f"cu_seqlens is on {ELSEWHERE}", f"expected {DEVICE}"),
    ({"cu_seqlens": ends(0)}, ValueError, "cu_seqlens has shape (1,)", "expected more than 0 sequences"),
    (
        {"max_seqlen": 5},
        ValueError,
        "cu_seqlens has shape (3,)",
        "expected more than 2 sequences of at most max_seqlen=5",
    ),
    ({"max_seqlen": 0}, ValueError, "max_seqlen is 0", "expected at least 1"),
    ({"max_seqlen": -7}, ValueError, "max_seqlen is -7", "expected at least 1"),
    ({"max_seqlen": 7.0}, TypeError, "max_seqlen is of type float", "expected int"),
    ({"max_seqlen": ends(7)[0]}, TypeError, "max_seqlen is of type Tensor", "expected int"),
    ({"cos": table(7, 4)}, ValueError, "cos and sin go together", "None"),
    ({"sin": table(7, 4)}, ValueError, "cos and sin go together", "None"),
    ({"rotary": table(6, 4)}, ValueError, "cos has shape (6, 4)", "expected at least 7 rows of 4"),
    ({"rotary": table(7, 8)}, ValueError, "cos has shape (7, 8)", "expected at least 7 rows of 4"),
    ({"rotary": table(7)}, ValueError, "cos has shape (7,)", "expected at least 7 rows of 4"),
    ({"cos": table(7, 4), "sin": table(5, 4)}, ValueError, "sin has shape (5, 4)", "expected at least 7 rows of 4"),
    ({"rotary": table(7, 4, device=ELSEWHERE)}, ValueError, f"cos is on {ELSEWHERE}", f"expected {DEVICE}"),
    ({"rotary": table(7, 4, dtype=WIDE)}, TypeError, "cos is float64", "expected float32"),
    ({"cos": table(7, 4), "sin": table(7, 4, dtype=HALF)}, TypeError, "sin is float16", "expected float32"),
    (
        {"qkv": qkv(12, 3, 2, 8, dtype=torch.bfloat16), "rotary": table(7, 4, dtype=HALF)},
        TypeError,
        "cos is float16",
        "expected bfloat16 or float32",
    ),
    (
        {"qkv": qkv(12, 3, 2, 7), "rotary": table(7, 3)},
        ValueError,
        "qkv has shape (12, 3, 2, 7)",
        "expected an even last dimension",
    ),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale is 0.0", "expected a positive number"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale is inf", "expected a positive number"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale is nan", "expected a positive number"),
    ({"window": -1}, ValueError, "window is -1", "expected at least 0"),
    ({"window": (2, 2)}, TypeError, "window is of type tuple", "expected int"),
    ({"window": 2.0}, TypeError, "window is of type float", "expected int"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0", "expected at least 0 and below 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1", "expected at least 0 and below 1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan", "expected at least 0 and below 1"),
]
FITTING = [
    {},
    {"qkv": qkv(12, 3, 1, 7, dtype=torch.bfloat16), "max_seqlen": 512, "window": 0, "dropout_p": 0.5},
    {"softmax_scale": 0.3},
    {"softmax_scale": 1},
    {"qkv": qkv(12, 3, 2, 8, dtype=HALF), "rotary": table(100, 4)},
    {"qkv": qkv(12, 3, 2, 8, dtype=HALF), "rotary": table(7, 4, dtype=HALF)},
    {"qkv": qkv(12, 3, 2, 8, dtype=WIDE), "rotary": table(7, 4, dtype=WIDE), "window": 1000},
    {"qkv": qkv(0, 3, 2, 8), "cu_seqlens": ends(0), "max_seqlen": 0},
    {"qkv": qkv(0, 3, 2, 8), "cu_seqlens": ends(0, 0, 0), "max_seqlen": 0},
    {"qkv": qkv(12, 3, 2, 8), "cu_seqlens": ends(0, 0, 6, 12, 12), "max_seqlen": 6},
]
# cu_seqlens of 12 tokens and the longest sequence, what is wrong there and what was expected.
VALUES = [
    ((1, 5, 12), 7, "cu_seqlens[0] is 1", "expected 0"),
    ((-1, 5, 12), 7, "cu_seqlens[0] is -1", "expected 0"),
    ((0, 7, 5, 12), 7, "cu_seqlens[2] is 5", "expected at least 7"),
    ((0, 5, 11), 7, "cu_seqlens[2] is 11", "expected 12"),
    ((0, 5, 13), 8, "cu_seqlens[2] is 13", "expected 12"),
    ((0,), 7, "cu_seqlens[0] is 0", "expected 12"),
    ((0, 0, 4, 12), 7, "cu_seqlens[3] ends a sequence of 8 tokens", "expected at most max_seqlen=7"),
]


def assert_message(raised, wrong, expected):
    message = str(raised.value)
    assert re.fullmatch(f"varlen_attention: .*{re.escape(wrong)}.*{re.escape(expected)}.*", message), message


@pytest.fixture
def checked(monkeypatch):
    """CRAMFAST_CHECK=1."""
    monkeypatch.setenv("CRAMFAST_CHECK", "1")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Without CRAMFAST_CHECK, whatever the environment says, unless a test asks for it."""
    monkeypatch.delenv("CRAMFAST_CHECK", raising=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2])
def test_arguments_that_do_not_fit(case):
    other, error, wrong, expected = case
    with pytest.raises(error) as raised:
        expect_attention(**arguments(**other))
    assert_message(raised, wrong, expected)


@pytest.mark.parametrize("other", FITTING)
@pytest.mark.parametrize("check", ["0", "1"])
def test_arguments_that_fit(monkeypatch, other, check):
    monkeypatch.setenv("CRAMFAST_CHECK", check)
    assert expect_attention(**arguments(**other)) is None


@pytest.mark.parametrize("case", VALUES, ids=lambda case: case[2])
def test_values_that_do_not_fit(case):
    values, max_seqlen, wrong, expected = case
    with pytest.raises(ValueError) as raised:
        check_sequences("varlen_attention", ends(*values), 12, max_seqlen)
    assert_message(raised, wrong, expected)


@pytest.mark.parametrize("values", [(0, 12), (0, 0, 5, 12, 12), (0, 5, 5, 12)])
def test_values_that_fit(values):
    assert check_sequences("varlen_attention", ends(*values), 12, 12) is None


def test_values_are_looked_at_on_request_alone(monkeypatch):
    wrong = arguments(cu_seqlens=ends(0, 7, 5, 12))
    expect_attention(**wrong)
    monkeypatch.setenv("CRAMFAST_CHECK", "1")
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 5"):
        expect_attention(**wrong)
    monkeypatch.setenv("CRAMFAST_CHECK", "0")
    expect_attention(**wrong)


def double(qkv, cu_seqlens, max_seqlen, cos, window):
    expect_attention(qkv, cu_seqlens, max_seqlen, cos, cos, 0.3, window, 0.1)
    return 2 * qkv


@pytest.mark.usefixtures("checked")
def test_the_checks_are_compiled_whole_and_once():
    torch.compiler.reset()
    counted = CompileCounterWithBackend("eager")
    compiled = torch.compile(double, fullgraph=True, dynamic=True, backend=counted)
    for total in (12, 13, 20):
        x = torch.randn(total, 3, 2, 8, device=DEVICE)
        assert torch.equal(compiled(x, ends(0, 5, total), total, table(30, 4), 3), 2 * x)
    assert counted.frame_count == 1
    # There are no values to look at there: these would be refused.
    compiled(x, ends(1, 5, 20), 20, table(30, 4), 3)
    torch.compiler.reset()


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
@pytest.mark.usefixtures("checked")
def test_values_are_not_looked_at_while_a_graph_is_captured():
    given = arguments()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        expect_attention(**given)
        given["qkv"] * 2  # an empty graph draws a warning


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
def test_the_checks_never_wait_for_the_device():
    given = arguments(rotary=table(7, 4))
    torch.cuda.set_sync_debug_mode("error")
    try:
        expect_attention(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
