"""Data sets with their loaders, tasks, encoders and decoders: ``fastmtl.data.load("multimnist", batch_size=128)``."""

from __future__ import annotations

# Each registers its data sets, which are listed in this order.
from fastmtl.data import multimnist_sets as _multimnist_sets  # noqa: F401

# isort: split
from fastmtl.data import celeba as _celeba  # noqa: F401
from fastmtl.data import column_sets as _column_sets  # noqa: F401
from fastmtl.data import dense_sets as _dense_sets  # noqa: F401
from fastmtl.data import office as _office  # noqa: F401
from fastmtl.data import pawsx as _pawsx  # noqa: F401
from fastmtl.data import pinns as _pinns  # noqa: F401
from fastmtl.data import qm9 as _qm9  # noqa: F401
from fastmtl.data import reviews as _reviews  # noqa: F401
from fastmtl.data import tables as _tables  # noqa: F401
from fastmtl.data.clicks import ClickRows
from fastmtl.data.columns import Columns, Vocabulary, given, read_parquet
from fastmtl.data.encoders import ENCODERS, find_encoder
from fastmtl.data.loading import load
from fastmtl.data.negatives import NegativeSampler, unsampled
from fastmtl.data.registry import (
    DATASETS,
    DataBundle,
    DatasetInfo,
    LoaderOptions,
    Splits,
    describe_all,
    find_dataset,
    register,
)
from fastmtl.data.row_groups import ParquetRows, RowGroupSampler
from fastmtl.data.tasks import TaskInfo, binary, classes, depth, normals, regression, segmentation

__all__ = [
    "DATASETS",
    "ENCODERS",
    "ClickRows",
    "Columns",
    "DataBundle",
    "DatasetInfo",
    "LoaderOptions",
    "NegativeSampler",
    "ParquetRows",
    "RowGroupSampler",
    "Splits",
    "TaskInfo",
    "Vocabulary",
    "binary",
    "classes",
    "depth",
    "describe_all",
    "find_dataset",
    "find_encoder",
    "given",
    "load",
    "normals",
    "read_parquet",
    "register",
    "regression",
    "segmentation",
    "unsampled",
]
