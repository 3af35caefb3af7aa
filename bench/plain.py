"""Crammed-bert as ordinary PyTorch: the peer that a training step of this project is measured against.

Sequences are equally long, so nothing is padded. B sequences, S their length, C hidden size, H heads, D head size, I
intermediate size, M predictions, V vocabulary. Parameters have the names that they have in `cramfast.model.Bert`, so
that its state dict loads.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cramfast.config import ModelConfig

from .steps import MaskedBatch, Ordinary, initial_bert


class PlainPositions(nn.Module):
    """Fixed sinusoids (S, C), sine and cosine in turns, times a learned scalar."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))
        place = torch.arange(config.max_positions, dtype=torch.float64)[:, None]
        frequency = 10_000.0 ** -(torch.arange(0, config.hidden_size, 2, dtype=torch.float64) / config.hidden_size)
        table = torch.empty(config.max_positions, config.hidden_size)
        table[:, 0::2], table[:, 1::2] = (place * frequency).sin(), (place * frequency).cos()
        self.register_buffer("table", table, persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        return self.scale * self.table[:length]


class PlainEmbeddings(nn.Module):
    """Ids (B, S) → (B, S, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = PlainPositions(config)
        self.norm = _norm(config)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tokens(input_ids) + self.positions(input_ids.shape[1]))


class PlainAttention(nn.Module):
    """Self-attention inside each sequence, (B, S, C) → (B, S, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv_3BHSD = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended_BHSD = F.scaled_dot_product_attention(*qkv_3BHSD.unbind())
        return self.out(attended_BHSD.transpose(1, 2).flatten(2))


class PlainGEGLU(nn.Module):
    """(B, S, 2I) → (B, S, I)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


class PlainLayer(nn.Module):
    """Pre-norm attention and feed-forward network, each added to what it reads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(config), _norm(config)
        self.attention = PlainAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False),
            PlainGEGLU(),
            nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PlainBert(nn.Module):
    """Encoder and tied decoder; only predicted rows reach the vocabulary. For configs of crammed-bert's kind alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = PlainEmbeddings(config)
        self.layers = nn.Sequential(*(PlainLayer(config) for _ in range(config.num_layers)))
        self.final_norm = _norm(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of predicting labels (M,) at positions (M,), places in the flattened input_ids (B, S)."""
        hidden = self.final_norm(self.layers(self.embeddings(input_ids)))
        logits = F.linear(hidden.flatten(0, 1)[positions], self.embeddings.tokens.weight)
        return F.cross_entropy(logits, labels)


def _norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


def plain_bert(config: ModelConfig) -> PlainBert:
    """The model with the weights that this project's starts from."""
    model = PlainBert(config)
    model.load_state_dict(initial_bert(config).state_dict())
    return model


def _arguments(batch: MaskedBatch) -> dict[str, torch.Tensor]:
    ids = batch.masked_ids.unflatten(0, (-1, batch.max_seqlen))
    return {"input_ids": ids, "positions": batch.positions, "labels": batch.labels}


PLAIN = Ordinary("plain", plain_bert, _arguments)
