"""Groups of shared parameters, whose task gradients are weighed apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.weighting.base import Groups, Strategy

__all__ = ["ALL", "at_groups", "settled_groups", "use_groups"]

ALL, MODULE, LAYER = "all", "module", "layer"
# What has no formula of its own: the modules in it are what a network is made of.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OTHERS = "other"

# What `groups` may be: a word, or regular expressions of parameter names and the groups' names.
Wanted = str | Mapping[str, str]


def settled_groups(wanted: Wanted) -> Wanted:
    """Return a word in its own spelling, and what a flag gives, ``REGEX=NAME,REGEX=NAME``, as a mapping.

    Raises:
        UsageError: It is neither a word nor regular expressions with names.
    """
    if isinstance(wanted, str) and "=" in wanted:
        parts = [part.rpartition("=") for part in wanted.split(",")]
        wanted = {pattern.strip(): name.strip() for pattern, _, name in parts}
    if isinstance(wanted, str):
        if wanted.lower() in (ALL, MODULE, LAYER):
            return wanted.lower()
        raise UsageError(
            f"groups must be {ALL}, {MODULE}, {LAYER} or regular expressions of parameter names with names of groups, "
            f"REGEX=NAME,REGEX=NAME, got {wanted!r}."
        )
    for pattern, name in wanted.items():
        if not all(isinstance(word, str) and word for word in (pattern, name)):
            raise UsageError(f"groups must have a name for each regular expression, got {pattern!r}: {name!r}.")
        try:
            re.compile(pattern)
        except re.error as cause:
            raise UsageError(f"groups has {pattern!r}, which is no regular expression: {cause}.") from cause
    return wanted


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
    names: dict[Tensor, str] = {}
    for name, param in strategy.named_parameters(remove_duplicate=False):
        names.setdefault(param, name)
    if strategy.grouping is None:
        strategy.grouping = _find(strategy, {param: names[param] for param in strategy.get_share_params()}, wanted)
        _remember_by_group(strategy, len(strategy.grouping.names))
    by_name = strategy.grouping.by_name
    strategy.grouping = strategy.grouping._replace(of=[by_name[names[param]] for param in params])


def _find(model: nn.Module, names: Mapping[Tensor, str], wanted: Wanted) -> Groups:
    """Return the groups of a model's shared parameters, given with their names."""
    if isinstance(wanted, Mapping):
        groups = _by_pattern(list(names.values()), wanted)
    elif wanted == MODULE:
        groups = [_block(model, name, set(names)) for name in names.values()]
    else:
        groups = [name.rpartition(".")[0] for name in names.values()]
    found = list(dict.fromkeys(groups))
    return Groups(found, {name: found.index(group) for name, group in zip(names.values(), groups, strict=True)}, [])


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


def _by_pattern(names: Sequence[str], wanted: Mapping[str, str]) -> list[str]:
    unused = set(wanted)
    groups = []
    for name in names:
        pattern = next((pattern for pattern in wanted if re.search(pattern, name)), None)
        unused.discard(pattern or "")
        groups.append(_OTHERS if pattern is None else wanted[pattern])
    if unused:
        pattern = next(pattern for pattern in wanted if pattern in unused)
        raise UsageError(
            f"groups: {pattern!r} comes first for none of the shared parameters, which are {names[0]} ... {names[-1]}."
        )
    return groups


def _block(model: nn.Module, name: str, shared: set[Tensor]) -> str:
    """Return the name of the outermost module of a parameter that is neither a container nor has all parameters."""
    module, path = model, list[str]()
    for part in name.split(".")[:-1]:
        if path and not isinstance(module, _CONTAINERS) and not shared.issubset(module.parameters()):
            break
        module = module.get_submodule(part)
        path.append(part)
    return ".".join(path)
