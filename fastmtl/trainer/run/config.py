"""The configuration of a training run: one dataclass behind the command line, the YAML file and the run directory."""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import yaml

from fastmtl.architecture import ARCHITECTURES
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper, fill_hyper
from fastmtl.trainer.optimizer import OPTIMIZERS, SCHEDULERS
from fastmtl.trainer.precision import PRECISIONS
from fastmtl.trainer.run.convert import WORDS, coerce, coerce_hyper
from fastmtl.trainer.run.settings import Arguments, hyper_options, optimizer_param, scheduler_param, spelled_as
from fastmtl.trainer.setup.options import GRAMS, SHARDS, VJPS
from fastmtl.weighting import WEIGHTINGS

__all__ = ["TrainConfig", "read_config"]

T = TypeVar("T")

_BOUNDS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}


def _setting(
    default: T,
    panel: str,
    text: str,
    choices: Iterable[str] = (),
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> T:
    """Return a field with what its option shows and the bounds of its value."""
    bounds = {"at least": least, "at most": most, "above": above}
    return field(default=default, metadata={"panel": panel, "help": text, "choices": tuple(choices), "bounds": bounds})


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
    train_size: int | None = _setting(
        None, "Data", "Training examples; the data set's own number if not given.", least=1
    )
    aug: bool = _setting(False, "Data", "Change the training examples at random, where the data set knows how.")
    batch_size: int | None = _setting(
        None, "Data", "Examples in a training batch (of each task, for multi-input data); 64 with MultiMNIST.", least=1
    )
    test_batch_size: int | None = _setting(
        None, "Data", "Examples in a batch of evaluation; 256 with MultiMNIST.", least=1
    )
    limit_batches: int | None = _setting(None, "Data", "Batches of each pass at most, for a quick try.", least=1)

    arch: str = _setting("HPS", "Model", "Architecture, in any case:")
    weighting: str = _setting("EW", "Model", "Weighting strategy, in any case:")
    encoder: str | None = _setting(None, "Model", "Encoder; the data set's own if not given.")
    pretrained: bool = _setting(False, "Model", "Start from torchvision's ImageNet weights of the encoder.")
    rep_grad: bool = _setting(False, "Model", "Weight gradients of the representation, not of the shared parameters.")
    multi_input: bool | None = _setting(None, "Model", "Each task has its own inputs; the data set says so by itself.")
    load_path: str | None = _setting(
        None, "Model", "Start from the weights of this best.pt, or of the folder it is in."
    )
    # They have options of their own, one for each hyper-parameter.
    weight_args: Arguments = field(default_factory=dict)
    arch_args: Arguments = field(default_factory=dict)

    epochs: int = _setting(1, "Optimisation", "Passes over the training data.", least=1)
    optim: str = _setting("adam", "Optimisation", "Optimizer.", tuple(OPTIMIZERS))
    lr: float = _setting(1e-3, "Optimisation", "Learning rate.", above=0)
    weight_decay: float = _setting(1e-5, "Optimisation", "Weight decay.", least=0)
    momentum: float = _setting(0.9, "Optimisation", "Momentum, for sgd.", least=0)
    scheduler: str | None = _setting(
        None, "Optimisation", "Learning-rate scheduler, stepped every epoch.", tuple(SCHEDULERS)
    )
    step_size: int = _setting(100, "Optimisation", "Epochs between two decays, for step.", least=1)
    gamma: float = _setting(0.5, "Optimisation", "Factor of a decay, for step, exp and reduce.", least=0)
    eta_min: float = _setting(0.0, "Optimisation", "Last learning rate, for cos.", least=0)
    patience: int = _setting(10, "Optimisation", "Epochs without improvement before a decay, for reduce.", least=0)
    accumulate: int = _setting(1, "Optimisation", "Batches whose gradients are averaged for a step.", least=1)
    clip_grad_norm: float | None = _setting(
        None, "Optimisation", "Greatest norm of the gradients; no limit by itself.", above=0
    )
    update_weights_every: int = _setting(
        1, "Optimisation", "Steps between two solves of a gradient-balancing strategy.", least=1
    )
    weight_momentum: float = _setting(
        0.0, "Optimisation", "Decay of a moving average of the task weights (CR-MOGM); 0 for none.", least=0
    )
    tasks_per_step: int | None = _setting(
        None, "Optimisation", "Tasks trained in a step, in turn; all if not given.", least=1
    )
    gram: str = _setting(
        "exact",
        "Optimisation",
        "With several processes: exact for the whole batch's Gram matrix, local for the mean of the processes' own.",
        GRAMS,
    )
    checkpoint_every: int | None = _setting(
        None, "Optimisation", "Steps after which last.pt is written; at the end of an epoch if not given.", least=1
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
    # Numpy's seeds have 32 bits.
    seed: int = _setting(0, "Optimisation", "Seed of every random number.", least=0, most=2**32 - 1)

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
    workers: int | None = _setting(
        None, "Machine", "Processes that load training data; none where data are in memory.", least=0
    )
    # OpenMP ends the process where it cannot start as many threads as it is told to.
    threads: int | None = _setting(None, "Machine", "CPU threads; PyTorch's choice if not given.", least=1, most=1024)
    peer_timeout: float | None = _setting(
        None, "Machine", "With several processes, seconds one waits for another; torch's choice if not given.", above=0
    )

    validate: bool = _setting(True, "Logging", "Choose best.pt by the validation split, not by the test split.")
    log_every: int = _setting(20, "Logging", "Steps between two reads of losses and weights from the device.", least=1)
    tensorboard: bool = _setting(True, "Logging", "Write TensorBoard events.")
    profile: bool = _setting(False, "Logging", "Write trace.json of a few warm steps, and print where they went.")
    plot: bool = _setting(True, "Logging", "Draw curves.png at the end of every epoch.")

    def __post_init__(self) -> None:
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
            for wanted, bound in each.metadata.get("bounds", {}).items():
                if not (value is None or bound is None or _BOUNDS[wanted](value, bound)):
                    raise UsageError(f"{each.name} must be {wanted} {bound}, got {value}.")

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
        return optimizer_param(self.optim, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum)

    @property
    def scheduler_param(self) -> Arguments | None:
        """The learning-rate scheduler in the form the trainer takes, or None."""
        if self.scheduler is None:
            return None
        return scheduler_param(
            self.scheduler,
            step_size=self.step_size,
            gamma=self.gamma,
            epochs=self.epochs,
            eta_min=self.eta_min,
            patience=self.patience,
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
