"""The Triton operators against PyTorch: native on a GPU, interpreted without one.

The rule: against the reference in fp64, an operator's error is at most twice that of the reference in the same dtype,
in relative L2, for every output and every gradient. All memory that an operator allocates is NaN before it is written.

Shapes: T tokens, C hidden size, I intermediate size, V vocabulary.
"""

import functools
import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import EMBED_FILE
from pairs import parametrize_pairs
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.config import PRESETS
from cramfast.kernels import (
    add_layer_norm,
    add_layer_norm_reference,
    choose,
    embed,
    embed_reference,
    geglu,
    geglu_reference,
    gelu,
    gelu_reference,
    layer_norm,
    layer_norm_reference,
    mask_tokens,
    mlm_loss,
    mlm_loss_reference,
)
from cramfast.layers import FusedAddLayerNorm, FusedGEGLU, FusedGELU, FusedLayerNorm
from cramfast.model import Bert

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter takes seconds for the large ones; there each T and each C comes up once.
SIZES = (
    tuple(itertools.product((1, 63, 100, 1000), (64, 96, 768, 1000, 1024), DTYPES))
    if NATIVE
    else (
        (1000, 64, torch.float32),
        (100, 96, torch.float16),
        (63, 768, torch.bfloat16),
        (1, 1000, torch.float16),
        (1, 1024, torch.bfloat16),
    )
)
CHUNK = EMBED_FILE._CHUNK
PIECES = EMBED_FILE.join_launch(64, torch.float32, torch.int16).constants["CHUNKS"]
RUNS, *RUN_SIZE = (20, 1000, 768) if NATIVE else (2, 40, 96)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def floating(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def evaluate(function, inputs, grads, **options):
    """The outputs of function(*inputs), then the gradients of its floating inputs, given those of the outputs.

    grads: one for each output, None where none arrives. An input that none reaches has the gradient None.
    """
    inputs = [x.detach().requires_grad_() if floating(x) else x for x in inputs]
    outputs = as_tuple(function(*inputs, **options))
    arriving = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
    ends, grads = zip(*arriving, strict=True)
    found = torch.autograd.grad(ends, [x for x in inputs if floating(x)], grads, allow_unused=True)
    return [*(y.detach() for y in outputs), *found]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def widened(values):
    return [x.double() if floating(x) else x for x in values]


def assert_as_exact_as_torch(name, inputs, grads=None, **options):
    """The rule, for one call. grads: those of the outputs, random ones unless given."""
    function, reference = PAIRS[name]
    if grads is None:
        grads = random_grads(reference(*inputs, **options))
    ours = evaluate(function, inputs, grads, **options)
    theirs = evaluate(reference, inputs, grads, **options)
    wide = {key: torch.float64 if isinstance(value, torch.dtype) else value for key, value in options.items()}
    exact = evaluate(reference, widened(inputs), widened(grads), **wide)
    rows = ours[0].shape[:-1].numel()
    for place, (our, their, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        if their is None:
            assert our is None
            continue
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        error, allowed = (our - true).norm(), 2 * (their - true).norm()
        # A loss has the errors of its terms, which may happen to cancel in torch's.
        least = floor(our.dtype if our.dim() else inputs[0].dtype, rows)
        assert error <= max(allowed, least * true.norm()), f"result {place}: {error}, torch {allowed / 2}"


def floor(dtype, rows):
    """The relative error that is never too much, however little torch's happens to be.

    One rounding costs up to eps/2, over many elements eps/5. In fp32 the steps before it round as well; what those of
    a row's mean and deviation cost, about eps, is on the whole row and averages out over rows only.
    """
    eps = torch.finfo(dtype).eps
    return max(eps / 4, eps * max(1, rows) ** -0.5) if dtype == torch.float32 else eps / 4


def random_grads(outputs):
    return [randn(*y.shape, dtype=y.dtype, seed=20 + i) for i, y in enumerate(as_tuple(outputs))]


def embed_in_order(function):
    """embed with all tensors by position, so that it can be called as the others are."""

    def call(input_ids, weight, norm_weight, norm_bias=None, ids=None, table=None, scale=None, **options):
        positions = {"position_ids": ids, "position_weight": table, "position_scale": scale}
        return function(input_ids, weight, norm_weight, norm_bias, **positions, **options)

    return call


PAIRS = {
    "layer_norm": (layer_norm, layer_norm_reference),
    "add_layer_norm": (add_layer_norm, add_layer_norm_reference),
    "gelu": (gelu, gelu_reference),
    "geglu": (geglu, geglu_reference),
    "embed": (embed_in_order(embed), embed_in_order(embed_reference)),
    "mlm_loss": (mlm_loss, mlm_loss_reference),
}
NORMS = ("layer_norm", "add_layer_norm")
VOCABULARY, PLACES = 50, 20


def norm_parameters(width, dtype, bias=True):
    return [1 + randn(width, dtype=dtype, seed=10), randn(width, dtype=dtype, seed=11) if bias else None]


def token_ids(total, vocabulary=VOCABULARY):
    """Every fifth token is the same one, like a mask token, the last row of the table is used and some are not."""
    ids = torch.arange(total, device=DEVICE) * 7 % vocabulary // 2 * 2 + 1
    ids[::5] = 4
    return ids


def arguments(name, total, width, dtype=torch.float32, parameters=None, bias=True):
    """(inputs, options) for an operator on `total` rows of `width`; parameters: their dtype, `dtype` unless given."""
    parameters = parameters or dtype
    rows = [randn(total, width * (2 if name == "geglu" else 1), dtype=dtype, seed=i) for i in range(2)]
    if name == "embed":
        tables = [randn(size, width, dtype=parameters, seed=i) for i, size in enumerate((VOCABULARY, PLACES))]
        places = torch.arange(total, device=DEVICE) % PLACES
        return [token_ids(total), tables[0], *norm_parameters(width, parameters, bias), places, tables[1]], {
            "dtype": dtype
        }
    if name == "mlm_loss":
        weight, bias = (
            randn(VOCABULARY, width, dtype=parameters, seed=1) / width**0.5,
            randn(VOCABULARY) if bias else None,
        )
        positions = torch.arange(total - 1, -1, -1, device=DEVICE) // 2
        labels = torch.where(positions % 5 == 3, -100, token_ids(total))
        return [rows[0], weight, labels, positions, None if bias is None else bias.to(parameters)], {}
    if name in NORMS:
        return [*rows[: 1 + NORMS.index(name)], *norm_parameters(width, parameters, bias)], {}
    return [3 * rows[0]], {}


def test_uninitialised_memory_is_poisoned():
    x = torch.ones(3, device=DEVICE)
    for fresh in (torch.empty(7, device=DEVICE), torch.empty_like(x), x.new_empty((2, 3)), x.bfloat16().new_empty(5)):
        assert fresh.isnan().all()


@pytest.mark.parametrize("name", PAIRS)
def test_the_kernels_are_what_runs_here(name):
    assert {choose(name, DEVICE, dtype).backend for dtype in DTYPES} == {"triton"}


# Interpreted, embed meets enough tokens where one of them comes over and over.
@pytest.mark.parametrize(
    ("name", "total", "width", "dtype"),
    [
        (name, *size)
        for name in ("layer_norm", "add_layer_norm", "embed")
        for size in SIZES
        if NATIVE or name != "embed" or size[0] < 1000
    ],
)
def test_norms_of_every_size(name, total, width, dtype):
    inputs, options = arguments(name, total, width, dtype, torch.float32)
    assert_as_exact_as_torch(name, inputs, **options)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("total", "width", "dtype"), SIZES)
@pytest.mark.parametrize("name", ["gelu", "geglu"])
def test_activations_of_every_size(name, total, width, dtype, approximate):
    inputs, _ = arguments(name, total, width, dtype)
    assert_as_exact_as_torch(name, inputs, approximate=approximate)


# The largest numbers make terms infinite, but not the result.
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gelu_of_every_number(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype)
    x = x[x.isfinite()]
    true = 0.5 * x.double() * torch.erfc(x.double() * -(0.5**0.5))
    finfo = torch.finfo(dtype)
    # One rounding, of a product whose factor is right to 3e-5 and some roundings in fp32, or below 1e-15 beyond -8. The
    # rounding of fp16 is coarser near zero.
    allowed = (finfo.eps / 2 + 3.2e-5) * true.abs() + 1e-14 + finfo.smallest_normal * finfo.eps / 2
    wrong = ~((gelu(x) - true).abs() <= allowed)
    assert not wrong.any(), x[wrong]


@parametrize_pairs(name=["layer_norm", "add_layer_norm", "embed"], dtype=DTYPES, bias=[True, False])
def test_parameters_in_the_dtype_of_the_rows(name, dtype, bias):
    inputs, options = arguments(name, 63, 96, dtype, bias=bias)
    assert_as_exact_as_torch(name, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "embed"])
