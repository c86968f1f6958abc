"""Losses of other kinds than `AbsLoss`: objects with ``compute_loss``, torch's own, other modules and functions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from fastmtl._loss.base import is_complete
from fastmtl.engine.graph import reached_leaves
from fastmtl.engine.trees import leaves, map_tree
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.support.kinds import Tree
from fastmtl.support.shapes import as_classes_or_shares, as_entries

__all__ = ["DelegatedLoss", "EntryLoss", "FunctionLoss", "WatchedLoss", "as_loss", "reduces_to_sum"]

_OF_ENTRIES: tuple[type[nn.Module], ...] = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
_BINARY = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.SoftMarginLoss)
_OF_CLASSES: tuple[type[nn.Module], ...] = (nn.CrossEntropyLoss, nn.NLLLoss)
_ENTRY_FUNCTIONS: Sequence[Callable[..., Any]] = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)
_BINARY_FUNCTIONS: Sequence[Callable[..., Any]] = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.soft_margin_loss,
)
_CLASS_FUNCTIONS: Sequence[Callable[..., Any]] = (F.cross_entropy, F.nll_loss)


class WatchedLoss(AbsLoss):
    """The loss of an object whose parameters may be where nobody sees them, as what a function uses."""

    trained: Callable[[], Iterable[nn.Parameter]] | None = None
    task_loss = "loss_fn"

    def watch(self, name: str, trained: Callable[[], Iterable[nn.Parameter]]) -> None:
        """Compare what the first loss depends on with the parameters that are trained.

        Args:
            name: Where the loss was given, for errors.
            trained: Returns them.
        """
        self.task_loss, self.trained = name, trained

    def watched(self, loss: Any) -> Any:
        """Return a loss; refuse the first one with a graph if it depends on parameters that nobody trains."""
        if self.trained is None or torch.compiler.is_compiling():
            return loss
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            return loss
        trained, self.trained = set(self.trained()), None
        # Parameters that are cut for several processes are put together in other ones.
        if any(hasattr(param, "to_local") for param in trained):
            return loss
        # What stands for a parameter while a graph is made is an instance too, but of another type.
        strangers = [leaf for leaf in reached_leaves([loss]) if issubclass(type(leaf), nn.Parameter)]
        shapes = [str(tuple(leaf.shape)) for leaf in strangers if leaf not in trained]
        if shapes:
            raise UsageError(
                f"{self.task_loss} depends on parameters that are not the model's, of shape {', '.join(shapes[:3])}, "
                "which would not be trained: give a module or a class derived from fastmtl.loss.AbsLoss that holds "
                "them, or let them not require gradients."
            )
        return loss


class DelegatedLoss(WatchedLoss):
    """Sums of its own for an object with ``compute_loss``: of another base class, or of an earlier task too."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.ignore_index = getattr(inner, "ignore_index", AbsLoss.ignore_index)

    @override
    def compute_loss(self, pred: Tree, gt: Tree) -> Tensor:
        loss: Tensor = self.watched(self.inner.compute_loss(pred, gt))
        return loss

    @override
    def labelled(self, gt: Tree) -> Tensor:
        known: Tensor = self.inner.labelled(gt) if hasattr(self.inner, "labelled") else super().labelled(gt)
        return known

    def divisor(self, gt: Tree) -> int | Tensor:
        """Return what the mean of a batch is divided by."""
        divisor: int | Tensor = self.inner.divisor(gt) if hasattr(self.inner, "divisor") else self.labelled(gt).sum()
        return divisor


class FunctionLoss(WatchedLoss):
    """A module, or a function of predictions and labels, that knows nothing of missing labels.

    It sees the rows that have labels. To find them, the step waits for the device, which a class derived from `AbsLoss`
    does not ask for.

    Args:
        function: Returns the mean over the rows it is called with.
        name: Where it was given, for errors.
    """

    def __init__(self, function: Callable[[Tree, Tree], Tensor], name: str) -> None:
        super().__init__()
        self.function = function
        self.name = name
        self.ignore_index = getattr(function, "ignore_index", AbsLoss.ignore_index)

    @override
    def compute_loss(self, pred: Tree, gt: Tree) -> Tensor:
        loss: Tensor = self.watched(self._of_labelled(pred, gt))
        return loss

    def _of_labelled(self, pred: Tree, gt: Tree) -> Tensor:
        if not isinstance(gt, Tensor) or not gt.dim():
            return self.function(pred, gt)
        known = self.labelled(gt)
        if known.all():
            return self.function(pred, gt)
        entries = known.reshape(len(known), -1)
        some = entries.any(1)
        if not torch.equal(some, entries.all(1)):
            raise UsageError(
                f"{self.name} is a {type(self.function).__name__}, which cannot be told of rows whose labels are there "
                "in part (NaN, or ignore_index): derive it from fastmtl.loss.AbsLoss, and average over labelled(gt)."
            )
        if not some.any():
            floats = [leaf for leaf in leaves(pred) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            return torch.stack([leaf.reshape(-1)[:0].sum() for leaf in floats]).sum()
        rows = len(gt)
        return self.function(
            map_tree(lambda leaf: leaf[some] if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) else leaf, pred),
            gt[some],
        )


