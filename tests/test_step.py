import copy
from dataclasses import replace

import pytest
import torch

from cramfast.config import ModelConfig, OptimizerOptions
from cramfast.data.batches import Batch, Cursor
from cramfast.data.tokenizer import SpecialIds
from cramfast.kernels import mask_tokens
from cramfast.model import Bert
from cramfast.train import step as module
from cramfast.train.optimizer import norm_of
from cramfast.train.step import TrainStep

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, norm_bias=True, linear_bias=True
)
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, CONFIG.vocab_size))
NO_CLIP = 1e9
OPTIONS = OptimizerOptions(lr=1e-3, weight_decay=0.01, clip=NO_CLIP)
RATE = 0.25


def make_step(clip: float = NO_CLIP, dtype=torch.float32, seed: int = 0, **settings) -> TrainStep:
    torch.manual_seed(0)
    # In double precision all of it is: the weights are laid out as the step is made.
    model = Bert(CONFIG).train().to(torch.promote_types(dtype, torch.float32))
    return TrainStep(model, replace(OPTIONS, clip=clip), SPECIAL, dtype, seed, **settings)


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


def gradients(step: TrainStep) -> dict[str, torch.Tensor]:
    """Those accumulated so far, copied."""
    return {name: view.clone() for name, view in step.weights.by_name(step.weights.gradient).items()}


