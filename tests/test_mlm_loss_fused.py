"""The way to the loss without logits: what decides for it, its tiles, and rows that it does again.

The rule for errors is that of test_mlm_loss.py.
"""

import importlib

import pytest
import torch
from pairs import parametrize_pairs
from test_mlm_loss import MEMORY, NATIVE, SMALL_EPS, assert_as_exact_as_torch, evaluate, needs_gpu, problem, widened
from test_operators import DEVICE, randn

from cramfast.kernels import mlm_loss, mlm_loss_reference
from cramfast.kernels.mlm_loss_kernels import Options

FUSED = importlib.import_module("cramfast.kernels.mlm_loss_fused")
PRODUCT = importlib.import_module("cramfast.kernels.mlm_loss_product")
pytestmark = [
    pytest.mark.usefixtures("triton_kernels", "poisoned", "bf16_as_on_gpus"),
    pytest.mark.skipif(
        NATIVE and torch.cuda.get_device_capability() != (9, 0), reason="logits are computed on this card"
    ),
]
BFLOAT16 = torch.bfloat16


def losing(count, vocabulary, rows, width=96, **options):
    """A problem whose `rows` have losses of some hundred nats: more than exp has room for."""
    hidden, weight, labels, positions, bias = problem(count, vocabulary, BFLOAT16, width=width, **options)
    hidden = hidden.clone()
    hidden[rows if positions is None else positions[rows]] *= 100
    return [hidden, weight, labels, positions, bias]


def test_what_decides():
    hidden = torch.zeros(3, 96, dtype=BFLOAT16, device=DEVICE)
    assert FUSED.fuses(hidden, Options())
    assert not FUSED.fuses(hidden, Options(z_loss=1e-4)) and not FUSED.fuses(hidden, Options(smoothing=0.1))
    assert not FUSED.fuses(hidden.half(), Options()) and not FUSED.fuses(hidden.float(), Options())
    assert not FUSED.fuses(hidden[:, :90], Options())


@pytest.mark.parametrize("capability", [80, 86, 89, 100, 120])
def test_other_cards_compute_logits(capability, monkeypatch, launched):
    monkeypatch.setattr(FUSED, "capability_of", lambda device: capability)
    assert_as_exact_as_torch(problem(63, 97, BFLOAT16))
    names = [name for name, _ in launched]
    assert "rows_kernel" in names and "product_kernel" not in names


