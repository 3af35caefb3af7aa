"""Bidirectional attention inside each sequence of an unpadded batch.

    out[t] = sum_u P[t, u] v[u],   P[t, u] = softmax_u(scale * q[t] · k[u]),   u over the tokens of t's own sequence

Rotary position embedding turns q and k first when cos and sin are given: with x1, x2 the halves of a head,
(x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin). A window leaves out u further from t than that. Dropout multiplies P by
0 or 1 / (1 − dropout_p), from random numbers that a counter gives: the same in the backward pass, and not stored.

Saved for the backward pass are the inputs, the output and a number per row and head, the logarithm of the softmax's
denominator (lse), with which P is computed again:

    dV = P^T dO,   dS = P * (dO V^T − delta),   dQ = scale dS K,   dK = scale dS^T Q,   delta = rowsum(dO * O)

qkv is read and dqkv written packed, as the linear layers around have them. How the work is laid out on the GPU is told
in `attention_kernels.py`.

Sources: Vaswani et al., 1706.03762; Su et al., RoFormer, 2104.09864; the backward pass from a saved lse: Dao et al.,
FlashAttention, 2205.14135; the random numbers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, and
Steele et al., "Fast splittable pseudorandom number generators", 2014.
"""

import functools

import torch
import torch.nn.functional as F

from .attention_arguments import expect_attention
from .attention_kernels import backward_keys, backward_queries, backward_tile, forward_blocks, forward_tile
from .attention_settings import (
    BLOCK,
    CAPABILITY,
    DTYPES,
    HEAD_SIZES,
    LONGEST,
    Ring,
    Setting,
    Steps,
    Tuning,
    block_for,
    launch_for,
    packs,
    setting_for,
    tile_for,
)
from .dispatch import pick
from .launch import aligned, capability_of, ceil_div, contiguous, dtype_of, multiprocessors
from .long_attention import long_attention
from .operator import Operator, define
from .packing import pack_sequences
from .rotary import rotate, tile_angles, token_angles, turn, turn_packed
from .sequences import all_as_long, group_sequences, sequence_positions

_NO_WINDOW = -1


def varlen_attention_reference(
    qkv, cu_seqlens, max_seqlen, *, cos=None, sin=None, softmax_scale=None, window=None, dropout_p=0.0
):
    """The definition by padding to (B, max_seqlen), on any device and floating dtype; see `varlen_attention`."""
    total, _, heads, head_size = qkv.shape
    sequences = cu_seqlens.numel() - 1
    if total == 0:
        return qkv[:, 0]
    uniform = all_as_long(cu_seqlens, total, max_seqlen)
    if uniform:
        qkv_BS3HD = qkv.view(sequences, max_seqlen, 3, heads, head_size)
        mask = None
    else:
        sequence, position = sequence_positions(cu_seqlens, total)
        qkv_BS3HD = qkv.new_zeros(sequences, max_seqlen, 3, heads, head_size)
        qkv_BS3HD[sequence, position] = qkv
        lengths = cu_seqlens.diff()[:, None]
        mask = (torch.arange(max_seqlen, device=qkv.device) < lengths)[:, None, None, :]
    q_BHSD, k_BHSD, v_BHSD = (x_BSHD.transpose(1, 2) for x_BSHD in qkv_BS3HD.unbind(2))
    if cos is not None:
        q_BHSD, k_BHSD = (rotate(x, cos[:max_seqlen], sin[:max_seqlen]) for x in (q_BHSD, k_BHSD))
    if window is not None:
        place = torch.arange(max_seqlen, device=qkv.device)
        near = (place[:, None] - place[None, :]).abs() <= window
        mask = near if mask is None else mask & near
    out_BHSD = F.scaled_dot_product_attention(
        q_BHSD, k_BHSD, v_BHSD, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale
    )
    out_BSHD = out_BHSD.transpose(1, 2)
    return out_BSHD.reshape(total, heads, head_size) if uniform else out_BSHD[sequence, position]


_remembered_capability = functools.lru_cache(capability_of)


def _setting(qkv, groups, angles, seed, tile, longest) -> Setting:
    capability, native = _remembered_capability(qkv.device), qkv.device.type == "cuda"
    options = groups is not None, angles is not None, seed is not None
    return setting_for(tile, int(qkv.shape[-1]), longest, *options, capability, native)


