"""Linear layers that add their weight's gradient to a buffer: native on a GPU, interpreted without one.

The rule is that of test_operators.py: against fp64, at most twice the error of plain PyTorch in the same dtype, in
relative L2, for outputs, gradients and what is collected. Shapes: T tokens, I and O features.
"""

import pytest
import torch
import torch.nn.functional as F
from pairs import parametrize_pairs
from test_operators import DEVICE, DTYPES, NATIVE, floor, needs_gpu, randn

from cramfast.kernels import add_layer_norm_linear, geglu_linear, linear
from cramfast.kernels.gelu import geglu_reference
from cramfast.kernels.layer_norm import add_layer_norm_reference
from cramfast.kernels.main_grad import add_product

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

NARROW = (torch.float16, torch.bfloat16)
EPS = 1e-5
# Odd ones beside round ones.
SIZES = ((1, 64, 96), (63, 40, 24), (100, 96, 7), (0, 64, 48))
OPERATORS = ("linear", "geglu", "geglu tanh", "add_layer_norm")
RUNS = 20 if NATIVE else 3


def plain_linear(x, weight, bias=None):
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def call(operator: str, inputs: dict, plain: bool = False, recompute: bool = False) -> tuple[torch.Tensor, ...]:
    """Outputs of an operator, or of plain PyTorch in its place."""
    weight, bias = inputs["weight"], inputs.get("bias")
    x = inputs["x"]
    if operator == "linear":
        return ((plain_linear if plain else linear)(x, weight, bias),)
    if operator.startswith("geglu"):
        approximate = "tanh" if operator.endswith("tanh") else "none"
        if plain:
            return (plain_linear(geglu_reference(x, approximate), weight, bias),)
        return (geglu_linear(x, weight, bias, approximate, recompute),)
    norm = (x, inputs["residual"], inputs["norm_weight"], inputs.get("norm_bias"))
    if plain:
        y, s = add_layer_norm_reference(*norm, EPS)
        return plain_linear(y, weight, bias), s
    return add_layer_norm_linear(*norm, weight, bias, EPS, recompute)


def make_inputs(operator: str, size, dtype, biased: bool = True) -> dict[str, torch.Tensor]:
    """Products in `dtype`, all other parameters in float32."""
    tokens, features, outputs = size
    width = 2 * features if operator.startswith("geglu") else features
    inputs = {"x": randn(tokens, width, dtype=dtype), "weight": (randn(outputs, features) / features**0.5).to(dtype)}
    if operator == "add_layer_norm":
        inputs["residual"] = randn(tokens, features, dtype=dtype, seed=1)
        inputs["norm_weight"] = 1 + 0.1 * randn(features, seed=2)
        if biased:
            inputs["norm_bias"] = randn(features, seed=3)
    if biased:
        inputs["bias"] = randn(outputs, seed=4)
    return inputs


