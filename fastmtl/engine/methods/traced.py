"""Forward pass and all VJPs as one compiled graph, in place of regions with autograd between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastmtl.engine.gradients import OwnGradients
from fastmtl.engine.methods.routes import Pass, Route, RowsPass
from fastmtl.engine.regions import graph_errors
from fastmtl.trainer.log.profiling import part

__all__ = ["TracedRoute", "has_gradient_hooks"]


def has_gradient_hooks(model: nn.Module) -> bool:
    """Return whether something of the user's is called with gradients of parameters or modules."""
    return any(param._backward_hooks for param in model.parameters()) or any(
        module._backward_hooks or module._backward_pre_hooks for module in model.modules()
    )


class TracedRoute(Route):
    """A route traced with its backward passes, so that nothing is left to autograd, and each task's VJP is compiled.

    Args:
        plain: The route to trace, of functions that are not compiled: one that has a `RowsPass`.
        regional: The same of compiled regions: for steps with weights known beforehand, and where tracing fails.
        tell: Told why, if it does.

    Attributes:
        traces: Whether tracing has not failed yet.
    """

    def __init__(self, plain: Route, regional: Route, tell: Callable[[str], None]) -> None:
        super().__init__(plain.structure, regional.regions.with_gradients(self._gradients), plain.weighs_heads)
        self.plain = plain
        self.regional = regional
        self.tell = tell
        self.traces = True

    def prepare(self, inputs: Any, labels: Any) -> None:
        """Find out what the traced route must know."""
        self.plain.prepare(inputs, labels)
        if self.traces and has_gradient_hooks(self.problem.model):
            self._give_up("gradients have hooks, which a graph would not call")

    def differentiate(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        if self.traces:
            try:
                return self._traced(inputs, labels)
            except graph_errors() as cause:
                self._give_up(str(cause).splitlines()[0])
        return self.regional.differentiate(inputs, labels)

    def frozen(self, inputs: Any, labels: Any, shared: Tensor, heads: Tensor | None) -> Pass:
        """Run the forward pass and one VJP, of compiled regions."""
        return self.regional.frozen(inputs, labels, shared, heads)

    def _give_up(self, reason: str) -> None:
        self.traces = False
        self.tell(f"compile: in regions, as the gradients cannot be in one graph with the rest: {reason}")

    def _traced(self, inputs: Any, labels: Any) -> Pass:
        with part("traced"):
            losses, preds, rows, parts = self.regions.gradients(inputs, labels)
        own = OwnGradients(self.problem.own_params, parts, self.plain.places())
        return RowsPass(self, losses, preds, rows, own)

    def _gradients(self, inputs: Any, labels: Any) -> tuple[Any, ...]:
        """Return losses, predictions, rows and the gradients of the task-specific parameters."""
        done: Any = self.plain.differentiate(inputs, labels)
        return done.losses, done.preds, done.rows, done.own.parts
