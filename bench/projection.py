"""What a roofline lets other cards reach, as a table: a projection, not a measurement.

A step's time is that of its matrix products and that of its other traffic, one after the other:

    products   `ModelConfig.flops_per_token` at 0.87 of the rate that the card sustains
    traffic    bytes that other kernels read and write, at 0.93 of the memory's bandwidth

and the speed that of this step times what `relative_speed` says of the microbatch and of what the layers save, as
`plan_memory` picks them for the card's memory. 0.87 and 0.93 are shares that this project's kernels reach on an NVIDIA
H200, which sustains 686 to 790 of its 989 TFLOP/s. Every card is taken to sustain the same share; one that its power
limits less sustains more.
"""

from dataclasses import dataclass

import torch

from cramfast.config import PRESETS, ModelConfig
from cramfast.train.memory import MOST_TOKENS, MemoryPlan, parameter_counts, plan_memory, relative_speed

from .tables import markdown, thousands

_PRODUCTS = 0.87
_SUSTAINED = (686 + 790) / 2 / 989
_TRAFFIC = 0.93
_RATE = 0.25
_LENGTH = 128
_PRESETS = ("crammed-bert", "bert-base")
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Card:
    """A card as its maker's data sheet has it.

    memory: GB. bandwidth: GB/s. tflops: TFLOP/s of dense 16-bit matrix products with float32 sums. watts: its power.
    """

    name: str
    memory: float
    bandwidth: float
    tflops: float
    watts: float


# NVIDIA's data sheets and architecture whitepapers (Turing, GA102, AD10x, GB202, H100, H200). GeForce cards sum in
# float32 at half their rate for float16 sums; where only that or a rate with sparsity is given, the half of it stands.
CARDS = (
    Card("RTX 2080 Ti", 11, 616, 53.8, 250),
    Card("RTX 3060", 12, 360, 25.5, 170),
    Card("RTX 3090", 24, 936, 71.0, 350),
    Card("RTX 4060 Ti 16 GB", 16, 288, 44.1, 165),
    Card("RTX 4090", 24, 1008, 165.2, 450),
    Card("RTX 5090", 32, 1792, 209.5, 575),
    Card("RTX A4000", 16, 448, 76.7, 140),
    Card("RTX A6000", 48, 768, 154.8, 300),
    Card("H100 SXM", 80, 3350, 989.4, 700),
    Card("H200 SXM", 141, 4800, 989.4, 700),
)


@dataclass(frozen=True)
class Projection:
    """A preset on a card: the plan for its memory, and tokens per second."""

    card: Card
    plan: MemoryPlan
    tokens_per_s: float


def traffic_per_token(config: ModelConfig, rate: float, itemsize: int = 2) -> float:
    """Bytes read and written for a token beside the matrix products' own, by the kernels' definitions, with "keep".

    Of a layer, in units of C or of I: two norms with their additions, forward 4C, backward 4C; attention, forward 4C,
    backward 8C; GEGLU, forward 3I, backward 5I, or GELU, 2I and 3I. Of a batch: embeddings, 4C, with table rows in
    float32 forward and backward; for predicted tokens the last norm, the head's transform, and the logits read and
    written. Of the update, which stands once for MOST_TOKENS: AdamW reads four float32 of a parameter, writes three and
    a copy in 16 bits; the norm of the gradient reads one.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 2 * (4 + 4) * hidden + (4 + 8) * hidden + inner * ((3 + 5) if config.activation == "geglu" else (2 + 3))
    embedding = (2 + 4 / itemsize * 2) * hidden
    head = 8 * hidden + (13 * hidden if config.head_transform else 0) + 2 * config.vocab_size
    parameters, matrices = parameter_counts(config)
    update = (parameters * 8 * 4 + matrices * itemsize) / MOST_TOKENS
    return itemsize * (config.num_layers * layer + embedding + rate * head) + update


def project(preset: str, card: Card) -> Projection:
    """Pretraining of `preset` in sequences of 128 tokens, a quarter of them predicted, with AdamW."""
    config = PRESETS[preset]
    plan = plan_memory(config, _LENGTH, _RATE, _DTYPE, int(card.memory * 1e9))
    products = config.flops_per_token(_RATE, _LENGTH) / (_PRODUCTS * _SUSTAINED * card.tflops * 1e12)
    traffic = traffic_per_token(config, _RATE, _DTYPE.itemsize) / (_TRAFFIC * card.bandwidth * 1e9)
    speed = relative_speed(plan.activations, plan.sequences * _LENGTH)
    return Projection(card, plan, speed / (products + traffic))


def projection_table() -> str:
    """The README's text: a table for each preset."""
    head = (
        "card",
        "GB",
        "GB/s",
        "TFLOP/s",
        "microbatch",
        "activations",
        "GiB",
        "tokens/s",
        "10⁹ tokens a day",
        "J per M tokens",
    )
    parts = []
    for preset in _PRESETS:
        rows = [_row(project(preset, card)) for card in CARDS]
        parts.append(f"**`{preset}`**, projected, sequences of {_LENGTH}, AdamW\n\n{markdown(head, rows)}")
    return "\n\n".join(parts)


def _row(projected: Projection) -> tuple[str, ...]:
    card, plan, pace = projected.card, projected.plan, projected.tokens_per_s
    return (
        card.name,
        f"{card.memory:g}",
        f"{card.bandwidth:,g}",
        f"{card.tflops:g}",
        f"{plan.sequences} × {_LENGTH}",
        plan.activations,
        f"{plan.peak / 2**30:.1f}",
        thousands(pace),
        f"{pace * 86_400 / 1e9:.1f}",
        f"{card.watts / pace * 1e6:,.0f}",
    )
