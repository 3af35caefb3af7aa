"""CUDA graphs of work on static tensors: captured once for each shape, replayed with one call."""

import contextlib
from collections.abc import Callable, Hashable, Iterator

import torch

# Shapes beyond these run without a graph: each holds its kernels' parameters and takes a second to capture.
_MOST_GRAPHS = 16


class Graphs:
    """Runs work that reads and writes the same tensors every time as a CUDA graph.

    The first of all work runs once as it is, which compiles what it needs. What a graph allocates it keeps; all graphs
    share that memory, because only one runs at a time and no result stays in it.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self.obstacle: str | None = None
        """Why work runs without graphs; None: it does not."""
        if device.type != "cuda":
            self.obstacle = f"{device.type} device"
        elif not enabled:
            self.obstacle = "not asked for"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        if self.obstacle is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, of which `key` names the shapes."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif self.obstacle is not None or len(self._graphs) == _MOST_GRAPHS:
            work()
        else:
            self._first_time(key, work)

    def _first_time(self, key: Hashable, work: Callable[[], None]) -> None:
        if self._graphs:
            # What another shape has warmed up serves this one, and its memory holds this one's as well.
            if self.capture(key, work):
                self.replay(key)
            else:
                work()
            return
        self.run_aside(work)
        self.capture(key, work)

    def run_aside(self, work: Callable[[], None]) -> None:
        """Do `work` as it is, where the first of all work runs: that has the memory of this one then."""
        if self.obstacle is not None:
            work()
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:  # who cleans up after a failure does so behind what was begun
            current.wait_stream(self._stream)

    def replay(self, key: Hashable) -> None:
        """Do what was captured as `key`."""
        self._graphs[key].replay()

    def capture(self, key: Hashable, work: Callable[[], None]) -> bool:
        """Make `work`, which does not run, the graph of `key`; returns whether it can be one."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self._capturing(graph, self._pool):
                work()
        except torch.OutOfMemoryError:
            self._close_capture()
            raise
        except RuntimeError as error:
            self._close_capture()
            self.obstacle = str(error).strip().splitlines()[0]
            return False
        self._graphs[key] = graph
        return True

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph, pool=None) -> Iterator[None]:
        """Inside, work becomes the graph. Torch leaves the stream of a capture that failed in place of the current one;
        afterwards that is the one before."""
        # Relaxed: kernels used for the first time are loaded, and other threads pin memory for batches.
        capture = torch.cuda.graph(graph, pool, self._stream, capture_error_mode="relaxed")
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            yield

    def _close_capture(self) -> None:
        """Tell torch that a capture is over, which leaves one that failed open: then the allocator hands no memory back
        to the card, of graphs or not, and there are no random numbers."""
        device = self._stream.device_index
        with contextlib.suppress(RuntimeError):  # it was closed
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
        with contextlib.suppress(RuntimeError):
            something = torch.zeros(1, device=self._stream.device)
            # The generator of random numbers takes the end of the next capture for that of its own.
            with self._capturing(torch.cuda.CUDAGraph()):
                something.zero_()

    def forget(self) -> None:
        """Let go of the graphs and their memory."""
        self._graphs.clear()
        if self.obstacle is None:
            self._pool = torch.cuda.graph_pool_handle()
