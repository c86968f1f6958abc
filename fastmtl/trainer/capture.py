"""The whole step as one CUDA graph: captured on static inputs, replayed for every batch of the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.trainer.options import StepOptions

__all__ = ["CudaGraph", "StepCapture", "reason_against"]

Batches = Sequence[tuple[Any, Any]]
WARM = 3


def reason_against(
    model: Any, optimizer: torch.optim.Optimizer, options: StepOptions, legacy: bool, device: torch.device
) -> str | None:
    """Return why a step cannot be captured, in a few words; None if nothing known stands against it."""
    reasons = {
        f"device is {device.type}, and only CUDA has graphs": device.type != "cuda",
        "compile is on, which launches by itself": bool(options.compile),
        "tasks_per_step draws the tasks on the host": options.tasks_per_step is not None,
        "update_weights_every makes steps differ": options.update_weights_every > 1,
        "weight_momentum starts with a step of its own": options.weight_momentum > 0,
        "the strategy is written for LibMTL and runs on the host": legacy,
        "the strategy looks ahead with the learning rate of the host": model.needs == "lookahead",
        "Adagrad counts its steps on the host": isinstance(optimizer, torch.optim.Adagrad),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class CudaGraph:
    """A CUDA graph of one function.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def eagerly(self, function: Callable[[], Any]) -> Any:
        """Run a function on the stream that captures, as torch asks for before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record a function without running it; return where its results will be."""
        self._graph = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = function()
        self._graph = graph
        return result

    def replay(self) -> None:
        """Run what was recorded."""
        assert self._graph is not None
        self._graph.replay()


class StepCapture:
    """Runs a step eagerly until it is warm, then captures and replays it.

    A batch of other shapes runs eagerly. What is fixed in a graph though the host may change it, the epoch and the
    optimizer's settings, makes for a new capture. A capture that fails is not tried again.

    Args:
        model: The strategy, whose remembered tensors keep their place in memory.
        optimizer: Made capturable.
        graph: What captures.
        tell: Told what happens.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, graph: CudaGraph, tell: Callable[[str], None]
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.graph = graph
        self.tell = tell
        self.failed = False
        self.replays = 0
        self._eager = 0
        self._key: Any = None
        self._static: Batches = ()
        self._result: Any = None
        self._remembered = {name: getattr(model, name) for name in model.remembered()}

    def __call__(self, body: Callable[[Batches], Any], batches: Batches) -> Any:
        """Return what ``body(batches)`` returns, a tuple of tensors, of dictionaries of them, and None.

        The tensors of a replay are overwritten by the next one.
        """
        if self.failed or self._eager < WARM:
            self._eager += 1
            return self._eagerly(body, batches)
        layout = [(leaf.shape, leaf.dtype, leaf.stride()) for leaf in _leaves(batches)]
        key = (layout, self.model.epoch, [_settings(group) for group in self.optimizer.param_groups])
        if self._key is not None and key[0] != self._key[0]:
            return self._eagerly(body, batches)
        if key != self._key and not self._capture(body, batches, key):
            return self._eagerly(body, batches)
        for mine, given in zip(_leaves(self._static), _leaves(batches), strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        self.replays += 1
        return self._result

    def _eagerly(self, body: Callable[[Batches], Any], batches: Batches) -> Any:
        make_capturable(self.optimizer)
        result = self.graph.eagerly(lambda: body(batches))
        self._settle()
        return result

    def _capture(self, body: Callable[[Batches], Any], batches: Batches, key: Any) -> bool:
        static = _copied(batches)

        def settled() -> Any:
            result = body(static)
            self._settle()
            return result

        try:
            self._result = self.graph.capture(settled)
        except RuntimeError as cause:
            for name, value in self._remembered.items():
                setattr(self.model, name, value)
            self.optimizer.zero_grad(set_to_none=True)
            self.failed = True
            self.tell(f"cuda_graph: the step runs eagerly, as it cannot be captured: {str(cause).splitlines()[0]}")
            return False
        if self._key is None:
            self.tell("cuda_graph: captured the step")
        self._key, self._static = key, static
        return True

    def _settle(self) -> None:
        """Put what a strategy assigned to a name it remembers where the graph looks for it."""
        for name, place in self._remembered.items():
            value = getattr(self.model, name)
            if value is not place:
                place.copy_(value)
                setattr(self.model, name, place)


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer count its steps on the device, where it can choose."""
    for group in optimizer.param_groups:
        if "capturable" in group and not group["capturable"]:
            group["capturable"] = True
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(param.device)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params" and not isinstance(value, Tensor)}


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value
