"""The masked-language-modelling loss against its definition, in chunks small enough that a few rows make several.

The rule for gradients and row losses is that of test_operators.py: against fp64, at most twice the error of PyTorch in
the same dtype, in relative L2. Shapes: T tokens, M predictions, C hidden size, V vocabulary.
"""

import importlib
import re

import pytest
import torch
from pairs import parametrize_pairs
from test_operators import DEVICE, DTYPES, NATIVE, evaluate, floating, needs_gpu, randn, widened
from torch._dynamo.testing import CompileCounterWithBackend

from cramfast.kernels import mlm_loss, mlm_loss_reference, mlm_scores, mlm_scores_reference
from cramfast.layers import SparseMLMHead

# By its name in the package, `mlm_loss` is the function.
FILE = importlib.import_module("cramfast.kernels.mlm_loss")
COMMON = importlib.import_module("cramfast.kernels.mlm_loss_kernels")
LOGITS = importlib.import_module("cramfast.kernels.mlm_loss_logits")
pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus")

IGNORED = -100
MEMORY = ("fast", "low")
# Rows in a chunk, columns in a block.
SMALL = {"chunk": 24, "block": 64}
WIDTH = 96
SMALL_EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def small(monkeypatch):
    """Several chunks and blocks of what the tests have, and several tiles of a row."""

    def shrink(vocabulary, count, dtype):
        row, column = COMMON.row_stride(vocabulary) * dtype.itemsize, COMMON.block_column(count, WIDTH, dtype)
        sizes = FILE.Sizes(SMALL["chunk"] * row, SMALL["block"] * column)
        monkeypatch.setattr(FILE, "_SIZES", dict.fromkeys(MEMORY, sizes))

    monkeypatch.setattr(LOGITS, "_ROW_WARPS", 4)
    LOGITS.rows_launch.cache_clear()
    yield shrink
    LOGITS.rows_launch.cache_clear()


def problem(count, vocabulary, dtype, parameters=None, width=WIDTH, positions=True, bias=False, ignored=5):
    """(hidden, weight, labels, positions, bias): every `ignored`-th label does not count, two rows are of one token."""
    total = 2 * count + 3 if positions else count
    hidden = randn(total, width, dtype=dtype)
    weight = (2 * width**-0.5 * randn(vocabulary, width, seed=1)).to(parameters or dtype)
    labels = torch.arange(count, device=DEVICE) * 37 % vocabulary
    labels[::ignored] = IGNORED
    places = None
    if positions:
        places = torch.arange(count, device=DEVICE) * 2 + 1
        places[2:3] = 1
    return [hidden, weight, labels, places, randn(vocabulary, seed=2).to(parameters or dtype) if bias else None]


def assert_as_exact_as_torch(inputs, grad=1.0, **options):
    """Loss and gradients of one call."""
    plain = {key: value for key, value in options.items() if key != "memory"}
    grads = [torch.tensor(grad, device=DEVICE)]
    ours = evaluate(mlm_loss, inputs, grads, **options)
    theirs = evaluate(mlm_loss_reference, inputs, grads, **plain)
    exact = evaluate(mlm_loss_reference, widened(inputs), widened(grads), **plain)
    eps = torch.finfo(inputs[0].dtype).eps
    loss, their_loss, true_loss = (float(results[0]) for results in (ours, theirs, exact))
    # The mean of errors that may cancel in torch's, each about that of rounding logits of a size near the loss.
    # Logits in fp32 leave the rounding of the row's loss and of the mean.
    least = max(eps / 2, SMALL_EPS)
    assert abs(loss - true_loss) <= max(2 * abs(their_loss - true_loss), least * abs(true_loss))
    for our, their, true in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        # One rounding is never too much; in fp32 some sums come before it.
        least = torch.finfo(our.dtype).eps * (1 if our.dtype == torch.float32 else 0.25)
        error, allowed = (our - true).norm(), 2 * (their - true).norm()
        assert error <= max(allowed, least * true.norm()), f"{error}, torch {allowed / 2}"


@parametrize_pairs(
    sizes=[(0, 97), (1, 1000), (63, 97), (63, 1024), (100, 1000), (100, 1100)], dtype=DTYPES, memory=MEMORY
)
def test_as_exact_as_torch(small, sizes, dtype, memory):
    count, vocabulary = sizes
    small(vocabulary, count, dtype)
    assert_as_exact_as_torch(problem(count, vocabulary, dtype), memory=memory)


