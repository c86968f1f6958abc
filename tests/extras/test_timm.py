"""Networks of timm, made from their configuration, as encoders: plain and of stages, in every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmtl.architecture import find_architecture
from fastmtl.cli import main
from fastmtl.data import find_encoder
from fastmtl.errors import UsageError
from fastmtl.model.heads import PooledHead

TASKS = ["one", "two"]


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "test_efficientnet", "test_resnet"])
def test_stages_give_what_features_only_gives(name: str) -> None:
    import timm

    torch.manual_seed(0)
    mine = find_encoder(f"timm:{name}", stages=True).value.build().eval()
    state = timm.create_model(name, features_only=True)
    images = torch.randn(2, 3, 96, 96)
    # Equal weights in the order of the network, whatever the modules are called.
    theirs: Any = state.eval()
    kept = dict(
        zip([key for key in theirs.state_dict() if "classifier" not in key], mine.state_dict().values(), strict=False)
    )
    theirs.load_state_dict(kept, strict=False)
    with torch.no_grad():
        wanted = theirs(images)[-1]
        got = mine(images)
    wanted = wanted if wanted.shape[1] == got.shape[1] else wanted.permute(0, 3, 1, 2)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_mambaout"])
def test_a_plain_encoder_gives_the_network_s_own_features(name: str) -> None:
    encoder: Any = find_encoder(f"timm:{name}").value.build().eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        maps, own = encoder(images), encoder.model.forward_features(images)
    assert maps.shape == (2, encoder.feature_dim, *maps.shape[-2:])
    flat = own[:, encoder.model.num_prefix_tokens :] if own.dim() == 3 else own.flatten(1, 2)
    flat = flat if own.dim() == 3 or own.shape[-1] == encoder.feature_dim else own.flatten(2).transpose(1, 2)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), flat)


@pytest.mark.parametrize("arch", ["HPS", "MTAN", "Cross_stitch", "PLE", "LTB"])
@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_every_architecture_trains_all_of_it(arch: str, name: str) -> None:
    kind = find_architecture(arch).value
    about = find_encoder(f"timm:{name}", stages=kind.needs_stages).value
    network: Any = kind(
        task_name=TASKS,
        encoder_class=about.build,
        decoders=nn.ModuleDict({task: PooledHead(about.feature_dim, 3) for task in TASKS}),
        rep_grad=False,
        multi_input=False,
        device=torch.device("cpu"),
    )
    if arch == "LTB":
        network.epochs, network.epoch = 1000, 0
    predictions = network(torch.randn(2, 3, 160, 160))
    assert {task: pred.shape for task, pred in predictions.items()} == dict.fromkeys(TASKS, (2, 3))
    sum(pred.square().sum() for pred in predictions.values()).backward()
    unused = [key for key, param in network.named_parameters() if param.grad is None]
    assert not [key for key in unused if "decoders" in key]
    assert len(unused) <= 2, unused


def test_arguments_and_mistakes() -> None:
    build = find_encoder("timm:test_convnext", {"drop_path_rate": 0.5}).value.build
    assert any(getattr(module, "drop_prob", 0) > 0 for module in build().modules())
    for name, args, stages, message in (
        ("timm:test_convnex", {}, False, "Did you mean 'test_convnext'?"),
        ("timm:convnext", {}, False, "Did you mean .*'convnext_pico' or 'convnext_tiny'?"),
        ("timm:test_convnext", {"drop_pat": 1}, False, "unexpected keyword argument 'drop_pat'"),
        ("timm:crossvit_9_240", {}, True, "timm:crossvit_9_240 cannot be cut into stages"),
    ):
        with pytest.raises(UsageError, match=message):
            find_encoder(name, args, stages=stages)


def test_the_command_trains_one(tmp_path: Any) -> None:
    settings = ["--train-size", "32", "--batch-size", "16", "--limit-batches", "1", "--no-plot", "--no-tensorboard"]
    run = str(tmp_path / "run")
    wrong = main(["train", "--encoder", "timm:test_convnext", "--arch", "mtan", *settings, "--run-dir", run])
    assert wrong == 0
    assert main(["eval", run]) == 0


@pytest.mark.parametrize(
    ("name", "unused"),
    [("test_convnext", ["head.norm.weight", "head.norm.bias"]), ("test_vit2", ["fc_norm.weight", "fc_norm.bias"])],
)
def test_what_features_do_not_go_through_is_frozen(name: str, unused: list[str]) -> None:
    encoder: Any = find_encoder(f"timm:{name}").value.build()
    assert encoder.training
    encoder(torch.randn(2, 3, 160, 160)).square().sum().backward()
    frozen = [key for key, param in encoder.model.named_parameters() if not param.requires_grad]
    reached = [key for key, param in encoder.model.named_parameters() if param.grad is not None]
    assert frozen == unused
    assert set(frozen) | set(reached) == {key for key, _ in encoder.model.named_parameters()}
