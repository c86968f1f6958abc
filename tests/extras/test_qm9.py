"""QM9: reading qm9pack, graphs of molecules, the network, and training by the recipe."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmtl.cli import main
from fastmtl.errors import UsageError

# Methane, hydrogen cyanide and a made-up ring whose string has another order of atoms than its positions.
METHANE = {
    "SMILES": "C",
    "Elements": "['C','H','H','H','H']",
    "XYZ_Ang": "[[0.,1.09,0.],[0.,0.,0.],[1.03,1.45,0.],[-.51,1.45,-.89],[-.51,1.45,.89]]",
    "Dipole_debye": "0.",
    "Polarizability_bohr3": "13.21",
    "HOMO_au": "-0.3877",
    "LUMO_au": "0.1171",
    "R2_bohr2": "35.3641",
    "ZPVE_au": "0.044749",
    "InternalEnergy_0K_au": "-40.47893",
    "InternalEnergy_298K_au": "-40.476062",
    "Enthalphy_298K_au": "-40.475117",
    "GibbsFreeEnergy_298K_au": "-40.498597",
    "Heatcapacity_Cv_cal_mol_K": "6.469",
}
CYANIDE = METHANE | {
    "SMILES": "C#N",
    "Elements": "['C','N','H']",
    "XYZ_Ang": "[[0.,0.,0.],[0.,0.,1.15],[0.,0.,-1.07]]",
}
OTHER_ORDER = METHANE | {
    "SMILES": "NC=O",
    "Elements": "['O','C','N','H','H','H']",
    "XYZ_Ang": "[[1.2,0.2,0.],[0.,0.,0.],[-.9,1.03,0.],[-.4,-1.03,0.],[-.63,2.0,0.],[-1.89,.87,0.]]",
}


def _wheel(path: Path, copies: int = 4, parts: int = 3) -> Path:
    """Write a wheel in qm9pack's form, whose molecules differ in their values."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for part in range(1, parts + 1):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(METHANE))
            writer.writeheader()
            for molecule in (METHANE, CYANIDE, OTHER_ORDER) * copies:
                changed = {key: float(molecule[key]) + rng.normal() * 1e-2 for key in list(METHANE)[3:]}
                writer.writerow(molecule | (changed if copies > 1 else {}))
            archive.writestr(f"qm9pack/data/qm9_part{part}.csv", text.getvalue())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from fastmtl.data.molecules import prepare_qm9

    prepare_qm9(tmp_path / "qm9", _wheel(tmp_path / "qm9pack.whl", copies=40))
    return tmp_path / "qm9"


def test_a_molecule_has_the_bonds_and_values_of_its_row() -> None:
    from fastmtl.data.molecules import TARGETS, molecule_of

    methane, cyanide, other = map(molecule_of, (METHANE, CYANIDE, OTHER_ORDER))
    assert methane.numbers.tolist() == [6, 1, 1, 1, 1]
    assert {tuple(bond) for bond in methane.bonds.tolist()} == {(0, place, 0) for place in range(1, 5)}
    values = dict(zip(TARGETS, methane.targets[0], strict=True))
    # Of torch_geometric's copy of the data set, in eV: -0.3877 Hartree, and -17.172182 for the atomization energy.
    assert values["HOMO"] == pytest.approx(-10549.854, abs=0.01)
    assert values["U0"] == pytest.approx(-17172.182, abs=0.01)
    assert (values["alpha"], values["Cv"]) == (13.21, 6.469)
    assert {tuple(bond) for bond in cyanide.bonds.tolist()} == {(0, 1, 2), (0, 2, 0)}
    assert cyanide.hybrid.tolist() == [1, 1, 0]
    # Oxygen, carbon and nitrogen in the order of the positions, with the double bond to oxygen.
    pairs = {frozenset(bond[:2]): bond[2] for bond in other.bonds.tolist()}
    assert pairs == {
        frozenset((0, 1)): 1,
        frozenset((1, 2)): 0,
        frozenset((1, 3)): 0,
        frozenset((2, 4)): 0,
        frozenset((2, 5)): 0,
    }


def test_a_batch_is_the_complete_graphs_of_its_molecules() -> None:
    from fastmtl.data.molecules import Molecules, molecule_of
    from fastmtl.data.qm9 import Graphs

    molecules = Molecules.joined([molecule_of(row) for row in (METHANE, CYANIDE, OTHER_ORDER)])
    graphs, labels = Graphs(molecules, [0, 1, 2], {"mu": torch.arange(3.0)[:, None]}).__getitems__([2, 1])
    assert labels["mu"].tolist() == [[2.0], [1.0]]
    assert (graphs.num_graphs, graphs.ptr.tolist()) == (2, [0, 6, 9])
    assert graphs.edge_index.shape == (2, 6 * 5 + 3 * 2)
    positions = np.concatenate([molecule_of(row).positions for row in (OTHER_ORDER, CYANIDE)])
    for (start, end), attr in zip(graphs.edge_index.T.tolist(), graphs.edge_attr, strict=True):
        assert start != end
        assert graphs.batch[start] == graphs.batch[end]
        assert attr[4] == pytest.approx(np.linalg.norm(positions[start] - positions[end]), rel=1e-5)
    kinds = {
        (start, end): attr[:4].nonzero().flatten().tolist()
        for (start, end), attr in zip(graphs.edge_index.T.tolist(), graphs.edge_attr, strict=True)
    }
    assert kinds[0, 1] == kinds[1, 0] == [1]
    assert kinds[6, 7] == kinds[7, 6] == [2]
    assert kinds[0, 2] == []
    # Carbon of hydrogen cyanide: which atom, its number, not aromatic, sp, one hydrogen.
    assert graphs.x[6].tolist() == [0, 1, 0, 0, 0, 6, 0, 1, 0, 0, 1]


def test_the_network_is_that_of_torch_geometric() -> None:
    from torch_geometric.nn import NNConv

    from fastmtl.data.molecules import Molecules, molecule_of
    from fastmtl.data.qm9 import Graphs
    from fastmtl.model import MoleculeEncoder

    molecules = Molecules.joined([molecule_of(row) for row in (METHANE, CYANIDE, OTHER_ORDER)])
    graphs, _ = Graphs(molecules, [0, 1, 2], {}).__getitems__([0, 1, 2])
    torch.manual_seed(0)
    encoder = MoleculeEncoder(8).double()
    graphs.x, graphs.edge_attr = graphs.x.double(), graphs.edge_attr.double()
    conv = NNConv(8, 8, encoder.conv.nn, aggr="mean").double()
    conv.lin.weight, conv.bias = encoder.conv.lin.weight, encoder.conv.bias
    atoms = encoder.lin0(graphs.x).relu()
    for _ in range(3):
        atoms = encoder.gru(conv(atoms, graphs.edge_index, graphs.edge_attr).relu(), atoms)
    wanted = encoder.lin1(encoder.set2set(atoms, graphs.batch)).relu()
    torch.testing.assert_close(encoder(graphs), wanted)


def test_the_measured_step_has_the_same_network_in_libmtls_form() -> None:
    from fastmtl.benchmarks.peers.libmtl import edge_matrices
    from fastmtl.benchmarks.work import Work

    work = Work(net="nnconv", arch="HPS", count=2, batch=3, size=0, device=torch.device("cpu"))
    encoder, decoders = work.modules()
    features = encoder(work.inputs)
    torch.testing.assert_close(edge_matrices(encoder.state_dict())(work.inputs), features)
    assert work.loss(decoders["t1"](features), "t1").isfinite()


def test_training_by_the_recipe_reports_errors_in_the_targets_units(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "--recipe", "qm9", "--scale", "small", "--dataset-path", str(folder), "--weighting", "mgda"]
    assert main([*command, "--train-size", "240", "--epochs", "2", "--run-dir", str(run), "--no-plot"]) == 0
    assert "nnconv" in (run / "config.yaml").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = json.dumps(rows)
    assert all(name in text for name in ("mu", "HOMO", "Cv"))
    molecule = tmp_path / "molecule.jsonl"
    molecule.write_text(json.dumps({key: METHANE[key] for key in ("SMILES", "Elements", "XYZ_Ang")}) + "\n")
    assert main(["predict", str(run), str(molecule), "--out", str(tmp_path / "out")]) == 0
    (predictions,) = (tmp_path / "out").glob("*.jsonl")
    assert json.loads(predictions.read_text())["mu"]


def test_bad_input_is_refused_in_a_sentence(tmp_path: Path) -> None:
    from fastmtl.data.molecules import molecule_of, prepare_qm9, read_molecules

    with pytest.raises(UsageError, match="get it with fastmtl data prepare qm9"):
        read_molecules(tmp_path)
    (tmp_path / "qm9.npz").write_bytes(b"half")
    with pytest.raises(UsageError, match="is damaged"):
        read_molecules(tmp_path)
    half = tmp_path / "half.whl"
    half.write_bytes(_wheel(tmp_path / "whole.whl").read_bytes()[:2000])
    with pytest.raises(UsageError, match="must be the whole wheel"):
        prepare_qm9(tmp_path, half)
    with pytest.raises(UsageError, match="must be the whole wheel"):
        prepare_qm9(tmp_path, _wheel(tmp_path / "two.whl", parts=2))
    with pytest.raises(UsageError, match="A molecule needs the columns"):
        molecule_of({"SMILES": "C", "Elements": "['Si']", "XYZ_Ang": "[[0,0,0]]"})
