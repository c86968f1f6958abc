"""The model of a trainer: a network and a strategy in one class."""

from __future__ import annotations

import copyreg
import operator
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import nn

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture, find_architecture
from fastmtl.errors import UsageError
from fastmtl.support.hyper import fill_hyper
from fastmtl.support.kinds import State
from fastmtl.trainer.setup.lazy import settle_shapes
from fastmtl.trainer.setup.tasks import loss_params
from fastmtl.weighting import WEIGHTINGS, AbsWeighting, find_weighting

__all__ = ["MadeModel", "TrainedModel", "make_model", "model_class"]


class TrainedModel(AbsArchitecture, AbsWeighting):
    """A network and a strategy in one, as the model of a trainer is, of classes known when it is made."""

    architecture_name: str


_CLASSES: dict[tuple[type, type], type[TrainedModel]] = {}


def model_class(network: type[AbsArchitecture], rule: type[AbsWeighting]) -> type[TrainedModel]:
    """Return the class of models of a network and a strategy, one and the same whenever it is asked for.

    As in LibMTL it is one class of both: strategies written for it find the network in ``self``. Pickles name the two,
    not the class, which no module has.
    """

    def reduce(model: TrainedModel, protocol: SupportsIndex) -> Any:
        return _by_two_classes(model, super(made, model).__reduce_ex__(max(operator.index(protocol), 2)))

    def get_share_params(model: TrainedModel) -> Iterable[nn.Parameter]:
        shared: Iterable[nn.Parameter] = super(made, model).get_share_params()
        of_losses = set(loss_params(model))
        return [param for param in shared if param not in of_losses] if of_losses else shared

    if (network, rule) in _CLASSES:
        return _CLASSES[network, rule]
    members = {"__module__": __name__, "__reduce_ex__": reduce, "get_share_params": get_share_params}
    made: Any = type("MTLModel", (network, rule), members)
    _CLASSES[network, rule] = made
    return cast(type[TrainedModel], made)


def _by_two_classes(model: TrainedModel, reduced: Any) -> Any:
    """Return how a model is pickled or copied: by its two classes, and without what belongs to a training run."""
    new: Any = copyreg.__newobj__  # type: ignore[attr-defined]
    if not isinstance(reduced, tuple) or reduced[0] is not new or not isinstance(reduced[2], dict):
        # The user's class has a way of its own.
        return reduced
    (kind, *args), state = reduced[1], reduced[2]
    network, rule = kind.__bases__[:2] if kind.__name__ == "MTLModel" else (None, None)
    if network is None or rule is None or model_class(network, rule) is not kind:
        raise UsageError(
            "A model whose parameters are in shards (shard='fsdp') cannot be copied or pickled: load the whole ones of "
            "best.pt or last.pt."
        )
    if model.sum_parts is not None and model.row_states:
        raise UsageError(
            f"{model.strategy_name} remembers gradients, of which each process has a part: the model cannot be copied "
            "or pickled; last.pt has all of them."
        )
    state = {name: value for name, value in state.items() if name != "sum_parts"}
    # The ends of a graph that is gone.
    state |= {name: {} for name in ("rep", "rep_tasks") if name in state}
    if "encoder_class" in state and not _is_picklable(state["encoder_class"]):
        state["encoder_class"] = _Maker(state["encoder_class"])
    return (_unmade_model, (network, rule, *args), state, *reduced[3:])


def _unmade_model(network: type[AbsArchitecture], rule: type[AbsWeighting], *args: Any) -> TrainedModel:
    kind = model_class(network, rule)
    return kind.__new__(kind, *args)


class _Maker:
    """An ``encoder_class`` that cannot be pickled, such as a lambda: copies keep it, pickles leave it out."""

    def __init__(self, make: Callable[[], nn.Module] | None = None) -> None:
        self._make = make

    def __call__(self) -> nn.Module:
        if self._make is None:
            raise UsageError("The encoder_class of this model could not be pickled: define it in a module.")
        return self._make()

    def __deepcopy__(self, memo: object) -> _Maker:
        return self

    def __reduce__(self) -> tuple[type[_Maker], tuple[()]]:
        return _Maker, ()


def _is_picklable(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


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
    hyper: dict[str, State],
    example_inputs: Any = None,
) -> MadeModel:
    """Make the model of a trainer; checks ``hyper``, its ``weight_args`` and ``arch_args``, and fills in defaults."""
    rule, network = _resolved(weighting, architecture, hyper)
    model = model_class(network, rule)(
        task_name=list(task_name),
        encoder_class=encoder_class,
        decoders=decoders if isinstance(decoders, nn.ModuleDict) else nn.ModuleDict(decoders),
        rep_grad=rep_grad,
        multi_input=multi_input,
        device=device,
        **hyper["arch_args"],
    )
    model.strategy_name, model.architecture_name = rule.__name__, network.__name__
    settle_shapes(model, example_inputs)
    network_params = set(model.parameters())
    model.init_param()
    return MadeModel(model, rule, network, [param for param in model.parameters() if param not in network_params])


def _resolved(
    weighting: str | type[AbsWeighting], architecture: str | type[AbsArchitecture], hyper: dict[str, State]
) -> tuple[type[AbsWeighting], type[AbsArchitecture]]:
    """Return the two classes, and fill in the defaults of their hyper-parameters."""
    rule = find_weighting(weighting).value if isinstance(weighting, str) else weighting
    network = architecture if isinstance(architecture, type) else find_architecture(architecture).value
    for kind, known, name in ((rule, WEIGHTINGS, "weight_args"), (network, ARCHITECTURES, "arch_args")):
        # A class of the user's that declares no table takes whatever it is given.
        if kind.hyper or kind in known.values():
            hyper[name] = fill_hyper(kind.__name__, kind.hyper, hyper[name])
    return rule, network