def _most_groups(total, groups, bounds, longest) -> int:
    """How many groups, or tiles, there may be of them: how many there are only the GPU knows."""
    if groups is None:
        return total // longest
    return groups.shape[0] - 1 if bounds.ndim == 2 else bounds.shape[1]


def _run(kernel, tuning, tensors, qkv, count, tile, longest, scale, window, dropout):
    """Run `kernel` over `tensors` with a program for each piece of work, or as many as stay on the GPU."""
    total, _, heads, head_size = qkv.shape
    in_gluon, in_ring = not isinstance(tuning, Tuning), isinstance(tuning, Ring)
    if in_gluon:
        tensors = tuple(map(aligned, tensors))
    dtypes = tuple(map(dtype_of, tensors))
    windowed = window >= 0 and not in_ring  # whose tables of places have what each of them sees
    launch = launch_for(kernel, tuning, dtypes, int(heads), int(head_size), tile, windowed)
    programs = count * heads * (1 if tile or in_gluon else ceil_div(longest, BLOCK))
    if tuning.programs and qkv.device.type == "cuda":
        programs = min(programs, multiprocessors(qkv.device) * tuning.programs)
    options = (scale, dropout) if in_ring else (window, scale, dropout)
    launch(programs, *tensors, total, count if tile else longest, *options)


def attention_forward(qkv, groups, bounds, angles, seed, tile, longest, scale, window, dropout):
    """(out, lse, turned); turned is None unless it takes qkv's place in the backward pass."""
    qkv, turned = qkv.contiguous(), None
    if angles is not None and not tile:
        qkv = turned = turn_packed(qkv, angles)
    total, _, heads, head_size = qkv.shape
    out, lse = qkv.new_empty(total, heads, head_size), qkv.new_empty(heads, total, dtype=torch.float32)
    setting = _setting(qkv, groups, angles, seed, tile, longest)
    count = _most_groups(qkv.shape[0], groups, bounds, longest)
    rest = (qkv, count, tile, longest, scale, window, dropout)
    if tile:
        _run(forward_tile, setting.forward, (qkv, groups, bounds, angles, seed, out, lse), *rest)
    else:
        _run(forward_blocks, setting.forward, (qkv, groups, bounds, seed, out, lse), *rest)
    return out, lse, turned


def attention_backward(dout, qkv, out, lse, groups, bounds, angles, seed, tile, longest, scale, window, dropout):
    dout, qkv = contiguous(dout, qkv)
    dqkv = torch.empty_like(qkv)
    setting = _setting(qkv, groups, angles, seed, tile, longest)
    count = _most_groups(qkv.shape[0], groups, bounds, longest)
    rest = (qkv, count, tile, longest, scale, window, dropout)
    if tile:
        _run(backward_tile, setting.backward, (dout, qkv, lse, groups, bounds, angles, seed, dqkv), *rest)
    elif setting.backward_keys is None:
        delta = (torch.empty_like(lse),) if isinstance(setting.backward, Steps) else ()
        _run(
            backward_queries, setting.backward, (dout, qkv, out, lse, groups, bounds, angles, seed, dqkv, *delta), *rest
        )
    else:
        delta, options = torch.empty_like(lse), (groups, bounds, angles, seed)
        _run(backward_queries, setting.backward, (dout, qkv, out, lse, *options, dqkv, delta), *rest)
        _run(backward_keys, setting.backward_keys, (dout, qkv, lse, delta, *options, dqkv), *rest)
    return (dqkv,)


def _save(ctx, inputs, results):
    qkv, groups, bounds, angles, seed, *ctx.settings = inputs
    out, lse, turned = results
    tile = ctx.settings[0]
    source = qkv if tile or angles is None else turned
    ctx.save_for_backward(source, out, lse, groups, bounds, angles, seed)


def _gradients(ctx, backward, dout, *_):
    return backward(dout, *ctx.saved_tensors, *ctx.settings)[0], *(None,) * 9


_OPTIONS = (
    "Tensor? groups, Tensor? bounds, Tensor? angles, Tensor? seed, "
    "int tile, int longest, float scale, int window, float dropout"
)
_operator = Operator(
    "varlen_attention",
    f"(Tensor qkv, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor turned)",
    forward=attention_forward,
    save=_save,
    backward=(
        attention_backward,
        define(
            "varlen_attention_backward",
            f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor dqkv",
            attention_backward,
        ),
    ),
    gradients=_gradients,
    dtypes=DTYPES,
    capability=CAPABILITY,
)


