"""DSelect-k."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from fastmtl.architecture.experts import IMG_SIZE, mix
from fastmtl.architecture.MMoE import MMoE
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper

__all__ = ["DSelect_k"]


class DSelect_k(MMoE):
    """DSelect-k: MMoE whose gates select at most k experts, by binary codes that are learned through smooth steps.

    Each of k single-expert selectors encodes an expert's number in ``ceil(log2 E)`` bits ``s(z) = S(V_t z + c_t)``; S
    is 0 below ``-kgamma / 2``, 1 above ``kgamma / 2`` and the cubic between them. Expert e gets the product over the
    bits of s or 1 - s, as its number has 1 or 0 there, and ``softmax(W_t z + b_t)`` weighs the k selectors. What the
    gates read is as in ``MMoE``.

    The paper's entropy regulariser is left out: LibMTL computes it in ``forward``, but its trainer clears that gradient
    before the step.

    Source: Hazimeh et al., "DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to
    Multi-Task Learning", NeurIPS 2021.

    Raises:
        UsageError: Fewer than two experts, another hyper-parameter out of range, or neither ``img_size`` nor an encoder
            with ``feature_dim``.
    """

    hyper = {  # noqa: RUF012
        "img_size": IMG_SIZE,
        "num_experts": Hyper(type=int, default=(4,), many=True, help="Number of shared experts."),
        "num_nonzeros": Hyper(type=int, default=2, help="Number of experts that a task selects at most."),
        "kgamma": Hyper(type=float, default=1.0, help="Width of the smooth step."),
    }

    _codes: Tensor

    def _make_network(self) -> None:
        super()._make_network()
        if self.shared_experts < 2:
            raise UsageError(f"num_experts of DSelect_k must be at least 2, got {self.shared_experts}.")
        self.nonzeros, self.gamma = int(self.kwargs["num_nonzeros"]), float(self.kwargs["kgamma"])
        if self.nonzeros < 1 or not self.gamma > 0:
            raise UsageError(
                f"num_nonzeros must be at least 1 and kgamma above 0, got {self.nonzeros} and {self.gamma}."
            )
        self.bits = (self.shared_experts - 1).bit_length()
        # MMoE's gates were drawn too, so that a seed gives LibMTL's initial weights.
        self.gate_specific = None
        self._z_logits = nn.ModuleDict(
            {task: nn.Linear(self.input_size, self.nonzeros * self.bits) for task in self.task_name}
        )
        self._w_logits = nn.ModuleDict({task: nn.Linear(self.input_size, self.nonzeros) for task in self.task_name})
        for logits, bound in ((self._z_logits, self.gamma / 100), (self._w_logits, 0.05)):
            for param in logits.parameters():
                nn.init.uniform_(param, -bound, bound)
        places = torch.arange(self.bits - 1, -1, -1)
        codes = (torch.arange(self.shared_experts)[:, None] >> places) % 2 == 1
        self.register_buffer("_codes", codes, persistent=False)

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the mixture of the experts that ``task`` selects."""
        return mix(features[0], self.select(self._gate_input(features), task))

    def select(self, gate_input: Tensor, task: str) -> Tensor:
        """Return (B, E) weights of the experts for a task whose gate reads (B, F)."""
        steps = self._smooth_step(self._z_logits[task](gate_input).view(-1, self.nonzeros, 1, self.bits))
        bits = torch.where(self._codes, steps, 1 - steps)
        # Tensor.prod would count zeros on the host in its backward pass.
        selected = reduce(torch.mul, bits.unbind(-1))
        return torch.einsum("bk,bke->be", self._w_logits[task](gate_input).softmax(1), selected)

    def _smooth_step(self, x: Tensor) -> Tensor:
        x = x.clamp(-self.gamma / 2, self.gamma / 2)
        return -2 / self.gamma**3 * x**3 + 3 / (2 * self.gamma) * x + 0.5
