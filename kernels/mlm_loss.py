"""The masked-language-modelling loss: decoder product and cross-entropy on the predicted rows only.

    z = hidden[positions] @ weightᵀ + bias,   lse = logsumexp(z)
    loss[m] = lse − (1 − s) z[labels[m]] − s mean(z) + z_loss lse²,   s = label_smoothing
    dz = (1 + 2 z_loss lse) softmax(z) − (1 − s) onehot(labels[m]) − s / V
    drows = dz @ weight,   dweight = dzᵀ @ rows,   dbias = sum of dz

and the mean over the rows that have a label. The logits of a few rows at a time, or their exponentials, lie in one
buffer, where d-logits take their place; nothing of size (M, V) exists. Two ways lead there: `mlm_loss_fused.py` has the
exponentials come out of the decoder's product, on cards and for dtypes for which that is faster; `mlm_loss_logits.py`
takes logits from cuBLAS. All other products are cuBLAS's.

memory="fast": gradients are computed in the forward pass, as if that of the loss were 1, while the logits are at hand,
dweight as a sum over chunks of rows in float32; the backward pass multiplies them by what arrives. Saved are drows
(M, C), dweight (V, C) in float32, and three float32 numbers a row where there were no logits.
memory="low": the backward pass computes dweight, a block of the vocabulary at a time, from logits computed again. That
is four products instead of three. Saved are drows and two or three float32 numbers a row.

Sources: the loss computed in chunks: Wijmans et al., "Cut Your Losses", 2411.09009, and Hsu et al., Liger Kernel,
2410.10989; z-loss: Chowdhery et al., PaLM, 2204.02311; label smoothing: Szegedy et al., 1512.00567.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .dispatch import pick
from .launch import ceil_div, contiguous, dtype_of, has_data
from .main_grad import claim, collects
from .mlm_loss_arguments import expect_loss_options, expect_predictions
from .mlm_loss_fused import fused_chunks, fused_weight_gradient, fuses, new_statistics
from .mlm_loss_kernels import (
    Options,
    ends_launch,
    gather_launch,
    gradient_scale,
    mean_launch,
    over_tiles,
    row_stride,
    scaled,
    scatter_launch,
    targets_launch,
)
from .mlm_loss_logits import logit_chunks, logit_weight_gradient
from .operator import Operator, define


def mlm_loss_reference(
    hidden, weight, labels, positions=None, bias=None, *, ignore_index=-100, z_loss=0.0, label_smoothing=0.0
):
    """The definition, on any device and floating dtype; holds the (M, V) logits; see `mlm_loss`."""
    logits, labels = _logits_reference(hidden, weight, positions, bias), labels.long()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    total = F.cross_entropy(logits, labels, reduction="sum", **options)
    counts = labels != ignore_index
    if z_loss > 0:
        total = total + z_loss * logits.logsumexp(-1).square().where(counts, 0.0).sum()
    return total / counts.sum().clamp(min=1)


def mlm_scores_reference(hidden, weight, labels, positions=None, bias=None, *, ignore_index=-100):
    """The definition, on any device and floating dtype; holds the (M, V) logits; see `mlm_scores`."""
    logits, labels = _logits_reference(hidden, weight, positions, bias), labels.long()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    return losses, (logits.argmax(-1) == labels) & (labels != ignore_index)


def _logits_reference(hidden, weight, positions, bias):
    rows = hidden if positions is None else hidden[positions]
    logits = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Sizes:
    """Bytes that are held beside the results: `chunk` in the forward pass, for rows of logits and copies of weight;
    `block` in the backward pass, for columns of logits and the gradient that comes of them."""

    chunk: int
    block: int = 0


_MIB = 1 << 20
# Every chunk adds to the whole of dweight, so few and large ones are faster. With "low" dweight does not exist yet.
_SIZES = {"fast": Sizes(292 * _MIB), "low": Sizes(106 * _MIB, block=62 * _MIB)}


def _decoder(weight, dtype):
    """weight in `dtype`; where V is no multiple of 8, which makes cuBLAS slow, with rows of zeros to row_stride(V)."""
    vocabulary, width = weight.shape
    if vocabulary % 8 == 0:
        return weight.to(dtype)
    decoder = weight.new_zeros(row_stride(vocabulary), width, dtype=dtype)
    decoder[:vocabulary].copy_(weight)
    return decoder


def _chunk_bytes(sizes, weight, decoder, dweight):
    """What is left for logits: the rest may take three quarters."""
    taken = 0 if decoder is weight else decoder.nbytes
    if dweight is not None and not collects(weight):
        taken += dweight.nbytes - weight.nbytes  # which is a result
    return max(sizes.chunk - taken, sizes.chunk // 4)


def _rows(hidden, positions):
    """hidden[positions], in memory of its own."""
    count, width = positions.shape[0], int(hidden.shape[1])
    rows = hidden.new_empty(count, width)
    launch = gather_launch(width, hidden.dtype, positions.dtype)
    over_tiles(launch, count, hidden, positions, rows, count, hidden.shape[0])
    return rows


def _targets(labels, positions, total, vocabulary, ignore_index):
    """int32 (M,): the labels, −1 for a row that does not count."""
    count = labels.shape[0]
    targets = labels.new_empty(count, dtype=torch.int32)
    launch = targets_launch(labels.dtype, dtype_of(positions))
    grid = ceil_div(count, launch.constants["BLOCK"])
    launch(grid, labels, positions, targets, count, total, vocabulary, ignore_index)
    return targets


def _mean(losses, targets):
    """The mean of the losses of rows that count, and 1 / their number."""
    loss, inverse = losses.new_empty(()), losses.new_empty(())
    mean_launch()(1, losses, targets, loss, inverse, losses.shape[0])
    return loss, inverse


def _forward(
    hidden, weight, labels, positions, bias, ignore_index, z_loss, smoothing, memory, for_hidden, for_weight, for_bias
):
    """(loss, drows, dweight, dbias, targets, statistics, inverse), None what is not asked for; see the top."""
    hidden, labels, positions, bias = contiguous(hidden, labels, positions, bias)
    count, (vocabulary, width), wide = labels.shape[0], weight.shape, {"dtype": torch.float32}
    options, low = Options(z_loss, smoothing), memory == "low" and for_weight
    fused = fuses(hidden, options)
    losses = hidden.new_empty(count, **wide)
    decoder = _decoder(weight, hidden.dtype)
    dweight = hidden.new_empty(decoder.shape[0], width, **wide) if for_weight and not low else None
    dbias = hidden.new_zeros(vocabulary, **wide) if for_bias else None
    statistics = None
    if fused:
        statistics = new_statistics(hidden, count)
    elif low:
        statistics = hidden.new_empty(2, count, **wide)
    targets = _targets(labels, positions, hidden.shape[0], vocabulary, ignore_index)
    rows, drows = hidden if positions is None else _rows(hidden, positions), None
    if for_hidden:  # gathered rows serve for drows as well: a chunk of them is last read just before it is overwritten
        drows = torch.empty_like(rows) if positions is None else rows
    if has_data(hidden):
        if count == 0 and dweight is not None:
            dweight.zero_()
        given = (rows, decoder, vocabulary, bias, targets, _chunk_bytes(_SIZES[memory], weight, decoder, dweight))
        results = (losses, drows, dweight, dbias, statistics)
        if fused:
            fused_chunks(*given, *results)
        else:
            logit_chunks(*given, options, *results)
    loss, inverse = _mean(losses, targets)
    return loss, drows, dweight, dbias, targets, statistics, inverse


def _backward(
    dloss,
    drows,
    dweight,
    dbias,
    hidden,
    weight,
    bias,
    positions,
    targets,
    statistics,
    inverse,
    z_loss,
    smoothing,
    memory,
    for_hidden,
    for_weight,
    for_bias,
    collected=None,
    joins=False,
):
    """(dhidden, dweight, dbias), None what is not asked for. dweight is `collected`, where that is given, and what was
    there plus the gradient where it `joins` that."""
    given, scale = (dloss, inverse), gradient_scale(hidden.dtype)
    options = Options(z_loss, smoothing)
    if for_weight:  # first, since dhidden takes memory
        out = torch.empty_like(weight, memory_format=torch.contiguous_format) if collected is None else collected
        if memory == "low":
            _weight_gradient(hidden, weight, bias, positions, targets, statistics, options, *given, out, joins)
        else:
            scaled(dweight[: weight.shape[0]], out, scale, *given, joins)
        dweight = out
    totals = statistics[1] if fuses(hidden, options) else None
    dhidden = _scatter(drows, totals, positions, hidden, *given) if for_hidden else None
    if for_bias:
        dbias = scaled(dbias[None], bias.new_empty(1, bias.shape[0]), scale, *given)[0]
    return dhidden, dweight if for_weight else None, dbias if for_bias else None


def _scatter(drows, totals, positions, hidden, dloss, inverse):
    """The gradient of hidden (T, C): drows, divided by totals where there are any, added up by position, and scaled."""
    dhidden, dtype = torch.empty_like(hidden, memory_format=torch.contiguous_format), hidden.dtype
    if positions is None:
        return scaled(drows, dhidden, gradient_scale(dtype), dloss, inverse, totals=totals)
    (total, width), count, positions = hidden.shape, positions.shape[0], positions.contiguous()
    ends = torch.zeros((2, total), dtype=torch.int32, device=hidden.device)
    launch = ends_launch(positions.dtype)
    launch(ceil_div(count, launch.constants["BLOCK"]), positions, ends, count, total)
    launch = scatter_launch(int(width), dtype, positions.dtype, totals is not None)
    over_tiles(launch, total, drows, totals, positions, ends, dloss, inverse, dhidden, count, total)
    return dhidden


def _weight_gradient(hidden, weight, bias, positions, targets, statistics, options, dloss, inverse, out, joins):
    """The gradient of weight goes to `out` (V, C), a block of its rows at a time, each in one product over all rows of
    hidden; it takes the place of what is there or `joins` it."""
    if not has_data(hidden):
        return
    hidden, positions, bias = contiguous(hidden, positions, bias)
    rows = hidden if positions is None else _rows(hidden, positions)
    given = (rows, weight, bias, targets, statistics, _SIZES["low"].block)
    if rows.shape[0] == 0:
        if not joins:
            out.zero_()
    elif fuses(hidden, options):
        fused_weight_gradient(*given, dloss * inverse, out, joins)
    else:
        logit_weight_gradient(*given, options, dloss, inverse, out, joins)


def _save(ctx, inputs, results):
    hidden, weight, _, positions, bias, _, z_loss, smoothing, *ctx.asked = inputs
    _, drows, dweight, dbias, targets, statistics, inverse = results
    ctx.options, ctx.collector = (z_loss, smoothing), weight if collects(weight) else None
    ctx.save_for_backward(drows, dweight, dbias, hidden, weight, bias, positions, targets, statistics, inverse)
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dloss, *_):
    if dloss is None:
        return (None,) * 12
    _, for_hidden, for_weight, for_bias = ctx.asked
    arguments = (dloss, *ctx.saved_tensors, *ctx.options, *ctx.asked)
    if for_weight and ctx.collector is not None:
        grads = _backward(*arguments, *claim(ctx.collector))
        for_weight = False
    else:
        grads = backward(*arguments)
    asked = (for_hidden, for_weight, for_bias)
    dhidden, dweight, dbias = (grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))
    return dhidden, dweight, None, None, dbias, *(None,) * 7


_ASKED = "float z_loss, float smoothing, str memory, bool for_hidden, bool for_weight, bool for_bias"
_operator = Operator(
    "mlm_loss",
    f"(Tensor hidden, Tensor weight, Tensor labels, Tensor? positions, Tensor? bias, int ignore_index, {_ASKED})"
    " -> (Tensor loss, Tensor drows, Tensor dweight, Tensor dbias, Tensor targets, Tensor statistics, Tensor inverse)",
    forward=_forward,
    save=_save,
    backward=(
        _backward,
        define(
            "mlm_loss_backward",
            "(Tensor dloss, Tensor? drows, Tensor? dweight, Tensor? dbias, Tensor hidden, Tensor weight, Tensor? bias,"
            f" Tensor? positions, Tensor targets, Tensor? statistics, Tensor inverse, {_ASKED})"
            " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
            _backward,
        ),
    ),
    gradients=_gradients,
)


def _scores(hidden, weight, labels, positions, bias, ignore_index):
    """(losses, best), both (M,); best: the likeliest token."""
    hidden, labels, positions, bias = contiguous(hidden, labels, positions, bias)
    count = labels.shape[0]
    losses = hidden.new_empty(count, dtype=torch.float32)
    best = labels.new_empty(count, dtype=torch.int32)
    targets = _targets(labels, positions, hidden.shape[0], weight.shape[0], ignore_index)
    rows = hidden if positions is None else _rows(hidden, positions)
    if has_data(hidden):
        results = (losses, None, None, None, None, best)
        decoder = _decoder(weight, hidden.dtype)
        limit = _chunk_bytes(_SIZES["low"], weight, decoder, None)
        logit_chunks(rows, decoder, weight.shape[0], bias, targets, limit, Options(), *results)
    return losses, best == targets


_scores_op = define(
    "mlm_scores",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? positions, Tensor? bias, int ignore_index)"
    " -> (Tensor losses, Tensor correct)",
    _scores,
)


def mlm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    memory: str = "fast",
) -> torch.Tensor:
    """Mean cross-entropy, in nats, of predicting labels (M,) from rows of hidden (T, C).

    positions (M,) names the rows (None: all of them, M = T); weight (V, C) and bias (V,) are the decoder, in hidden's
    dtype or float32; the products run in hidden's. labels and positions are int32 or int64. Labels equal to
    `ignore_index` do not count; with none left the loss is 0, and so are the gradients. Positions may come in any order
    and more than once; rising ones are the fastest. The gradient of a weight with a `main_grad` is added to that.

    z_loss: weight of the squared logsumexp, added to each row's loss. label_smoothing: as in torch's cross_entropy.
    memory: "fast" takes some 292 MiB beside the results, float32 for weight's gradient among it; "low" takes 106 MiB
    before there are any, 62 MiB in the backward pass, and half as much time again.

    On a GPU a row whose label is outside the vocabulary, or whose position is outside hidden, does not count; the
    reference raises as torch does. CRAMFAST_CHECK=1 in the environment makes it an error everywhere.

    Returns a float32 scalar (float64 for float64 input). Raises TypeError for dtypes and ValueError for shapes, devices
    and values that do not fit, by name.
    """
    expect_predictions("mlm_loss", hidden, weight, labels, positions, bias, ignore_index)
    expect_loss_options("mlm_loss", z_loss, label_smoothing, memory)
    run = pick("mlm_loss", hidden, mlm_loss_reference)
    if run is mlm_loss_reference:
        options = {"ignore_index": ignore_index, "z_loss": z_loss, "label_smoothing": label_smoothing}
        return run(hidden, weight, labels, positions, bias, **options)
    tracked = torch.is_grad_enabled()
    asked = (tracked and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return run(hidden, weight, labels, positions, bias, ignore_index, z_loss, label_smoothing, memory, *asked)


@torch.no_grad()
def mlm_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(losses, correct)` of each row, for evaluation: arguments and errors as those of `mlm_loss`, no gradients.

    losses: float32 (M,), 0 where the label does not count. correct: bool (M,), whether the label is the likeliest
    token, the first of them where several are; False where it does not count.
    """
    expect_predictions("mlm_scores", hidden, weight, labels, positions, bias, ignore_index)
    if pick("mlm_loss", hidden, mlm_loss_reference) is mlm_loss_reference:
        return mlm_scores_reference(hidden, weight, labels, positions, bias, ignore_index=ignore_index)
    run = _scores_op if torch.compiler.is_compiling() else _scores
    return run(hidden, weight, labels, positions, bias, ignore_index)
