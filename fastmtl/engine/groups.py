"""Groups of parameters, by the modules and names of a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError

__all__ = ["ALL", "Groups", "Wanted", "find_groups", "groups_of", "names_of", "padded", "settled_groups"]

ALL, MODULE, LAYER = "all", "module", "layer"
# What has no formula of its own: the modules in it are what a network is made of.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OTHERS = "other"

# What `groups` may be: a word, or regular expressions of parameter names and the groups' names.
Wanted = str | Mapping[str, str]


class Groups(NamedTuple):
    """Groups of parameters.

    Attributes:
        names: The names of the L groups.
        by_name: The group, 0 .. L-1, of each shared parameter, frozen or not, by its name.
        of: The group of each parameter that is trained, in their order.
    """

    names: list[str]
    by_name: Mapping[str, int]
    of: list[int]

    def restricted(self, names: Sequence[str]) -> Groups:
        """Return the same groups, of which parameters with these names are trained."""
        return self._replace(of=[self.by_name[name] for name in names])


# The groups of modules that have been asked for them, by what was asked and what the module was made of.
_FOUND: WeakKeyDictionary[nn.Module, dict[object, Groups]] = WeakKeyDictionary()


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


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """Return the first name of each parameter."""
    names: dict[Tensor, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, name)
    return names


def find_groups(model: nn.Module, names: Mapping[Tensor, str], wanted: Wanted) -> Groups:
    """Return the groups of parameters of a model, given with their names.

    Raises:
        UsageError: A regular expression finds no parameter.
    """
    if isinstance(wanted, Mapping):
        groups = _by_pattern(list(names.values()), wanted)
    elif wanted == MODULE:
        groups = [_block(model, name, set(names)) for name in names.values()]
    else:
        groups = [name.rpartition(".")[0] for name in names.values()]
    found = list(dict.fromkeys(groups))
    return Groups(found, {name: found.index(group) for name, group in zip(names.values(), groups, strict=True)}, [])


def groups_of(module: nn.Module, wanted: Wanted, params: Sequence[Tensor]) -> Groups:
    """Return the groups of some parameters of a module, among those of all its parameters.

    They are found once for modules of the same classes with parameters of the same names.
    """
    names = names_of(module)
    asked = wanted if isinstance(wanted, str) else tuple(wanted.items())
    key = asked, tuple(names.values()), tuple(map(type, module.modules()))
    found = _FOUND.setdefault(module, {})
    if key not in found:
        found[key] = find_groups(module, names, wanted)
    return found[key].restricted([names[param] for param in params])


def padded(gram: Tensor, count: int) -> Tensor:
    """Return the Gram matrices of ``count`` groups, the last of which may have no parameters that are trained."""
    known = [gram] if gram.dim() == 3 else []
    missing = count - sum(map(len, known))
    return torch.cat([*known, gram.new_zeros(missing, *gram.shape[-2:])]) if missing else gram


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
