"""The configuration of a training run: one dataclass behind the command line, the YAML file and the run directory."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fastmtl.architecture import ARCHITECTURES
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper, fill_hyper
from fastmtl.support.names import resolve_name
from fastmtl.trainer.optimizer import OPTIMIZERS, SCHEDULERS
from fastmtl.trainer.precision import PRECISIONS
from fastmtl.trainer.setup.options import GRAMS, SHARDS, VJPS
from fastmtl.weighting import WEIGHTINGS

__all__ = ["TrainConfig", "read_config"]


def _about(panel: str, text: str, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    return {"panel": panel, "help": text, "choices": choices}


def _setting(default: Any, panel: str, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata=_about(panel, text, choices))


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides what a training run computes. The default of every setting is here and nowhere else.

    The field metadata (``help``, ``panel``, ``choices``) makes the options of ``fastmtl train``; None as a default
    means that the data set or the hardware decides.

    Raises:
        UsageError: A value has the wrong type, lies outside its range or is none of the allowed ones.
    """

    dataset: str = _setting("multimnist", "Data", "Data set; `fastmtl data list` names them.")
    dataset_path: str | None = _setting(None, "Data", "Folder of the data set, where it is not in the package.")
    train_size: int | None = _setting(None, "Data", "Training examples; the data set's own number if not given.")
    aug: bool = _setting(False, "Data", "Change the training examples at random, where the data set knows how.")
    batch_size: int | None = _setting(
        None, "Data", "Examples in a training batch (of each task, for multi-input data); 64 with MultiMNIST."
    )
    test_batch_size: int | None = _setting(None, "Data", "Examples in a batch of evaluation; 256 with MultiMNIST.")
    limit_batches: int | None = _setting(None, "Data", "Batches of each pass at most, for a quick try.")

    arch: str = _setting("HPS", "Model", "Architecture, in any case:")
    weighting: str = _setting("EW", "Model", "Weighting strategy, in any case:")
    encoder: str | None = _setting(None, "Model", "Encoder; the data set's own if not given.")
    pretrained: bool = _setting(False, "Model", "Start from torchvision's ImageNet weights of the encoder.")
    rep_grad: bool = _setting(False, "Model", "Weight gradients of the representation, not of the shared parameters.")
    multi_input: bool | None = _setting(None, "Model", "Each task has its own inputs; the data set says so by itself.")
    load_path: str | None = _setting(
        None, "Model", "Start from the weights of this best.pt, or of the folder it is in."
    )
    weight_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Model", "Hyper-parameters of the weighting strategy.")
    )
    arch_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Model", "Hyper-parameters of the architecture.")
    )

    epochs: int = _setting(1, "Optimisation", "Passes over the training data.")
    optim: str = _setting("adam", "Optimisation", "Optimizer.", tuple(OPTIMIZERS))
    lr: float = _setting(1e-3, "Optimisation", "Learning rate.")
    weight_decay: float = _setting(1e-5, "Optimisation", "Weight decay.")
    momentum: float = _setting(0.9, "Optimisation", "Momentum, for sgd.")
    scheduler: str | None = _setting(
        None, "Optimisation", "Learning-rate scheduler, stepped every epoch.", tuple(SCHEDULERS)
    )
    step_size: int = _setting(100, "Optimisation", "Epochs between two decays, for step.")
    gamma: float = _setting(0.5, "Optimisation", "Factor of a decay, for step, exp and reduce.")
    eta_min: float = _setting(0.0, "Optimisation", "Last learning rate, for cos.")
    patience: int = _setting(10, "Optimisation", "Epochs without improvement before a decay, for reduce.")
    accumulate: int = _setting(1, "Optimisation", "Batches whose gradients are averaged for a step.")
    clip_grad_norm: float | None = _setting(None, "Optimisation", "Greatest norm of the gradients; no limit by itself.")
    update_weights_every: int = _setting(
        1, "Optimisation", "Steps between two solves of a gradient-balancing strategy."
    )
    weight_momentum: float = _setting(
        0.0, "Optimisation", "Decay of a moving average of the task weights (CR-MOGM); 0 for none."
    )
    tasks_per_step: int | None = _setting(None, "Optimisation", "Tasks trained in a step, in turn; all if not given.")
    gram: str = _setting(
        "exact",
        "Optimisation",
        "With several processes: exact for the whole batch's Gram matrix, local for the mean of the processes' own.",
        GRAMS,
    )
    checkpoint_every: int | None = _setting(
        None, "Optimisation", "Steps after which last.pt is written; at the end of an epoch if not given."
    )
    sync_batch_norm: bool = _setting(
        False, "Optimisation", "With several processes, batch norms take the statistics of the whole batch."
    )
    shard: str = _setting(
        "none",
        "Optimisation",
        "With several processes: fsdp for a shard of the parameters and the optimizer's state in each.",
        SHARDS,
    )
    seed: int = _setting(0, "Optimisation", "Seed of every random number.")

    device: str | None = _setting(None, "Machine", "cpu, cuda, cuda:1, mps; the best there is if not given.")
    precision: str = _setting("fp32", "Machine", "What the network computes in.", tuple(PRECISIONS))
    tf32: bool | None = _setting(
        None, "Machine", "Round float32 products to TF32 on CUDA; torch's choice if not given."
    )
    channels_last: bool = _setting(False, "Machine", "Keep images in channels-last memory format.")
    compile: bool | str = _setting(False, "Machine", "Compile the step; auto tries both and keeps the faster.")
    cuda_graph: bool = _setting(False, "Machine", "Capture the step as a CUDA graph, where that can be.")
    vjps: str = _setting(
        "auto",
        "Machine",
        "How the tasks' gradients go through the shared network: one after the other, batched, as far as the Gram "
        "matrix needs them, or compiled in one graph with the forward pass, as auto has it for small networks if "
        "compile is on; auto tries batched and compressed ones from 8 tasks on.",
        VJPS,
    )
    workers: int | None = _setting(None, "Machine", "Processes that load training data; none where data are in memory.")
    threads: int | None = _setting(None, "Machine", "CPU threads; PyTorch's choice if not given.")
    peer_timeout: float | None = _setting(
        None, "Machine", "With several processes, seconds one waits for another; torch's choice if not given."
    )

    validate: bool = _setting(True, "Logging", "Choose best.pt by the validation split, not by the test split.")
    log_every: int = _setting(20, "Logging", "Steps between two reads of losses and weights from the device.")
    tensorboard: bool = _setting(True, "Logging", "Write TensorBoard events.")
    profile: bool = _setting(False, "Logging", "Write trace.json of a few warm steps, and print where they went.")
    plot: bool = _setting(True, "Logging", "Draw curves.png at the end of every epoch.")

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for each in fields(self):
            value = _coerce(each.name, getattr(self, each.name), kinds[each.name])
            setattr(self, each.name, value)
            choices = each.metadata["choices"]
            if choices is not None and value is not None:
                setattr(self, each.name, resolve_name(value, {name: name for name in choices}, each.name))
        if isinstance(self.compile, str):
            if self.compile.lower() not in COMPILE_WORDS:
                raise UsageError(f"compile must be true, false or auto, got {self.compile!r}.")
            self.compile = COMPILE_WORDS[self.compile.lower()]
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and math.isinf(value):
                raise UsageError(f"{each.name} must be a finite number, got {value}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise UsageError(f"{name} must be at most {most}, got {value}.")
        if not self.lr > 0:
            raise UsageError(f"lr must be above 0, got {self.lr}.")
        if self.peer_timeout is not None and not self.peer_timeout > 0:
            raise UsageError(f"peer_timeout must be above 0, got {self.peer_timeout}.")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise UsageError(f"clip_grad_norm must be above 0, got {self.clip_grad_norm}.")

    def resolved(self) -> TrainConfig:
        """Return the configuration with names in their own spelling and every hyper-parameter filled in.

        Raises:
            UsageError: An unknown architecture, weighting or hyper-parameter.
        """
        arch = resolve_name(self.arch, {name: name for name in ARCHITECTURES}, "architecture")
        weighting = resolve_name(self.weighting, {name: name for name in WEIGHTINGS}, "weighting")
        return replace(
            self,
            arch=arch,
            weighting=weighting,
            arch_args=_fill(arch, ARCHITECTURES[arch].hyper, self.arch_args),
            weight_args=_fill(weighting, WEIGHTINGS[weighting].hyper, self.weight_args),
        )

    def with_hyper(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration with hyper-parameters, by name, given to the weighting or architecture they are of.

        Raises:
            UsageError: A hyper-parameter of neither.
        """
        config = self.resolved()
        weighting, arch = WEIGHTINGS[config.weighting], ARCHITECTURES[config.arch]
        weight_args, arch_args = dict(config.weight_args), dict(config.arch_args)
        for name, value in values.items():
            if name not in weighting.hyper and name not in arch.hyper:
                owners = [each for each in WEIGHTINGS if name in WEIGHTINGS[each].hyper]
                owners += [each for each in ARCHITECTURES if name in ARCHITECTURES[each].hyper]
                raise UsageError(
                    f"{name} is a hyper-parameter of {' and '.join(owners) or 'nothing'}, but the weighting is "
                    f"{config.weighting} and the architecture {config.arch}."
                )
            if name in weighting.hyper:
                weight_args[name] = value
            if name in arch.hyper:
                arch_args[name] = value
        return replace(config, weight_args=weight_args, arch_args=arch_args).resolved()

    @property
    def optim_param(self) -> dict[str, Any]:
        """The optimizer in the form the trainer takes."""
        param = {"optim": self.optim, "lr": self.lr, "weight_decay": self.weight_decay}
        return {**param, "momentum": self.momentum} if self.optim == "sgd" else param

    @property
    def scheduler_param(self) -> dict[str, Any] | None:
        """The learning-rate scheduler in the form the trainer takes, or None."""
        own: dict[str, dict[str, Any]] = {
            "step": {"step_size": self.step_size, "gamma": self.gamma},
            "exp": {"gamma": self.gamma},
            "cos": {"T_max": self.epochs, "eta_min": self.eta_min},
            # The trainer steps it with the improvement over the first epoch, which is better when larger.
            "reduce": {"mode": "max", "factor": self.gamma, "patience": self.patience},
        }
        return None if self.scheduler is None else {"scheduler": self.scheduler, **own[self.scheduler]}

    def as_yaml(self) -> str:
        """Return the configuration as YAML; `read_config` reads it back to an equal one."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


COMPILE_WORDS: dict[str, bool | str] = {
    "on": True,
    "true": True,
    "yes": True,
    "off": False,
    "false": False,
    "no": False,
    "auto": "auto",
}
_LEAST = {
    "train_size": 1,
    "batch_size": 1,
    "test_batch_size": 1,
    "limit_batches": 1,
    "epochs": 1,
    "accumulate": 1,
    "update_weights_every": 1,
    "tasks_per_step": 1,
    "weight_momentum": 0,
    "weight_decay": 0,
    "momentum": 0,
    "step_size": 1,
    "gamma": 0,
    "eta_min": 0,
    "patience": 0,
    "seed": 0,
    "workers": 0,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every": 1,
}


# Numpy's seeds have 32 bits; OpenMP ends the process where it cannot start as many threads as it is told to.
_MOST = {"seed": 2**32 - 1, "threads": 1024}


def read_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """Return the configuration in a YAML file, with `overrides` in place of what the file says.

    If they name another weighting or architecture, the file's hyper-parameters of that go too.

    Raises:
        UsageError: The file is missing, is no YAML mapping, or has an unknown key or a value that cannot be.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.") from None
    except OSError as cause:
        raise UsageError(f"The configuration file {path} cannot be read: {cause.strerror or cause}.") from cause
    except UnicodeDecodeError as cause:
        raise UsageError(f"The configuration file {path} is not text in UTF-8.") from cause
    except yaml.YAMLError as cause:
        raise UsageError(f"The configuration file {path} is not valid YAML: {' '.join(str(cause).split())}.") from cause
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"The configuration file {path} must hold `key: value` lines, got a {type(content).__name__}.")
    names = {each.name: each.name for each in fields(TrainConfig)}
    settings: dict[str, Any] = {}
    for key, value in content.items():
        settings[resolve_name(str(key), names, f"key in {path}:")] = value
    for name, args in (("weighting", "weight_args"), ("arch", "arch_args")):
        # Hyper-parameters of one strategy mean nothing to the other that takes its place.
        if name in overrides and str(overrides[name]).lower() != str(settings.get(name)).lower():
            settings.pop(args, None)
    return TrainConfig(**{**settings, **overrides})


def _fill(owner: str, declared: Mapping[str, Hyper], given: Mapping[str, Any]) -> dict[str, Any]:
    spelled: dict[str, Any] = {}
    for name, value in given.items():
        if declared:
            name = resolve_name(str(name), {each: each for each in declared}, f"hyper-parameter of {owner}")
            value = coerce_hyper(name, value, declared[name])
        spelled[name] = value
    return fill_hyper(owner, declared, spelled)


def coerce_hyper(name: str, value: Any, spec: Hyper) -> Any:
    """Return `value` (from YAML or the command line, where a list may be ``"3,1"``) in the type `spec` asks for."""
    if not spec.many:
        return value if value is None else _coerce(name, value, spec.type)
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    return [_coerce(name, part, spec.type) for part in (parts if isinstance(parts, list | tuple) else [parts])]


def _to_bool(value: Any) -> bool:
    word = COMPILE_WORDS.get(str(value).lower())
    if not isinstance(word, bool):
        raise ValueError
    return word


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    # YAML reads 1e-4, without a point, as text.
    return float(value)


def _to_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    return str(value)


def _to_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    return {str(key): each for key, each in value.items()}


_CONVERTERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_to_bool, "true or false"),
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    str: (_to_str, "text"),
    dict: (_to_dict, "`key: value` pairs"),
}


def _coerce(name: str, value: Any, kind: Any) -> Any:
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    members = tuple(typing.get_origin(member) or member for member in members)
    if (value is None and type(None) in members) or (len(members) > 1 and type(value) in members):
        return value
    convert, wanted = _CONVERTERS[members[0]]
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {wanted}, got {value!r}.") from None
