"""What is refused of a strategy: a class that cannot be one, and weights that no update can be made of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from fastmtl.engine.weights import Weights
from fastmtl.errors import UsageError
from fastmtl.support.named import own_place
from fastmtl.weighting.base import Needs, Strategy

__all__ = ["check_rule", "check_weights", "gave", "own_method"]

_METHODS = {
    "losses": "weigh",
    "gram": "weigh",
    "rows": "weigh_rows",
    "reps": "mask_reps",
    "lookahead": "look_ahead",
    "backward": "backward",
}
_INPUTS = {
    "weigh": ("losses", "gram"),
    "weigh_rows": ("losses", "rows"),
    "mask_reps": ("losses", "reps", "grads"),
    "look_ahead": ("ahead",),
    "backward": ("losses",),
}


def check_rule(rule: type[Any], hyper: Mapping[str, Any]) -> None:
    """Refuse a class of a strategy whose method is missing, or does not take what a step gives it.

    Args:
        rule: A class derived from ``AbsWeighting``.
        hyper: Its hyper-parameters.

    Raises:
        UsageError: Names the class and its line.
    """
    needs = rule.needs_of_step()
    if needs not in _METHODS:
        known = ", ".join(map(repr, get_args(Needs)))
        raise UsageError(f"{own_place(rule)}needs of {rule.__name__} must be one of {known}, got {needs!r}.")
    name = _METHODS[needs]
    method, inputs = getattr(rule, name), _INPUTS[name]
    if method is getattr(Strategy, name, None):
        raise UsageError(
            f"{own_place(rule)}{rule.__name__} must override {name}, the method that belongs to needs = {needs!r}."
        )
    try:
        inspect.signature(method).bind(None, *inputs, **hyper)
    except TypeError as error:
        taken = ", ".join(("self", *inputs, "**hyper"))
        raise UsageError(f"{own_place(method)}{rule.__name__}.{name} must take ({taken}): {error}.") from error


def check_weights(strategy: Strategy, method: str, weights: Any, count: int, *, grouped: bool = False) -> None:
    """Refuse what a strategy's method has returned in place of weights; nothing is read of the device.

    Args:
        strategy: The strategy.
        method: The name of its method.
        weights: What it returned.
        count: The number of gradients, or losses.
        grouped: Whether groups of parameters may have weights of their own.

    Raises:
        UsageError: Names the method and its line.
    """
    if not isinstance(weights, Weights):
        raise UsageError(
            f"{gave(strategy, method)} must return Weights(shared=...) of fastmtl.weighting, it returned "
            f"{_what(weights)}."
        )
    rows = count if weights.rows is None else len(weights.rows)
    _check_tensor(strategy, method, "shared", weights.shared, rows, 1 + grouped)
    if weights.heads is not None:
        if not strategy.weighs_heads:
            raise UsageError(
                f"{gave(strategy, method)} returned weights of heads, for which its class must say weighs_heads = True."
            )
        _check_tensor(strategy, method, "heads", weights.heads, count, 1 + grouped)


def gave(strategy: Strategy, method: str) -> str:
    """Return how messages name a method of a strategy: with file and line, where the class is the user's."""
    return f"{own_place(getattr(type(strategy), method))}{getattr(strategy, 'strategy_name', '')}.{method}"


def own_method(strategy: Strategy) -> str:
    """Return the method of a strategy of the user's that decides, with its place; ``""`` of one that is installed."""
    name = _METHODS[type(strategy).needs_of_step()]  # type: ignore[attr-defined]
    place = own_place(getattr(type(strategy), name))
    return f"{getattr(strategy, 'strategy_name', '')}.{name} ({place.removesuffix(': ')})" if place else ""


def _check_tensor(strategy: Strategy, method: str, name: str, value: Any, count: int, dims: int) -> None:
    wanted, got = f"a floating-point tensor of shape ({count},)", None
    if not isinstance(value, Tensor):
        got = _what(value)
    elif not value.is_floating_point():
        got = f"one of {str(value.dtype).removeprefix('torch.')}"
    elif not 1 <= value.dim() <= dims or value.shape[-1] != count:
        got = f"one of shape {tuple(value.shape)}"
    if got is not None:
        raise UsageError(f"{gave(strategy, method)} must return {name} as {wanted}, it returned {got}.")


def _what(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
