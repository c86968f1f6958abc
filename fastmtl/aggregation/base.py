"""Base classes of weightings (weights from a matrix) and aggregators (one gradient from a Jacobian)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from fastmtl.aggregation.rows import add_combined, as_matrix, gram_of
from fastmtl.engine.gradients import add_grads
from fastmtl.errors import UsageError
from fastmtl.linalg import Matrix, PSDMatrix
from fastmtl.support.classes import overrides
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.settings import Declared, Described, weighting_of
from fastmtl.support.stateful import Stateful

__all__ = [
    "Aggregator",
    "Buffered",
    "ColumnAggregator",
    "GramWeighting",
    "GramianWeightedAggregator",
    "MatrixWeighting",
    "Remembering",
    "WeightedAggregator",
    "Weighting",
]

_Stat = TypeVar("_Stat", bound=Tensor, contravariant=True)


class Weighting(Described, nn.Module, ABC, Generic[_Stat]):
    """Computes T weights from a statistic of the T gradients, usually their (T, T) Gram matrix.

    A module, so that forward hooks can read or change the weights.

    Attributes:
        takes_groups: Whether it takes the Gram matrices (L, T, T) of L groups of parameters at once, for weights
            (L, T). Else it is called for each of them.
    """

    takes_groups: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def __init_subclass__(cls, **options: Any) -> None:
        """Reset ``takes_groups`` of a base class where ``weigh`` or ``forward`` is overridden."""
        super().__init_subclass__(**options)
        if any(overrides(cls, method, "takes_groups") for method in ("weigh", "forward")):
            cls.takes_groups = False

    @abstractmethod
    def forward(self, stat: _Stat, /) -> Tensor:
        """Return the (T,) weights."""

    def __lshift__(self, function: Callable[[Any], Any]) -> Weighting[Any]:
        return _Composition(self, function)

    def __repr__(self) -> str:
        return super().__repr__() if self.settings else nn.Module.__repr__(self)


_Weighting = TypeVar("_Weighting", bound=Weighting[Any], default=Weighting[Any])


class _Composition(Weighting[Tensor]):
    """A weighting applied to a function of its input."""

    def __init__(self, weighting: Weighting[Any], function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.weighting = weighting
        self.fn = function

    def forward(self, stat: Tensor, /) -> Tensor:
        """Return the weights, in the dtype of ``stat``."""
        return self.weighting(self.fn(stat)).to(stat.dtype)


class MatrixWeighting(Declared, Weighting[Matrix]):
    """A weighting that looks at the (T, P) Jacobian.

    Attributes:
        needs_rows_only: Whether the number of rows, their dtype and their device are all it looks at.
    """

    needs_rows_only: ClassVar[bool] = True


class GramWeighting(Declared, Weighting[PSDMatrix]):
    """A weighting that solves for weights with an op, in float64 and without a graph."""

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the (T,) weights, in the dtype of ``gramian``."""
        if not len(gramian):
            return gramian.new_empty(0)
        wide = gramian.detach().to(wide_dtype(gramian.device))
        return self.weigh(wide).to(gramian.dtype)

    @abstractmethod
    def weigh(self, gram: Tensor) -> Tensor:
        """Return the (T,) weights of the rows of a float64 Gram matrix; (L, T) of L matrices if it takes groups."""


