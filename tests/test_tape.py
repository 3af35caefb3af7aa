"""One autograd node for several operators, beside the same operators with a node each.

T tokens, C hidden size, I intermediate size, M rows, H heads.
"""

import gc
import weakref

import pytest
import torch
from conftest import NATIVE
from pairs import parametrize_pairs
from torch import nn

from cramfast.kernels import Nodes, Pass, Tape, add_layer_norm_reference, one_node, tape_serves

T, C, INNER, HEADS = 24, 64, 48, 2
ROWS = (1, 5, 6, 20)
DEVICE = "cuda" if NATIVE else "cpu"

pytestmark = pytest.mark.usefixtures("triton_kernels")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def tensors(frozen=(), bias=True):
    """What `block` is given, by name; those in `frozen` have no gradient."""
    shapes = {"x": (T, C), "residual": (T, C), "wide": (INNER, C), "narrow": (C, INNER), "twice": (2 * C, C)}
    made = {name: randn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    made |= {"norm": 1 + 0.1 * randn(C, seed=7), "next_norm": 1 + 0.1 * randn(C, seed=8)}
    if bias:
        made |= {"wide_bias": randn(INNER, seed=9), "twice_bias": randn(2 * C, seed=10), "norm_bias": randn(C, seed=11)}
    for name in ("wide", "narrow", "twice"):
        made[name] /= C**0.5
    return {name: x.requires_grad_(name not in frozen) for name, x in made.items()}


def block(run, x, residual, wide, narrow, twice, norm, next_norm, wide_bias=None, twice_bias=None, norm_bias=None):
    """Everything but attention. The sum `s` is used three times, and handed out; so is what a product adds to."""
    y, s = run.add_layer_norm(x, residual, norm, norm_bias, 1e-5)
    z = run.linear(run.gelu(run.linear(y, wide, wide_bias), "tanh"), narrow)
    z = run.geglu(run.linear(z, twice, twice_bias))
    rows = torch.tensor(ROWS, device=DEVICE)
    z, kept = run.add_layer_norm(run.select_rows(z, rows), run.select_rows(s, rows), next_norm, None, 1e-5)
    u = run.linear(s, wide)
    return run.layer_norm(z, norm, norm_bias, 1e-5), kept, run.linear(u, narrow), s


def by_tape(given, run=block):
    return one_node(lambda tape: run(tape, **given), Tape(Pass()), [(x, (x,)) for x in given.values()])


def backward(outputs, given, expanded=False):
    """Gradients by name, of a random weighting of the outputs; or of their sum, which autograd hands on expanded."""
    outputs = [y for y in outputs if y is not None and y.requires_grad]
    weights = [torch.ones_like(y) if expanded else randn(*y.shape, seed=20 + i) for i, y in enumerate(outputs)]
    if expanded:
        sum(y.sum() for y in outputs).backward()
    else:
        copies = [weight.clone() for weight in weights]
        torch.autograd.backward(outputs, weights)
        assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies, strict=True))
    grads = {name: x.grad for name, x in given.items()}
    for x in given.values():
        x.grad = None
    return grads


def assert_same(grads, expected):
    for name, grad in expected.items():
        # Sums of fp32 in another order.
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@parametrize_pairs(
    frozen=[(), ("x",), ("x", "residual"), ("wide", "twice_bias"), ("norm", "norm_bias", "next_norm"), ("narrow",)],
    bias=[True, False],
    expanded=[False, True],
)
def test_gradients_are_those_of_a_node_each(frozen, bias, expanded):
    given = tensors(frozen, bias)
    outputs, expected = by_tape(given), block(Nodes, **given)
    for mine, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_same(backward(outputs, given, expanded), backward(expected, given, expanded))


def test_what_is_not_asked_for_costs_nothing():
    given = tensors(("x", "residual", "wide", "norm", "norm_bias", "wide_bias"))
    outputs = by_tape(given)
    assert outputs[0].requires_grad
    assert len(outputs[0].grad_fn.saved_tensors) < len(by_tape(tensors())[0].grad_fn.saved_tensors) - 4
    assert not any(y.requires_grad for y in by_tape(tensors(tensors())))
    with torch.no_grad():
        assert not any(y.requires_grad for y in by_tape(tensors()))


