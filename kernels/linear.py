"""Linear layers that add their weight's gradient where it is collected, and that need not save their input.

dW = dzᵀ x goes to the weight's `main_grad`, where it has one, by the matrix product itself; see main_grad.py.

What stands before the product can be part of it. Then the forward pass saves the input of the norm or activation alone,
and the backward pass, which reads that anyway, writes the product's input once more:

    add_layer_norm_linear   s = x + residual, z = LN(s) Wᵀ        saves s and its statistics
    geglu_linear            z = GEGLU(u) Wᵀ                       saves u

GEGLU comes with the products beside it, from `geglu_product.py`: `add_layer_norm_geglu_linear` takes it from the one
before, and the gradient of the one after comes through it.
"""

import torch
import torch.nn.functional as F

from .arguments import expect_choice
from .dispatch import choose
from .geglu_product import product_and_geglu, product_and_geglu_backward
from .gelu import APPROXIMATIONS, expect_geglu, geglu, geglu_forward
from .layer_norm import add_layer_norm, norm_backward, norm_forward
from .main_grad import add_product, claim, collects


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        _remember(ctx, weight, bias)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dz):
        (x,) = ctx.saved_tensors
        dz = dz.contiguous()
        _collect(ctx, dz, x)
        return dz @ ctx.weight if ctx.needs_input_grad[0] else None, None, _bias_gradient(ctx, dz)


class _GegluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, y, weight, bias, approximate, recompute):
        x = geglu_forward(u, approximate)[0] if y is None else y
        ctx.save_for_backward(u, None if recompute else x)
        ctx.approximate = approximate
        _remember(ctx, weight, bias)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dz):
        u, x = ctx.saved_tensors
        dz = dz.contiguous()
        recompute = x is None
        # Nobody reads u after this, and its gradient is the largest tensor of a layer.
        du, again = product_and_geglu_backward(dz, ctx.weight, u, ctx.approximate, recompute, in_place=recompute)
        if recompute:
            torch.autograd.graph.increment_version(u)
        _collect(ctx, dz, again if recompute else x)
        return du, None, None, _bias_gradient(ctx, dz), None, None


class _AddLayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, weight, bias, eps, recompute, approximate):
        y, s, statistics = norm_forward(x, residual, norm_weight, norm_bias, eps)
        ctx.save_for_backward(s, norm_weight, norm_bias, statistics, None if recompute else y)
        ctx.set_materialize_grads(False)
        _remember(ctx, weight, bias)
        if approximate is None:
            return _product(y, weight, bias), s, None
        z, activation = product_and_geglu(y, weight, _cast(bias, y), approximate)
        ctx.mark_non_differentiable(activation)
        return z, s, activation

    @staticmethod
    def backward(ctx, dz, ds, _):
        s, norm_weight, norm_bias, statistics, y = ctx.saved_tensors
        if dz is None:
            return ds, ds, *(None,) * 7
        dz = dz.contiguous()
        parameters = (norm_weight, norm_bias, statistics)
        dx, dnorm_weight, dnorm_bias, again = norm_backward(dz @ ctx.weight, ds, s, *parameters, y is None)
        _collect(ctx, dz, again if y is None else y)
        return dx, dx, dnorm_weight, dnorm_bias, None, _bias_gradient(ctx, dz), None, None, None


def _remember(ctx, weight, bias):
    ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype


def _collect(ctx, dz, x):
    """Add the weight's gradient to what is collected."""
    total, joins = claim(ctx.weight)
    add_product(total, dz.t(), x, first=not joins)


def _product(x, weight, bias):
    return F.linear(x, weight, _cast(bias, x))


def _cast(bias, x):
    return None if bias is None else bias.to(x.dtype)


def _bias_gradient(ctx, dz):
    return None if ctx.bias_dtype is None else dz.sum(0, dtype=ctx.bias_dtype)


def _accumulates(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the weight's gradient goes to its `main_grad`, and not through autograd to whoever asks for it."""
    return torch.is_grad_enabled() and collects(weight) and x.dim() == 2 and x.dtype == weight.dtype


def _has_kernels(operator: str, x: torch.Tensor) -> bool:
    return choose(operator, x.device, x.dtype).backend == "triton"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times weight (O, I) transposed, plus bias (O,) → (..., O), as `torch.nn.functional.linear`.

    Where weight has an attribute `main_grad` (O, I), float32, and x is (T, I) of the weight's dtype, the backward pass
    adds the weight's gradient to it, and autograd sees none.
    """
    if _accumulates(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def geglu_linear(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    approximate: str = "none",
    recompute: bool = False,
) -> torch.Tensor:
    """`linear(geglu(u), weight, bias)` of u (..., 2I) → (..., O).

    recompute: with a `main_grad`, the backward pass computes geglu(u) again instead of finding it saved: as much
    memory less as it takes, for one more tensor written. It puts the gradient of u into u's own memory, so that a
    second backward pass raises. Raises as `geglu` does.
    """
    if _accumulates(u, weight) and _has_kernels("geglu", u):
        expect_geglu(u, approximate)
        return _GegluLinear.apply(u, None, weight, bias, approximate, recompute)
    return linear(geglu(u, approximate), weight, bias)


def add_layer_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(z, s)` with y, s = add_layer_norm(x, residual, norm_weight, norm_bias, eps) and z = linear(y, weight, bias).

    x, residual and s (..., C), z (..., O). recompute: as in `geglu_linear`, of y. Raises as `add_layer_norm` does.
    """
    if _accumulates(x, weight) and _has_kernels("add_layer_norm", x):
        return _AddLayerNormLinear.apply(x, residual, norm_weight, norm_bias, weight, bias, eps, recompute, None)[:2]
    y, s = add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return linear(y, weight, bias), s


def add_layer_norm_geglu_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    wide_weight: torch.Tensor,
    wide_bias: torch.Tensor | None,
    narrow_weight: torch.Tensor,
    narrow_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    approximate: str = "none",
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(z, s)` with u, s = add_layer_norm_linear(x, residual, norm_weight, norm_bias, wide_weight, wide_bias) and
    z = geglu_linear(u, narrow_weight, narrow_bias).

    x, residual and s (..., C), u (..., 2I), z (..., O). recompute: as in both. Raises as they do.
    """
    norm, wide = (x, residual, norm_weight, norm_bias), (wide_weight, wide_bias)
    collected = _accumulates(x, wide_weight) and _accumulates(x, narrow_weight)
    if not (collected and _has_kernels("add_layer_norm", x) and _has_kernels("geglu", x)):
        u, s = add_layer_norm_linear(*norm, *wide, eps, recompute)
        return geglu_linear(u, narrow_weight, narrow_bias, approximate, recompute), s
    expect_choice("geglu", "approximate", approximate, APPROXIMATIONS)
    u, s, y = _AddLayerNormLinear.apply(*norm, *wide, eps, recompute, approximate)
    return _GegluLinear.apply(u, y, narrow_weight, narrow_bias, approximate, recompute), s
