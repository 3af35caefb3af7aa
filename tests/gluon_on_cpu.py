"""Runs Gluon kernels where Triton's interpreter cannot: their Python as it stands, with torch in place of the language.

Layouts mean nothing here, and every operation is done at once. What is left is what a kernel computes: which elements
of memory it touches, through which stage of shared memory, and in which order its partitions hand work on. Each
partition of a `warp_specialize` is a thread; a barrier that nobody completes is reported instead of waited for. One of
them can be made slow, so that whoever forgets to wait for it is ahead of it.
"""

import builtins
import math
import threading
import time
import types

import torch
import torch.nn.functional as F
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier

from cramfast.kernels import attention_hopper_parts, attention_hopper_prepare, attention_parts, language

DEADLOCK_SECONDS = 20
SLOW_SECONDS = 0.01  # at every barrier
UINT32 = object()


class Value(torch.Tensor):
    """What a kernel computes with: a tensor that knows unsigned integers and is never changed in its place."""

    __iadd__, __isub__, __imul__ = torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__

    def to(self, dtype, bitcast=False):
        if bitcast:
            return self.contiguous().view(dtype)
        return super().to(torch.int64) & 0xFFFFFFFF if dtype is UINT32 else super().to(dtype)


def value(tensor: torch.Tensor) -> Value:
    return tensor.as_subclass(Value)


class Pointer:
    """Elements of a tensor; reading and writing beyond it fails."""

    def __init__(self, elements: torch.Tensor, offset=0):
        self.elements, self.offset = elements, offset
        self.dtype = types.SimpleNamespace(element_ty=elements.dtype)

    def __add__(self, offset):
        return Pointer(self.elements, self.offset + offset)

    def _places(self, mask):
        places = torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()
        if mask is None:
            return places, torch.ones_like(places, dtype=torch.bool)
        mask = mask.as_subclass(torch.Tensor)
        places, mask = torch.broadcast_tensors(places, mask)
        return torch.where(mask, places, 0), mask

    def load(self, mask=None, other=None, **hints):
        places, mask = self._places(mask)
        assert ((places >= 0) & (places < self.elements.numel())).all()
        return value(torch.where(mask, self.elements[places], 0 if other is None else other).to(self.elements.dtype))

    def store(self, x, mask=None, **hints):
        places, mask = self._places(mask)
        assert ((places >= 0) & (places < self.elements.numel())).all()
        x = torch.as_tensor(x).as_subclass(torch.Tensor)
        assert x.dtype == self.elements.dtype or x.dtype == torch.float32
        self.elements[places[mask]] = x.expand(places.shape)[mask].to(self.elements.dtype)


class Shared:
    """Shared memory; what was never written is not a number, or no sensible one."""

    def __init__(self, memory: torch.Tensor, shape, layout=None, order=None):
        self.memory, self.shape, self.layout, self.order = memory, list(shape), layout, order
        self.dtype = memory.dtype

    def index(self, i):
        return Shared(self.memory.view(self.shape[0], -1)[i], self.shape[1:], self.layout)

    def permute(self, order):
        return Shared(self.memory, self.shape, self.layout, order)

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.memory.view(dtype), shape, layout)

    def _parts(self):
        """The memory as it lies: of rows longer than a swizzle, a part lies behind the last row of the one before."""
        *outer, rows, columns = (1, *self.shape)
        width = columns
        if isinstance(self.layout, language.gl.NVMMASharedLayout):
            width = min(columns, self.layout.swizzle_byte_width // self.dtype.itemsize)
        return self.memory.view(*outer, columns // width, rows, width).movedim(-3, -2)

    def load(self, layout=None):
        x = self._parts().reshape(self.shape)
        return value((x if self.order is None else x.permute(self.order)).clone())

    def store(self, x):
        assert x.dtype == self.dtype and list(x.shape) == self.shape and self.order is None
        parts = self._parts()
        parts.copy_(x.reshape(parts.shape))


class Barrier:
    """Completed by as many arrivals as it was made for, and by as many bytes as it was told to expect."""

    def __init__(self, failed: threading.Event):
        self.failed, self.changed = failed, threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count=0, expected=0, copied=0):
        with self.changed:
            self.pending -= count
            self.bytes += expected - copied
            assert self.pending >= 0 and self.bytes >= 0
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        deadline = time.monotonic() + DEADLOCK_SECONDS
        with self.changed:
            while not self.changed.wait_for(lambda: self.phase & 1 != parity, timeout=0.1):
                assert not self.failed.is_set() and time.monotonic() < deadline


class Descriptor:
    """A matrix of which tiles are loaded, with zeros for what is beyond it, and stored."""

    def __init__(self, base, shape, strides, block, layout):
        assert strides[1] == 1 and strides[0] * base.elements.itemsize % 16 == 0
        start, (rows, columns) = int(base.offset), (int(size) for size in shape)
        assert start * base.elements.itemsize % 16 == 0
        self.matrix, self.block = base.elements[start:].as_strided((rows, columns), strides), block

    def load(self, at, barrier, into):
        assert into.shape == list(self.block)
        (row, column), (rows, columns) = map(int, at), self.block
        part = self.matrix[row : row + rows, column : column + columns]
        into.store(F.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0])))
        barrier.arrive(copied=into.memory.nbytes)

    def store(self, at, source):
        (row, column), (rows, columns) = map(int, at), self.block
        part = self.matrix[row : row + rows, column : column + columns]
        part.copy_(source.load()[: part.shape[0], : part.shape[1]])