def test_only_some_outputs_have_gradients():
    for used in range(4):
        given = tensors()
        mine = backward(by_tape(given)[used : used + 1], given)
        assert_same(mine, backward(block(Nodes, **given)[used : used + 1], given))


def test_a_gradient_that_waits_elsewhere_is_left_alone():
    """In y = x + residual both get the same tensor; a product adds to that of the residual before x is through."""

    def parallel(run, x, residual, wide, narrow, norm, **_):
        branch = run.linear(run.linear(x, wide), narrow)
        other = run.linear(run.linear(residual, wide), narrow)
        return run.add_layer_norm(branch, residual, norm)[0], other

    given = tensors()
    assert_same(backward(by_tape(given, parallel), given), backward(parallel(Nodes, **given), given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tensor_stands_for_several_parameters(dtype):
    members = [randn(C, C, seed=seed).requires_grad_(seed != 2) for seed in range(3)]
    biases = [randn(C, seed=seed).requires_grad_() for seed in range(3)]
    x, weight = randn(T, C, seed=4, dtype=dtype), randn(T, 3 * C, seed=5, dtype=dtype)
    whole, bias = (torch.cat(group).detach().to(dtype) for group in (members, biases))
    groups = [(whole, members), (bias, biases)]
    (z,) = one_node(lambda tape: (tape.linear(x, whole, bias),), Tape(Pass()), groups)
    z.backward(weight)
    assert members[2].grad is None and z.dtype == dtype
    expected = weight.double().t() @ x.double()
    for number, member in enumerate(members[:2]):
        assert member.grad.dtype == torch.float32
        rows = slice(number * C, (number + 1) * C)
        # Not rounded to 16 bits on the way.
        torch.testing.assert_close(member.grad.double(), expected[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(biases[number].grad, weight.float().sum(0)[rows], rtol=1e-4, atol=1e-4)


def test_attention_and_its_dropout():
    qkv = randn(T, 3 * C, dtype=torch.float16).requires_grad_()
    cu_seqlens = torch.tensor([0, 9, 10, 24], dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": 14, "window": 4}
    weight = randn(T, C, seed=3, dtype=torch.float16)
    common, grads = Pass(), []
    for dropout_p in (0.0, 0.5, 0.5):
        tape = Tape(common)
        made = one_node(
            lambda tape, p=dropout_p: (tape.attend(qkv, HEADS, **options, dropout_p=p),), tape, [(qkv, (qkv,))]
        )
        grads += torch.autograd.grad(made, qkv, weight)
    expected = torch.autograd.grad(Nodes.attend(qkv, HEADS, **options), qkv, weight)[0]
    assert torch.equal(grads[0], expected)
    assert torch.equal(grads[1], grads[2]) and not torch.equal(grads[1], expected)


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float32), (768, torch.float16), (1000, torch.float32)])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_in_front_of_a_residual_addition(width, dtype, p):
    x = randn(T, width, dtype=dtype).abs().add(1).requires_grad_()
    residual, weight = randn(T, width, seed=1, dtype=dtype).requires_grad_(), randn(width, seed=2).requires_grad_()
    groups = [(tensor, (tensor,)) for tensor in (x, residual, weight)]

    def run(tape):
        first, _ = tape.add_layer_norm(x, residual, weight, dropout_p=p)
        return first, *tape.add_layer_norm(x, residual, weight, dropout_p=p)

    first, y, s = one_node(run, Tape(Pass()), groups)
    assert p == 1 or not torch.equal(first, y)
    factor = ((s.float() - residual.float()) / x.float()).detach()
    kept = factor > 0.5
    torch.testing.assert_close(factor, kept / (1 - p) if p < 1 else 0 * factor, rtol=1e-2, atol=1e-2)
    assert abs((~kept).float().mean() - p) < 0.05
    # Neighbours do not share their fate, in either direction.
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(width // 3, 1)):
        assert p == 1 or abs((kept == shifted).float().mean() - p**2 - (1 - p) ** 2) < 0.05
    weights = [randn(T, width, seed=seed, dtype=dtype) for seed in (5, 6)]
    for used in ((0, 1), (0,), (1,)):
        outputs, grads = [(y, s)[i] for i in used], [weights[i] for i in used]
        mine = torch.autograd.grad(outputs, (x, residual), grads, retain_graph=True)
        exact = [tensor.detach().double().requires_grad_() for tensor in (x, residual)]
        dropped = exact[0] * (kept / (1 - p) if p < 1 else 0 * factor)
        expected = add_layer_norm_reference(dropped, exact[1], weight.detach().double())
        theirs = torch.autograd.grad([expected[i] for i in used], exact, [grad.double() for grad in grads])
        for grad, exactly in zip(mine, theirs, strict=True):
            # A result and two steps on the way are rounded.
            assert (grad.double() - exactly).norm() <= 3 * torch.finfo(dtype).eps * exactly.norm()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout(p):
    x = randn(T, C).requires_grad_()
    weight, bias = torch.eye(C, device=DEVICE).requires_grad_(), torch.ones(C, device=DEVICE)
    groups = [(x, (x,)), (weight, (weight,))]
    (y,) = one_node(lambda tape: (tape.dropout(tape.linear(x, weight, bias), p),), Tape(Pass()), groups)
    kept = y / (x + bias)
    y.backward(torch.ones_like(y))
    assert p == 0 or abs((kept == 0).float().mean() - p) < 0.05
    torch.testing.assert_close(x.grad, kept.detach(), rtol=1e-4, atol=1e-4)


def test_as_many_backward_passes_as_with_a_node_each():
    given = tensors()
    outputs = by_tape(given)
    total = sum(y.square().sum() for y in outputs)
    leaves = [*given.values()]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; CRAMFAST_KERNELS=reference can"):
        torch.autograd.grad(total, leaves, create_graph=True)
    again = torch.autograd.grad(total, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def test_tensors_are_freed_by_the_backward_pass():
    given, alive = tensors(), []

    def watched(run, **given):
        z = run.linear(given["x"], given["wide"])
        y = run.gelu(z)
        alive.extend(map(weakref.ref, (z, y)))
        return (run.linear(y, given["narrow"]),)

    gc.disable()  # nothing waits for it
    try:
        (out,) = by_tape(given, watched)
        assert all(ref() is not None for ref in alive)
        out.backward(torch.ones_like(out))
        assert out.grad_fn is not None and all(ref() is None for ref in alive)
        alive.clear()
        (out,) = by_tape(given, watched)
        del out
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


def test_gradients_of_parameters_are_not_copied():
    weight, x = nn.Parameter(randn(C, C)), randn(T, C)
    (z,) = one_node(lambda tape: (tape.linear(x, weight),), Tape(Pass()), [(weight, (weight,))])
    made = []
    product = torch.mm

    def recorded(*arguments, **options):
        made.append(product(*arguments, **options))
        return made[-1].view_as(made[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", recorded)
        z.backward(torch.ones_like(z))
    assert weight.grad.data_ptr() == made[0].data_ptr()


def test_what_is_saved_passes_through_hooks():
    given, packed = tensors(), []

    def pack(x):
        packed.append(x.shape)
        return x.detach().cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.to(DEVICE)):
        outputs = by_tape(given)
    assert len(packed) > 10
    assert_same(backward(outputs, given), backward(block(Nodes, **given), given))


def test_what_a_tape_serves(monkeypatch):
    x = randn(T, C, dtype=torch.float16)
    assert tape_serves(x, HEADS, 512, True)
    assert not tape_serves(x, HEADS, 513, False) and not tape_serves(x, 4, 20, False)
    assert not tape_serves(x.float(), HEADS, 20, False) and not tape_serves(x[:0], HEADS, 20, False)
    wide = randn(T, 2 * 96, dtype=torch.float16)
    assert tape_serves(wide, HEADS, 20, False) and not tape_serves(wide, HEADS, 20, True)
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")
    assert not tape_serves(x, HEADS, 20, False)


def test_operators_check_their_arguments():
    x, tape = randn(T, C), Tape(Pass())
    with pytest.raises(ValueError, match="layer_norm: weight has shape"):
        tape.layer_norm(x, randn(C - 1))
    with pytest.raises(ValueError, match="add_layer_norm: residual has shape"):
        tape.add_layer_norm(x, x[:-1], randn(C))
    with pytest.raises(TypeError, match="varlen_attention: cu_seqlens is int64"):
        tape.attend(randn(T, 3 * C), HEADS, torch.tensor([0, T], device=DEVICE), T)
