"""Several operators in one autograd node.

Autograd takes longer, on the host, to make a node and to come back to it than a GPU takes for most of the work between
two matrix products. `one_node` runs a function over a `Tape`, whose methods compute what the operators of the same
names do, and write down how to come back. The backward pass of the node reads that from the end:

    z = x Wᵀ + b      dx += dz W,  dW = dzᵀ x in the dtype of the parameter,  db = sum(dz)
    y = x mask / (1 − p)      dx = dy mask / (1 − p)

and as `layer_norm.py`, `gelu.py`, `attention.py` and `select_rows.py` say. What is used twice, like a residual stream,
has its gradients added up by the product or norm that computes the last of them.

A tape holds numbers, no tensors: what backward needs is saved with the node, so that it is freed as usual, can be
computed again by activation checkpointing, and passes through `torch.autograd.graph.saved_tensors_hooks`.

`Nodes` has the same methods with a node for each, for whatever a tape does not serve.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from .arguments import expect_like
from .attention import attention_backward, attention_forward, attention_layout, has_kernels, varlen_attention
from .attention_arguments import expect_attention
from .column_sums import column_sums
from .dispatch import choose
from .gelu import geglu, geglu_backward, geglu_forward, gelu, gelu_backward, gelu_forward
from .layer_norm import (
    add_layer_norm,
    check_norm,
    layer_norm,
    norm_and_dropout_backward,
    norm_backward,
    norm_forward,
)
from .linear import linear
from .main_grad import product
from .operator import expect_first_derivative
from .select_rows import put_back, select_rows

_undrop = torch.ops.aten.native_dropout_backward.default


class Nodes:
    """Operators that are an autograd node each. T tokens, C hidden size, I intermediate size, M rows."""

    linear = staticmethod(linear)
    dropout = staticmethod(F.dropout)
    layer_norm = staticmethod(layer_norm)
    gelu = staticmethod(gelu)
    geglu = staticmethod(geglu)
    select_rows = staticmethod(select_rows)

    @staticmethod
    def add_layer_norm(x, residual, weight, bias=None, eps=1e-5, dropout_p=0.0):
        """`add_layer_norm` of x after dropout."""
        return add_layer_norm(F.dropout(x, dropout_p), residual, weight, bias, eps)

    @staticmethod
    def attend(qkv, heads, cu_seqlens, max_seqlen, **options):
        """`varlen_attention` of qkv (T, 3C) → (T, C)."""
        return varlen_attention(qkv.unflatten(-1, (3, heads, -1)), cu_seqlens, max_seqlen, **options).flatten(1)


def tape_serves(x: torch.Tensor, heads: int, max_seqlen: int, rotary: bool) -> bool:
    """Whether every operator of a tape has a kernel for activations like x (T, C), in eager code."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.shape[0] == 0:
        return False
    head_size = x.shape[1] // heads
    if not has_kernels(x.dtype, head_size, max_seqlen) or (rotary and head_size == 96):
        return False
    operators = ("layer_norm", "add_layer_norm", "gelu", "geglu", "varlen_attention")
    return all(choose(name, x.device, x.dtype).backend == "triton" for name in operators)


class Pass:
    """What the tapes of one forward pass over a batch have in common, each of which has a place below `tapes`."""

    def __init__(self, tapes: int = 1):
        self._tapes, self._seeds, self._layouts = tapes, None, {}

    def seed(self, place: int, device: torch.device) -> torch.Tensor:
        """int64, for the random numbers of that tape; drawn once, so that it is the same when the tape is run again."""
        if self._seeds is None:
            # Two each, for addresses that are a multiple of 16.
            self._seeds = torch.randint(2**62, (self._tapes, 2), device=device).unbind()
        return self._seeds[place]

    def layout(self, qkv, cu_seqlens, max_seqlen, *, cos=None, sin=None, window=None, dropout_p=0.0):
        """What `attention_layout` gives for qkv (T, 3, H, D)."""
        key = (window, dropout_p, id(cos), qkv.shape[-1])
        if key not in self._layouts:
            expect_attention(qkv, cu_seqlens, max_seqlen, cos, sin, None, window, dropout_p)
            total, _, _, head_size = qkv.shape
            options = {"softmax_scale": None, "window": window, "dropout_p": dropout_p}
            layout = attention_layout(cu_seqlens, total, head_size, max_seqlen, cos=cos, sin=sin, **options)
            self._layouts[key] = (layout, cos)  # whose id is taken as long as it is there
        return self._layouts[key][0]