class Language:
    """In place of `gl` and of `tl`, for one program."""

    int8, int16, int32, int64, uint32 = torch.int8, torch.int16, torch.int32, torch.int64, UINT32
    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32
    static_range = staticmethod(range)

    def __init__(self, program: int, programs: int, warps: int, slow: int | None):
        self._program, self._programs, self._slow = program, programs, slow
        self._failed, self._of_thread = threading.Event(), threading.local()
        self._of_thread.warps, self._of_thread.slow = warps, False

    def __getattr__(self, name):  # layouts
        return getattr(language.gl, name)

    def linger(self):
        if self._of_thread.slow:
            time.sleep(SLOW_SECONDS)

    def program_id(self, axis):
        return value(torch.tensor(self._program, dtype=torch.int32))

    def num_programs(self, axis):
        return value(torch.tensor(self._programs, dtype=torch.int32))

    def num_warps(self):
        return self._of_thread.warps

    def arange(self, start, end, layout=None):
        return value(torch.arange(start, end, dtype=torch.int32))

    def zeros(self, shape, dtype, layout):
        return value(torch.zeros(shape, dtype=dtype))

    def load(self, pointer, **options):
        return pointer.load(**options)

    def store(self, pointer, x, **options):
        pointer.store(x, **options)

    def where(self, condition, x, y):
        return torch.where(torch.as_tensor(condition), torch.as_tensor(x), torch.as_tensor(y))

    def full(self, shape, number, dtype, layout):
        return value(torch.full(shape, number, dtype=dtype))

    def maximum(self, x, y):
        x = torch.as_tensor(x)
        return torch.maximum(x, torch.as_tensor(y, dtype=x.dtype))

    def minimum(self, x, y):
        x = torch.as_tensor(x)
        return torch.minimum(x, torch.as_tensor(y, dtype=x.dtype))

    def abs(self, x):
        return x.abs()

    def exp2(self, x):
        return torch.exp2(x)

    def log2(self, x):
        return torch.log2(x)

    def sum(self, x, axis):
        return x.sum(axis)

    def max(self, x, axis):
        return x.amax(axis)

    def reshape(self, x, shape):
        return x.reshape(tuple(shape))

    def permute(self, x, order):
        return x.permute(order)

    def split(self, x):
        return x[..., 0], x[..., 1]

    def join(self, x, y):
        return torch.stack((x, y), dim=-1)

    def broadcast(self, x, y):
        return torch.broadcast_tensors(x, y)

    def convert_layout(self, x, layout, assert_trivial=False):
        return x

    def allocate_shared_memory(self, dtype, shape, layout):
        if isinstance(layout, real_mbarrier.MBarrierLayout):
            barriers = [Barrier(self._failed) for _ in range(shape[0])]
            return types.SimpleNamespace(index=barriers.__getitem__)
        missing = float("nan") if dtype.is_floating_point else 99
        return Shared(torch.full((math.prod(shape),), missing, dtype=dtype), shape, layout)

    def warp_specialize(self, partitions, warps, registers):
        assert len(warps) == len(registers) == len(partitions) - 1
        errors = []

        def work(partition, function, arguments, warps):
            self._of_thread.warps, self._of_thread.slow = warps, partition == self._slow
            try:
                with torch.no_grad():  # which threads do not take over
                    function(*arguments)
            except BaseException as error:
                errors.append(error)
                self._failed.set()

        warps = (self.num_warps(), *warps)
        each = enumerate(zip(partitions, warps, strict=True))
        threads = [threading.Thread(target=work, args=(i, *partition, count)) for i, (partition, count) in each]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _product(a, b, acc, use_acc=True, is_async=False):
    a = a.load() if isinstance(a, Shared) else a
    product = a.as_subclass(torch.Tensor).float() @ b.load().as_subclass(torch.Tensor).float()
    return value(acc + product if use_acc else product)


