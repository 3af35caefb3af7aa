"""Checks of attention's arguments, in the manner of `arguments.py`.

What cu_seqlens holds is on the GPU, and to look at it is to wait: without CRAMFAST_CHECK=1 a kernel is trusted with it.
"""

import torch

from .arguments import checking, expect_device, expect_floating, expect_int, say

_NAME = "varlen_attention"


def expect_attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    softmax_scale: float | None,
    window: int | None,
    dropout_p: float,
) -> None:
    """Everything that `varlen_attention` asks of its arguments.

    Raises TypeError for a dtype or a type that does not fit, ValueError for a shape, device or value.
    """
    expect_floating(_NAME, "qkv", qkv)
    shape = qkv.shape
    if len(shape) != 4 or shape[1] != 3 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"{_NAME}: qkv has shape {tuple(shape)}, expected (T, 3, H, D)")
    expect_sequences(_NAME, cu_seqlens, shape[0], max_seqlen, qkv)
    if cos is not None or sin is not None:
        _expect_rotary(cos, sin, max_seqlen, qkv)
    if softmax_scale is not None and not 0.0 < softmax_scale < float("inf"):
        raise ValueError(f"{_NAME}: softmax_scale is {softmax_scale}, expected a positive number")
    if window is not None:
        expect_int(_NAME, "window", window, 0)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{_NAME}: dropout_p is {dropout_p}, expected at least 0 and below 1")
    if checking(cu_seqlens):
        check_sequences(_NAME, cu_seqlens, shape[0], max_seqlen)


def expect_sequences(operator: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int, like: torch.Tensor) -> None:
    """cu_seqlens int32 (B+1,) on the device of `like`, and room for `total` tokens in B sequences of `max_seqlen`.

    Raises TypeError unless cu_seqlens is int32 and max_seqlen an int, ValueError for a shape, device or max_seqlen that
    does not fit. max_seqlen may be 0 where there are no tokens.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{operator}: cu_seqlens is {say(cu_seqlens.dtype)}, expected int32")
    shape = cu_seqlens.shape
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{operator}: cu_seqlens has shape {tuple(shape)}, expected (B + 1,)")
    expect_device(operator, "cu_seqlens", cu_seqlens, like)
    expect_int(operator, "max_seqlen", max_seqlen, 0 if total == 0 else 1)
    if total > (shape[0] - 1) * max_seqlen:
        room = f"{shape[0] - 1} sequences of at most max_seqlen={max_seqlen}"
        raise ValueError(
            f"{operator}: cu_seqlens has shape {tuple(shape)}, expected more than {room} for {total} tokens"
        )


def check_sequences(operator: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> None:
    """The values of cu_seqlens (B+1,): rising from 0 to `total`, in steps of `max_seqlen` at most.

    Copies them to the host, which waits for the GPU. Raises ValueError, which names the first place that is wrong.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{operator}: cu_seqlens[0] is {ends[0]}, expected 0")
    for place in range(1, len(ends)):
        start, end = ends[place - 1 : place + 1]
        if end < start:
            raise ValueError(f"{operator}: cu_seqlens[{place}] is {end}, expected at least {start} like the one before")
        if end - start > max_seqlen:
            length = f"ends a sequence of {end - start} tokens, expected at most max_seqlen={max_seqlen}"
            raise ValueError(f"{operator}: cu_seqlens[{place}] {length}")
    if ends[-1] != total:
        raise ValueError(f"{operator}: cu_seqlens[{len(ends) - 1}] is {ends[-1]}, expected {total}, all tokens")


def _expect_rotary(cos, sin, max_seqlen, qkv):
    if cos is None or sin is None:
        raise ValueError(f"{_NAME}: cos and sin go together; one of them is None")
    head_size = qkv.shape[3]
    if head_size % 2:
        raise ValueError(f"{_NAME}: qkv has shape {tuple(qkv.shape)}, expected an even last dimension for cos and sin")
    for name, table in (("cos", cos), ("sin", sin)):
        shape = table.shape
        if len(shape) != 2 or shape[0] < max_seqlen or shape[1] != head_size // 2:
            expected = f"at least {max_seqlen} rows of {head_size // 2}"
            raise ValueError(f"{_NAME}: {name} has shape {tuple(shape)}, expected {expected}")
        expect_device(_NAME, name, table, qkv)
        if table.dtype != torch.float32 and table.dtype != qkv.dtype:
            raise TypeError(f"{_NAME}: {name} is {say(table.dtype)}, expected {say(qkv.dtype)} or float32")