def leaves_of(inputs: dict, main_grad=None, replaces: bool | None = None) -> dict[str, torch.Tensor]:
    """The inputs as leaves; the weight carries `main_grad`, if there is one."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    if main_grad is not None:
        leaves["weight"].main_grad = main_grad
    if replaces is not None:
        leaves["weight"].replaces_main_grad = replaces
    return leaves


def random_grads(outputs) -> list[torch.Tensor]:
    return [randn(*y.shape, dtype=torch.bfloat16, seed=20 + i).to(y.dtype) for i, y in enumerate(outputs)]


def evaluate(operator: str, leaves: dict, **options) -> dict[str, torch.Tensor | None]:
    """Outputs and the gradients that autograd has."""
    outputs = call(operator, leaves, **options)
    found = torch.autograd.grad(outputs, [*leaves.values()], random_grads(outputs), allow_unused=True)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def assert_as_exact_as(theirs: dict, ours: dict, exact: dict, rows: int) -> None:
    assert ours.keys() == exact.keys()
    for name, true in exact.items():
        error, allowed = (ours[name] - true).norm(), 2 * (theirs[name] - true).norm()
        least = floor(ours[name].dtype, rows)
        assert error <= max(allowed, least * true.norm()), f"{name}: {error}, torch {allowed / 2}"


@parametrize_pairs(
    operator=OPERATORS,
    size=SIZES,
    dtype=DTYPES,
    biased=[False, True],
    replaces=[False, True],
    recompute=[False, True],
)
def test_as_exact_as_torch(operator, size, dtype, biased, replaces, recompute):
    if operator == "linear" and recompute:
        pytest.skip("has nothing to compute again")
    inputs = make_inputs(operator, size, dtype, biased)
    before = randn(*inputs["weight"].shape, seed=9)
    main_grad = torch.full_like(before, torch.nan) if replaces else before.clone()
    place = main_grad.data_ptr()
    ours = evaluate(operator, leaves_of(inputs, main_grad, replaces), recompute=recompute)
    assert ours["dweight"] is None
    assert main_grad.data_ptr() == place and main_grad.dtype == torch.float32
    theirs = evaluate(operator, leaves_of(inputs), plain=True)
    exact = evaluate(operator, leaves_of({name: x.double() for name, x in inputs.items()}), plain=True)
    for name in theirs.keys() - {"dweight"}:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
    ours["dweight"] = main_grad
    for results in (theirs, exact):
        results["dweight"] = results["dweight"] + (0 if replaces else before)
    assert_as_exact_as(theirs, ours, exact, size[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_without_a_buffer_autograd_has_the_gradient(operator, dtype, recompute):
    inputs = make_inputs(operator, (63, 40, 24), dtype)
    # Where nothing is collected a bias is as torch.nn.functional.linear takes it.
    inputs["bias"] = inputs["bias"].to(dtype)
    ours = evaluate(operator, leaves_of(inputs), recompute=recompute)
    theirs = evaluate(operator, leaves_of(inputs), plain=True)
    exact = evaluate(operator, leaves_of({name: x.double() for name, x in inputs.items()}), plain=True)
    assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in theirs.items()}
    assert_as_exact_as(theirs, ours, exact, 63)
    if operator == "linear":
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_first_microbatch_replaces_and_the_others_are_added(operator, recompute):
    inputs = make_inputs(operator, (63, 40, 24), torch.float16)
    main_grad = torch.full((24, 40), torch.nan, device=DEVICE)
    leaves, alone = leaves_of(inputs, main_grad), torch.empty(24, 40, device=DEVICE)
    evaluate(operator, leaves_of(inputs, alone, replaces=True))
    for count in range(1, 4):
        leaves["weight"].replaces_main_grad = count == 1
        # What is computed again takes the input's place.
        step = {name: leaf if name == "weight" else leaf.detach().clone() for name, leaf in leaves.items()}
        evaluate(operator, {name: leaf.requires_grad_() for name, leaf in step.items()}, recompute=recompute)
        # Sums of float32, which a product may begin with what is there.
        assert (main_grad - count * alone).norm() <= 1e-6 * count * alone.norm()


@pytest.mark.parametrize("operator", ["geglu", "add_layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_computed_again_is_what_was_saved(operator, dtype):
    inputs, collected, results = make_inputs(operator, (100, 96, 40), dtype), [], []
    for recompute in (False, True):
        collected.append(torch.full((40, 96), torch.nan, device=DEVICE))
        results.append(evaluate(operator, leaves_of(inputs, collected[-1], True), recompute=recompute))
    saved, again = (found | {"dweight": main_grad} for found, main_grad in zip(results, collected, strict=True))
    for name, tensor in saved.items():
        if name.startswith("output"):
            assert torch.equal(again[name], tensor)
        # The backward kernel has other tiles, and so may add in another order.
        eps = torch.finfo(dtype if name == "dweight" else tensor.dtype).eps
        assert (again[name] - tensor).norm() <= 4 * eps * tensor.norm(), name


def test_a_second_backward_pass_after_geglu_is_computed_again_raises():
    leaves = leaves_of(make_inputs("geglu", (63, 40, 24), torch.float32), torch.zeros(24, 40, device=DEVICE))
    (z,) = call("geglu", {**leaves, "x": leaves["x"] * 1.0}, recompute=True)
    z.sum().backward(retain_graph=True)
    before = leaves["weight"].main_grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    assert torch.equal(leaves["weight"].main_grad, before)


@pytest.mark.parametrize(
    ("width", "approximate", "message"),
    [(80, "sigmoid", r"geglu: approximate is 'sigmoid', expected"), (81, "none", r"geglu: x has shape \(3, 81\)")],
)
def test_what_geglu_refuses_is_refused_before_its_product(width, approximate, message):
    u, weight = torch.zeros(3, width, device=DEVICE), torch.zeros(24, 40, device=DEVICE, requires_grad=True)
    weight.main_grad = torch.zeros(24, 40, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        geglu_linear(u, weight, None, approximate)


@pytest.mark.parametrize(("operator", "recompute"), [("linear", False), ("geglu", False), ("add_layer_norm", True)])
def test_a_second_backward_pass_adds_once_more(operator, recompute):
    inputs = make_inputs(operator, (63, 40, 24), torch.float32)
    leaves = leaves_of(inputs, torch.zeros(24, 40, device=DEVICE))
    outputs = call(operator, leaves, recompute=recompute)
    torch.autograd.grad(outputs, leaves["x"], random_grads(outputs), retain_graph=True)
    once = leaves["weight"].main_grad.clone()
    assert once.any()
    torch.autograd.grad(outputs, leaves["x"], random_grads(outputs))
    assert (leaves["weight"].main_grad - 2 * once).norm() <= 1e-6 * once.norm()


@pytest.mark.parametrize("arriving", [0, 1])
def test_each_output_of_the_norm_may_be_the_only_one_used(arriving):
    inputs = make_inputs("add_layer_norm", (63, 40, 24), torch.float32)
    results = []
    for plain in (False, True):
        leaves = leaves_of(inputs, None if plain else torch.zeros(24, 40, device=DEVICE))
        output = call("add_layer_norm", leaves, plain)[arriving]
        names = [name for name in leaves if name != "weight"]
        found = torch.autograd.grad(output.sum(), [leaves[name] for name in names], allow_unused=True)
        results.append(dict(zip(names, found, strict=True)))
        if not plain:
            assert leaves["weight"].main_grad.any() == (arriving == 0)
    for name, gradient in results[1].items():
        if gradient is None:
            assert results[0][name] is None
        else:
            assert (results[0][name] - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_with_gaps(operator, recompute):
    inputs = make_inputs(operator, (63, 40, 24), torch.float32)
    results = []
    for gaps in (False, True):
        main_grad = torch.full((24, 40), torch.nan, device=DEVICE)
        leaves = leaves_of(inputs, main_grad, replaces=True)
        rows = {name: leaves[name] * 1.0 for name in ("x", "residual") if name in leaves}
        used = leaves | {name: row.repeat_interleave(2, 1)[:, ::2] if gaps else row for name, row in rows.items()}
        outputs = call(operator, used, recompute=recompute)
        grads = random_grads(outputs)
        if gaps:
            assert not any(used[name].is_contiguous() for name in rows)
            grads = [grad.repeat_interleave(2, 1)[:, ::2] for grad in grads]
        wanted = [leaf for name, leaf in leaves.items() if name != "weight"]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, grads), main_grad])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


# Where the gradient does not go to the buffer


def assert_plain(leaves: dict, outputs) -> None:
    """Autograd has the weight's gradient, and the buffer is as it was."""
    (gradient,) = torch.autograd.grad(outputs, leaves["weight"], random_grads(outputs))
    assert gradient.shape == leaves["weight"].shape and gradient.any()
    assert (leaves["weight"].main_grad == 7).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_products_of_another_dtype_than_the_weights(operator, recompute):
    inputs = make_inputs(operator, (63, 40, 24), torch.float32)
    leaves = leaves_of(inputs, torch.full((24, 40), 7.0, device=DEVICE))
    narrow = {name: leaves[name].bfloat16() for name in ("x", "residual") if name in leaves}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = call(operator, leaves | narrow, recompute=recompute)
    assert outputs[0].dtype == torch.bfloat16
    assert_plain(leaves, outputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_of_three_dimensions(operator, recompute):
    inputs = make_inputs(operator, (60, 40, 24), torch.float32)
    leaves = leaves_of(inputs, torch.full((24, 40), 7.0, device=DEVICE))
    deep = {name: leaves[name].view(4, 15, -1) for name in ("x", "residual") if name in leaves}
    outputs = call(operator, leaves | deep, recompute=recompute)
    assert outputs[0].shape == (4, 15, 24)
    flat = call(operator, leaves_of(inputs), plain=True)
    assert (outputs[0].view(60, 24) - flat[0]).norm() <= 1e-5 * flat[0].norm()
    assert_plain(leaves, outputs)


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_autograd_nothing_is_collected(operator):
    inputs = make_inputs(operator, (63, 40, 24), torch.float32)
    leaves = leaves_of(inputs, torch.full((24, 40), 7.0, device=DEVICE))
    with_graph = call(operator, leaves)
    with torch.no_grad():
        outputs = call(operator, leaves, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs, with_graph, strict=True))
    assert not any(y.requires_grad for y in outputs)
    assert (leaves["weight"].main_grad == 7).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operator", ["geglu", "add_layer_norm"])