class EntryLoss(AbsLoss):
    """One of torch's losses with an entry for each label: the mean, or the sum, of those whose label is there.

    Predictions and labels have the same shape, but for dimensions of 1 that only one of them has: torch would broadcast
    others. Integer labels are values, but for those of binary losses.

    Args:
        inner: What was given.
        entries: The same without the reduction.
        reduction: ``"mean"`` or ``"sum"``.
    """

    def __init__(self, inner: Any, entries: Callable[[Tree, Tree], Tensor], reduction: str) -> None:
        super().__init__()
        self.inner = inner
        self.entries = entries
        self.reduction = reduction
        if not isinstance(inner, _BINARY) and getattr(inner, "func", inner) not in _BINARY_FUNCTIONS:
            self.ignore_index = None

    @property
    def kind(self) -> str:
        """The name of torch's loss."""
        function = getattr(self.inner, "func", self.inner)
        return type(function).__name__ if isinstance(function, nn.Module) else str(function.__name__)

    @override
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        knows_all = is_complete(self, gt)
        pred, gt = as_entries(pred, gt, self.kind)
        if knows_all and gt.is_floating_point():
            values = self.entries(pred, gt)
            return values.sum() if self.reduction == "sum" else values.mean()
        known = self.labelled(gt)
        filled = torch.where(known, gt, 0)
        values = self.entries(pred, filled if gt.is_floating_point() else filled.to(pred.dtype))
        known = known.expand_as(values)
        return self._reduced(torch.where(known, values, 0).sum(), known.sum())

    def _reduced(self, total: Tensor, divisor: Tensor) -> Tensor:
        return total if self.reduction == "sum" else total / torch.where(divisor == 0, 1, divisor)


