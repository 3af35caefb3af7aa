"""Options of the benchmark suite, the fixture that measures, and what happens at the end of a run."""

import contextlib
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import pytest_benchmark
import torch

from cramfast.device import environment, pick_dtype

from . import gpu, ledger, steps, tables
from .cases import Sizes, fit
from .measure import Refused, measure
from .measure_finetune import measure_finetune
from .measure_step import measure_step
from .startup import Starter, measure_startup

_HERE = Path(__file__).parent
# Host time is taken on these: many calls in the queue, next to no work for the GPU.
_TINY = {"tokens": 64, "vocabulary": 256}
# Steps and whole runs: a row takes up to a minute, where one of an operator takes a second.
_LONG = ("step", "finetune", "accelerate", "startup")
_machine = pytest.StashKey[gpu.Gpu | None]()
_lines = pytest.StashKey[list[str]]()
_known = pytest.StashKey[dict[tuple, dict[str, float]]]()


def pytest_addoption(parser):
    group = parser.getgroup("cramfast", "cramfast's benchmarks")
    group.addoption("--tokens", type=int, default=Sizes.tokens, help="tokens in a batch (default: %(default)s)")
    group.addoption(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of activations and parameters (default: bfloat16, or float16 where the card has no bfloat16)",
    )
    group.addoption(
        "--results", type=Path, default=_HERE / "results", help="folder of the results (default: %(default)s)"
    )
    group.addoption("--revision", help="revision to record where the code does not lie in a git clone")
    with contextlib.suppress(ValueError):  # which tests/, collected beside this, has too
        group.addoption(
            "--all",
            action="store_true",
            help=f"measure {', '.join(_LONG)} too, half an hour more; without it, only where named by -k, or as files",
        )


def pytest_configure(config):
    # pytest-benchmark's table says nothing of bandwidth; ours stands at the end instead.
    config.option.benchmark_quiet = not config.option.benchmark_verbose
    config.stash[_machine] = gpu.find()
    config.stash[_lines] = []
    config.stash[_known] = {}


def pytest_collection_modifyitems(config, items):
    _leave_out_long(config, items)
    machine = config.stash[_machine]
    ours = [item for item in items if item.path.parent == _HERE]
    if machine is None and ours:
        reason = "torch finds no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        config.stash[_lines].append(f"bench: skipped, {reason}")
    for item in ours:
        if machine is None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        else:
            item.add_marker(pytest.mark.benchmark(timer=machine.clock, disable_gc=True))


def _leave_out_long(config, items):
    """Take those of `_LONG` out of `items` that nobody has named."""
    if config.option.all or config.option.keyword:
        return
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    files = {f"test_{module}.py" for module in _LONG} - named
    if out := [item for item in items if item.path.parent == _HERE and item.path.name in files]:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)
        modules = ", ".join(dict.fromkeys(item.path.stem.removeprefix("test_") for item in out))
        config.stash[_lines].append(
            f"bench: left out {modules}, half an hour more: --all measures them, -k one of them"
        )


@pytest.fixture
def machine(request) -> gpu.Gpu:
    return request.config.stash[_machine]


@pytest.fixture
def measured(benchmark, machine, request):
    """`measured(factory, direction, peer)` measures a peer on the case that `factory` builds from the run's sizes."""

    def run(factory, direction, peer):
        missing = peer.missing()
        if missing:
            pytest.skip(missing)
        lines = request.config.stash[_lines]
        dtype, tokens = pick_dtype(machine.device, request.config.option.dtype), request.config.option.tokens
        case, sizes = fit(factory, Sizes(machine.device, dtype, tokens), machine.free_bytes)
        if sizes.tokens < tokens:
            memory = f"{machine.free_bytes / 2**30:.1f} GiB of free memory"
            note = f"{case.operator} {case.name}: {sizes.tokens:,} tokens, because {tokens:,} do not fit into {memory}"
            if note not in lines:
                lines.append(note)
        try:
            tiny = factory(replace(sizes, **_TINY))
            measure(benchmark, machine, case, tiny, direction, peer, request.config.stash[_known])
        except Refused as refusal:
            pytest.skip(str(refusal))

    yield run
    machine.release()


@pytest.fixture
def step_measured(benchmark, machine, request):
    """`step_measured(work, peer)` measures a peer's training step, the microbatch cut to what the card can hold."""

    def run(work, peer):
        missing = work.ordinary.missing() or peer.missing()
        if missing:
            pytest.skip(missing)
        options, lines = request.config.option, request.config.stash[_lines]
        fitted = steps.fit(work, options.tokens, machine.free_bytes)
        if fitted != work:
            memory = f"{machine.free_bytes / 2**30:.1f} GiB of free memory and --tokens {options.tokens}"
            note = f"{work.work}: {fitted.sequences} sequences for {work.sequences}, because of {memory}"
            if note not in lines:
                lines.append(note)
        try:
            measure_step(benchmark, machine, fitted, peer, pick_dtype(machine.device, options.dtype))
        except Refused as refusal:
            pytest.skip(str(refusal))

    yield run
    torch._dynamo.reset()  # what is compiled keeps its model
    machine.release()


@pytest.fixture
def finetune_measured(benchmark, machine, request):
    """`finetune_measured(work, peer)` measures a peer's finetuning."""

    def run(work, peer):
        missing = peer.missing()
        if missing:
            pytest.skip(missing)
        try:
            measure_finetune(benchmark, machine, work, peer, pick_dtype(machine.device, request.config.option.dtype))
        except Refused as refusal:
            pytest.skip(str(refusal))

    yield run
    machine.release()


@pytest.fixture(scope="session")
def startup_folder(tmp_path_factory) -> Path:
    """Where tokens and compiled kernels are kept from one start to the next."""
    return tmp_path_factory.mktemp("startup")


@pytest.fixture
def startup_measured(benchmark, machine, request, startup_folder):
    """`startup_measured(work)` measures how long a run takes to its first update."""

    def run(work):
        dtype = pick_dtype(machine.device, request.config.option.dtype)
        starter = Starter(work.preset, startup_folder / work.preset, ("--dtype", str(dtype).removeprefix("torch.")))
        measure_startup(benchmark, work, dtype, machine.device, starter)

    return run


def pytest_sessionfinish(session):
    """Write the modules that ran, and prepare the table of the run."""
    config = session.config
    finished = [b for b in config._benchmarksession.benchmarks if b and not b.has_error and "work" in b.extra_info]
    if not finished or config.stash[_machine] is None:
        return
    here = environment(config.stash[_machine].device)
    here["revision"] = config.option.revision or here["revision"]
    machine_info = config.hook.pytest_benchmark_generate_machine_info(config=config)
    modules: dict[str, list[dict]] = {}
    for done in finished:
        module = Path(done.fullname.split("::")[0]).stem.removeprefix("test_")
        modules.setdefault(module, []).append(done.as_dict(include_data=False))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    saved = [
        ledger.save(
            config.option.results,
            module,
            ledger.document(entries, here, machine_info, pytest_benchmark.__version__, now),
        )
        for module, entries in modules.items()
    ]
    folder = ledger.slug(here["device"])
    (device,) = (device for device in ledger.load(config.option.results) if device.folder == folder)
    ran = {(b.extra_info["work"], b.extra_info["who"], b.extra_info["dtype"]) for b in finished}
    config.stash[_lines] += [*tables.run_table(device, ran), "", *saved]


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash[_lines]:
        terminalreporter.write_line(line)
