"""Kernels compiled side by side ahead of their work, and the rehearsal that finds out which: it leaves no trace.

Without a GPU a device is made up for the first tests, and kernels are interpreted in the others: where they do not run,
as in a rehearsal, what they would have written is poisoned.
"""

import contextlib
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
import test_finetune as finetuning
import torch
import triton

from cramfast.config import PRESETS, OptimizerOptions
from cramfast.data.batches import Batch, Cursor
from cramfast.data.tokenizer import SpecialIds
from cramfast.downstream.step import FinetuneStep
from cramfast.kernels import Launch, compiling_ahead, layer_norm
from cramfast.kernels import launch as module
from cramfast.model import Bert
from cramfast.train.step import TrainStep

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
VOCABULARY = 96
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, VOCABULARY))


# What the context does


class OnDevice:
    """As much of a tensor on a GPU as a launch looks at."""

    is_meta = False

    def __init__(self, address: int = 16):
        self.data_ptr = lambda: address
        self.get_device = lambda: 0


class Compiler:
    """Compiles nothing, for a card that is not there. Two at a time, or not at all."""

    def __init__(self, faulty=()):
        self.faulty, self.compiled, self.ran, self.threads = faulty, [], [], set()
        self._both = threading.Barrier(2)

    def compile(self, launch: Launch, target, aligned: bool = True):
        assert target == "target"
        self._both.wait(timeout=60)
        self.threads.add(threading.current_thread())
        self.compiled.append((launch.kernel, aligned))
        if launch.kernel in self.faulty:
            raise ValueError(f"{launch.kernel} does not compile")

        def run(*arguments):
            self.ran.append((launch.kernel, aligned))

        metadata = types.SimpleNamespace(global_scratch_size=0)
        return types.SimpleNamespace(run=run, function=None, packed_metadata=None, metadata=metadata)


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    compiler = Compiler()
    active = types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: "target"
    )
    monkeypatch.setattr(module, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Launch, "compile", lambda *arguments, **options: compiler.compile(*arguments, **options))
    return compiler


def some_launches(count: int) -> list[Launch]:
    return [Launch(f"kernel {number}", (torch.float32,), (), {}, 4) for number in range(count)]


def test_each_kernel_is_compiled_once_and_several_at_a_time(compiler):
    launches = some_launches(4)
    with compiling_ahead():
        for launch in 3 * launches:
            launch(7, OnDevice())
        launches[0](0, OnDevice(address=8))  # without a program there is nothing to compile
        assert compiler.compiled == []
    assert sorted(compiler.compiled) == [(launch.kernel, True) for launch in launches]
    assert len(compiler.threads) > 1 and threading.current_thread() not in compiler.threads
    assert compiler.ran == []
    for launch in launches:
        launch(7, OnDevice())
    assert compiler.ran == [(launch.kernel, True) for launch in launches]
    assert len(compiler.compiled) == 4


def test_what_is_compiled_is_left_alone_and_addresses_count(compiler):
    (launch,) = some_launches(1)
    with compiling_ahead():
        launch(1, OnDevice())
        launch(1, OnDevice(address=8))
    with compiling_ahead():
        launch(1, OnDevice())
        launch(1, OnDevice(address=24))
    assert sorted(compiler.compiled) == [("kernel 0", False), ("kernel 0", True)]