@parametrize_pairs(sizes=[(300, 512), (300, 700), (257, 1000)], bias=[False, True], memory=MEMORY)
def test_several_tiles_either_way(sizes, bias, memory, launched):
    count, vocabulary = sizes
    assert_as_exact_as_torch(problem(count, vocabulary, BFLOAT16, bias=bias, width=72), memory=memory)
    names = [name for name, _ in launched]
    assert "product_kernel" in names and "rows_kernel" not in names


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [[1, 7, 18], range(20)], ids=["some", "all"])
def test_rows_beyond_the_range_of_exp_are_done_again(rows, bias, memory):
    inputs = losing(20, 300, list(rows), bias=bias, positions=False)
    losses = mlm_loss_reference(*widened(inputs[:2]), inputs[2][1:2].repeat(20), None, None)
    assert losses > 69
    assert_as_exact_as_torch(inputs, memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
def test_rows_done_again_at_repeated_positions(memory):
    inputs = losing(20, 300, [1, 2, 7])
    inputs[3][::3] = 5
    assert_as_exact_as_torch(inputs, memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_numbers_has_no_loss_and_leaves_the_others_alone(value, memory):
    inputs = problem(20, 300, BFLOAT16, positions=False)
    expected = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    inputs[0] = inputs[0].clone()
    inputs[0][3] = value
    loss, dhidden, _ = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    others = torch.arange(20, device=DEVICE) != 3
    assert loss.isnan() and dhidden[3].isnan().any()
    assert torch.equal(dhidden[others], expected[1][others])


@pytest.mark.parametrize("memory", MEMORY)
def test_rows_whose_gradient_leaves_the_range_before_it_is_divided(memory):
    """Losses of 80 nats: exp has room for them, a sum with large weights has not."""
    hidden = torch.zeros(40, 64, dtype=BFLOAT16, device=DEVICE)
    hidden[:, 5] = 8e-4
    weight = torch.zeros(97, 64, dtype=BFLOAT16, device=DEVICE)
    weight[:, 5] = torch.where(torch.arange(97, device=DEVICE) == 7, 1e5, 0.0)
    inputs = [hidden, weight, torch.arange(40, device=DEVICE) + 20, None, None]
    assert 69 < mlm_loss_reference(*widened(inputs)) < 88
    assert_as_exact_as_torch(inputs, memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("rows", [[], range(20)], ids=["in range", "done again"])
def test_tokens_that_a_bias_rules_out(rows, memory):
    inputs = losing(20, 1000, list(rows), bias=True, positions=False)
    inputs[4][:400] = float("-inf")
    inputs[2] = torch.where(inputs[2] == -100, -100, 400 + inputs[2] % 600)
    assert_as_exact_as_torch(inputs, memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_label_that_a_bias_rules_out_has_an_infinite_loss_and_gradients(memory):
    inputs = problem(20, 300, BFLOAT16, bias=True, positions=False)
    inputs[4][int(inputs[2][1])] = float("-inf")
    ours = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    exact = evaluate(mlm_loss_reference, widened(inputs), [torch.tensor(1.0, device=DEVICE).double()])
    assert ours[0] == exact[0] == float("inf")
    assert all(result.isfinite().all() for result in (*ours[1:], *exact[1:]))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("vocabulary", [96, 97])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_weights_with_gaps_and_on_their_side(dtype, vocabulary, memory):
    inputs = problem(20, vocabulary, BFLOAT16, dtype)
    grads = [torch.tensor(1.0, device=DEVICE)]
    expected = evaluate(mlm_loss, inputs, grads, memory=memory)
    wide = torch.cat([inputs[1], inputs[1]], 1)
    for weight in (inputs[1].t().contiguous().t(), wide[:, :96]):
        assert not weight.is_contiguous()
        leaves = [inputs[0].detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = mlm_loss(*leaves, *inputs[2:], memory=memory)
        loss.backward()
        found = loss, leaves[0].grad, leaves[1].grad
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_do_not_count_are_not_read(value):
    inputs = problem(20, 300, BFLOAT16, positions=False)
    expected = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)])
    inputs[0] = inputs[0].clone()
    inputs[0][::5] = value
    found = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_a_weight_without_numbers_shows_in_the_loss(dtype):
    inputs = problem(20, 300, dtype)
    inputs[1] = inputs[1].clone()
    inputs[1][299] = float("nan")
    assert mlm_loss(*inputs).isnan()


def test_no_loss_is_below_zero():
    """However the label's logit, some 60 here, is summed up."""
    weight = randn(97, 768, dtype=BFLOAT16)
    hidden = (60 * weight[:40].float() / weight[:40].float().square().sum(1, keepdim=True)).bfloat16()
    for row in range(40):
        assert 0 <= mlm_loss(hidden[row : row + 1], weight, torch.tensor([row], device=DEVICE)) < 1e-4


@pytest.mark.parametrize("count", [1, 5, 128])
def test_every_statistic_begins_where_vectors_may(count):
    statistics = FUSED.new_statistics(torch.zeros(1, 1, device=DEVICE), count)
    assert statistics.shape[1] >= count and statistics.dtype == torch.float32
    assert all(row.data_ptr() % 16 == 0 for row in statistics)


@pytest.mark.parametrize("memory", MEMORY)
def test_the_gradient_of_a_label_that_is_all_but_certain(memory):
    """Its probability rounds to 1 in bfloat16; what is left of it does not round away."""
    width, vocabulary = 64, 97
    labels = torch.arange(32, device=DEVICE)
    weight = torch.eye(vocabulary, width, device=DEVICE, dtype=BFLOAT16)
    hidden = (12 * weight[:32]).contiguous()
    inputs = [hidden, weight, labels, None, None]
    ours = evaluate(mlm_loss, inputs, [torch.tensor(1.0, device=DEVICE)], memory=memory)
    exact = evaluate(mlm_loss_reference, widened(inputs), [torch.tensor(1.0, device=DEVICE).double()])
    # A logit of 12, as the product and the label's own sum it up: a loss of 6e-4 is what they differ by from others.
    assert abs(ours[0] - exact[0]) <= 4 * 12 * SMALL_EPS < 0.01 * exact[0]
    own = torch.arange(32)
    for our, true in ((ours[1][own, own], exact[1][own, own]), (ours[2][own, own], exact[2][own, own])):
        torch.testing.assert_close(our.double(), true, rtol=2 * torch.finfo(BFLOAT16).eps, atol=0)


@pytest.mark.parametrize("memory", MEMORY)
def test_addresses_that_are_no_multiples_of_16_bytes(memory):
    inputs = problem(20, 300, BFLOAT16, positions=False)
    grads = [torch.tensor(1.0, device=DEVICE)]
    expected = evaluate(mlm_loss, inputs, grads, memory=memory)
    for place in (0, 1):
        values = inputs[place]
        shifted = torch.empty(values.numel() + 1, dtype=BFLOAT16, device=DEVICE)[1:].view_as(values).copy_(values)
        assert shifted.data_ptr() % 16
        moved = [shifted if i == place else x for i, x in enumerate(inputs)]
        leaves = [x.detach().requires_grad_() if i < 2 else x for i, x in enumerate(moved)]
        loss = mlm_loss(*leaves, memory=memory)
        loss.backward()
        found = loss, leaves[0].grad, leaves[1].grad
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_without_gradients_nothing_but_the_losses_is_written(bias, launched, monkeypatch):
    written, run = [], PRODUCT.exponentials
    monkeypatch.setattr(FUSED, "exponentials", lambda *given: written.append(given[5]) or run(*given))
    inputs = problem(63, 700, BFLOAT16, bias=bias)
    exact = mlm_loss_reference(*widened(inputs))
    with torch.no_grad():
        loss = mlm_loss(*inputs)
    assert abs(loss - exact) <= 4 * SMALL_EPS * exact
    steps = ("targets", "gather", "bases", "product", "finish", "mean")
    assert [name for name, _ in launched] == [f"{step}_kernel" for step in steps]
    assert written == [None]


@needs_gpu
def test_whom_others_named_for_tritons_memory_stays():
    import triton

    asked = []

    def allocate(size, *_):
        asked.append(size)
        return torch.empty(size, dtype=torch.int8, device=DEVICE)

    before = triton.runtime._allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        mlm_loss(*problem(63, 97, BFLOAT16))
        assert triton.runtime._allocation._allocator.get() is allocate and not asked
    finally:
        triton.set_allocator(before)


@needs_gpu
def test_products_as_exact_as_their_factors_allow():
    """Over many tiles for each program."""
    rows, decoder = randn(3000, 768, dtype=BFLOAT16), 0.05 * randn(5000, 768, seed=1).bfloat16()
    bases = randn(3000, seed=2)
    out = torch.full((3000, 5056), float("nan"), dtype=BFLOAT16, device=DEVICE)
    sums = torch.full((3000, PRODUCT.pieces(5000)), float("nan"), device=DEVICE)
    PRODUCT.exponentials(rows, decoder, 5000, None, bases, out, sums)
    exact = (rows.double() @ decoder.double().t() - bases[:, None]).exp()
    assert ((out[:, :5000] - exact) / exact).abs().max() <= torch.finfo(BFLOAT16).eps / 2 + 1e-4
    torch.testing.assert_close(sums.sum(1).double(), exact.sum(1), rtol=1e-5, atol=0)
