"""Multi-gate mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import cast

from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.experts import (
    IMG_SIZE,
    Experts,
    feature_dim,
    integers,
    make_experts,
    make_gate,
    mix,
    read,
    size_of_gates,
)
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper

__all__ = ["MMoE"]


class MMoE(AbsArchitecture):
    """Multi-gate Mixture-of-Experts: E shared encoders, the experts, and one gate per task that mixes their outputs.

    ``rep_t(x) = sum_e gate_t(z)_e expert_e(x)``, ``gate_t(z) = softmax(W_t z + b_t)``. With ``img_size`` z is the
    flattened input, as in LibMTL; without, for inputs of any size such as text, the mean features over experts and
    positions. Experts that are a ``FeatureEncoder`` share its tables, whose vectors are then z, as in the paper. The
    experts are the shared parameters; gates belong to their tasks.

    Source: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD
    2018.

    Raises:
        UsageError: No expert, or neither ``img_size`` nor an encoder with ``feature_dim``.
    """

    hyper = {  # noqa: RUF012
        "img_size": IMG_SIZE,
        "num_experts": Hyper(
            type=int,
            default=(3,),
            many=True,
            help="Number of shared experts; for CGC and PLE then of each task's own, by default 1 1; for DSelect_k 4.",
        ),
    }

    def _make_network(self) -> None:
        num_experts = self.kwargs["num_experts"]
        self.shared_experts = next(iter(integers(num_experts, "num_experts")), 0)
        if self.shared_experts < 1:
            raise UsageError(f"num_experts must be at least 1, got {num_experts}.")
        experts, self.bottom = make_experts(self.encoder_class, self.shared_experts)
        self.img_size = size_of_gates(self.kwargs["img_size"], self.bottom)
        self.experts_shared = Experts(experts)
        self.input_size = prod(self.img_size) if self.img_size else feature_dim(self.experts_shared[0])
        self.gate_specific: nn.ModuleDict | None = nn.ModuleDict(
            {task: make_gate(self.input_size, self.shared_experts) for task in self.task_name}
        )

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the shared experts' outputs (E, B, ...), and the inputs where gates read them."""
        inputs = self.bottom(inputs)
        reps = self.experts_shared(inputs)
        return (reps, inputs) if self.img_size else (reps,)

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the mixture of experts of ``task``."""
        gates = cast(nn.ModuleDict, self.gate_specific)
        return mix(features[0], gates[task](self._gate_input(features)))

    def _gate_input(self, features: tuple[Tensor, ...]) -> Tensor:
        return read(features[-1], features[0], self.img_size)

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the shared experts."""
        return [*self.bottom.parameters(), *self.experts_shared.parameters()]
