"""The arguments of the trainer, and a constructor that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from fastmtl.architecture import AbsArchitecture
from fastmtl.support.hyper import declared
from fastmtl.support.kinds import State
from fastmtl.trainer.log.logger import Logger
from fastmtl.trainer.optim.optimizer import MakesOptimizer
from fastmtl.trainer.setup.options import TrainerOptions
from fastmtl.weighting import AbsWeighting

__all__ = ["TrainerArguments", "takes"]

P = ParamSpec("P")
A = TypeVar("A")
S = TypeVar("S")


@dataclass(frozen=True)
class TrainerArguments(TrainerOptions):
    """All arguments of `Trainer`: the options, and those that its docstring describes."""

    task_dict: dict[str, dict[str, Any]]
    weighting: str | type[AbsWeighting]
    architecture: str | type[AbsArchitecture]
    encoder_class: Callable[[], nn.Module]
    decoders: nn.ModuleDict | Mapping[str, nn.Module]
    rep_grad: bool
    multi_input: bool
    optim_param: Mapping[str, Any] | None
    scheduler_param: Mapping[str, Any] | None
    save_path: str | Path | None = None
    load_path: str | Path | None = None
    example_inputs: Any = field(default=None, kw_only=True)
    split_batch: Callable[[Any, Any], Any] | None = field(default=None, kw_only=True)
    optimizer: MakesOptimizer | None = field(default=None, kw_only=True)
    scheduler: Callable[..., Any] | None = field(default=None, kw_only=True)
    logger: Logger | str | Sequence[Logger | str] | None = field(default=None, kw_only=True)
    resume: str | Path | None = field(default=None, kw_only=True)
    profile: str | Path | None = field(default=None, kw_only=True)
    weight_args: Mapping[str, Any] | None = field(default=None, kw_only=True)
    arch_args: Mapping[str, Any] | None = field(default=None, kw_only=True)


def takes(arguments: Callable[P, A]) -> Callable[[Callable[[S, A, State], None]], Callable[Concatenate[S, P], None]]:
    """Give a constructor the arguments of a dataclass.

    The decorated function is called with an object of the dataclass, and with the keyword arguments that are not among
    its fields.
    """
    names = inspect.signature(arguments).parameters
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keyword = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation=Any)
    made: Any = arguments

    def decorate(init: Callable[[S, A, State], None]) -> Callable[Concatenate[S, P], None]:
        def construct(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            values: State = dict(kwargs)
            further = {name: values.pop(name) for name in kwargs if name not in names}
            init(self, arguments(*args, **values), further)

        # Errors of missing arguments name the constructor.
        made.__init__.__qualname__ = init.__qualname__
        described = (f"{name}: {spec.help}" for name, spec in declared(arguments).items())
        construct.__doc__ = "Options:\n\n" + "\n".join(described)
        construct.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [first, *names.values(), keyword], return_annotation=None
        )
        construct.__name__, construct.__qualname__ = init.__name__, init.__qualname__
        return construct

    return decorate
