"""QM9 as graphs: eleven properties of a molecule from its atoms and the distances between all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastmtl.data.molecules import TARGETS, Molecules, default_folder, molecule_of, read_molecules
from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, register
from fastmtl.data.tasks import TaskInfo
from fastmtl.errors import UsageError
from fastmtl.loss import MSELoss
from fastmtl.metrics import L1Metric
from fastmtl.support.extras import need

__all__ = ["ATOM_WIDTH", "BOND_WIDTH", "Graphs"]

# Rows of validation and of test (Navon et al., ICML 2022).
_HELD_OUT = 10_000
_SYMBOLS = (1, 6, 7, 8, 9)
# Which of them, the atomic number, aromatic, sp, sp2, sp3, hydrogens bonded to it.
ATOM_WIDTH = len(_SYMBOLS) + 6
_KINDS_OF_BONDS = 4
# The kind of bond and the distance.
BOND_WIDTH = _KINDS_OF_BONDS + 1


class Graphs(Dataset[tuple[Any, dict[str, Tensor]]]):
    """Molecules as complete graphs: an edge from each atom to each other, with its bond and its length.

    ``__getitems__`` makes a whole batch of torch_geometric at once: ``x`` (atoms, 11), ``edge_index`` (2, edges),
    ``edge_attr`` (edges, 5), ``batch`` (atoms,) and ``ptr`` (molecules + 1,), by target vertex and then by source.

    Args:
        molecules: The molecules.
        rows: Which of them, in this order.
        labels: Target to its values (n, 1) for all molecules.

    Raises:
        UsageError: torch_geometric is not installed.
    """

    def __init__(self, molecules: Molecules, rows: Sequence[int] | Tensor, labels: Mapping[str, Tensor]) -> None:
        self._batch = need("torch_geometric.data", "qm9", "The data set qm9").Batch
        self.rows = torch.as_tensor(rows)
        self.labels = dict(labels)
        self._sizes = torch.from_numpy(molecules.sizes)
        self._bond_counts = torch.from_numpy(molecules.bond_counts)
        self._first_atom = self._sizes.cumsum(0) - self._sizes
        self._first_bond = self._bond_counts.cumsum(0) - self._bond_counts
        self._positions = torch.from_numpy(molecules.positions)
        self._bonds = torch.from_numpy(molecules.bonds.astype(np.int64))
        self._atoms = self._features(molecules)

    def _features(self, molecules: Molecules) -> Tensor:
        """Return what is known of all atoms (atoms, 11)."""
        numbers = torch.from_numpy(molecules.numbers.astype(np.int64))
        first = torch.repeat_interleave(self._first_atom, self._bond_counts)
        ends = self._bonds[:, :2] + first[:, None]
        hydrogens = torch.zeros(len(numbers))
        for one, other in ((0, 1), (1, 0)):
            hydrogens.index_add_(0, ends[:, one], (numbers[ends[:, other]] == 1).float())
        return torch.cat(
            [
                (numbers[:, None] == torch.tensor(_SYMBOLS)).float(),
                numbers[:, None].float(),
                torch.from_numpy(molecules.aromatic.astype(np.float32))[:, None],
                F.one_hot(torch.from_numpy(molecules.hybrid.astype(np.int64)), 4)[:, 1:].float(),
                hydrogens[:, None],
            ],
            1,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        """Return one molecule as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, dict[str, Tensor]]:
        """Return a batch of molecules, and labels (b, 1) by target."""
        rows = self.rows[torch.as_tensor(indices)]
        sizes = self._sizes[rows]
        ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        batch = torch.repeat_interleave(torch.arange(len(rows)), sizes)
        atoms = torch.arange(len(batch)) + (self._first_atom[rows] - ptr[:-1])[batch]
        # Each atom has as many edges to it as its molecule has other atoms.
        degrees = sizes[batch] - 1
        ends = torch.repeat_interleave(torch.arange(len(batch)), degrees)
        starts = torch.arange(len(ends)) - (degrees.cumsum(0) - degrees)[ends] + ptr[batch[ends]]
        starts += starts >= ends
        positions = self._positions[atoms]
        lengths = (positions[ends] - positions[starts]).norm(dim=1, keepdim=True)
        kinds = torch.zeros(len(ends), _KINDS_OF_BONDS)
        edges, bonds = self._bonded(rows, ptr, degrees)
        kinds[edges, bonds] = 1
        graphs = self._batch(
            x=self._atoms[atoms],
            edge_index=torch.stack([starts, ends]),
            edge_attr=torch.cat([kinds, lengths], 1),
            batch=batch,
            ptr=ptr,
        )
        return graphs, {name: values[rows] for name, values in self.labels.items()}

    def _bonded(self, rows: Tensor, ptr: Tensor, degrees: Tensor) -> tuple[Tensor, Tensor]:
        """Return which edges are bonds, both ways, and of which kinds."""
        counts = self._bond_counts[rows]
        of = torch.repeat_interleave(torch.arange(len(rows)), counts)
        first = counts.cumsum(0) - counts
        bonds = self._bonds[torch.arange(len(of)) + (self._first_bond[rows] - first)[of]]
        first_edge = degrees.cumsum(0) - degrees
        edges = [
            first_edge[end + ptr[of]] + start - (start > end).long()
            for end, start in ((bonds[:, 0], bonds[:, 1]), (bonds[:, 1], bonds[:, 0]))
        ]
        return torch.cat(edges), bonds[:, 2].repeat(2)


