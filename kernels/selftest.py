"""Every operator against its reference, on the device at hand: outputs and all gradients, in every dtype it has kernels
for.

The rule is that of the tests: against the definition in float64, the kernel errs at most twice as much as plain PyTorch
does in the same dtype, by relative L2 error. Masking, which knows no floating dtype, must give the very numbers of its
definition.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .adamw import adamw, adamw_reference, update_rates, update_rates_reference
from .attention import varlen_attention, varlen_attention_reference
from .dispatch import DTYPES, OPERATORS, choose
from .embed import embed, embed_reference
from .gelu import geglu, geglu_reference, gelu, gelu_reference
from .layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference
from .linear import add_layer_norm_geglu_linear
from .mask_tokens import mask_tokens, mask_tokens_reference
from .mlm_loss import mlm_loss, mlm_loss_reference
from .muon import muon_direction, muon_direction_reference, muon_update, muon_update_reference
from .orthogonalise import arithmetic, orthogonalise, orthogonalise_reference

# Neither tokens nor width are a multiple of a tile, so that the masks are in the test. The interpreter is slow.
_TOKENS = {"cuda": 1000, "cpu": 100}
_WIDTH = 776
_VOCABULARY, _POSITIONS, _INNER = 300, 50, 80
# What the interpreter lacks for these operators in bfloat16. The loss rounds three times on the way to a gradient.
_INTERPRETED_WRONG = {
    "varlen_attention": "has no bfloat16 products",
    "orthogonalise": "has no bfloat16 products",
    "mlm_loss": "cuts bfloat16 off, not to the nearest",
}


@dataclass(frozen=True)
class Finding:
    """What one operator did in one dtype (None: it computes in integers). `worst`: its largest error as a multiple of
    the allowed one, 1 or less when it is right, NaN when a result is; None when it was not run, `reason` says why."""

    operator: str
    dtype: torch.dtype | None
    worst: float | None
    seconds: float = 0.0
    reason: str = ""

    @property
    def wrong(self) -> bool:
        return self.worst is not None and not self.worst <= 1


def selftest(device: torch.device) -> Iterator[Finding]:
    """One finding for each operator and dtype. Those without a kernel on `device` are not run."""
    for operator in OPERATORS:
        choices = {dtype: choose(operator, device, dtype) for dtype in DTYPES}
        if all(choice.backend == "reference" for choice in choices.values()):
            yield Finding(operator, None, None, reason=f"reference ({choices[DTYPES[0]].reason})")
            continue
        if operator in _EXACT:
            start = time.perf_counter()
            worst = 0.0 if _EXACT[operator](device) else float("inf")
            yield Finding(operator, None, worst, time.perf_counter() - start)
            continue
        for dtype, choice in choices.items():
            if choice.backend == "reference":
                yield Finding(operator, dtype, None, reason=f"reference ({choice.reason})")
            elif device.type == "cpu" and dtype == torch.bfloat16 and operator in _INTERPRETED_WRONG:
                reason = f"not tested (Triton's interpreter {_INTERPRETED_WRONG[operator]})"
                yield Finding(operator, dtype, None, reason=reason)
            else:
                start = time.perf_counter()
                worst = _worst_error(*_CASES[operator], device, dtype)
                yield Finding(operator, dtype, worst, time.perf_counter() - start)


def _worst_error(kernel, reference, make: Callable, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = make(draw, _TOKENS[device.type])
    exact = _results(reference, {name: _widen(tensor) for name, tensor in inputs.items()})
    plain, ours = _results(reference, inputs), _results(kernel, inputs)
    # Rounding a result once makes an error of about eps / 4: less is luck, in zeros for example.
    least = torch.finfo(dtype).eps / 4
    ratios = [_error(o, e) / (2 * max(_error(p, e), least)) for o, p, e in zip(ours, plain, exact, strict=True)]
    return max(ratios, key=lambda ratio: (ratio != ratio, ratio))


def _results(function: Callable, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and gradients of all floating inputs, where there are any, for output gradients that are the same in
    every dtype."""
    inputs = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not outputs[0].requires_grad:
        return [*outputs]
    given = [_weights(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in inputs.values() if t.requires_grad], given)]


def _weights(output: torch.Tensor) -> torch.Tensor:
    """Values from -1 to 1 in steps that every dtype holds."""
    steps = torch.arange(output.numel(), device=output.device) * 37 % 65
    return ((steps - 32) / 32).view_as(output).to(output.dtype)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def _norm_inputs(draw, tokens):
    return {"x": draw(tokens, _WIDTH), "weight": draw(_WIDTH), "bias": draw(_WIDTH)}


