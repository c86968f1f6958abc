"""imtl against its specification, on every backend that is here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.gram_solver import GramSolver, Solver
from tests.ops.zoo import BETWEEN, Case, each, zoo

WELL_POSED = ("random", "conflicting", "dominating_row", "short_row", "tiny", "huge", "rows_far_apart")
SIZES = (1, 2, 3, 5, 8, 16, 40, 64, 128)


def well_posed(sizes: tuple[int, ...] = SIZES) -> list[Case]:
    return [case for case in zoo(sizes) if case.name.rsplit("-", 1)[0] in WELL_POSED]


def libmtl(jacobian: Tensor) -> Tensor:
    """The closed form of the paper's equation 7, from the gradients."""
    unit = jacobian / jacobian.norm(dim=1, keepdim=True)
    differences, unit_differences = jacobian[0] - jacobian[1:], unit[0] - unit[1:]
    rest = torch.linalg.solve(unit_differences @ differences.T, unit_differences @ jacobian[0])
    return torch.cat([1 - rest.sum(dim=0, keepdim=True), rest])


def check_projections(case: Case, weights: Tensor, tolerance: float) -> None:
    """All (G w)_i / d_i agree within tolerance sum_j |w_j| d_j."""
    matrix, w = case.gram.numpy().astype(np.longdouble), weights.numpy().astype(np.longdouble)
    length = np.sqrt(np.diag(matrix))
    projection = matrix @ w / length
    assert np.ptp(projection) <= tolerance * (length @ abs(w))


class TestImtl(GramSolver):
    name = "imtl"

    @each(zoo(), BETWEEN)
    def test_sums_to_one(self, solver: Solver, case: Case) -> None:
        weights = solver(case.gram)
        assert abs(float(weights.sum()) - 1) <= 1e-14 * float(weights.abs().sum())

    @each(well_posed(), BETWEEN)
    def test_projections_are_equal(self, solver: Solver, case: Case) -> None:
        check_projections(case, solver(case.gram), 1e-12)

    @pytest.mark.parametrize("name", ["duplicates", "integers", "narrow", "nearly_parallel", "rank_one"])
    def test_rank_deficient_projections(self, solver: Solver, name: str) -> None:
        """Equal rows project alike, and nearly parallel ones as nearly as they are parallel."""
        case = next(case for case in zoo((2,)) if case.name.startswith(name))
        if case.gram[0, 1] > 0:
            check_projections(case, solver(case.gram), 1e-6)

    @each(well_posed((2, 3, 8)), BETWEEN)
    def test_is_libmtls_closed_form(self, solver: Solver, case: Case) -> None:
        # The closed form itself loses digits where the gradients' lengths differ.
        if case.gram.diagonal().max() < 1e6 * case.gram.diagonal().min():
            torch.testing.assert_close(solver(case.gram), libmtl(case.jacobian), rtol=1e-8, atol=1e-9)

    def test_orthogonal_tasks_weigh_by_inverse_length(self, solver: Solver) -> None:
        length = torch.logspace(-6, 6, 24, dtype=torch.float64)
        expected = (1 / length) / (1 / length).sum()
        torch.testing.assert_close(solver(length.square().diag()), expected, rtol=1e-12, atol=0)

    def test_zero_rows_take_no_weight(self, solver: Solver) -> None:
        gram = torch.diag(torch.tensor([0.0, 4.0, 0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(solver(gram), torch.tensor([0, 1 / 3, 0, 2 / 3], dtype=torch.float64))

    def test_duplicates_share_the_weight(self, solver: Solver) -> None:
        case = next(zoo((5,)))
        twice = case.jacobian.repeat(2, 1)
        weights, single = solver(twice @ twice.T), solver(case.gram)
        torch.testing.assert_close(weights, torch.cat([single, single]) / 2, rtol=1e-9, atol=1e-11)

    def test_without_a_solution_unit_gradients_are_averaged(self, solver: Solver) -> None:
        row = torch.tensor([1.0, 2.0], dtype=torch.float64)
        opposite = torch.stack([row, -4 * row])
        torch.testing.assert_close(solver(opposite @ opposite.T), torch.tensor([0.8, 0.2], dtype=torch.float64))
        assert solver(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [1 / 3] * 3

    def test_cancelling_sum_averages_unit_gradients(self, solver: Solver) -> None:
        """x has both signs, so that there are lengths d at which the x_i / d_i add up to zero."""
        cosine = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
        third = torch.tensor([0.94, 0.94], dtype=torch.float64)
        matrix = torch.eye(3, dtype=torch.float64)
        matrix[:2, :2], matrix[2, :2], matrix[:2, 2] = cosine, third, third
        x = torch.linalg.solve(matrix, torch.ones(3, dtype=torch.float64))
        assert x[0] * x[2] < 0
        length = torch.tensor([1.0, 1.0, float(-x[2] / (x[0] + x[1]))], dtype=torch.float64)
        expected = (1 / length) / (1 / length).sum()
        torch.testing.assert_close(solver(length[:, None] * matrix * length), expected, rtol=1e-9, atol=0)
