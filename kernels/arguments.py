"""Checks of operators' arguments, made before anything is launched. Each error is one line that names the argument.

They look at shapes, dtypes and devices alone, so that nothing waits for a GPU. `CRAMFAST_CHECK=1` adds checks of values
(see `checking`), for those who look for a mistake.
"""

import os
from collections.abc import Sequence

import torch


def expect_floating(operator: str, name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless the dtype is floating."""
    if not tensor.is_floating_point():
        raise TypeError(f"{operator}: {name} is {say(tensor.dtype)}, expected a floating dtype")


def expect_rows(operator: str, name: str, tensor: torch.Tensor, limit: int) -> int:
    """The size of the last dimension, 1 to `limit`. Raises TypeError unless the dtype is floating, else ValueError."""
    expect_floating(operator, name, tensor)
    width = tensor.shape[-1] if tensor.dim() else 0
    if not 1 <= width <= limit:
        shape = tuple(tensor.shape)
        raise ValueError(f"{operator}: {name} has shape {shape}, expected a last dimension from 1 to {limit}")
    return width


def expect_even(operator: str, name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless the dtype is floating, ValueError unless the last dimension is even and not 0."""
    expect_floating(operator, name, tensor)
    width = tensor.shape[-1] if tensor.dim() else 0
    if width == 0 or width % 2:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected an even last dimension")


def expect_choice(operator: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{operator}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def expect_like(operator: str, name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """Raises ValueError when `tensor` has another shape or device, TypeError when another dtype, than it should."""
    _expect_shape(operator, name, tensor, shape)
    expect_device(operator, name, tensor, like)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{operator}: {name} is {say(tensor.dtype)}, expected {say(like.dtype)}")


def expect_parameter(operator: str, name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """As `expect_like`, but a parameter may also be float32 beside 16-bit activations."""
    _expect_shape(operator, name, tensor, shape)
    expect_device(operator, name, tensor, like)
    if tensor.dtype != like.dtype and not (tensor.dtype == torch.float32 and like.dtype.itemsize == 2):
        wide = " or float32" if like.dtype.itemsize == 2 else ""
        raise TypeError(f"{operator}: {name} is {say(tensor.dtype)}, expected {say(like.dtype)}{wide}")


def expect_table(operator: str, name: str, tensor: torch.Tensor, limit: int) -> int:
    """The row width of a table. Raises as `expect_rows`, and ValueError unless it has two dimensions."""
    if tensor.dim() != 2:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected (rows, columns)")
    return expect_rows(operator, name, tensor, limit)


def expect_dtype(operator: str, dtype: torch.dtype, like: torch.Tensor) -> None:
    """Raises TypeError unless `dtype`, that of a result, is floating and float64 only where `like` is."""
    if not dtype.is_floating_point or (dtype.itemsize == 8 and like.dtype != dtype):
        raise TypeError(f"{operator}: dtype is {say(dtype)}, expected {say(like.dtype)}, float32 or a 16-bit one")


def expect_indices(
    operator: str, name: str, tensor: torch.Tensor, like: torch.Tensor, shape: Sequence[int] | None = None
) -> None:
    """Raises TypeError unless `tensor` is int32 or int64, ValueError unless it is (T,), of `shape` where that is given,
    on the device of `like`."""
    if shape is not None:
        _expect_shape(operator, name, tensor, shape)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operator}: {name} is {say(tensor.dtype)}, expected int32 or int64")
    if tensor.dim() != 1:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected (T,)")
    expect_device(operator, name, tensor, like)


def expect_int(operator: str, name: str, value: int, least: int) -> None:
    """Raises TypeError unless `value` is an int, ValueError when it is below `least`."""
    if not isinstance(value, (int, torch.SymInt)):  # the latter where shapes are traced
        raise TypeError(f"{operator}: {name} is of type {type(value).__name__}, expected int")
    if value < least:
        raise ValueError(f"{operator}: {name} is {value}, expected at least {least}")


def expect_flat(
    operator: str, buffers: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor], rates: torch.Tensor
) -> None:
    """What an optimizer works on: `buffers` (N,) in one dtype, float32 or wider, `rounded` (N,) in that or a narrower
    one, and rates, float32 (5,); all contiguous. Raises ValueError for a shape, device or layout, else TypeError."""
    name, first = next(iter(buffers.items()))
    if first.dim() != 1:
        raise ValueError(f"{operator}: {name} has shape {tuple(first.shape)}, expected (N,)")
    if not first.dtype.is_floating_point or first.dtype.itemsize < 4:
        raise TypeError(f"{operator}: {name} is {say(first.dtype)}, expected float32")
    for name, tensor in buffers.items():
        expect_like(operator, name, tensor, first.shape, first)
    for name, tensor in rounded.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize > first.dtype.itemsize:
            raise TypeError(f"{operator}: {name} is {say(tensor.dtype)}, expected {say(first.dtype)} or a 16-bit one")
        expect_like(operator, name, tensor, first.shape, first.new_empty(0, dtype=tensor.dtype))
    expect_like(operator, "rates", rates, (5,), first.new_empty(0, dtype=torch.float32))
    for name, tensor in (buffers | rounded | {"rates": rates}).items():
        if not tensor.is_contiguous():
            raise ValueError(f"{operator}: {name} has stride {tensor.stride()}, expected it contiguous")


def expect_device(operator: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Raises ValueError unless `tensor` is where `like` is."""
    if tensor.device != like.device:
        raise ValueError(f"{operator}: {name} is on {tensor.device}, expected {like.device} like the other tensors")


def checking(tensor: torch.Tensor) -> bool:
    """Whether the values of `tensor` may and should be looked at: with CRAMFAST_CHECK=1 in the environment, but neither
    under torch.compile nor while a CUDA graph is captured, where there are no values yet."""
    if os.environ.get("CRAMFAST_CHECK") != "1" or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def say(dtype: torch.dtype) -> str:
    """The name of `dtype` as messages have it."""
    return str(dtype).removeprefix("torch.")


def _expect_shape(operator: str, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
