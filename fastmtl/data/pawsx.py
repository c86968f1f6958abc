"""PAWS-X (Yang et al., EMNLP 2019): whether two sentences say the same, in four languages, each a task of its own."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from fastmtl.data.digits import SPLITS
from fastmtl.data.registry import DatasetInfo, Facts, Loader, LoaderOptions, Splits, register
from fastmtl.data.tasks import TaskInfo
from fastmtl.errors import UsageError
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric

__all__ = ["LANGUAGES", "SentencePairs"]

LANGUAGES = ("en", "zh", "de", "es")
# As the files of LibMTL's example, which are XTREME's, and those of the archive call the splits.
_NAMES = {"train": ("train",), "val": ("dev", "dev_2k"), "test": ("test", "test_2k")}


class SentencePairs(Dataset[tuple[tuple[str, str], int]]):
    """Pairs of sentences, and 1 where both say the same, else 0.

    Args:
        root: Folder with ``train-en.tsv``, ``dev-en.tsv``, ..., of two sentences and the label, as of LibMTL's example;
            or with ``en/train.tsv``, ``en/dev_2k.tsv``, ..., with a number before the sentences, as of the archive. The
            first line is a header.
        language: ``"en"``, ``"zh"``, ``"de"`` or ``"es"``.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        UsageError: The file is missing, empty, or has a line of another form.
    """

    def __init__(self, root: str | Path, language: str, split: str) -> None:
        path = _find(Path(root).expanduser(), language, split)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                _header, *lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{str(path)!r} cannot be read ({error}).") from error
        except ValueError as error:
            raise UsageError(f"{str(path)!r} is empty.") from error
        self.rows: list[tuple[tuple[str, str], int]] = []
        for number, line in enumerate(lines, 2):
            *_, first, second, label = ["", "", "", *line]
            if len(line) not in (3, 4) or label.strip() not in ("0", "1"):
                raise UsageError(f"Line {number} of {str(path)!r} must be two sentences and 0 or 1, got {line}.")
            self.rows.append(((first, second), int(label)))
        if not self.rows:
            raise UsageError(f"{str(path)!r} has no pairs of sentences.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[tuple[str, str], int]:
        """Return a pair and its label."""
        return self.rows[index]


def _find(root: Path, language: str, split: str) -> Path:
    names = _NAMES[split]
    places = [root / f"{name}-{language}.tsv" for name in names] + [root / language / f"{name}.tsv" for name in names]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UsageError(
            f"{str(root)!r} must hold PAWS-X, but has neither {names[0]}-{language}.tsv nor {language}/{names[-1]}.tsv."
        )
    return found


def _splits(options: LoaderOptions) -> Splits:
    assert options.path is not None
    if options.encoder is None or options.encoder.tokenize is None:
        raise UsageError("The data set pawsx needs an encoder of texts: --encoder hf:NAME or hf:FOLDER.")
    loaders: dict[str, dict[str, Loader]] = {split: {} for split in SPLITS}
    rows = dict.fromkeys(SPLITS, 0)
    for number, language in enumerate(LANGUAGES):
        for split in SPLITS:
            pairs: Dataset[Any] = SentencePairs(options.path, language, split)
            count = len(pairs)  # type: ignore[arg-type]
            if split == "train" and options.n_train is not None and options.n_train < count:
                pairs, count = Subset(pairs, range(options.n_train)), options.n_train
            loaders[split][language] = options.loader(pairs, split, number=number)
            rows[split] = max(rows[split], count)
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=rows)


def _head(feature_dim: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(feature_dim, outputs))


def _read_row(row: Mapping[str, Any], facts: Facts) -> tuple[str, str]:
    """Return the sentences in the columns ``sentence1`` and ``sentence2``."""
    for name in ("sentence1", "sentence2"):
        if name not in row:
            raise UsageError(f"A row has no column {name!r}, only {', '.join(row)}.")
    return str(row["sentence1"]), str(row["sentence2"])


register(
    [
        DatasetInfo(
            name="pawsx",
            description="PAWS-X: whether two sentences say the same, in English, Chinese, German and Spanish.",
            source="a folder with PAWS-X, in the layout of LibMTL's example or of its archive",
            licence="as of the folder's data",
            multi_input=True,
            tasks={
                language: TaskInfo(
                    outputs=2,
                    make_loss=CELoss,
                    make_metric=AccMetric,
                    metrics=("Acc",),
                    weight=(1,),
                    make_head=_head,
                    labels=("different", "same"),
                )
                for language in LANGUAGES
            },
            rows={"train": 49_401, "val": 2_000, "test": 2_000},
            load_splits=_splits,
            read_row=_read_row,
            needs_path=True,
            batch_size=32,
            test_batch_size=32,
        )
    ]
)
