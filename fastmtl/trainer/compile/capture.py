"""The whole step as one CUDA graph: captured on static inputs, replayed for every batch of the same shapes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastmtl.engine.engine import Engine
from fastmtl.engine.model import Labels
from fastmtl.engine.trees import leaves, map_tree
from fastmtl.trainer.compile.graph import CudaGraph
from fastmtl.trainer.compile.trial import Trial
from fastmtl.trainer.optim.masking import can_be_masked, is_capturable
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.weighting import AbsWeighting

__all__ = ["CaptureTrial", "StepCapture", "make_capture", "reason_against", "run_eagerly"]

T = TypeVar("T")
Batches: TypeAlias = Sequence[tuple[object, Labels]]
# Eager steps of one layout before its capture: of the first, and of one that takes another's place. In one more it is
# seen whether the host waits for the device.
WARM, PATIENCE = 2, 9
_MOST_LAYOUTS = 16
# Captures after which their cost is weighed.
_FAIR = 3
_PLAIN = str | bytes | int | float | None


class Run(Protocol):
    """Runs the body of a step."""

    def __call__(self, body: Callable[[Batches], T], batches: Batches, whole: bool = True) -> T:
        """Return what ``body(batches)`` returns; ``whole`` is False for a step of some tasks only."""


def make_capture(
    strategy: AbsWeighting,
    optimizer: torch.optim.Optimizer,
    options: StepOptions,
    device: torch.device,
    engines: Trial[Engine],
    tell: Callable[[str], None],
) -> Run:
    """Return what runs the body of a step on its batches: as a CUDA graph, if that is asked for and can be.

    Args:
        strategy: The strategy.
        optimizer: The optimizer that will be made capturable.
        options: Checked options.
        device: Where the step runs.
        engines: The engines that are tried.
        tell: Told what happens.
    """
    if not options.cuda_graph or (options.cuda_graph == "auto" and device.type != "cuda"):
        return run_eagerly
    reason = reason_against(strategy, optimizer, options, device)
    if reason is not None:
        tell(f"cuda_graph: the step runs eagerly, as {reason}")
        return run_eagerly
    capture = StepCapture(strategy, optimizer, CudaGraph(device), tell)
    return CaptureTrial(capture, engines, tell) if options.cuda_graph == "auto" else capture


def run_eagerly(body: Callable[[Batches], T], batches: Batches, whole: bool = True) -> T:
    """Run the body of a step as it is."""
    return body(batches)


def reason_against(
    strategy: AbsWeighting, optimizer: torch.optim.Optimizer, options: StepOptions, device: torch.device
) -> str | None:
    """Return why a step cannot be captured, in a few words; None if nothing known stands against it."""
    reasons = {
        f"device is {device.type}, and only CUDA has graphs": device.type != "cuda",
        "compile is on, which launches by itself": bool(options.compile),
        "tasks_per_step draws the tasks on the host": options.tasks_per_step is not None,
        "update_weights_every makes steps differ": options.update_weights_every > 1,
        "vjps='sketch' computes the exact Gram matrix in some of the steps": options.vjps == "sketch",
        "weight_momentum starts with a step of its own": options.weight_momentum > 0,
        "the strategy is written for LibMTL and runs on the host": strategy.needs_of_step() == "backward",
        "the strategy looks ahead with the learning rate of the host": strategy.needs == "lookahead",
        f"{type(optimizer).__name__} may count its steps on the host": not is_capturable(optimizer),
        f"{type(optimizer).__name__} is told of float16 steps to leave out by the host": options.precision == "fp16"
        and not can_be_masked(optimizer),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class StepCapture:
    """Runs a step eagerly until it is warm, then captures and replays it.

    A graph is of one layout of batches: of their shapes and dtypes, and of the values of what is no tensor. Another one
    runs eagerly, unless it comes many times while that of the graph does not, and takes over. Where nearly every batch
    has a layout of its own, nothing is captured. What is fixed in a graph though the host may change it, the epoch and
    the optimizer's settings, makes for an eager step and a new capture. In the last eager step before a capture it is
    seen whether the host waits for the device: then, or if a capture fails, steps stay eager.

    Args:
        model: The strategy, whose remembered tensors keep their place in memory.
        optimizer: Made capturable.
        graph: What captures.
        tell: Told what happens.

    Attributes:
        replays: Steps that were replayed.
        replayed: Whether the last step was nothing but a replay.
        captured: Whether it was captured first.
        failed: Whether all steps to come are eager.
    """

    def __init__(
        self, model: AbsWeighting, optimizer: torch.optim.Optimizer, graph: CudaGraph, tell: Callable[[str], None]
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.graph = graph
        self.tell = tell
        self.failed = False
        self.replays = 0
        self.replayed = self.captured = False
        self._seen: Counter[str] = Counter()
        self._last: Any = None
        self._told = False
        self._layout: Any = None
        self._settings: Any = None
        self._tried: Any = None
        self._static: Batches = ()
        self._result: Any = None
        self._remembered = {name: getattr(model, name) for name in model.remembered()}

    @property
    def possible(self) -> bool:
        """Return False once steps are known to stay eager."""
        return not self.failed

    def __call__(self, body: Callable[[Batches], T], batches: Batches, whole: bool = True) -> T:
        """Return what ``body(batches)`` returns, a tree of tensors and None."""
        if not whole:
            return self.beside(body, batches)
        self.replayed = self.captured = False
        if self.failed or not self._is_due(batches):
            return self._eagerly(body, batches)
        settings = self._fixed_settings()
        is_captured = self._last == self._layout and settings == self._settings
        # A strategy may begin to train parameters of its own in an epoch: what the optimizer keeps of them would be
        # made inside the graph, and anew in every replay.
        if not is_captured and self._tried != (self._last, settings):
            return self._watched(body, batches)
        if not is_captured and not self._capture(body, batches, settings):
            return self._eagerly(body, batches)
        map_tree(_copy_into, self._static, batches)
        self.graph.replay()
        self.replays += 1
        self.replayed, self.captured = is_captured, not is_captured
        # The next replay writes where these are.
        return map_tree(_copied, self._result)

    def _is_due(self, batches: Batches) -> bool:
        """Return whether batches are of the layout of the graph, or have been of another one for long enough."""
        strange = next((leaf for leaf in leaves(batches) if not isinstance(leaf, Tensor | _PLAIN)), None)
        if strange is not None:
            self._give_up(f"batches hold a {type(strange).__name__}, not only tensors")
            return False
        layout = map_tree(_described, batches)
        other, self._last = layout != self._last and self._last is not None, layout
        if layout == self._layout:
            self._seen.clear()
            return True
        if other and not self._told:
            self._told = True
            self.tell("cuda_graph: a batch whose shapes or contents differ runs eagerly")
        self._seen[repr(layout)] += 1
        if len(self._seen) > _MOST_LAYOUTS:
            self._seen.clear()
            if self._layout is None:
                self._give_up(f"{_MOST_LAYOUTS + 1} batches differ in their shapes, or in what is no tensor")
            return False
        return self._seen[repr(layout)] > (WARM if self._layout is None else PATIENCE)

    def beside(self, body: Callable[[Batches], T], batches: Batches) -> T:
        """Run an eager step that is of no layout, between two replays."""
        self.replayed = self.captured = False
        result = body(batches)
        self._settle()
        return result

    def _eagerly(self, body: Callable[[Batches], T], batches: Batches) -> T:
        make_capturable(self.optimizer)
        result = self.graph.eagerly(lambda: body(batches))
        self._settle()
        return result

    def _watched(self, body: Callable[[Batches], T], batches: Batches) -> T:
        """Run the last eager step before a capture, which cannot be if the host waits for the device in it."""
        make_capturable(self.optimizer)
        self._tried = self._last, self._fixed_settings()
        result, place = self.graph.watched(lambda: body(batches))
        self._settle()
        if place is not None:
            self._give_up(f"the host waits for the device in {place}")
        return result

    def _give_up(self, reason: str) -> None:
        self.discard()
        self.tell(f"cuda_graph: the step runs eagerly, as {reason}")

    def discard(self) -> None:
        """Let all steps to come be eager and free what is captured."""
        self.failed = True
        self.graph.discard()
        self._static, self._result = (), None

    def _fixed_settings(self) -> list[Any]:
        """Return what a graph does not see change."""
        return [self.model.epoch, *map(_fixed, self.optimizer.param_groups)]

    def _capture(self, body: Callable[[Batches], Any], batches: Batches, settings: Any) -> bool:
        static = map_tree(_copied, batches)

        def settled() -> Any:
            result = body(static)
            self._settle()
            return result

        try:
            self._result = self.graph.capture(settled)
        except Exception as cause:
            for name, value in self._remembered.items():
                setattr(self.model, name, value)
            self.optimizer.zero_grad(set_to_none=True)
            reason = str(cause).split("\n")[0] or type(cause).__name__
            self._give_up(f"it cannot be captured: {reason}")
            return False
        if self._layout is None:
            self.tell("cuda_graph: captured the step")
        elif self._layout != self._last:
            self.tell("cuda_graph: captured the step anew, for batches of other shapes or contents")
        self._layout, self._settings, self._static = self._last, settings, static
        return True

    def _settle(self) -> None:
        """Put what a strategy assigned to a name it remembers where the graph looks for it."""
        for name, place in self._remembered.items():
            value = getattr(self.model, name)
            if value is not place:
                place.copy_(value)
                setattr(self.model, name, place)


class _Eager:
    possible = True


class CaptureTrial:
    """Runs steps eagerly and captured in turn until it is known which is faster, once the engine is settled.

    A step that is captured anew too often, as with short epochs, may lose more than its replays save: then steps are
    eager from there on.

    Args:
        capture: What runs them captured.
        engines: The engines that are tried.
        tell: Told of the decision.
    """

    def __init__(self, capture: StepCapture, engines: Trial[Engine], tell: Callable[[str], None]) -> None:
        self.capture = capture
        self.engines = engines
        ways: dict[str, _Eager | StepCapture] = {"eager": _Eager(), "captured": capture}
        self.tell = tell
        self.trial = Trial(ways, lambda message: tell(f"cuda_graph: {message}"))
        self._saved, self._captures = 0.0, 0

    def __call__(self, body: Callable[[Batches], T], batches: Batches, whole: bool = True) -> T:
        """Return what ``body(batches)`` returns."""
        if not whole:
            self.trial.leave_out()
        elif not self.capture.failed and self.engines.settled:
            if self.trial.next_engine() is self.capture:
                begin = time.perf_counter()
                result = self.capture(body, batches)
                if not self.capture.replayed:
                    self.trial.leave_out()
                if self.trial.settled:
                    self._account(time.perf_counter() - begin)
                return result
            if self.trial.settled:
                self.capture.discard()
        return self.capture.beside(body, batches)

    def _account(self, seconds: float) -> None:
        """Count what replays save and what new captures cost; stop if that is more after several of them."""
        eager, captured = self.trial.seconds["eager"], self.trial.seconds["captured"]
        self._saved += eager - captured if self.capture.replayed else min(0.0, eager - seconds)
        self._captures += self.capture.captured
        if self.capture.captured and self._captures >= _FAIR and self._saved < 0:
            self.capture.discard()
            self.tell("cuda_graph: the step runs eagerly from here on, as new captures cost more than replays save")


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer count its steps on the device, where it can choose."""
    for group in optimizer.param_groups:
        if "capturable" in group and not group["capturable"]:
            group["capturable"] = True
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(param.device)


def _fixed(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params" and not isinstance(value, Tensor)}


def _described(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _copy_into(place: Any, leaf: Any) -> None:
    if isinstance(place, Tensor):
        place.copy_(leaf, non_blocking=True)
