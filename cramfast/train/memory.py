"""What GPU memory a training step takes, and the fastest way to train for which there is room.

T tokens of a microbatch, M of them predicted, C hidden size, I intermediate size, W = 2I for GEGLU and else I, H heads,
D head size, V vocabulary. The step's peak is what is always there,

    weights     float32: master, gradient and AdamW's two moments, though Muon has one; in 16 bits: copies of the
                matrices
    constant    cuBLAS's workspaces; ids, positions and statistics, a few bytes a token

and the largest of three moments. A layer saves for each token, in the dtype of the matrix products:

                input                  attention                        network
    first       C                      norm C, qkv 3C, output C         as the others
    pre-norm                           sum C, norm C, qkv 3C, output C  sum C, norm C, wide W, activation I
    post-norm   C                      qkv 3C, output C                 sum C, norm C, wide W, activation I, sum C

and beside attention's output its lse, the norms' statistics, and what the kernels know of sequences and rotary angles.
The network of the last layer has the M predicted tokens alone, and attention's output once more for them. "lean" saves
neither the norms of a pre-norm layer, beside the first, nor the activation of GEGLU; "layers" saves the input alone, in
a pre-norm layer of 2C, and has the rest of one layer at a time, until that layer is done.

    loss        saved by all layers and by the head; what `mlm_loss` takes
    attention   backward in the last layer: input and attention, with all below; 5C of gradients: of attention's
                output, of what goes round it, of qkv
    network     backward in the layer before that: all of it, with all below; gradients of C, I and W. Of GEGLU "lean"
                writes W's over the wide tensor, and has the activation again instead; of GELU W's takes the place of
                the activation, but with "layers"

Further down every layer leaves more room than the next one takes; the embedding's backward pass and the update come
when no layer is left.
"""

import math
from dataclasses import dataclass

import torch

from ..config import Activations, ModelConfig, byte_count
from ..errors import UserError
from ..evaluate.mlm import BATCH_TOKENS

MOST_TOKENS = 65_536
"""Tokens in a microbatch beyond which a step is no faster."""

_MIB = 1 << 20
_FLOAT32 = 4
# One for the thread of the forward pass, one for autograd's; before Hopper they are a quarter of that.
_CUBLAS_BYTES = 2 * 32 * _MIB
# Of a token: int64 ids as given and as masked, int64 position, and the embedding's and the last norm's statistics.
_TOKEN_BYTES = 40
# Of logits `mlm_loss` takes so much at most where its weight's gradient is collected; in the backward pass "low" takes
# a block of them with the gradient that comes of it.
_LOSS_BYTES = {"fast": 292 * _MIB, "low": 106 * _MIB}
_LOSS_BLOCK_BYTES = 62 * _MIB

# Against "keep": crammed-bert in bfloat16, 512 × 128 tokens, on an NVIDIA H200.
_SPEED: dict[Activations, float] = {"keep": 1.0, "lean": 0.972, "layers": 0.75}
# A microbatch takes the time of so many tokens beside its own: there, 128 × 128 tokens reach 0.936 of the speed and
# 256 × 128 tokens 0.977.
_OVERHEAD_TOKENS = 1550

# Share of the limit that is lost between the allocator's blocks: a peak of 9.79 GiB ran where it might take 10.3.
_GAPS = 0.05
# Left on the card for kernels that are loaded later, and for whoever else uses it.
_MARGIN_BYTES = 256 * _MIB


@dataclass(frozen=True)
class MemoryPlan:
    """Sequences in a microbatch, what its layers save, and the peak of memory predicted for it, in bytes."""

    sequences: int
    activations: Activations
    peak: int


def relative_speed(activations: Activations, tokens: int) -> float:
    """Estimated tokens per second with microbatches of `tokens`, as a share of those at best."""
    return _SPEED[activations] * tokens / (tokens + _OVERHEAD_TOKENS) * (MOST_TOKENS + _OVERHEAD_TOKENS) / MOST_TOKENS