def _translated(function, replaced: dict, done: dict):
    """`function`, and what it calls, with other globals."""
    function = getattr(function, "fn", function)
    if function not in done:
        scope = {"__builtins__": builtins}
        done[function] = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                scope[name] = _translation(function.__globals__[name], replaced, done)
    return done[function]


def _translation(thing, replaced, done):
    if id(thing) in replaced:
        return replaced[id(thing)]
    if hasattr(thing, "fn"):
        return _translated(thing, replaced, done)
    return getattr(thing, "value", thing)


def is_kept(head, start, queries, query, keys, key, dropout):
    """In place of that of the kernels, which needs 32-bit arithmetic: as arbitrary, and to be had in a test too."""
    query, key = start + queries + query, start + keys + key
    number = (query * 7919 + key * 104729 + head * 1299709).long() % 1009
    return number.as_subclass(torch.Tensor) >= 1009 * dropout


def unpack(both):
    """In place of that of the kernels, which is written in PTX."""
    return tuple((both >> bits).to(torch.int16).to(torch.float16, bitcast=True).float() for bits in (16, 0))


def where_bit(bits, bit, x, other):
    """In place of that of the kernels, which is written in PTX too."""
    return torch.where(bits & bit != 0, x, torch.as_tensor(other, dtype=x.dtype))


class Barriers:
    """In place of `mbarrier`."""

    MBarrierLayout = real_mbarrier.MBarrierLayout

    def __init__(self, gl: Language):
        self._gl = gl

    def init(self, barrier, count):
        barrier.init(count)

    def arrive(self, barrier, count):
        barrier.arrive(count)
        self._gl.linger()

    def arrive_with_copies(self, barrier, increment_count):
        """As every thread of a partition does that has made its copies."""
        self.arrive(barrier, barrier.count)

    def expect(self, barrier, bytes):
        barrier.arrive(1, expected=bytes)

    def wait(self, barrier, phase):
        self._gl.linger()
        barrier.wait(phase)


def run(kernel, programs: int, *arguments, num_warps: int = 8, slow: int | None = None, **constants) -> None:
    """As `kernel[(programs,)](*arguments, num_warps=num_warps, **constants)`, with tensors on the CPU. slow: the number
    of a partition."""
    arguments = [Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for x in arguments]
    matrices = types.SimpleNamespace(
        make_tensor_descriptor=Descriptor,
        async_copy_global_to_shared=lambda descriptor, at, barrier, into: descriptor.load(at, barrier, into),
        async_copy_shared_to_global=lambda descriptor, at, source: descriptor.store(at, source),
        store_wait=lambda pendings: None,
    )
    for program in range(programs):
        gl = Language(program, programs, num_warps, slow)
        barriers = Barriers(gl)
        copies = types.SimpleNamespace(
            async_copy_global_to_shared=lambda into, at, mask=None: into.store(at.load(mask, 0)),
            mbarrier_arrive=barriers.arrive_with_copies,
            commit_group=lambda: None,
            wait_group=lambda pending: None,
        )
        replaced = {
            id(language.gl): gl,
            id(language.tl): gl,
            id(language.mbarrier): barriers,
            id(language.async_copy): copies,
            id(language.tma): matrices,
            id(language.fence_async_shared): lambda: None,
            id(attention_parts.generator_of): lambda seed, head: head,
            id(attention_parts.is_kept): is_kept,
            id(attention_hopper_parts._where_bit): where_bit,
            id(attention_hopper_prepare._unpack): unpack,
            id(language.warpgroup_mma): _product,
            id(language.warpgroup_mma_wait): lambda pending, deps: deps[0] if len(deps) == 1 else deps,
        }
        _translated(kernel, replaced, {})(*arguments, **constants)
