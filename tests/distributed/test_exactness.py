"""Several processes do what one does with the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fastmtl.weighting import WEIGHTINGS
from tests.distributed.group import Case, FixedMTAN, in_processes, train, train_all

SUPPORTED = [name for name, rule in WEIGHTINGS.items() if rule.needs in ("losses", "gram", "rows")]
CASES = [
    *(Case(name, name) for name in SUPPORTED),
    Case("uneven", "MGDA", batch=7),
    Case("uneven losses", "DWA", batch=7),
    Case("MMoE", "Nash_MTL", options={"architecture": "MMoE", "arch_args": {"img_size": [6], "num_experts": [2]}}),
    Case("MTAN", "CAGrad", options={"architecture": FixedMTAN}),
    Case("MTAN losses", "UW", options={"architecture": FixedMTAN}),
    Case("rep", "MGDA", options={"rep_grad": True}),
    Case("rep heads", "IMTL", options={"rep_grad": True}),
    Case("GradDrop", "GradDrop", options={"rep_grad": True}),
    Case("multi", "PCGrad", options={"multi_input": True}),
    Case("multi rep", "MGDA", options={"multi_input": True, "rep_grad": True}),
    Case("accumulate", "FairGrad", options={"accumulate": 2}),
    Case("accumulate losses", "UW", options={"accumulate": 2}),
    Case("accumulate rows", "MoCo", options={"accumulate": 2}),
    Case("uneven rows", "ExcessMTL", batch=7),
    Case(
        "rows of MMoE", "DB_MTL", options={"architecture": "MMoE", "arch_args": {"img_size": [6], "num_experts": [2]}}
    ),
    Case("rows and momentum", "MoCo", options={"weight_momentum": 0.5}),
    Case("held", "Nash_MTL", options={"update_weights_every": 3}),
    Case("held rep", "MGDA", options={"update_weights_every": 3, "rep_grad": True}),
    Case("momentum and clip", "MGDA", options={"weight_momentum": 0.5, "clip_grad_norm": 0.1}),
    Case("adam", "UPGrad", options={"optim_param": {"optim": "adam", "lr": 1e-2, "weight_decay": 1e-3}}),
]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of two processes has after each case."""
    ranks = in_processes(2, tmp_path_factory.mktemp("two"), train_all, CASES)
    return {case.name: [rank[index] for rank in ranks] for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_as_one(case: Case, several: Mapping[str, list[Any]]) -> None:
    params, losses, scores = train(case)
    for of_rank, losses_of_rank, scores_of_rank in several[case.name]:
        assert (of_rank - params).norm() <= 1e-9 * params.norm()
        assert torch.allclose(losses_of_rank, losses, rtol=1e-9)
        assert scores_of_rank == pytest.approx(scores, rel=1e-9)
    assert torch.equal(several[case.name][0][0], several[case.name][1][0])
