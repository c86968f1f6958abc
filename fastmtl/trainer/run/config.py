"""The configuration of a training run: one dataclass behind the command line, the YAML file and the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fastmtl.architecture import find_architecture
from fastmtl.errors import UsageError
from fastmtl.support.hyper import declared, fill_hyper, option
from fastmtl.support.named import Found, is_spec, short_name, whole_spec
from fastmtl.trainer.optim.optimizer import OPTIMIZERS, check_group_settings, refuse_optimizer
from fastmtl.trainer.optim.recipe import PERIODS, SCHEDULERS
from fastmtl.trainer.run.settings import (
    Arguments,
    converted,
    hyper_options,
    optimizer_param,
    scheduler_param,
    spelled_as,
)
from fastmtl.trainer.setup.options import TrainerOptions
from fastmtl.weighting import find_weighting

__all__ = ["TrainConfig", "config_of", "names_in", "read_config"]

_data, _model, _training = (partial(option, panel=title) for title in ("Data", "Model", "Optimisation"))
_machine, _logging = (partial(option, panel=title) for title in ("Machine", "Logging"))
_schedule = partial(_training, resumable=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainerOptions):
    """Everything that decides what a training run computes: the trainer's options and those of the command.

    They are the flags of ``fastmtl train``; None as a default means that the data set or the hardware decides.

    Raises:
        UsageError: A value has the wrong type, lies outside its range or is none of the allowed ones.
    """

    dataset: str = _data("multimnist", "Data set; `fastmtl data list` names them. Also MODULE:NAME or FILE.py:NAME.")
    dataset_path: str | None = _data(None, "Folder of the data set, where it is not in the package.")
    inputs: str | None = _data(None, "Columns that are the inputs, for data with columns: image, or length,width.")
    tasks: Arguments = _data(
        {},
        "What each task is, for data with columns: price=regression,colour=classes. In YAML also `{kind:, column:, "
        "labels:, outputs:}`; kinds are classes, binary, regression, segmentation, depth and normals.",
    )
    negatives: Arguments = _data(
        {},
        "Negatives of a task for each of its positives in an epoch, drawn anew each time, for tables: click=4. All if "
        "not given.",
    )
    stream: bool | None = _data(
        None,
        "Read parquet files a few groups of rows at a time, as they are needed; if not given, where they are larger "
        "than 1 GiB, have a test split and columns of numbers as inputs.",
    )
    train_size: int | None = _data(None, "Training examples; the data set's own number if not given.", least=1)
    aug: bool = _data(False, "Change the training examples at random, where the data set knows how.")
    batch_size: int | None = _data(
        None, "Examples in a training batch (of each task, for multi-input data); 64 with MultiMNIST.", least=1
    )
    test_batch_size: int | None = _data(None, "Examples in a batch of evaluation; 256 with MultiMNIST.", least=1)

    arch: str = _model("HPS", "Architecture, in any case, or MODULE:NAME or FILE.py:NAME.")
    weighting: str = _model("EW", "Weighting strategy, in any case, or MODULE:NAME or FILE.py:NAME.")
    encoder: str | None = _model(
        None,
        "Encoder; the data set's own if not given. Also timm:NAME, torchvision:NAME, hf:NAME or hf:FOLDER, "
        "torch_geometric:NAME.",
    )
    encoder_args: Arguments = _model({}, "Arguments of the encoder: drop_path_rate=0.1, or lora=8 with hf.")
    pretrained: bool = _model(False, "Start from the weights that the encoder comes with, such as ImageNet's.")
    loss: Arguments = _model({}, "Losses of tasks in place of the data set's: size=huber,shape=./my_loss.py:New.")
    metric: Arguments = _model({}, "Metrics of tasks in place of the data set's; in YAML with arguments.")
    rep_grad: bool = _model(False, "Weight gradients of the representation, not of the shared parameters.")
    multi_input: bool | None = _model(
        None, "Each task has its own inputs. The command asks the data set, and refuses another value."
    )
    load_path: str | None = _model(None, "Start from the weights of this best.pt, or of the folder it is in.")
    weight_args: Arguments = _model({}, "Hyper-parameters of the weighting, which have flags of their own.", flag=False)
    arch_args: Arguments = _model(
        {}, "Hyper-parameters of the architecture, which have flags of their own.", flag=False
    )

    epochs: int = _schedule(1, "Passes over the training data.", least=1)
    optim: str = _training("adam", "Optimizer.", choices=OPTIMIZERS)
    lr: float = _schedule(1e-3, "Learning rate.", above=0)
    weight_decay: float = _schedule(1e-5, "Weight decay.", least=0)
    momentum: float = _schedule(0.9, "Momentum, for sgd.", least=0)
    group_args: Arguments = _schedule(
        {}, "Settings of the optimizer for groups of parameters, by the beginning of their names.", flag=False
    )
    scheduler: str | None = _schedule(
        None,
        "Learning-rate scheduler; onecycle, cos and poly are as long as the run, --lr is onecycle's peak.",
        choices=SCHEDULERS,
    )
    schedule_per: str | None = _schedule(
        None,
        "Whether the scheduler advances after every epoch or after every step. If not given, onecycle goes by steps, "
        "all others by epochs.",
        choices=PERIODS,
    )
    warmup: int = _schedule(
        0,
        "Length of a linear warm-up before the scheduler, in epochs, or in steps with schedule_per step.",
        least=0,
    )
    step_size: int = _schedule(100, "Epochs (steps) between two decays, for step.", least=1)
    gamma: float = _schedule(0.5, "Factor of a decay, for step, exp and reduce.", least=0)
    eta_min: float = _schedule(0.0, "Last learning rate, for cos, and the lowest one, for reduce.", least=0)
    power: float = _schedule(1.0, "Power of the decay, for poly.", above=0)
    patience: int = _schedule(10, "Epochs without improvement before a decay, for reduce.", least=0)
    # Numpy's seeds have 32 bits.
    seed: int = _training(0, "Seed of every random number.", least=0, most=2**32 - 1)

    workers: int | None = _machine(
        None, "Processes that load training data; none where data are in memory.", least=0, resumable=True
    )
    # OpenMP ends the process where it cannot start as many threads as it is told to.
    threads: int | None = _machine(
        None, "CPU threads; PyTorch's choice if not given.", least=1, most=1024, resumable=True
    )

    validate: bool = _logging(True, "Choose best.pt by the validation split, not by the test split.")
    logger: str | None = _logging(
        None,
        "Further loggers: csv, wandb, mlflow, or MODULE:NAME or FILE.py:NAME; several as csv,wandb.",
        resumable=True,
    )
    tensorboard: bool = _logging(True, "Write TensorBoard events.", resumable=True)
    cosines: bool = _logging(
        False,
        "Log cosines and conflicts of the task gradients with strategies that need no gradients too, by one more pass "
        "per task in every log interval.",
        resumable=True,
    )
    profile: bool = _logging(False, "Write trace.json of a few warm steps, and print where they went.", resumable=True)
    plot: bool = _logging(True, "Draw curves.png at the end of every epoch.", resumable=True)

    def __post_init__(self) -> None:
        refuse_optimizer(self.optim)
        for name, spec in declared(TrainConfig).items():
            object.__setattr__(self, name, converted(name, getattr(self, name), spec))
        super().__post_init__()
        args = optimizer_param(self.optim, self)
        check_group_settings(OPTIMIZERS[args.pop("optim")], args, self.group_args)

    def resolved(self) -> TrainConfig:
        """Return the configuration with names in their own spelling and every hyper-parameter filled in.

        Files of code, and folders of encoders, get absolute paths, so that they are the same from any folder.

        Raises:
            UsageError: An unknown architecture, weighting or hyper-parameter.
        """
        config, weighting = self.for_network(), find_weighting(self.weighting)
        return replace(
            config,
            weighting=weighting.name,
            weight_args=_fill(weighting, self.weight_args),
            dataset=whole_spec(self.dataset),
            encoder=None if self.encoder is None else whole_spec(self.encoder),
            loss={task: _whole(given) for task, given in self.loss.items()},
            metric={task: _whole(given) for task, given in self.metric.items()},
            logger=None if self.logger is None else ",".join(map(whole_spec, names_in(self.logger))),
        )

    def for_network(self) -> TrainConfig:
        """Return the configuration with the architecture resolved, and no other code that it names imported.

        Raises:
            UsageError: An unknown architecture, or a hyper-parameter that it does not have.
        """
        arch = find_architecture(self.arch)
        return replace(self, arch=arch.name, arch_args=_fill(arch, self.arch_args))

    def with_hyper(self, values: Mapping[str, object]) -> TrainConfig:
        """Return the configuration with hyper-parameters, by name, given to the weighting or architecture they are of.

        Raises:
            UsageError: A hyper-parameter of neither.
        """
        config, options = self.resolved(), hyper_options()
        weighting, arch = find_weighting(config.weighting).value.hyper, find_architecture(config.arch).value.hyper
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
        param = optimizer_param(self.optim, self)
        return {**param, "params": self.group_args} if self.group_args else param

    @property
    def scheduler_param(self) -> Arguments | None:
        """The learning-rate scheduler in the form the trainer takes, or None."""
        if self.scheduler is None and not self.warmup:
            return None
        length = None if self.warmup or self.schedule_per == "step" else self.epochs
        return scheduler_param(self.scheduler or "warmup", self, length)

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
    return config_of(content, path, **overrides)


def config_of(content: Mapping[str, Any], place: str | Path, **overrides: object) -> TrainConfig:
    """Return the configuration in settings by name, with `overrides` in place of what they say.

    If they name another weighting or architecture, the settings' hyper-parameters of that go too. ``place`` is where
    the settings are written.

    Raises:
        UsageError: An unknown key or a value that cannot be.
    """
    specs = declared(TrainConfig)
    settings: Arguments = {spelled_as(str(key), specs, f"key in {place}:"): value for key, value in content.items()}
    for name in ("inputs", "logger"):
        value = settings.get(name)
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            settings[name] = ",".join(value)
    for name, spec in specs.items():
        if spec.same_as is not None and {name, spec.same_as} & overrides.keys():
            # Both names of the option in the file give way to either of them.
            settings.pop(name, None)
            settings.pop(spec.same_as, None)
    for name, args in (("weighting", "weight_args"), ("arch", "arch_args")):
        # Hyper-parameters of one strategy mean nothing to the other that takes its place.
        if name in overrides and str(overrides[name]).lower() != str(settings.get(name)).lower():
            settings.pop(args, None)
    return TrainConfig(**{**settings, **overrides})


def names_in(text: str | None) -> list[str]:
    """Return the names in a list such as ``"length,width"``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _whole(given: Any) -> Any:
    """Return a name, or a mapping with a name and arguments, with the whole path of the file that it names."""
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return {**given, "name": whole_spec(given["name"])}
    return whole_spec(given) if isinstance(given, str) else given


def _fill(found: Found[Any], values: Mapping[str, object]) -> Arguments:
    owner, specs = short_name(found.name), found.value.hyper
    if not specs and is_spec(found.name):
        # A class of the user's that declares no table takes whatever it is given.
        return dict(values)
    spelled: dict[str, object] = {}
    for name, value in values.items():
        if specs:
            name = spelled_as(str(name), specs, f"hyper-parameter of {owner}")
            value = converted(name, value, specs[name])
        spelled[name] = value
    return fill_hyper(owner, specs, spelled)
