"""Gram matrices layer by layer in a training loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm, Local
from fastmtl.engine.layerwise.sketches import SketchedVJPs
from fastmtl.engine.layerwise.vjps import LayerwiseVJPs
from fastmtl.engine.vjp import identity_rows
from fastmtl.engine.weights import Row, Rows
from fastmtl.errors import UsageError
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.kinds import Settings, State

if TYPE_CHECKING:
    from fastmtl.engine.layerwise.update import LayerwiseUpdate

__all__ = ["Layerwise", "Sketch"]

# An error of the Gram matrix, over the norms, that is told.
_LARGE = 0.1


class Layerwise:
    """The exact Gram matrix of T losses, layer by layer, for :func:`fastmtl.balance` and :func:`fastmtl.balanced`.

    With the inputs X (n, in) of a linear or convolutional layer and the gradients D_t (n, out) of its outputs, the
    layer's part of the Gram matrix is ``<X X^T, D_s D_t^T>``, and the update's gradient ``(sum_t w_t D_t)^T X``. Where
    that costs less than T gradients ``D_t^T X`` the layer's T gradients are not computed. All other parameters are
    differentiated as ever; the results are the same up to rounding.

    The losses' graph is kept as long as the losses are: delete them before the next forward pass where memory is short.
    One object serves one model. Its first call compares the layers' gradients with autograd's, by a few more backward
    passes of random cotangents, and plans the ways of the layers; so does a call with other shared parameters.

    Example:
        >>> from torch import nn
        >>> trunk, heads = nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
        >>> layerwise = Layerwise()
        >>> features = trunk(torch.ones(2, 3))
        >>> weights = balance([head(features).square().mean() for head in heads], vjps=layerwise)
        >>> layerwise.plan
        'vjps: no layer would gain by going another way than the direct one'

    Attributes:
        plan: The plan in a few words; None before the first call.
    """

    plan: str | None = None

    def __init__(self) -> None:
        self._vjps: LayerwiseVJPs | None = None
        self._state: Settings | None = None

    def _made(self, params: Sequence[Tensor], comm: Comm) -> LayerwiseVJPs:
        if comm.shares_batches:
            raise UsageError(
                "vjps must be a fastmtl.Sketch or None with several processes: Layerwise would need the inputs of all."
            )
        return LayerwiseVJPs(params, comm, self._report)

    def _report(self, plan: str) -> None:
        self.plan = plan

    def _of(self, params: Sequence[Tensor], comm: Comm) -> LayerwiseVJPs:
        """Return the VJPs with respect to some parameters, with what is known of them."""
        vjps = self._vjps
        if vjps is None or not _serves(vjps, params, comm):
            if wide_dtype(params[0].device) != torch.float64:
                raise UsageError("vjps must be None on a device without float64.")
            vjps = self._vjps = self._made(params, comm)
            if self._state is not None:
                vjps.load_state_dict(self._state, _names(params))
        self._state = None
        vjps.comm = comm
        return vjps

    def state_dict(self) -> State:
        """Return what a resumed run needs."""
        return {} if self._vjps is None else self._vjps.state_dict(_names(self._vjps.params))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same model."""
        self._vjps, self._state = None, state


class Sketch(Layerwise):
    """An estimate of the Gram matrix of T losses from sketches of the gradients.

    In the place of a layer's T gradients ``D_t^T X`` stand ``D_t^T (X Omega^T)`` with a random matrix Omega (width, in)
    drawn anew in each call, of ``E[Omega^T Omega] = I``: the inner products are unbiased. The first call and one in
    ``check_every`` compute the exact matrix too; their update is exact, and layers whose estimates vary too much are
    left out until the next. The update is the sum of the gradients by weights that follow from the estimate.

    With several processes all need the same ``seed``, and every process must use the same layers in each call.

    Args:
        width: Rows of Omega, at least 2.
        check_every: Calls from one comparison with the exact matrix to the next.
        seed: Of the random signs.

    Attributes:
        plan: The plan in a few words; None before the first call.
        gram_error: () the error measured last, ``max |G_st - G^_st| / (|g_s| |g_t|)``; None before the first call.

    Raises:
        UsageError: A width or a number of calls that is too small.
    """

    gram_error: Tensor | None = None

    def __init__(self, *, width: int = 32, check_every: int = 100, seed: int = 0) -> None:
        super().__init__()
        for name, number, least in (("width", width, 2), ("check_every", check_every, 1)):
            if not isinstance(number, int) or number < least:
                raise UsageError(f"{name} must be an integer of at least {least}, got {number!r}.")
        self.width, self.check_every, self.seed = width, check_every, seed

    def _made(self, params: Sequence[Tensor], comm: Comm) -> LayerwiseVJPs:
        return SketchedVJPs(params, comm, self._report, width=self.width, check_every=self.check_every, seed=self.seed)


def differentiated(
    layerwise: Layerwise,
    losses: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    params: Sequence[Tensor],
    comm: Comm,
    extras: Sequence[Sequence[Tensor]],
    on_extra: Callable[[Sequence[Tensor], Row], None],
) -> LayerwiseUpdate | None:
    """Run the VJPs of T losses; return None if plain VJPs are as good.

    Args:
        layerwise: What is known of the model.
        losses: T tensors.
        cotangents: One for each.
        params: The shared parameters.
        comm: The other processes.
        extras: For each loss further tensors to differentiate with respect to.
        on_extra: Called with them and their gradients for each loss.
    """
    vjps = layerwise._of(params, comm)
    if vjps.plan is None:
        vjps.find(losses, len(losses))
    if not vjps.begin(first=True):
        return None
    rows = [[seed if s == t else None for s in range(len(losses))] for t, seed in enumerate(cotangents)]
    return vjps(losses, rows, (), extras, on_extra)


def gramian_of(layerwise: Layerwise, output: Tensor, params: Sequence[Tensor]) -> Tensor | None:
    """Return the Gram matrix (m, m) of the gradients of all m entries of ``output``; keeps the graph.

    None if plain VJPs are as good.
    """
    if wide_dtype(output.device) != torch.float64:
        return None
    comm = Local(params, params)
    vjps = layerwise._of(params, comm)
    if vjps.plan is None:
        vjps.find([output], output.numel())
    if not vjps.begin(first=True):
        return None
    rows: Rows = [[one] for _, (one,) in identity_rows([output])]
    update = vjps([output], rows)
    return update.gram(update.rows, None, comm, None)


def note_error(layerwise: Layerwise, error: Tensor | None) -> None:
    """Remember the error of a sketch whose call measured it, and warn of a large one."""
    if error is None or not isinstance(layerwise, Sketch):
        return
    layerwise.gram_error = error
    if bool(error > _LARGE):
        warnings.warn(
            f"The sketched Gram matrix is off by {float(error):.0%} of the gradients' norms: use a larger width.",
            stacklevel=2,
        )


def _names(params: Sequence[Tensor]) -> dict[Tensor, str]:
    return {param: str(place) for place, param in enumerate(params)}


def _serves(vjps: LayerwiseVJPs, params: Sequence[Tensor], comm: Comm) -> bool:
    """Return whether what is known holds for these parameters and processes."""
    same = len(params) == len(vjps.params) and all(one is other for one, other in zip(params, vjps.params, strict=True))
    return same and comm.shares_batches == vjps.comm.shares_batches
