"""Starting from weights that are there: of the same model, of another set of tasks or strategy, or of a backbone."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fastmtl.errors import CheckpointError, UsageError
from fastmtl.trainer.checkpoint.files import by_module, differences, model_state, read_checkpoint, without_weights
from fastmtl.trainer.setup.model import TrainedModel
from fastmtl.trainer.setup.tasks import loss_names, loss_weights

__all__ = ["described", "start_from"]

State = Mapping[str, Tensor]


def described(model: TrainedModel, state: State) -> OrderedDict[str, Tensor]:
    """Return a ``state_dict`` of a model that says of which strategy and tasks it is, beside its modules' versions."""
    kept: Any = OrderedDict(state)
    metadata = {name: dict(about) for name, about in cast(Any, model.state_dict())._metadata.items()}
    metadata[""] |= {"strategy": model.strategy_name, "tasks": list(model.task_name)}
    kept._metadata = metadata
    return cast("OrderedDict[str, Tensor]", kept)


def start_from(model: TrainedModel, strategy_params: Sequence[nn.Parameter], path: Path, strict: bool) -> None:
    """Load the parameters in a file, and print what was taken.

    Names may begin with ``module.``, as those of ``DistributedDataParallel`` do. A strategy's own parameters and state
    are taken if the file is known to be of the same strategy and tasks and has all of them in the model's shapes.

    Args:
        model: The model.
        strategy_params: The parameters that are the strategy's.
        path: The file, or the folder with a ``best.pt``.
        strict: Refuse names and shapes other than the model's. Else what fits is taken, also a backbone's parameters
            whose names lack those of the modules it is in, or have up to three in front, as a whole model's may.

    Raises:
        CheckpointError: The file cannot be read, differs, or has nothing that fits.
        UsageError: ``strict`` is neither True nor False.
    """
    if not isinstance(strict, bool):
        raise UsageError(f"load_strict must be True or False, got {strict!r}.")
    path = path / "best.pt" if path.is_dir() else path
    content = model_state(read_checkpoint(path, model.device), path)
    current, origin = model.state_dict(), _Origin.of(content)
    state = _renamed(content, current)
    state = without_weights(state if strict else _unwrapped(state, current), current, loss_weights(model))
    if origin.tasks is not None and origin.tasks != list(model.task_name):
        state = {_by_name(key, origin.tasks, model): value for key, value in state.items()}
    remembered, params = set(model.remembered()), {id(param) for param in strategy_params}
    learned = remembered | {name for name, param in model.named_parameters() if id(param) in params}
    doubt = origin.doubt(model, all(name in state for name in learned) and bool(remembered))
    doubt = doubt or _incomplete({name: current[name] for name in learned}, remembered, state)
    withheld = sorted(name for name in learned if name in state) if doubt else []
    if strict:
        optional = remembered.union(loss_names(model))
        wanted = {key: value for key, value in current.items() if key in state or key not in optional}
        _refuse(differences(wanted, state) + origin.differences(model, withheld), path)
    elif not any(key in current for key in state):
        state = _placed(state, current)
    known = {key: value for key, value in state.items() if key not in withheld}
    fit = _Fit.of(known, current, remembered.difference(withheld))
    if not fit.taken:
        raise CheckpointError(f"Nothing in the checkpoint {path} has the name and shape of a parameter of the model.")
    model.load_state_dict(current | fit.taken)
    print(f"Load Model from - {path}")
    if not strict:
        print(fit.told())
    elif new := [name for name in loss_names(model) if name not in state]:
        print(f"Not in the file, so that they begin anew: {', '.join(new)}")
    if withheld:
        print(f"{', '.join(withheld)} not taken: {doubt}")


def _incomplete(learned: State, remembered: Set[str], state: State) -> str | None:
    """Return why what a file has of what a strategy learned would not go together; a best.pt has parameters alone."""
    has_memory = any(name in state for name in remembered)
    for name, value in learned.items():
        if name not in state and (has_memory or name not in remembered):
            return f"the file lacks {name}"
        if name in state and state[name].shape != value.shape:
            return f"{name} has the shape {tuple(state[name].shape)} there, {tuple(value.shape)} here"
    return None


def _refuse(told: Sequence[str], path: Path) -> None:
    if told:
        more = f" and {len(told) - 3} more differences" if len(told) > 3 else ""
        raise CheckpointError(
            f"The checkpoint {path} is of another model: {'; '.join(told[:3])}{more}. With load_strict=False what fits "
            "is taken."
        )


