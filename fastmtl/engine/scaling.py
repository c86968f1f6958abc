"""What float16 multiplies the losses by, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl.engine.weights import Rows

__all__ = ["Scaled", "Unscaled"]


class Unscaled:
    """Losses as they are."""

    def factor(self, share: Tensor | None) -> Tensor | None:
        """Return what the losses of a batch are multiplied by, its share in the step included; None for 1."""
        return share

    def up(self, value: Tensor) -> Tensor:
        """Return a number that belongs to unscaled gradients as one of those that are there."""
        return value

    def limit(self, max_norm: float) -> float | Tensor:
        """Return the greatest norm of the gradients that are there from that of unscaled ones."""
        return max_norm

    def gram(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix of unscaled gradients from that of those that are there."""
        return gram

    def rows(self, rows: Rows) -> Rows:
        """Return unscaled rows."""
        return rows


class Scaled(Unscaled):
    """All losses are multiplied by one number on the device.

    Attributes:
        scale: The number, a scalar tensor.
    """

    scale: Tensor

    def factor(self, share: Tensor | None) -> Tensor:
        """Return the scale, times the share of the batch."""
        return self.scale if share is None else self.scale * share

    def up(self, value: Tensor) -> Tensor:
        """Multiply by the scale."""
        return value * self.scale

    def limit(self, max_norm: float) -> Tensor:
        """Multiply by the scale."""
        return max_norm * self.scale

    def gram(self, gram: Tensor) -> Tensor:
        """Divide by the square of the scale."""
        return gram / self.scale.to(gram.dtype) ** 2

    def rows(self, rows: Sequence[Sequence[Tensor | None]]) -> Rows:
        """Divide by the scale."""
        inverse = self.scale.reciprocal()
        return [[None if grad is None else grad * inverse.to(grad.dtype) for grad in row] for row in rows]
