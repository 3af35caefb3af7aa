"""Bidirectional attention inside each sequence of an unpadded batch.

    out[t] = sum_u softmax_u(scale * q[t] · k[u]) v[u],   u over the tokens of t's own sequence

Rotary position embedding turns q and k first when cos and sin are given: with x1, x2 the halves of a head,
(x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin). Sources: Vaswani et al., 1706.03762; Su et al., RoFormer, 2104.09864.
"""

import torch
import torch.nn.functional as F

from .dispatch import pick
from .sequences import sequence_positions


def varlen_attention_reference(
    qkv, cu_seqlens, max_seqlen, *, cos=None, sin=None, softmax_scale=None, window=None, dropout_p=0.0
):
    """The definition by padding to (B, max_seqlen), on any device and floating dtype; see `varlen_attention`."""
    total, _, heads, head_size = qkv.shape
    sequences = cu_seqlens.numel() - 1
    if total == 0:
        return qkv[:, 0]
    # Lengths never exceed max_seqlen, so this product is reached only when all are equal.
    uniform = total == sequences * max_seqlen
    if uniform:
        qkv_BS3HD = qkv.view(sequences, max_seqlen, 3, heads, head_size)
        mask = None
    else:
        sequence, position = sequence_positions(cu_seqlens, total)
        qkv_BS3HD = qkv.new_zeros(sequences, max_seqlen, 3, heads, head_size)
        qkv_BS3HD[sequence, position] = qkv
        lengths = cu_seqlens.diff()[:, None]
        mask = (torch.arange(max_seqlen, device=qkv.device) < lengths)[:, None, None, :]
    q_BHSD, k_BHSD, v_BHSD = qkv_BS3HD.permute(2, 0, 3, 1, 4)
    if cos is not None:
        q_BHSD, k_BHSD = (_rotate(x, cos[:max_seqlen], sin[:max_seqlen]) for x in (q_BHSD, k_BHSD))
    if window is not None:
        place = torch.arange(max_seqlen, device=qkv.device)
        near = (place[:, None] - place[None, :]).abs() <= window
        mask = near if mask is None else mask & near
    out_BHSD = F.scaled_dot_product_attention(
        q_BHSD, k_BHSD, v_BHSD, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale
    )
    out_BSHD = out_BHSD.transpose(1, 2)
    return out_BSHD.reshape(total, heads, head_size) if uniform else out_BSHD[sequence, position]


def _rotate(x, cos, sin):
    """Rotary embedding of x (B, H, S, D) by cos, sin (S, D/2), in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


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
    """Attention over sequences laid back to back: qkv (T, 3, H, D) → (T, H, D), bidirectional.

    cu_seqlens: int32 (B+1,), rising from 0 to T; no sequence is longer than `max_seqlen`. cos, sin:
    (>= max_seqlen, D/2), the rotary tables. softmax_scale: 1/sqrt(D) unless given. window: a token sees
    those at most this many places away on either side. dropout_p: applied to the attention weights.
    """
    run = pick("varlen_attention", qkv, varlen_attention_reference)
    return run(
        qkv,
        cu_seqlens,
        max_seqlen,
        cos=cos,
        sin=sin,
        softmax_scale=softmax_scale,
        window=window,
        dropout_p=dropout_p,
    )
