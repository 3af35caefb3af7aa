"""Every kernel compiled ahead for every card, on any machine: it must fit, and nothing may spill from its registers.

The compiling happens in processes of its own: here the kernels are interpreted ones where there is no GPU.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from cramfast import kernels
from cramfast.kernels import OPERATORS, Launch, every_launch

# Shared memory that a block may have, by compute capability: CUDA C++ Programming Guide, technical specifications.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
REGISTERS_PER_MULTIPROCESSOR = 65_536
REGISTERS_PER_THREAD = 255
DTYPES = {
    90: (torch.bfloat16, torch.float32),
    80: (torch.float16, torch.bfloat16, torch.float32),
    75: (torch.float16, torch.float32),
    **dict.fromkeys((86, 89, 100, 120), (torch.bfloat16, torch.float32)),
}
PAIRS = [(card, dtype) for card in DTYPES for dtype in DTYPES[card]]
# For these cards Triton compiles a kernel to the PTX that it has for another, of which ptxas makes code of its own.
PTX_OF = {86: 80, 89: 80}
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Use:
    """What a compiled kernel takes: registers of a thread, bytes of shared memory of a block, bytes spilled."""

    kernel: str
    threads: int
    registers: int
    shared: int
    spilled: int

    def faults(self, capability: int) -> list[str]:
        """Why it does not suit cards of this compute capability; nothing if it does."""
        # Registers are handed to a warp 8 a thread at a time.
        registers = -(-self.registers // 8) * 8 * self.threads
        found = {
            f"spills {self.spilled} bytes": self.spilled > 0,
            f"takes {self.registers} registers a thread": self.registers > REGISTERS_PER_THREAD,
            f"takes {registers} registers a block": registers > REGISTERS_PER_MULTIPROCESSOR,
            f"takes {self.shared} bytes of shared memory": self.shared > SHARED_KIB[capability] * 1024,
        }
        return [f"{self.kernel} on {capability} {fault}" for fault, holds in found.items() if holds]


def compile_for(capability: int, launch: Launch, aligned: bool = True):
    return launch.compile(GPUTarget("cuda", capability, 32), aligned)


def ptx_for(capability: int, compiled) -> str:
    """The PTX of a compiled kernel as that of another card."""
    return re.sub(r"^\.target sm_\d+", f".target sm_{capability}", compiled.asm["ptx"], flags=re.MULTILINE)


def use_of(launch: Launch, capability: int, aligned: bool = True) -> Use:
    """Compiles `launch` and reads the report of ptxas, which triton prints on request."""
    log = io.StringIO()
    if capability in PTX_OF:
        compiled = compile_for(PTX_OF[capability], launch, aligned)
        backend = make_backend(GPUTarget("cuda", capability, 32))
        with contextlib.redirect_stdout(log), knobs.nvidia.scope():
            knobs.nvidia.dump_ptxas_log = True
            backend.make_cubin(ptx_for(capability, compiled), {}, backend.parse_options({}), capability)
    else:
        # A kernel from the cache would come without a report.
        with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
            compiled = compile_for(capability, launch, aligned)
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    (spills,) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    constants = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
    return Use(
        kernel=f"{launch.kernel.fn.__module__.split('.')[-1]}.{launch.kernel.__name__}({constants})",
        threads=32 * compiled.metadata.num_warps,
        registers=int(registers),
        shared=compiled.metadata.shared,
        spilled=max(map(int, spills)),
    )


@functools.cache
def catalogue(capability: int, dtype: torch.dtype) -> list[Launch]:
    """Every kernel that models of this dtype use, each once, but those that models of the card's dtypes before use too:
    what works on weights, indices or lengths is the same whatever the activations are."""
    before = DTYPES[capability][: DTYPES[capability].index(dtype)]
    known = {launch for other in before for launch in every_launch(other, capability)}
    return [launch for launch in dict.fromkeys(every_launch(dtype, capability)) if launch not in known]


@functools.cache
def chosen(capability: int, dtype: torch.dtype) -> list[Launch]:
    """Of the catalogue what no pair before has, be it in the other 16-bit dtype, and a launch of each kernel that the
    card has not met with another dtype; but only as many as bring each option of a kernel to the card in each of its
    values."""
    before = PAIRS[: PAIRS.index((capability, dtype))]
    known = {in_16_bits(launch) for pair in before for launch in catalogue(*pair)}
    on_card = [pair for pair in before if pair[0] == capability]
    met = {launch.kernel.fn for pair in on_card for launch in catalogue(*pair)}
    wanted = [launch for launch in widest(capability, dtype) if launch.kernel.fn not in met]
    new = [launch for launch in catalogue(capability, dtype) if in_16_bits(launch) not in known or launch in wanted]
    new.sort(key=tensors_of)
    brought, kept = {option for pair in on_card for launch in chosen(*pair) for option in options(launch)}, []
    for launch in reversed(new):  # the most tensors first, and the largest model
        if not options(launch) <= brought:
            brought |= options(launch)
            kept.append(launch)
    return kept


@functools.cache
def others(capability: int, dtype: torch.dtype) -> list[Launch]:
    """What `chosen` leaves out."""
    return [launch for launch in catalogue(capability, dtype) if launch not in chosen(capability, dtype)]


@functools.cache
def widest(capability: int, dtype: torch.dtype) -> list[Launch]:
    """Of each kernel the launch that takes the most tensors, of the largest model."""
    return [*{launch.kernel.fn: launch for launch in sorted(catalogue(capability, dtype), key=tensors_of)}.values()]


def in_16_bits(launch: Launch) -> tuple:
    """What tells a launch from all others but those in the other 16-bit dtype."""
    pointers = [torch.bfloat16 if dtype == torch.float16 else dtype for dtype in launch.pointers]
    constants = sorted(launch.constants.items())
    return launch.kernel.fn, *pointers, *launch.scalars, *constants, launch.num_warps, launch.max_registers


def options(launch: Launch) -> set[tuple]:
    """The kernel with each of its options."""
    found = [*enumerate((*launch.pointers, *launch.scalars)), *launch.constants.items()]
    found += [("num_warps", launch.num_warps), ("max_registers", launch.max_registers)]
    return {(launch.kernel.fn, *option) for option in found}


def tensors_of(launch: Launch) -> int:
    return sum(dtype is not None for dtype in launch.pointers)


# What the pool runs. A launch goes there as its place in a list, for kernels do not travel.


def use_in(listing, capability: int, dtype: torch.dtype, place: int, aligned: bool = True) -> Use:
    return use_of(listing(capability, dtype)[place], capability, aligned)


def use_unaligned(*where) -> Use:
    return use_in(*where, aligned=False)


def differs(listing, capability: int, dtype: torch.dtype, place: int, other: int | None = None) -> str | None:
    """The name of the kernel if its PTX for `capability` is not that for the other card."""
    launch = listing(capability, dtype)[place]
    compiled = compile_for(other or PTX_OF[capability], launch)
    same = compile_for(capability, launch).asm["ptx"] == ptx_for(capability, compiled)
    return None if same else launch.kernel.__name__


@triton.jit
def _wide_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Needs all of its values at once."""
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    tl.store(y_ptr + place, x / tl.sum(x, 0))


