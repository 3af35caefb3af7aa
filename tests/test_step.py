import copy

import pytest
import torch

from cramfast.config import ModelConfig, OptimizerOptions
from cramfast.data.batches import Batch, Cursor
from cramfast.data.tokenizer import SpecialIds
from cramfast.kernels import mask_tokens
from cramfast.model import Bert
from cramfast.train import step as module
from cramfast.train.optimizer import adamw
from cramfast.train.step import TrainStep

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, norm_bias=True, linear_bias=True
)
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, CONFIG.vocab_size))
OPTIONS = OptimizerOptions(lr=1e-3, weight_decay=0.01)
NO_CLIP = 1e9
RATE = 0.25


def make_step(clip: float = NO_CLIP, dtype=torch.float32, seed: int = 0, **settings) -> TrainStep:
    torch.manual_seed(0)
    model = Bert(CONFIG).train()
    return TrainStep(model, adamw(model, OPTIONS), SPECIAL, clip, dtype, seed, **settings)


def make_batch(number: int, lengths=(7, 1, 16, 8)) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(*SPECIAL.ordinary, (sum(lengths),), generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(ids, ends, max(lengths), sum(n * n for n in lengths), Cursor())


def concatenate(batches: list[Batch]) -> Batch:
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    ends = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    ids = torch.cat([batch.input_ids for batch in batches])
    return Batch(ids, ends, max(b.max_seqlen for b in batches), sum(b.attended for b in batches), Cursor())


def gradients(model: Bert) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def snapshot(step: TrainStep) -> dict[str, torch.Tensor]:
    """Everything that an update may change, copied."""
    tensors = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    for name, parameter in step.model.named_parameters():
        for kind, value in step.optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = value.clone()
    return tensors


def same_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def train(step: TrainStep, numbers, lr: float = 1e-3) -> list:
    results = []
    for number in numbers:
        step.accumulate(make_batch(number), RATE, number, 1.0)
        results.append(step.update(lr))
    return results


def poison_next_gradient(step: TrainStep, value: float) -> None:
    """One element of one weight's next gradient becomes `value`."""
    weight = step.model.layers[1].mlp[0].weight

    def hook(gradient):
        handle.remove()
        gradient = gradient.clone()
        gradient[3, 5] = value
        return gradient

    handle = weight.register_hook(hook)


@pytest.fixture
def masked(monkeypatch) -> list[dict]:
    """What every call of `mask_tokens` took and gave."""
    calls = []

    def spy(input_ids, cu_seqlens, count, **settings):
        ids, positions, labels = mask_tokens(input_ids, cu_seqlens, count, **settings)
        calls.append({"count": count, "ids": ids, "positions": positions, "labels": labels, **settings})
        return ids, positions, labels

    monkeypatch.setattr(module, "mask_tokens", spy)
    return calls


@pytest.fixture
def every_third(monkeypatch) -> None:
    """Hides every third token, so that a batch is masked alike in parts and whole."""

    def mask(input_ids, cu_seqlens, count, **_):
        positions = torch.arange(0, input_ids.numel(), 3)
        return input_ids.index_fill(0, positions, SPECIAL.mask), positions, input_ids[positions]

    monkeypatch.setattr(module, "mask_tokens", mask)


def test_four_microbatches_give_the_gradient_of_the_whole(every_third):
    parts = [make_batch(number, (12, 6, 18)) for number in range(4)]
    results = []
    for batches in (parts, [concatenate(parts)]):
        step = make_step()
        step.model.double()
        for number, batch in enumerate(batches):
            step.accumulate(batch, RATE, number, 1 / len(batches))
        results.append((gradients(step.model), torch.stack(step._losses).sum()))
    (in_parts, loss_in_parts), (whole, loss) = results
    # Sums of a few hundred float64 terms in another order: 2^-53 apart each.
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-13, atol=0)
    scale = max(gradient.abs().max() for gradient in whole.values())
    for name in whole:
        assert (in_parts[name] - whole[name]).abs().max() <= 1e-13 * scale, name


def test_the_loss_reported_is_the_mean_over_the_microbatches():
    step = make_step()
    batches = [make_batch(number) for number in range(3)]
    alone = []
    for number, batch in enumerate(batches):
        step.accumulate(batch, RATE, number, 1.0)
        alone.append(step._losses[-1])
        step.reset()
    for number, batch in enumerate(batches):
        step.accumulate(batch, RATE, number, 1 / 3)
    # Three roundings of float32 a term.
    torch.testing.assert_close(step.update(1e-3).loss, torch.stack(alone).mean(), rtol=4 * 2**-24, atol=0)


