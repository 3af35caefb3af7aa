"""The flat layout: T tokens of B sequences back to back, `cu_seqlens` (B+1,) marking where each begins and ends."""

import torch


def sequence_positions(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sequence each token belongs to, and its place there.

    cu_seqlens: int32 (B+1,), rising from 0 to `total`; sequences may be empty. Returns two int64 tensors (total,):
    the sequence index and the position inside the sequence. Nothing is copied to the host.
    """
    token = torch.arange(total, device=cu_seqlens.device)
    boundaries = cu_seqlens.long()
    sequence = torch.searchsorted(boundaries[1:], token, right=True)
    return sequence, token - boundaries[sequence]
