"""Groups of shared parameters, whose task gradients are weighed apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmtl.engine.groups import ALL, Wanted, find_groups, names_of
from fastmtl.errors import UsageError
from fastmtl.weighting.base import Strategy

__all__ = ["at_groups", "use_groups"]


def use_groups(strategy: Strategy, params: Sequence[Tensor], wanted: Wanted) -> None:
    """Let a strategy weigh the gradients of groups apart, and remember what it does for each of them.

    Groups stay those of the first call: parameters that are frozen later leave theirs, which may become empty.

    Args:
        strategy: Network and strategy.
        params: The shared parameters that are trained now.
        wanted: What `settled_groups` returns.

    Raises:
        UsageError: A regular expression finds no parameter.
    """
    if wanted == ALL:
        return
    names = names_of(strategy)
    if strategy.grouping is None:
        shared: dict[Tensor, str] = {param: names[param] for param in strategy.get_share_params()}
        strategy.grouping = find_groups(strategy, shared, wanted)
        _remember_by_group(strategy, len(strategy.grouping.names))
    strategy.grouping = strategy.grouping.restricted([names[param] for param in params])


def _remember_by_group(strategy: Strategy, count: int) -> None:
    for name in strategy.remembered():
        value: Tensor = getattr(strategy, name)
        setattr(strategy, name, value.detach().expand(count, *value.shape).clone())
        dims = tuple(dim + 1 for dim in strategy.task_dims[name])
        strategy.task_dims = {**strategy.task_dims, name: dims}


@contextmanager
def at_groups(strategy: Strategy, places: int | Sequence[int], count: int) -> Iterator[None]:
    """Let what a strategy remembers be that of a group, or of some, of ``count`` groups, for the block.

    Raises:
        UsageError: The strategy has assigned something that is not of each group.
    """
    whole: dict[str, Tensor] = {name: getattr(strategy, name) for name in strategy.remembered()}
    for name, value in whole.items():
        if value.dim() <= max(strategy.task_dims[name], default=0) or len(value) != count:
            raise UsageError(
                f"groups must be all for {strategy.strategy_name}, which has assigned {name} for the whole network: of "
                "what it remembers there is one for each group, outside of weigh too."
            )
        # Indices from the host would be a copy that waits.
        part = value[places] if isinstance(places, int) else torch.stack([value[place] for place in places])
        setattr(strategy, name, part)
    try:
        yield
    finally:
        for name, value in whole.items():
            part = getattr(strategy, name).detach()
            with torch.no_grad():
                for index, place in enumerate([places] if isinstance(places, int) else places):
                    value[place] = part if isinstance(places, int) else part[index]
            setattr(strategy, name, value)
