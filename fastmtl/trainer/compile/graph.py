"""A function as a CUDA graph, and where a function waits for the device, which keeps it from becoming one."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["CudaGraph", "waits"]

T = TypeVar("T")
# What torch's warnings begin with.
_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"


class CudaGraph:
    """A CUDA graph of one function.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        # Torch's allocator for page-locked memory goes on asking them whether a stream is captured.
        self._failed: list[torch.cuda.CUDAGraph] = []

    def eagerly(self, function: Callable[[], T]) -> T:
        """Run a function on the stream that captures, as torch asks for before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def watched(self, function: Callable[[], T]) -> tuple[T, str | None]:
        """Run a function as :meth:`eagerly` does; return its result and the first place where it waits, or None."""
        with waits() as places:
            result = self.eagerly(function)
        return result, places[0] if places else None

    def capture(self, function: Callable[[], T]) -> T:
        """Record a function without running it; return where its results will be.

        Raises:
            Exception: What kept the function from being captured; all is as it was before.
        """
        self.discard()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        first: Exception | None = None
        # Other threads, such as one that locks pages for a loader, may do what a capture forbids.
        captured = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            # Torch does not leave the stream if the end of a capture raises.
            with torch.cuda.stream(self.stream), captured:
                try:
                    result = function()
                except Exception as cause:
                    first = cause
                    raise
        except Exception as cause:
            self._recover(graph, pool)
            # The end of a capture that was broken says only that it was.
            raise first or cause from None
        self._graph = graph
        return result

    def _recover(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Undo what torch leaves of a capture whose end raises, for eager steps to go on."""
        index = self.stream.device_index
        # The generator would refuse to draw, as it still takes itself to be captured; a new state draws on from there.
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:
            return  # The capture has ended in order.
        torch._C._cuda_releasePool(index, pool)
        self._failed.append(graph)

    def replay(self) -> None:
        """Run what was recorded."""
        assert self._graph is not None
        self._graph.replay()

    def discard(self) -> None:
        """Free what was recorded, and its memory."""
        self._graph = None


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yield a list of the places where the host waits for the device, which fills; torch does not see all of them."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *rest: Any, **more: Any) -> None:
            if str(message).startswith(_WAITS):
                places.append(_place())
            else:
                show(message, *rest, **more)

        warnings.showwarning = note
        warnings.filterwarnings("ignore", _PROTOTYPE)
        warnings.filterwarnings("always", _WAITS)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _place() -> str:
    """Return the innermost line under way that is not torch's."""
    inner = (__file__, warnings.__file__, os.path.join(os.path.dirname(torch.__file__), ""))
    stack = traceback.extract_stack()
    frame = next(frame for frame in reversed(stack) if not frame.filename.startswith(inner))
    return f"line {frame.lineno} of {frame.filename}, {frame.line}"