def test_fp32_parameters_without_bias(name, dtype):
    inputs, options = arguments(name, 63, 96, dtype, torch.float32, bias=False)
    assert_as_exact_as_torch(name, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrives", [(True, False), (False, True)])
def test_add_layer_norm_with_a_gradient_of_one_output(arrives, dtype):
    inputs, _ = arguments("add_layer_norm", 63, 96, dtype, torch.float32)
    grads = [grad if there else None for grad, there in zip(random_grads((inputs[0],) * 2), arrives, strict=True)]
    assert_as_exact_as_torch("add_layer_norm", inputs, grads)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "embed"])
def test_eps_is_added_to_the_variance(name, eps):
    inputs, options = arguments(name, 9, 96)
    # Rows with a variance of about 1e-4, or 2e-4 where two are added.
    inputs = [0.01 * x if floating(x) and x.dim() == 2 else x for x in inputs]
    assert_as_exact_as_torch(name, inputs, eps=eps, **options)


@pytest.mark.parametrize("name", NORMS)
def test_a_mean_far_from_zero_costs_no_digits(name):
    inputs, _ = arguments(name, 63, 96)
    inputs[0] = inputs[0] + 100
    assert_as_exact_as_torch(name, inputs)


@pytest.mark.parametrize("name", NORMS)
def test_rows_of_one_element(name):
    (*rows, weight, bias), _ = arguments(name, 9, 1)
    y_grad, *s_grad = random_grads(tuple(rows))
    y, *others = evaluate(PAIRS[name][0], [*rows, weight, bias], [y_grad, *s_grad])
    assert torch.equal(y, bias.expand_as(y))
    *row_grads, weight_grad, bias_grad = others[len(s_grad) :]
    # A row equals its mean, so its gradient is the difference of two equal products: nothing but a rounding of them.
    rounding = torch.finfo(torch.float32).eps * (y_grad * weight).abs() * 1e-5**-0.5
    for row_grad in row_grads:
        assert ((row_grad - sum(s_grad)).abs() <= rounding).all()
    assert not weight_grad.any()
    torch.testing.assert_close(bias_grad, y_grad.sum(0))


