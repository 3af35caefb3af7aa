"""Starting a Triton kernel: one object that compiles ahead for any card and starts with little host time.

`kernel[grid](...)` of Triton works out on each call which compiled version fits the arguments, which takes longer than
the small kernels here run. A `Launch` fixes types, constants and warps once, so a call only collects addresses.

Its first call compiles the kernel. Who knows what work is to come can have the kernels for it compiled side by side,
with `compiling_ahead`.
"""

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .language import ASTSource, GluonASTSource, driver, triton, triton_key

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALIGNMENT = 16
# What triton.jit goes by when it decorates the kernels.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What `compiling_ahead` is to compile, (launch, device, aligned); None outside of it.
_noted: "dict[tuple[Launch, int, bool], None] | None" = None


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything decided but its arguments.

    The kernel's parameters come in this order: tensors, whose dtypes `pointers` gives (None: that one is absent),
    scalars, whose Triton types `scalars` gives, and the compile-time `constants`. A scalar of "i32:16" is always a
    multiple of 16: the compiler then knows how addresses are aligned. max_registers: how many a thread may have;
    without a word the compiler weighs them against occupancy, and would rather spill a few bytes.
    """

    kernel: Callable
    pointers: tuple[torch.dtype | None, ...]
    scalars: tuple[str, ...]
    constants: dict[str, object]
    num_warps: int
    max_registers: int | None = None
    _loaded: dict = field(default_factory=dict, repr=False)

    def __call__(self, grid: int, *arguments) -> None:
        """Run `grid` programs on the current stream of the first tensor's device; nothing for tensors without data, nor
        inside `compiling_ahead`.

        arguments: the tensors (or None where absent), then the scalars.
        """
        tensor = arguments[0]
        if isinstance(tensor, FakeTensor) or grid == 0:
            return
        device = tensor.get_device()
        if device < 0 or _INTERPRETED:
            if not tensor.is_meta and _noted is None:
                self.kernel[(grid,)](*arguments, **self.constants, num_warps=self.num_warps)
            return
        cuda = driver.active
        if device != cuda.get_current_device():
            with torch.cuda.device(device):
                return self(grid, *arguments)
        count, bits = len(self.pointers), 0
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in arguments[:count]]
        for address in addresses:
            bits |= address or 0
        key = (device, bits % _ALIGNMENT == 0)
        if _noted is not None:
            _noted[(self, *key)] = None
            return
        run, function, metadata, constants = self._loaded.get(key) or self._load(*key)
        stream = cuda.get_current_stream(device)
        run(grid, 1, 1, stream, function, metadata, None, None, None, *addresses, *arguments[count:], *constants)

    def compile(self, target, aligned: bool = True):
        """The kernel compiled for `target`, a triton GPUTarget that need not be at hand, as a triton CompiledKernel.
        aligned: every tensor starts at a multiple of 16 bytes, which vector loads need."""
        types = [None if dtype is None else f"*{_TYPES[dtype]}" for dtype in self.pointers]
        names = self.kernel.arg_names
        absent = {name: None for name, type_ in zip(names, types, strict=False) if type_ is None}
        types = ["constexpr" if type_ is None else type_ for type_ in types]
        scalars = [scalar.partition(":") for scalar in self.scalars]
        types += [scalar for scalar, _, _ in scalars] + ["constexpr"] * len(self.constants)
        signature = dict(zip(names, types, strict=True))
        divisors = [_ALIGNMENT if aligned and dtype is not None else None for dtype in self.pointers]
        divisors += [int(divisor) if divisor else None for _, _, divisor in scalars]
        attributes = {(i,): [["tt.divisibility", divisor]] for i, divisor in enumerate(divisors) if divisor}
        as_source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = as_source(self.kernel, signature, absent | self.constants, attributes)
        options = {"num_warps": self.num_warps, "maxnreg": self.max_registers}
        return triton.compile(source, target=target, options=options)

    def _load(self, device: int, aligned: bool) -> tuple:
        with torch.cuda.device(device):
            compiled = self.compile(driver.active.get_current_target(), aligned)
            run = compiled.run  # loads the binary, which `function` needs
        if compiled.metadata.global_scratch_size > 0:
            run = functools.partial(_run_with_scratch, run, torch.device("cuda", device))
        loaded = run, compiled.function, compiled.packed_metadata, tuple(self.constants.values())
        self._loaded[device, aligned] = loaded
        return loaded


def _run_with_scratch(run: Callable, device: torch.device, *arguments) -> None:
    """`run` with memory for what the kernel writes down for itself, descriptors of tensors. Triton asks for it whoever
    was named last in this context: in a copy, so that whom others named stays."""

    def start() -> None:
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.uint8, device=device))
        run(*arguments)

    contextvars.copy_context().run(start)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, no kernel runs, in whichever thread, as backward passes have theirs: at the end those that would have run
    are compiled side by side, and loaded.

    What they would have written holds anything at all: it must not become an index, nor decide what is done next.
    Raises what a launch would.
    """
    global _noted
    _noted = noted = {}
    try:
        yield
    finally:
        _noted = None
    _side_by_side(
        functools.partial(launch._load, device, aligned)
        for launch, device, aligned in noted
        if (device, aligned) not in launch._loaded
    )


def _side_by_side(loads: Iterable[Callable]) -> None:
    """In threads: the compilers at work in a load, Triton's own and that of C for what starts a kernel, leave Python to
    others for most of their time."""
    if not (loads := list(loads)):
        return
    triton_key()  # or each of the threads works it out
    pool = ThreadPoolExecutor()
    try:
        for future in [pool.submit(load) for load in loads]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def ceil_div(a: int, b: int) -> int:
    """How many pieces of size `b` cover `a`; triton.cdiv takes longer than a launch."""
    return -(-a // b)


def size_type(whole_vectors: bool) -> str:
    """The entry for a number of elements in `Launch.scalars`. whole_vectors: it is a multiple of 16, without which a
    mask that it makes keeps every load narrow."""
    return f"i64:{_ALIGNMENT}" if whole_vectors else "i64"


def has_data(tensor: torch.Tensor) -> bool:
    """Whether there is something to compute: not for the tensors with which torch.compile finds out shapes."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def dtype_of(tensor: torch.Tensor | None) -> torch.dtype | None:
    """The entry for `tensor` in `Launch.pointers`."""
    return None if tensor is None else tensor.dtype


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each tensor laid out without gaps, as the kernels read them; a copy only where it is not already."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def aligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor`, or a copy of it where it does not start as vector loads need it: for kernels that do not without."""
    if tensor is None or not has_data(tensor) or tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone()


def capability_of(device: torch.device) -> int:
    """Compute capability of `device`, 86 for 8.6; where the interpreter stands in for a GPU, that of an H100."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs `device` runs side by side at the least; 1 where the interpreter stands in for a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


Catalogue = Callable[[torch.dtype, int], Iterable[Launch]]
_catalogues: list[Catalogue] = []


def catalogue(launches: Catalogue) -> Catalogue:
    """Decorates a function that gives the kernels of its file as the models use them, for activations of a dtype on
    cards of a compute capability (86 for 8.6)."""
    _catalogues.append(launches)
    return launches


def every_launch(dtype: torch.dtype, capability: int) -> Iterator[Launch]:
    """Every kernel of every operator as the models use it on such cards, to be compiled ahead of time."""
    for launches in _catalogues:
        yield from launches(dtype, capability)
