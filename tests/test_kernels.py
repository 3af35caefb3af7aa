"""The reference operators against their formulas, written out here in fp64, and the rule that picks what runs.

Shapes: T tokens, B sequences, S places in one sequence, C hidden size, H heads, D head size, V vocabulary.
"""

import math

import pytest
import torch

from cramfast.kernels import (
    OPERATORS,
    adamw,
    add_layer_norm,
    embed,
    geglu,
    gelu,
    layer_norm,
    mask_tokens,
    mlm_loss,
    muon_direction,
    orthogonalise,
    sequence_positions,
    varlen_attention,
)

pytestmark = pytest.mark.usefixtures("reference")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 63, 100, 1000)
WIDTHS = (64, 96, 768, 1000)
RAGGED = (0, 1, 17, 64, 0, 100, 127, 128, 0)


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def norm_parameters(hidden, dtype, seed=1):
    """Weight and bias beside activations of `dtype`: in that, or in fp32 beside narrow ones."""
    wide = torch.promote_types(dtype, torch.float32)
    return 1 + randn(hidden, dtype=wide, seed=seed), randn(hidden, dtype=wide, seed=seed + 1)


def boundaries(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).int()


def assert_close(actual, expected, dtype, roundings):
    """`roundings` results in a row, each rounded to `dtype`, are wrong by at most that many eps, relative in L2.

    One rounding errs by eps/2; the other half leaves room for the fp32 sums inside.
    """
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= roundings * torch.finfo(dtype).eps * expected.norm()


