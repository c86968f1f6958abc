"""Several processes do what one does with the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.group import (
    DIFFERENT,
    Case,
    FixedMTAN,
    check_as_one,
    counted_encoder,
    grouped,
    learned_tasks,
    normed_encoder,
    train_in_processes,
    weighed_tasks,
)

pytestmark = pytest.mark.usefixtures("in_float64")

MMOE = {"architecture": "MMoE", "arch_args": {"img_size": [6], "num_experts": [2]}}
# What fits in memory depends on the rows in a process.
SKETCH = {"vjps": "sketch", "sketch_width": 4, "cotangents": "keep"}
CASES = [
    *(Case(name, name) for name in DIFFERENT),
    Case("uneven", "MGDA", batch=7),
    Case("MMoE", "Nash_MTL", options=MMOE),
    Case("MTAN", "CAGrad", options={"architecture": FixedMTAN}),
    Case("rep", "MGDA", options={"rep_grad": True}),
    Case("GradDrop", "GradDrop", options={"rep_grad": True}),
    Case("multi", "PCGrad", options={"multi_input": True}),
    Case("accumulate", "FairGrad", options={"accumulate": 2}),
    Case("accumulate rows", "MoCo", options={"accumulate": 2}),
    Case("uneven rows", "ExcessMTL", batch=7),
    Case("rows and momentum", "MoCo", options={"weight_momentum": 0.5}),
    Case("held", "Nash_MTL", options={"update_weights_every": 3}),
    Case("momentum and clip", "MGDA", options={"weight_momentum": 0.5, "clip_grad_norm": 0.1}),
    Case("compiled partial", "MGDA", options={"compile": True}, partial=True),
    Case("tasks per step", "PCGrad", options={"tasks_per_step": 2}),
    Case("one task's row", "MConFIG", options={"tasks_per_step": None}),
    *(Case(f"partial {name}", name, partial=True) for name in ("UW", "FAMO", "GradVac", "MoCo", "MoDo", "AutoLambda")),
    *(
        Case(f"accumulate partial {name}", name, batch=5, options={"accumulate": 2} | options, partial=True)
        for name, options in (
            ("MGDA", {}),
            ("MoCo", {}),
            ("Nash_MTL", {"update_weights_every": 3}),
        )
    ),
    # Parts of two rows and one, which has no label at all in some batches.
    Case("partial of few rows", "MGDA", batch=3, partial=True),
    Case("partial rep", "MGDA", options={"rep_grad": True}, partial=True),
    Case("partial GradDrop", "GradDrop", options={"rep_grad": True}, partial=True),
    Case("partial weighed losses", "UW", 5, {"task_dict": weighed_tasks(), "accumulate": 2}, partial=True),
    Case("learned", "MGDA", options={"task_dict": learned_tasks()} | grouped()),
    Case("learned losses", "UW", 5, {"task_dict": learned_tasks(), "accumulate": 2}, partial=True),
    Case("learned heads", "Nash_MTL", options={"task_dict": learned_tasks()}, partial=True),
    Case("partial MTAN", "CAGrad", options={"architecture": FixedMTAN}, partial=True),
    Case("partial tasks per step", "PCGrad", options={"tasks_per_step": 2}, partial=True),
    Case("sketch", "MGDA", options={**SKETCH, "gram_check_every": 4}),
    *(
        Case(f"sketch {name}", name, options=SKETCH | options, partial=True)
        for name, options in (
            ("PCGrad", {"cotangents": "recompute"}),
            ("Nash_MTL", {"update_weights_every": 2, "clip_grad_norm": 0.1}),
            ("UPGrad", {"tasks_per_step": 2}),
            ("GradVac", {"architecture": FixedMTAN}),
        )
    ),
    Case("groups", "Nash_MTL", options={"groups": "layer", "update_weights_every": 2}),
    *(
        Case(f"groups {name}", name, options={"groups": "module"}, partial=True)
        for name in ("PCGrad", "CAGrad", "UPGrad")
    ),
    # The rate is so great that a task is worse in the second epoch, and not trained in the third.
    Case("stopped", "PCGrad", options={"task_patience": {"task0": 1}, "optim_param": {"optim": "adam", "lr": 0.6}}),
    Case("adam", "UPGrad", options={"optim_param": {"optim": "adam", "lr": 1e-2, "weight_decay": 1e-3}}),
]
NORMED = {"encoder_class": normed_encoder, "sync_batch_norm": True}
NORMS = [
    Case("normed HPS", "MGDA", options=NORMED),
    Case("normed MMoE", "Nash_MTL", batch=7, options=NORMED | MMOE),
    Case("normed MTAN", "CAGrad", batch=7, options={"architecture": "MTAN", "sync_batch_norm": True}),
    Case("normed compiled", "MGDA", options=NORMED | {"encoder_class": counted_encoder, "compile": True}),
    Case("normed float32", "MGDA", options=NORMED, dtype=torch.float32),
]
CASES += NORMS
# What differs most; the others take another minute.
FIRST = (
    *("EW", "UW", "FAMO", "MGDA", "GradVac", "Nash_MTL", "PCGrad", "MoCo", "MoDo", "uneven", "MMoE", "rep", "multi"),
    *(
        "accumulate",
        "tasks per step",
        "groups",
        "one task's row",
        "learned",
        "partial UW",
        "partial MoCo",
        "partial of few rows",
        "accumulate partial Nash_MTL",
        "normed HPS",
        "sketch",
        "sketch PCGrad",
        "stopped",
    ),
)
KEPT = ("MTAN", "GradDrop", "multi", "accumulate", "groups")
# Batches of nine give parts of two and three rows.
IN_FOUR = [
    *(Case(name, name, batch=9) for name in ("MGDA", "Nash_MTL", "RLW")),
    *(replace(case, batch=9) for case in CASES if case.name in KEPT),
    *(replace(case, batch=9) for case in NORMS[1:3]),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of two processes has after each of the first cases."""
    return train_in_processes(2, [case for case in CASES if case.name in FIRST], tmp_path_factory)


@pytest.fixture(scope="module")
def two_more(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of two processes has after each of the other cases."""
    return train_in_processes(2, [case for case in CASES if case.name not in FIRST], tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of four processes has after each case."""
    return train_in_processes(4, IN_FOUR, tmp_path_factory)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FIRST], ids=lambda case: case.name)
def test_two_processes_train_as_one(case: Case, two: Mapping[str, list[Any]]) -> None:
    check_as_one(case, two[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in FIRST], ids=lambda case: case.name)
def test_two_processes_train_as_one_in_other_cases(case: Case, two_more: Mapping[str, list[Any]]) -> None:
    check_as_one(case, two_more[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_FOUR, ids=lambda case: case.name)
def test_four_processes_train_as_one(case: Case, four: Mapping[str, list[Any]]) -> None:
    check_as_one(case, four[case.name])