def _is_watched(module: nn.Module) -> bool:
    """Return whether the module has forward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_derived(module: nn.Module) -> bool:
    """Return whether a class outside this package overrides ``forward``, which must then be called."""
    return not type(module).forward.__module__.startswith("fastmtl.")


class Aggregator(Described, nn.Module, ABC):
    """Turns a (T, P) Jacobian into one (P,) gradient."""

    @abstractmethod
    def forward(self, matrix: Matrix, /) -> Tensor:
        """Return the (P,) gradient of a (T, P) Jacobian."""

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """Return the (P,) gradient of a (T, P) Jacobian, after all hooks.

        Raises:
            UsageError: ``matrix`` does not have two dimensions.
        """
        if matrix.dim() != 2:
            raise UsageError(f"matrix must have the shape (T, P), got {tuple(matrix.shape)}.")
        return super().__call__(matrix)

    def __str__(self) -> str:
        return type(self).__name__

    def works_on_gram(self) -> bool:
        """Return whether the Gram matrix is all that this aggregator and its forward hooks need."""
        return False

    def takes_groups(self) -> bool:
        """Return whether groups of parameters can have weights of their own, each from its Gram matrix."""
        return False

    def weights_of_gram(self, gram: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the (T,) weights from the float64 Gram matrix of rows of a dtype; (L, T) from those of L groups.

        Defined where :meth:`works_on_gram`.
        """
        raise NotImplementedError

    def is_plain(self) -> bool:
        """Return whether neither a forward hook nor a derived class needs the (T, P) Jacobian."""
        return not (_is_watched(self) or _is_derived(self))

    def write(self, jacobians: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        """Aggregate the Jacobian with the columns of all ``jacobians`` and add the result to ``.grad`` of ``tensors``.

        ``jacobians`` has one of shape (T, ...) per tensor. Returns the (T,) weights, None from aggregators without.
        """
        vector = self(torch.cat([as_matrix(jacobian) for jacobian in jacobians], dim=1))
        parts = vector.split([tensor.numel() for tensor in tensors])
        add_grads(tensors, [part.reshape(tensor.shape).to(tensor) for part, tensor in zip(parts, tensors, strict=True)])
        return None


class ColumnAggregator(Aggregator):
    """An aggregator that computes each tensor's gradient from that tensor's Jacobian alone."""

    def write(self, jacobians: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        """Aggregate one tensor after the other into ``.grad``; see :meth:`Aggregator.write`."""
        if not self.is_plain():
            return super().write(jacobians, tensors)
        for jacobian, tensor in zip(jacobians, tensors, strict=True):
            add_grads([tensor], [self(as_matrix(jacobian)).reshape(tensor.shape)])
        return None


class Buffered(nn.Module, Stateful):
    """A weighting that keeps tensors from call to call, in buffers declared with ``state``.

    A call whose gradients are NaN or infinite returns such weights and leaves the state as it is.
    """

    kept: ClassVar[tuple[str, ...]]

    def begin(self, **start: Tensor) -> list[Tensor]:
        """Return the state; if there is none, or one of another shape, start from copies of these tensors."""
        kept = {name: getattr(self, name) for name in start}
        if any(old is None or old.shape != start[name].shape for name, old in kept.items()):
            self.reset()
            kept = {name: value.clone(memory_format=torch.contiguous_format) for name, value in start.items()}
        for name, old in kept.items():
            setattr(self, name, old.to(start[name]))
        return [getattr(self, name) for name in start]

    def learn(self, **new: Tensor) -> None:
        """Replace tensors of the state; if a new one has NaN or infinity, all stay as they are."""
        finite = torch.stack([value.isfinite().all() for value in new.values()]).all()
        for name, value in new.items():
            setattr(self, name, torch.where(finite, value, getattr(self, name)))

    def reset(self) -> None:
        """Forget the state: the next call starts anew."""
        for name in self.kept:
            self.register_buffer(name, None)


class Remembering(Stateful):
    """An aggregator whose weighting remembers something."""

    def reset(self) -> None:
        """Forget what the weighting remembers."""
        weighting_of(self).reset()


class WeightedAggregator(Aggregator, Generic[_Weighting]):
    """A weighted sum of the rows.

    Args:
        weighting: Makes the weights of the (T, P) Jacobian.
    """

    def __init__(self, weighting: _Weighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weighted sum, without a graph if the weights are solved for or remembered."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_solved()):
            weights: Tensor = self.weighting(matrix)
            return weights.to(matrix.dtype) @ matrix

    def is_plain(self) -> bool:
        """Return whether the weights have no forward hook either."""
        return super().is_plain() and not _is_watched(self.weighting)

    def _is_solved(self) -> bool:
        """Return whether the weights are solved for or remembered: no gradient flows through them."""
        return isinstance(self, Remembering)

    def write(self, jacobians: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        """Add the weighted sum of the rows to ``.grad``; see :meth:`Aggregator.write`."""
        if not self.is_plain():
            return self._write_watched(jacobians, tensors)
        weights = self._weights_of(jacobians)
        add_combined(tensors, jacobians, weights)
        return weights.to(torch.promote_types(jacobians[0].dtype, jacobians[-1].dtype))

    def _weights_of(self, jacobians: Sequence[Tensor]) -> Tensor:
        weighting = self.weighting
        if isinstance(weighting, MatrixWeighting) and weighting.needs_rows_only and not _is_derived(weighting):
            return weighting(torch.empty(len(jacobians[0]), 0, dtype=jacobians[0].dtype, device=jacobians[0].device))
        return weighting(torch.cat([as_matrix(jacobian) for jacobian in jacobians], dim=1))

    def _write_watched(self, jacobians: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        seen: list[Tensor] = []
        # Registered last, so that it sees what the user's hooks make of the weights.
        handle = self.weighting.register_forward_hook(lambda module, args, weights: seen.append(weights))
        try:
            super().write(jacobians, tensors)
        finally:
            handle.remove()
        return seen[-1] if seen else None


class GramianWeightedAggregator(WeightedAggregator[Weighting[Any]], Generic[_Weighting]):
    """A weighted sum of the rows with weights from their Gram matrix.

    Args:
        gramian_weighting: Makes the weights of the (T, T) Gram matrix.
    """

    def __init__(self, gramian_weighting: _Weighting) -> None:
        super().__init__(gramian_weighting << self._gram)
        self.gramian_weighting = gramian_weighting

    def _is_solved(self) -> bool:
        return isinstance(self.gramian_weighting, GramWeighting)

    def _gram(self, matrix: Tensor) -> Tensor:
        if matrix.requires_grad and torch.is_grad_enabled() and not self._is_solved():
            return matrix @ matrix.mT
        return self._shown(gram_of([matrix]), matrix.dtype)

    def _shown(self, gram: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a Gram matrix in float64 for the ops, in the rows' dtype for a user's weighting."""
        return gram if self._is_solved() else gram.to(dtype)

    def works_on_gram(self) -> bool:
        """Return whether nothing needs the (T, P) Jacobian."""
        return self.is_plain()

    def takes_groups(self) -> bool:
        """Return whether each group can have weights from its Gram matrix, and what is remembered is of each."""
        weighting = self.gramian_weighting
        remembers = any(isinstance(part, Stateful) for part in weighting.modules())
        return self.works_on_gram() and (weighting.takes_groups or not remembers)

    def weights_of_gram(self, gram: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights from the Gram matrix; see :meth:`Aggregator.weights_of_gram`."""
        weighting, shown = self.gramian_weighting, self._shown(gram, dtype)
        if gram.dim() == 2 or weighting.takes_groups:
            return weighting(shown)
        return torch.stack([weighting(matrix) for matrix in shown])

    def _weights_of(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.weights_of_gram(gram_of(jacobians), jacobians[0].dtype)
