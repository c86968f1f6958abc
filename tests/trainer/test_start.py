"""Starting from weights of other runs: what is taken, what is not, and what is told of it."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.architecture import HPS
from fastmtl.errors import CheckpointError
from fastmtl.model import resnet18
from fastmtl.model._torchvision import import_torchvision
from fastmtl.trainer.checkpoint.start import described
from fastmtl.weighting import UW
from tests.trainer.toy import flat, loaders, make_trainer, task_dict


def _run(folder: Path, weighting: Any = "EW", count: int = 2, **options: Any) -> Any:
    """A trained trainer, its best.pt in a folder."""
    trainer = make_trainer(weighting, count=count, save_path=str(folder), **options)
    trainer.train(loaders(count), loaders(count), 1)
    return trainer


def _of_tasks(tasks: str, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    kinds = task_dict()
    return {
        "task_dict": dict.fromkeys(tasks, kinds["task0"]),
        "decoders": {task: nn.Linear(8, (sizes or {}).get(task, 3)) for task in tasks},
    }


def _save(tasks: str, path: Path, weighting: str = "EW") -> dict[str, Tensor]:
    """Save the parameters of a new trainer, all of them raised by 1, as its best.pt has them."""
    trainer = make_trainer(weighting, **_of_tasks(tasks))
    state = {name: value + 1 for name, value in trainer.model.state_dict().items()}
    torch.save(described(trainer.model, state), path)
    return state


def test_a_checkpoint_says_of_what_it_is_and_is_a_plain_state_dict(tmp_path: Path) -> None:
    trainer = _run(tmp_path, "UW")
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert isinstance(state, OrderedDict)
    about = state._metadata[""]
    assert (about["strategy"], about["tasks"]) == ("UW", ["task0", "task1"])
    trainer.model.load_state_dict(state)


def test_another_set_of_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ab.pt"
    state = _save("ab", path)
    fresh = make_trainer("EW", **_of_tasks("bc"))
    capsys.readouterr()
    trainer = make_trainer("EW", load_path=str(path), load_strict=False, **_of_tasks("bc"))
    shown = capsys.readouterr().out
    assert "Tensors taken: decoders.b 2, encoder 4; new: decoders.c 2; left: decoders.a 2\n" in shown
    found = trainer.model.state_dict()
    for name, value in found.items():
        expected = fresh.model.state_dict()[name] if name.startswith("decoders.c") else state[name]
        assert torch.equal(value, expected), name
    with pytest.raises(
        CheckpointError,
        match=r"of another model: decoders\.c is missing; decoders\.a is not in the model\. With load_strict=False",
    ):
        make_trainer("EW", load_path=str(path), **_of_tasks("bc"))


def test_another_size_of_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ab.pt"
    state = _save("ab", path)
    options = _of_tasks("ab", {"b": 5})
    trainer = make_trainer("EW", load_path=str(path), load_strict=False, **options)
    assert "of another shape: decoders.b.weight (3, 8) for (5, 8); decoders.b.bias (3,) for (5,)" in (
        capsys.readouterr().out
    )
    assert torch.equal(trainer.model.decoders["a"].weight, state["decoders.a.weight"])
    assert trainer.model.decoders["b"].weight.shape == (5, 8)
    with pytest.raises(CheckpointError, match=r"decoders\.b\.weight has shape \(3, 8\) in place of \(5, 8\)"):
        make_trainer("EW", load_path=str(path), **options)


@pytest.mark.parametrize("strict", [True, False])
def test_what_a_strategy_learned_is_that_strategys(
    strict: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """UW, IMTL and GradNorm each have a parameter of one shape, by the name of loss_scale."""
    uw = _run(tmp_path, "UW")
    again = make_trainer("UW", load_path=str(tmp_path), load_strict=strict)
    assert torch.equal(flat(again.model.parameters()), flat(uw.model.parameters()))
    for other, start in (("IMTL", 0.0), ("GradNorm", 1.0)):
        if strict:
            with pytest.raises(CheckpointError, match=f"loss_scale is of UW, not of {other}"):
                make_trainer(other, load_path=str(tmp_path))
            continue
        trainer = make_trainer(other, load_path=str(tmp_path), load_strict=False)
        assert trainer.model.loss_scale.tolist() == [start] * 2
        assert torch.equal(flat(trainer.model.encoder.parameters()), flat(uw.model.encoder.parameters()))
        assert f"loss_scale not taken: the file is of UW, the model of {other}" in capsys.readouterr().out


def test_a_strategys_parameters_of_other_tasks_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ab.pt"
    _save("ab", path, "UW")
    trainer = make_trainer("UW", load_path=str(path), load_strict=False, **_of_tasks("bc"))
    assert trainer.model.loss_scale.tolist() == [-0.5, -0.5]
    assert "loss_scale not taken: the file is of the tasks a, b, the model of b, c" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="its tasks are in the order a, b, the model's in b, a"):
        make_trainer("UW", load_path=str(path), **_of_tasks("ba"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_that_does_not_tell_its_strategy(
    strict: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As LibMTL writes them, and fastmtl did."""
    uw = _run(tmp_path, "UW")
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.save(dict(state), tmp_path / "plain.pt")
    trainer = make_trainer("UW", load_path=str(tmp_path / "plain.pt"), load_strict=strict)
    assert trainer.model.loss_scale.tolist() == [-0.5, -0.5]
    assert torch.equal(flat(trainer.model.decoders.parameters()), flat(uw.model.decoders.parameters()))
    assert "loss_scale not taken: the file does not tell of which strategy it is" in capsys.readouterr().out


