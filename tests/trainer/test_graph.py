"""What a broken capture leaves behind, and where the host waits: with a stand-in for the CUDA of torch 2.11."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmtl.trainer.compile.graph import CudaGraph, waits
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from tests.host_reads import no_waits
from tests.trainer.toy import loaders, make_trainer

NOT_PERMITTED = "operation not permitted when stream is capturing"
BROKEN = "operation failed due to a previous error during capture"
WAITS = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:86.)"
PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


class Machine:
    """The current stream, the generator, the allocator and the sync mode of a process."""

    def __init__(self) -> None:
        self.current = "default"
        self.sync_mode = 0
        self.capturing = self.broken = self.generator_captures = False
        self.pools: list[object] = []
        self.released: list[object] = []
        self.error_modes: list[str] = []

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def draw(self) -> None:
        """Draw an eager random number."""
        if self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def wait(self) -> None:
        """Do what `Tensor.item` does."""
        if self.capturing:
            self.broken = True
            raise RuntimeError(NOT_PERMITTED)
        if self.sync_mode:
            warnings.warn(WAITS, stacklevel=1)

    def end_allocation(self, index: int, pool: object) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def release(self, index: int, pool: object) -> None:
        self.released.append(pool)

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
        warnings.warn(PROTOTYPE, stacklevel=1)

    def stop_generator(self, state: object) -> None:
        self.generator_captures = False


def capture_of(machine: Machine) -> type:
    """Return what `torch.cuda.graph` is in torch 2.11."""

    class Capture:
        def __init__(self, graph: object, *, pool: object, stream: Any, capture_error_mode: str = "global") -> None:
            self.pool, self.stream = pool, stream
            machine.error_modes.append(capture_error_mode)

        def __enter__(self) -> None:
            self.before, machine.current = machine.current, self.stream
            machine.generator_captures = machine.capturing = True
            machine.pools.append(self.pool)

        def __exit__(self, *args: object) -> None:
            machine.capturing = False
            if machine.broken:
                raise RuntimeError(BROKEN)
            machine.pools.remove(self.pool)
            machine.generator_captures = False
            machine.current = self.before

    return Capture


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    generator = SimpleNamespace(clone_state=object, graphsafe_set_state=machine.stop_generator)
    stands_in: dict[str, Any] = {
        "Stream": lambda device: SimpleNamespace(device_index=0, wait_stream=lambda other: None),
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": machine.stream,
        "graph": capture_of(machine),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph_pool_handle": object,
        "default_generators": (generator,),
        "get_sync_debug_mode": lambda: machine.sync_mode,
        "set_sync_debug_mode": machine.set_sync_debug_mode,
    }
    for name, stand_in in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", machine.end_allocation)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", machine.release)
    return machine


def untouched(machine: Machine) -> bool:
    machine.draw()
    return machine.current == "default" and not machine.pools


def test_a_broken_capture_leaves_everything_as_it_was(machine: Machine) -> None:
    graph = CudaGraph(torch.device("cuda"))
    with pytest.raises(RuntimeError, match=NOT_PERMITTED):
        graph.capture(machine.wait)
    assert untouched(machine)
    assert len(machine.released) == 1


def test_so_does_one_whose_function_raises(machine: Machine) -> None:
    graph = CudaGraph(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        graph.capture(lambda: 1 // 0)
    assert untouched(machine)
    assert not machine.released


def test_what_is_captured_is_replayed(machine: Machine) -> None:
    graph = CudaGraph(torch.device("cuda"))
    assert graph.capture(lambda: 7) == 7
    assert untouched(machine)
    # A loader's thread may lock pages meanwhile.
    assert machine.error_modes == ["thread_local"]
    graph.replay()


def test_the_place_where_the_host_waits_is_named(machine: Machine) -> None:
    def body() -> int:
        machine.wait()
        return 7

    result, place = CudaGraph(torch.device("cuda")).watched(body)
    assert result == 7
    assert place is not None
    assert place.endswith(f"{__file__}, warnings.warn(WAITS, stacklevel=1)")
    assert machine.sync_mode == 0
    assert CudaGraph(torch.device("cuda")).watched(lambda: 7) == (7, None)


def test_other_warnings_are_heard(machine: Machine) -> None:
    def warn_and_wait() -> list[str]:
        with waits() as places:
            assert machine.sync_mode == 1
            warnings.warn("of the user's", stacklevel=1)
            machine.wait()
            machine.wait()
        return places

    machine.sync_mode = 2
    with pytest.warns(UserWarning, match="of the user's") as heard:
        places = warn_and_wait()
    assert len(heard) == 1
    assert len(places) == 2
    assert machine.sync_mode == 2


def test_the_guard_of_the_tests_does_not_fall_over_the_first_warning(machine: Machine) -> None:
    with no_waits():
        assert machine.sync_mode == 2
    assert machine.sync_mode == 0


def test_the_mode_is_put_back_where_a_step_fails(machine: Machine) -> None:
    with pytest.raises(ZeroDivisionError), waits():
        raise ZeroDivisionError
    assert machine.sync_mode == 0


@pytest.mark.parametrize("name", ["EW", "UW", "MGDA", "MoCo", "FAMO", "GradDrop", "MOML"])
def test_a_step_leaves_no_node_of_its_graph_behind(name: str) -> None:
    # What accumulates a gradient stays on the stream that it was made on, and would be the wrong one in a capture.
    trainer = make_trainer(name, rep_grad=WEIGHTINGS[name].needs == "reps")
    trainer.model.epoch = 0
    params = list(trainer.model.parameters())
    for _ in range(2):
        batch = next(iter(loaders()))
        kept = trainer.step([batch] * trainer.step.batches, StepBuffer())
        nodes = [torch.autograd.graph.get_gradient_edge(param).node for param in params]
        assert not any("old" in node.metadata for node in nodes)
        for node in nodes:
            node.metadata["old"] = True
        del nodes, node
    assert kept


def test_kept_nodes_are_seen() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    loss = param.sum()
    torch.autograd.graph.get_gradient_edge(param).node.metadata["old"] = True
    assert "old" in torch.autograd.graph.get_gradient_edge(param).node.metadata
    del loss
    assert "old" not in torch.autograd.graph.get_gradient_edge(param).node.metadata