def _add_norm_inputs(draw, tokens):
    return _norm_inputs(draw, tokens) | {"residual": draw(tokens, _WIDTH)}


def _activation_inputs(draw, tokens):
    return {"x": draw(tokens, 2 * _WIDTH)}


def _geglu_inputs(draw, tokens):
    return _activation_inputs(draw, tokens) | {"rows": draw(tokens, _INNER), "residual": draw(tokens, _INNER)}


def _activate(activation: Callable, feed_forward: Callable) -> Callable:
    """GEGLU alone, and between two products, of which it is a part on some cards."""

    def run(x, rows, residual):
        # Numbers that every dtype holds, and gradients that are collected, as in training.
        weights = [_weights(rows.new_empty(shape)) / 8 for shape in ((4 * _INNER, _INNER), (_INNER, 2 * _INNER))]
        for weight in weights:
            weight.requires_grad_().main_grad = torch.zeros_like(weight, dtype=torch.float32)
        wide, narrow = weights
        return activation(x), *feed_forward(rows, residual, rows.new_ones(_INNER), None, wide, None, narrow)

    return run


def _feed_forward_reference(x, residual, norm_weight, norm_bias, wide, _, narrow):
    y, s = add_layer_norm_reference(x, residual, norm_weight, norm_bias)
    return geglu_reference(y @ wide.t()) @ narrow.t(), s


def _embed_inputs(draw, tokens):
    weight = draw(_VOCABULARY, _WIDTH)
    token = torch.arange(tokens, device=weight.device)
    return {
        # A third of the tokens use one row, as the mask token's is used.
        "input_ids": torch.where(token % 3 == 0, 4, token * 7 % _VOCABULARY),
        "weight": weight,
        "norm_weight": draw(_WIDTH),
        "norm_bias": draw(_WIDTH),
        "position_ids": token % _POSITIONS,
        "position_weight": draw(_POSITIONS, _WIDTH),
    }


_LONGEST = (64, 128, 512)  # small tiles, large tiles, blocks


def _attention_inputs(draw, tokens):
    qkv = draw(tokens, 3, 2, 64)
    boundaries = {}
    for longest in _LONGEST:
        ends = [0]
        while ends[-1] < tokens:
            ends.append(min(ends[-1] + 1 + len(ends) * 37 % longest, tokens))
        boundaries[f"cu_{longest}"] = torch.tensor(ends, dtype=torch.int32, device=qkv.device)
    return {"qkv": qkv, **boundaries}