def gradients(outputs, inputs, seed=9):
    """Gradients of a random weighting of `outputs`, coarse enough to be the same in every dtype."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [randn(*y.shape, dtype=torch.bfloat16, seed=seed + i).to(y.dtype) for i, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, weights)


def layer_norm_formula(x, weight, bias, eps):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def gelu_formula(x, approximate):
    x = x.double()
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x / math.sqrt(2))


def attention_formula(qkv_T3HD, lengths, cos=None, sin=None, softmax_scale=None, window=None):
    scale = qkv_T3HD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outputs = []
    for qkv_S3HD in qkv_T3HD.double().split(list(lengths)):
        q_SHD, k_SHD, v_SHD = qkv_S3HD.unbind(1)
        if cos is not None:
            q_SHD, k_SHD = rotate_formula(q_SHD, cos, sin), rotate_formula(k_SHD, cos, sin)
        scores_HSS = torch.einsum("qhd,khd->hqk", q_SHD, k_SHD) * scale
        if window is not None:
            place = torch.arange(len(q_SHD))
            far = (place[:, None] - place).abs() > window
            scores_HSS = scores_HSS.masked_fill(far, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores_HSS.softmax(-1), v_SHD))
    return torch.cat(outputs)


def rotate_formula(x_SHD, cos, sin):
    real, imaginary = x_SHD.chunk(2, dim=-1)
    turn = torch.complex(cos.double(), sin.double())[: len(x_SHD), None]
    turned = torch.complex(real, imaginary) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def rotary(positions, head_size, dtype=torch.float64, theta=100.0):
    """cos and sin for q and k of `dtype`: in that, or in fp32 beside narrow ones."""
    angle = torch.arange(positions)[:, None] * theta ** -(torch.arange(0, head_size, 2).double() / head_size)
    wide = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(wide), angle.sin().to(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("total", TOKENS)
def test_layer_norm(total, hidden, dtype):
    x = 2 * randn(total, hidden, dtype=dtype) + 1
    weight, bias = norm_parameters(hidden, dtype)
    for b in (bias, None):
        # In the wide dtypes mean, variance, quotient, product and sum each round once, in a narrow one the result.
        roundings = 1 if dtype.itemsize == 2 else 5
        assert_close(layer_norm(x, weight, b, 1e-5), layer_norm_formula(x, weight, b, 1e-5), dtype, roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("total", TOKENS)
def test_add_layer_norm(total, hidden, dtype):
    x, residual = randn(total, hidden, dtype=dtype), randn(total, hidden, dtype=dtype, seed=1)
    weight, bias = norm_parameters(hidden, dtype, seed=2)
    for b in (bias, None):
        y, s = add_layer_norm(x, residual, weight, b, 1e-5)
        assert_close(s, x.double() + residual.double(), dtype, 1)
        # The norm is that of the sum as it is handed on, so its rounding does not count; else as layer_norm.
        assert_close(y, layer_norm_formula(s, weight, b, 1e-5), dtype, 1 if dtype.itemsize == 2 else 5)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_layer_norm_adds_eps_to_the_variance(eps):
    x, weight = 0.01 * randn(63, 96), randn(96, seed=1)
    # fp64 leaves a dozen digits to tell one eps from another.
    assert_close(layer_norm(x, weight, None, eps), layer_norm_formula(x, weight, None, eps), torch.float64, 5)


def test_layer_norm_takes_any_leading_shape():
    x, weight = randn(3, 5, 7, 96), randn(96, seed=1)
    assert torch.equal(layer_norm(x, weight), layer_norm(x.view(-1, 96), weight).view_as(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_gradients_with_fp32_parameters(dtype):
    x, residual = (randn(100, 768, dtype=dtype, seed=i).requires_grad_() for i in (0, 1))
    weight, bias = ((1 + randn(768, dtype=torch.float32, seed=i)).requires_grad_() for i in (2, 3))
    inputs = (x, residual, weight, bias)
    actual = gradients(add_layer_norm(x, residual, weight, bias), inputs)
    # s is taken as rounded, like the operator hands it on, while its gradient passes through unchanged.
    s = x.double() + residual.double()
    s = s + (s.to(dtype).double() - s).detach()
    expected = gradients((layer_norm_formula(s, weight, bias, 1e-5), s), inputs)
    for a, e in zip(actual, expected, strict=True):
        # The norm's gradient and its sum with that of s are rounded one after the other; the rest is fp32.
        assert_close(a, e.double(), e.dtype, 2 if e.dtype.itemsize == 2 else 8)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", TOKENS)
def test_gelu(total, dtype, approximate):
    x = 3 * randn(total, 96, dtype=dtype)
    # Half, product and erf or tanh round in the wide dtypes; a narrow one rounds the result.
    roundings = 1 if dtype.itemsize == 2 else 3
    assert_close(gelu(x, approximate), gelu_formula(x, approximate), dtype, roundings)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", TOKENS)
def test_geglu(total, dtype, approximate):
    x = 3 * randn(total, 2 * 96, dtype=dtype)
    expected = gelu_formula(x[:, :96], approximate) * x[:, 96:].double()
    # As gelu, and one more for the product.
    assert_close(geglu(x, approximate), expected, dtype, 2 if dtype.itemsize == 2 else 4)


def test_gelu_is_exact_unless_asked():
    x = randn(100, 96)
    assert torch.equal(gelu(x), gelu(x, "none"))
    assert torch.equal(geglu(x), geglu(x, "none"))
    assert not torch.equal(gelu(x), gelu(x, "tanh"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("total", TOKENS)
def test_embed(total, hidden, dtype):
    ids = torch.arange(total) * 7 % 50
    places = torch.arange(total) * 3 % 20
    weight, position_weight = randn(50, hidden, dtype=dtype), randn(20, hidden, dtype=dtype, seed=1)
    norm_weight, norm_bias = norm_parameters(hidden, dtype, seed=2)
    rows = weight.double()[ids]
    plain = embed(ids, weight, norm_weight, eps=1e-5)
    # As layer_norm.
    roundings = 1 if dtype.itemsize == 2 else 5
    assert_close(plain, layer_norm_formula(rows, norm_weight, None, 1e-5), dtype, roundings)
    full = embed(ids, weight, norm_weight, norm_bias, position_ids=places, position_weight=position_weight, eps=1e-5)
    rows = rows + position_weight.double()[places]
    # The sum of the rows rounds once more.
    assert_close(full, layer_norm_formula(rows, norm_weight, norm_bias, 1e-5), dtype, roundings + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embed_rounds_only_its_result_to_the_dtype_asked_for(dtype):
    ids = torch.arange(100) % 50
    weight, norm_weight = randn(50, 96, dtype=torch.float32), randn(96, dtype=torch.float32, seed=1)
    expected = layer_norm_formula(weight[ids], norm_weight, None, 1e-5)
    assert_close(embed(ids, weight, norm_weight, dtype=dtype), expected, dtype, 1)


@pytest.mark.parametrize("half", [{"position_ids": torch.zeros(3, dtype=torch.long)}, {"position_weight": randn(5, 8)}])
def test_embed_wants_both_halves_of_the_positions(half):
    with pytest.raises(ValueError, match="go together"):
        embed(torch.zeros(3, dtype=torch.long), randn(5, 8), torch.ones(8), **half)


def attention_roundings(dtype):
    # Narrow: q and k when rotated, the weights, the result. Wide: sums of up to 128 terms, wrong by some sqrt(128) eps.
    return 4 if dtype.itemsize == 2 else 16


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softmax_scale": 0.2}, {"window": 0}, {"window": 1000}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 64])
def test_attention_on_ragged_sequences(head_size, dtype, options, turned):
    cos, sin = rotary(128, head_size, dtype) if turned else (None, None)
    qkv = randn(sum(RAGGED), 3, 2, head_size, dtype=dtype).requires_grad_()
    out = varlen_attention(qkv, boundaries(RAGGED), 128, cos=cos, sin=sin, **options)
    expected = attention_formula(qkv, RAGGED, cos, sin, **options)
    assert_close(out, expected, dtype, attention_roundings(dtype))
    (grad,), (expected_grad,) = gradients(out, (qkv,)), gradients(expected, (qkv,))
    assert not grad.isnan().any()
    # Backward computes the weights again and rounds their gradient, q's and k's on top.
    assert_close(grad, expected_grad.double(), dtype, 2 * attention_roundings(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 17, 64, 100, 127, 128])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_on_equal_lengths_needs_no_padding(monkeypatch, window, length, dtype):
    def padded(*_):
        raise AssertionError("the padded path ran")

    cos, sin = rotary(129, 64, dtype)
    qkv, cu_seqlens = randn(3 * length, 3, 2, 64, dtype=dtype), boundaries(3 * (length,))
    # One place more than any sequence has, so that every row is padded.
    ragged = varlen_attention(qkv, cu_seqlens, length + 1, cos=cos, sin=sin, window=window)
    monkeypatch.setattr("cramfast.kernels.attention.sequence_positions", padded)
    uniform = varlen_attention(qkv, cu_seqlens, length, cos=cos, sin=sin, window=window)
    # Two results, each as far from the truth as the next line allows.
    assert_close(uniform, ragged.double(), dtype, 2 * attention_roundings(dtype))
    assert_close(
        uniform, attention_formula(qkv, 3 * (length,), cos, sin, window=window), dtype, attention_roundings(dtype)
    )


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_attention_on_no_tokens(lengths):
    qkv = randn(0, 3, 2, 16).requires_grad_()
    out = varlen_attention(qkv, boundaries(lengths), 0)
    assert out.shape == (0, 2, 16)
    assert gradients(out, (qkv,))[0].shape == qkv.shape


def test_attention_dropout_keeps_the_mean():
    keys, dropout_p = 128, 0.25
    torch.manual_seed(0)
    qkv = torch.zeros(64 * keys, 3, 1, 16)
    qkv[:, 2] = 1
    # Equal scores and unit values: a token's output is the number of kept keys, over its mean.
    kept = varlen_attention(qkv, boundaries(64 * (keys,)), keys, dropout_p=dropout_p)[:, 0, 0]
    deviation = math.sqrt(dropout_p / (1 - dropout_p) / keys)
    assert abs(kept.mean() - 1) < 5 * deviation / math.sqrt(kept.numel())
    # A sample's own deviation spreads by about 1/sqrt(2 n).
    assert abs(kept.std() / deviation - 1) < 5 / math.sqrt(2 * kept.numel())


def mlm_formula(hidden, weight, labels, bias, ignore_index=-100):
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    keep = labels != ignore_index
    chosen = logits[keep, labels[keep]]
    return (logits[keep].exp().sum(-1).log() - chosen).mean(), logits.abs().max()


@pytest.mark.parametrize(("biased", "ignore_index"), [(False, -100), (True, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", WIDTHS)
@pytest.mark.parametrize("total", TOKENS)
def test_mlm_loss(total, hidden_size, dtype, biased, ignore_index):
    hidden = randn(total, hidden_size, dtype=dtype)
    weight = (2 / math.sqrt(hidden_size) * randn(257, hidden_size, seed=1)).to(dtype)
    bias = randn(257, dtype=dtype, seed=2) if biased else None
    labels = torch.arange(total) * 11 % 257
    labels[1::3] = ignore_index
    loss = mlm_loss(hidden, weight, labels, bias=bias, ignore_index=ignore_index)
    expected, largest = mlm_formula(hidden, weight, labels, bias, ignore_index)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    # logsumexp and the label's logit each move by no more than the largest error of a logit. A logit rounds after the
    # product and after the bias, by eps/2 each; wide dtypes add the rounding of C products, which grows like sqrt(C).
    roundings = 1 if dtype.itemsize == 2 else math.sqrt(hidden_size)
    assert abs(loss - expected) <= 2 * roundings * torch.finfo(dtype).eps * largest


def test_mlm_loss_on_chosen_rows_is_that_of_the_rows():
    hidden, weight = randn(100, 64), randn(257, 64, seed=1)
    positions, labels = torch.tensor([3, 17, 17, 99, 0]), torch.tensor([5, 256, 0, 5, 9])
    expected = mlm_loss(hidden[positions], weight, labels)
    assert torch.equal(mlm_loss(hidden, weight, labels, positions), expected)


def test_mlm_loss_casts_fp32_parameters_to_the_activations():
    hidden, weight, bias = randn(63, 64, dtype=torch.bfloat16), randn(257, 64).float(), randn(257).float()
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
    loss = mlm_loss(hidden, weight, torch.arange(63), bias=bias)
    narrow = mlm_loss(hidden, weight.bfloat16(), torch.arange(63), bias=bias.bfloat16())
    assert torch.equal(loss, narrow)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("count", [0, 5])
def test_mlm_loss_without_a_label_is_zero(count):
    inputs = hidden, weight, bias = [randn(*shape).requires_grad_() for shape in ((100, 64), (257, 64), (257,))]
    loss = mlm_loss(hidden, weight, torch.full((count,), -100), torch.arange(count), bias)
    assert loss == 0
    assert all(
        torch.equal(g, torch.zeros_like(x)) for g, x in zip(torch.autograd.grad(loss, inputs), inputs, strict=True)
    )


RAGGED_SMALL = (0, 1, 5, 0, 3)
COS, SIN = rotary(6, 4)
LABELS = torch.tensor([1, -100, 6, 0])
GRADCHECKS = {
    "layer_norm": (layer_norm, ((5, 7), (7,), (7,))),
    "layer_norm without bias": (layer_norm, ((5, 7), (7,))),
    "layer_norm of nothing": (layer_norm, ((0, 7), (7,), (7,))),
    "add_layer_norm": (add_layer_norm, ((5, 7), (5, 7), (7,), (7,))),
    "add_layer_norm without bias": (add_layer_norm, ((5, 7), (5, 7), (7,))),
    "gelu": (gelu, ((5, 7),)),
    "gelu tanh": (lambda x: gelu(x, "tanh"), ((5, 7),)),
    "geglu": (geglu, ((5, 8),)),
    "geglu tanh": (lambda x: geglu(x, "tanh"), ((5, 8),)),
    "embed": (lambda *p: embed(torch.tensor([2, 0, 2, 5]), *p), ((6, 7), (7,), (7,))),
    "embed with positions": (
        lambda weight, positions, *norm: embed(
            torch.tensor([2, 0, 2, 5]),
            weight,
            *norm,
            position_ids=torch.tensor([0, 1, 2, 0]),
            position_weight=positions,
        ),
        ((6, 7), (3, 7), (7,)),
    ),
    "attention": (lambda qkv: varlen_attention(qkv, boundaries(RAGGED_SMALL), 5), ((9, 3, 2, 4),)),
    "attention with rotary tables": (
        lambda qkv: varlen_attention(qkv, boundaries(RAGGED_SMALL), 5, cos=COS, sin=SIN, softmax_scale=0.7),
        ((9, 3, 2, 4),),
    ),
    "attention in a window": (
        lambda qkv: varlen_attention(qkv, boundaries(RAGGED_SMALL), 6, window=1),
        ((9, 3, 2, 4),),
    ),
    "attention on equal lengths": (
        lambda qkv: varlen_attention(qkv, boundaries((3, 3, 3)), 3, cos=COS, sin=SIN),
        ((9, 3, 2, 4),),
    ),
    "mlm_loss": (lambda hidden, weight: mlm_loss(hidden, weight, LABELS), ((4, 5), (7, 5))),
    "mlm_loss with positions and bias": (
        lambda hidden, weight, bias: mlm_loss(hidden, weight, LABELS, torch.tensor([8, 2, 2, 0]), bias),
        ((9, 5), (7, 5), (7,)),
    ),
    "mlm_loss with z-loss and label smoothing": (
        lambda hidden, weight: mlm_loss(hidden, weight, LABELS, z_loss=0.1, label_smoothing=0.2),
        ((4, 5), (7, 5)),
    ),
}


@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradients_are_those_of_finite_differences(case):
    function, shapes = GRADCHECKS[case]
    inputs = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("lengths", [(), (0,), (1,), RAGGED, (128, 128), (0, 0, 3, 0, 0, 2)])
def test_sequence_positions(lengths):
    sequence, position = sequence_positions(boundaries(lengths), sum(lengths))
    assert sequence.dtype == position.dtype == torch.int64
    assert sequence.tolist() == [b for b, length in enumerate(lengths) for _ in range(length)]
    assert position.tolist() == [place for length in lengths for place in range(length)]


IDS = torch.arange(6)


def floats(*shape):
    return randn(*shape, dtype=torch.float32)


def updated(weight):
    """What AdamW makes of `weight` and its moments."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    rates = torch.tensor([0.1, 1.0, 7.0, 1.0, 0.0])
    adamw(weight, floats(100), first, second, rates, beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.01)
    return weight, first, second


