"""Sums over the rows of several matrices, native on a GPU and interpreted without one."""

import pytest
import torch
from test_operators import DEVICE, DTYPES, needs_gpu, randn

from cramfast.kernels import column_sums, column_sums_reference

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

WIDTHS = ((96, 32, 128, 32), (64,), (1, 130), (200, 33, 64), (8, 16, 24, 32, 40))


def matrices(rows: int, widths: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(rows, width, seed=i, dtype=dtype) for i, width in enumerate(widths)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 64, 200])
def test_sums_err_at_most_twice_as_much_as_torch(rows, widths, dtype):
    given = matrices(rows, widths, dtype)
    exact = column_sums_reference([x.double() for x in given], torch.float64)
    for wanted in {dtype, torch.float32}:
        ours, theirs = column_sums(given, wanted), column_sums_reference(given, wanted)
        assert [s.dtype for s in ours] == [wanted] * len(widths) and [len(s) for s in ours] == [*widths]
        for x, s, other, right in zip(given, ours, theirs, exact, strict=True):
            # Of a single column torch's error may be none at all.
            allowed = 2 * (other - right).abs().max() + torch.finfo(torch.float32).eps * x.double().abs().sum(0).max()
            assert (s - right).abs().max() <= allowed


def test_the_same_every_time():
    given = matrices(150, (96, 32), torch.float16)
    once, again = (column_sums(given, torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@needs_gpu
def test_rows_far_down_are_reached():
    """Their places are beyond 32 bits, which takes too much memory to show on a CPU."""
    x = torch.zeros(300_000, 8192, dtype=torch.float16, device=DEVICE)
    x[-1] = 1
    (s,) = column_sums([x], torch.float32)
    assert torch.equal(s, torch.ones_like(s))


def test_other_numbers_of_rows_are_named():
    with pytest.raises(ValueError, match=r"matrices have shapes \(3, 8\), \(4, 8\), expected as many rows"):
        column_sums([randn(3, 8), randn(4, 8)], torch.float32)