@pytest.mark.parametrize("shape", [(96,), (3, 5, 96), (2, 1, 4, 96)])
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "gelu", "geglu"])
def test_any_leading_shape(name, shape):
    inputs, _ = arguments(name, 60, 96)
    rows = torch.Size(shape[:-1]).numel()
    inputs = [x[:rows].reshape(*shape[:-1], -1) if x.dim() == 2 else x for x in inputs]
    assert_as_exact_as_torch(name, inputs)


@pytest.mark.parametrize("width", [96, 768])
@pytest.mark.parametrize("name", PAIRS)
def test_no_rows(name, width):
    inputs, options = arguments(name, 0, width)
    assert_as_exact_as_torch(name, inputs, **options)


@pytest.mark.parametrize("shape", [(0,), (5, 0)])
def test_gelu_of_no_columns(shape):
    x = randn(*shape)
    assert_as_exact_as_torch("gelu", [x])


def laid_out(x, layout):
    """x in memory of another layout."""
    if layout == "shifted":  # contiguous, but no vector load may start here
        return x.new_zeros(x.numel() + 1)[1:].view_as(x).copy_(x)
    if x.dim() == 0:
        return x
    if layout == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    spacious = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    return (spacious[..., 1::2] if layout == "strided" else spacious[..., 1 : x.shape[-1] + 1]).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES if NATIVE else DTYPES[1:2])
@pytest.mark.parametrize("layout", ["shifted", "transposed", "strided", "sliced"])
@pytest.mark.parametrize("name", PAIRS)
def test_any_layout_of_inputs_and_gradients(name, layout, dtype):
    inputs, options = arguments(name, 9, 96, dtype)
    grads = random_grads(PAIRS[name][1](*inputs, **options))
    inputs, grads = ([laid_out(x, layout) for x in tensors] for tensors in (inputs, grads))
    assert_as_exact_as_torch(name, inputs, grads, **options)


