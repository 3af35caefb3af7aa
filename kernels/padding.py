"""Between the padded layout (B, S, ...) and the flat one (T, ...) of `sequences.py`.

For callers who hold padded tensors and a mask of their real tokens. Both ways are one indexed copy, differentiable.
"""

import torch
import torch.nn.functional as F

from .arguments import checking, expect_device, expect_indices, expect_int, say


def unpad(
    x: torch.Tensor, attention_mask: torch.Tensor, *, total: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The real tokens of x (B, S, ...), of any dtype, back to back → (flat, indices, cu_seqlens, max_seqlen).

    attention_mask (B, S), bool or integer: a token is real where it is not 0, anywhere in its row; a row without one is
    an empty sequence. flat (T, ...) holds the tokens in x's order, indices int64 (T,) their places in x as (B·S, ...),
    for `pad`; cu_seqlens int32 (B+1,). In its sequence a token has the place that it has among the real ones.

    Without `total`, the number T of real tokens, the host waits for the device once, and max_seqlen is the longest
    sequence. With it the host never waits, torch.compile traces through, and max_seqlen is S: a valid bound on every
    length, if not the least.

    Raises TypeError for a mask that is neither bool nor integer, ValueError for a shape, device or total that does not
    fit; IndexError, on a GPU a failed assertion there, when `total` exceeds the number of real tokens.
    """
    _expect_mask(x, attention_mask)
    real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    lengths = real.sum(1)
    if total is None:
        on_host = lengths.tolist()
        total, max_seqlen = sum(on_host), max(on_host, default=0)
    else:
        expect_int("unpad", "total", total, 0)
        if checking(lengths) and total != lengths.sum().item():
            raise ValueError(f"unpad: total is {total}, expected {lengths.sum().item()} as attention_mask has it")
        max_seqlen = attention_mask.shape[1]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # Token number n is where the count of real tokens reaches n; `nonzero` would ask the device how many there are.
    count = real.flatten().cumsum(0)
    indices = torch.searchsorted(count, torch.arange(1, total + 1, device=x.device))
    return x.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, max_seqlen


def pad(flat: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Back from flat (T, ...) to (batch, length, ...), zeros where there is no token; what `unpad` gave is its inverse.

    indices (T,), int32 or int64: the place of each token in (batch · length, ...). Nothing is copied to the host.

    Raises TypeError for a dtype or type that does not fit, ValueError for a shape, device or size; for an index out of
    range as torch does.
    """
    if flat.dim() == 0:
        raise ValueError("pad: flat has shape (), expected (T, ...)")
    expect_indices("pad", "indices", indices, flat, flat.shape[:1])
    expect_int("pad", "batch", batch, 0)
    expect_int("pad", "length", length, 0)
    x = flat.new_zeros((batch * length, *flat.shape[1:]))
    return x.index_copy_(0, indices.long(), flat).view(batch, length, *flat.shape[1:])


def _expect_mask(x, mask):
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"unpad: attention_mask is {say(mask.dtype)}, expected bool or an integer dtype")
    if mask.dim() != 2:
        raise ValueError(f"unpad: attention_mask has shape {tuple(mask.shape)}, expected (B, S)")
    if x.shape[:2] != mask.shape:
        batch, length = mask.shape
        raise ValueError(f"unpad: x has shape {tuple(x.shape)}, expected ({batch}, {length}, ...) like attention_mask")
    expect_device("unpad", "attention_mask", mask, x)