def test_references_collect_as_well(operator, recompute, reference):
    inputs = make_inputs(operator, (63, 40, 24), torch.float32)
    main_grad = torch.full((24, 40), torch.nan, device=DEVICE)
    ours = evaluate(operator, leaves_of(inputs, main_grad, replaces=True), recompute=recompute)
    theirs = evaluate(operator, leaves_of(inputs), plain=True)
    assert ours.pop("dweight") is None
    assert (main_grad - theirs.pop("dweight")).norm() <= 1e-6 * main_grad.norm()
    assert all((ours[name] - theirs[name]).norm() <= 1e-6 * theirs[name].norm() for name in theirs)


# Products


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_products_are_added_in_float32(dtype, first):
    left, right = randn(24, 500, dtype=dtype), randn(500, 40, dtype=dtype, seed=1)
    # Sums that 16 bits would not hold.
    left += 300
    before = randn(24, 40, seed=2)
    total = torch.full_like(before, torch.nan) if first else before.clone()
    total = total.double() if dtype == torch.float64 else total
    add_product(total, left, right, first)
    exact = left.double() @ right.double() + (0 if first else before)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # 500 terms add up with errors of float32 that grow with the root of their number, beside sums that cancel.
    terms = (left.double().square() @ right.double().square()).sqrt()
    assert ((total - exact).abs() <= 500**0.5 * 2**-23 * (terms + 1)).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_every_time(operator, recompute):
    inputs, results = make_inputs(operator, (100, 96, 40), torch.float16), []
    for _ in range(RUNS):
        main_grad = torch.full((40, 96), torch.nan, device=DEVICE)
        found = evaluate(operator, leaves_of(inputs, main_grad, replaces=True), recompute=recompute)
        results.append(found | {"dweight": main_grad})
    assert all(torch.equal(found[name], results[0][name]) for found in results for name in found)


@needs_gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_computed_again_is_not_saved(operator):
    inputs = make_inputs(operator, (4096, 768, 768), torch.bfloat16)
    held = []
    for recompute in (False, True):
        leaves = leaves_of(inputs, torch.zeros(768, 768, device=DEVICE))
        before = torch.cuda.memory_allocated()
        outputs = call(operator, leaves, recompute=recompute)
        held.append(torch.cuda.memory_allocated() - before)
        del outputs
    saved = 0 if operator == "linear" else 2 * 4096 * 768
    assert held[0] - held[1] == saved
