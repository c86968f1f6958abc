"""Tables with sparse gradients in several processes: the steps of one process, at the traffic of the touched rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.distributed.group import Case, check_as_one, train_in_processes
from tests.distributed.looking import Looking, heads

pytestmark = pytest.mark.usefixtures("in_float64")

SGD = {"optim_param": {"optim": "sgd", "lr": 0.1}}
ADAGRAD = {"optim_param": {"optim": "adagrad", "lr": 0.1}}
ADAM = {"optim_param": {"optim": "sparseadam", "lr": 0.05}}


def _case(weighting: str, options: dict[str, Any], name: str = "", partial: bool = False, batch: int = 8) -> Case:
    given = {"encoder_class": Looking, **options}
    return Case(f"{weighting} {name}".strip(), weighting, batch, given, partial=partial)


CASES = [
    *(_case(name, SGD) for name in ("EW", "MGDA", "PCGrad", "UPGrad", "Nash_MTL", "CAGrad", "UW", "GradVac")),
    *(_case(name, ADAGRAD, "adagrad") for name in ("EW", "MGDA")),
    *(_case(name, ADAM, "sparseadam") for name in ("EW", "UPGrad")),
    _case("MGDA", {"optim_param": {"optim": "sgd", "lr": 0.1, "momentum": 0.9}}, "momentum"),
    *(_case(name, SGD, "partial", partial=True) for name in ("UW", "MGDA", "PCGrad")),
    _case("MGDA", SGD, "uneven", batch=7),
    *(_case(name, SGD | {"decoders": heads()}, "tables of tasks", partial=True) for name in ("EW", "UPGrad", "MoDo")),
    _case("GradDrop", SGD | {"rep_grad": True}),
    _case("MGDA", SGD | {"rep_grad": True}, "rep"),
    _case("PCGrad", SGD | {"multi_input": True}, "multi"),
    _case("UPGrad", ADAM | {"accumulate": 2}, "accumulate", partial=True, batch=5),
    _case("MGDA", SGD | {"clip_grad_norm": 0.05}, "clip"),
    _case("Nash_MTL", SGD | {"update_weights_every": 3}, "held"),
    _case("MGDA", SGD | {"weight_momentum": 0.5}, "momentum of weights"),
    _case("PCGrad", SGD | {"tasks_per_step": 2}, "tasks per step", partial=True),
    *(_case(name, SGD | {"groups": "module"}, "groups") for name in ("MGDA", "UPGrad")),
    *(_case(name, SGD) for name in ("MoDo", "SDMGrad", "AutoLambda", "FORUM", "MOML", "FAMO")),
    _case("MGDA", SGD | {"architecture": "MMoE", "arch_args": {"num_experts": [2], "img_size": [6]}}, "MMoE"),
    _case("MGDA", SGD | {"vjps": "sketch", "sketch_width": 4, "gram_check_every": 4}, "sketch"),
]

KEPT = ("EW", "MGDA", "PCGrad", "UPGrad", "Nash_MTL", "UW partial", "EW tables of tasks", "MGDA clip")
# Parts of three and two rows, often without any of the rare table.
IN_THREE = [case for case in CASES if case.name in KEPT]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of two processes has after each case."""
    return train_in_processes(2, CASES, tmp_path_factory)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of three processes has after each case of batches that they can divide."""
    return train_in_processes(3, IN_THREE, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_as_one(case: Case, two: Mapping[str, list[Any]]) -> None:
    check_as_one(case, two[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_THREE, ids=lambda case: case.name)
def test_three_processes_train_as_one(case: Case, three: Mapping[str, list[Any]]) -> None:
    check_as_one(case, three[case.name])
