"""Gradients that the loss and the embedding add to a weight's `main_grad`: those that autograd would have."""

import pytest
import torch
from pairs import parametrize_pairs
from test_operators import DEVICE, DTYPES, randn

from cramfast.kernels import embed, mlm_loss

VOCABULARY, WIDTH, TOKENS = 40, 64, 70

pytestmark = pytest.mark.usefixtures("triton_kernels", "bf16_as_on_gpus", "poisoned")


def loss_of(weight, memory="fast"):
    """The loss, seven times, with a label that does not count and positions that come twice."""
    place = torch.arange(TOKENS, device=DEVICE)
    labels, positions = torch.where(place % 7 == 0, -100, place * 37 % VOCABULARY)[:40], (place * 2 % 60)[:40]
    hidden = randn(TOKENS, WIDTH, seed=1).to(weight.dtype).requires_grad_()
    bias = randn(VOCABULARY, seed=2).requires_grad_()
    return 7 * mlm_loss(hidden, weight, labels, positions, bias, memory=memory), (hidden, bias)


def loss_in_low_memory_of(weight):
    return loss_of(weight, "low")


def embedding_of(weight):
    """A sum over embedded tokens; one row's tokens, a third of all, lie in many chunks, and some rows have none."""
    place = torch.arange(TOKENS, device=DEVICE)
    ids = torch.where(place % 3 == 0, 4, place * 5 % (VOCABULARY - 9))
    parameters = (randn(WIDTH, seed=3).requires_grad_(), randn(WIDTH, seed=4).requires_grad_())
    table = randn(10, WIDTH, seed=5).requires_grad_()
    y = embed(ids, weight, *parameters, position_ids=place % 10, position_weight=table)
    return (y.float() * randn(TOKENS, WIDTH, seed=6)).sum(), (*parameters, table)


OPERATORS = (loss_of, loss_in_low_memory_of, embedding_of)


def make_weight(dtype: torch.dtype, **attributes) -> torch.Tensor:
    weight = randn(VOCABULARY, WIDTH, seed=7).div(WIDTH**0.5).to(dtype).requires_grad_()
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


def gradients(operator, weight) -> list[torch.Tensor | None]:
    """Of the weight and of all else."""
    value, others = operator(weight)
    return [*torch.autograd.grad(value, (weight, *others), allow_unused=True)]


def near(found: torch.Tensor, right: torch.Tensor, eps: float) -> bool:
    """A GPU multiplies and adds in one rounding."""
    return (found - right).norm() <= eps * right.norm()


@parametrize_pairs(operator=OPERATORS, dtype=DTYPES, replaces=[False, True])
def test_what_is_collected_is_what_autograd_would_have(operator, dtype, replaces):
    expected, *others = gradients(operator, make_weight(dtype))
    before = randn(VOCABULARY, WIDTH, seed=8)
    main_grad = torch.full_like(before, torch.nan) if replaces else before.clone()
    weight = make_weight(dtype, main_grad=main_grad, replaces_main_grad=replaces)
    found, *rest = gradients(operator, weight)
    assert found is None
    assert all(map(torch.equal, rest, others))
    assert not weight.replaces_main_grad
    if replaces:
        # float32 holds more than the 16 bits that autograd has: one rounding apart.
        assert torch.equal(main_grad.to(dtype), expected)
    else:
        assert near(main_grad, before + expected.float(), torch.finfo(dtype).eps)


@pytest.mark.parametrize("order", [(loss_of, embedding_of), (embedding_of, loss_of)])
def test_a_tied_weight_collects_from_both(order):
    main_grad = torch.full((VOCABULARY, WIDTH), torch.nan, device=DEVICE)
    weight = make_weight(torch.float32, main_grad=main_grad, replaces_main_grad=True)
    for operator in order:
        gradients(operator, weight)
    alone = [gradients(operator, make_weight(torch.float32))[0] for operator in order]
    assert near(main_grad, alone[0] + alone[1], torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_weight_without_a_gradient_collects_nothing(operator):
    main_grad = torch.full((VOCABULARY, WIDTH), 7.0, device=DEVICE)
    weight = make_weight(torch.float32, main_grad=main_grad).detach()
    weight.main_grad = main_grad
    value, others = operator(weight)
    torch.autograd.grad(value, others)
    assert (main_grad == 7).all()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("replaces", [False, True])
def test_no_predictions_add_nothing(memory, replaces):
    main_grad = torch.full((VOCABULARY, WIDTH), 7.0, device=DEVICE)
    weight = make_weight(torch.float32, main_grad=main_grad, replaces_main_grad=replaces)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    mlm_loss(randn(TOKENS, WIDTH), weight, none, none, memory=memory).backward()
    assert weight.grad is None
    assert (main_grad == (0 if replaces else 7)).all()
