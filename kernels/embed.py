"""The embedding layer: token rows, plus position rows where the model has them, then their LayerNorm.

    x[t] = weight[input_ids[t]] + position_weight[position_ids[t]],   y[t] = layer_norm(x[t])

or with a fixed position_weight, times a learned scalar, position_scale, whose gradient is the sum of
dx[t] · position_weight[position_ids[t]].

Saved for the backward pass are the indices and two float32 numbers a token, mean and rstd; rows are gathered again. The
gradient of a table's row is the sum of dx over the tokens that use it, with dx as in layer_norm.py, added in a fixed
order and in float32 without atomics. The tokens are sorted by row; each group of warps walks over a chunk of them and
writes a row's sum when the row changes. Rows whose tokens spread over several chunks (a mask token's are a fifth of
all) leave their pieces aside, and a second kernel adds those up. dx itself is never written: for a second table the
walk is done again in that table's order.
"""

import torch
import torch.nn.functional as F

from .arguments import expect_dtype, expect_indices, expect_parameter, expect_table
from .dispatch import pick
from .embed_kernels import backward_launch, chunks_of, forward_launch, join_launch, shares_of
from .launch import ceil_div, contiguous, dtype_of
from .layer_norm import layer_norm_reference, sum_launch
from .main_grad import claim, collects
from .operator import Operator, define
from .rows import MAX_WIDTH


def embed_reference(
    input_ids,
    weight,
    norm_weight,
    norm_bias=None,
    *,
    position_ids=None,
    position_weight=None,
    position_scale=None,
    eps=1e-5,
    dtype=None,
):
    """The definition, on any device and floating dtype; see `embed`."""
    rows = F.embedding(input_ids, weight)
    if position_weight is not None:
        places = F.embedding(position_ids, position_weight)
        rows = rows + (places if position_scale is None else position_scale * places.detach())
    return layer_norm_reference(rows, norm_weight, norm_bias, eps).to(dtype or weight.dtype)


def _forward(weight, input_ids, norm_weight, norm_bias, position_ids, position_weight, position_scale, eps, dtype):
    """(y (T, C), statistics (2, T))."""
    (vocabulary, hidden), tokens = weight.shape, input_ids.shape[0]
    y = torch.empty((tokens, hidden), dtype=dtype, device=weight.device)
    statistics = torch.empty((2, tokens), dtype=torch.float32, device=weight.device)
    inputs = contiguous(input_ids, weight, position_ids, position_weight, position_scale, norm_weight, norm_bias)
    tensors = (*inputs, y, statistics)
    launch = forward_launch(int(hidden), dtype.itemsize, tuple(map(dtype_of, tensors)))
    grid = ceil_div(tokens, launch.constants["ROWS"])
    launch(grid, *tensors, tokens, vocabulary, _height(position_weight), eps)
    return y, statistics


def _backward(
    dy,
    weight,
    input_ids,
    norm_weight,
    norm_bias,
    position_ids,
    position_weight,
    position_scale,
    statistics,
    collected=None,
):
    """(dweight, dnorm_weight, dnorm_bias, dposition_weight, dposition_scale), None where there is no such parameter, as
    position_weight is none with a scale. dweight is added to `collected`, where given, and returned as that."""
    hidden, tokens = int(weight.shape[1]), input_ids.shape[0]
    shares = shares_of(tokens, hidden, dy.dtype.itemsize)
    shape = (1 if norm_bias is None else 2, shares, hidden)
    partial = torch.empty(shape, dtype=torch.float32, device=dy.device)
    dscale = None if position_scale is None else torch.empty(chunks_of(tokens), dtype=torch.float32, device=dy.device)
    norm = (norm_weight, norm_bias, statistics)
    inputs = (None, weight, position_ids, position_weight, position_scale, *norm)
    dweight = _table_gradient(dy, input_ids, weight, inputs, (partial, dscale), collected)
    dposition_weight = None
    if position_ids is not None and position_scale is None:
        inputs = (input_ids, weight, None, position_weight, None, *norm)
        dposition_weight = _table_gradient(dy, position_ids, position_weight, inputs, (None, None), None)
    dnorm_weight = torch.empty_like(norm_weight)
    dnorm_bias = None if norm_bias is None else torch.empty_like(norm_bias)
    launch = sum_launch(hidden, norm_weight.dtype, dtype_of(norm_bias))
    launch(ceil_div(hidden, launch.constants["COLUMNS"]), partial, dnorm_weight, dnorm_bias, shares)
    dposition_scale = None if dscale is None else dscale.sum(0, keepdim=True, dtype=position_scale.dtype)
    return dweight, dnorm_weight, dnorm_bias, dposition_weight, dposition_scale


