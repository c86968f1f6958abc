"""aligned against its specification, on every backend that is here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.gram_solver import GramSolver, Solver
from tests.ops.zoo import BETWEEN, Case, each, zoo


def well_posed() -> list[Case]:
    """The cases that have no eigenvalue the op leaves out."""
    cases = []
    for case in zoo():
        value = torch.linalg.eigvalsh(case.gram)
        if value[0] > 1.01 * len(value) * 2.0**-23 * value[-1]:
            cases.append(case)
    return cases


def explicit(jacobian: Tensor) -> Tensor:
    """The paper's update from the singular vectors of the gradients: sigma_min times the orthonormal rows, added up."""
    left, singular, right = torch.linalg.svd(jacobian, full_matrices=False)
    kept = singular.square() > len(jacobian) * 2.0**-23 * singular.max().square()
    return singular[kept].min() * left[:, kept].sum(dim=0) @ right[kept]


class TestAligned(GramSolver):
    name = "aligned"

    @each(well_posed(), BETWEEN)
    def test_aligned_gradients_have_one_length(self, solver: Solver, case: Case) -> None:
        """With full rank, G^(1/2) w = sqrt(min(lambda)) 1 and so w^T G w = T min(lambda)."""
        value, vector = np.linalg.eigh(case.gram.numpy())
        root = vector * np.sqrt(value) @ vector.T
        weights = solver(case.gram).numpy()
        np.testing.assert_allclose(root @ weights, np.sqrt(value[0]), rtol=1e-9)
        np.testing.assert_allclose(weights @ case.gram.numpy() @ weights, len(weights) * value[0], rtol=1e-9)

    @pytest.mark.parametrize("kind", ["random", "conflicting", "narrow", "rank_one", "duplicates", "zero_rows", "huge"])
    @pytest.mark.parametrize("size", [1, 3, 16, 64])
    def test_is_the_explicit_update(self, solver: Solver, kind: str, size: int) -> None:
        case = next(case for case in zoo((size,)) if case.name == f"{kind}-T{size}")
        if not case.jacobian.any():
            return
        expected = explicit(case.jacobian)
        update = solver(case.gram) @ case.jacobian
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-8 * float(case.jacobian.norm()))

    def test_orthogonal_tasks_closed_form(self, solver: Solver) -> None:
        length = torch.logspace(-1, 1, 24, dtype=torch.float64)
        torch.testing.assert_close(solver(length.square().diag()), length.min() / length, rtol=1e-12, atol=0)

    def test_eigenvalues_float32_cannot_tell_from_zero_are_left_out(self, solver: Solver) -> None:
        tolerance = 3 * 2.0**-23
        for smallest, expected in ((1.01 * tolerance, tolerance**0.5 * 1.01**0.5), (0.99 * tolerance, 0.5)):
            weights = solver(torch.diag(torch.tensor([1.0, 0.25, smallest], dtype=torch.float64)))
            assert float(weights[0]) == pytest.approx(expected, rel=1e-9)

    def test_zero_gram_gives_zero(self, solver: Solver) -> None:
        for size in (1, 2, 40):
            assert solver(torch.zeros(size, size, dtype=torch.float64)).tolist() == [0] * size
