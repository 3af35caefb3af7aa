"""What only a GPU can show; skipped without one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cramfast.config import PRESETS, OptimizerOptions
from cramfast.data.batches import BatchBuilder, Cursor, DocumentPieces, PackedPieces, Prefetcher
from cramfast.data.shards import TokenStream
from cramfast.data.tokenizer import SpecialIds
from cramfast.kernels import mask_tokens
from cramfast.model import Bert
from cramfast.train.step import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCABULARY = 512
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, VOCABULARY))


def token_stream(tokens: int = 50_000) -> TokenStream:
    """Documents of a sequence that repeats with period 7, which a model learns within a few dozen updates."""
    ids = 5 + (np.arange(tokens) % 7) * 11
    ends = np.arange(100, tokens + 1, 100, dtype=np.uint64)
    return TokenStream([ids.astype(np.uint16)], ends)


def train_step(dtype: torch.dtype) -> TrainStep:
    torch.manual_seed(0)
    config = replace(PRESETS["cramfast-tiny"], vocab_size=VOCABULARY)
    model = Bert(config).cuda()
    return TrainStep(model, OptimizerOptions(lr=1e-3, weight_decay=0.01, clip=1.0), SPECIAL, dtype, seed=0)


@pytest.mark.parametrize("ragged", [False, True])
def test_masks_are_those_of_the_cpu(ragged):
    stream = token_stream()
    pieces = DocumentPieces(stream, 64, 0, SPECIAL.cls) if ragged else PackedPieces(stream, 64, 0)
    batch = BatchBuilder(stream, pieces, 8192, 64).build(Cursor())
    settings = {"mask_id": SPECIAL.mask, "ordinary": SPECIAL.ordinary, "seed": 3, "step": 5}
    on_cpu = mask_tokens(batch.input_ids, batch.cu_seqlens, 2048, **settings)
    on_gpu = mask_tokens(batch.input_ids.cuda(), batch.cu_seqlens.cuda(), 2048, **settings)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(cpu, gpu.cpu())


def test_prefetched_batches_are_pinned():
    stream = token_stream()
    builder = BatchBuilder(stream, PackedPieces(stream, 64, 0), 1024, 64)
    batches = Prefetcher(builder.build, Cursor(), pin=True)
    batch = batches.next()
    batches.close()
    assert batch.input_ids.is_pinned() and batch.cu_seqlens.is_pinned()
    assert torch.equal(batch.input_ids, builder.build(Cursor()).input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
def test_training_learns_in_every_dtype(dtype, ragged):
    stream, step, cursor = token_stream(), train_step(dtype), Cursor()
    pieces = DocumentPieces(stream, 64, 0, SPECIAL.cls) if ragged else PackedPieces(stream, 64, 0)
    builder, losses, skipped = BatchBuilder(stream, pieces, 4096, 64), [], 0.0
    for number in range(80):
        batch = builder.build(cursor)
        step.accumulate(batch, 0.25, number, 1.0)
        result = step.update(1e-3)
        cursor = batch.next
        losses.append(result.loss.item())
        skipped += result.skipped.item()
    assert losses[0] == pytest.approx(np.log(VOCABULARY), abs=0.5)  # a fresh model knows nothing
    assert losses[-1] < 1.0  # the period is plain to see from the unmasked neighbours
    assert skipped <= 4  # float16 may have to lower its loss scale first, the others never skip


def test_a_non_finite_gradient_changes_nothing():
    stream, step = token_stream(), train_step(torch.bfloat16)
    batch = BatchBuilder(stream, PackedPieces(stream, 64, 0), 4096, 64).build(Cursor())
    for number in range(2):
        step.accumulate(batch, 0.25, number, 1.0)
        step.update(1e-3)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.accumulate(batch, 0.25, 2, 1.0)
    step.weights.by_name(step.weights.gradient)["final_norm.weight"][0] = torch.inf
    assert step.update(1e-3).skipped.item() == 1
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())


def test_a_step_never_waits_for_the_device():
    stream, step = token_stream(), train_step(torch.bfloat16)
    batch = BatchBuilder(stream, PackedPieces(stream, 64, 0), 4096, 64).build(Cursor())
    batch = replace(batch, input_ids=batch.input_ids.pin_memory(), cu_seqlens=batch.cu_seqlens.pin_memory())
    step.accumulate(batch, 0.25, 0, 1.0)
    step.update(1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.accumulate(batch, 0.25, 1, 1.0)
        result = step.update(1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.loss)
