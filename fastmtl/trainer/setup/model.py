"""The model of a trainer: a network and a strategy in one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture
from fastmtl.support.hyper import fill_hyper
from fastmtl.support.names import resolve_name
from fastmtl.weighting import WEIGHTINGS, AbsWeighting

__all__ = ["MadeModel", "TrainedModel", "make_model"]


class TrainedModel(AbsArchitecture, AbsWeighting):
    """A network and a strategy in one, as the model of a trainer is, of classes known when it is made."""

    architecture_name: str


class MadeModel(NamedTuple):
    """A model, the classes it is made of, and the parameters that are the strategy's own."""

    model: TrainedModel
    rule: type[AbsWeighting]
    network: type[AbsArchitecture]
    strategy_params: list[nn.Parameter]


def make_model(
    weighting: str | type[AbsWeighting],
    architecture: str | type[AbsArchitecture],
    *,
    task_name: Sequence[str],
    encoder_class: Callable[[], nn.Module],
    decoders: nn.ModuleDict | Mapping[str, nn.Module],
    rep_grad: bool,
    multi_input: bool,
    device: torch.device,
    given: dict[str, dict[str, Any]],
) -> MadeModel:
    """Make the model of a trainer; checks ``given``, its ``weight_args`` and ``arch_args``, and fills in defaults."""
    rule, network = _resolved(weighting, architecture, given)
    # One class of both, as in LibMTL: strategies written for it find the network in ``self``.
    model: TrainedModel = type("MTLModel", (network, rule), {})(
        task_name=task_name,
        encoder_class=encoder_class,
        decoders=decoders if isinstance(decoders, nn.ModuleDict) else nn.ModuleDict(decoders),
        rep_grad=rep_grad,
        multi_input=multi_input,
        device=device,
        **given["arch_args"],
    )
    model.strategy_name, model.architecture_name = rule.__name__, network.__name__
    network_params = set(model.parameters())
    model.init_param()
    return MadeModel(model, rule, network, [param for param in model.parameters() if param not in network_params])


def _resolved(
    weighting: str | type[AbsWeighting], architecture: str | type[AbsArchitecture], given: dict[str, dict[str, Any]]
) -> tuple[type[AbsWeighting], type[AbsArchitecture]]:
    """Return the two classes, and fill in the defaults of their hyper-parameters."""
    rule = resolve_name(weighting, WEIGHTINGS, "weighting") if isinstance(weighting, str) else weighting
    network = (
        architecture if isinstance(architecture, type) else resolve_name(architecture, ARCHITECTURES, "architecture")
    )
    for kind, known, name in ((rule, WEIGHTINGS, "weight_args"), (network, ARCHITECTURES, "arch_args")):
        # A class of the user's that declares no table takes whatever it is given.
        if kind.hyper or kind in known.values():
            given[name] = fill_hyper(kind.__name__, kind.hyper, given[name])
    return rule, network
