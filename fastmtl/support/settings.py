"""Settings and state of modules, declared once: constructors, checks and ``repr`` follow from the declaration.

Example::

    class MGDAWeighting(GramWeighting):
        epsilon: float = setting(default=0.001, above=0)

    class MGDA(Declared, GramianWeightedAggregator[MGDAWeighting], of=MGDAWeighting):
        epsilon: float = MGDAWeighting.epsilon
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar, Literal, dataclass_transform

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.hyper import LIMITS
from fastmtl.support.stateful import Stateful

__all__ = ["Declared", "Described", "Setting", "setting", "state", "vector", "vector_string", "weighting_of"]


class Setting:
    """A constructor argument that is also an attribute, checked whenever it is set.

    Args:
        default: The default, ``Parameter.empty`` for none.
        allowed: Returns whether a value is allowed; None allows any.
        what: Describes the allowed values, for errors.
    """

    name: str

    def __init__(self, default: Any, allowed: Callable[[Any], bool] | None = None, what: str = "") -> None:
        self.default = default
        self.allowed = allowed
        self.what = what

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        # Modules store parameters and buffers elsewhere.
        values = vars(instance)
        return values[self.name] if self.name in values else instance.__getattr__(self.name)

    def __set__(self, instance: object, value: Any) -> None:
        if self.allowed is not None and not self.allowed(value):
            raise UsageError(f"{self.name} of {type(instance).__name__} must be {self.what}, got {value!r}.")
        vars(instance)[self.name] = value


def setting(*, default: Any = Parameter.empty, **limits: float) -> Any:
    """Declare a setting: any value, or a number with limits called ``least``, ``most``, ``above`` and ``below``."""

    def allowed(value: Any) -> bool:
        return all(LIMITS[name][1](value, limit) for name, limit in limits.items())

    return Setting(default, allowed, " and ".join(f"{LIMITS[name][0]} {limit:g}" for name, limit in limits.items()))


def vector(*, default: Any = Parameter.empty) -> Any:
    """Declare a setting that is a vector (T,) or None."""
    return Setting(default, lambda value: value is None or value.dim() == 1, "None or of shape (T,)")


class _State:
    """A tensor in a module's state."""


def state(*, init: Literal[False] = False) -> Any:
    """Declare a buffer that keeps its value between calls, None at first; not an argument of the constructor."""
    return _State()


class _Through:
    """An attribute of an aggregator that is stored in its weighting."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else getattr(weighting_of(instance), self.name)

    def __set__(self, instance: object, value: Any) -> None:
        setattr(weighting_of(instance), self.name, value)


def weighting_of(aggregator: Any) -> Any:
    """Return the weighting with an aggregator's settings and state."""
    return aggregator.gramian_weighting if hasattr(aggregator, "gramian_weighting") else aggregator.weighting


class Described:
    """A class whose ``repr`` gives its settings.

    Attributes:
        settings: Their names, in order.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"


@dataclass_transform(field_specifiers=(setting, vector, state))
class Declared(Described):
    """A module whose constructor takes the settings that its class declares, in their order.

    An aggregator made ``of`` a weighting has the constructor and the settings of the weighting, which stores them.

    Attributes:
        kept: Names of the buffers declared with :func:`state`.
        made_of: The class of the weighting.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    made_of: ClassVar[type[Declared] | None] = None

    def __init_subclass__(cls, *, of: type[Declared] | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        declared = dict(vars(cls))
        settings = [name for name, value in declared.items() if isinstance(value, Setting)]
        states = [name for name, value in declared.items() if isinstance(value, _State)]
        for name in states:
            delattr(cls, name)
        cls.kept = (*cls.kept, *states)
        if "settings" not in declared:
            cls.settings = tuple(dict.fromkeys((*cls.settings, *settings))) if of is None else of.settings
        needs_constructor = bool(settings or states) or (of is not None and cls.made_of is None)
        if of is not None:
            cls.made_of = of
            for name in of.settings:
                setattr(cls, name, _Through(name))
        if needs_constructor and "__init__" not in declared:
            setattr(cls, "__init__", _constructor(cls))  # noqa: B010


def _constructor(cls: type[Declared]) -> Callable[..., None]:
    """Return the constructor of a class, whose arguments are the settings."""
    arguments = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
    if cls.made_of is None:
        defaults = {name: getattr(cls, name).default for name in cls.settings}
        arguments += [Parameter(name, arguments[0].kind, default=value) for name, value in defaults.items()]
    else:
        arguments += signature(cls.made_of).parameters.values()
    taken = Signature(arguments)

    def __init__(self: Declared, *args: Any, **kwargs: Any) -> None:
        prepare: Any = super(cls, self).__init__
        if self.made_of is not None:
            prepare(self.made_of(*args, **kwargs))
            return
        prepare()
        values = taken.bind(self, *args, **kwargs)
        values.apply_defaults()
        for name in cls.settings:
            setattr(self, name, values.arguments[name])
        if isinstance(self, Stateful):
            self.reset()

    setattr(__init__, "__signature__", taken)  # noqa: B010
    return __init__


def vector_string(vector: Tensor) -> str:
    """Return the numbers with up to two decimals."""
    return ", ".join(f"{value:.2f}".rstrip("0") for value in vector.tolist())