@dataclass(frozen=True, slots=True)
class _Origin:
    """Of which strategy and tasks a file says it is; None where it does not."""

    strategy: str | None
    tasks: list[str] | None

    @classmethod
    def of(cls, state: State) -> _Origin:
        about = getattr(state, "_metadata", {}).get("", {})
        return cls(about.get("strategy"), about.get("tasks"))

    def doubt(self, model: TrainedModel, is_complete: bool) -> str | None:
        """Return why what a strategy learned is not the model's; ``is_complete`` if all of its state is there."""
        if self.strategy is None:
            return None if is_complete else "the file does not tell of which strategy it is"
        if self.strategy != model.strategy_name:
            return f"the file is of {self.strategy}, the model of {model.strategy_name}"
        if self.tasks != list(model.task_name):
            return f"the file is of the tasks {_listed(self.tasks)}, the model of {_listed(model.task_name)}"
        return None

    def differences(self, model: TrainedModel, withheld: Sequence[str]) -> list[str]:
        """Return the differences that names and shapes do not show."""
        told = []
        if self.strategy is not None and self.strategy != model.strategy_name and withheld:
            told.append(f"{', '.join(withheld)} is of {self.strategy}, not of {model.strategy_name}")
        tasks, here = self.tasks, list(model.task_name)
        network = type(model).__bases__[0]
        goes_by_names = not withheld and (model.by_place or network.__module__.startswith("fastmtl."))
        if tasks is not None and tasks != here and sorted(tasks) == sorted(here) and not goes_by_names:
            told.append(f"its tasks are in the order {_listed(tasks)}, the model's in {_listed(here)}")
        return told


@dataclass(slots=True)
class _Fit:
    """What of a file fits a model by name and shape."""

    taken: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, state: State, current: State, remembered: Iterable[str]) -> _Fit:
        fit = cls()
        for key, value in state.items():
            if key not in current:
                fit.left.append(key)
            elif current[key].shape != value.shape:
                fit.reshaped.append(f"{key} {tuple(value.shape)} for {tuple(current[key].shape)}")
            else:
                fit.taken[key] = value
        fit.new = [key for key in current if key not in fit.taken and key not in remembered]
        return fit

    def told(self) -> str:
        """Return a line about it: numbers of tensors by module."""
        parts = [
            ("taken", _counted(self.taken)),
            ("new", _counted(self.new)),
            ("left", _counted(self.left)),
            ("of another shape", "; ".join(self.reshaped[:4]) + (" and more" if len(self.reshaped) > 4 else "")),
        ]
        return "Tensors " + "; ".join(f"{what}: {told}" for what, told in parts if told)


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{module} {count}" for module, count in by_module(names).items())


def _listed(tasks: Iterable[str] | None) -> str:
    return ", ".join(tasks or ())


def _renamed(state: State, current: State) -> State:
    """Return a state with the model's names where wrappers have put something in front, or between."""

    def plain(name: str) -> str:
        return name.removeprefix("module.").replace("_orig_mod.", "")

    names = {plain(name): name for name in current}
    renamed = {names.get(plain(key), plain(key)): value for key, value in state.items()}
    return renamed if len(renamed) == len(state) else state


def _fits(name: str, value: Tensor, current: State) -> bool:
    return name in current and current[name].shape == value.shape


def _unwrapped(state: State, current: State) -> State:
    """Return a whole model's state without the one to three modules that its names have in front.

    They are taken away where more than half of the tensors behind them then fit the model.
    """
    if any(key in current for key in state):
        return state
    counts: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for key, value in state.items():
        parts = key.split(".")
        for depth in range(1, min(4, len(parts))):
            front = ".".join(parts[:depth]) + "."
            counts[front] += 1
            fitting[front] += _fits(key.removeprefix(front), value, current)
    best = max(fitting, key=fitting.__getitem__, default="")
    if 2 * fitting[best] <= counts[best]:
        return state
    renamed = {key.removeprefix(best): value for key, value in state.items()}
    return renamed if len(renamed) == len(state) else state


def _by_name(name: str, tasks: list[str], model: TrainedModel) -> str:
    """Return the name that a tensor of a model of other tasks has in this one, where names have the places of tasks."""
    for pattern in model.by_place:
        match = re.search(pattern, name)
        if match is None:
            continue
        task = tasks[int(match[1])] if match.groups() and int(match[1]) < len(tasks) else None
        if task not in model.task_name:
            return f"{name} of other tasks"
        start, end = match.span(1)
        return f"{name[:start]}{list(model.task_name).index(task)}{name[end:]}"
    return name


def _placed(state: State, current: State) -> State:
    """Return a backbone's state under the names of the modules of a network that it fits, without its decoders.

    It fits where more than half of its tensors do.
    """
    candidates = [state]
    while len(candidates) < 4 and len({key.split(".", 1)[0] for key in candidates[-1]}) == 1:
        candidates.append({key.split(".", 1)[-1]: value for key, value in candidates[-1].items()})
    for named in candidates:
        places: Counter[str] = Counter()
        for key, value in current.items():
            parts = () if key.startswith("decoders.") else key.split(".")
            for start in range(1, len(parts)):
                inner = ".".join(parts[start:])
                if _fits(inner, value, named):
                    places[key.removesuffix(inner)] += 1
        most = max(places.values(), default=0)
        if 2 * most > len(named) > 0:
            best = [place for place, count in places.items() if count == most]
            placed = {place + key: value for place in best for key, value in named.items() if place + key in current}
            fitting = {key for key in named if any(place + key in current for place in best)}
            return placed | {key: value for key, value in named.items() if key not in fitting}
    return state