def snapshot(step: TrainStep) -> dict[str, torch.Tensor]:
    """Everything that an update may change, but for the loss scale, copied."""
    tensors = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    tensors |= {name: tensor.clone() for name, tensor in step.optimizer.tensors().items()}
    if step.weights.working is not None:
        tensors["working"] = step.weights.working.clone()
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
    """One element of one weight's gradient becomes `value` with the next microbatch."""
    take = step.weights.take

    def poisoned(*arguments, **settings):
        del step.weights.take
        take(*arguments, **settings)
        step.weights.by_name(step.weights.gradient)["layers.1.mlp.0.weight"][3, 5] = value

    step.weights.take = poisoned


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


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # which has no float64
def test_four_microbatches_give_the_gradient_of_the_whole(every_third):
    parts = [make_batch(number, (12, 6, 18)) for number in range(4)]
    results = []
    for batches in (parts, [concatenate(parts)]):
        step = make_step(dtype=torch.float64)
        step._loss = step._loss.double()
        for number, batch in enumerate(batches):
            step.accumulate(batch, RATE, number, 1 / len(batches))
        results.append((gradients(step), step._loss))
        assert {tensor.dtype for tensor in results[-1][0].values()} == {torch.float64}
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
        alone.append(step._loss.clone())
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
    held, state = gradients(step), step.tensors()
    for name, parameter in model.named_parameters():
        parameter.grad = held[name].to(dtype)
        moments = {kind: state[f"{kind}.{name}"].to(dtype, copy=True) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": state["updates"].clone(), **moments}
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
        # clip_grad_norm_ adds 1e-6 to the norm, and what gradients are multiplied by is one number in fp32, summed up
        # and rounded by each in its own way: either moves the weights by that share of the update at most.
        allowed += (1e-6 / norm + torch.finfo(torch.float32).eps) * (exact[name] - before[name]).norm()
        assert error <= allowed, name


def test_the_norm_reported_is_that_before_clipping():
    step = make_step(clip=0.01)
    step.accumulate(make_batch(0), RATE, 0, 1.0)
    wanted = torch.stack([gradient.norm() for gradient in gradients(step).values()]).norm()
    # The same sums of squares in float32, in the same order.
    torch.testing.assert_close(step.update(1e-3).gradient_norm, wanted, rtol=1e-6, atol=0)


def test_weight_decay_is_on_matrices_alone():
    model = make_step().model
    step = TrainStep(model, replace(OPTIONS, weight_decay=0.5), SPECIAL, torch.float32, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # biases start at 0, where decay would not show
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert not step.weights.gradient.any()
    step.update(0.1)
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
    assert all(torch.equal(before[name], weights[name]) for name in weights)
    train(step, [1], lr=1e-3)
    assert not any(torch.equal(before[name], weights[name]) for name in weights)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("good_before", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(value, good_before):
    step = make_step(clip=0.5)
    train(step, range(good_before))
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


@pytest.mark.parametrize("poisoned", [0, 1])
def test_one_poisoned_microbatch_of_several_skips_the_whole_update(poisoned):
    step = make_step()
    train(step, [0])
    before = snapshot(step)
    for part in range(2):
        if part == poisoned:
            poison_next_gradient(step, float("nan"))
        step.accumulate(make_batch(1 + part), RATE, 1 + part, 0.5)
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
    step.loss_scale.fill_(scale)
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
    step.good_steps.fill_(1998.0)
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


@pytest.mark.parametrize("forget", [lambda step: step.update(0.0), TrainStep.reset])
@pytest.mark.parametrize("parts", [1, 3])
def test_no_gradient_is_left_after_an_update_or_reset(parts, forget):
    step, fresh = make_step(), make_step()
    for number in range(2):
        step.accumulate(make_batch(10 + number), RATE, number, 0.5)
    forget(step)
    assert step._loss == 0
    # What stays in the buffer may be anything.
    for view in step.weights.by_name(step.weights.gradient).values():
        view.fill_(torch.nan)
    for each in (step, fresh):
        for number in range(parts):
            each.accumulate(make_batch(number), RATE, number, 1 / parts)
    assert same_bits(gradients(step), gradients(fresh))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(step).values())


def test_the_gradients_of_microbatches_are_added():
    step, sums = make_step(), {}
    for number in range(3):
        step.accumulate(make_batch(number), RATE, number, 0.25)
        for name, gradient in gradients(step).items():
            sums[name] = sums.get(name, 0) + gradient.double()
        step.reset()
    for number in range(3):
        step.accumulate(make_batch(number), RATE, number, 0.25)
    scale = max(gradient.abs().max() for gradient in sums.values())
    for name, gradient in gradients(step).items():
        # One rounding of float32 a microbatch more.
        assert (gradient - sums[name]).abs().max() <= 4 * 2**-24 * scale, name


@pytest.mark.parametrize("lengths", [(7, 1, 16, 8, 5), (12, 12, 12), (4, 0, 9), (37,)])
def test_room_for_more_sequences_changes_nothing(masked, monkeypatch, lengths):
    """The boundaries are padded to a power of two of sequences: as if they were not, and as with still more."""
    results, static = [], module.StaticBatch
    for room in (None, len(lengths), 16):
        if room is not None:
            monkeypatch.setattr(
                module, "StaticBatch", lambda tokens, _, device, room=room: static(tokens, room, device)
            )
        step = make_step()
        step.accumulate(make_batch(0, lengths), RATE, 0, 1.0)
        results.append((gradients(step), step._loss))
    (padded, loss), *others = results
    assert len(masked) == 3
    for call in masked[1:]:
        assert all(torch.equal(call[name], masked[0][name]) for name in ("ids", "positions", "labels"))
    scale = max(gradient.abs().max() for gradient in padded.values())
    for theirs, their_loss in others:
        # Attention on sequences of one length goes another way, and rounds elsewhere.
        torch.testing.assert_close(loss, their_loss, rtol=2**-20, atol=0)
        for name in padded:
            assert (padded[name] - theirs[name]).abs().max() <= 2**-20 * scale, name


@pytest.mark.parametrize("sequences", range(1, 10))
def test_batches_share_their_place_by_powers_of_two(sequences):
    step, lengths = make_step(), (24 // sequences,) * (sequences - 1)
    step.accumulate(make_batch(0, (*lengths, 24 - sum(lengths))), RATE, 0, 1.0)
    ((tokens, room),) = step._batches
    assert tokens == 24
    assert room == min(size for size in (1, 2, 4, 8, 16) if size >= sequences)
    (static,) = step._batches.values()
    assert static.cu_seqlens.tolist() == [24 // sequences * i for i in range(sequences)] + [24] * (room + 1 - sequences)


def test_a_place_is_filled_anew_with_each_batch():
    """A batch of fewer sequences after one of more leaves none of them behind."""
    lengths = [(3, 4, 5, 6, 7, 8, 9, 6), (20, 8, 8, 8, 4), (6, 7, 8, 9, 9, 9)]
    step, fresh = make_step(), make_step()
    for number, each in enumerate(lengths):
        step.accumulate(make_batch(number, each), RATE, number, 1.0)
        step.update(0.0)
    assert len(step._batches) == 1
    step.accumulate(make_batch(1, lengths[1]), RATE, 1, 1.0)
    fresh.accumulate(make_batch(1, lengths[1]), RATE, 1, 1.0)
    assert same_bits(gradients(step), gradients(fresh))


def test_bfloat16_products_leave_weights_and_state_in_float32():
    step = make_step(dtype=torch.bfloat16)
    (result,) = train(step, [0])
    kept = dict(step.model.named_parameters()) | step.tensors()
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert step.weights.working.dtype == torch.bfloat16
    (in_float32,) = train(make_step(), [0])
    assert result.loss != in_float32.loss
    # bfloat16 keeps 8 bits, and errors of many products average out in the mean.
    torch.testing.assert_close(result.loss, in_float32.loss, rtol=2**-8, atol=0)


def test_the_norm_of_a_long_gradient_is_right():
    gradient = torch.randn(2**24 + 3, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
    assert norm_of(gradient).item() == pytest.approx(exact, rel=2e-6)