def reference_update(step: TrainStep, clip: float, lr: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What torch's plain AdamW makes of the gradients that `step` holds, clipped by torch, in `dtype`."""
    model = copy.deepcopy(step.model).to(dtype)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": OPTIONS.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(OPTIONS.beta1, OPTIONS.beta2),
        eps=OPTIONS.adam_eps,
        fused=False,
        foreach=False,
    )
    ours = dict(step.model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.grad = ours[name].grad.to(dtype, copy=True)
        for kind, value in step.optimizer.state[ours[name]].items():
            optimizer.state[parameter][kind] = value.to(value.dtype if kind == "step" else dtype, copy=True)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("clip", [0.05, 0.5, NO_CLIP])
def test_an_update_is_adamw_after_clipping(clip):
    step = make_step(clip)
    train(step, range(3))  # from the second update on, the size of a gradient matters to AdamW
    step.accumulate(make_batch(3), RATE, 3, 1.0)
    before = snapshot(step)
    exact = reference_update(step, clip, 1e-3, torch.float64)
    plain = reference_update(step, clip, 1e-3, torch.float32)
    norm = step.update(1e-3).gradient_norm
    assert 0.5 < norm < NO_CLIP
    for name, parameter in step.model.named_parameters():
        error = (parameter.detach() - exact[name]).norm()
        allowed = 2 * (plain[name] - exact[name]).norm()
        # clip_grad_norm_ adds 1e-6 to the norm, which moves the weights by that share of the update at most.
        allowed += 1e-6 / norm * (exact[name] - before[name]).norm()
        assert error <= allowed, name


def test_the_norm_reported_is_that_before_clipping():
    step = make_step(clip=0.01)
    step.accumulate(make_batch(0), RATE, 0, 1.0)
    wanted = torch.stack([gradient.norm() for gradient in gradients(step.model).values()]).norm()
    # The same sums of squares in float32, in the same order.
    torch.testing.assert_close(step.update(1e-3).gradient_norm, wanted, rtol=1e-6, atol=0)


def test_weight_decay_is_on_matrices_alone():
    model = make_step().model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # biases start at 0, where decay would not show
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw(model, OptimizerOptions(lr=0.1, weight_decay=0.5)).step()
    assert {parameter.ndim for parameter in model.parameters()} == {1, 2}
    for name, parameter in model.named_parameters():
        # One float32 rounding apart: the kernel multiplies by 1 - lr * decay or subtracts the product.
        decayed = before[name] * (0.95 if parameter.ndim == 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), decayed, rtol=2**-22 if parameter.ndim == 2 else 0, atol=0)


