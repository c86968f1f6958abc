"""The ResNets: LibMTL's keys, LibMTL's initial weights, and what happens without a network."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch

from fastmtl import model
from fastmtl.errors import FastmtlError
from fastmtl.model._torchvision import import_torchvision

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

# Read off LibMTL's networks under torch.manual_seed(3): number of state_dict entries, their sum in float64, the
# absolute sum of the last layer's conv2, and the number of parameters.
LIBMTL = {
    "resnet18": (120, 9624.911534691902, "layer4.1.conv2.weight", 39192.52812007439, 11_176_512),
    "resnet50": (318, 53095.22332162725, "layer4.1.conv2.weight", 39248.4839215563, 23_508_032),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_those_of_torchvision_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        ours = getattr(model, name)()
        reference = getattr(import_torchvision().models, name)()
    expected = {key: value.shape for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert list(ours.state_dict()) == list(expected)
    assert ours.feature_dim == reference.fc.in_features


@pytest.mark.parametrize("name", list(LIBMTL))
def test_a_seed_gives_libmtl_initial_weights(name: str) -> None:
    torch.manual_seed(3)
    state = getattr(model, name)().state_dict()
    entries, total, key, size, params = LIBMTL[name]
    assert len(state) == entries
    assert sum(float(value.double().sum()) for value in state.values()) == pytest.approx(total, rel=1e-9)
    assert state[key].double().abs().sum().item() == pytest.approx(size, rel=1e-9)
    assert sum(value.numel() for value in getattr(model, name)().parameters()) == params


def test_forward_is_torchvision_up_to_the_pooling() -> None:
    ours = model.resnet18().eval()
    reference = import_torchvision().models.resnet18().eval()
    reference.load_state_dict(ours.state_dict(), strict=False)
    seen: dict[str, torch.Tensor] = {}
    reference.avgpool.register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0]))
    x = torch.randn(2, 3, 70, 65)
    with torch.no_grad():
        reference(x)
        assert torch.equal(ours(x), seen["features"])
    assert seen["features"].shape == (2, ours.feature_dim, 3, 3)


def test_libmtl_keywords_are_accepted() -> None:
    encoder = model.resnet50(False, True, num_classes=7, zero_init_residual=True, width_per_group=8)
    assert encoder.layer1[0].bn3.weight.abs().sum() == 0
    assert encoder.layer1[0].conv2.weight.shape[0] == 8


def test_pretrained_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    enum = import_torchvision().models.get_model_weights("resnet18")
    saved = import_torchvision().models.resnet18().state_dict()
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **kwargs: saved)
    state = model.resnet18(pretrained=True).state_dict()
    assert all(torch.equal(state[key], saved[key]) for key in state)


def test_pretrained_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(import_torchvision().models.get_model_weights("resnet18"), "get_state_dict", offline)
    with pytest.raises(FastmtlError, match=r"pretrained weights of resnet18.*no route to host.*pretrained=False"):
        model.resnet18(pretrained=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="resnet19"):
        _ = model.resnet19
