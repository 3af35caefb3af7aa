"""What the card itself can do: a device-to-device copy and large matrix products, in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from .cases import FORWARD, Case, Inputs, Sizes
from .peers import EAGER

# From 512 MiB on the driver's copy inside a graph runs at two thirds of the rate, measured on an NVIDIA H200.
_COPY_BYTES = 384 * 2**20
_MATMUL = 8192
# Input sets, results and the slack around them: this many buffers have to fit into free memory.
_BUFFERS = 16


def copy_case(sizes: Sizes, free_bytes: int) -> Case:
    """Bytes read and bytes written both count."""
    mib = _halved(_COPY_BYTES, lambda size: size, free_bytes) // 2**20
    count = mib * 2**20 // sizes.dtype.itemsize

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        return Inputs({"source": normal(count), "target": normal(count)})

    return Case(
        "copy",
        f"{mib}MiB",
        sizes.dtype,
        make,
        eager=lambda source, target: target.copy_(source),
        bytes={FORWARD: 2 * mib * 2**20},
    )


def matmul_case(sizes: Sizes, free_bytes: int) -> Case:
    n = _matmul_size(sizes, free_bytes)

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        return Inputs({"a": normal(n, n), "b": normal(n, n)})

    return Case("matmul", f"{n}x{n}x{n}", sizes.dtype, make, eager=lambda a, b: a @ b, flops={FORWARD: 2 * n**3})


def matmul_fp8_case(sizes: Sizes, free_bytes: int) -> Case:
    """e4m3 operands with one scale each, bf16 out."""
    n = _matmul_size(sizes, free_bytes)

    def make(seed: int) -> Inputs:
        normal = sizes.normal(seed)
        a, b = (normal(n, n).to(torch.float8_e4m3fn) for _ in range(2))
        return Inputs({"a": a, "b": b.t(), "scale": torch.ones((), device=sizes.device)})

    def product(a, b, scale):
        return torch._scaled_mm(a, b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)

    dtype = torch.float8_e4m3fn
    return Case("matmul-fp8", f"{n}x{n}x{n}", dtype, make, eager=product, flops={FORWARD: 2 * n**3})


def _matmul_size(sizes: Sizes, free_bytes: int) -> int:
    return _halved(_MATMUL, lambda n: sizes.tensor_bytes(n, n), free_bytes)


def _halved(size: int, nbytes: Callable[[int], int], free_bytes: int) -> int:
    while nbytes(size) * _BUFFERS > free_bytes:
        size //= 2
    return size


@pytest.mark.parametrize("factory", (copy_case, matmul_case, matmul_fp8_case), ids=("copy", "matmul", "matmul-fp8"))
def test_limits(measured, machine, factory):
    if factory is matmul_fp8_case and torch.cuda.get_device_capability(machine.device) < (8, 9):
        pytest.skip("this card has no fp8")
    measured(partial(factory, free_bytes=machine.free_bytes), FORWARD, EAGER)
