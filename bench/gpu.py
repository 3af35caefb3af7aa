"""The machine under measurement. Tests put a CPU in its place: an object with these attributes and methods."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_WARMUP_CALLS = 3
# What libraries keep for themselves, and more.
_WORKSPACES = 2**26


def find() -> "Gpu | None":
    """The machine to measure; None without a CUDA device."""
    return Gpu() if torch.cuda.is_available() else None


class Gpu:
    """The current CUDA device: its clock, its graphs, its allocator."""

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.free_bytes, _ = torch.cuda.mem_get_info(self.device)
        self._seconds = 0.0
        self._last: torch.cuda.Event | None = None

    def clock(self) -> float:
        """Seconds of GPU time: everything enqueued before this call is done at that time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        # elapsed_time is an fp32 count of milliseconds: steps are summed here, since one base event for the whole
        # session would leave 30 µs of resolution after five minutes.
        if self._last is not None:
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, call: Callable[[], object]) -> tuple[Callable[[], object], str]:
        """`call` warmed up, as a graph replay and "graph", or itself and "events" where it cannot be captured."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_CALLS):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            self.synchronize()
            return call, "events"
        return graph.replay, "graph"

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The most memory that one call has allocated at once, its outputs included, by PyTorch's allocator."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before

    def allocated_bytes(self) -> int:
        """What PyTorch's allocator has handed out and not got back."""
        return torch.cuda.memory_allocated(self.device)

    @contextmanager
    def limited_to(self, limit: int | None) -> Iterator[None]:
        """Within it PyTorch's allocator takes no more than `limit` bytes of the card; None: what there is."""
        if limit is None:
            yield
            return
        whole = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def release(self) -> None:
        """Hand cached memory back, so that the next case starts with what the card has."""
        if self.allocated_bytes() > _WORKSPACES:  # a search through all objects, of which a compiler leaves many
            gc.collect()
        torch.cuda.empty_cache()
