"""What every op from a Gram matrix alone to weights, (T, T) -> (T,), must do; the tests of each one inherit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from fastmtl.ops import implementation
from tests.ops.rows import backend_kernel
from tests.ops.zoo import BETWEEN, Case, each, poisoned, zoo

__all__ = ["DEVICES", "GramSolver", "Solver", "check_close"]

Solver = Callable[[Tensor], Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})


def check_close(case: Case, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Two vectors of weights are the same, where a weight counts by the length of its gradient.

    Weights that only rounding keeps from zero differ by as much: what rounds is of the size of the gradients' sum.
    """
    length = case.gram.diagonal().sqrt()
    scale = (expected.abs() * length).sum() + length.max()
    assert ((actual - expected).abs() * length <= tolerance * scale).all()


class GramSolver:
    """Tests of the op ``name``; subclasses set it and add what its paper proves."""

    name: ClassVar[str]
    tolerance: ClassVar[float] = 1e-8

    @property
    def function(self) -> Solver:
        function: Solver = getattr(ops, self.name)
        return function

    @pytest.fixture(params=DEVICES)
    def solver(self, request: pytest.FixtureRequest) -> Solver:
        kernel = backend_kernel(self.name, request.param)
        device = DEVICES[request.param]

        def solve(gram: Tensor) -> Tensor:
            weights = kernel(gram.to(device))
            assert weights.device.type == device
            assert weights.dtype == torch.float64
            assert weights.shape == gram.shape[:1]
            return weights.cpu()

        return solve

    @pytest.mark.usefixtures("poisoned_memory")
    @each(zoo(), BETWEEN)
    def test_finite(self, solver: Solver, case: Case) -> None:
        assert solver(case.gram).isfinite().all()

    @each(zoo(), BETWEEN)
    def test_matches_reference(self, solver: Solver, case: Case) -> None:
        reference = implementation(self.name, "reference")
        check_close(case, solver(case.gram), reference(case.gram), self.tolerance)

    @each(zoo((2, 3, 16, 40)), BETWEEN)
    def test_permutation_equivariant(self, solver: Solver, case: Case) -> None:
        order = torch.randperm(len(case.gram), generator=torch.Generator().manual_seed(0))
        permuted = Case(case.name, case.jacobian[order])
        check_close(permuted, solver(case.gram[order][:, order]), solver(case.gram)[order], self.tolerance)

    @pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 1e-8, 3.0, 1e30])
    @each(zoo((3, 16)), BETWEEN)
    def test_scale_invariant(self, solver: Solver, case: Case, scale: float) -> None:
        check_close(case, solver(scale * case.gram), solver(case.gram), self.tolerance)

    @each(zoo((2, 3, 40)), BETWEEN)
    def test_coarse_rounding_stays_finite(self, solver: Solver, case: Case) -> None:
        gram = (case.gram / case.gram.diagonal().max().clamp(min=1e-300)).float()
        noise = torch.randn(gram.shape, generator=torch.Generator().manual_seed(0)).mul(1e-7)
        assert solver(gram.double() * (1 + (noise + noise.T))).isfinite().all()

    @each(poisoned((1, 2, 3, 8, 40)), BETWEEN)
    def test_non_finite_gives_nan(self, solver: Solver, case: Case) -> None:
        assert solver(case.gram).isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_other_dtypes_are_solved_in_float64(self, solver: Solver, dtype: torch.dtype) -> None:
        gram = next(zoo((5,))).gram.to(dtype)
        assert torch.equal(solver(gram), solver(gram.double()))

    def test_strided_input(self, solver: Solver) -> None:
        gram = next(zoo((8,))).gram
        wide = torch.full((8, 3, 8, 2), torch.nan, dtype=torch.float64)
        wide[:, 1, :, 0] = gram
        assert torch.equal(solver(wide[:, 1, :, 0]), solver(gram))

    def test_input_is_left_alone(self, solver: Solver) -> None:
        gram = next(zoo((8,))).gram
        before = gram.clone()
        solver(gram)
        assert torch.equal(gram, before)

    def test_deterministic(self, solver: Solver) -> None:
        gram = next(zoo((40,))).gram
        assert torch.equal(solver(gram), solver(gram))

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 2, 3), (0, 2, 2), (1, 2, 2, 2)])
    def test_gram_must_be_square(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(
            UsageError,
            match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape",
        ):
            self.function(torch.zeros(shape, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
    def test_gram_must_be_floats(self, dtype: torch.dtype) -> None:
        with pytest.raises(UsageError, match=r"gram must be a .* of floats"):
            self.function(torch.eye(3).to(dtype))

    def test_opcheck(self) -> None:
        torch.library.opcheck(getattr(torch.ops.fastmtl, self.name).default, (next(zoo((3,))).gram,))

    def test_compiles_without_graph_breaks(self) -> None:
        jacobian = next(zoo((5,))).jacobian
        function = self.function

        def update(jacobian: Tensor) -> Tensor:
            return function(jacobian @ jacobian.T) @ jacobian

        compiled = torch.compile(update, fullgraph=True)
        torch.testing.assert_close(compiled(jacobian), update(jacobian))
        torch.testing.assert_close(compiled(2 * jacobian), 2 * update(jacobian))