def _attend(function: Callable) -> Callable:
    """`function` on sequences of each range, with rotary embedding and without."""

    def run(qkv, **boundaries):
        position = torch.arange(max(_LONGEST), device=qkv.device)[:, None]
        angle = position * 0.7 ** torch.arange(qkv.shape[-1] // 2, device=qkv.device)
        tables = {"cos": angle.cos(), "sin": angle.sin()}
        return tuple(
            function(qkv, boundaries[f"cu_{longest}"], longest, **options)
            for longest in _LONGEST
            for options in ({}, tables)
        )

    return run


def _masks_agree(device: torch.device) -> bool:
    """Whether the kernel masks as the reference does, with short and long sequences, special tokens and whole words."""
    tokens = _TOKENS[device.type]
    token = torch.arange(tokens, device=device)
    ends = torch.tensor([0, 1, 1, 18, tokens], dtype=torch.int32, device=device)
    continues = torch.arange(_VOCABULARY, device=device) % 3 == 0
    options = {"mask_id": 4, "ordinary": (5, _VOCABULARY), "seed": 0, "step": 1}
    return all(
        torch.equal(ours, theirs)
        for words in (None, continues)
        for ours, theirs in zip(
            mask_tokens(token * 7 % _VOCABULARY, ends, tokens // 4, continues=words, **options),
            mask_tokens_reference(token * 7 % _VOCABULARY, ends, tokens // 4, continues=words, **options),
            strict=True,
        )
    )


_EXACT = {"mask_tokens": _masks_agree}


def _loss_inputs(draw, tokens):
    weight = draw(_VOCABULARY, _WIDTH)
    token = torch.arange(tokens, device=weight.device)
    predicted = tokens // 2 + 1
    return {
        "hidden": draw(tokens, _WIDTH),
        "weight": weight / _WIDTH**0.5,
        "labels": torch.where(token % 7 == 0, -100, token * 37 % _VOCABULARY)[:predicted],
        # Every other token is predicted, the first one twice.
        "positions": (token * 2 % tokens)[:predicted],
        "bias": draw(_VOCABULARY),
    }


def _lose(function: Callable, memory: tuple[str, ...] = ()) -> Callable:
    """`function` for each setting of memory; the definition, which has none, as often."""

    def run(**inputs):
        return tuple(function(**inputs, memory=each) for each in memory) or (function(**inputs),) * 2

    return run


def _matrix_inputs(draw, tokens):
    # Tall, wide and square.
    return {"tall": draw(2, 300, 200), "wide": draw(2, 90, tokens), "square": draw(1, 150, 150)}


def _orthogonalise_reference(update):
    # In 16 bits for float32 as well, and without a gradient, as the operator.
    return orthogonalise_reference(update.detach(), dtype=arithmetic(update))


def _update_inputs(draw, tokens):
    size = tokens * _WIDTH
    # The second moment is a mean of squares.
    return {"weight": draw(size), "gradient": draw(size), "first": draw(size), "second": draw(size).square()}


def _update(function: Callable, decide: Callable) -> Callable:
    """`function` with a 16-bit copy of the weights and without, on all of them and on those from an odd place on, and
    an update that is skipped; by rates that `decide` finds, of a gradient that is clipped."""

    def run(**inputs):
        # Norm, loss, loss scale, learning rate, updates before.
        scalars = [torch.tensor(value, device=inputs["weight"].device) for value in (8.0, 0.5, 4.0, 0.1, 2.0)]
        report = torch.empty(3, device=scalars[0].device)
        rates = decide(*scalars, report, clip=1.0, beta1=0.9, beta2=0.98)
        skipping = rates.index_fill(0, torch.tensor(4, device=rates.device), 1.0)
        results = [report, rates]
        for start, rates_now, narrow in ((0, rates, True), (0, rates, False), (3, rates, False), (0, skipping, True)):
            state = [tensor.detach()[start:].clone() for tensor in inputs.values()]
            weight = state[0]
            # The definition in float64 shows what rounding costs.
            dtype = weight.dtype if weight.dtype == torch.float64 else torch.float16
            working = weight.to(dtype, copy=True) if narrow else None
            function(*state, rates_now, working, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01)
            results += [weight, *state[2:], *([working] if narrow else [])]
        return tuple(results)

    return run


def _muon(direct: Callable, follow: Callable) -> Callable:
    """Both passes of Muon, with the direction taken as it is, on all and from an odd place on, and one skipped."""

    def run(**inputs):
        rates = torch.tensor([0.1, 0.0, 0.0, 0.5, 0.0], device=inputs["weight"].device)
        skipping = rates.index_fill(0, torch.tensor(4, device=rates.device), 1.0)
        results = []
        for start, rates_now in ((0, rates), (3, rates), (0, skipping)):
            weight, gradient, momentum, _ = (tensor.detach()[start:].clone() for tensor in inputs.values())
            dtype = weight.dtype if weight.dtype == torch.float64 else torch.float16
            direction, working = (torch.ones_like(weight, dtype=dtype) for _ in range(2))
            direct(gradient, momentum, rates_now, direction, beta=0.95)
            follow(weight, direction, rates_now, working, scale=1e-3, weight_decay=0.01)
            results += [weight, momentum, direction, working]
        return tuple(results)

    return run


def _each(function: Callable) -> Callable:
    """`function` of every input on its own."""

    def run(**inputs):
        return tuple(map(function, inputs.values()))

    return run


_CASES = {
    "embed": (embed, embed_reference, _embed_inputs),
    "layer_norm": (layer_norm, layer_norm_reference, _norm_inputs),
    "add_layer_norm": (add_layer_norm, add_layer_norm_reference, _add_norm_inputs),
    "gelu": (gelu, gelu_reference, _activation_inputs),
    "geglu": (
        _activate(geglu, add_layer_norm_geglu_linear),
        _activate(geglu_reference, _feed_forward_reference),
        _geglu_inputs,
    ),
    "varlen_attention": (_attend(varlen_attention), _attend(varlen_attention_reference), _attention_inputs),
    "mlm_loss": (_lose(mlm_loss, ("fast", "low")), _lose(mlm_loss_reference), _loss_inputs),
    "adamw": (_update(adamw, update_rates), _update(adamw_reference, update_rates_reference), _update_inputs),
    "muon": (
        _muon(muon_direction, muon_update),
        _muon(muon_direction_reference, muon_update_reference),
        _update_inputs,
    ),
    "orthogonalise": (_each(orthogonalise), _each(_orthogonalise_reference), _matrix_inputs),
}