def _table_gradient(dy, ids, table, inputs, shares, collected):
    """The gradient of `table`, whose rows `ids` name, added to `collected` if it is given. inputs: the kernel's tensors
    from ids_ptr to statistics_ptr; shares: those of the norm's gradients and of the scale's, where they are wanted."""
    (size, hidden), tokens = table.shape, ids.shape[0]
    # Sorting takes a pass for each byte of a key. Indices outside the table come first, and have no row.
    keys = ids.where((ids >= 0) & (ids < size), -1).to(torch.int16 if size <= 2**15 else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    add, dtable = collected is not None, collected
    if not add:
        dtable = torch.zeros((size, hidden), dtype=table.dtype, device=table.device)
    chunks = chunks_of(tokens)
    pieces = torch.empty((chunks, 2, hidden), dtype=torch.float32, device=table.device)
    tensors = (*contiguous(dy, keys, order, *inputs), dtable, pieces, *shares)
    launch = backward_launch(int(hidden), dy.dtype.itemsize, tuple(map(dtype_of, tensors)), add)
    _, weight, _, position_weight, *_ = inputs
    grid = ceil_div(chunks, launch.constants["ROWS"])
    launch(grid, *tensors, tokens, weight.shape[0], _height(position_weight))
    launch = join_launch(int(hidden), keys.dtype, dtable.dtype, add)
    launch(chunks * ceil_div(int(hidden), launch.constants["TILE"]), keys, pieces, dtable, tokens)
    return dtable


def _height(table):
    return 0 if table is None else table.shape[0]


def _save(ctx, inputs, results):
    ctx.save_for_backward(*inputs[:7], results[1])
    ctx.collector = inputs[0] if collects(inputs[0]) else None


def _gradients(ctx, backward, dy, *_):
    *inputs, statistics = ctx.saved_tensors
    if ctx.collector is None or not ctx.needs_input_grad[0]:
        dweight, *others = backward(dy, *inputs, statistics)
    else:
        collected, joins = claim(ctx.collector)
        if not joins:
            collected.zero_()
        dweight, others = None, _backward(dy, *inputs, statistics, collected)[1:]
    dnorm_weight, dnorm_bias, dposition_weight, dposition_scale = others
    norm_bias, _, position_weight, position_scale = inputs[3:]
    dnorm_bias = None if norm_bias is None else dnorm_bias
    if position_scale is None:
        dposition_scale = None
    if position_weight is None or position_scale is not None:
        dposition_weight = None
    return dweight, None, dnorm_weight, dnorm_bias, None, dposition_weight, dposition_scale, None, None


_INPUTS = (
    "Tensor weight, Tensor input_ids, Tensor norm_weight, Tensor? norm_bias, Tensor? position_ids,"
    " Tensor? position_weight, Tensor? position_scale"
)
_operator = Operator(
    "embed",
    f"({_INPUTS}, float eps, ScalarType dtype) -> (Tensor y, Tensor statistics)",
    forward=_forward,
    save=_save,
    backward=(
        _backward,
        define(
            "embed_backward",
            f"(Tensor dy, {_INPUTS}, Tensor statistics)"
            " -> (Tensor dweight, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dposition_weight,"
            " Tensor dposition_scale)",
            _backward,
        ),
    ),
    gradients=_gradients,
)


def embed(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    *,
    position_ids: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    position_scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Normalised embeddings of input_ids (T,) → (T, C) in `dtype` (None: that of weight).

    weight (V, C); norm_weight, norm_bias (C,); position_ids (T,) index rows of position_weight (P, C), both given or
    neither. With position_scale (1,) those are added times that, and are no parameter themselves. Indices are int32 or
    int64. The gradient of a weight with a `main_grad` is added to that. On a GPU a token whose index lies outside its
    table becomes a row of NaN, and nothing else comes to harm; the reference raises as torch does. Raises ValueError
    for a shape or device that does not fit, and when only one of position_ids and position_weight is given, or a scale
    without them, TypeError for a dtype that does not fit.
    """
    if (position_ids is None) != (position_weight is None):
        raise ValueError("embed: position_ids and position_weight go together; one of them is None")
    if position_scale is not None and position_ids is None:
        raise ValueError("embed: position_scale is given without position_ids and position_weight")
    dtype = dtype or weight.dtype
    width = expect_table("embed", "weight", weight, MAX_WIDTH)
    expect_dtype("embed", dtype, weight)
    expect_indices("embed", "input_ids", input_ids, weight)
    expect_parameter("embed", "norm_weight", norm_weight, (width,), weight)
    if norm_bias is not None:
        expect_parameter("embed", "norm_bias", norm_bias, (width,), weight)
    if position_ids is not None:
        expect_indices("embed", "position_ids", position_ids, weight, input_ids.shape)
        expect_table("embed", "position_weight", position_weight, MAX_WIDTH)
        expect_parameter("embed", "position_weight", position_weight, (position_weight.shape[0], width), weight)
    if position_scale is not None:
        expect_parameter("embed", "position_scale", position_scale, (1,), weight)
    run = pick("embed", weight, embed_reference)
    positions = {"position_ids": position_ids, "position_weight": position_weight, "position_scale": position_scale}
    if run is embed_reference:
        return embed_reference(input_ids, weight, norm_weight, norm_bias, **positions, eps=eps, dtype=dtype)
    return run(weight, input_ids, norm_weight, norm_bias, *positions.values(), eps, dtype)
