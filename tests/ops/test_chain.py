"""What a step does with gradients - Gram matrix, solver, weighted sum - as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from tests.ops.rows import make_rows

SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "min_norm": ops.min_norm,
    "pcgrad": lambda gram: ops.pcgrad(gram, torch.arange(3).expand(3, 3)),
    "upgrad": ops.upgrad,
}


# Inductor itself imports what torch has deprecated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SOLVERS)
def test_gram_solver_and_combine_are_one_graph(name: str) -> None:
    flat = make_rows(3, ((5, 3), (70,)))
    flat[2] = None
    solver = SOLVERS[name]

    def update(rows: list[list[Tensor | None]]) -> list[Tensor | None]:
        sums = ops.combine(rows, solver(ops.gram(rows)))
        return [None if total is None else total * 2 for total in sums]

    rows = [flat[0:2], flat[2:4], flat[4:6]]
    for got, want in zip(torch.compile(update, fullgraph=True)(rows), update(rows), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_with_state_is_one_graph() -> None:
    flat = make_rows(3, ((5, 3), (70,)))
    rows = [flat[0:2], flat[2:4], flat[4:6]]

    def update(state: list[Tensor], out: list[Tensor]) -> Tensor:
        held = [state[0:2], state[2:4], state[4:6]]
        gram = ops.ema_gram_(held, rows, torch.tensor(0.9), torch.full((3,), 0.1))
        ops.combine_(out, held, ops.min_norm(gram))
        return out[0] + out[1].sum()

    results = []
    for run in (update, torch.compile(update, fullgraph=True)):
        state = make_rows(3, ((5, 3), (70,)), seed=1)
        out = [torch.empty(5, 3), torch.empty(70)]
        results.append([run(state, out), *state, *out])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
