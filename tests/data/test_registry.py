"""Data sets by name: what a loaded one holds, and what is said of mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl.data import DATASETS, ENCODERS, classes, describe_all, load, regression
from fastmtl.errors import UsageError
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric


def _first_images(loader: Any) -> torch.Tensor:
    return next(iter(loader))[0]


def _dataset(loader: Any) -> Any:
    return loader.dataset


@pytest.mark.parametrize("name", ["multimnist", "multimnist-multi"])
def test_a_bundle_fits_together(name: str) -> None:
    bundle = load(name, batch_size=8, test_batch_size=50, n_train=40, encoder="conv")
    encoder, decoders = bundle.encoder_class(), bundle.decoders()
    assert list(decoders) == list(bundle.task_dict) == list(bundle.outputs)
    for task, spec in bundle.task_dict.items():
        loaders: Any = bundle.train
        x, labels = next(iter(loaders[task] if bundle.multi_input else loaders))
        gt = labels if bundle.multi_input else labels[task]
        assert x.shape == (8, 3, 32, 32)
        assert gt.shape == (8,)
        pred = decoders[task](encoder(x))
        assert pred.shape == (8, bundle.outputs[task])
        assert torch.isfinite(spec["loss_fn"].compute_loss(pred, gt))
        assert len(spec["metrics"]) == len(spec["weight"]) == 1


# Graphs, points of equations and features of each task have tests of their own.
@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith(("nnconv", "pinn", "segnet-mtan"))])
def test_encoders_give_the_channels_they_announce(name: str) -> None:
    if name in ("aliexpress", "aliexpress-mtreclib"):
        with pytest.raises(UsageError, match="made with its data"):
            ENCODERS[name].build()
        return
    if name == "nnconv":
        pytest.importorskip("torch_geometric")
    with torch.no_grad():
        inputs: Any = torch.ones(1, 12, dtype=torch.int32) if name == "lstm" else torch.zeros(1, 3, 32, 32)
        if name in DATASETS:
            inputs = next(iter(load(name, test_batch_size=2, n_train=256).test))[0]
        width = {"inputs": 5} if ENCODERS[name].takes_vectors else {}
        features = ENCODERS[name].build(**width).eval()(torch.zeros(1, 5) if width else inputs)
    assert features.shape[1] == ENCODERS[name].feature_dim


def test_the_defaults() -> None:
    bundle = load("MultiMNIST", batch_size=128)
    assert bundle.rows == {"train": 20_000, "val": 2_000, "test": 2_000}
    assert (bundle.encoder, bundle.feature_dim) == ("resnet18", 512)
    loaders: list[Any] = [bundle.train, bundle.val, bundle.test]
    assert [len(loader) for loader in loaders] == [156, 8, 8]
    default = load("multimnist", n_train=100)
    assert (default.batch_size, default.test_batch_size) == (64, 256)


def test_pretrained_weights_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("fastmtl.model.resnet._load_pretrained", lambda model, name, progress: asked.append(name))
    load("multimnist", n_train=64, encoder="resnet18").encoder_class()
    load("multimnist", n_train=64, encoder="resnet18", pretrained=True).encoder_class()
    ENCODERS["resnet50-dilated"].build(pretrained=True)
    assert asked == ["resnet18", "resnet50"]


def test_the_seed_changes_the_order_and_not_the_rows() -> None:
    one, two = (load("multimnist", batch_size=40, n_train=40, seed=seed, encoder="conv") for seed in (0, 1))
    x, y = _first_images(one.train), _first_images(two.train)
    assert not torch.equal(x, y)
    assert torch.equal(x.flatten(1).sum(1).sort().values, y.flatten(1).sum(1).sort().values)
    assert torch.equal(_dataset(one.test).images, _dataset(two.test).images)


def test_tasks_of_the_multi_input_set_have_their_own_images() -> None:
    bundle = load("multimnist_multi", batch_size=10, n_train=30)
    train: Any = bundle.train
    assert bundle.multi_input
    assert list(train) == ["left", "right"]
    assert not torch.equal(train["left"].dataset.images, train["right"].dataset.images)
    x, labels = next(iter(train["right"]))
    assert x.shape == (10, 3, 32, 32)
    assert labels.dtype == torch.int64


def test_two_bundles_share_no_state() -> None:
    one, two = (load("multimnist", batch_size=10, n_train=30) for _ in range(2))
    assert isinstance(one.task_dict["left"]["loss_fn"], CELoss)
    assert isinstance(one.task_dict["left"]["metrics_fn"], AccMetric)
    losses = {id(bundle.task_dict[task]["loss_fn"]) for bundle in (one, two) for task in bundle.task_dict}
    metrics = {id(bundle.task_dict[task]["metrics_fn"]) for bundle in (one, two) for task in bundle.task_dict}
    assert len(losses) == len(metrics) == 4


def test_augmentation_is_off_until_asked_for() -> None:
    plain, shifted = (load("multimnist", batch_size=10, n_train=30, augment=augment) for augment in (False, True))
    assert _dataset(plain.train).max_shift == 0
    assert _dataset(shifted.train).max_shift == 2
    assert _dataset(shifted.test).max_shift == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "multimnst"}, "Unknown data set 'multimnst'. Did you mean 'multimnist'"),
        ({"encoder": "resnet19"}, "Unknown encoder of multimnist 'resnet19'. Did you mean 'resnet18'"),
        ({"path": "/no/such/folder"}, "The data folder '/no/such/folder' does not exist."),
        ({"n_train": 5}, "n_train must be at least batch_size (10)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"test_batch_size": 0}, "test_batch_size must be at least 1, got 0"),
        ({"batch_size": 20_001}, "between 1 and the 20000 rows"),
        ({"encoder": "conv", "pretrained": True}, "pretrained must be off for the encoder conv"),
        ({"name": "nyuv2"}, "The data set nyuv2 is not in the package: give its folder as dataset_path."),
        ({"name": "office-31"}, "The data set office-31 is not in the package"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(**{"name": "multimnist", "batch_size": 10, **options})
    assert message in str(caught.value)


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no file train-images"):
        load("multimnist", batch_size=10, path=tmp_path)


def test_the_list_has_tasks_that_are_given_as_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    info = replace(DATASETS["multimnist"], name="mine", outputs={}, tasks={"kind": classes(3), "size": regression()})
    monkeypatch.setitem(DATASETS, "mine", info)
    monkeypatch.setitem(DATASETS, "later", replace(info, name="later", tasks=lambda facts: {}))
    tasks = {row["name"]: row["tasks"] for row in describe_all()}
    assert (tasks["mine"], tasks["later"]) == ("kind (3), size (1)", "as of the data")
    assert tasks["parquet"] == "columns, as you say"


def test_the_list_names_source_and_licence() -> None:
    rows = describe_all()
    assert [row["name"] for row in rows] == list(DATASETS)
    for row in rows:
        assert all(row.values())
        if row["name"].startswith("multimnist"):
            assert "CC BY-SA" in row["licence"]
            assert "LeCun" in row["source"]
