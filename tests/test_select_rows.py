"""Rows of a matrix and their gradient, native on a GPU and interpreted without one: copies, so every bit is right."""

import pytest
import torch
from test_operators import DEVICE, DTYPES, needs_gpu, randn

from cramfast.kernels import select_rows, select_rows_reference

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

SHAPES = ((50, 768, 13), (7, 776, 7), (33, 33, 1), (5, 16, 0), (130, 64, 100))


def some_rows(total: int, count: int, dtype=torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(total)
    return torch.randperm(total, generator=generator)[:count].to(DEVICE, dtype)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("total", "width", "count"), SHAPES)
def test_rows_and_their_gradient(total, width, count, dtype, index):
    x, rows = randn(total, width, dtype=dtype).requires_grad_(), some_rows(total, count, index)
    y = select_rows(x, rows)
    assert torch.equal(y, x[rows.long()])
    dy = randn(count, width, seed=1, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = torch.zeros_like(x)
    expected[rows.long()] = dy
    assert torch.equal(dx, expected)


def test_a_gradient_that_is_not_contiguous():
    x, rows = randn(20, 64).requires_grad_(), some_rows(20, 6)
    dy = randn(64, 6).t()
    (ours,) = torch.autograd.grad(select_rows(x, rows), x, dy)
    (theirs,) = torch.autograd.grad(select_rows_reference(x, rows), x, dy)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("x", "rows", "error", "message"),
    [
        ((5,), torch.zeros(1).long(), ValueError, r"x has shape \(5,\), expected \(T, C\)"),
        ((5, 4), torch.zeros(1), TypeError, "rows is float32, expected int32 or int64"),
        ((5, 4), torch.zeros(1, 1).long(), ValueError, r"rows has shape \(1, 1\), expected \(T,\)"),
    ],
)
def test_what_does_not_fit_is_named(x, rows, error, message):
    with pytest.raises(error, match=f"select_rows: {message}"):
        select_rows(randn(*x), rows.to(DEVICE))


def test_checking_finds_a_row_that_comes_twice(monkeypatch):
    monkeypatch.setenv("CRAMFAST_CHECK", "1")
    with pytest.raises(ValueError, match="rows has a row twice"):
        select_rows(randn(5, 16), torch.tensor([1, 3, 1], device=DEVICE))


@needs_gpu
def test_it_does_not_wait_for_the_gpu():
    x, rows = randn(500, 768, dtype=torch.bfloat16).requires_grad_(), some_rows(500, 100)
    torch.autograd.grad(select_rows(x, rows).sum(), x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(select_rows(x, rows).sum(), x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
