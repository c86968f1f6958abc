"""Groups of shared parameters, whose task gradients are weighed apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.weighting.base import Groups, Strategy

__all__ = ["ALL", "at_groups", "find_groups", "settled_groups", "use_groups"]

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
        try:
            re.compile(pattern)
        except re.error as cause:
            raise UsageError(f"groups has {pattern!r}, which is no regular expression: {cause}.") from cause
        if not pattern or not isinstance(name, str) or not name:
            raise UsageError(f"groups must have a name for each regular expression, got {pattern!r}: {name!r}.")
    return wanted


def find_groups(model: nn.Module, params: Sequence[Tensor], wanted: Wanted) -> Groups | None:
    """Return the groups of parameters of a model, None if all are one group.

    Args:
        model: The model.
        params: Its shared parameters, in the order of the result.
        wanted: What `settled_groups` returns.

    Raises:
        UsageError: A regular expression finds no parameter.
    """
    if wanted == ALL or not params:
        return None
    names: dict[Tensor, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, name)
    if isinstance(wanted, Mapping):
        of_param = _by_pattern([names[param] for param in params], wanted)
    elif wanted == MODULE:
        of_param = [_block(model, names[param], set(params)) for param in params]
    else:
        of_param = [names[param].rpartition(".")[0] for param in params]
    found = list(dict.fromkeys(of_param))
    return Groups(found, [found.index(name) for name in of_param])


def use_groups(strategy: Strategy, grouping: Groups | None) -> None:
    """Let a strategy weigh the gradients of these groups apart, and remember what it does for each of them."""
    before, strategy.grouping = strategy.grouping, grouping
    if grouping is None or (before is not None and before.names == grouping.names):
        return
    for name in strategy.remembered():
        value: Tensor = getattr(strategy, name)
        if before is None:
            value = value.expand(len(grouping.names), *value.shape).clone()
            dims = tuple(dim + 1 for dim in strategy.task_dims[name])
            strategy.task_dims = {**strategy.task_dims, name: dims}
        else:
            value = value[[before.names.index(group) for group in grouping.names]]
        setattr(strategy, name, value)


@contextmanager
def at_groups(strategy: Strategy, places: int | list[int]) -> Iterator[None]:
    """Let what a strategy remembers be that of a group, or of some groups, which are weighed in the block."""
    whole: dict[str, Tensor] = {name: getattr(strategy, name) for name in strategy.remembered()}
    for name, value in whole.items():
        setattr(strategy, name, value[places])
    try:
        yield
    finally:
        for name, value in whole.items():
            value[places] = getattr(strategy, name)
            setattr(strategy, name, value)
        strategy.weighed_before = True


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