@pytest.mark.parametrize("name", PAIRS)
def test_one_number_expanded_to_a_gradient(name):
    inputs, options = arguments(name, 9, 96)
    outputs = as_tuple(PAIRS[name][1](*inputs, **options))
    assert_as_exact_as_torch(name, inputs, [torch.ones((), device=DEVICE).expand_as(y) for y in outputs], **options)


@pytest.mark.parametrize(
    ("vocabulary", "indices", "places"),
    [
        (1, torch.int64, torch.int32),
        (VOCABULARY, torch.int32, None),
        (2**15, torch.int32, torch.int64),
        (2**15 + 1, torch.int64, None),
    ],
)
def test_embed_with_other_tables(vocabulary, indices, places):
    (_, _, *norm, position_ids, position_weight), _ = arguments("embed", 40, 64)
    inputs = [token_ids(40, vocabulary).clamp(max=vocabulary - 1).to(indices), randn(vocabulary, 64), *norm]
    if places is not None:
        inputs += [position_ids.to(places), position_weight]
    assert_as_exact_as_torch("embed", inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", [1, CHUNK + 1, 2 * CHUNK + 3])
def test_embed_with_a_scale_of_fixed_places(total, dtype):
    inputs, options = arguments("embed", total, 96, dtype, parameters=torch.float32)
    scale, grads = randn(1, seed=12), [randn(total, 96, dtype=dtype, seed=20)]
    assert_as_exact_as_torch("embed", inputs, grads, scale=scale, **options)
    *_, found = evaluate(PAIRS["embed"][0], [*inputs, scale], grads, **options)
    # Without a scale the places have gradients, whose products with them are its gradient's terms.
    *scaled, table = widened([*inputs[:-1], inputs[-1] * scale])
    *_, places = evaluate(PAIRS["embed"][1], [*scaled, table], widened(grads), dtype=torch.float64)
    terms = places * inputs[-1]
    assert found.shape == (1,)
    assert (found - terms.sum()).abs() <= torch.finfo(torch.float32).eps * terms.abs().sum()


# Around the chunk that a group of warps walks over, and with more pieces than are added up at once.
@pytest.mark.parametrize("total", [1, CHUNK, CHUNK + 1, 2 * CHUNK, (PIECES + 2) * CHUNK + 3])
def test_embed_of_one_token_over_and_over(total):
    (_, *others), options = arguments("embed", total, 64)
    assert_as_exact_as_torch("embed", [torch.full((total,), 7, device=DEVICE), *others], **options)


@pytest.mark.parametrize("stray", [-1, VOCABULARY, 2**31 - 1])
@pytest.mark.parametrize("which", [0, 4])
def test_an_index_outside_its_table_spoils_its_own_token(which, stray):
    inputs, options = arguments("embed", 63, 64)
    expected = PAIRS["embed"][1](*inputs, **options)
    inputs[which] = inputs[which].clone()
    inputs[which][17] = stray
    y = PAIRS["embed"][0](*inputs, **options)
    assert y[17].isnan().all()
    expected[17] = y[17] = 0
    # Rounding of the statistics, the quotient and the sum, in rows of which some are longer than others.
    assert (y - expected).norm() <= 5 * torch.finfo(torch.float32).eps * expected.norm()


# Row 0 is unused; the last one is 0 in 16 bits.
@pytest.mark.parametrize("stray", [-1, VOCABULARY, 2**16])
def test_a_token_outside_the_table_adds_nothing_to_its_gradient(stray):
    (ids, *others, places, place_table), _ = arguments("embed", 63, 64)
    grad, keep = randn(63, 64, seed=20), torch.arange(63, device=DEVICE) != 17
    expected = evaluate(PAIRS["embed"][1], [ids[keep], *others, places[keep], place_table], [grad[keep]])[1]
    strayed = torch.where(keep, ids, stray)
    found = evaluate(PAIRS["embed"][0], [strayed, *others, places, place_table], [grad])[1]
    # Rows of the gradient round some five times, and their sums of up to 13 tokens about sqrt(13) times more.
    assert (found - expected).norm() <= 9 * torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_bits_every_time(name, dtype):
    inputs, options = arguments(name, *RUN_SIZE, dtype, torch.float32)
    grads = random_grads(PAIRS[name][1](*inputs, **options))
    first, *others = (evaluate(PAIRS[name][0], inputs, grads, **options) for _ in range(RUNS))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", PAIRS)
def test_a_second_derivative_is_refused(name):
    inputs, options = arguments(name, 9, 96)
    inputs = [x.requires_grad_() if floating(x) else x for x in inputs]
    outputs = as_tuple(PAIRS[name][0](*inputs, **options))
    leaves = [x for x in inputs if floating(x)]
    with pytest.raises(RuntimeError, match=f"{name}: .* differentiated twice"):
        torch.autograd.grad(outputs, leaves, random_grads(outputs), create_graph=True)


@pytest.mark.parametrize("name", PAIRS)
def test_without_gradients_the_outputs_are_the_same(name):
    inputs, options = arguments(name, 9, 96)
    inputs = [x.requires_grad_() if floating(x) else x for x in inputs]
    tracked = as_tuple(PAIRS[name][0](*inputs, **options))
    with torch.no_grad():
        plain = as_tuple(PAIRS[name][0](*inputs, **options))
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))
    assert all(y.requires_grad for y in tracked) and not any(y.requires_grad for y in plain)


REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cramfast::"))


@functools.cache
def calls_of() -> dict[str, list[tuple]]:
    """Arguments for every operator of torch.ops.cramfast, which take seconds: some are results of other operators."""
    found = defaultdict(list)
    for name, call in registered_calls():
        found[name].append(call)
    return found


def registered_calls():
    """The name of an operator and arguments, one pair after the other."""
    x, other, packed = randn(9, 96), randn(9, 96, seed=1), randn(9, 192)
    for bias, recompute in ((True, False), (False, True)):
        (ids, table, weight, b, places, place_table), _ = arguments("embed", 9, 96, bias=bias)
        yield "layer_norm", (x, weight, b, 1e-5)
        yield "add_layer_norm", (x, other, weight, b, 1e-5)
        _, statistics = torch.ops.cramfast.layer_norm(x, weight, b, 1e-5)
        yield "layer_norm_backward", (other, None if recompute else x, x, weight, b, statistics, recompute)
        positions = (places, place_table) if bias else (None, None)
        for scale in (None, randn(1))[: 1 + bias]:
            yield "embed", (table, ids, weight, b, *positions, scale, 1e-5, torch.bfloat16)
            _, statistics = torch.ops.cramfast.embed(table, ids, weight, b, *positions, scale, 1e-5, torch.float32)
            yield "embed_backward", (x, table, ids, weight, b, *positions, scale, statistics)
    for approximate in ("none", "tanh"):
        yield "gelu", (x, approximate)
        yield "gelu_backward", (other, x, approximate)
        yield "geglu", (packed, approximate)
        for activation in (False, True):
            yield "geglu_backward", (x, packed, approximate, activation)
    yield from mask_calls()
    yield from attention_calls()
    yield from loss_calls()


def loss_calls():
    for bias, (memory, *asked) in itertools.product((True, False), LOSS_GRADIENTS):
        (hidden, weight, labels, positions, b), _ = arguments("mlm_loss", 9, 96, torch.float16, torch.float32, bias)
        positions = positions if bias else None
        asked[2] = asked[2] and bias
        tail = (0.1, 0.1, memory, *asked)
        yield "mlm_loss", (hidden, weight, labels, positions, b, -100, *tail)
        loss, *results, inverse = torch.ops.cramfast.mlm_loss(hidden, weight, labels, positions, b, -100, *tail)
        *gradients, targets, statistics = results
        inputs = (hidden, weight, b, positions)
        yield "mlm_loss_backward", (loss, *gradients, *inputs, targets, statistics, inverse, *tail)
        yield "mlm_scores", (hidden, weight, labels, positions, b, -100)


# memory, and which of hidden, weight and bias have gradients
LOSS_GRADIENTS = (("fast", True, True, True), ("low", True, True, True), ("fast", False, True, False))


def mask_calls():
    ids, cu_seqlens = token_ids(100), torch.tensor([0, 17, 17, 100], dtype=torch.int32, device=DEVICE)
    step, continues = torch.tensor([7], device=DEVICE), torch.arange(VOCABULARY, device=DEVICE) % 3 == 0
    for options in ((None, None), (step, continues)):
        yield "mask_tokens", (ids, cu_seqlens, *options, 25, 7, 0, 4, 5, VOCABULARY, 2**31, 2**32)