class Tape:
    """Operators that run at once and are noted for a backward pass. They take and give what those of `Nodes` do."""

    def __init__(self, common: Pass, place: int = 0):
        self._common, self._place, self._dropouts = common, place, 0
        self.saved, self.steps = [], []
        # By the ids of tensors that have a gradient; and these tensors, without which the ids would go to others.
        self._numbers, self._held, self._dtypes = {}, [], {}

    def follow(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
        """Have the gradient of `tensor` computed, of a linear layer's parameter in `dtype`; returns its number."""
        self._held.append(tensor)
        self._numbers[id(tensor)] = number = len(self._held)
        self._dtypes[number] = dtype
        return number

    def number(self, tensor: torch.Tensor | None) -> int | None:
        """None for what has no gradient."""
        return self._numbers.get(id(tensor))

    def linear(self, x, weight, bias=None):
        z = F.linear(x, weight, bias)
        dx, dweight, dbias = numbers = self._numbers_of(x, weight, bias)
        weight_dtype, bias_dtype = self._dtypes.get(dweight), self._dtypes.get(dbias)

        def back(gradients, x, weight, dz):
            dz = dz.contiguous()
            if dbias is not None:
                gradients.add_sum(dbias, dz, bias_dtype)
            if dweight is not None:
                gradients.add(dweight, product(dz.t(), x, weight_dtype))
            if dx is not None:
                gradients.add_product(dx, dz, weight)

        self._note(numbers, (z,), back, None if dweight is None else x, None if dx is None else weight)
        return z

    def dropout(self, x, p):
        if p == 0:
            return x
        y, mask = torch.native_dropout(x, p, True)
        dx = self.number(x)
        scale = 0.0 if p == 1 else 1 / (1 - p)
        self._note((dx,), (y,), lambda gradients, mask, dy: gradients.add(dx, _undrop(dy, mask, scale)), mask)
        return y

    def layer_norm(self, x, weight, bias=None, eps=1e-5):
        check_norm("layer_norm", x, weight, bias)
        y, _, statistics = norm_forward(x, None, weight, bias, eps)
        numbers = self._numbers_of(x, weight, bias)

        def back(gradients, *saved_and_dy):
            *saved, dy = saved_and_dy
            gradients.add_each(numbers, norm_backward(dy, None, *saved))

        self._note(numbers, (y,), back, x, weight, bias, statistics)
        return y

    def add_layer_norm(self, x, residual, weight, bias=None, eps=1e-5, dropout_p=0.0):
        check_norm("add_layer_norm", x, weight, bias)
        expect_like("add_layer_norm", "residual", residual, x.shape, x)
        if dropout_p == 1:  # by which the kernel would divide
            x, dropout_p = self.dropout(x, 1.0), 0.0
        seed, stream = self._dropout(x.device, dropout_p)
        y, s, statistics = norm_forward(x, residual, weight, bias, eps, seed, stream, dropout_p)
        dresidual, _, _, dx = numbers = self._numbers_of(residual, weight, bias, x)

        def back(gradients, s, weight, bias, statistics, seed, dy, ds):
            if dy is None and seed is None:
                return gradients.add_each((dresidual, dx), (ds, ds))
            dy = torch.zeros_like(ds) if dy is None else dy
            ds, dweight, dbias, _, before = norm_and_dropout_backward(
                dy, ds, s, weight, bias, statistics, False, seed, stream, dropout_p
            )
            gradients.add_each(numbers, (ds, dweight, dbias, ds if before is None else before))

        self._note(numbers, (y, s), back, s, weight, bias, statistics, seed)
        return y, s

    def _dropout(self, device, dropout_p):
        """(seed, stream) of the next dropout of this tape, without a seed where that does nothing."""
        self._dropouts += 1
        return (self._common.seed(self._place, device) if dropout_p > 0 else None), self._dropouts

    def gelu(self, x, approximate="none"):
        return self._activate(gelu_forward, gelu_backward, x, approximate)

    def geglu(self, x, approximate="none"):
        return self._activate(geglu_forward, geglu_backward, x, approximate)

    def _activate(self, forward, backward, x, approximate):
        (y,), dx = forward(x, approximate), self.number(x)
        self._note((dx,), (y,), lambda gradients, x, dy: gradients.add(dx, backward(dy, x, approximate)[0]), x)
        return y

    def attend(self, qkv, heads, cu_seqlens, max_seqlen, **options):
        total, width = qkv.shape
        heads_apart, dqkv = qkv.view(total, 3, heads, width // (3 * heads)), self.number(qkv)
        layout, settings = self._common.layout(heads_apart, cu_seqlens, max_seqlen, **options)
        seed = self._common.seed(self._place, qkv.device) if settings[-1] > 0 else None
        out, lse, turned = attention_forward(heads_apart, *layout, seed, *settings)
        attended = out.view(total, width // 3)

        def back(gradients, heads_apart, out, lse, *rest):
            *constants, dout = rest  # (T, C), which is (T, H, D) in memory
            (grad,) = attention_backward(dout, heads_apart, out, lse, *constants, *settings)
            gradients.add(dqkv, grad.view(total, width))

        self._note((dqkv,), (attended,), back, heads_apart if turned is None else turned, out, lse, *layout, seed)
        return attended

    def select_rows(self, x, rows):
        y, dx, total = x.index_select(0, rows), self.number(x), x.shape[0]
        self._note((dx,), (y,), lambda gradients, rows, dy: gradients.add(dx, put_back(dy, rows, total)), rows)
        return y

    def _numbers_of(self, *tensors):
        return [*map(self._numbers.get, map(id, tensors))]

    def _note(self, inputs: Iterable[int | None], outputs: tuple, back: Callable, *saved: torch.Tensor | None) -> None:
        """Have back(gradients, *saved, *grads of the outputs) called, which adds to those of `inputs`."""
        if any(inputs):  # numbers begin with 1
            first = len(self.saved)
            self.saved += saved
            self.steps.append((tuple(map(self.follow, outputs)), back, slice(first, len(self.saved))))


# Up to so many rows the host takes longer to ask for sums over them than the GPU for the sums.
_FEW_ROWS = 8192


class _Gradients(dict):
    """By number, as far as they are known. given: those that the node is called with, which belong to others."""

    def __init__(self, numbers: Iterable[int | None], given: tuple):
        super().__init__()
        # The ids of tensors that others have too, and by rows and dtype the (numbers, matrices) of what `sum_up` adds.
        self._elsewhere, self._to_sum = [*map(id, given)], {}
        for number, grad in zip(numbers, given, strict=True):
            if grad is not None:
                self.add(number, grad)

    def add(self, number: int | None, grad: torch.Tensor) -> None:
        if number is not None:
            before = self.get(number)
            self[number] = grad if before is None else before + grad

    def add_each(self, numbers, grads) -> None:
        for number, grad in zip(numbers, grads, strict=False):
            self.add(number, grad)

    def add_product(self, number: int, dz: torch.Tensor, weight: torch.Tensor) -> None:
        """Add dz @ weight."""
        before = self.get(number)
        if before is None:
            self[number] = torch.mm(dz, weight)
        elif [*map(id, self.values()), *self._elsewhere].count(id(before)) == 1:
            before.addmm_(dz, weight)
        else:
            self[number] = torch.addmm(before, dz, weight)

    def add_sum(self, number: int, dz: torch.Tensor, dtype: torch.dtype) -> None:
        """Add the sum over the rows of dz, in `dtype`; of few rows with `sum_up`."""
        if dz.shape[0] > _FEW_ROWS:
            self.add(number, dz.sum(0, dtype=dtype))
        else:
            numbers, matrices = self._to_sum.setdefault((dz.shape[0], dtype), ([], []))
            numbers.append(number)
            matrices.append(dz)
            self._elsewhere.append(id(dz))

    def sum_up(self) -> None:
        """Add what `add_sum` has left, several sums in one kernel."""
        for (_, dtype), (numbers, matrices) in self._to_sum.items():
            self.add_each(numbers, column_sums(matrices, dtype))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, tape, groups, *_inputs):
        # By input the number of its gradient, or of the gradient that it has a part of and which part.
        inputs, ctx.parts, needed = [], [], ctx.needs_input_grad[3:]
        for tensor, members in groups:
            first, count = len(inputs), len(members)
            number = tape.follow(tensor, members[0].dtype) if True in needed[first : first + count] else None
            if count == 1 or number is None:
                inputs += [number] * count
            else:
                parts = [(number, part) for part in range(count)]
                ctx.parts.append((number, parts))
                inputs += parts
        outputs = run(tape)
        ctx.save_for_backward(*tape.saved)
        ctx.set_materialize_grads(False)
        ctx.steps, ctx.inputs, ctx.outputs = tape.steps, inputs, [tape.number(output) for output in outputs]
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        expect_first_derivative("kernels of cramfast")
        saved, gradients = ctx.saved_tensors, _Gradients(ctx.outputs, grads)
        for outputs, back, kept in reversed(ctx.steps):
            if not gradients.keys().isdisjoint(outputs):
                back(gradients, *saved[kept], *[gradients.pop(number, None) for number in outputs])
        gradients.sum_up()
        for number, parts in ctx.parts:
            if number in gradients:
                whole, count = gradients[number], len(parts)
                # In one operation, where `chunk` takes three for each part.
                gradients.update(zip(parts, whole.split_with_sizes([len(whole) // count] * count), strict=True))
        # Autograd drops what goes to an input without a gradient.
        return None, None, None, *map(gradients.get, ctx.inputs)


# Past the Python around it, which serves functorch alone.
_apply = super(torch.autograd.Function, _Node).apply


def one_node(run: Callable, tape: Tape, groups: list) -> tuple[torch.Tensor | None, ...]:
    """run(tape), a tuple of tensors that it makes with the tape's methods, or None, as one autograd node.

    groups: [(tensor, members)], all whose gradients are wanted: a tensor that `run` uses stands for its members, those
    that autograd knows of, one after the other along the first dimension. Where it is a copy in another dtype, of
    parameters of linear layers, their gradients are computed in their own. An input stands for itself.
    """
    if not torch.is_grad_enabled():
        return run(tape)
    return _apply(run, tape, groups, *[member for _, members in groups for member in members])
