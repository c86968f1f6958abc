"""LibMTL's command-line arguments, and what the trainer takes made from them.

Example::

    from fastmtl.config import LibMTL_args, prepare_args

    LibMTL_args.add_argument("--epochs", type=int, default=10)
    params = LibMTL_args.parse_args()
    kwargs, optim_param, scheduler_param = prepare_args(params)
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture, find_architecture
from fastmtl.errors import UsageError
from fastmtl.support.hyper import declared, fill_hyper
from fastmtl.support.named import Found
from fastmtl.trainer.optim.optimizer import OPTIMIZERS
from fastmtl.trainer.optim.recipe import SCHEDULERS
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.trainer.run.settings import (
    Arguments,
    HyperOption,
    hyper_options,
    optimizer_param,
    print_settings,
    scheduler_param,
    spelled_as,
)
from fastmtl.weighting import WEIGHTINGS, find_weighting

__all__ = ["LibMTL_args", "prepare_args"]

# Arguments of optimizer and scheduler that mean what the options of ``fastmtl train`` of these names do.
_AS_IN_THE_COMMAND = (
    "optim", "lr", "momentum", "weight_decay", "scheduler", "step_size", "gamma", "eta_min", "power", "warmup",
    "schedule_per", "patience",
)  # fmt: skip


def _make_parser() -> argparse.ArgumentParser:
    # A script may define a flag of its own under a name that is used here.
    parser = argparse.ArgumentParser(description="Configuration of fastmtl", conflict_handler="resolve")
    parser.add_argument("--mode", type=str, default="train", help="train or test")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--gpu_id", type=str, default="0", help="which GPU")
    parser.add_argument("--weighting", type=str, default="EW", help=f"weighting strategy: {', '.join(WEIGHTINGS)}")
    parser.add_argument("--arch", type=str, default="HPS", help=f"architecture: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--rep_grad", action="store_true", help="use gradients of the representation")
    parser.add_argument("--multi_input", action="store_true", help="each task has its own input data")
    parser.add_argument("--save_path", type=str, default=None, help="folder to save the best model in")
    parser.add_argument("--load_path", type=str, default=None, help="checkpoint, or its folder, to start from")
    for name, spec in declared(TrainConfig).items():
        if name in _AS_IN_THE_COMMAND:
            choices = f" One of {', '.join(spec.choices)}." if spec.choices else ""
            parser.add_argument(f"--{name}", type=spec.type, default=spec.default, help=spec.help + choices)
    parser.set_defaults(lr=1e-4)
    parser.add_argument("--T_max", type=int, default=None, help="epochs to anneal over, for cos; --epochs if not given")
    for hyper in hyper_options().values():
        _add_hyper(parser, hyper)
    return parser


def _add_hyper(parser: argparse.ArgumentParser, hyper: HyperOption) -> None:
    spec = hyper.spec
    choices = f": {', '.join(map(str, spec.choices))}" if spec.choices else ""
    text = f"{', '.join(hyper.owners)}: {spec.help}{choices}".replace("%", "%%")
    if spec.type is bool:
        parser.add_argument(f"--{hyper.name}", default=None, help=text, action=argparse.BooleanOptionalAction)
    else:
        parser.add_argument(
            f"--{hyper.name}", default=None, help=text, type=spec.type, nargs="+" if spec.many else None
        )


LibMTL_args = _make_parser()


def prepare_args(params: argparse.Namespace) -> tuple[Arguments, Arguments, Arguments | None]:
    """Return what ``Trainer`` takes from what ``LibMTL_args.parse_args()`` gave, and print the configuration.

    Returns:
        ``{"weight_args": ..., "arch_args": ...}``, ``optim_param`` and ``scheduler_param`` (None without a scheduler).

    Raises:
        UsageError: An unknown name or value; the message gives the nearest valid name.
    """
    # LibMTL's own parser has fewer of them.
    defaults = {name: declared(TrainConfig)[name].default for name in _AS_IN_THE_COMMAND}
    params = argparse.Namespace(**{**defaults, **vars(params)})
    weighting, weight_args = _hyper_of(find_weighting(params.weighting), params)
    # DIY is LibMTL's name for an architecture that the script itself defines.
    its_own = str(params.arch).upper() == "DIY"
    architecture = Found("DIY", AbsArchitecture) if its_own else find_architecture(params.arch)
    arch, arch_args = _hyper_of(architecture, params)
    optim = spelled_as(params.optim, OPTIMIZERS, "optimizer")
    optim_param = optimizer_param(optim, params)
    schedule = _scheduler_param(params)
    general = {
        "Mode": params.mode,
        # Spelled as LibMTL prints it, for scripts that read its logs.
        "Wighting": weighting,
        "Architecture": arch,
        "Rep_Grad": params.rep_grad,
        "Multi_Input": params.multi_input,
        "Seed": params.seed,
        "Save Path": params.save_path,
        "Load Path": params.load_path,
        "Device": f"cuda:{params.gpu_id}" if torch.cuda.is_available() else "cpu",
    }
    print_settings(
        [
            ("General", general),
            (weighting, weight_args),
            (arch, arch_args),
            ("Optimizer", optim_param),
            ("Scheduler", schedule),
        ]
    )
    return {"weight_args": weight_args, "arch_args": arch_args}, optim_param, schedule


def _hyper_of(found: Found[Any], params: argparse.Namespace) -> tuple[str, Arguments]:
    """Return the name in its own spelling and all hyper-parameters of the class."""
    owner, specs = found.name, found.value.hyper
    values = {hyper: getattr(params, hyper, None) for hyper in specs}
    return owner, fill_hyper(owner, specs, {hyper: value for hyper, value in values.items() if value is not None})


def _scheduler_param(params: argparse.Namespace) -> Arguments | None:
    if params.scheduler is None and not params.warmup:
        return None
    name = "warmup" if params.scheduler is None else spelled_as(params.scheduler, SCHEDULERS, "scheduler")
    length = params.T_max or getattr(params, "epochs", None)
    if name == "cos" and length is None:
        raise UsageError("The scheduler cos needs --T_max, the number of epochs it anneals over.")
    if not params.T_max and (params.warmup or params.schedule_per == "step"):
        length = None
    return scheduler_param(name, params, length)
