"""The decision of a strategy in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Row", "Rows", "Weights", "joined"]

Row = list[Tensor | None]
Rows = list[Row]


@dataclass(kw_only=True, slots=True)
class Weights:
    """The decision of a strategy in one step; all tensors stay on the device.

    Attributes:
        shared: (T,). The update of the shared parameters is ``sum_t shared_t g_t``, g_t the gradient of task t's loss;
            with several groups of parameters (L, T), with k samples (k T,).
        heads: (T,), or (k T,), weights of the task-specific parameters' gradients; with groups also (L, T), of which
            the mean counts, without those that are NaN. A strategy that ``weighs_heads`` gives them; for the others
            they are ones. With ``needs = "losses"`` everything has the weights ``shared``.
        logged: (T,), or (L, T). The task weights for the log, as means over groups; ``shared`` if None.
        rows: The rows that ``shared`` combines in place of the task gradients.
        groups: The group of each shared parameter, if groups have separate weights.
        reps: Gradients of the representations, in place of their weighted ones.
        reports: Whether there are weights to report.
        gram: (T, T) Gram matrix of the rows, where one was computed, for ``max_norm`` and the log.
        grams: (L, T, T) those of the groups, which add up to ``gram``; None without.
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
    grams: Tensor | None = None
    max_norm: float | None = None
    known: Tensor | None = None
    own_grads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def reported(self) -> Tensor | None:
        """Return the (T,) task weights for the log."""
        weights = self.by_group
        return weights if weights is None or weights.dim() == 1 else weights.mean(0)

    @property
    def by_group(self) -> Tensor | None:
        """Return the (T,), or (L, T), task weights for the log."""
        return self.shared if self.logged is None and self.reports else self.logged


def joined(parts: Sequence[Weights], places: Sequence[int]) -> Weights:
    """Return the weights of L groups of parameters from those of parts of the groups.

    Args:
        parts: Weights whose ``shared``, and all else that is of groups, are (l, T), l >= 1.
        places: The groups 0 .. L-1 that the rows of the parts are of, in their order.
    """

    def of_groups(values: Sequence[Tensor | None]) -> Tensor | None:
        rows = [row for value in values if value is not None for row in value]
        # Indices from the host would be a copy that waits.
        return torch.stack([rows[places.index(place)] for place in range(len(rows))]) if rows else None

    shared = of_groups([weights.shared for weights in parts])
    assert shared is not None
    heads, known = parts[0].heads, [weights.known for weights in parts if weights.known is not None]
    return replace(
        parts[0],
        shared=shared,
        heads=heads if heads is None or heads.dim() == 1 else of_groups([weights.heads for weights in parts]),
        logged=of_groups([weights.logged for weights in parts]),
        grams=of_groups([weights.grams for weights in parts]),
        known=torch.stack(known).all(0) if known else None,
    )
