"""Segmentation, depth and surface normals from one network, on NYUv2 or on rendered rooms.

python examples/nyu.py --weighting MGDA --arch MTAN                           # rooms, rendered on first use
python examples/nyu.py --dataset_path PATH/nyuv2 --basenet resnet50 --pretrained --aug --scheduler step --epochs 200
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from fastmtl import Trainer
from fastmtl.config import LibMTL_args, prepare_args
from fastmtl.data.nyuv2 import NYUv2
from fastmtl.data.rooms import default_folder, make_rooms
from fastmtl.loss import DepthLoss, NormalLoss, SegLoss
from fastmtl.metrics import DepthMetric, NormalMetric, SegMetric
from fastmtl.model import DeepLabHead, resnet_dilated
from fastmtl.utils import set_device, set_random_seed

OUTPUTS = {"segmentation": 13, "depth": 1, "normal": 3}


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments: LibMTL's, and those of this example."""
    parser.add_argument("--dataset_path", type=Path, help="folder with train and val; rooms if not given")
    parser.add_argument("--aug", action="store_true", help="scale, cut and mirror the training images at random")
    parser.add_argument("--basenet", default="resnet18", help="ResNet to dilate")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet's weights")
    parser.add_argument("--train_bs", default=8, type=int, help="batch size of training")
    parser.add_argument("--test_bs", default=8, type=int, help="batch size of testing")
    parser.add_argument("--epochs", default=1, type=int, help="passes over the training data")
    return parser.parse_args()


class DenseTrainer(Trainer):
    """Brings predictions to the size of the labels."""

    size: tuple[int, int]

    @override
    def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
        return {
            task: F.interpolate(pred, self.size, mode="bilinear", align_corners=True) for task, pred in preds.items()
        }


def main(params: argparse.Namespace) -> None:
    """Train, or test what ``--load_path`` holds."""
    kwargs, optim_param, scheduler_param = prepare_args(params)
    folder = params.dataset_path
    if folder is None:
        folder = default_folder()
        print(f"Rendering rooms into {folder}, where they are missing")
        make_rooms(folder, train=256, test=64)
    train_set = NYUv2(folder, "train", augmentation=params.aug)
    train_loader = DataLoader(train_set, params.train_bs, shuffle=True, drop_last=True)
    test_loader = DataLoader(NYUv2(folder, "test"), params.test_bs)

    task_dict = {
        "segmentation": {
            "metrics": ["mIoU", "pixAcc"],
            "metrics_fn": SegMetric(OUTPUTS["segmentation"]),
            "loss_fn": SegLoss(),
            "weight": [1, 1],
        },
        "depth": {
            "metrics": ["abs_err", "rel_err"],
            "metrics_fn": DepthMetric(),
            "loss_fn": DepthLoss(),
            "weight": [0, 0],
        },
        "normal": {
            "metrics": ["mean", "median", "<11.25", "<22.5", "<30"],
            "metrics_fn": NormalMetric(),
            "loss_fn": NormalLoss(),
            "weight": [0, 0, 1, 1, 1],
        },
    }

    def encoder_class() -> nn.Module:
        return resnet_dilated(params.basenet, pretrained=params.pretrained)

    features = resnet_dilated(params.basenet, pretrained=False).feature_dim
    trainer = DenseTrainer(
        task_dict=task_dict,
        weighting=params.weighting,
        architecture=params.arch,
        encoder_class=encoder_class,
        decoders=nn.ModuleDict({task: DeepLabHead(features, outputs) for task, outputs in OUTPUTS.items()}),
        rep_grad=params.rep_grad,
        multi_input=params.multi_input,
        optim_param=optim_param,
        scheduler_param=scheduler_param,
        save_path=params.save_path,
        load_path=params.load_path,
        **kwargs,
    )
    height, width = train_set[0][0].shape[-2:]
    trainer.size = (height, width)
    if params.mode == "train":
        trainer.train(train_loader, test_loader, params.epochs)
    else:
        trainer.test(test_loader)


if __name__ == "__main__":
    arguments = parse_args(LibMTL_args)
    set_device(arguments.gpu_id)
    set_random_seed(arguments.seed)
    main(arguments)