def attention_calls():
    qkv, dout = randn(12, 3, 2, 32, dtype=torch.float16), randn(12, 2, 32, seed=1, dtype=torch.float16)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    yield "group_sequences", (cu_seqlens, 12, 7, 64)
    for window in (-1, 3):
        yield "pack_sequences", (cu_seqlens, 12, 64, window)
    groups, bounds = torch.ops.cramfast.group_sequences(cu_seqlens, 12, 7, 64)
    cos, sin = randn(7, 16), randn(7, 16, seed=1)
    yield "token_angles", (cos, sin, bounds, 12)
    yield "token_angles", (cos, sin, None, 7)
    yield "tile_angles", (cos, sin, 64)
    for back in (False, True):
        yield "turn_packed", (qkv, torch.ops.cramfast.token_angles(cos, sin, bounds, 12), back)
    seed = torch.tensor([7], device=DEVICE)
    for tile in (64, 0):
        angles = torch.ops.cramfast.token_angles(cos, sin, None if tile else bounds, tile or 12)
        for options in ((angles, None, tile, 7, 0.2, -1, 0.0), (None, seed, tile, 7, 0.2, 3, 0.5)):
            yield "varlen_attention", (qkv, groups, bounds, *options)
            out, lse, turned = torch.ops.cramfast.varlen_attention(qkv, groups, bounds, *options)
            source = turned if turned.numel() else qkv
            yield "varlen_attention_backward", (dout, source, out, lse, groups, bounds, *options)

    yield "orthogonalise", (randn(2, 40, 24), 5, torch.float32)


# What of an operator's arguments has a gradient, where that is not every floating one.
DIFFERENTIABLE = {"varlen_attention": 1, "turn_packed": 1}
DIFFERENTIABLE |= dict.fromkeys(("group_sequences", "pack_sequences", "token_angles", "tile_angles"), 0)
DIFFERENTIABLE |= dict.fromkeys(("mlm_scores", "orthogonalise"), 0)


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_operators_keep_the_rules_of_torch(name):
    name = name.removeprefix("cramfast::")
    calls = calls_of()[name]
    assert calls
    for call in calls:
        if not name.endswith("_backward"):
            last = DIFFERENTIABLE.get(name, len(call))
            call = [x.detach().requires_grad_() if floating(x) and i < last else x for i, x in enumerate(call)]
        results = torch.library.opcheck(getattr(torch.ops.cramfast, name).default, call)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_norm_computed_again_is_the_first(bias, dtype):
    x, weight, b = randn(63, 96, dtype=dtype), *norm_parameters(96, dtype, bias)
    y, statistics = torch.ops.cramfast.layer_norm(x, weight, b, 1e-5)
    plain = torch.ops.cramfast.layer_norm_backward(x, None, x, weight, b, statistics, False)
    *gradients, again = torch.ops.cramfast.layer_norm_backward(x, None, x, weight, b, statistics, True)
    # The mean is rounded in between.
    assert (again - y).norm() <= torch.finfo(dtype).eps * y.norm()
    for gradient, other in zip(gradients, plain, strict=False):
        # The sums may be made in another order. Of 63 terms, each addition rounds by up to eps/2 in fp32, which adds up
        # like the root of their number; in a narrow dtype that may turn the last digit of the result.
        roundings = 63**0.5 / 2 if dtype == torch.float32 else 1
        assert (gradient - other).norm() <= roundings * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_activation_computed_again_is_the_first(approximate, dtype):
    x, dy = 3 * randn(63, 192, dtype=dtype), randn(63, 96, dtype=dtype)
    dx, again = torch.ops.cramfast.geglu_backward(dy, x, approximate, True)
    assert torch.equal(again, geglu(x, approximate))
    assert torch.equal(dx, torch.ops.cramfast.geglu_backward(dy, x, approximate, False)[0])


class Block(torch.nn.Module):
    """(x, residual) through one of each of the fused modules."""

    def __init__(self, hidden, intermediate):
        super().__init__()
        self.add_norm, self.norm = FusedAddLayerNorm(hidden), FusedLayerNorm(hidden, bias=False)
        self.up = torch.nn.Linear(hidden, 2 * intermediate)
        self.down = torch.nn.Linear(intermediate, hidden)
        self.geglu, self.gelu = FusedGEGLU("tanh"), FusedGELU()

    def forward(self, x, residual):
        y, s = self.add_norm(x, residual)
        return self.norm(self.gelu(self.down(self.geglu(self.up(y))))), s


