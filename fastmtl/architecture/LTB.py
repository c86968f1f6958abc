"""Learning to branch."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.stages import Columns
from fastmtl.errors import UsageError

__all__ = ["LTB"]


class LTB(AbsArchitecture):
    """Learning To Branch: an encoder per task, each stage of which learns to choose the task whose output it reads.

    The choice is a hard sample of a Gumbel-softmax with temperature ``E / (20 sqrt(e + 1))`` in epoch e of E; in the
    first hundredth of the epochs every stage reads the sum of all tasks' outputs. Evaluation between epochs samples
    too, as in LibMTL; a network whose ``epoch`` was never set, as after loading a checkpoint, takes the likeliest
    choices. The encoder is a ResNet of ``fastmtl.model`` or a ``fastmtl.model.StagedEncoder``. All parameters but the
    decoders' are shared, as in LibMTL.

    Source: Guo, Lee and Ulbricht, "Learning to Branch for Multi-Task Learning", ICML 2020.

    Raises:
        UsageError: The encoder is not made of stages, or every task has its own inputs.
    """

    # The epoch in training, counted from 0, and the number of epochs.
    epoch: int | None = None
    epochs: int | None = None

    needs_stages = True
    by_place = (r"^encoder\.resnet_layer\.\d+\.(\d+)\.", r"^encoder\.alpha$")

    def _make_network(self) -> None:
        if self.multi_input:
            raise UsageError("LTB chooses between features of one input: multi_input must be False.")
        self.encoder = _Branched(self.encoder_class, self.task_name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; each new epoch, or number of epochs, anneals the choices."""
        super().__setattr__(name, value)
        if name in ("epoch", "epochs") and self.epoch is not None and self.epochs is not None:
            cast(_Branched, self.encoder).anneal(self.epoch, self.epochs)


class _Branched(Columns):
    tau: Tensor

    def __init__(self, encoder_class: Callable[[], nn.Module], task_name: list[str]) -> None:
        super().__init__(encoder_class, task_name, "LTB")
        # Two more than stages, as in LibMTL's checkpoints; the first and the last are unused.
        self.alpha = nn.Parameter(torch.ones(len(self.resnet_layer) + 2, len(task_name), len(task_name)))
        # A tensor, so that compiled code is not recompiled in each epoch.
        self.register_buffer("tau", torch.ones(()), persistent=False)
        self.choice: Literal["likeliest", "all", "sample"] = "likeliest"

    def anneal(self, epoch: int, epochs: int) -> None:
        self.choice = "all" if epoch < epochs / 100 else "sample"
        self.tau.fill_(epochs / 20 / sqrt(epoch + 1))

    def mixtures(self) -> list[Tensor | None]:
        """Return the choice of every stage."""
        choices = self._choose()
        return [choices[i] for i in range(1, len(self.resnet_layer) + 1)]

    def _choose(self) -> Tensor:
        if self.choice == "all":
            return torch.ones_like(self.alpha)
        if self.choice == "likeliest":
            return F.one_hot(self.alpha.argmax(-1), self.alpha.shape[-1]).to(self.alpha)
        return F.gumbel_softmax(self.alpha, tau=cast(float, self.tau), hard=True)