def test_a_strategy_is_known_by_what_it_remembers(tmp_path: Path) -> None:
    trainer = _run(tmp_path, "GradNorm")
    with torch.no_grad():
        trainer.model.first_losses.fill_(7.0)
        trainer.model.loss_scale.fill_(3.0)
    torch.save(dict(trainer.model.state_dict()), tmp_path / "whole.pt")
    again = make_trainer("GradNorm", load_path=str(tmp_path / "whole.pt"))
    assert again.model.first_losses.tolist() == [7.0, 7.0]
    assert again.model.loss_scale.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {name.replace("encoder.", "encoder._orig_mod."): value for name, value in state.items()},
        lambda state: {"state_dict": dict(state), "epoch": 3},
        lambda state: {"model": dict(state)},
    ],
    ids=["DistributedDataParallel", "compiled", "state_dict", "model"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_wrapped_states(wrapped: Any, strict: bool, tmp_path: Path) -> None:
    trainer = _run(tmp_path)
    torch.save(wrapped(torch.load(tmp_path / "best.pt", weights_only=True)), tmp_path / "wrapped.pt")
    again = make_trainer("EW", load_path=str(tmp_path / "wrapped.pt"), load_strict=strict)
    assert torch.equal(flat(again.model.parameters()), flat(trainer.model.parameters()))


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "encoder.",
        "module.encoder.",
        "backbone.",
        "model.encoder.",
        "model.backbone.",
        "a.b.backbone.",
        "a.b.encoder.",
    ],
)
@pytest.mark.parametrize("architecture", ["HPS", "STL"])
def test_a_backbone_finds_its_place(architecture: str, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    backbone = make_trainer("EW").model.encoder
    state = {name: torch.randn_like(value) for name, value in backbone.state_dict().items()}
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "backbone.pt")
    trainer = make_trainer("EW", architecture, load_path=str(tmp_path / "backbone.pt"), load_strict=False)
    encoders = [trainer.model.encoder] if architecture == "HPS" else trainer.model.encoder.values()
    for encoder in encoders:
        assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_a_classifier_of_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = import_torchvision().models.resnet18(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "resnet18.pt")
    options: dict[str, Any] = {"encoder_class": resnet18, "load_strict": False}
    options["load_path"] = str(tmp_path / "resnet18.pt")
    options["decoders"] = {f"task{t}": nn.Linear(512, 3) for t in range(2)}
    trainer = make_trainer("EW", **options)
    assert (
        "Tensors taken: encoder 120; new: decoders.task0 2, decoders.task1 2; left: fc 2\n" in capsys.readouterr().out
    )
    assert torch.equal(trainer.model.encoder.layer4[1].bn2.weight, network.layer4[1].bn2.weight)
    # Tensors of the same names in other places of another network are not what is looked for.
    with pytest.raises(CheckpointError, match=r"Nothing in the checkpoint .* has the name and shape"):
        make_trainer("EW", "MTAN", **options)


def test_nothing_that_fits(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="Nothing in the checkpoint"):
        make_trainer("EW", load_path=str(tmp_path / "a.pt"), load_strict=False)


def test_an_architecture_in_place_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _run(tmp_path)
    other = make_trainer("EW", "MTAN", load_path=str(tmp_path), load_strict=False)
    assert torch.equal(flat(other.model.decoders.parameters()), flat(trainer.model.decoders.parameters()))
    assert re.search(
        r"taken: decoders.task0 2, decoders.task1 2; new: encoder \d+; left: encoder 4", capsys.readouterr().out
    )


def test_users_strategies_go_by_the_name_of_their_class(tmp_path: Path) -> None:
    class Mine(UW):
        pass

    mine = _run(tmp_path, Mine)
    again = make_trainer(Mine, load_path=str(tmp_path))
    assert torch.equal(again.model.loss_scale, mine.model.loss_scale)
    with pytest.raises(CheckpointError, match="loss_scale is of Mine, not of UW"):
        make_trainer("UW", load_path=str(tmp_path))