@triton.jit
def _turning_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    """Passes a square tile from rows to columns of threads, through shared memory."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + row * SIZE + column)
    tl.store(y_ptr + row * SIZE + column, tl.trans(x))


def use_of_bad_kernel(name: str, constants: dict[str, int], num_warps: int) -> Use:
    launch = Launch(globals()[name], (torch.float32, torch.float32), (), constants, num_warps)
    return use_of(launch, 80)


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with tempfile.TemporaryDirectory() as cache:
            patch.setenv("TRITON_CACHE_DIR", cache)
            with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as workers:
                yield workers


def size(listing, *given) -> int:
    return len(listing(*given))


def for_each(pool, work, listing, *given) -> list:
    """What `work` gives for every launch that `listing` gives."""
    futures = [pool.submit(work, listing, *given, place) for place in range(size(listing, *given))]
    assert len(futures) == pool.submit(size, listing, *given).result() > 0
    return [future.result() for future in futures]


def assert_fits(pool, listing, capability, dtype):
    uses = for_each(pool, use_in, listing, capability, dtype)
    found = [fault for use in uses for fault in use.faults(capability)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("capability", "dtype"), [pair for pair in PAIRS if chosen(*pair)])
def test_every_kernel_fits_every_card(pool, capability, dtype):
    assert_fits(pool, chosen, capability, dtype)


@pytest.mark.thorough
@pytest.mark.parametrize(("capability", "dtype"), [pair for pair in PAIRS if others(*pair)])
def test_so_does_what_fits_another_card(pool, capability, dtype):
    assert_fits(pool, others, capability, dtype)


def test_every_kernel_takes_tensors_that_start_anywhere(pool):
    uses = for_each(pool, use_unaligned, widest, 86, torch.bfloat16)
    # That is rare: it must work, but loads of single elements may cost registers beyond those there are.
    found = [fault for use in uses for fault in use.faults(86) if "spills" not in fault]
    assert not found, "\n".join(found)


# What differs from 80 on begins at some capability, so 86 has no more of it than 89.
def test_these_cards_have_the_same_ptx(pool):
    found = for_each(pool, differs, chosen, 89, torch.bfloat16)
    assert not any(found), found


def test_a_kernel_that_has_another_ptx_is_found(pool):
    names = [launch.kernel.__name__ for launch in widest(86, torch.bfloat16)]
    # It adds integers across a warp, for which cards before 80 have no instruction.
    place = names.index("_mask_kernel")
    assert pool.submit(differs, widest, 86, torch.bfloat16, place, other=75).result() == "_mask_kernel"


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_with_kernels_has_them_compiled_here(operator, monkeypatch):
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        files = {launch.kernel.fn.__module__ for launch in every_launch(dtype, 90)}
        # The weights that are updated are float32 whatever the activations are.
        computed = torch.float32 if operator in ("adamw", "muon") else dtype
        has_kernels = kernels.choose(operator, device, computed).backend == "triton"
        module = getattr(kernels, {"muon": "muon_update"}.get(operator, operator)).__module__
        assert has_kernels == any(file.startswith(module) for file in files)


def test_a_kernel_that_spills_is_found(pool):
    bad = pool.submit(use_of_bad_kernel, "_wide_kernel", {"BLOCK": 16_384}, num_warps=1).result()
    (fault,) = bad.faults(80)
    assert "_wide_kernel(BLOCK=16384) on 80 spills" in fault


def test_a_kernel_with_too_much_shared_memory_is_found(pool):
    bad = pool.submit(use_of_bad_kernel, "_turning_kernel", {"SIZE": 256}, num_warps=32).result()
    assert [fault.split(" on ")[1] for fault in bad.faults(80)] == ["80 takes 262144 bytes of shared memory"]


def test_too_many_registers_are_found():
    assert Use("k", 512, 128, 0, 0).faults(90) == []
    assert Use("k", 512, 129, 0, 0).faults(90) == ["k on 90 takes 69632 registers a block"]
    assert Use("k", 32, 256, 0, 0).faults(90) == ["k on 90 takes 256 registers a thread"]
