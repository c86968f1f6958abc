"""Data sets with their loaders, tasks, encoders and decoders: ``fastmtl.data.load("multimnist", batch_size=128)``."""

from __future__ import annotations

# Each registers its data sets, which are listed in this order.
from fastmtl.data import multimnist_sets as _multimnist_sets  # noqa: F401

# isort: split
from fastmtl.data import dense_sets as _dense_sets  # noqa: F401
from fastmtl.data import office as _office  # noqa: F401
from fastmtl.data import reviews as _reviews  # noqa: F401
from fastmtl.data import tables as _tables  # noqa: F401
from fastmtl.data.clicks import ClickRows
from fastmtl.data.columns import Columns, Vocabulary, given, read_parquet
from fastmtl.data.encoders import ENCODERS
from fastmtl.data.registry import DATASETS, DataBundle, DatasetInfo, describe_all, load

__all__ = [
    "DATASETS",
    "ENCODERS",
    "ClickRows",
    "Columns",
    "DataBundle",
    "DatasetInfo",
    "Vocabulary",
    "describe_all",
    "given",
    "load",
    "read_parquet",
]
