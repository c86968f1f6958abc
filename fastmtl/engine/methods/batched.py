"""All rows of the Jacobian from one backward pass through the trunk, whose operators are batched over the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.graph import batches_well
from fastmtl.engine.methods.split import Split
from fastmtl.engine.regions import Regions
from fastmtl.engine.vjp import batched_vjps
from fastmtl.engine.weights import Rows

__all__ = ["Batched"]


class Batched(Split):
    """One batched VJP of all T cotangents through the trunk, or T VJPs where it cannot be batched.

    The trunk must not be compiled, as compiled backward passes have no batching rules. ``report`` is called with the
    reason for falling back; ``convolutions`` batches those too, and ``forced`` all operators that do not gain.
    """

    only_if_cut = True

    def __init__(
        self,
        structure: Structure,
        regions: Regions,
        comm: Comm,
        weighs_heads: bool,
        report: Callable[[str], None],
        forced: bool = False,
        convolutions: bool = False,
    ) -> None:
        super().__init__(structure, regions, comm, weighs_heads)
        self.report = report
        self.forced = forced
        self.convolutions = convolutions

    def rows_of(self, features: Sequence[Tensor], cotangents: Rows, batch: Batch) -> Rows:
        """Return one row per cotangent: views of (T, ...) gradients."""
        if self.possible and not self.forced and not batches_well(features, self.convolutions):
            self._give_up("the trunk has operators that do not gain")
        if self.possible:
            try:
                return batched_vjps(features, cotangents, self.problem.shared_params)
            except RuntimeError as cause:
                self._give_up(str(cause).splitlines()[0])
        return super().rows_of(features, cotangents, batch)

    def _give_up(self, reason: str) -> None:
        self.possible = False
        self.report(f"vjps: one after the other, as they cannot be batched: {reason}")
