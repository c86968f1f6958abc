"""What the strategy decides, from what it needs of a step: losses, Gram matrix, rows, representations or more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.engine import ForeignLosses, LossSum
from fastmtl.engine.groups import padded
from fastmtl.engine.jacobian import Jacobian
from fastmtl.engine.lookahead import LookedAhead
from fastmtl.engine.pullback import Representations
from fastmtl.engine.weights import Weights, joined
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings
from fastmtl.support.profiling import part
from fastmtl.trainer.setup.groups import at_groups
from fastmtl.weighting import AbsWeighting
from fastmtl.weighting.checks import check_weights, gave

__all__ = ["make_solver"]

Hypers = Settings
Solver = Callable[[Any], Weights]


def make_solver(strategy: AbsWeighting, hyper: Hypers, comm: Comm) -> Solver:
    """Return the function from what an engine has found to the strategy's weights.

    Args:
        strategy: The strategy.
        hyper: Its hyper-parameters.
        comm: The other processes.
    """
    by_need: Mapping[str, Solver] = {
        "losses": partial(_from_losses, strategy, hyper),
        "gram": partial(_from_gram, strategy, hyper),
        "rows": partial(_from_rows, strategy, hyper),
        "reps": partial(_from_reps, strategy, hyper, comm),
        "lookahead": partial(_from_lookahead, strategy, hyper),
        "backward": partial(_from_backward, strategy, hyper),
    }
    return by_need[strategy.needs_of_step()]


def _from_losses(strategy: AbsWeighting, hyper: Hypers, losses: LossSum) -> Weights:
    with part("solver"):
        weights = strategy.weigh(losses.strategy_losses, None, **hyper)
    check_weights(strategy, "weigh", weights, losses.strategy_losses.numel())
    return weights


def _from_gram(strategy: AbsWeighting, hyper: Hypers, jacobian: Jacobian) -> Weights:
    losses, groups = jacobian.strategy_losses, strategy.groups(**hyper)
    grouping = strategy.grouping
    weigh = _one_by_one if grouping is not None and not strategy.takes_groups else _at_once

    def decide(gram: Tensor, places: Sequence[int] | None) -> Weights:
        count = 1 if grouping is None else len(grouping.names)
        if grouping is not None:
            gram = padded(gram, count if places is None else len(places))
        with part("solver"), nullcontext() if places is None else at_groups(strategy, places, count):
            weights = weigh(strategy, losses, gram, hyper)
        strategy.weighs_rest = True
        check_weights(strategy, "weigh", weights, losses.numel(), grouped=groups is not None)
        shown = jacobian.mean_gram(gram)
        return replace(weights, gram=shown) if groups is None else replace(weights, grams=shown)

    try:
        weights = jacobian.decided(groups, decide)
    finally:
        strategy.weighs_rest = False
    if weights.grams is None:
        return weights
    heads = weights.heads
    if heads is not None and heads.dim() == 2:
        # A task that reaches no group has the weight 1, as it would learn nothing otherwise.
        heads = heads.nanmean(0).nan_to_num(nan=1.0)
    return replace(weights, groups=groups, gram=weights.grams.sum(0), heads=heads)


def _at_once(strategy: AbsWeighting, losses: Tensor, gram: Tensor, hyper: Hypers) -> Weights:
    return strategy.weigh(losses, gram, **hyper)


def _refuse_groups(strategy: AbsWeighting, what: str) -> NoReturn:
    raise UsageError(
        f"groups must be all for {gave(strategy, 'weigh')}, which returned {what}; with takes_groups = True it is "
        "called once for all groups."
    )


def _one_by_one(strategy: AbsWeighting, losses: Tensor, grams: Tensor, hyper: Hypers) -> Weights:
    """Return the weights of a rule that takes one Gram matrix, for each of those of L groups (L, T, T)."""
    parts: list[Weights] = []
    for place, gram in enumerate(grams):
        with at_groups(strategy, place, len(grams)):
            weights = strategy.weigh(losses, gram, **hyper)
        check_weights(strategy, "weigh", weights, losses.numel())
        if weights.own_grads:
            _refuse_groups(strategy, "gradients of its own parameters")
        if parts and weights.max_norm != parts[0].max_norm:
            _refuse_groups(strategy, "another max_norm for each group")
        heads, logged = (None if value is None else value[None] for value in (weights.heads, weights.logged))
        parts.append(replace(weights, shared=weights.shared[None], heads=heads, logged=logged))
    return joined(parts, range(len(parts)))


def _from_rows(strategy: AbsWeighting, hyper: Hypers, jacobian: Jacobian) -> Weights:
    rows = jacobian.unscaled_rows()
    with part("solver"):
        weights = strategy.weigh_rows(jacobian.strategy_losses, rows, **hyper)
    check_weights(strategy, "weigh_rows", weights, jacobian.strategy_losses.numel())
    return replace(weights, rows=weights.rows or rows)


def _from_reps(strategy: AbsWeighting, hyper: Hypers, comm: Comm, jacobian: Jacobian) -> Weights:
    pullback = jacobian.pullback
    assert isinstance(pullback, Representations)
    # Masks depend on signs and shares only: the scale of the gradients does not matter.
    mask = partial(strategy.mask_reps, **hyper)
    with part("solver"):
        masked = comm.mask(mask, jacobian.strategy_losses, pullback.reps, pullback.grads)
    return Weights(shared=torch.ones_like(jacobian.losses), reps=masked, reports=False)


def _from_lookahead(strategy: AbsWeighting, hyper: Hypers, looked: LookedAhead) -> Weights:
    return strategy.look_ahead(looked.ahead, **hyper)


def _from_backward(strategy: AbsWeighting, hyper: Hypers, losses: ForeignLosses) -> Weights:
    with part("VJPs"):
        weights = strategy.backward(losses.attached, **hyper)
    trained = [param for param in strategy.parameters() if param.requires_grad]
    if trained and all(param.grad is None for param in trained):
        raise UsageError(
            f"{gave(strategy, 'backward')} has given no parameter a gradient: call _backward_new_grads, or backward of "
            "a sum of the losses."
        )
    if weights is None:
        return Weights(shared=torch.ones_like(losses.losses), reports=False)
    shown = torch.as_tensor(weights)
    if shown.numel() != losses.losses.numel():
        raise UsageError(
            f"{gave(strategy, 'backward')} must return one weight for each of {losses.losses.numel()} tasks, or None, "
            f"got the shape {tuple(shown.shape)}."
        )
    return Weights(shared=shown.flatten().to(losses.losses))