@parametrize_pairs(
    options=[{"z_loss": 0.01}, {"label_smoothing": 0.1}, {"z_loss": 1e-3, "label_smoothing": 1.0}],
    vocabulary=[97, 1100],
    dtype=DTYPES,
    memory=MEMORY,
)
def test_options(small, vocabulary, dtype, memory, options):
    small(vocabulary, 63, dtype)
    assert_as_exact_as_torch(problem(63, vocabulary, dtype, bias=True), memory=memory, **options)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_in_fp32_all_rows_and_a_bias(small, dtype, memory):
    small(300, 63, dtype)
    inputs = problem(63, 300, dtype, torch.float32, positions=False, bias=True)
    assert_as_exact_as_torch(inputs, memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("grad", [-0.37, 65536.0])
def test_what_arrives_multiplies_the_gradients(grad, memory):
    # Of a mean over 100 rows, a loss scale of 65,536 is well inside of float16.
    assert_as_exact_as_torch(problem(100, 97, torch.float16, bias=True), grad, memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
def test_small_gradients_survive_in_float16(memory):
    """Of a token so unlikely that its probability is no normal float16, under the usual loss scale."""
    hidden, weight, labels, positions, _ = problem(100, 97, torch.float16, ignored=200)
    labels = labels.clamp(max=95)
    bias = torch.zeros(97, device=DEVICE)
    bias[96] = -14.0
    inputs, grads = [hidden, weight, labels, positions, bias.half()], [torch.tensor(65536.0, device=DEVICE)]
    ours = evaluate(mlm_loss, inputs, grads, memory=memory)
    theirs = evaluate(mlm_loss_reference, inputs, grads)
    exact = evaluate(mlm_loss_reference, widened(inputs), widened(grads))
    for our, their, true in zip(ours[2:], theirs[2:], exact[2:], strict=True):
        our, their, true = our[96].double(), their[96].double(), true[96]
        assert (our - true).norm() <= max(2 * (their - true).norm(), 1e-3 * true.norm())
    assert all(result.isfinite().all() for result in ours)


@pytest.mark.parametrize("memory", MEMORY)
def test_float16_does_not_overflow_where_torch_does_not(memory):
    inputs = problem(63, 97, torch.float16)
    inputs[1] = 10 * inputs[1]
    ours = evaluate(mlm_loss, inputs, [torch.tensor(65536.0, device=DEVICE)], memory=memory)
    assert all(result.isfinite().all() for result in ours)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("count", [0, 7])
def test_without_a_label_everything_is_zero(count, memory):
    inputs = problem(count, 97, torch.float32, bias=True, ignored=1)
    loss, *gradients = evaluate(mlm_loss, inputs, [torch.tensor(2.0, device=DEVICE)], memory=memory)
    assert loss == 0
    assert len(gradients) == 3 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_rows_that_do_not_count_may_hold_anything(size, dtype, memory):
    inputs = problem(20, 97, dtype, positions=False)
    expected = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    inputs[0] = inputs[0].clone()
    inputs[0][::5] = size * inputs[0][::5].sign()
    found = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("order", ["the same", "scattered", "falling"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_repeated_positions_add_up(order, dtype):
    inputs = problem(63, 97, dtype)
    row = torch.arange(63, device=DEVICE)
    inputs[3] = {"the same": torch.full_like(row, 5), "scattered": row * 7 % 11, "falling": (62 - row) // 3}[order]
    assert_as_exact_as_torch(inputs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_either_index_dtype(index):
    inputs = problem(20, 97, torch.float32)
    inputs[2], inputs[3] = inputs[2].to(index), inputs[3].to(index)
    assert_as_exact_as_torch(inputs)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("which", "stray"), [(2, -1), (2, 97), (2, 2**31 - 1), (3, -1), (3, 10**6)])
def test_a_stray_label_or_position_does_not_count(which, stray, memory):
    inputs = problem(20, 97, torch.float32)
    ignoring = [*inputs[:2], inputs[2].clone(), *inputs[3:]]
    ignoring[2][7] = IGNORED
    inputs[which] = inputs[which].clone()
    inputs[which][7] = stray
    grads = [torch.tensor(1.0, device=DEVICE)]
    expected, found = (evaluate(mlm_loss, given, grads, memory=memory) for given in (ignoring, inputs))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_ignore_index_within_the_vocabulary():
    inputs = problem(20, 97, torch.float32)
    inputs[2] = torch.where(inputs[2] == IGNORED, 3, inputs[2])
    assert_as_exact_as_torch(inputs, ignore_index=3)


@parametrize_pairs(
    frozen=[(0,), (1,), (0, 1), (4,), (0, 4), (1, 4)], dtype=[torch.float16, torch.bfloat16], memory=MEMORY
)
def test_what_is_frozen_gets_no_gradient(frozen, dtype, memory):
    inputs = problem(20, 97, dtype, bias=True)
    expected = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)[1:]
    leaves = [x.detach().requires_grad_(i not in frozen) if floating(x) else x for i, x in enumerate(inputs)]
    mlm_loss(*leaves, memory=memory).backward()
    for place, gradient in zip((0, 1, 4), expected, strict=True):
        found = leaves[place].grad
        assert found is None if place in frozen else torch.equal(found, gradient)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_kept_for_a_second_pass_gives_the_same_again(dtype, memory):
    inputs = [x.requires_grad_() if floating(x) else x for x in problem(20, 97, dtype, bias=True)]
    loss, leaves = mlm_loss(*inputs, memory=memory), [x for x in inputs if floating(x)]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("call", [mlm_loss, mlm_scores])
def test_without_gradients_no_work_is_done_for_them(call, launched, monkeypatch):
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **options: products.append(given) or mm(*given, **options))
    inputs = [x.requires_grad_() if floating(x) else x for x in problem(20, 97, torch.float32, bias=True)]
    with torch.no_grad():
        call(*inputs)
    names = ["targets_kernel", "gather_kernel", "rows_kernel", "mean_kernel"]
    assert [name for name, _ in launched] == names[: 4 if call is mlm_loss else 3]
    assert not launched[2][1]["GRADIENT"]
    assert len(products) == 1


@parametrize_pairs(sizes=[(0, 97), (100, 97), (63, 1100)], dtype=DTYPES, bias=[True, False])
def test_scores(small, sizes, dtype, bias):
    count, vocabulary = sizes
    small(vocabulary, count, dtype)
    inputs = problem(count, vocabulary, dtype, bias=bias)
    exact, correct = mlm_scores_reference(*widened(inputs))
    inputs[2] = torch.where(torch.arange(count, device=DEVICE) % 3 == 1, guesses(inputs), inputs[2])
    exact, correct = mlm_scores_reference(*widened(inputs))
    theirs, _ = mlm_scores_reference(*inputs)
    losses, found = mlm_scores(*inputs)
    assert losses.dtype == torch.float32 and found.dtype == torch.bool
    assert (losses - exact).norm() <= max(2 * (theirs - exact).norm(), SMALL_EPS * exact.norm())
    assert torch.equal(losses == 0, inputs[2] == IGNORED)
    # Rounding turns few of the likeliest tokens.
    assert (found != correct).sum() <= (0 if dtype == torch.float32 else count // 20)
    assert found.any() == (count > 0) and not found[inputs[2] == IGNORED].any()


def guesses(inputs):
    """The likeliest tokens."""
    hidden, weight, _, positions, bias = widened(inputs)
    logits = hidden[positions] @ weight.T
    return (logits if bias is None else logits + bias).argmax(-1)


@pytest.mark.parametrize("vocabulary", [97, 1100])
def test_of_equal_logits_the_first_is_the_likeliest(small, vocabulary):
    small(vocabulary, 4, torch.float32)
    hidden, weight = torch.ones(4, 8, device=DEVICE), torch.zeros(vocabulary, 8, device=DEVICE)
    weight[[5, 60, 90]] = 1
    _, correct = mlm_scores(hidden, weight, torch.tensor([5, 60, 90, 0], device=DEVICE))
    assert correct.tolist() == [True, False, False, False]


def test_the_mean_of_the_scores_is_the_loss():
    inputs = problem(63, 97, torch.float32)
    losses, _ = mlm_scores(*inputs)
    torch.testing.assert_close(losses.sum() / (inputs[2] != IGNORED).sum(), mlm_loss(*inputs))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(small, memory, dtype):
    small(300, 63, dtype)
    inputs = problem(63, 300, dtype, torch.float32, bias=True)
    inputs[3][::3] = 4
    grads = [torch.tensor(3.0, device=DEVICE)]
    first, *others = (evaluate(mlm_loss, inputs, grads, memory=memory) for _ in range(20 if NATIVE else 2))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_whole_for_any_number_of_predictions(dtype, memory):
    torch.compiler.reset()
    counted = CompileCounterWithBackend("inductor" if NATIVE else "aot_eager")
    compiled = torch.compile(mlm_loss, fullgraph=True, backend=counted)
    grads = [torch.tensor(3.0, device=DEVICE)]
    for count in (7, 20, 33, 64):
        inputs = problem(count, 97, dtype, bias=True)
        ours, eager = (evaluate(f, inputs, grads, memory=memory) for f in (compiled, mlm_loss))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    # One for the first number of predictions, one for all others.
    assert counted.frame_count == 2


def test_scores_compile_whole():
    torch.compiler.reset()
    compiled = torch.compile(mlm_scores, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    inputs = problem(20, 97, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), mlm_scores(*inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_under_autocast(dtype):
    inputs = problem(63, 97, torch.float32, bias=True)
    hidden, weight, labels, positions, _ = (x.requires_grad_() if floating(x) else x for x in inputs)
    options = {"linear_bias": True, "norm_bias": True, "decoder_bias": True, "eps": 1e-5}
    head = SparseMLMHead(96, 97, transform=True, **options).to(DEVICE)
    exact = head(hidden, weight, labels, positions)
    with torch.autocast(DEVICE.type, dtype):
        loss = head(hidden, weight, labels, positions)
    assert loss.dtype == torch.float32
    # A logit of about 2 is wrong by some eps, and the errors average out over 50 rows.
    assert abs(loss - exact) <= torch.finfo(dtype).eps * exact
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == head.bias.grad.dtype == torch.float32
    assert all(x.grad.any() and x.grad.isfinite().all() for x in (weight, hidden, head.bias))


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_scores_are_what_its_loss_is_the_mean_of(dtype, transform):
    hidden, weight, labels, positions, _ = problem(63, 97, torch.float32)
    options = {"linear_bias": True, "norm_bias": True, "decoder_bias": True, "eps": 1e-5}
    head = SparseMLMHead(96, 97, transform=transform, **options).to(DEVICE)
    torch.nn.init.normal_(head.bias)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        loss = head(hidden.to(dtype), weight, labels, positions)
        losses, correct = head.score(hidden.to(dtype), weight, labels, positions)
    assert not losses.requires_grad and losses.dtype == torch.float32
    # In fp32 the same logits, summed in another order. In bfloat16 those of the scores alone are rounded, each by up to
    # half an eps, which averages out over 50 rows.
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 / 50**0.5
    torch.testing.assert_close(losses.sum() / (labels != -100).sum(), loss.detach(), rtol=rtol, atol=0)
    assert correct.shape == losses.shape and not correct[labels == -100].any()


@pytest.mark.parametrize("memory", MEMORY)
def test_a_head_takes_the_memory_it_is_given(memory, monkeypatch):
    inputs = problem(20, 97, torch.float32)[:4]
    expected = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    computed_again, weight_gradient = [], FILE._weight_gradient
    monkeypatch.setattr(FILE, "_weight_gradient", lambda *given: computed_again.append(1) or weight_gradient(*given))
    options = {"linear_bias": False, "norm_bias": False, "decoder_bias": False, "eps": 1e-5}
    head = SparseMLMHead(96, 97, transform=False, memory=memory, **options)
    ours = evaluate(head, inputs, [torch.tensor(1.0, device=DEVICE)])
    assert len(computed_again) == (memory == "low")
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


H, W, Y = (
    torch.ones(4, 8, device=DEVICE),
    torch.ones(9, 8, device=DEVICE),
    torch.zeros(4, dtype=torch.long, device=DEVICE),
)
WRONG = {
    "hidden is int64": ((Y[:, None], W, Y), TypeError),
    "hidden has shape (4,), expected (T, C)": ((H[:, 0], W, Y), ValueError),
    "weight has shape (9, 7), expected (9, 8)": ((H, W[:, :7], Y), ValueError),
    "weight has shape (8,), expected (V, 8)": ((H, W[0], Y), ValueError),
    "weight is float16, expected float32": ((H, W.half(), Y), TypeError),
    "bias has shape (8,), expected (9,)": ((H, W, Y, None, W[0]), ValueError),
    "bias is float16, expected bfloat16 or float32": ((H.bfloat16(), W, Y, None, W[:, 0].half()), TypeError),
    "labels has shape (3,), expected (4,)": ((H, W, Y[:3]), ValueError),
    "labels has shape (4,), expected (3,)": ((H, W, Y, Y[:3]), ValueError),
    "labels is float32, expected int32 or int64": ((H, W, Y.float()), TypeError),
    "positions is int16, expected int32 or int64": ((H, W, Y, Y.short()), TypeError),
    "positions has shape (2, 2), expected (T,)": ((H, W, Y, Y.view(2, 2)), ValueError),
    "labels is on meta": ((H, W, Y.to("meta")), ValueError),
}
WRONG_OPTIONS = {
    "z_loss is -1.0, expected at least 0": {"z_loss": -1.0},
    "label_smoothing is 1.5, expected 0 to 1": {"label_smoothing": 1.5},
    "memory is 'huge', expected one of 'fast', 'low'": {"memory": "huge"},
}


@pytest.mark.parametrize("function", [mlm_loss, mlm_scores])
@pytest.mark.parametrize("message", WRONG)
def test_arguments_that_do_not_fit(message, function, launched):
    arguments, error = WRONG[message]
    with pytest.raises(error, match=f"^{function.__name__}: {re.escape(message)}"):
        function(*arguments)
    assert not launched


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_options_that_do_not_fit(message):
    with pytest.raises(ValueError, match=f"^mlm_loss: {re.escape(message)}"):
        mlm_loss(H, W, Y, **WRONG_OPTIONS[message])


@pytest.mark.parametrize("function", [mlm_loss, mlm_scores])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("labels", "positions", "message"),
    [
        ([0, 9, 1, 2], None, "labels[1] is 9, expected 0 to 8 or -100"),
        ([0, 8, -100, -1], None, "labels[3] is -1, expected 0 to 8 or -100"),
        ([0, 1, 2, 3], [0, 3, 4, 1], "positions[2] is 4, expected 0 to 3"),
        ([0, 1, 2, 3], [0, -1, 4, 1], "positions[1] is -1, expected 0 to 3"),
    ],
)
def test_values_are_looked_at_on_request(labels, positions, message, backend, function, monkeypatch):
    monkeypatch.setenv("CRAMFAST_KERNELS", backend)
    monkeypatch.setenv("CRAMFAST_CHECK", "1")
    labels, positions = (None if x is None else torch.tensor(x, device=DEVICE) for x in (labels, positions))
    with pytest.raises(ValueError, match=f"^{function.__name__}: {re.escape(message)}"):
        function(H, W, labels, positions)


def test_parts_cover_all_and_keep_to_the_limit():
    for total in (0, 1, 100, 5000, 16_384):
        for most in (1, 7, 128, 1330, 2048):
            parts = COMMON.split(total, 100, 100 * most + 50)
            assert [row for start, end in parts for row in range(start, end)] == [*range(total)]
            assert all(0 < end - start <= most for start, end in parts)


@needs_gpu
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("vocabulary", [30_522, 32_768, 50_368])
def test_real_vocabularies(vocabulary, memory):
    inputs = problem(3000, vocabulary, torch.bfloat16, width=768)
    assert_as_exact_as_torch(inputs, memory=memory)


@needs_gpu
@pytest.mark.parametrize(("memory", "most"), [("fast", 300), ("low", 64)])
def test_memory_at_full_size(memory, most):
    """Beside the gradients, which any implementation has to return."""
    hidden, weight, labels, *_ = problem(16_384, 32_768, torch.bfloat16, width=768, positions=False)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    mlm_loss(hidden[:256], weight, labels[:256], memory=memory).backward()  # cuBLAS's workspace
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mlm_loss(hidden, weight, labels, memory=memory).backward()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.itemsize for x in (hidden, weight))
    assert extra <= most * 2**20
