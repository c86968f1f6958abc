"""Encoders and decoders of dense tasks: dilated ResNets, DeepLab's head, SegNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fastmtl import Trainer, model
from fastmtl.data.dense_sets import dense_task
from fastmtl.data.nyuv2 import NYUv2
from fastmtl.data.rooms import make_rooms
from fastmtl.errors import UsageError
from fastmtl.model import SegNet, SegNet_MTAN_decoder, SegNet_MTAN_encoder
from tests.libmtl import load_file

CHANNELS = (4, 6, 8, 10, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 8), ("ResNet50", 16)])
def test_dilated_resnets_shrink_less_and_keep_their_keys(name: str, scale: int) -> None:
    encoder = model.resnet_dilated(name, pretrained=False, dilate_scale=scale).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 64, 96)).shape == (1, encoder.feature_dim, 64 // scale, 96 // scale)
    assert list(encoder.state_dict()) == list(getattr(model, name.lower())().state_dict())


def test_dilation_is_that_of_torchvision() -> None:
    ours = model.resnet_dilated("resnet50", pretrained=False).eval()
    theirs = model.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_a_dilated_neighbourhood_sees_what_the_strided_one_saw() -> None:
    torch.manual_seed(0)
    plain, dilated = model.resnet18().eval(), model.resnet_dilated("resnet18", pretrained=False).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        coarse, fine = plain(x), dilated(x)[:, :, ::4, ::4]
    # Away from the padding, every fourth position of the dense map is the sparse one.
    torch.testing.assert_close(fine[..., 1, 1], coarse[..., 1, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basenet": "resnet18", "dilate_scale": 4}, "dilate_scale must be 8 or 16, got 4"),
        ({"basenet": "resnet19"}, "Did you mean 'resnet1"),
        ({"basenet": "BasicBlock"}, "Unknown ResNet"),
    ],
)
def test_arguments_of_dilated_resnets_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.resnet_dilated(pretrained=False, **options)


def test_former_names_of_resnets_are_answered() -> None:
    with pytest.raises(UsageError, match="now called resnet18"):
        _ = model.ResNet18


def test_deeplab_head_keeps_the_size() -> None:
    head = model.DeepLabHead(16, 5)
    assert head(torch.zeros(2, 16, 6, 7)).shape == (2, 5, 6, 7)
    assert "0.convs.4.1.weight" in head.state_dict()


@pytest.mark.parametrize("size", [(32, 32), (40, 50)])
def test_segnets_give_maps_of_the_size_of_the_image(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert SegNet(CHANNELS)(x).shape == (2, 4, *size)
    reps = SegNet_MTAN_encoder(2, CHANNELS)(x)
    assert [rep.shape for rep in reps] == [(2, 4, *size)] * 2
    assert not torch.equal(reps[0], reps[1])
    assert SegNet_MTAN_decoder("depth", inputs=4)(reps[0]).shape == (2, 1, *size)
    assert SegNet_MTAN_decoder("edges", outputs=2, inputs=4)(reps[0]).shape == (2, 2, *size)


def test_every_task_of_segnet_attends_with_parameters_of_its_own() -> None:
    encoder = SegNet_MTAN_encoder(2, CHANNELS)
    reps = encoder(torch.randn(2, 3, 32, 32))
    reps[0].sum().backward()
    for masks in (encoder.encoder_att, encoder.decoder_att):
        assert all(param.grad is not None for param in masks[0].parameters())
        assert all(param.grad is None for param in masks[1].parameters())
    assert all(param.grad is not None for name, param in encoder.named_parameters() if "_att." not in name)


@pytest.mark.parametrize("weighting", ["EW", "PCGrad"])
def test_segnet_with_attention_trains(weighting: str, tmp_path: Path) -> None:
    make_rooms(tmp_path, train=4, test=2, size=(32, 40))
    outputs = {"segmentation": 13, "depth": 1, "normal": 3}
    trainer = Trainer(
        {task: dense_task(task) for task in outputs},
        weighting,
        "HPS",
        lambda: SegNet_MTAN_encoder(3, CHANNELS),
        nn.ModuleDict({task: SegNet_MTAN_decoder(task, inputs=CHANNELS[0]) for task in outputs}),
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": "sgd", "lr": 1e-3},
        scheduler_param=None,
        device="cpu",
    )
    # A bias in front of a batch norm has no effect, and no gradient.
    params = [param for param in trainer.model.parameters() if param.dim() > 1]
    before = [param.clone() for param in params]
    loaders = (DataLoader(NYUv2(tmp_path, split), batch_size=2) for split in ("train", "test"))
    trainer.train(*loaders, epochs=1)
    assert not any(torch.equal(old, new) for old, new in zip(before, params, strict=True))


def test_arguments_of_segnet_are_checked() -> None:
    with pytest.raises(UsageError, match="at least two levels"):
        SegNet([4])
    with pytest.raises(UsageError, match="outputs must be given for the task 'edges'"):
        SegNet_MTAN_decoder("edges")


def _agree(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    ours, theirs = ours.double(), theirs.double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for network in (ours, theirs):
        # Dropout would draw in both.
        network.train().apply(lambda module: module.eval() if isinstance(module, nn.Dropout) else module)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for output in (got, want):
        sum(each.square().mean() for each in (output if isinstance(output, list) else [output])).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.libmtl
@pytest.mark.parametrize("part", ["head", "encoder", "decoder"])
def test_networks_are_those_of_libmtl_examples(part: str) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 64, 8, 8, generator=generator, dtype=torch.float64)
    if part == "head":
        _agree(model.DeepLabHead(64, 13), load_file("examples/nyu/aspp.py").DeepLabHead(64, 13), maps)
        return
    segnet = load_file("examples/nyu/segnet_mtan.py")
    if part == "decoder":
        _agree(SegNet_MTAN_decoder("normal"), segnet.SegNet_MTAN_decoder("normal"), maps)
    else:
        _agree(SegNet_MTAN_encoder(), segnet.SegNet_MTAN_encoder(), torch.randn(2, 3, 32, 32, dtype=torch.float64))