def test_launches_of_every_thread_wait(compiler):
    launches = some_launches(2)
    with compiling_ahead():
        threads = [threading.Thread(target=launch, args=(1, OnDevice())) for launch in launches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert compiler.compiled == []
    assert len(compiler.compiled) == 2 and compiler.ran == []


def test_a_kernel_gets_memory_for_its_notes_and_whom_others_named_for_that_stays():
    allocator, given = triton.runtime._allocation._allocator, []

    def run(*arguments):
        given.append((arguments, allocator.get()(48, 16, None)))

    before = allocator.get()
    module._run_with_scratch(run, torch.device("cpu"), 7, "x")
    ((arguments, memory),) = given
    assert arguments == (7, "x") and memory.nbytes == 48
    assert allocator.get() is before


def test_a_kernel_that_does_not_compile_is_an_error_at_the_end(compiler):
    launches = some_launches(2)
    compiler.faulty = ("kernel 1",)
    with pytest.raises(ValueError, match=r"^kernel 1 does not compile$"), compiling_ahead():
        for launch in launches:
            launch(1, OnDevice())
    assert len(compiler.compiled) == 2
    assert module._noted is None
    launches[0](1, OnDevice())
    assert compiler.ran == [("kernel 0", True)]


def test_an_error_inside_compiles_nothing(compiler):
    (launch,) = some_launches(1)
    with pytest.raises(torch.OutOfMemoryError), compiling_ahead():
        launch(1, OnDevice())
        raise torch.OutOfMemoryError
    assert compiler.compiled == [] and module._noted is None


@pytest.mark.usefixtures("triton_kernels", "poisoned")
def test_inside_no_kernel_writes():
    x, weight = torch.ones(3, 32, device=DEVICE), torch.ones(32, device=DEVICE, requires_grad=True)
    with compiling_ahead():
        y = layer_norm(x, weight)
        (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert y.isnan().all() and dweight.isnan().all()
    assert torch.equal(layer_norm(x, weight), torch.zeros_like(x))


# The rehearsal of pretraining


def make_step(preset: str, dtype: torch.dtype, activations="keep", optimizer="muon", graphs=True) -> TrainStep:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 1, "intermediate_size": 48}
    model = Bert(replace(PRESETS[preset], **shape)).to(DEVICE).train()
    model.activations = activations
    options = OptimizerOptions(optimizer=optimizer, lr=1e-3, muon_lr=1e-2, weight_decay=0.01, clip=1.0)
    return TrainStep(model, options, SPECIAL, dtype, 0, graphs=graphs)


def make_batch(number: int, lengths: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(*SPECIAL.ordinary, (sum(lengths),), generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(ids, ends, max(lengths), sum(n * n for n in lengths), Cursor())


RAGGED, EVEN = (9, 32, 1, 22), (64,)


def train(step: TrainStep, lengths, updates: int = 2) -> None:
    for number in range(updates):
        for part in range(2):
            step.accumulate(make_batch(2 * number + part, lengths), 0.25, 2 * number + part, 0.5)
        step.update(1e-3)


def rehearse(step: TrainStep, lengths) -> None:
    step.rehearse_microbatch(sum(lengths), len(lengths), max(lengths))


def state(step) -> dict[str, torch.Tensor]:
    """Everything that stays from one microbatch to the next, copied, and the random numbers to come."""
    names = ("loss_scale", "good_steps", "_loss", "_report", "_lr", "_share")
    tensors = {name: getattr(step, name) for name in names}
    tensors |= {name: getattr(step.weights, name) for name in ("master", "working", "gradient")}
    tensors |= {name: getattr(step.optimizer, name) for name in ("first", "second", "updates")}
    tensors["random"] = torch.cuda.get_rng_state() if NATIVE else torch.get_rng_state()
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}


def differing(left: dict, right: dict) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


CASES = [
    ("crammed-bert", torch.bfloat16, "keep", "muon", RAGGED),
    ("crammed-bert", torch.float16, "keep", "adamw", EVEN),
    ("cramfast-tiny", torch.bfloat16, "lean", "muon", EVEN),
    ("cramfast-tiny", torch.float32, "layers", "adamw", RAGGED),
    ("bert-mini", torch.float16, "layers", "muon", RAGGED),
]


@pytest.fixture
def launched(monkeypatch) -> list[tuple[Launch, bool]]:
    """What every launch was, and whether its tensors were aligned."""
    found, call = [], Launch.__call__

    def spy(self, grid, *arguments):
        if grid:
            tensors = [tensor for tensor in arguments[: len(self.pointers)] if tensor is not None]
            found.append((self, all(tensor.data_ptr() % 16 == 0 for tensor in tensors)))
        call(self, grid, *arguments)

    monkeypatch.setattr(Launch, "__call__", spy)
    return found


@pytest.fixture
def kernels_where_there_are(monkeypatch):
    """Runs Triton kernels where an operator has one for the dtype: on a GPU, else interpreted."""
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("kernels_where_there_are", "bf16_as_on_gpus", "poisoned")
@pytest.mark.parametrize(("preset", "dtype", "activations", "optimizer", "lengths"), CASES)
def test_a_rehearsal_meets_every_kernel_and_leaves_no_trace(preset, dtype, activations, optimizer, lengths, launched):
    states = []
    for rehearsed in (False, True):
        step = make_step(preset, dtype, activations, optimizer)
        step._rehearsed = activations  # not by itself
        if rehearsed:
            before = state(step)
            launched.clear()
            rehearse(step, lengths)
            # The next microbatch's takes the place of any gradient.
            assert set(differing(before, state(step))) <= {"gradient"}
            met = set(launched)
        launched.clear()
        train(step, lengths, updates=1)
        states.append(state(step))
    assert len(met) > 10 and set(launched) <= met
    assert states[0]["updates"] == 1
    assert torch.isfinite(states[0]["master"]).all()
    assert differing(*states) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rehearsal_of_references_leaves_no_trace(reference, optimizer, dtype):
    states = []
    for rehearsals in (0, 1):
        step = make_step("cramfast-tiny", dtype, optimizer=optimizer)
        train(step, RAGGED, updates=1)
        for _ in range(rehearsals):
            rehearse(step, RAGGED)
        train(step, RAGGED)
        states.append(state(step))
    assert differing(*states) == []


def test_a_rehearsal_that_fails_leaves_no_trace(reference):
    step = make_step("cramfast-tiny", torch.float32)
    train(step, RAGGED)
    before = state(step)

    def fail():
        step._loss.fill_(3.0)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        step.rehearse(fail)
    assert differing(before, state(step)) == []


@pytest.mark.parametrize("shape", [(65_536, 512, 128), (12_288, 128, 128), (2048, 32, 128), (7, 8, 3), (1, 1, 1)])
def test_it_is_of_a_few_tokens_as_sequences_have_them(monkeypatch, shape):
    tokens, sequences, longest = shape
    step, seen = make_step("cramfast-tiny", torch.float32), []
    monkeypatch.setattr(step, "_mask", lambda batch, count: None)
    monkeypatch.setattr(step, "_differentiate", lambda first, *arguments: seen.append(arguments))
    step.rehearse_microbatch(*shape)
    for ids, cu_seqlens, max_seqlen, positions, labels in seen:
        assert len(ids) * sequences == tokens * (len(cu_seqlens) - 1) and len(ids) <= 128
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(ids) and cu_seqlens.diff().max() <= longest
        assert max_seqlen == longest and len(positions) == len(labels) == len(ids)


@pytest.mark.skipif(NATIVE, reason="of a CPU")
def test_where_nothing_is_compiled_nothing_is_rehearsed(monkeypatch):
    monkeypatch.setattr(TrainStep, "rehearse", None)
    monkeypatch.setattr(FinetuneStep, "rehearse", None)
    train(make_step("cramfast-tiny", torch.float32), RAGGED)
    finetune(finetuning.make_step())


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_training_begins_with_it(launched, monkeypatch, graphs):
    states, rehearsed = [], []
    rehearse_microbatch = TrainStep.rehearse_microbatch

    def spy(self, *arguments):
        rehearse_microbatch(self, *arguments)
        rehearsed.extend(launched)
        launched.clear()

    monkeypatch.setattr(TrainStep, "rehearse_microbatch", spy)
    for without in (True, False):
        step = make_step("crammed-bert", torch.bfloat16, graphs=graphs)
        if without:
            step._rehearsed = "keep"
        launched.clear()
        train(step, EVEN, updates=4)
        states.append(state(step))
        assert graphs == (step.graphs.obstacle is None)
    assert differing(*states) == []
    assert set(launched) <= set(rehearsed)
    assert all(launch._loaded for launch, _ in rehearsed)


# The rehearsal of finetuning


def finetune(step: FinetuneStep, steps: int = 2) -> list[float]:
    batch = finetuning.batches(finetuning.make_examples(8), 8).make(np.arange(8))
    return [step(batch.pin() if NATIVE else batch, 1e-3).loss.item() for _ in range(steps)]


@pytest.mark.usefixtures("kernels_where_there_are", "bf16_as_on_gpus", "poisoned")
@pytest.mark.parametrize(("pooling", "dtype"), [("mean", torch.bfloat16), ("cls", torch.float16)])
def test_a_rehearsal_of_finetuning_leaves_no_trace(pooling, dtype, launched):
    steps = []
    for _ in range(2):
        steps.append(finetuning.make_step(dtype=dtype, pooling=pooling, dropout=0.1, graphs=False))
        steps[-1]._rehearsed = True  # not by itself
    step = steps[1]
    batch = finetuning.batches(finetuning.make_examples(8), 8).make(np.arange(8)).to(DEVICE)
    before = state(step)
    step.rehearse(lambda: step._gradient(batch))
    assert set(differing(before, state(step))) <= {"gradient"}
    met = set(launched)
    results = []
    for step in steps:
        launched.clear()
        torch.manual_seed(1)
        results.append((finetune(step), state(step)))
    assert len(met) > 10 and set(launched) <= met
    assert results[0][0] == results[1][0] and np.isfinite(results[0][0]).all()
    assert differing(results[0][1], results[1][1]) == []


@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_finetuning_begins_with_it(graphs):
    results = []
    for without in (True, False):
        step = finetuning.make_step(dtype=torch.bfloat16, dropout=0.1, graphs=graphs)
        step._rehearsed = without
        results.append((finetune(step, steps=4), state(step)))
        assert step._rehearsed
    assert results[0][0] == results[1][0]
    assert differing(results[0][1], results[1][1]) == []
