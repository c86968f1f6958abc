"""Models go through pickles, copies and exports, and come back as what they were."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.architecture import HPS
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import EW, WEIGHTINGS
from tests.trainer.toy import encoder, flat, loaders, make_trainer


class Mine(HPS):
    """An architecture of the user's."""


class Stateful(EW):
    """A strategy of the user's, with state."""

    def init_param(self) -> None:
        self.remember("seen", torch.zeros(self.task_num))
        self.scale = nn.Parameter(torch.ones(self.task_num))


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


WAYS = {"torch.save": _saved, "pickle": _pickled, "deepcopy": copy.deepcopy}


@cache
def _trained(weighting: Any = "MGDA", architecture: Any = "HPS", make_encoder: Any = encoder) -> Any:
    trainer = make_trainer(weighting, architecture, encoder_class=make_encoder)
    trainer.train(loaders(), loaders(), 1)
    return trainer


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("weighting", ["MGDA", "UW", Stateful])
@pytest.mark.parametrize("architecture", ["HPS", "MTAN", Mine])
def test_there_and_back(way: Callable[[Any], Any], weighting: Any, architecture: Any) -> None:
    trainer = _trained(weighting, architecture)
    model, x = trainer.model.eval(), torch.randn(5, 6)
    again = way(model)
    assert type(again) is type(model)
    assert type(again).__name__ == "MTLModel"
    assert isinstance(again, HPS if architecture != "MTAN" else nn.Module)
    assert (again.strategy_name, again.task_name) == (model.strategy_name, model.task_name)
    assert again.encoder_class is encoder
    for task, pred in model(x).items():
        assert torch.equal(again(x)[task], pred)
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("weighting", ["MGDA", "UW", "EW", "PCGrad"])
def test_what_comes_back_trains_alike(way: Callable[[Any], Any], weighting: str) -> None:
    model = _trained(weighting).model
    again = way(model)
    x, labels = next(iter(loaders()))
    grads = []
    for each in (model, again):
        each.zero_grad()
        torch.manual_seed(3)
        preds = each(x)
        losses = [nn.functional.cross_entropy(preds["task0"], labels["task0"])]
        losses.append(nn.functional.mse_loss(preds["task1"], labels["task1"]))
        each.backward(torch.stack(losses))
        grads.append(flat([param.grad for param in each.parameters()]))
    assert torch.equal(*grads)


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_what_strategies_remember_comes_back_as_one(way: Callable[[Any], Any]) -> None:
    """The rows that a strategy writes into are the memory that its state_dict shows."""
    trainer = _trained("DB_MTL")
    again = way(trainer.model)
    for name, state in again.row_states.items():
        for row in state.rows:
            for part in row:
                part.fill_(7.0)
        assert (getattr(again, name) == 7).all()
        assert not (getattr(trainer.model, name) == 7).any()


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_every_strategy(name: str) -> None:
    trainer = make_trainer(name, rep_grad=WEIGHTINGS[name].needs == "reps")
    again = _pickled(trainer.model)
    assert type(again) is type(trainer.model)
    assert torch.equal(
        flat([*again.parameters(), *again.buffers()]), flat([*trainer.model.parameters(), *trainer.model.buffers()])
    )


def test_an_encoder_class_that_no_module_has() -> None:
    trainer = _trained(make_encoder=lambda: encoder())
    with pytest.raises(UsageError, match="encoder_class of this model could not be pickled"):
        _pickled(trainer.model).encoder_class()
    assert len(list(copy.deepcopy(trainer.model).encoder_class().parameters())) == 4


def test_representations_of_the_last_batch_stay_behind() -> None:
    trainer = make_trainer("MGDA", rep_grad=True)
    trainer.model(torch.randn(3, 6))
    assert trainer.model.rep_tasks
    for way in WAYS.values():
        again = way(trainer.model)
        assert not again.rep_tasks
        assert again(torch.randn(3, 6)).keys() == {"task0", "task1"}


def test_a_compiled_run_leaves_a_model_that_can_be_pickled() -> None:
    trainer = make_trainer(cuda_graph=True)
    trainer.step([next(iter(loaders()))], StepBuffer())
    x = torch.randn(5, 6)
    assert torch.equal(_pickled(trainer.model)(x)["task0"], trainer.model(x)["task0"])


def _predict(model: Any, x: Tensor, queue: Any) -> None:
    queue.put({task: pred.tolist() for task, pred in model(x).items()})


@pytest.mark.slow
def test_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    model, x, queue = _trained().model.eval(), torch.randn(5, 6), context.Queue()
    process = context.Process(target=_predict, args=(model, x, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(60)
    assert found == {task: pred.tolist() for task, pred in model(x).items()}


def test_export() -> None:
    trainer = _trained()
    model, x = trainer.model.eval(), torch.randn(5, 6)
    exported = torch.export.export(model, (x,)).module()
    for task, pred in model(x).items():
        torch.testing.assert_close(exported(x)[task], pred)