def _qm9(options: LoaderOptions) -> Splits:
    molecules = read_molecules(default_folder() if options.path is None else options.path)
    count, held_out = len(molecules), min(_HELD_OUT, len(molecules) // 10)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rows = {"test": order[:held_out], "val": order[held_out : 2 * held_out], "train": order[2 * held_out :]}
    if options.n_train is not None:
        if options.n_train > len(rows["train"]):
            raise UsageError(f"train_size must be at most the {len(rows['train'])} rows there are of qm9.")
        rows["train"] = rows["train"][: options.n_train]
        # What is left out of the training rows is left out of the others in the same share, as far as makes sense.
        held_out = min(held_out, options.n_train)
        rows |= {split: rows[split][:held_out] for split in ("val", "test")}
    targets = torch.from_numpy(molecules.targets)
    mean, std = targets[rows["train"]].mean(0), targets[rows["train"]].std(0)
    labels = {
        name: ((targets[:, place] - mean[place]) / std[place]).float()[:, None] for place, name in enumerate(TARGETS)
    }
    loaders = {
        split: options.loader(Graphs(molecules, chosen, labels), split, in_batches=True)
        for split, chosen in rows.items()
    }
    return Splits(
        train=loaders["train"],
        val=loaders["val"],
        test=loaders["test"],
        rows={split: len(rows[split]) for split in ("train", "val", "test")},
        facts={
            "means": dict(zip(TARGETS, mean.tolist(), strict=True)),
            "scales": dict(zip(TARGETS, std.tolist(), strict=True)),
        },
    )


def _tasks(facts: Facts) -> dict[str, TaskInfo]:
    return {
        name: TaskInfo(
            outputs=1,
            make_loss=MSELoss,
            make_metric=partial(L1Metric, scale=facts["scales"][name]),
            metrics=("MAE",),
            weight=(0,),
            make_head=nn.Linear,
        )
        for name in TARGETS
    }


def _read_row(row: Mapping[str, Any], facts: Facts) -> Any:
    """Return the graph of a molecule given as qm9pack gives it: columns SMILES, Elements and XYZ_Ang."""
    graphs, _ = Graphs(molecule_of(row), [0], {})[0]
    data = need("torch_geometric.data", "qm9", "The data set qm9").Data
    return data(x=graphs.x, edge_index=graphs.edge_index, edge_attr=graphs.edge_attr)


register(
    [
        DatasetInfo(
            name="qm9",
            description="Molecules of up to nine heavy atoms: eleven properties, by density functional theory.",
            source="qm9pack 1.0.3 (Ramakrishnan et al., Scientific Data 2014), with `fastmtl data prepare qm9`",
            licence="MIT, as of qm9pack",
            tasks=_tasks,
            rows={"train": 110_831, "val": 10_000, "test": 10_000},
            encoders=("nnconv",),
            load_splits=_qm9,
            read_row=_read_row,
            batch_size=120,
            test_batch_size=240,
            in_memory=True,
        )
    ]
)
