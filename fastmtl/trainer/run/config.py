"""The configuration of a training run: one dataclass behind the command line, the YAML file and the run directory."""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from fastmtl.architecture import ARCHITECTURES
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper, fill_hyper
from fastmtl.trainer.optim.optimizer import OPTIMIZERS, check_group_settings, refuse_optimizer
from fastmtl.trainer.optim.recipe import PERIODS, SCHEDULERS
from fastmtl.trainer.optim.schedule import RESUMED
from fastmtl.trainer.precision import PRECISIONS
from fastmtl.trainer.run.settings import (
    WORDS,
    Arguments,
    coerce,
    coerce_hyper,
    hyper_options,
    optimizer_param,
    scheduler_param,
    spelled_as,
)
from fastmtl.trainer.setup.options import GRAMS, SHARDS, VJPS
from fastmtl.weighting import WEIGHTINGS

__all__ = ["TrainConfig", "read_config"]

T = TypeVar("T")

_BOUNDS = {"least": ("at least", operator.ge), "most": ("at most", operator.le), "above": ("above", operator.gt)}


class _Panel(NamedTuple):
    """A group of settings in ``--help``; called, it gives a field with what the option shows and bounds its value."""

    title: str

    def __call__(self, default: T, text: str, choices: Iterable[str] = (), **bounds: float) -> T:
        about = {"panel": self.title, "help": text, "choices": tuple(choices), "bounds": bounds}
        return field(default=default, metadata=about)