def directed(gradient):
    """What Muon makes of a gradient, and the momentum with it."""
    momentum, direction = torch.zeros_like(gradient), torch.zeros_like(gradient)
    muon_direction(gradient, momentum, torch.tensor([0.1, 0.0, 0.0, 1.0, 0.0]), direction, beta=0.95)
    return momentum, direction


CALLS = {
    "embed": lambda: embed(IDS, floats(6, 8), floats(8)),
    "layer_norm": lambda: layer_norm(floats(3, 8), floats(8)),
    "add_layer_norm": lambda: add_layer_norm(floats(3, 8), floats(3, 8), floats(8)),
    "gelu": lambda: gelu(floats(3, 8)),
    "geglu": lambda: geglu(floats(3, 8)),
    "varlen_attention": lambda: varlen_attention(floats(6, 3, 1, 8), boundaries((2, 4)), 4),
    "mask_tokens": lambda: mask_tokens(IDS, boundaries((2, 4)), 2, mask_id=0, ordinary=(1, 6), seed=0),
    "mlm_loss": lambda: mlm_loss(floats(6, 8), floats(9, 8), IDS),
    "adamw": lambda: updated(floats(100)),
    "muon": lambda: directed(floats(100)),
    "orthogonalise": lambda: orthogonalise(floats(2, 6, 8)),
}


