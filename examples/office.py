"""The same objects in several domains, each a task with images of its own: Office-31 and Office-Home.

    python examples/office.py --dataset office-31 --dataset_path PATH --multi_input --weighting PCGrad --pretrained

``PATH`` holds the images and, as ``data_txt``, the lists of them from LibMTL's ``examples/office/data_txt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmtl import Trainer
from fastmtl.config import LibMTL_args, prepare_args
from fastmtl.data.office import DOMAINS, OfficeDataset
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric
from fastmtl.model import resnet18
from fastmtl.utils import set_device, set_random_seed

CLASSES = {"office-31": 31, "office-home": 65}
HIDDEN = 512


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments: LibMTL's, and those of this example."""
    parser.add_argument("--dataset", default="office-31", choices=list(DOMAINS), help="which of the two")
    parser.add_argument("--dataset_path", required=True, type=Path, help="folder of the images")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet's weights")
    parser.add_argument("--bs", default=64, type=int, help="batch size of each task")
    parser.add_argument("--epochs", default=100, type=int, help="passes over the training data")
    return parser.parse_args()


class Encoder(nn.Module):
    """A ResNet-18, the mean of its maps and one layer more; under this name MTAN finds the ResNet in it."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        self.resnet_network: nn.Module = resnet18(pretrained=pretrained)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        first = nn.Linear(512, HIDDEN)
        nn.init.normal_(first.weight, 0, 0.005)
        nn.init.constant_(first.bias, 0.1)
        self.hidden_layer = nn.Sequential(first, nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(batch, 512)`` features."""
        return self.hidden_layer(torch.flatten(self.avgpool(self.resnet_network(images)), 1))


def make_loaders(params: argparse.Namespace, split: str) -> dict[str, DataLoader[Any]]:
    """Return one loader per domain."""
    train = split == "train"
    lists = params.dataset_path / "data_txt" / params.dataset
    return {
        domain: DataLoader(
            OfficeDataset(params.dataset_path, lists / f"{domain}_{split}.txt"),
            params.bs,
            shuffle=train,
            drop_last=train,
        )
        for domain in DOMAINS[params.dataset]
    }


def main(params: argparse.Namespace) -> None:
    """Train, or test what ``--load_path`` holds."""
    kwargs, optim_param, scheduler_param = prepare_args(params)
    tasks = DOMAINS[params.dataset]
    trainer = Trainer(
        task_dict={
            task: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for task in tasks
        },
        weighting=params.weighting,
        architecture=params.arch,
        encoder_class=lambda: Encoder(params.pretrained),
        decoders=nn.ModuleDict({task: nn.Linear(HIDDEN, CLASSES[params.dataset]) for task in tasks}),
        rep_grad=params.rep_grad,
        multi_input=params.multi_input,
        optim_param=optim_param,
        scheduler_param=scheduler_param,
        save_path=params.save_path,
        load_path=params.load_path,
        **kwargs,
    )
    if params.mode == "train":
        trainer.train(
            make_loaders(params, "train"),
            make_loaders(params, "test"),
            params.epochs,
            val_dataloaders=make_loaders(params, "val"),
        )
    else:
        trainer.test(make_loaders(params, "test"))


if __name__ == "__main__":
    arguments = parse_args(LibMTL_args)
    set_device(arguments.gpu_id)
    set_random_seed(arguments.seed)
    main(arguments)
