"""From padded tensors to flat ones and back, for masks of every pattern, with gradients.

Shapes: B sequences, S places in one sequence, T real tokens, C hidden size.
"""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.kernels import pad, sequence_positions, unpad

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
ELSEWHERE = "cpu" if NATIVE else "meta"
MASKS = {
    "at the start": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    "at the end": [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "scattered": [[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]],
    "rows without a token": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
    "every token": [[1, 1, 1], [1, 1, 1]],
    "no token": [[0, 0, 0], [0, 0, 0]],
}
cases = pytest.mark.parametrize("pattern", MASKS)


def mask_of(pattern, dtype=torch.bool):
    return torch.tensor(MASKS[pattern], device=DEVICE).to(dtype)


def tokens_of(mask, *shape, dtype=torch.float64):
    """x (B, S, *shape) for this mask, no two values alike."""
    count = mask.numel()
    for size in shape:
        count *= size
    return torch.arange(1, count + 1, device=DEVICE).view(*mask.shape, *shape).to(dtype)


def expected_of(x, mask):
    """flat, indices and lengths, by walking over rows and places."""
    rows = [[(b, s) for s in range(mask.shape[1]) if mask[b, s]] for b in range(mask.shape[0])]
    places = [place for row in rows for place in row]
    flat = torch.stack([x[place] for place in places]) if places else x.new_empty(0, *x.shape[2:])
    return flat, [b * mask.shape[1] + s for b, s in places], [len(row) for row in rows]


@cases
@pytest.mark.parametrize("shape", [(), (5,), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_the_real_tokens_are_taken_in_order(pattern, shape, dtype):
    # Any number but 0 stands for a token.
    mask = mask_of(pattern, dtype) * (True if dtype == torch.bool else 3)
    assert mask.dtype == dtype
    x = tokens_of(mask, *shape)
    flat, indices, cu_seqlens, max_seqlen = unpad(x, mask)
    expected, places, lengths = expected_of(x, mask)
    assert torch.equal(flat, expected)
    assert (indices.dtype, indices.tolist()) == (torch.int64, places)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0 and cu_seqlens.diff().tolist() == lengths
    assert (type(max_seqlen), max_seqlen) == (int, max(lengths))
    sequence, _ = sequence_positions(cu_seqlens, len(flat))
    assert sequence.tolist() == [place // mask.shape[1] for place in places]


@cases
def test_with_the_count_at_hand_all_but_the_bound_is_the_same(pattern):
    mask = mask_of(pattern)
    x = tokens_of(mask, 5)
    *expected, _ = unpad(x, mask)
    *given, max_seqlen = unpad(x, mask, total=int(mask.sum()))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert max_seqlen == mask.shape[1]


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_pad_puts_every_token_back(pattern, dtype):
    mask = mask_of(pattern)
    x = tokens_of(mask, 3, 2, dtype=dtype)
    flat, indices, *_ = unpad(x, mask)
    back = pad(flat, indices, *mask.shape)
    assert back.dtype == dtype
    assert torch.equal(back, x * mask[..., None, None])
    assert torch.equal(pad(flat, indices.int(), *mask.shape), back)


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 2), (0, 0, 2)])
def test_nothing_at_all(shape):
    x, mask = torch.ones(shape, device=DEVICE), torch.ones(shape[:2], device=DEVICE, dtype=torch.bool)
    flat, indices, cu_seqlens, max_seqlen = unpad(x, mask)
    assert flat.shape == (0, 2)
    assert cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert max_seqlen == 0
    assert pad(flat, indices, *shape[:2]).shape == shape


def test_tensors_with_gaps_are_taken_as_they_read():
    mask = mask_of("scattered")
    x = tokens_of(mask, 6)[..., ::2]
    flat, indices, *_ = unpad(x, mask.T.contiguous().T)
    assert torch.equal(flat, expected_of(x, mask)[0])
    assert torch.equal(pad(flat.T.contiguous().T, indices, *mask.shape), x * mask[..., None])


@cases
def test_gradients_are_those_of_finite_differences(pattern):
    mask = mask_of(pattern)
    x = torch.randn(*mask.shape, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    _, indices, *_ = unpad(x, mask)
    flat = torch.randn(len(indices), 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpad(x, mask)[0], x)
    assert torch.autograd.gradcheck(lambda flat: pad(flat, indices, *mask.shape), flat)


X, MASK = torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 3, device=DEVICE, dtype=torch.bool)
FLAT, INDICES = torch.ones(5, 4, device=DEVICE), torch.arange(5, device=DEVICE)
# The call, its arguments, the error, and in its message what is wrong and what was expected.
WRONG = [
    (unpad, (X, MASK.float()), TypeError, "attention_mask is float32", "expected bool or an integer dtype"),
    (unpad, (X, MASK[0]), ValueError, "attention_mask has shape (3,)", "expected (B, S)"),
    (unpad, (X, MASK[:, None]), ValueError, "attention_mask has shape (2, 1, 3)", "expected (B, S)"),
    (unpad, (X, MASK.T), ValueError, "x has shape (2, 3, 4)", "expected (3, 2, ...)"),
    (unpad, (X[0, 0], MASK), ValueError, "x has shape (4,)", "expected (2, 3, ...)"),
    (unpad, (X, MASK.to(ELSEWHERE)), ValueError, f"attention_mask is on {ELSEWHERE}", f"expected {DEVICE}"),
    (pad, (FLAT[0, 0], INDICES, 2, 3), ValueError, "flat has shape ()", "expected (T, ...)"),
    (pad, (FLAT, INDICES[:4], 2, 3), ValueError, "indices has shape (4,)", "expected (5,)"),
    (pad, (FLAT, INDICES.float(), 2, 3), TypeError, "indices is float32", "expected int32 or int64"),
    (pad, (FLAT, INDICES.to(ELSEWHERE), 2, 3), ValueError, f"indices is on {ELSEWHERE}", f"expected {DEVICE}"),
    (pad, (FLAT, INDICES, -2, 3), ValueError, "batch is -2", "expected at least 0"),
    (pad, (FLAT, INDICES, 2, 3.0), TypeError, "length is of type float", "expected int"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0].__name__}: {case[3]}")
def test_arguments_that_do_not_fit(case):
    function, arguments, error, wrong, expected = case
    with pytest.raises(error) as raised:
        function(*arguments)
    message = str(raised.value)
    assert re.fullmatch(f"{function.__name__}: .*{re.escape(wrong)}.*{re.escape(expected)}.*", message), message


@pytest.mark.parametrize(
    ("total", "error", "message"),
    [(6.0, TypeError, "unpad: total is of type float, expected int"), (-1, ValueError, "unpad: total is -1, expected")],
)
def test_a_count_that_is_none(total, error, message):
    with pytest.raises(error, match=message):
        unpad(X, MASK, total=total)


@pytest.mark.parametrize("total", [5, 7])
def test_a_wrong_count_is_found_on_request(monkeypatch, total):
    monkeypatch.setenv("CRAMFAST_CHECK", "1")
    with pytest.raises(ValueError, match=f"unpad: total is {total}, expected 6 as attention_mask has it"):
        unpad(X, MASK, total=total)
    assert len(unpad(X, MASK, total=6)[0]) == 6


@pytest.mark.parametrize("check", ["0", "1"])
def test_with_the_count_at_hand_it_compiles_whole(monkeypatch, check):
    monkeypatch.setenv("CRAMFAST_CHECK", check)
    torch.compiler.reset()
    counted = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counted)
    def there_and_back(x, mask, total):
        flat, indices, *_ = unpad(x, mask, total=total)
        return pad(2 * flat, indices, *mask.shape)

    for pattern in ("scattered", "rows without a token", "at the end"):
        mask = mask_of(pattern)
        x = tokens_of(mask, 5)
        assert torch.equal(there_and_back(x, mask, int(mask.sum())), 2 * x * mask[..., None])
    assert counted.frame_count == 1
    torch.compiler.reset()


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
def test_with_the_count_at_hand_nothing_waits_for_the_device():
    mask = mask_of("scattered")
    x = tokens_of(mask, 5).requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat, indices, *_ = unpad(x, mask, total=6)
        pad(flat, indices, *mask.shape).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x.grad, mask[..., None].expand_as(x).double())
