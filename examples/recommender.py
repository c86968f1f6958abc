"""Recommenders: MMoE with CAGrad on the census, and ESMM on generated clicks with sparse tables."""

from __future__ import annotations

from typing import Any

from fastmtl import Trainer
from fastmtl.data import load
from fastmtl.data.clicks import click_features
from fastmtl.model import FeatureEncoder

__all__ = ["census", "clicks"]


def census(architecture: str = "MMoE", weighting: str = "CAGrad", epochs: int = 6, rows: int = 20_000) -> Trainer:
    """Train on income and marital status; a logged score is the area under the ROC curve."""
    return _trained("census-income", rows, epochs, architecture=architecture, weighting=weighting)


def clicks(weighting: str = "UPGrad", epochs: int = 1, rows: int = 200_000) -> Trainer:
    """Train click and conversion on all impressions, with tables whose gradients have the touched rows only."""
    return _trained(
        "clicks",
        rows,
        epochs,
        optim="sparseadam",
        architecture="ESMM",
        weighting=weighting,
        encoder_class=lambda: FeatureEncoder(click_features(sparse=True), (128, 64)),
    )


def _trained(dataset: str, rows: int, epochs: int, *, optim: str = "adam", **options: Any) -> Trainer:
    bundle = load(dataset, n_train=rows)
    trainer = Trainer(
        task_dict=bundle.task_dict,
        decoders=bundle.decoders(),
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": optim, "lr": 2e-3},
        scheduler_param=None,
        **{"encoder_class": bundle.encoder_class, **options},
    )
    trainer.train(bundle.train, bundle.test, epochs, val_dataloaders=bundle.val)
    return trainer


if __name__ == "__main__":
    for name in ("MMoE", "PLE"):
        census(name)
    clicks()