class _ClassLoss(EntryLoss):
    """Torch's cross-entropy, of logits or log-probabilities ``(batch, classes, ...)``."""

    marks_entries = True

    def __init__(self, inner: Any, entries: Callable[[Tree, Tree], Tensor], reduction: str) -> None:
        super().__init__(inner, entries, reduction)
        ignored = self._setting("ignore_index")
        self.ignore_index = AbsLoss.ignore_index if ignored is None else ignored
        # The weights as they were last asked for on other devices and in other dtypes: a copy to a GPU waits.
        self._moved: dict[tuple[torch.device, torch.dtype | None], tuple[Tensor, int, Tensor]] = {}

    def _setting(self, name: str) -> Tree:
        keywords = getattr(self.entries, "keywords", {})
        return keywords.get(name, getattr(self.entries, name, None))

    def _weight_on(self, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return the weights on a device, in a dtype unless it is None."""
        weight: Tensor = self._setting("weight")
        if torch.compiler.is_compiling() or (weight.device == device and dtype in (None, weight.dtype)):
            return weight.to(device, dtype)
        source, version, moved = self._moved.get((device, dtype), (None, -1, weight))
        if source is not weight or version != weight._version:
            moved = weight.to(device, dtype)
            self._moved[device, dtype] = weight, weight._version, moved
        return moved

    @override
    def labelled(self, gt: Tensor) -> Tensor:
        known = super().labelled(gt)
        return known.all(1) if gt.is_floating_point() and gt.dim() > 1 else known

    def divisor(self, gt: Tensor) -> Tensor:
        """Return the sum of the weights of the labelled entries."""
        known, weight = self.labelled(gt), self._setting("weight")
        if weight is None or gt.is_floating_point():
            return known.sum()
        return torch.where(known, self._weight_on(gt.device, None)[torch.where(known, gt.long(), 0)], 0).sum()

    @override
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        knows_all = is_complete(self, gt)
        pred, gt = as_classes_or_shares(pred, gt, self.kind)
        if knows_all and not gt.is_floating_point() and self._setting("weight") is None:
            values = self.entries(pred, gt.long())
            return values.sum() if self.reduction == "sum" else values.mean()
        known = self.labelled(gt)
        # Of integers it leaves out the missing ones by itself.
        filled = torch.where(known.unsqueeze(1), gt, 0) if gt.is_floating_point() else gt.long()
        total = torch.where(known, self._values(pred, filled), 0).sum()
        divisor = self.divisor(gt)
        return self._reduced(total, divisor.to(total.dtype) if divisor.is_floating_point() else divisor)

    def _values(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the entries, with weights of the predictions' precision, as torch asks for."""
        weight = self._setting("weight")
        if weight is None:
            return self.entries(pred, gt)
        if weight.shape != pred.shape[1:2]:
            raise UsageError(
                f"{self.kind} has weights of shape {tuple(weight.shape)}, and predictions of {pred.shape[1]} classes: "
                "it must have one for each."
            )
        single = weight.dtype == torch.float64 or not weight.is_floating_point()
        dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32 if single else None
        cast = self._weight_on(pred.device, dtype)
        if cast is weight:
            return self.entries(pred, gt)
        if isinstance(self.entries, nn.Module):
            values: Tensor = functional_call(self.entries, {"weight": cast}, (pred, gt))
            return values
        function: Callable[..., Tensor] = self.entries
        return function(pred, gt, weight=cast)


def as_loss(loss_fn: Any, name: str) -> AbsLoss:
    """Return a loss of any kind as an `AbsLoss`.

    Args:
        loss_fn: An object with ``compute_loss``; a module or function of predictions and labels that returns a scalar.
        name: Where it was given, for errors.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(loss_fn, AbsLoss):
        return loss_fn
    if not isinstance(loss_fn, type):
        if hasattr(loss_fn, "compute_loss"):
            return DelegatedLoss(loss_fn)
        if callable(loss_fn):
            _check_arguments(loss_fn, name)
            return _torch_loss(loss_fn) or FunctionLoss(loss_fn, name)
    raise UsageError(
        f"{name} must be an object of a class derived from fastmtl.loss.AbsLoss, as CELoss(), or a module or function "
        f"of predictions and labels that returns a scalar, as torch.nn.CrossEntropyLoss(); got {loss_fn!r}."
    )


def _check_arguments(loss_fn: Any, name: str) -> None:
    """Refuse what cannot be called with predictions and labels."""
    function = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        inspect.signature(function).bind(None, None)
    except ValueError:
        # A builtin tells nothing of its arguments.
        return
    except TypeError as cause:
        raise UsageError(f"{name} cannot be called with predictions and labels: {cause}.") from cause


def _torch_loss(loss_fn: Any) -> EntryLoss | None:
    """Return one of torch's losses with its entries apart; None for anything else, or other reductions."""
    if isinstance(loss_fn, nn.Module):
        of_classes = type(loss_fn) in _OF_CLASSES
        if not of_classes and type(loss_fn) not in _OF_ENTRIES:
            return None
        module: Any = loss_fn
        # It has the same weights, wherever they are moved.
        entries = copy.copy(module)
        entries.reduction = "none"
        reduction = module.reduction
    else:
        function = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
        of_classes = function in _CLASS_FUNCTIONS
        if (not of_classes and function not in _ENTRY_FUNCTIONS) or (isinstance(loss_fn, partial) and loss_fn.args):
            return None
        keywords = loss_fn.keywords if isinstance(loss_fn, partial) else {}
        listed = {
            name: keywords[name] for name in ("weight", "pos_weight") if isinstance(keywords.get(name), list | tuple)
        }
        keywords = {**keywords, **{name: torch.tensor(values, dtype=torch.float32) for name, values in listed.items()}}
        entries = partial(function, **{**keywords, "reduction": "none"})
        reduction = keywords.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        return None
    return (_ClassLoss if of_classes else EntryLoss)(loss_fn, entries, reduction)


def reduces_to_sum(loss: AbsLoss) -> bool:
    """Return whether a loss says that it is a sum over the batch, not a mean."""
    return any(getattr(part, "reduction", None) == "sum" for part in (loss, *vars(loss).values()))