def test_a_step_uses_the_learning_rate_it_is_given():
    step = make_step()
    before = snapshot(step)
    train(step, [0], lr=0.0)
    weights = dict(step.model.named_parameters())
    assert all(torch.equal(before[name], weights[name]) for name in before)
    train(step, [1], lr=1e-3)
    assert not any(torch.equal(before[name], weights[name]) for name in before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("good_before", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(value, good_before):
    step = make_step(clip=0.5)
    train(step, range(good_before))
    if not good_before:  # the optimizer's state is made, as zeros, by the first update, skipped or not
        poison_next_gradient(step, value)
        train(step, [90])
    before = snapshot(step)
    poison_next_gradient(step, value)
    (result,) = train(step, [99])
    assert result.skipped == 1
    assert same_bits(snapshot(step), before)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_changes_nothing(value, monkeypatch):
    step = make_step()
    train(step, range(2))
    before = snapshot(step)
    forward = step.model.forward
    # Added to the loss it leaves the gradient finite.
    monkeypatch.setattr(step.model, "forward", lambda *batch: forward(*batch) + value)
    (result,) = train(step, [99])
    assert result.skipped == 1
    assert same_bits(snapshot(step), before)


def test_training_goes_on_as_if_the_skipped_update_had_not_been():
    undisturbed, disturbed = make_step(clip=0.5), make_step(clip=0.5)
    train(undisturbed, [0, 1, 2, 3])
    train(disturbed, [0, 1])
    poison_next_gradient(disturbed, float("nan"))
    skipped = [result.skipped.item() for result in train(disturbed, [99, 2, 3])]
    assert skipped == [1, 0, 0]
    assert same_bits(snapshot(disturbed), snapshot(undisturbed))


def test_one_poisoned_microbatch_of_several_skips_the_whole_update():
    step = make_step()
    train(step, [0])
    before = snapshot(step)
    step.accumulate(make_batch(1), RATE, 1, 0.5)
    poison_next_gradient(step, float("nan"))
    step.accumulate(make_batch(2), RATE, 2, 0.5)
    assert step.update(1e-3).skipped == 1
    assert same_bits(snapshot(step), before)


def test_reset_forgets_the_gradients():
    step, fresh = make_step(), make_step()
    step.accumulate(make_batch(5), RATE, 5, 1.0)
    step.reset()
    assert same_bits(snapshot(step), snapshot(fresh))
    losses = [train(each, [0])[0].loss for each in (step, fresh)]
    assert losses[0] == losses[1]
    assert same_bits(snapshot(step), snapshot(fresh))


def scaled_step(scale: float = 2.0**16, clip: float = 0.5) -> TrainStep:
    """Loss scaling as float16 has it, with float32 arithmetic."""
    step = make_step(clip)
    step._scaled = True
    step.loss_scale = torch.tensor(scale)
    return step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_float16_is_scaled(dtype):
    step = make_step(dtype=dtype)
    assert step._scaled == (dtype == torch.float16)
    assert step.loss_scale == (2.0**16 if dtype == torch.float16 else 1.0)


@pytest.mark.parametrize("clip", [0.5, NO_CLIP])
def test_a_scaled_update_equals_the_plain_one(clip):
    plain, scaled = make_step(clip), scaled_step(clip=clip)
    for ours, theirs in zip(train(scaled, range(4)), train(plain, range(4)), strict=True):
        # Scaling by a power of two is exact.
        assert ours.loss == theirs.loss
        assert ours.gradient_norm == theirs.gradient_norm
    assert same_bits(snapshot(scaled), snapshot(plain))


def test_an_overflow_is_skipped_and_halves_the_scale():
    step = scaled_step(2.0**120)
    before = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    (result,) = train(step, [0])
    assert result.skipped == 1
    assert step.loss_scale == 2.0**119
    assert all(torch.equal(before[name], parameter) for name, parameter in step.model.named_parameters())


def test_a_scale_too_large_comes_down_until_training_goes_on():
    step = scaled_step(2.0**127)
    skipped = [result.skipped.item() for result in train(step, [0] * 80)]
    first_good = skipped.index(0)
    assert skipped == [1] * first_good + [0] * (80 - first_good)
    assert step.loss_scale == 2.0 ** (127 - first_good)


def test_two_thousand_good_steps_double_the_scale():
    step = scaled_step()
    good = torch.zeros(())
    for _ in range(1999):
        step._adapt_loss_scale(good)
    assert step.loss_scale == 2.0**16
    (result,) = train(step, [0])
    assert result.skipped == 0
    assert step.loss_scale == 2.0**17
    assert step.good_steps == 0


def test_an_overflow_starts_the_count_of_good_steps_again():
    step = scaled_step()
    step.good_steps = torch.tensor(1998.0)
    step._adapt_loss_scale(torch.ones(()))
    assert (step.loss_scale, step.good_steps) == (2.0**15, 0)


def test_the_scale_stays_at_one_or_above():
    step = scaled_step(1.0)
    step._adapt_loss_scale(torch.ones(()))
    assert step.loss_scale == 1


@pytest.mark.parametrize("rate", [0.15, 0.25, 0.3])
@pytest.mark.parametrize("lengths", [(16, 16), (7, 1, 16, 8), (1,) * 13, (63,)])
def test_exactly_the_rate_is_masked(masked, rate, lengths):
    step, total = make_step(), sum(lengths)
    for number in range(3):
        step.accumulate(make_batch(number, lengths), rate, number, 1 / 3)
    assert [call["count"] for call in masked] == [round(rate * total)] * 3
    for call in masked:
        assert len(call["positions"].unique()) == round(rate * total)
        assert (call["labels"] >= SPECIAL.ordinary[0]).all()


def test_seed_and_microbatch_decide_the_masks(masked):
    for seed, microbatch in [(0, 3), (0, 3), (0, 4), (1, 3)]:
        make_step(seed=seed).accumulate(make_batch(0), RATE, microbatch, 1.0)
    first, again, *others = masked
    assert torch.equal(first["ids"], again["ids"])
    assert torch.equal(first["positions"], again["positions"])
    assert not any(torch.equal(first["positions"], other["positions"]) for other in others)


def test_whole_words_are_masked_where_it_is_known_what_continues_one(masked):
    continues = torch.arange(CONFIG.vocab_size) % 2 == 1
    step = make_step(continues=continues)
    lengths = (200, 100, 300)
    batch = make_batch(0, lengths)
    step.accumulate(batch, RATE, 0, 1.0)
    (call,) = masked
    chosen = torch.zeros(sum(lengths), dtype=torch.bool)
    chosen[call["positions"]] = True
    assert chosen.sum() == call["count"] == round(RATE * sum(lengths))
    opens = ~continues[batch.input_ids]
    opens[batch.cu_seqlens[:-1].long()] = True
    words = chosen.split(torch.where(torch.cat((opens, torch.tensor([True]))))[0].diff().tolist())
    cut = [word for word in words if word.any() and not word.all()]
    # The share of a sequence may end amid a word.
    assert len(cut) <= len(lengths)
    assert len([word for word in words if word.all() and len(word) > 1]) > 20


def test_no_gradient_is_left_after_an_update():
    step = make_step()
    train(step, [0])
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert step._losses == []


def test_bfloat16_products_leave_weights_and_state_in_float32():
    step = make_step(dtype=torch.bfloat16)
    (result,) = train(step, [0])
    assert {tensor.dtype for tensor in snapshot(step).values()} == {torch.float32}
    (in_float32,) = train(make_step(), [0])
    assert result.loss != in_float32.loss
    # bfloat16 keeps 8 bits, and errors of many products average out in the mean.
    torch.testing.assert_close(result.loss, in_float32.loss, rtol=2**-8, atol=0)