def varlen_attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention over sequences laid back to back: qkv (T, 3, H, D) → (T, H, D), bidirectional, in qkv's dtype.

    cu_seqlens: int32 (B+1,), rising from 0 to T; no sequence is longer than `max_seqlen`, which the host needs to know.
    What cu_seqlens holds is looked at only with CRAMFAST_CHECK=1 in the environment; the kernels trust it.
    cos, sin: (>= max_seqlen, D/2), fp32 or qkv's dtype, the rotary tables. softmax_scale: 1/sqrt(D) unless given.
    window: a token sees those at most this many places away on either side. dropout_p: applied to the attention
    weights; its random numbers come from torch's generator of the device.

    The Triton kernels take 16-bit tensors of head sizes 32, 64, 96 and 128 with sequences of up to 512 tokens. Others
    go to flash-attn where installed, else to PyTorch's variable-length attention, else to SDPA by padding; to SDPA
    without, where that is cuDNN's and all sequences are as long as max_seqlen says (`choose_long` says which).

    Raises TypeError for dtypes and ValueError for shapes, devices and values that do not fit, by name.
    """
    expect_attention(qkv, cu_seqlens, max_seqlen, cos, sin, softmax_scale, window, dropout_p)
    total, _, _, head_size = qkv.shape
    tables = {"cos": cos, "sin": sin}
    options = {"softmax_scale": softmax_scale, "window": window, "dropout_p": dropout_p}
    if not has_kernels(qkv.dtype, head_size, max_seqlen):
        fallback = varlen_attention_reference
        return long_attention(qkv, cu_seqlens, max_seqlen, **tables, **options, fallback=fallback)
    attend = pick("varlen_attention", qkv, varlen_attention_reference)
    if attend is varlen_attention_reference or total == 0:
        return varlen_attention_reference(qkv, cu_seqlens, max_seqlen, **tables, **options)
    if cos is not None and head_size == 96:  # halves of 48 are no power of two
        qkv, cos, sin = turn(qkv, cu_seqlens, cos, sin), None, None
    layout, settings = attention_layout(cu_seqlens, total, head_size, max_seqlen, cos=cos, sin=sin, **options)
    seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p > 0 else None
    return attend(qkv, *layout, seed, *settings)


def has_kernels(dtype: torch.dtype, head_size: int, max_seqlen: int) -> bool:
    """Whether the Triton kernels are for such tensors, where they run."""
    return max_seqlen <= LONGEST and head_size in HEAD_SIZES and dtype in DTYPES


def attention_layout(cu_seqlens, total, head_size, max_seqlen, *, cos, sin, softmax_scale, window, dropout_p):
    """What the kernels are told of a batch of `total` tokens besides qkv, the same for every layer that has these
    options: the tensors (groups, bounds, angles), the first two from `pack_sequences` or `group_sequences`, and the
    settings (tile, longest, scale, window, dropout)."""
    look_up = capability_of if torch.compiler.is_compiling() else _remembered_capability  # tracing warns of a cache
    capability, dropout = look_up(cu_seqlens.device), dropout_p > 0
    tile = tile_for(head_size, max_seqlen, cos is not None, dropout, capability)
    block = tile or block_for(head_size, capability)
    window = _NO_WINDOW if window is None else min(window, max_seqlen)
    groups = bounds = angles = None
    # Where the sequences just fill their tiles or blocks, nothing needs a mask.
    fitting = max_seqlen == tile if tile else max_seqlen % block == 0
    dense = fitting and all_as_long(cu_seqlens, total, max_seqlen) and window == _NO_WINDOW and head_size != 96
    packed = not dense and packs(tile, native=cu_seqlens.device.type == "cuda")
    if packed:
        groups, bounds = pack_sequences(cu_seqlens.contiguous(), total, tile, window)
    elif not dense:
        groups, bounds = group_sequences(cu_seqlens.contiguous(), total, max_seqlen, block)
    if cos is not None and packed:
        angles = tile_angles(cos, sin, tile)
    elif cos is not None:
        of_positions = tile or (max_seqlen if bounds is None else 0)
        angles = token_angles(cos, sin, None if of_positions else bounds, of_positions or total)
    scale = head_size**-0.5 if softmax_scale is None else softmax_scale
    return (groups, bounds, angles), (tile, max_seqlen, scale, window, dropout_p)
