"""Gram matrices layer by layer: no weight gradients but those of the update, where that costs less."""

from __future__ import annotations

from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.jacobian import BatchGradients, detached
from fastmtl.engine.layerwise.vjps import LayerwiseVJPs
from fastmtl.engine.methods.split import Split
from fastmtl.engine.regions import Regions
from fastmtl.engine.side_effects import without_side_effects
from fastmtl.engine.trees import tensors_of
from fastmtl.support.kinds import Settings, State
from fastmtl.support.profiling import part

__all__ = ["Layerwise"]


class Layerwise(Split):
    """For strategies that need the gradients for one Gram matrix only.

    Args:
        structure: What is known of the network.
        regions: The network's functions.
        comm: The other processes.
        weighs_heads: Whether the gradients of the task-specific parameters are weighted.
        vjps: The VJPs through the trunk.
    """

    only_if_cut = True

    def __init__(
        self, structure: Structure, regions: Regions, comm: Comm, weighs_heads: bool, vjps: LayerwiseVJPs
    ) -> None:
        super().__init__(structure, regions, comm, weighs_heads)
        self.vjps = vjps

    def prepare(self, batch: Batch) -> None:
        """Find out whether the network can be cut, and once which layers need no weight gradients."""
        super().prepare(batch)
        if self.vjps.plan is None and self.structure.against_cut is None:
            problem = self.problem
            with without_side_effects(problem):
                features = tensors_of(problem.trunk(batch.inputs))
                self.vjps.find(features, len(problem.tasks))
            self._follow()

    def split(self, batch: Batch) -> BatchGradients:
        """Run the forward pass, the VJPs down to the outputs of the layers, and their parts of the Gram matrix."""
        if not self.vjps.begin(batch.is_first):
            return super().split(batch)
        features, losses, preds, cotangents, task_grads = self.heads(self.trunk(batch), batch)
        with part("VJPs"):
            update = self.vjps(features, cotangents, batch.tasks)
        return BatchGradients(*detached(losses, preds), update.rows, task_grads, update)

    def _follow(self) -> None:
        """Without a layer that gains, this is the plain method."""
        plan = self.vjps.plan
        self.possible = plan is not None and bool(plan.ways)

    def _names(self) -> dict[Tensor, str]:
        return {param: name for name, param in self.problem.model.named_parameters()}

    def state_dict(self) -> State:
        """Return what a resumed run needs."""
        return self.vjps.state_dict(self._names())

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken, if the plan that was made there holds here."""
        self.vjps.load_state_dict(state, self._names())
        if self.vjps.plan is not None:
            self._follow()
