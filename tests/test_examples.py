"""The example programs train, inside the trainers people already have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastmtl.model._torchvision import import_torchvision

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for module in (name, "two_tasks"):
        sys.modules.pop(module, None)
    return importlib.import_module(name)


def test_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    history = example("jacobian_descent", monkeypatch).train(steps=100)
    assert max(history[-1]) < 0.2 * min(history[0])


def test_a_penalty_on_the_ratio_of_gradient_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    history = example("gradnorm", monkeypatch).with_penalty(epochs=4)
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.5 * history[0][1]


def test_the_same_network_with_gradnorm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example("gradnorm", monkeypatch)
    monkeypatch.chdir(tmp_path)
    trainer = module.with_gradnorm(epochs=3)
    assert trainer.model.epoch == 2


def test_recommenders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example("recommender", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert module.census("PLE", epochs=1, rows=5_000).meter.results["marital"][0] > 0.9
    assert module.clicks(rows=5_000).model.encoder.stem.tables["0_user"].weight.grad.is_sparse


@pytest.mark.slow
def test_a_hydra_learns_all_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("hydranet", monkeypatch)
    untrained = module.train(epochs=0)
    trained = module.train(epochs=3, images=2500)
    assert all(trained[task] < 0.9 * loss for task, loss in untrained.items()), (untrained, trained)


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_accumulation_and_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    pytest.importorskip("lightning")
    module = example("lightning_module", monkeypatch)
    trainer = module.train(
        epochs=8,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert set(trainer.callback_metrics) >= {"loss_class", "loss_number"}
    assert trainer.global_step == 8 * 4
    assert trainer.callback_metrics["loss_number"] < 0.6


@pytest.mark.filterwarnings("ignore")
def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    history = example("accelerate_loop", monkeypatch).train(epochs=8)
    assert history[-1]["class"] < 0.5 * history[0]["class"]
    assert history[-1]["number"] < 0.5 * history[0]["number"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    module = example("hf_trainer", monkeypatch)
    model, log = module.train(epochs=8)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(param.grad is None or torch.isfinite(param.grad).all() for param in model.parameters())
