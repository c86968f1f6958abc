"""Parquet files that are read by groups of rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastmtl.data import ParquetRows, RowGroupSampler
from fastmtl.data.tensors import batch_loader
from fastmtl.distributed import Alone, shard
from fastmtl.errors import UsageError

# Prints the peak of a process that goes through a file once, in kB beyond what it had before.
_PROGRAM = r"""
import re, sys
from pathlib import Path
import torch
from fastmtl.data import ParquetRows, RowGroupSampler, read_parquet
from fastmtl.data.tensors import batch_loader

path, way = sys.argv[1:]
def kilobytes(what):
    return int(re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))
def read(columns):
    x = torch.from_numpy(columns["x"])
    return {"x": x}, {"task": x[:, :1]}
rows = ParquetRows(path, read, held=2)
# The first groups bring libraries with them.
rows.__getitems__([0, len(rows) - 1])
# What was the greatest so far, also of the process that started this one, is forgotten.
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
if way == "stream":
    sampler = RowGroupSampler(rows.sizes, 2, torch.Generator().manual_seed(0))
    total = sum(len(inputs["x"]) for inputs, _ in batch_loader(rows, 1000, sampler=sampler))
else:
    total = len(read_parquet(path)["x"])
assert total == len(rows), total
print(kilobytes("VmHWM") - before)
"""


def _write(path: Path, first: int, rows: int, group: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = np.arange(first, first + rows)
    bags = [list(range(number % 4)) for number in numbers.tolist()]
    table = pa.table({"row": numbers, "bag": bags, "click": (numbers % 3 == 0).astype(np.float32)})
    pq.write_table(table, path, row_group_size=group)


def _read(columns: dict[str, np.ndarray]) -> Any:
    inputs = {name: torch.from_numpy(columns[name]) for name in ("row", "bag")}
    return inputs, {"click": torch.from_numpy(columns["click"])[:, None]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _write(tmp_path / "a.parquet", 0, 50, 8)
    _write(tmp_path / "b.parquet", 50, 33, 10)
    return tmp_path


def _loader(folder: Path, seed: int = 0, batch: int = 9, **options: Any) -> DataLoader[Any]:
    rows = ParquetRows(folder, _read, held=3)
    sampler = RowGroupSampler(rows.sizes, 3, torch.Generator().manual_seed(seed))
    return batch_loader(rows, batch, sampler=sampler, **options)


def _order(loader: Any) -> list[int]:
    return [row for inputs, _ in loader for row in inputs["row"].tolist()]


def test_rows_are_those_of_the_files(folder: Path) -> None:
    rows = ParquetRows(folder, _read, held=1)
    assert rows.sizes == [8, 8, 8, 8, 8, 8, 2, 10, 10, 10, 3]
    assert len(rows) == 83
    inputs, labels = rows.__getitems__([82, 0, 47, 3, 82])
    assert inputs["row"].tolist() == [82, 0, 47, 3, 82]
    assert inputs["bag"].tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2], [0, 1, 2], [0, 1, -1]]
    assert labels["click"].flatten().tolist() == [0, 1, 0, 1, 0]
    assert len(rows._groups) == 1
    assert ParquetRows(folder, _read, ["row", "bag", "click"])[5][0]["row"] == 5


def test_an_epoch_has_each_row_once_in_an_order_of_its_own(folder: Path) -> None:
    loader = _loader(folder, batch=1)
    first, second = _order(loader), _order(loader)
    assert sorted(first) == sorted(second) == list(range(83))
    assert first != second
    assert first == _order(_loader(folder, batch=1))
    assert first != _order(_loader(folder, batch=1, seed=1))
    # Rows of several groups are mixed.
    assert len({row // 8 for row in first[:8]}) > 1


def test_each_group_is_read_once(folder: Path) -> None:
    loader, seen = _loader(folder), list[int]()
    rows: Any = loader.dataset
    read = rows.read

    def counted(columns: dict[str, np.ndarray]) -> Any:
        seen.append(int(columns["row"][0]))
        return read(columns)

    rows.read = counted
    assert len(_order(loader)) == 81
    assert sorted(seen) == [0, 8, 16, 24, 32, 40, 48, 50, 60, 70, 80]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_processes_share_the_rows(folder: Path, workers: int) -> None:
    class Peer(Alone):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.size = rank, 2

    whole = [inputs["row"].tolist() for inputs, _ in _loader(folder)]
    parts = [
        [inputs["row"].tolist() for inputs, _ in shard(_loader(folder, num_workers=workers), Peer(rank))]
        for rank in range(2)
    ]
    assert parts == [[batch[rank::2] for batch in whole] for rank in range(2)]


def test_memory_is_that_of_the_groups_that_are_held(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "large.parquet"
    kind = pa.list_(pa.float64(), 32)
    schema = pa.schema([("x", kind)])
    # 40 groups of 5 MB.
    with pq.ParquetWriter(file, schema) as writer:
        for seed in range(40):
            values = pa.array(np.random.default_rng(seed).normal(size=20_000 * 32))
            writer.write_table(pa.table([pa.FixedSizeListArray.from_arrays(values, 32)], schema=schema), 20_000)
    peaks = {}
    for way in ("stream", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(file), way],
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        )
        assert done.returncode == 0, done.stderr
        peaks[way] = int(done.stdout)
    assert peaks["whole"] > 200_000
    assert peaks["stream"] < 60_000


def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="There is no Parquet file"):
        ParquetRows(folder / "c.parquet", _read)
    with pytest.raises(UsageError, match="has no column price: there are row, bag, click"):
        ParquetRows(folder, _read, ["price"])
    with pytest.raises(UsageError, match="held must be at least 1"):
        ParquetRows(folder, _read, held=0)
    with pytest.raises(UsageError, match="mixed must be at least 1"):
        RowGroupSampler([3], 0, torch.Generator())
    few = ParquetRows(folder, lambda columns: ({"row": torch.ones(2)}, {}))
    with pytest.raises(UsageError, match="must return 8 rows of 'row'"):
        few[0]
    (folder / "z.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        ParquetRows(folder, _read)
