"""Which tests run, and fixtures for every test."""

import contextlib
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch.utils import deterministic

NATIVE = torch.cuda.is_available()

with pytest.MonkeyPatch.context() as patch:
    # triton.jit decides when it decorates a kernel whether that is compiled or interpreted. Afterwards the variable is
    # as it was: on a CPU the other tests run the reference, and so do the processes they start.
    if not NATIVE:
        patch.setenv("TRITON_INTERPRET", "1")
    EMBED_FILE = importlib.import_module("cramfast.kernels.embed_kernels")
    from cramfast.kernels import Launch, embed_reference
    from cramfast.kernels.language import AVAILABLE

if not NATIVE:
    # The interpreter takes 20 ms for each token that the backward pass walks over, however many walk side by side.
    EMBED_FILE._CHUNK, EMBED_FILE._SHARE = 8, 2
    if AVAILABLE:
        importlib.import_module("quick_interpreter").quicken()

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser):
    with contextlib.suppress(ValueError):  # which bench/, collected beside this, has too
        parser.addoption(
            "--all",
            action="store_true",
            help="run the thorough tests too, twice the time; without it, only where named by -k, or in files",
        )


def pytest_configure(config):
    config.stash[_left_out] = 0


def pytest_collection_modifyitems(config, items):
    """Take the thorough tests out of `items` that nobody has named."""
    if config.option.all or config.option.keyword:
        return
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    if out := {item for item in items if item.get_closest_marker("thorough") and item.path.name not in named}:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=[*out])
        config.stash[_left_out] = len(out)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of a worker of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker collects all tests, and who reports none."""
    left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[_left_out] = max(left_out, node.config.stash[_left_out])


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash[_left_out]:
        terminalreporter.write_line(
            f"left out {count} thorough tests, twice the time with them: --all runs them, -k some"
        )


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tensors this small gain nothing from threads, and on a busy machine threads waiting for each other cost minutes.
    torch.set_num_threads(1)
    with threadpool_limits(1):  # numpy's, with which the interpreter multiplies matrices
        yield


@pytest.fixture
def reference(monkeypatch):
    """Runs the operators' references, whatever the environment says."""
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")


@pytest.fixture
def triton_kernels(monkeypatch):
    """Runs the operators' Triton kernels: on a GPU where there is one, else interpreted."""
    monkeypatch.setenv("CRAMFAST_KERNELS", "triton")
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def embed_by_reference(monkeypatch):
    """Accelerated models embed without a kernel where it would be interpreted, for as long as all layers are: for tests
    of what the layers do."""
    if not NATIVE:
        monkeypatch.setattr("cramfast.accelerated.families.embed", embed_reference)


@pytest.fixture
def poisoned():
    """Fills what torch.empty and its relatives return with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def launched(monkeypatch):
    """The name and constants of every kernel launched."""
    calls, run = [], Launch.__call__

    def record(launch, *arguments):
        calls.append((launch.kernel.fn.__name__, launch.constants))
        return run(launch, *arguments)

    monkeypatch.setattr(Launch, "__call__", record)
    return calls


@pytest.fixture
def bf16_as_on_gpus(monkeypatch):
    """Makes the interpreter round fp32 to bf16 to the nearest even, where it cuts the digits off, multiply matrices of
    bf16, whose bits it takes for integers, and prefer numbers to NaN as a minimum."""
    if NATIVE:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_rounded(values, source, target, rounding):
        if rounding is None and (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(values).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(values, source, target, rounding)

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounded)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin)
    )
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )
