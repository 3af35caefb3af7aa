"""Attention that the Triton kernels do not serve, handed to who serves it best: longer sequences, other head sizes,
32 bits, compute capability 7.5.

    flash-attn    where it is installed: 16 bits, compute capability 8.0 and above, head sizes up to 256
    varlen-attn   PyTorch's own build of the same, without dropout, head sizes a multiple of 8
    sdpa          else: the reference, by padding, in the best attention that PyTorch has for dense tensors

The first two compute on unpadded tensors. A batch whose sequences are all of one length is a dense tensor without any
padding, for which SDPA is the fastest where PyTorch has cuDNN compute it. Rotary embedding, which they lack, is applied
in front of them.

Source: Dao, FlashAttention-2, 2307.08691.
"""

import functools
import os
from collections.abc import Callable

import torch
from torch._C import _are_functorch_transforms_active

from .attention_settings import HEAD_SIZES, LONGEST
from .dispatch import MODES, Choice
from .rotary import turn, turns_in_one_kernel
from .sequences import all_as_long

# FlashAttention-2, whoever built it. Above the second its backward pass runs only on the cards named here.
_MAX_HEAD_SIZE, _MAX_HEAD_SIZE_ANYWHERE, _LARGE_CARDS = 256, 192, ((8, 0), (9, 0))
# Whose SDPA PyTorch has cuDNN compute.
_CARDS_OF_CUDNN = ((9, 0), (10, 0), (10, 3))


def choose_long(
    device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float = 0.0, dense: bool = False
) -> Choice:
    """Who computes attention that the Triton kernels do not serve: "flash-attn", "varlen-attn" or "sdpa", and why.

    dense: all sequences are of one length, and see all of themselves. Raises ValueError for an unknown
    CRAMFAST_KERNELS, RuntimeError when it forces Triton.
    """
    options = device, dtype, head_size, dropout_p > 0, dense, os.environ.get("CRAMFAST_KERNELS", "auto")
    if torch.compiler.is_compiling():  # traces through a cache, and warns of it
        return _choose(*options, False)
    return _remembered(*options, _are_functorch_transforms_active())


def long_attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    fallback: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention as `varlen_attention` defines it, qkv (T, 3, H, D) → (T, H, D), by whom `choose_long` names.

    fallback: the reference, with the same arguments; it also takes batches without a token, for which the others have
    no launch. Raises as `choose_long` does.
    """
    dense = window is None and all_as_long(cu_seqlens, qkv.shape[0], max_seqlen)
    backend = choose_long(qkv.device, qkv.dtype, qkv.shape[-1], dropout_p, dense).backend
    if qkv.shape[0] == 0:
        backend = "sdpa"
    elif cos is not None and (backend != "sdpa" or turns_in_one_kernel(qkv)):
        qkv, cos, sin = turn(qkv, cu_seqlens, cos, sin), None, None
    if backend == "sdpa":
        options = {"softmax_scale": softmax_scale, "window": window, "dropout_p": dropout_p}
        return fallback(qkv, cu_seqlens, max_seqlen, cos=cos, sin=sin, **options)
    # (left, right), -1 without a limit; both libraries keep them in 32 bits.
    window_size = (-1, -1) if window is None else 2 * (min(window, max_seqlen),)
    attend = _by_flash_attn if backend == "flash-attn" else _by_varlen_attn
    return attend(qkv.contiguous(), cu_seqlens.contiguous(), max_seqlen, softmax_scale, window_size, dropout_p)


def _by_flash_attn(qkv, cu_seqlens, max_seqlen, softmax_scale, window_size, dropout_p):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        window_size=window_size,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # as PyTorch's build asks by itself
    )


def _by_varlen_attn(qkv, cu_seqlens, max_seqlen, softmax_scale, window_size, _dropout_p):
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)  # of queries, and of keys
    return varlen_attn(*qkv.unbind(1), *lengths, scale=softmax_scale, window_size=window_size)


def _choose(
    device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool, dense: bool, mode: str, transformed: bool
) -> Choice:
    if mode not in MODES:
        raise ValueError(f"CRAMFAST_KERNELS={mode}: expected one of {', '.join(MODES)}")
    if mode == "triton":
        served = f"16 bits, head sizes {', '.join(map(str, HEAD_SIZES))}, sequences of up to {LONGEST} tokens"
        raise RuntimeError(f"CRAMFAST_KERNELS=triton, but varlen_attention cannot run as Triton: it takes {served}")
    if mode == "reference":
        return Choice("sdpa", "CRAMFAST_KERNELS=reference")
    obstacle = _obstacle(device, dtype, head_size)
    if obstacle is None and transformed:
        obstacle = "torch.func transforms plain operations alone"
    if obstacle is not None:
        return Choice("sdpa", obstacle)
    if dense and device.type == "cuda" and torch.cuda.get_device_capability(device) in _CARDS_OF_CUDNN:
        return Choice("sdpa", "sequences of one length")
    missing = _obstacle_of_flash_attn()
    if missing is None:
        return Choice("flash-attn", f"{device.type} device")
    obstacle = _obstacle_of_varlen_attn(head_size, dropout)
    return Choice("varlen-attn", missing) if obstacle is None else Choice("sdpa", f"{missing}, {obstacle}")


_remembered = functools.lru_cache(_choose)


def _obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why FlashAttention-2 cannot serve such tensors, whoever built it; None when it can."""
    if device.type != "cuda":
        return f"{device.type} device"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "compute capability below 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"no FlashAttention for {str(dtype).removeprefix('torch.')}"
    if head_size > (_MAX_HEAD_SIZE if capability in _LARGE_CARDS else _MAX_HEAD_SIZE_ANYWHERE):
        return f"no FlashAttention for head size {head_size} on this card"
    return None


def _obstacle_of_flash_attn() -> str | None:
    try:
        from flash_attn import flash_attn_varlen_qkvpacked_func  # noqa: F401
    except Exception as error:  # a broken build fails in as many ways as there are builds
        absent = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        return "flash-attn is not installed" if absent else "flash-attn does not import"
    return None


# torch.compile cannot trace an import that fails. This is all that torch.compiler.assume_constant_result does, but for
# the second that it takes to import the compiler.
_obstacle_of_flash_attn._dynamo_marked_constant = True


def _obstacle_of_varlen_attn(head_size: int, dropout: bool) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without FlashAttention"
    if dropout:
        return "varlen-attn has no dropout"
    return "varlen-attn takes head sizes that are a multiple of 8" if head_size % 8 else None