_data, _model, _training = _Panel("Data"), _Panel("Model"), _Panel("Optimisation")
_machine, _logging = _Panel("Machine"), _Panel("Logging")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides what a training run computes. The default of every setting is here and nowhere else.

    The field metadata (``help``, ``panel``, ``choices``) makes the options of ``fastmtl train``; None as a default
    means that the data set or the hardware decides.

    Raises:
        UsageError: A value has the wrong type, lies outside its range or is none of the allowed ones.
    """

    dataset: str = _data("multimnist", "Data set; `fastmtl data list` names them.")
    dataset_path: str | None = _data(None, "Folder of the data set, where it is not in the package.")
    train_size: int | None = _data(None, "Training examples; the data set's own number if not given.", least=1)
    aug: bool = _data(False, "Change the training examples at random, where the data set knows how.")
    batch_size: int | None = _data(
        None, "Examples in a training batch (of each task, for multi-input data); 64 with MultiMNIST.", least=1
    )
    test_batch_size: int | None = _data(None, "Examples in a batch of evaluation; 256 with MultiMNIST.", least=1)
    limit_batches: int | None = _data(None, "Batches of each pass at most, for a quick try.", least=1)

    arch: str = _model("HPS", "Architecture, in any case:")
    weighting: str = _model("EW", "Weighting strategy, in any case:")
    encoder: str | None = _model(None, "Encoder; the data set's own if not given.")
    pretrained: bool = _model(False, "Start from torchvision's ImageNet weights of the encoder.")
    rep_grad: bool = _model(False, "Weight gradients of the representation, not of the shared parameters.")
    multi_input: bool | None = _model(None, "Each task has its own inputs; the data set says so by itself.")
    load_path: str | None = _model(None, "Start from the weights of this best.pt, or of the folder it is in.")
    load_strict: bool = _model(True, "Refuse a load_path with other names or shapes; else what fits is taken.")
    # They have options of their own, one for each hyper-parameter.
    weight_args: Arguments = field(default_factory=dict)
    arch_args: Arguments = field(default_factory=dict)

    epochs: int = _training(1, "Passes over the training data.", least=1)
    optim: str = _training("adam", "Optimizer.", OPTIMIZERS)
    lr: float = _training(1e-3, "Learning rate.", above=0)
    weight_decay: float = _training(1e-5, "Weight decay.", least=0)
    momentum: float = _training(0.9, "Momentum, for sgd.", least=0)
    # Of groups of parameters, by the beginning of their names.
    group_args: Arguments = field(default_factory=dict)
    scheduler: str | None = _training(
        None,
        "Learning-rate scheduler; onecycle, cos and poly are as long as the run, --lr is onecycle's peak.",
        SCHEDULERS,
    )
    schedule_per: str | None = _training(
        None, "When the scheduler is stepped: every epoch if not given, every step with onecycle.", PERIODS
    )
    warmup: int = _training(0, "Epochs (steps, if it is stepped so) of a linear warm-up before the scheduler.", least=0)
    step_size: int = _training(100, "Epochs (steps) between two decays, for step.", least=1)
    gamma: float = _training(0.5, "Factor of a decay, for step, exp and reduce.", least=0)
    eta_min: float = _training(0.0, "Last learning rate, for cos.", least=0)
    power: float = _training(1.0, "Power of the decay, for poly.", above=0)
    patience: int = _training(10, "Epochs without improvement before a decay, for reduce.", least=0)
    resume_schedule: str = _training(
        "new",
        "With --resume: new for this run's learning rates where they differ, stored for the checkpoint's.",
        RESUMED,
    )
    accumulate: int = _training(1, "Batches whose gradients are averaged for a step.", least=1)
    clip_grad_norm: float | None = _training(None, "Greatest norm of the gradients; no limit by itself.", above=0)
    update_weights_every: int = _training(1, "Steps between two solves of a gradient-balancing strategy.", least=1)
    weight_momentum: float = _training(
        0.0, "Decay of a moving average of the task weights (CR-MOGM); 0 for none.", least=0
    )
    tasks_per_step: int | None = _training(None, "Tasks trained in a step, in turn; all if not given.", least=1)
    gram: str = _training(
        "exact",
        "With several processes: exact for the whole batch's Gram matrix, local for the mean of the processes' own.",
        GRAMS,
    )
    checkpoint_every: int | None = _training(
        None, "Steps after which last.pt is written; at the end of an epoch if not given.", least=1
    )
    sync_batch_norm: bool = _training(
        False, "With several processes, batch norms take the statistics of the whole batch."
    )
    shard: str = _training(
        "none", "With several processes: fsdp for a shard of the parameters and the optimizer's state in each.", SHARDS
    )
    # Numpy's seeds have 32 bits.
    seed: int = _training(0, "Seed of every random number.", least=0, most=2**32 - 1)

    device: str | None = _machine(None, "cpu, cuda, cuda:1, mps; the best there is if not given.")
    precision: str = _machine("fp32", "What the network computes in.", PRECISIONS)
    tf32: bool | None = _machine(None, "Round float32 products to TF32 on CUDA; torch's choice if not given.")
    channels_last: bool = _machine(False, "Keep images in channels-last memory format.")
    compile: bool | str = _machine(False, "Compile the step; auto tries both and keeps the faster.")
    cuda_graph: bool = _machine(False, "Capture the step as a CUDA graph, where that can be.")
    vjps: str = _machine(
        "auto",
        "How the tasks' gradients go through the shared network: one after the other, batched, as far as the Gram "
        "matrix needs them, or compiled in one graph with the forward pass, as auto has it for small networks if "
        "compile is on; auto tries batched and compressed ones from 8 tasks on.",
        VJPS,
    )
    workers: int | None = _machine(None, "Processes that load training data; none where data are in memory.", least=0)
    # OpenMP ends the process where it cannot start as many threads as it is told to.
    threads: int | None = _machine(None, "CPU threads; PyTorch's choice if not given.", least=1, most=1024)
    peer_timeout: float | None = _machine(
        None, "With several processes, seconds one waits for another; torch's choice if not given.", above=0
    )

    validate: bool = _logging(True, "Choose best.pt by the validation split, not by the test split.")
    log_every: int = _logging(20, "Steps between two reads of losses and weights from the device.", least=1)
    tensorboard: bool = _logging(True, "Write TensorBoard events.")
    profile: bool = _logging(False, "Write trace.json of a few warm steps, and print where they went.")
    plot: bool = _logging(True, "Draw curves.png at the end of every epoch.")

    def __post_init__(self) -> None:
        refuse_optimizer(self.optim)
        kinds = typing.get_type_hints(type(self))
        for each in fields(self):
            value = coerce(each.name, getattr(self, each.name), kinds[each.name])
            choices = each.metadata.get("choices")
            if choices and isinstance(value, str):
                value = spelled_as(value, choices, each.name)
            setattr(self, each.name, value)
        if isinstance(self.compile, str):
            if self.compile.lower() not in WORDS:
                raise UsageError(f"compile must be true, false or auto, got {self.compile!r}.")
            self.compile = WORDS[self.compile.lower()]
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and math.isinf(value):
                raise UsageError(f"{each.name} must be a finite number, got {value}.")
            for kind, bound in each.metadata.get("bounds", {}).items():
                wanted, holds = _BOUNDS[kind]
                if value is not None and not holds(value, bound):
                    raise UsageError(f"{each.name} must be {wanted} {bound}, got {value}.")
        args = optimizer_param(self.optim, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum)
        check_group_settings(OPTIMIZERS[args.pop("optim")], args, self.group_args)

    def resolved(self) -> TrainConfig:
        """Return the configuration with names in their own spelling and every hyper-parameter filled in.

        Raises:
            UsageError: An unknown architecture, weighting or hyper-parameter.
        """
        arch = spelled_as(self.arch, ARCHITECTURES, "architecture")
        weighting = spelled_as(self.weighting, WEIGHTINGS, "weighting")
        return replace(
            self,
            arch=arch,
            weighting=weighting,
            arch_args=_fill(arch, ARCHITECTURES[arch].hyper, self.arch_args),
            weight_args=_fill(weighting, WEIGHTINGS[weighting].hyper, self.weight_args),
        )

    def with_hyper(self, values: Mapping[str, object]) -> TrainConfig:
        """Return the configuration with hyper-parameters, by name, given to the weighting or architecture they are of.

        Raises:
            UsageError: A hyper-parameter of neither.
        """
        config, options = self.resolved(), hyper_options()
        weighting, arch = WEIGHTINGS[config.weighting].hyper, ARCHITECTURES[config.arch].hyper
        for name in values:
            if name not in weighting and name not in arch:
                owners = options[name].owners if name in options else ()
                raise UsageError(
                    f"{name} is a hyper-parameter of {' and '.join(owners) or 'nothing'}, but the weighting is "
                    f"{config.weighting} and the architecture {config.arch}."
                )
        weight_args = config.weight_args | {name: value for name, value in values.items() if name in weighting}
        arch_args = config.arch_args | {name: value for name, value in values.items() if name in arch}
        return replace(config, weight_args=weight_args, arch_args=arch_args).resolved()

    @property
    def optim_param(self) -> Arguments:
        """The optimizer in the form the trainer takes."""
        param = optimizer_param(self.optim, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum)
        return {**param, "params": self.group_args} if self.group_args else param

    @property
    def scheduler_param(self) -> Arguments | None:
        """The learning-rate scheduler in the form the trainer takes, or None."""
        if self.scheduler is None and not self.warmup:
            return None
        names = ("step_size", "gamma", "eta_min", "patience", "power", "warmup", "schedule_per")
        length = None if self.warmup or self.schedule_per == "step" else self.epochs
        return scheduler_param(
            self.scheduler or "warmup", length=length, **{name: getattr(self, name) for name in names}
        )

    def as_yaml(self) -> str:
        """Return the configuration as YAML; `read_config` reads it back to an equal one."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def read_config(path: str | Path, **overrides: object) -> TrainConfig:
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
    names = [each.name for each in fields(TrainConfig)]
    settings: Arguments = {spelled_as(str(key), names, f"key in {path}:"): value for key, value in content.items()}
    for name, args in (("weighting", "weight_args"), ("arch", "arch_args")):
        # Hyper-parameters of one strategy mean nothing to the other that takes its place.
        if name in overrides and str(overrides[name]).lower() != str(settings.get(name)).lower():
            settings.pop(args, None)
    return TrainConfig(**{**settings, **overrides})


def _fill(owner: str, declared: Mapping[str, Hyper], given: Mapping[str, object]) -> Arguments:
    spelled: dict[str, object] = {}
    for name, value in given.items():
        if declared:
            name = spelled_as(str(name), declared, f"hyper-parameter of {owner}")
            value = coerce_hyper(name, value, declared[name])
        spelled[name] = value
    return fill_hyper(owner, declared, spelled)