def plan_memory(
    config: ModelConfig,
    length: int,
    rate: float,
    dtype: torch.dtype,
    limit: int,
    *,
    activations: Activations | None = None,
    sequences: int | None = None,
) -> MemoryPlan:
    """The plan of the highest `relative_speed` whose peak fits into `limit` bytes, and beside it the held-out text's:
    a CUDA graph keeps the memory of its activations.

    Microbatches have MOST_TOKENS in sequences of `length`, or half as many, and so on down to one sequence; or, where
    given, just as many `sequences`. activations: None for whichever is the fastest. `rate`: share of tokens predicted.

    Of the sequences asked for, what takes least is planned if nothing fits, since the training loop halves them; else
    UserError.
    """
    policies = tuple(_SPEED) if activations is None else (activations,)
    sizes = _halves(max(1, MOST_TOKENS // length)) if sequences is None else [sequences]
    plans = [
        MemoryPlan(size, policy, predict_bytes(config, size * length, rate, dtype, policy))
        for size in sizes
        for policy in policies
    ]
    evaluation = _evaluation_bytes(config, dtype.itemsize)
    fitting = [plan for plan in plans if plan.peak + evaluation <= limit * (1 - _GAPS)]
    if fitting:
        return max(fitting, key=lambda plan: relative_speed(plan.activations, plan.sequences * length))
    least = min(plans, key=lambda plan: plan.peak)
    if sequences is not None:
        return least
    needed = math.ceil((least.peak + evaluation) / (1 - _GAPS) / 2**30 * 100) / 100
    raise UserError(
        f"--memory-limit: {limit / 2**30:.2f} GiB are free to use, one sequence of {length} tokens takes at least "
        f"{needed:.2f}GiB; choose a smaller --preset or --max-length"
    )


def _halves(size: int) -> list[int]:
    return [size >> times for times in range(size.bit_length())]


def usable_bytes(device: torch.device, limit: str | None) -> int | None:
    """Bytes that this process may take of a GPU: `--memory-limit`, which is set as the allocator's, or what is free
    there less a margin, whichever is less. None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    usable = free - _MARGIN_BYTES
    if limit is None:
        return usable
    allowed = byte_count("--memory-limit", limit)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
    return min(usable, allowed)


def predict_bytes(
    config: ModelConfig, tokens: int, rate: float, dtype: torch.dtype, activations: Activations, loss: str = "fast"
) -> int:
    """The peak of allocated memory, in bytes, of steps over microbatches of `tokens`, a share `rate` of them predicted.

    activations, loss: as `Bert` takes them, `loss` as its `memory`. Holds for the Triton kernels; what replaces them in
    float32 and on cards without bfloat16 may take more.
    """
    parameters, matrices = parameter_counts(config)
    item, predicted = dtype.itemsize, round(rate * tokens)
    state = 4 * _FLOAT32 * parameters + (item * matrices if item < _FLOAT32 else 0)
    hidden, inner = item * config.hidden_size, item * config.intermediate_size
    gated = config.activation == "geglu"

    layers = [_saved_by_layer(config, item, activations, first=i == 0) for i in range(config.num_layers)]
    *lower, last = layers
    in_layers = activations == "layers"
    below = tokens * sum(layer.input if in_layers else layer.whole for layer in lower)
    below_and_input = below + tokens * last.input
    of_last = 0 if in_layers else tokens * last.attention + predicted * (last.network + hidden)
    # The last norm's sum and output, the transform's three tensors, the gradient of the rows.
    head = predicted * hidden * ((config.norm == "pre") + 1 + 3 * config.head_transform + 1)
    moments = [
        below_and_input + of_last + head + _taken_by_loss(config, predicted, item, loss),
        below_and_input + tokens * (last.attention + 5 * hidden),
    ]
    if lower:
        at_work = lower[-1].whole - lower[-1].input if in_layers else 0
        if gated:
            gradients = hidden + inner * (2 if activations == "lean" else 3)
        else:
            gradients = hidden + inner * (2 if in_layers else 1)
        moments.append(below + tokens * (at_work + gradients))
    return state + _CUBLAS_BYTES + _TOKEN_BYTES * tokens + max(moments)


@dataclass(frozen=True)
class _Saved:
    """Bytes that a layer saves for a token; for the last one, `network` is of a predicted token."""

    input: int
    attention: int
    network: int

    @property
    def whole(self) -> int:
        return self.input + self.attention + self.network


def _saved_by_layer(config: ModelConfig, item: int, activations: Activations, first: bool) -> _Saved:
    """What one layer saves; with "layers", `attention` and `network` while it is at work alone."""
    hidden, inner = item * config.hidden_size, item * config.intermediate_size
    pre, gated, statistics = config.norm == "pre", config.activation == "geglu", 2 * _FLOAT32
    kept = activations != "lean"
    # lse, and as int32 the first token of a sequence and the one past its last; float16 angles, which sequences of up
    # to 128 tokens need only by position.
    attention = 4 * hidden + _FLOAT32 * config.num_heads + 2 * 4
    attention += 2 * config.head_size if config.positions == "rotary" else 0
    network = hidden * (1 + (kept or not pre)) + statistics
    network += inner * ((2 if gated else 1) + (kept or not gated))
    if not pre:
        return _Saved(hidden, attention, network + hidden + statistics)
    if first:
        return _Saved(hidden, attention + (hidden + statistics if config.first_norm else 0), network)
    attention += hidden * (1 + kept) + statistics
    return _Saved(2 * hidden if activations == "layers" else 0, attention, network)


def _taken_by_loss(config: ModelConfig, predicted: int, item: int, memory: str) -> int:
    """Logits, of a large batch as many as the loss allows itself, and the decoder's gradient in float32 until it is
    collected: "fast" all of it, "low" a block."""
    decoder, logits = config.vocab_size * config.hidden_size, item * max(1, predicted) * config.vocab_size
    if memory == "fast":
        return min(logits, _LOSS_BYTES["fast"]) + _FLOAT32 * decoder
    backward = logits + _FLOAT32 * decoder
    return max(min(logits, _LOSS_BYTES["low"]), min(backward, _LOSS_BLOCK_BYTES))


def _evaluation_bytes(config: ModelConfig, item: int) -> int:
    """What held-out text takes: autocast's copies of the matrices, and a layer at work: what goes into it and comes out
    of its halves, 4C, the network's wide tensor and activation, and in a pre-norm layer C and qkv, which it holds on
    to."""
    _, matrices = parameter_counts(config)
    around = (8 if config.norm == "pre" else 4) * config.hidden_size
    network = config.wide_size + config.intermediate_size
    return item * (matrices + BATCH_TOKENS * (around + network))


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Elements of all parameters of a `Bert`, and of the matrices among them."""
    hidden, wide = config.hidden_size, config.wide_size
    tables = config.vocab_size + config.token_types
    tables += config.max_positions if config.positions == "learned" else 0
    layer = 4 * hidden * hidden + hidden * (wide + config.intermediate_size)
    matrices = config.num_layers * layer + hidden * tables + config.head_transform * hidden * hidden
    norms = 1 + 2 * config.num_layers + config.head_transform  # the embedding's, the layers', the transform's
    if config.norm == "pre":
        norms += 1 - (not config.first_norm)
    vectors = norms * hidden * (1 + config.norm_bias)
    vectors += config.linear_bias * (config.num_layers * (5 * hidden + wide) + config.head_transform * hidden)
    vectors += config.decoder_bias * config.vocab_size + (config.positions == "sinusoidal")
    return matrices + vectors, matrices
