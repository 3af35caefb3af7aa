"""The least that a training step has to do, by the definitions of its operators, and the time that takes.

T tokens of which M are predicted, C hidden size, I intermediate size, V vocabulary, L layers, N parameters of which
Muon updates n; S sum of the squared lengths of the sequences; a bytes of an activation. Each activation is read or
written once, and what one operator writes comes from memory for the next. In all that follows its attention the last
layer computes the predicted rows alone: R = (L − 1) T + M rows in total go through the second halves of the layers.

FLOPs
    matrix products      6 for each weight and row: T L rows of the product for qkv, R of the others, M of the head
    attention forward    4 C S L
    attention backward   8 C S L
    optimizer            of Muon, for a matrix of r rows and c columns, r the fewer: 15 r² c + 5 r³, five times three
                         products of which two are symmetric and need one half

Bytes
    attention forward    4 C a for each of T L rows: qkv is read, the output written
    attention backward   8 C a: qkv, the output and its gradient are read, the gradient of qkv written
    layer norm forward   4 C a for each row: x and residual are read, y and their sum written; without residual 2 C a
    layer norm backward  4 C a: gradients of y and of the sum, and the sum, are read, the gradient of x is written;
                         3 C a where nothing but the norm takes the sum, or there is none
    activation forward   for each of R rows 3 I a of GEGLU, 2 I a of GELU
    activation backward  5 I a of GEGLU, 3 I a of GELU
    embedding            twice 8 T for the ids and T C a for rows of the table; T C a each for the output and its
                         gradient; V C a for that of the table
    MLM loss             4 M C a: rows are gathered and their gradient is scattered; logits need not leave the product
    masking              16 (T + M): ids are read and written, positions and labels written
    optimizer            4 N for the norm of the gradient, 28 (N − n) for AdamW, and a for each working copy that it
                         writes; (12 + a) n for Muon's momentum and direction, 2 a n to orthogonalise that, (8 + a) n
                         for the update along it

Layer norms stand before or behind both halves of a layer, at the end of a pre-norm encoder, and in the head's
transform, whose GELU counts as well. The embedding's own is part of it; its table of positions is left out. What is
computed again for the backward pass (`activations` other than "keep") takes time and is no part of the definition.
"""

from dataclasses import dataclass

from ..config import ModelConfig
from .kinds import Kind

_INDEX_BYTES = 8


@dataclass(frozen=True)
class StepSizes:
    """tokens T, predicted M, attended S; itemsize a; parameters N, of which `working` have a copy of that itemsize;
    matrices: (count, rows, columns) of those that Muon updates."""

    tokens: int
    predicted: int
    attended: int
    itemsize: int
    parameters: int
    working: int
    matrices: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Work:
    """What an operator has to compute, and to read and write."""

    flops: int = 0
    bytes: int = 0

    def seconds(self, matmul_rate: float, copy_rate: float) -> float:
        """The time of the slower of both; matmul_rate in FLOP/s, copy_rate in bytes read and written a second."""
        return max(self.flops / matmul_rate, self.bytes / copy_rate)


def definition(config: ModelConfig, sizes: StepSizes) -> dict[Kind, Work]:
    """The work of a step on one microbatch, forward, backward and update, by kind."""
    T, M, a = sizes.tokens, sizes.predicted, sizes.itemsize
    C, V, L = config.hidden_size, config.vocab_size, config.num_layers
    row, rows = C * a, T * (L - 1) + M
    norm_forward, norm_backward = _norms(config, T, M, rows)
    wide = config.intermediate_size * a
    forward, backward = (3, 5) if config.activation == "geglu" else (2, 3)
    head = M * row if config.head_transform else 0
    table = _INDEX_BYTES * T + T * row
    return {
        Kind.MATMUL: Work(flops=6 * _products(config, T, M, rows)),
        Kind.ATTENTION_FORWARD: Work(4 * C * sizes.attended * L, 4 * row * T * L),
        Kind.ATTENTION_BACKWARD: Work(8 * C * sizes.attended * L, 8 * row * T * L),
        Kind.NORM_FORWARD: Work(bytes=norm_forward * row),
        Kind.NORM_BACKWARD: Work(bytes=norm_backward * row),
        Kind.ACTIVATION_FORWARD: Work(bytes=forward * wide * rows + 2 * head),
        Kind.ACTIVATION_BACKWARD: Work(bytes=backward * wide * rows + 3 * head),
        Kind.EMBEDDING: Work(bytes=2 * (table + T * row) + V * row),
        Kind.LOSS: Work(bytes=4 * M * row),
        Kind.MASKING: Work(bytes=2 * _INDEX_BYTES * (T + M)),
        Kind.OPTIMIZER: _update(sizes),
    }


def _update(sizes: StepSizes) -> Work:
    """Norm of the gradient, AdamW, and Muon for its matrices."""
    a, flops, elements = sizes.itemsize, 0, 0
    for count, rows, columns in sizes.matrices:
        short, long = sorted((rows, columns))
        flops += count * (15 * short * short * long + 5 * short**3)
        elements += count * rows * columns
    adamw = 28 * (sizes.parameters - elements)
    return Work(flops, 4 * sizes.parameters + adamw + (20 + 4 * a) * elements + a * sizes.working)


def _products(config: ModelConfig, T: int, M: int, rows: int) -> int:
    """Weights times the rows that they meet."""
    C = config.hidden_size
    second_half = C * C + C * (config.wide_size + config.intermediate_size)
    head = C * config.vocab_size + (C * C if config.head_transform else 0)
    return config.num_layers * T * 3 * C * C + rows * second_half + M * head


def _norms(config: ModelConfig, T: int, M: int, rows: int) -> tuple[int, int]:
    """Rows of C elements that all layer norms read and write, forward and backward."""
    alone = M if config.head_transform else 0
    if config.norm == "post":
        # Nothing but the norm takes the sum, so that no gradient of it arrives.
        return 4 * 2 * rows + 2 * alone, 3 * 2 * rows + 3 * alone
    alone += T if config.first_norm else 0
    inside = T * (config.num_layers - 1) + rows
    return 4 * (inside + M) + 2 * alone, 4 * inside + 3 * (M + alone)
