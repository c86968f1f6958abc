"""The model of a trainer: a network and a strategy in one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class MadeModel:
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
    """Make the model of a trainer.

    Args:
        weighting: A strategy or its name.
        architecture: An architecture or its name.
        task_name: The tasks.
        encoder_class: Makes the encoder.
        decoders: The decoder of each task.
        rep_grad: See the trainer.
        multi_input: See the trainer.
        device: The device of the model.
        given: ``weight_args`` and ``arch_args``; defaults are filled in.

    Raises:
        UsageError: An unknown name or hyper-parameter.
    """
    rule = resolve_name(weighting, WEIGHTINGS, "weighting") if isinstance(weighting, str) else weighting
    network = (
        resolve_name(architecture, ARCHITECTURES, "architecture") if isinstance(architecture, str) else architecture
    )
    # A class of the user's that declares no table takes whatever it is given.
    if rule.hyper or rule in WEIGHTINGS.values():
        given["weight_args"] = fill_hyper(rule.__name__, rule.hyper, given["weight_args"])
    if network.hyper or network in ARCHITECTURES.values():
        given["arch_args"] = fill_hyper(network.__name__, network.hyper, given["arch_args"])
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
