"""Entire-space multi-task model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.errors import UsageError

__all__ = ["ESMM"]


class ESMM(AbsArchitecture):
    """Entire-Space Multi-task Model: tasks that follow one another, such as click and conversion, on all impressions.

    The decoder of task k gives the logit of p_k, the probability of its step if all before were taken; the prediction
    of task k is the logit of the product ``p_1 ... p_k``: pCTR of clicks, and pCTCVR = pCTR x pCVR of conversions. So
    the label of a task is 1 where its step and all before it were taken, is known of every impression, and goes with
    ``BCELoss``; no step is trained on the rows that took the step before only. All tasks share the encoder.

    Source: Ma et al., "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate",
    SIGIR 2018. In the paper the steps share the tables alone: give the decoders layers of their own for that.
    """

    def _make_network(self) -> None:
        self.encoder = self.encoder_class()
        steps = [self.decoders[task] for task in self.task_name]
        self.decoders = nn.ModuleDict({task: _Joint(steps[: k + 1]) for k, task in enumerate(self.task_name)})

    def conditionals(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the logits of each task's own step, such as that of pCVR, by task."""
        features = self.trunk(inputs)
        return {task: self.decoders[task].steps[-1](self.branch(features, task)) for task in self.task_name}  # type: ignore[index, operator]


class _Joint(nn.Module):
    """The logit of the product of several decoders' probabilities."""

    def __init__(self, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, rep: Tensor) -> Tensor:
        """Return the logit, of the shape of the decoders' outputs, which must be one.

        With logits z_k, ``1 / prod sigmoid(z_k) - 1 = prod (1 + exp(-z_k)) - 1``, of which the logarithm is taken two
        factors at a time: nothing overflows, and nothing cancels.
        """
        joint: Tensor = self.steps[0](rep)
        for step in self.steps[1:]:
            logit = step(rep)
            if logit.shape != joint.shape:
                raise UsageError(
                    "ESMM multiplies the probabilities of its tasks, so their decoders must have outputs of one "
                    f"shape, got {tuple(joint.shape)} and {tuple(logit.shape)}."
                )
            joint = -torch.logsumexp(torch.stack([-joint, -logit, -joint - logit]), 0)
        return joint
