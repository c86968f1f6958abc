"""Forward pass and all VJPs as one compiled graph, in place of regions with autograd between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from fastmtl.engine.context import Batch
from fastmtl.engine.gradients import TaskGradients
from fastmtl.engine.inductor import graph_errors
from fastmtl.engine.jacobian import BatchGradients, Combine, detached
from fastmtl.engine.methods.base import Method
from fastmtl.engine.model import Labels, MTLModel, Tasks
from fastmtl.engine.weights import Rows, Weights
from fastmtl.support.profiling import part

__all__ = ["Traced", "has_gradient_hooks"]


def has_gradient_hooks(model: MTLModel) -> bool:
    """Return whether parameters or modules have gradient hooks of the user's."""
    modules: Iterable[nn.Module] = model.modules()
    return any(param._backward_hooks for param in model.parameters()) or any(
        module._backward_hooks or module._backward_pre_hooks for module in modules
    )


class Traced(Method):
    """A method traced with its backward passes: one compiled graph from the inputs to all gradients.

    ``plain`` is the method to trace, without compiled functions, whose rows are gradients; ``regional`` the same with
    compiled regions, for steps with weights known beforehand and where tracing fails, which is reported.

    Attributes:
        traces: Whether tracing has not failed yet.
    """

    def __init__(self, plain: Method, regional: Method, report: Callable[[str], None]) -> None:
        regions = regional.regions.with_gradients(self._gradients)
        super().__init__(plain.structure, regions, plain.comm, plain.weighs_heads)
        self.plain = plain
        self.regional = regional
        self.report = report
        self.traces = True

    def prepare(self, batch: Batch) -> None:
        """Examine the network as the traced method does."""
        self.plain.prepare(batch)
        if self.traces and self.structure.by_backward is not None:
            self._give_up(self.structure.against_cut or "")
        if self.traces and has_gradient_hooks(self.problem.model):
            self._give_up("gradients have hooks, which a graph would not call")

    def gradients_of(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and all VJPs."""
        if self.traces:
            try:
                return self._traced(batch)
            except graph_errors() as cause:
                self._give_up(str(cause).splitlines()[0])
        return self.regional.gradients_of(batch)

    def combined(self, batch: Batch, weights: Weights) -> BatchGradients:
        """Run the forward pass and one VJP, of compiled regions."""
        return self.regional.combined(batch, weights)

    def _give_up(self, reason: str) -> None:
        self.traces = False
        self.report(f"compile: in regions, as the gradients cannot be in one graph with the rest: {reason}")

    def _traced(self, batch: Batch) -> BatchGradients:
        with part("traced"):
            losses, preds, rows, parts = self.regions.gradients(batch.inputs, batch.factor, batch.labels, batch.tasks)
        task_grads = TaskGradients(self.problem.task_params, parts, self.structure.places(batch.tasks))
        return BatchGradients(*detached(losses, preds), rows, task_grads, Combine())

    def _gradients(
        self, inputs: object, factor: Tensor | None, labels: Labels, tasks: Tasks
    ) -> tuple[Tensor, object, Rows, Sequence[Sequence[Tensor | None]]]:
        """Return losses, predictions, rows and the gradients of the task-specific parameters."""
        result = self.plain.gradients_of(Batch(inputs=inputs, labels=labels, tasks=tasks, factor=factor))
        return result.losses, result.preds, result.rows, result.task_grads.parts
