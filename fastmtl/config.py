"""LibMTL's command-line arguments, and what the trainer takes made from them.

Example::

    from fastmtl.config import LibMTL_args, prepare_args

    LibMTL_args.add_argument("--epochs", type=int, default=10)
    params = LibMTL_args.parse_args()
    kwargs, optim_param, scheduler_param = prepare_args(params)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper, fill_hyper
from fastmtl.support.names import resolve_name
from fastmtl.trainer.optimizer import OPTIMIZERS, SCHEDULERS
from fastmtl.weighting import WEIGHTINGS

__all__ = ["LibMTL_args", "prepare_args"]


def _any_of(names: Iterable[str]) -> str:
    return ", ".join(names)


def _make_parser() -> argparse.ArgumentParser:
    # A script may define a flag of its own under a name that is used here.
    parser = argparse.ArgumentParser(description="Configuration of fastmtl", conflict_handler="resolve")
    parser.add_argument("--mode", type=str, default="train", help="train or test")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--gpu_id", type=str, default="0", help="which GPU")
    parser.add_argument("--weighting", type=str, default="EW", help=f"weighting strategy: {_any_of(WEIGHTINGS)}")
    parser.add_argument("--arch", type=str, default="HPS", help=f"architecture: {_any_of(ARCHITECTURES)}")
    parser.add_argument("--rep_grad", action="store_true", help="use gradients of the representation")
    parser.add_argument("--multi_input", action="store_true", help="each task has its own input data")
    parser.add_argument("--save_path", type=str, default=None, help="folder to save the best model in")
    parser.add_argument("--load_path", type=str, default=None, help="checkpoint, or its folder, to start from")
    parser.add_argument("--optim", type=str, default="adam", help=f"optimizer: {_any_of(OPTIMIZERS)}")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum, for sgd")
    parser.add_argument("--weight_decay", type=float, default=1e-5, help="weight decay")
    parser.add_argument("--scheduler", type=str, default=None, help=f"scheduler: {_any_of(SCHEDULERS)}")
    parser.add_argument("--step_size", type=int, default=100, help="epochs between two decays, for step")
    parser.add_argument("--gamma", type=float, default=0.5, help="factor of a decay, for step, exp and reduce")
    parser.add_argument("--T_max", type=int, default=None, help="epochs to anneal over, for cos; --epochs if not given")
    parser.add_argument("--eta_min", type=float, default=0.0, help="last learning rate, for cos")
    parser.add_argument("--patience", type=int, default=10, help="epochs without improvement, for reduce")
    for name, (spec, owners) in _hyper_flags().items():
        _add_hyper(parser, name, spec, owners)
    return parser


def _hyper_flags() -> dict[str, tuple[Hyper, list[str]]]:
    """Return every hyper-parameter with the classes that have it; several may share one name."""
    flags: dict[str, tuple[Hyper, list[str]]] = {}
    classes: dict[str, Any] = {**WEIGHTINGS, **ARCHITECTURES}
    for owner, kind in classes.items():
        for name, spec in kind.hyper.items():
            flags.setdefault(name, (spec, []))[1].append(owner)
    return flags


def _add_hyper(parser: argparse.ArgumentParser, name: str, spec: Hyper, owners: list[str]) -> None:
    choices = f": {_any_of(map(str, spec.choices))}" if spec.choices else ""
    options: dict[str, Any] = {"default": None, "help": f"{_any_of(owners)}: {spec.help}{choices}".replace("%", "%%")}
    if spec.type is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": spec.type, "nargs": "+" if spec.many else None}
    parser.add_argument(f"--{name}", **options)


LibMTL_args = _make_parser()


def prepare_args(params: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Return what ``Trainer`` takes from parsed arguments, and print the configuration.

    Args:
        params: What ``LibMTL_args.parse_args()`` gave.

    Returns:
        ``{"weight_args": ..., "arch_args": ...}``, ``optim_param`` and ``scheduler_param`` (None without a scheduler).

    Raises:
        UsageError: An unknown name or value; the message gives the nearest valid name.
    """
    kwargs = {
        "weight_args": _hyper_of(params, "weighting", WEIGHTINGS),
        "arch_args": _hyper_of(params, "arch", _architectures()),
    }
    optim_param = _optim_param(params)
    scheduler_param = _scheduler_param(params)
    _display(params, kwargs, optim_param, scheduler_param)
    return kwargs, optim_param, scheduler_param


def _spelling(name: str, names: Iterable[str], what: str) -> str:
    return resolve_name(name, {each: each for each in names}, what)


def _architectures() -> dict[str, type[AbsArchitecture]]:
    # DIY is LibMTL's name for an architecture that the script itself defines.
    return {**ARCHITECTURES, "DIY": AbsArchitecture}


_WHAT = {"weighting": "weighting", "arch": "architecture"}


def _hyper_of(params: argparse.Namespace, flag: str, classes: Mapping[str, Any]) -> dict[str, Any]:
    owner = _spelling(getattr(params, flag), classes, _WHAT[flag])
    declared = classes[owner].hyper
    given = {name: getattr(params, name, None) for name in declared}
    return fill_hyper(owner, declared, {name: value for name, value in given.items() if value is not None})


def _optim_param(params: argparse.Namespace) -> dict[str, Any]:
    name = _spelling(params.optim, OPTIMIZERS, "optimizer")
    param = {"optim": name, "lr": params.lr, "weight_decay": params.weight_decay}
    return {**param, "momentum": params.momentum} if name == "sgd" else param


def _scheduler_param(params: argparse.Namespace) -> dict[str, Any] | None:
    if params.scheduler is None:
        return None
    name = _spelling(params.scheduler, SCHEDULERS, "scheduler")
    own: dict[str, dict[str, Any]] = {
        "step": {"step_size": params.step_size, "gamma": params.gamma},
        "exp": {"gamma": params.gamma},
        "cos": {"T_max": params.T_max or getattr(params, "epochs", None), "eta_min": params.eta_min},
        # The trainer steps it with the improvement over the first epoch, which is better when larger.
        "reduce": {"mode": "max", "factor": params.gamma, "patience": params.patience},
    }
    if name == "cos" and own["cos"]["T_max"] is None:
        raise UsageError("The scheduler cos needs --T_max, the number of epochs it anneals over.")
    return {"scheduler": name, **own[name]}


def _display(
    params: argparse.Namespace,
    kwargs: Mapping[str, Mapping[str, Any]],
    optim_param: Mapping[str, Any],
    scheduler_param: Mapping[str, Any] | None,
) -> None:
    weighting = _spelling(params.weighting, WEIGHTINGS, "weighting")
    arch = _spelling(params.arch, _architectures(), "architecture")
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
    print("=" * 40)
    sections: list[tuple[str, Mapping[str, Any] | None]] = [
        ("General", general),
        (weighting, kwargs["weight_args"]),
        (arch, kwargs["arch_args"]),
        ("Optimizer", optim_param),
        ("Scheduler", scheduler_param),
    ]
    for title, values in sections:
        if values:
            print(f"{title} Configuration:")
            for name, value in values.items():
                print(f"\t{name}: {value}")
