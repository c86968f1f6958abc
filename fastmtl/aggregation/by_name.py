"""Aggregators without state by their names, as loops of one's own give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

from fastmtl import aggregation
from fastmtl.aggregation.base import Aggregator
from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name
from fastmtl.support.stateful import Stateful

__all__ = ["aggregator_of"]


def aggregator_of(name: str, hyper: Mapping[str, Any]) -> Aggregator:
    """Return an aggregator without state; one and the same for a name and plain numbers and words."""
    is_plain = all(value is None or isinstance(value, (int, float, str)) for value in hyper.values())
    return _made(name, **hyper) if is_plain else _made.__wrapped__(name, **hyper)


@lru_cache(maxsize=64, typed=True)
def _made(name: str, /, **hyper: Any) -> Aggregator:
    make = resolve_name(name, _without_state(), "weighting")
    try:
        return make(**hyper)
    except TypeError as error:
        raise UsageError(f"weighting {name!r} cannot be made of {hyper}: {error}.") from None


@cache
def _without_state() -> dict[str, Callable[..., Aggregator]]:
    """Return the classes of the aggregators without state, by name."""
    bases = (aggregation.Aggregator, aggregation.WeightedAggregator, aggregation.GramianWeightedAggregator)
    public = [getattr(aggregation, public_name) for public_name in aggregation.__all__]
    classes: dict[str, Callable[..., Aggregator]] = {
        cls.__name__: cls
        for cls in public
        if issubclass(cls, aggregation.Aggregator) and cls not in bases and not issubclass(cls, Stateful)
    }
    return {**classes, "Aligned_MTL": classes["AlignedMTL"]}