def block_results(call, block, x, residual):
    """Outputs of call(x, residual), then the gradients of both and of block's parameters."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, residual)]
    outputs = call(*inputs)
    grads = torch.autograd.grad(outputs, [*inputs, *block.parameters()], [s.to(x.dtype) for s in random_grads(outputs)])
    return [*(y.detach() for y in outputs), *grads]


def test_a_block_compiles_whole_for_any_number_of_tokens(monkeypatch):
    torch.compiler.reset()
    torch.manual_seed(0)
    block = Block(96, 64).to(DEVICE)
    exact = Block(96, 64).to(DEVICE).double()
    exact.load_state_dict(block.state_dict())
    counted = CompileCounterWithBackend("inductor" if NATIVE else "aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counted)
    for total in (7, 20, 33, 64):
        x, residual = randn(total, 96), randn(total, 96, seed=1)
        ours, eager = block_results(compiled, block, x, residual), block_results(block, block, x, residual)
        with monkeypatch.context() as patch:
            patch.setenv("CRAMFAST_KERNELS", "reference")
            true = block_results(exact, exact, x.double(), residual.double())
        for our, plain, e in zip(ours, eager, true, strict=True):
            # Compiled, the matrix products stay and what is around them may only be added up in another order.
            assert (our - e).norm() <= 2 * (plain - e).norm()
    # One for the first number of tokens, one for all others.
    assert counted.frame_count == 2


@pytest.mark.parametrize("name", PAIRS)
def test_one_operator_compiles_whole(name):
    torch.compiler.reset()
    function, _ = PAIRS[name]
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    inputs, options = arguments(name, 9, 96)
    grads = random_grads(PAIRS[name][1](*inputs, **options))
    ours, eager = (evaluate(f, inputs, grads, **options) for f in (compiled, function))
    # The same kernels on the same numbers.
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


# The interpreter takes a second for a step of a model this small, on this few tokens.
TINY = PRESETS["cramfast-tiny"]
TINY = TINY if NATIVE else replace(TINY, vocab_size=97, hidden_size=64, intermediate_size=128, num_layers=1)
SEQUENCES, LENGTH = (32, 128) if NATIVE else (2, 8)


def fifty_losses(weights=torch.float32, products=torch.float32):
    """The losses of 50 steps on text with a period of 7, with weights and matrix products in these dtypes."""
    torch.manual_seed(0)
    model = Bert(TINY).to(DEVICE, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-12)
    cu_seqlens = torch.arange(0, SEQUENCES * LENGTH + 1, LENGTH, dtype=torch.int32, device=DEVICE)
    text = 5 + torch.arange(SEQUENCES * LENGTH, device=DEVICE) % 7 * 11
    losses = []
    for number in range(50):
        masked = mask_tokens(text, cu_seqlens, len(text) // 4, mask_id=4, ordinary=(5, 97), seed=0, step=number)
        ids, positions, labels = masked
        with torch.autocast(DEVICE.type, products, enabled=products != torch.float32):
            loss = model(ids, cu_seqlens, LENGTH, positions, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("products", [torch.float32, pytest.param(torch.bfloat16, marks=needs_gpu)])
def test_training_follows_the_curve_of_the_reference(products, monkeypatch):
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    ours = fifty_losses(products=products)
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")
    theirs, exact = fifty_losses(products=products), fifty_losses(torch.float64)
    assert exact[-1] < exact[0] - 1
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def accumulated(name, draws, graphed):
    """Gradients of the floating inputs for the sum over `draws` of other inputs, in buffers that outlive the passes."""
    inputs, options = arguments(name, 100, 96, torch.bfloat16, torch.float32)
    inputs = [x.requires_grad_() if floating(x) else x for x in inputs]
    leaves = [x for x in inputs if floating(x)]
    grads = random_grads(PAIRS[name][1](*inputs, **options))
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def accumulate():
        torch.autograd.backward(as_tuple(PAIRS[name][0](*inputs, **options)), grads)

    if graphed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles; a capture may not
            accumulate()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            accumulate()
        for leaf in leaves:
            leaf.grad.zero_()
        accumulate = graph.replay
    for seed in range(draws):
        with torch.no_grad():
            leaves[0].copy_(randn(*leaves[0].shape, dtype=leaves[0].dtype, seed=100 + seed))
        accumulate()
    return [leaf.grad.clone() for leaf in leaves]


@needs_gpu
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_accumulate_in_a_graph_as_they_do_in_eager_code(name):
    graphed, eager = accumulated(name, 5, graphed=True), accumulated(name, 5, graphed=False)
    assert all(torch.equal(g, e) for g, e in zip(graphed, eager, strict=True))
    assert all(g.any() for g in graphed)


@needs_gpu
@pytest.mark.parametrize("name", PAIRS)
def test_nothing_waits_for_the_device(name):
    inputs, options = arguments(name, 100, 96, torch.bfloat16, torch.float32)
    grads = random_grads(PAIRS[name][1](*inputs, **options))
    evaluate(PAIRS[name][0], inputs, grads, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = evaluate(PAIRS[name][0], inputs, grads, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in results)


@needs_gpu
@pytest.mark.parametrize("name", PAIRS)
def test_kernels_run_in_the_current_stream(name):
    inputs, options = arguments(name, 100, 96)
    grads = random_grads(PAIRS[name][1](*inputs, **options))
    expected = evaluate(PAIRS[name][0], inputs, grads, **options)
    late = [x.clone() if floating(x) else x for x in inputs]
    for x in late:
        if floating(x):
            x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which a kernel of another stream would read the zeros
        for x, value in zip(late, inputs, strict=True):
            if floating(x):
                x.copy_(value)
        results = evaluate(PAIRS[name][0], late, grads, **options)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


HUGE_ROWS = 2**21 + 5


def huge(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


@pytest.fixture
def much_memory():
    if torch.cuda.get_device_properties(DEVICE).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    yield
    torch.cuda.empty_cache()


@needs_gpu
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "gelu", "geglu"])
def test_more_elements_than_32_bits_count(name):
    width = 1024
    small, _ = arguments(name, 4, width // 2 if name == "geglu" else width, torch.bfloat16)
    inputs = [huge(HUGE_ROWS, width) if x is not None and x.dim() == 2 else x for x in small]
    assert inputs[0].numel() > 2**31
    outputs = 2 if name == "add_layer_norm" else 1
    grads = [huge(HUGE_ROWS, width // 2 if name == "geglu" else width) for _ in range(outputs)]
    rows = torch.tensor([0, 1, HUGE_ROWS // 2, HUGE_ROWS - 2, HUGE_ROWS - 1], device=DEVICE)

    def some(values):
        return [x[rows] if x is not None and x.dim() == 2 else x for x in values]

    # Gradients of parameters are sums over all rows, which the rows looked at here say nothing about.
    ours = some(evaluate(PAIRS[name][0], inputs, grads))
    theirs = evaluate(PAIRS[name][1], some(inputs), some(grads))
    exact = evaluate(PAIRS[name][1], widened(some(inputs)), widened(some(grads)))
    for our, their, true in zip(ours, theirs, exact, strict=True):
        if true.dim() == 2:
            allowed = max(2 * (their - true).norm(), floor(our.dtype, len(rows)) * true.norm())
            assert (our - true).norm() <= allowed


@needs_gpu
@pytest.mark.usefixtures("much_memory")
def test_embed_from_a_table_of_more_elements_than_32_bits_count():
    (_, _, *norm, _, _), _ = arguments("embed", 4, 1024, torch.bfloat16)
    table, ids = huge(HUGE_ROWS, 1024), token_ids(1000)
    ids[::3] = HUGE_ROWS - 1 - torch.arange(334, device=DEVICE) % 20
    used, local = ids.unique(return_inverse=True)
    grads = [huge(1000, 1024)]
    y, dtable, *others = evaluate(PAIRS["embed"][0], [ids, table, *norm], grads)
    expected = evaluate(PAIRS["embed"][0], [local, table[used], *norm], grads)
    # The same tokens in the same order, in a table without the rows that none uses.
    assert all(torch.equal(a, b) for a, b in zip([y, dtable[used], *others], expected, strict=True))
    dtable[used] = 0
    assert not dtable.any()


def test_a_scale_goes_with_places():
    (ids, table, *norm, places, place_table), _ = arguments("embed", 9, 64)
    with pytest.raises(ValueError, match="embed: position_scale is given without position_ids"):
        embed(ids, table, *norm, position_scale=randn(1))
    with pytest.raises(ValueError, match=r"embed: position_scale has shape \(2,\), expected \(1,\)"):
        embed(ids, table, *norm, position_ids=places, position_weight=place_table, position_scale=randn(2))
