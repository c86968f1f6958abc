"""Single-task learning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture

__all__ = ["STL"]


class STL(AbsArchitecture):
    """Single-Task Learning: an encoder for each task, nothing shared; the baseline of the papers' delta-m.

    Trained with ``EW`` it is T independent networks in one run. The relative improvement of a multi-task run over it::

        from fastmtl.utils import count_improvement

        baseline = stl.meter.best_result["result"]  # trainers after train(); or meter.results after test()
        delta_m = count_improvement(baseline, mtl.meter.best_result["result"], weight)

    with ``weight = {task: info["weight"] for task, info in task_dict.items()}``. There are no shared parameters, so
    strategies that balance their gradients are refused.
    """

    encoder: nn.ModuleDict

    def _make_network(self) -> None:
        self.encoder = nn.ModuleDict({task: self.encoder_class() for task in self.task_name})

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the inputs: nothing is shared."""
        return (inputs,)

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the output of the task's encoder."""
        return self.encoder[task](features[0])

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return no parameters."""
        return []
