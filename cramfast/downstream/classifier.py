"""An encoder with a head that gives each sequence of an unpadded batch a score or the logits of its classes.

Shapes: T tokens, C hidden size, B sequences, of which the first R are classified; K outputs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import sequence_positions
from ..model import Bert
from .settings import Pooling


class Classifier(nn.Module):
    """Encoder → the mean of a sequence's tokens, or its first → dropout → dense → tanh → dropout → K outputs.

    outputs: the number of classes, or 1 for a score. dropout: of the head and of the encoder, in training.
    """

    def __init__(self, encoder: Bert, outputs: int, pooling: Pooling = "mean", dropout: float = 0.0):
        super().__init__()
        self.encoder, self.pooling, self.dropout = encoder, pooling, dropout
        encoder.dropout = dropout
        hidden, std = encoder.config.hidden_size, encoder.config.initializer_range
        self.dense, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)
        for linear in (self.dense, self.out):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    @property
    def outputs(self) -> int:
        return self.out.out_features

    def logits(
        self, input_ids: torch.Tensor, token_types: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, rows: int
    ) -> torch.Tensor:
        """fp32 (R, K) of the first `rows` = R sequences.

        input_ids, token_types: integers (T,); types are left out where the encoder has none for a second sentence.
        cu_seqlens: int32 (B+1,), none of the first R sequences empty and none longer than `longest`.
        """
        types = token_types if self.encoder.config.token_types > 1 else None
        if self.pooling == "cls":
            pooled = self.encoder.encode(input_ids, cu_seqlens, longest, rows=cu_seqlens[:rows], token_types=types)
        else:
            hidden = self.encoder.encode(input_ids, cu_seqlens, longest, token_types=types)
            pooled = _means(hidden, cu_seqlens, rows)
        pooled = torch.tanh(self.dense(self._dropped(pooled)))
        return self.out(self._dropped(pooled)).float()

    def forward(
        self,
        input_ids: torch.Tensor,
        token_types: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The sum, by `weights` (R,), of the losses of labels (R,): squared errors of a score, else cross-entropies."""
        logits = self.logits(input_ids, token_types, cu_seqlens, longest, len(labels))
        if self.outputs == 1:
            losses = (logits[:, 0] - labels).square()
        else:
            losses = F.cross_entropy(logits, labels.long(), reduction="none")
        return (losses * weights).sum()

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)


def _means(hidden: torch.Tensor, cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """fp32 (R, C): the mean of hidden (T, C) over each of the first `rows` sequences.

    A product with a matrix of ones and zeros: its shape is static, and its sums are in the same order every time.
    """
    sequence, _ = sequence_positions(cu_seqlens, hidden.shape[0])
    member = sequence == torch.arange(rows, device=sequence.device)[:, None]
    with torch.autocast(hidden.device.type, enabled=False):
        return member.float() @ hidden.float() / cu_seqlens[: rows + 1].diff()[:, None]
