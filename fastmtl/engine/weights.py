"""The decision of a strategy in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Row", "Rows", "Weights"]

Row = list[Tensor | None]
Rows = list[Row]


@dataclass(kw_only=True, slots=True)
class Weights:
    """The decision of a strategy in one step; all tensors stay on the device.

    Attributes:
        shared: (T,). The update of the shared parameters is ``sum_t shared_t g_t``, g_t the gradient of task t's loss;
            with several groups of parameters (L, T), with k samples (k T,).
        heads: (T,), or (k T,), weights of the task-specific parameters' gradients. A strategy that ``weighs_heads``
            gives them; for the others they are ones. With ``needs = "losses"`` everything has the weights ``shared``.
        logged: (T,). The task weights for the log; ``shared`` if None, its mean over groups.
        rows: The rows that ``shared`` combines in place of the task gradients.
        groups: The group of each shared parameter, if groups have separate weights.
        reps: Gradients of the representations, in place of their weighted ones.
        reports: Whether there are weights to report.
        gram: (T, T) Gram matrix of the rows, where one was computed, for ``max_norm`` and the log.
        max_norm: Greatest 2-norm of the shared update.
        known: (T,) booleans, False for tasks without labels in this step, which averages of weights leave out; None for
            all True.
        own_grads: Gradients of the strategy's own parameters, by name; the model's optimizer trains them.
    """

    shared: Tensor
    heads: Tensor | None = None
    logged: Tensor | None = None
    rows: Rows | None = None
    groups: Sequence[int] | None = None
    reps: Sequence[Tensor] | None = None
    reports: bool = True
    gram: Tensor | None = None
    max_norm: float | None = None
    known: Tensor | None = None
    own_grads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def reported(self) -> Tensor | None:
        """Return the (T,) task weights for the log."""
        if self.logged is not None or not self.reports:
            return self.logged
        return self.shared if self.shared.dim() == 1 else self.shared.mean(0)
