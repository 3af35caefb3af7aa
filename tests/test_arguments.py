"""Arguments that do not fit: one line says which operator and argument, what it is, what was expected. No launch."""

import re

import pytest
import torch

from cramfast.kernels import Launch, add_layer_norm, embed, geglu, gelu, layer_norm

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
ELSEWHERE = "cpu" if NATIVE else "meta"
HALF, BF16, WIDE = torch.float16, torch.bfloat16, torch.float64


def ones(*shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


def ids(*shape, dtype=torch.int64, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


X, W = ones(3, 8), ones(8)
EVEN = "expected an even last dimension"
LIMITS = "expected a last dimension from 1 to 16384"
# Arguments, the error, and in its message which argument is what, and what was expected instead.
NORM_CASES = [
    ((ones(3, 8, dtype=torch.int64), W), TypeError, "x is int64", "expected a floating dtype"),
    ((ones(), W), ValueError, "x has shape ()", LIMITS),
    ((ones(3, 0), ones(0)), ValueError, "x has shape (3, 0)", LIMITS),
    ((ones(3, 16_385), ones(16_385)), ValueError, "x has shape (3, 16385)", LIMITS),
    ((X, ones(7)), ValueError, "weight has shape (7,)", "expected (8,)"),
    ((X, ones(3, 8)), ValueError, "weight has shape (3, 8)", "expected (8,)"),
    ((X, ones()), ValueError, "weight has shape ()", "expected (8,)"),
    ((X, ones(8, device=ELSEWHERE)), ValueError, f"weight is on {ELSEWHERE}", f"expected {DEVICE}"),
    ((X, ones(8, dtype=HALF)), TypeError, "weight is float16", "expected float32"),
    ((X.half(), ones(8, dtype=BF16)), TypeError, "weight is bfloat16", "expected float16 or float32"),
    ((X.bfloat16(), ones(8, dtype=WIDE)), TypeError, "weight is float64", "expected bfloat16 or float32"),
    ((X.double(), W), TypeError, "weight is float32", "expected float64"),
    ((X, W, ones(9)), ValueError, "bias has shape (9,)", "expected (8,)"),
    ((X, W, ones(8, device=ELSEWHERE)), ValueError, f"bias is on {ELSEWHERE}", f"expected {DEVICE}"),
    ((X, W, ones(8, dtype=WIDE)), TypeError, "bias is float64", "expected float32"),
    ((X.half(), W, ones(8, dtype=BF16)), TypeError, "bias is bfloat16", "expected float16 or float32"),
]
RESIDUAL_CASES = [
    ((X, ones(2, 8), W), ValueError, "residual has shape (2, 8)", "expected (3, 8)"),
    ((X, ones(8), W), ValueError, "residual has shape (8,)", "expected (3, 8)"),
    ((X, ones(3, 8, device=ELSEWHERE), W), ValueError, f"residual is on {ELSEWHERE}", f"expected {DEVICE}"),
    ((X, X.half(), W), TypeError, "residual is float16", "expected float32"),
    ((X.half(), X, W), TypeError, "residual is float32", "expected float16"),
]
GELU_CASES = [
    ((ids(3, 8),), TypeError, "x is int64", "expected a floating dtype"),
    ((X, "sigmoid"), ValueError, "approximate is 'sigmoid'", "expected one of 'none', 'tanh'"),
    ((X, None), ValueError, "approximate is None", "expected one of 'none', 'tanh'"),
]
GEGLU_CASES = [
    *GELU_CASES,
    ((ones(3, 7),), ValueError, "x has shape (3, 7)", EVEN),
    ((ones(3, 0),), ValueError, "x has shape (3, 0)", EVEN),
    ((ones(),), ValueError, "x has shape ()", EVEN),
]
TABLE = ones(5, 8)
EMBED_CASES = [
    ((ids(4, dtype=torch.int16), TABLE, W), TypeError, "input_ids is int16", "expected int32 or int64"),
    ((ones(4), TABLE, W), TypeError, "input_ids is float32", "expected int32 or int64"),
    ((ids(2, 2), TABLE, W), ValueError, "input_ids has shape (2, 2)", "expected (T,)"),
    ((ids(), TABLE, W), ValueError, "input_ids has shape ()", "expected (T,)"),
    ((ids(4, device=ELSEWHERE), TABLE, W), ValueError, f"input_ids is on {ELSEWHERE}", f"expected {DEVICE}"),
    ((ids(4), W, W), ValueError, "weight has shape (8,)", "expected"),
    ((ids(4), ids(5, 8), W), TypeError, "weight is int64", "expected a floating dtype"),
    ((ids(4), ones(5, 0), ones(0)), ValueError, "weight has shape (5, 0)", LIMITS),
    ((ids(4), ones(5, 16_385), W), ValueError, "weight has shape (5, 16385)", LIMITS),
    ((ids(4), TABLE, ones(7)), ValueError, "norm_weight has shape (7,)", "expected (8,)"),
    ((ids(4), TABLE, W.half()), TypeError, "norm_weight is float16", "expected float32"),
    ((ids(4), TABLE, W, ones(7)), ValueError, "norm_bias has shape (7,)", "expected (8,)"),
    ((ids(4), TABLE, W, W.double()), TypeError, "norm_bias is float64", "expected float32"),
]
PLACES_CASES = [
    (ids(4), None, ValueError, "position_weight", "None"),
    (None, TABLE, ValueError, "position_ids", "None"),
    (ids(3), TABLE, ValueError, "position_ids has shape (3,)", "expected (4,)"),
    (ids(4, dtype=torch.uint8), TABLE, TypeError, "position_ids is uint8", "expected int32 or int64"),
    (ids(4, device=ELSEWHERE), TABLE, ValueError, f"position_ids is on {ELSEWHERE}", f"expected {DEVICE}"),
    (ids(4), ones(5, 7), ValueError, "position_weight has shape (5, 7)", "expected"),
    (ids(4), W, ValueError, "position_weight has shape (8,)", "expected"),
    (ids(4), ones(), ValueError, "position_weight has shape ()", "expected"),
    (ids(4), TABLE.half(), TypeError, "position_weight is float16", "expected float32"),
    (ids(4), ones(5, 8, device=ELSEWHERE), ValueError, f"position_weight is on {ELSEWHERE}", f"expected {DEVICE}"),
]


def cases():
    """(operator, positional arguments, named ones, error, what is wrong, what was expected)"""
    for arguments, *wrong in NORM_CASES:
        yield layer_norm, arguments, {}, *wrong
        x, *parameters = arguments
        yield add_layer_norm, (x, x, *parameters), {}, *wrong
    others = {add_layer_norm: RESIDUAL_CASES, gelu: GELU_CASES, geglu: GEGLU_CASES, embed: EMBED_CASES}
    for function, listed in others.items():
        for arguments, *wrong in listed:
            yield function, arguments, {}, *wrong
    for position_ids, position_weight, *wrong in PLACES_CASES:
        named = {"position_ids": position_ids, "position_weight": position_weight}
        yield embed, (ids(4), TABLE, W), named, *wrong
    for dtype in (torch.int32, WIDE):
        said = f"dtype is {str(dtype).removeprefix('torch.')}"
        yield embed, (ids(4), TABLE, W), {"dtype": dtype}, TypeError, said, "expected"


def name_of(case):
    return f"{case[0].__name__}: {case[4]}"


@pytest.fixture(params=["reference", "triton_kernels"])
def backend(request):
    request.getfixturevalue(request.param)


@pytest.fixture
def launched(monkeypatch):
    """Every kernel launched."""
    calls = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *_: calls.append(launch))
    return calls


@pytest.mark.parametrize("case", [*cases()], ids=name_of)
def test_arguments_that_do_not_fit(case, backend, launched):
    function, arguments, named, error, wrong, expected = case
    with pytest.raises(error) as raised:
        function(*arguments, **named)
    message = str(raised.value)
    assert re.fullmatch(f"{function.__name__}: .*{re.escape(wrong)}.*{re.escape(expected)}.*", message), message
    assert not launched


@pytest.mark.usefixtures("triton_kernels")
def test_arguments_that_fit_are_launched(launched):
    layer_norm(X.half(), W, W.half())
    add_layer_norm(ones(2, 3, 16_384), ones(2, 3, 16_384), ones(16_384))
    geglu(ones(2), "tanh")
    gelu(ones(3, 7))
    embed(ids(4, dtype=torch.int32), TABLE, W, position_ids=ids(4), position_weight=ones(1, 8), dtype=BF16)
    assert len(launched) == 5