def test_every_operator_is_dispatched_below():
    assert set(CALLS) == set(OPERATORS)


@pytest.mark.parametrize("operator", CALLS)
def test_an_unknown_backend_is_refused(monkeypatch, operator):
    monkeypatch.setenv("CRAMFAST_KERNELS", "cuda")
    with pytest.raises(ValueError, match="CRAMFAST_KERNELS=cuda: expected one of auto, triton, reference"):
        CALLS[operator]()


@pytest.mark.parametrize("operator", CALLS)
def test_triton_that_cannot_run_says_why(monkeypatch, operator):
    monkeypatch.setenv("CRAMFAST_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "it takes" if operator == "varlen_attention" else "(no Triton kernel yet|cpu device)"
    with pytest.raises(RuntimeError, match=rf"\b{operator} cannot run as Triton: {reason}"):
        CALLS[operator]()


def test_triton_that_cannot_run_in_fp64_says_so(triton_kernels):
    with pytest.raises(RuntimeError, match="gelu cannot run as Triton: no kernel for float64"):
        gelu(randn(3, 8))


@pytest.mark.parametrize("operator", CALLS)
def test_a_cpu_tensor_takes_the_reference_unasked(monkeypatch, operator):
    forced = CALLS[operator]()
    monkeypatch.delenv("CRAMFAST_KERNELS")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.testing.assert_close(CALLS[operator](), forced, rtol=0, atol=0)
