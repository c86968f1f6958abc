"""Encoders of tables: a description of the features, and embeddings and layers made from it.

The inputs of a batch are a dictionary of tensors by feature::

    encoder = FeatureEncoder([Numeric("age", mean=40, std=15), Categorical("job", size=20, dim=8),
                              Bag("watched", size=100_000, dim=16, sparse=True)])
    encoder({"age": torch.tensor([31.0]), "job": torch.tensor([4]), "watched": torch.tensor([[7, 99, -1]])})
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model.stages import StagedEncoder

__all__ = ["Bag", "Categorical", "Feature", "FeatureEncoder", "FeatureTables", "Numeric", "undrawn_tables"]

# The tables that are made in a block in which none are drawn.
_undrawn: ContextVar[list[FeatureTables] | None] = ContextVar("undrawn", default=None)


@dataclass(frozen=True, slots=True)
class Numeric:
    """Numbers ``(B,)``, or ``(B, width)``; the encoder reads ``(x - mean) / std``, and 0 for NaN.

    Attributes:
        name: The feature's key in the inputs.
        width: Numbers of a row.
        mean, std: What to subtract, and to divide by.
    """

    name: str
    width: int = 1
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.width < 1:
            raise UsageError(f"width of the feature {self.name} must be at least 1, got {self.width}.")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise UsageError(
                f"mean and std of the feature {self.name} must be finite, and std above 0, "
                f"got {self.mean} and {self.std}."
            )


@dataclass(frozen=True, slots=True)
class Categorical:
    """One category of a row, ``(B,)`` integers from 0 to ``size - 1``; the encoder reads its vector in a table.

    Attributes:
        name: The feature's key in the inputs.
        size: The number of categories.
        dim: The length of a vector.
        table: The name of the table. Features with one name share the table; their ``size``, ``dim`` and ``sparse`` are
            equal. The feature's own if None.
        sparse: Whether the table has sparse gradients, for an optimizer that takes them: SGD, Adagrad, SparseAdam.
    """

    name: str
    size: int
    dim: int
    table: str | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        for what in ("size", "dim"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{what} of the feature {self.name} must be an integer of at least 1, got {value!r}.")

    @property
    def table_name(self) -> str:
        """Return the name of the table."""
        return self.name if self.table is None else self.table


@dataclass(frozen=True, slots=True)
class Bag(Categorical):
    """Several categories of a row, ``(B, L)`` integers, of which those below 0 only fill up; the encoder reads a mean.

    A row without any category has a vector of zeros. Attributes are those of `Categorical`, and:

    Attributes:
        mode: ``"mean"`` or ``"sum"`` of the vectors.
    """

    mode: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        Categorical.__post_init__(self)
        if self.mode not in ("mean", "sum"):
            raise UsageError(f"mode of the feature {self.name} must be mean or sum, got {self.mode!r}.")


Feature: TypeAlias = Numeric | Categorical


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise UsageError(f"A feature must have a name, got {name!r}.")


class FeatureTables(nn.Module):
    """The features of a batch as one vector of a row: numbers, and vectors looked up in tables.

    Args:
        features: The description, in the order of the vector's parts.

    Attributes:
        width: The length of the vector.
        tables: The tables by name, embeddings (size, dim), with one row more where a bag reads it. Entries are drawn
            from a normal distribution with variance 1 / dim. What is set at an embedding, such as ``max_norm``, counts.

    Raises:
        UsageError: No feature, one name twice, or features that share a table of two kinds.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.features = tuple(features)
        names = [feature.name for feature in self.features]
        if not names:
            raise UsageError("features must hold at least one feature, got none.")
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"features must have names of their own, got {name} twice.")
        self.width = 0
        kinds: dict[str, Categorical] = {}
        for feature in self.features:
            if isinstance(feature, Numeric):
                self.width += feature.width
                continue
            self.width += feature.dim
            first = kinds.setdefault(feature.table_name, feature)
            if (first.size, first.dim, first.sparse) != (feature.size, feature.dim, feature.sparse):
                raise UsageError(
                    f"The features {first.name} and {feature.name} share the table {feature.table_name}, so they must "
                    "have one size, dim and sparse."
                )
        # Names of features may have dots, those of parameters must not.
        self._keys = {name: f"{index}_{name}".replace(".", "_") for index, name in enumerate(kinds)}
        bags = {feature.table_name for feature in self.features if isinstance(feature, Bag)}
        self.tables = nn.ModuleDict(
            {self._keys[name]: _make_table(kind, kind.size + (name in bags)) for name, kind in kinds.items()}
        )
        if (undrawn := _undrawn.get()) is not None:
            undrawn.append(self)

    def extra_repr(self) -> str:
        """Return the features' names."""
        return ", ".join(feature.name for feature in self.features)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors, (B, width).

        Raises:
            UsageError: The inputs are no dictionary, or lack a feature; a table that a bag reads has hooks or a
                ``padding_idx``; or a feature has another shape or dtype than its kind, or on the CPU a category that
                the table does not have. Compiled code and other devices raise a ``RuntimeError`` of such a category,
                the latter at a later time.
        """
        if not isinstance(inputs, Mapping):
            raise UsageError(
                f"A FeatureEncoder takes a dictionary of tensors by feature, got a {type(inputs).__name__}."
            )
        parts = [self._part(feature, self._values(feature, inputs)) for feature in self.features]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _values(self, feature: Feature, inputs: Mapping[str, Tensor]) -> Tensor:
        values = inputs.get(feature.name)
        if not isinstance(values, Tensor):
            raise UsageError(
                f"The inputs must have a tensor of the feature {feature.name}: they have "
                f"{', '.join(map(str, inputs)) or 'none'}."
            )
        return values

    def _part(self, feature: Feature, values: Tensor) -> Tensor:
        if isinstance(feature, Numeric):
            return _numbers(feature, values, next(self.parameters(), values).dtype)
        _check_categories(feature, values)
        table = self.tables[self._keys[feature.table_name]]
        if not isinstance(feature, Bag):
            vectors: Tensor = table(values)
            return vectors
        table = _table_of_bag(feature, table)
        # The row behind the categories, which gets no gradient.
        filling = feature.size
        return nn.functional.embedding_bag(
            torch.where(values < 0, filling, values),
            table.weight,
            max_norm=table.max_norm,
            norm_type=table.norm_type,
            scale_grad_by_freq=table.scale_grad_by_freq,
            mode=feature.mode,
            sparse=table.sparse,
            padding_idx=filling,
        )


def _make_table(kind: Categorical, rows: int) -> nn.Embedding:
    weight = torch.empty(rows, kind.dim)
    if _undrawn.get() is None:
        nn.init.normal_(weight, std=kind.dim**-0.5)
    return nn.Embedding.from_pretrained(weight, freeze=False, sparse=kind.sparse)


@contextmanager
def undrawn_tables() -> Iterator[list[FeatureTables]]:
    """A block in which tables get no numbers, and so cost no time, and no memory that is written to.

    Yields:
        Those that were made, which are to be thrown away.
    """
    made: list[FeatureTables] = []
    token = _undrawn.set(made)
    try:
        yield made
    finally:
        _undrawn.reset(token)


def _table_of_bag(feature: Bag, table: nn.Module) -> nn.Embedding:
    """Return a table, unless its module does more than a bag can ask for, which reads the rows itself."""
    if not isinstance(table, nn.Embedding):
        what = f"a {type(table).__name__}"
    elif table.padding_idx is not None:
        what = "an Embedding with a padding_idx"
    elif table._forward_hooks or table._forward_pre_hooks or table._backward_hooks or table._backward_pre_hooks:
        what = "an Embedding with hooks"
    else:
        return table
    raise UsageError(
        f"The table {feature.table_name} is {what}, of which the bag {feature.name} reads the rows without a call: "
        "hooks may be at the FeatureTables, and categories below 0 only fill up."
    )


def _numbers(feature: Numeric, values: Tensor, dtype: torch.dtype) -> Tensor:
    columns = values[:, None] if values.dim() == 1 else values
    if columns.dim() != 2 or columns.shape[1] != feature.width or values.is_complex():
        wanted = "(B,)" if feature.width == 1 else f"(B, {feature.width})"
        raise UsageError(
            f"The feature {feature.name} must be {wanted} numbers, got shape {tuple(values.shape)}, {values.dtype}."
        )
    wide = columns if columns.is_floating_point() else columns.to(dtype if dtype.is_floating_point else torch.float32)
    scaled = (wide - feature.mean) / feature.std
    return torch.where(scaled.isnan(), 0.0, scaled).to(dtype if dtype.is_floating_point else scaled.dtype)


def _check_categories(feature: Categorical, values: Tensor) -> None:
    is_bag = isinstance(feature, Bag)
    if values.dtype not in (torch.int32, torch.int64) or values.dim() != 1 + is_bag:
        wanted = "(B, L)" if is_bag else "(B,)"
        raise UsageError(
            f"The feature {feature.name} must be {wanted} int64 or int32 categories, got shape {tuple(values.shape)}, "
            f"{values.dtype}."
        )
    what = f"The feature {feature.name} must have categories from 0 to {feature.size - 1}"
    advice = "fastmtl.data.Vocabulary numbers values, those it has not seen too."
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        # Reading the numbers would wait for the device, or break the graph.
        in_range = (values < feature.size).all() & (is_bag | (values >= 0).all())
        torch._assert_async(in_range, f"{what}: {advice}")
        return
    if not values.numel():
        return
    least, greatest = (int(value) for value in torch.aminmax(values))
    if greatest >= feature.size or (least < 0 and not is_bag):
        raise UsageError(f"{what}, got {least} to {greatest}: {advice}")


class FeatureEncoder(StagedEncoder):
    """Tables and numbers of a row as one vector, then linear layers with ReLU.

    Experts of MMoE, CGC and PLE share the tables, whose vectors their gates read.

    Args:
        features: The description of the features.
        stage_dims: The widths of the layers.
        dropout: Share of the layers' outputs that are set to zero in training.

    Attributes:
        feature_dim: The last width.

    Raises:
        UsageError: As of `FeatureTables`, or no layer.
    """

    shares_stem: ClassVar[bool] = True

    def __init__(
        self, features: Sequence[Feature], stage_dims: Sequence[int] = (128, 64), dropout: float = 0.0
    ) -> None:
        stem = FeatureTables(features)
        dims = [stem.width, *stage_dims]
        more = [nn.Dropout(dropout)] if dropout else []
        stages = [nn.Sequential(nn.Linear(a, b), nn.ReLU(), *more) for a, b in pairwise(dims)]
        super().__init__(stem, stages, stage_dims)
