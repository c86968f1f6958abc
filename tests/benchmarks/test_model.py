"""The model of a step's cost: its bytes are those of the ops, its operations those of the network."""

from __future__ import annotations

import pytest
import torch
from fastmtl.benchmarks.model import CARDS, Cost, algebra, counted, print_model, step_model

from fastmtl import ops
from fastmtl.errors import UsageError
from tests.ops.rows import make_rows

SHAPES = ((64, 33), (129,), (7, 5, 3))


@pytest.mark.parametrize("tasks", [2, 3, 8, 40])
def test_bytes_of_gram_and_combine_are_those_of_the_ops(tasks: int) -> None:
    flat = make_rows(tasks, SHAPES)
    parameters = sum(torch.Size(shape).numel() for shape in SHAPES)
    rows = [flat[t * len(SHAPES) : (t + 1) * len(SHAPES)] for t in range(tasks)]
    ops.gram(rows)  # The first call loads the kernels, and is seen twice.
    weights = torch.ones(tasks, dtype=torch.float64)
    ops.combine(rows, weights)
    seen: list[Cost] = []
    with counted(seen, "gram"):
        gram = ops.gram(rows)
    with counted(seen, "combine"):
        ops.combine(rows, weights)
    model = {cost.part: cost for cost in algebra(tasks, parameters, len(SHAPES))}
    assert max(size for size, _ in seen[0].by_op) == model["gram"].bytes + gram.nbytes
    assert max(size for size, _ in seen[1].by_op) == model["combine"].bytes + weights.nbytes


def test_operations_are_those_of_the_network() -> None:
    costs = {cost.part: cost for cost in step_model("mlp", 3, 16, 1)}
    inner = 128 * 512 + 2 * 512 * 512
    assert costs["forward"].flops == 2 * 16 * inner
    # Each layer but the first has a product for its input beside that for its weights.
    assert costs["3 backwards"].flops == 3 * 2 * 16 * (inner + 2 * 512 * 512)
    assert costs["heads"].flops == 3 * 3 * 2 * 16 * 512 * 10
    parameters = inner + 3 * 512
    assert costs["gram"].bytes == 4 * 3 * parameters
    assert costs["gram"].flops == 3 * 4 * parameters


def test_many_tensors_take_more_launches() -> None:
    few, many = algebra(8, 1000, 10), algebra(8, 1000, 1000)
    assert [cost.launches for cost in few] == [2, 1, 1]
    assert [cost.launches for cost in many] == [6, 1, 4]


def test_time_is_the_longer_of_bytes_and_operations() -> None:
    card = CARDS["H100"]
    assert algebra(2, 10**9, 1)[0].seconds(card) == pytest.approx(8e9 / 3.35e12)
    step = step_model("resnet18", 2, 2, 32)
    assert all(cost.seconds(card) * (1 + 1e-9) >= cost.bytes / card.memory for cost in step)
    assert sum(cost.seconds(CARDS["H200"]) for cost in step) < sum(cost.seconds(card) for cost in step)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_model("h100", "mlp", [2, 3], 16, 1)
    said = capsys.readouterr().out
    assert "mlp, T=3, batch 16, on H100, fp32" in said
    assert [line.split()[0] for line in said.splitlines()[1:9]] == [
        *("part", "forward", "heads", "2", "gram", "solver", "combine", "optimizer")
    ]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="card"):
        print_model("B900", "mlp", [2], 16, 1)
    with pytest.raises(UsageError, match="precision must be one of"):
        print_model("H100", "mlp", [2], 16, 1, "fp8")
