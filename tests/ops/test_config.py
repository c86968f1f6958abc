"""config against its specification, on every backend that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.gram_solver import GramSolver, Solver, check_close
from tests.ops.zoo import BETWEEN, Case, each, zoo

WELL_POSED = (
    *("random", "conflicting", "dominating_row", "short_row", "tiny", "huge"),
    *("rows_far_apart", "rows_of_all_scales"),
)
SIZES = (1, 2, 3, 5, 8, 16, 40, 64, 128)


def well_posed(sizes: tuple[int, ...] = SIZES) -> list[Case]:
    return [case for case in zoo(sizes) if case.name.rsplit("-", 1)[0] in WELL_POSED]


def units(jacobian: Tensor) -> Tensor:
    return jacobian / jacobian.norm(dim=1, keepdim=True)


def explicit(jacobian: Tensor) -> Tensor:
    """The paper's update, from a pseudo-inverse of the unit gradients."""
    direction = torch.linalg.pinv(units(jacobian)) @ torch.ones(len(jacobian), dtype=jacobian.dtype)
    direction = direction / direction.norm()
    return (jacobian @ direction).sum() * direction


class TestConfig(GramSolver):
    name = "config"

    @each(well_posed(), BETWEEN)
    def test_cosines_are_equal_and_positive(self, solver: Solver, case: Case) -> None:
        weights = solver(case.gram)
        projection = (case.gram @ weights) / case.gram.diagonal().sqrt()
        allowed = 1e-12 * float(weights.abs() @ case.gram.diagonal().sqrt())
        assert float(projection.max() - projection.min()) <= allowed
        assert float(projection.min()) > 0

    @each(well_posed(), BETWEEN)
    def test_length_is_the_sum_of_projections(self, solver: Solver, case: Case) -> None:
        weights = solver(case.gram)
        square = weights @ case.gram @ weights
        torch.testing.assert_close((case.gram @ weights).sum(), square, rtol=1e-9, atol=0)

    @each(well_posed(), BETWEEN)
    def test_is_the_explicit_update(self, solver: Solver, case: Case) -> None:
        expected = explicit(case.jacobian)
        torch.testing.assert_close(
            solver(case.gram) @ case.jacobian / expected.norm(), expected / expected.norm(), rtol=0, atol=1e-9
        )

    @pytest.mark.parametrize("kind", ["narrow", "rank_one", "duplicates", "opposite", "integers", "zero_rows"])
    @pytest.mark.parametrize("size", [3, 16])
    def test_is_the_explicit_update_of_lesser_rank(self, solver: Solver, kind: str, size: int) -> None:
        case = next(case for case in zoo((size,)) if case.name == f"{kind}-T{size}")
        nonzero = case.jacobian[case.jacobian.norm(dim=1) > 0]
        direction = torch.linalg.pinv(units(nonzero), rtol=1e-8) @ torch.ones(len(nonzero), dtype=nonzero.dtype)
        expected = explicit(nonzero) if direction.norm() > 1e-6 else torch.zeros_like(direction)
        update = solver(case.gram) @ case.jacobian
        torch.testing.assert_close(update, expected, rtol=1e-7, atol=1e-8 * float(nonzero.norm()))

    @each(zoo((2, 3, 16, 64)), BETWEEN)
    def test_sum_of_losses_never_rises(self, solver: Solver, case: Case) -> None:
        image = case.gram @ solver(case.gram)
        length = case.gram.diagonal().sqrt()
        assert float(image.sum()) >= -1e-9 * float(length.sum() ** 2)

    def test_opposite_gradients_cancel(self, solver: Solver) -> None:
        gram = torch.tensor([[1.0, -3.0], [-3.0, 9.0]], dtype=torch.float64)
        assert solver(gram).tolist() == [0, 0]

    def test_zero_rows_change_nothing(self, solver: Solver) -> None:
        case = next(zoo((5,)))
        padded = torch.zeros(7, 7, dtype=torch.float64)
        padded[:5, :5] = case.gram
        weights = solver(padded)
        assert weights[5:].tolist() == [0, 0]
        check_close(case, weights[:5], solver(case.gram), 1e-10)
        assert solver(0 * padded).tolist() == [0] * 7

    def test_orthogonal_tasks_closed_form(self, solver: Solver) -> None:
        length = torch.logspace(-6, 6, 24, dtype=torch.float64)
        expected = length.mean() / length
        torch.testing.assert_close(solver(length.square().diag()), expected, rtol=1e-12, atol=0)
