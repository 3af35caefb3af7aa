"""An encoder of one's own out of the fused layers, and its masked-language-modelling loss. No padding anywhere.

    python examples/own_encoder.py
    python examples/own_encoder.py --layers 2 --hidden 64 --steps 3     a tiny one, also on a CPU

T tokens of all sequences back to back, B sequences, C hidden size, M predicted tokens.
"""

import argparse

import torch
from torch import nn

from cramfast.kernels import mask_tokens, mlm_loss, select_rows
from cramfast.layers import FusedGEGLU, FusedLayerNorm, UnpaddedSelfAttention

VOCABULARY, MASK_ID, FIRST_ORDINARY, MASK_RATE = 8192, 4, 5, 0.25


class Block(nn.Module):
    """x → x + attention(norm(x)) → x + GEGLU network(norm(x)), (T, C) → (T, C)."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = FusedLayerNorm(hidden), FusedLayerNorm(hidden)
        self.attention = UnpaddedSelfAttention(hidden, heads, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden, bias=False), FusedGEGLU(), nn.Linear(2 * hidden, hidden, bias=False)
        )

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cu_seqlens, max_seqlen)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Tokens and their places in, the mean loss of the predicted ones out."""

    def __init__(self, hidden: int, layers: int, longest: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, hidden), nn.Embedding(longest, hidden)
        self.blocks = nn.ModuleList(Block(hidden, max(hidden // 64, 1)) for _ in range(layers))
        self.norm = FusedLayerNorm(hidden)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids, places, cu_seqlens, max_seqlen, positions, labels) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(places)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            x = block(x, cu_seqlens, max_seqlen)
        # The decoder is the embedding; only predicted rows reach the vocabulary.
        return mlm_loss(self.norm(select_rows(x, positions)), self.tokens.weight, labels)


def random_sequences(count: int, longest: int, device: torch.device):
    """ids (T,), places (T,) of the tokens in their sequences, cu_seqlens (B+1,)."""
    lengths = torch.randint(min(16, longest), longest + 1, (count,))
    places = torch.cat([torch.arange(length) for length in lengths.tolist()])
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY, places.shape)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return ids.to(device), places.to(device), cu_seqlens.to(device)


def main(argv: list[str] | None = None) -> float:
    """Train; returns the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="the most tokens of a sequence")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Encoder(options.hidden, options.layers, options.length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    for step in range(1, options.steps + 1):
        ids, places, cu_seqlens = random_sequences(options.batch, options.length, device)
        ordinary, count = (FIRST_ORDINARY, VOCABULARY), int(MASK_RATE * len(ids))
        masking = {"mask_id": MASK_ID, "ordinary": ordinary, "seed": 0, "step": step}
        masked, positions, labels = mask_tokens(ids, cu_seqlens, count, **masking)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(masked, places, cu_seqlens, options.length, positions, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
