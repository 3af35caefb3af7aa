"""`cramfast.accelerate` in the ways that people train: autocast, checkpointing, torch.compile, DDP, the Trainer."""

import copy
from functools import partial

import pytest
import torch
from conftest import NATIVE
from test_accelerate import (
    BATCH,
    SETTINGS,
    TOLERANCE,
    assert_errs_at_most_twice_as_much,
    assert_same_gradients,
    assert_same_loss,
    batch_of,
    both,
    made,
    tolerance,
)
from torch import nn

import cramfast

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


@pytest.mark.parametrize("name", SETTINGS)
def test_under_autocast(name):
    """On a GPU where there is one, by the kernels."""
    device = "cuda" if NATIVE else "cpu"
    exact, given = made(name), batch_of(name)
    model, untouched = both(copy.deepcopy(exact).to(device, torch.float32))
    exact(**given).loss.backward()
    for each in (model, untouched):
        with torch.autocast(device, torch.bfloat16):
            loss = each(**{key: value.to(device) for key, value in given.items()}).loss
        loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_errs_at_most_twice_as_much(model, untouched, exact)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing(name, autocast, reentrant):
    model = made(name, dropout=0.2, dtype=torch.float32)
    cramfast.accelerate(model)
    given, gradients, repeated = batch_of(name), [], []

    def recorded(run, *arguments, inner=None):
        repeated.append(run)
        return inner(run, *arguments)

    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            for module in model.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = partial(recorded, inner=module._gradient_checkpointing_func)
        torch.manual_seed(5)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**given).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(repeated) == model.config.num_hidden_layers
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))
    model.eval()
    model(**given)
    assert len(repeated) == model.config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_under_torch_compile(name):
    model, untouched = both(made(name, num_hidden_layers=2))  # of ModernBERT, one sees all, one its neighbours
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    # After the second, tensors of any size are compiled for.
    for kind in ("right", "full", "left", "both"):
        given = batch_of(name, kind)
        assert_same_loss(compiled(**given), untouched(**given), name)
    compiled(**given).loss.backward()
    untouched(**given).loss.backward()
    assert_same_gradients(model, untouched, **tolerance(name))
    torch._dynamo.reset()


@pytest.mark.slow
def test_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, untouched = both(made("Bert"))
        wrapped, given = nn.parallel.DistributedDataParallel(model), batch_of("Bert")
        for _ in range(2):
            wrapped(**given).loss.backward()
            untouched(**given).loss.backward()
        assert_same_gradients(model, untouched, **TOLERANCE)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_under_the_trainer(head, tmp_path):
    pytest.importorskip("accelerate")
    losses = []
    for accelerated in (True, False):
        model = made("Bert", head, dtype=torch.float32)
        if accelerated:
            cramfast.accelerate(model)
        given = batch_of("Bert")
        if head != "ForMaskedLM":
            given["labels"] = torch.arange(BATCH) % 2
        rows = [{key: value[row] for key, value in given.items()} | {"unknown": 1} for row in range(BATCH)]
        options = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": True, "use_cpu": True, "seed": 0}
        settings = transformers.TrainingArguments(
            tmp_path / f"{accelerated}", report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, **options
        )
        trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert "forward" in trainer.model.__dict__
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        trainer.save_model()
        assert (tmp_path / f"{accelerated}" / "model.safetensors").exists()
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.02, atol=0)
