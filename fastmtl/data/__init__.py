"""Data sets with their loaders, tasks, encoders and decoders: ``fastmtl.data.load("multimnist", batch_size=128)``."""

from __future__ import annotations

from fastmtl.data import multimnist_sets as _multimnist_sets  # noqa: F401  registers its data sets
from fastmtl.data.registry import DATASETS, ENCODERS, DataBundle, DatasetInfo, describe_all, load

__all__ = ["DATASETS", "ENCODERS", "DataBundle", "DatasetInfo", "describe_all", "load"]