@pytest.mark.parametrize("architecture", ["MTAN", "Cross_stitch", "LTB"])
def test_what_goes_by_the_places_of_tasks_is_taken_by_their_names(architecture: str, tmp_path: Path) -> None:
    before = make_trainer("EW", architecture, **_of_tasks("abc")).model
    state = {name: torch.randn_like(value.float()).to(value) for name, value in before.state_dict().items()}
    torch.save(described(before, state), tmp_path / "abc.pt")
    options: dict[str, Any] = {"load_path": str(tmp_path / "abc.pt"), "load_strict": False}
    after = make_trainer("EW", architecture, **_of_tasks("cda"), **options).model
    before.load_state_dict(state)
    pairs = (("c", 2, 0), ("a", 0, 2))
    for task, old, new in pairs:
        lists: Any = [
            (module, after.get_submodule(name))
            for name, module in before.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == 3 and "shared_layer" not in name
        ]
        assert lists
        for theirs, ours in lists:
            for one, other in zip(theirs[old].state_dict().values(), ours[new].state_dict().values(), strict=True):
                assert torch.equal(one, other)
        assert torch.equal(before.decoders[task].weight, after.decoders[task].weight)
    fresh = make_trainer("EW", architecture, **_of_tasks("cda")).model
    for name, value in after.state_dict().items():
        if name.endswith(("cross_unit", "alpha")) or re.search(r"encoder_att\.\d+\.1\.|resnet_layer\.\d+\.1\.", name):
            assert torch.equal(value, fresh.state_dict()[name]), name


class ByPlace(HPS):
    """An architecture that says nothing of what goes by the places of tasks."""


@pytest.mark.parametrize("architecture", ["HPS", "MTAN", "Cross_stitch", ByPlace])
def test_tasks_in_another_order(architecture: Any, tmp_path: Path) -> None:
    before = make_trainer("EW", architecture, **_of_tasks("ab")).model
    state = {name: torch.rand_like(value.float()).to(value) for name, value in before.state_dict().items()}
    torch.save(described(before, state), tmp_path / "ab.pt")
    before.load_state_dict(state)
    options = {"load_path": str(tmp_path / "ab.pt")} | _of_tasks("ba")
    if architecture in ("Cross_stitch", ByPlace):
        with pytest.raises(CheckpointError, match=r"cross_unit is missing|its tasks are in the order a, b"):
            make_trainer("EW", architecture, **options)
        return
    after = make_trainer("EW", architecture, **options).model
    x = torch.randn(4, 6)
    for task, pred in before.eval()(x).items():
        torch.testing.assert_close(after.eval()(x)[task], pred)


@pytest.mark.parametrize("prefix", ["model.", "net.", "wrapper.model.", "a.b.c.", "model.module."])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_whole_model_behind_other_modules(
    prefix: str, is_nested: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = _run(tmp_path)
    state: dict[str, Any] = {prefix + name: value + 1 for name, value in trainer.model.state_dict().items()}
    state["criterion.weight"] = torch.zeros(3)
    torch.save({"state_dict": state} if is_nested else state, tmp_path / "wrapped.pt")
    again = make_trainer("EW", load_path=str(tmp_path / "wrapped.pt"), load_strict=False)
    torch.testing.assert_close(flat(again.model.parameters()), flat(trainer.model.parameters()) + 1)
    assert "taken: decoders.task0 2, decoders.task1 2, encoder 4; left: criterion 1\n" in capsys.readouterr().out


def test_modules_in_front_do_not_hide_whose_a_strategys_parameters_are(tmp_path: Path) -> None:
    _run(tmp_path, "UW")
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.save({f"model.{name}": value + 1 for name, value in state.items()}, tmp_path / "wrapped.pt")
    trainer = make_trainer("IMTL", load_path=str(tmp_path / "wrapped.pt"), load_strict=False)
    assert trainer.model.loss_scale.tolist() == [0.0, 0.0]
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], value + 1) for name, value in state.items() if name != "loss_scale")


@pytest.mark.parametrize("what", ["shape", "missing"])
def test_what_a_strategy_learned_is_taken_whole_or_not(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = _run(tmp_path, "MoCo")
    state = {name: value + 1 for name, value in trainer.model.state_dict().items()}
    if what == "shape":
        state["y"] = torch.zeros(2, 5)
    else:
        del state["y"]
    torch.save(described(trainer.model, state), tmp_path / "moco.pt")
    again = make_trainer("MoCo", load_path=str(tmp_path / "moco.pt"), load_strict=False)
    assert again.model.steps == 0
    assert again.model.lambd.tolist() == [0.5, 0.5]
    assert not again.model.y.any()
    assert torch.equal(again.model.decoders["task0"].weight, state["decoders.task0.weight"])
    shown = capsys.readouterr().out
    names = "lambd, steps, y" if what == "shape" else "lambd, steps"
    why = r"y has the shape \(2, 5\) there" if what == "shape" else "the file lacks y"
    assert re.search(f"^{names} not taken: {why}", shown, re.MULTILINE)
    assert re.search(r"new: .*lambd 1, steps 1", shown)
