"""Objects by name: of fastmtl, of modules, of files, of entry points; mistakes with the user's file and line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl.architecture import find_architecture
from fastmtl.cli import main
from fastmtl.data import DatasetInfo, find_dataset, find_encoder, load
from fastmtl.errors import UsageError
from fastmtl.support import named
from fastmtl.support.named import whole_spec
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.weighting import MGDA, find_weighting

RULE = '''"""Rules."""

from fastmtl.weighting import AbsWeighting, Hyper, Weights


class Mine(AbsWeighting):
    needs = "losses"
    hyper = {"sharp": Hyper(type=float, default=1.0, help="Sharpness.")}

    def weigh(self, losses, gram, *, sharp=1.0, **hyper):
        return Weights(shared=(sharp * losses).softmax(0))


class Other:
    pass


class Broken(AbsWeighting):
    needs = "losses"

    def weigh(self, losses, gram, **hyper):
        return Weights(shared=losses.nonsense())


value = 3
'''
SMALL = ["--encoder", "conv", "--train-size", "48", "--batch-size", "16", "--limit-batches", "2"]
QUIET = ["--no-plot", "--no-tensorboard", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rules_of_test.py").write_text(RULE)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def test_a_name_is_of_the_package_a_module_or_a_file(folder: Path) -> None:
    assert find_weighting("mgda") == ("MGDA", MGDA)
    module, file = find_weighting("my_rules_of_test:Mine"), find_weighting("./my_rules_of_test.py:Mine")
    assert module.name == "my_rules_of_test:Mine"
    assert file.name == f"{folder / 'my_rules_of_test.py'}:Mine"
    assert module.value is file.value


def test_a_file_called_like_another_module_is_not_that_module(folder: Path) -> None:
    (folder / "json.py").write_text(RULE)
    assert find_weighting("./json.py:Mine").value.__name__ == "Mine"
    import json

    assert json.loads("1") == 1


def test_an_entry_point_is_loaded_when_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "my_rules_of_test:Mine", "fastmtl.weightings")
    sys.path.append(str(folder))
    monkeypatch.setattr(named, "_entry_points", lambda group: {"theirs": point} if group == point.group else {})
    assert find_weighting("Theirs").name == "theirs"
    with pytest.raises(UsageError, match="Did you mean 'theirs'"):
        find_weighting("their")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "./my_rules_of_test.py:Mien",
            "my_rules_of_test.py has no 'Mien' for weighting. Did you mean 'Mine' of line 6?",
        ),
        (
            "./my_rules_of_test.py:Other",
            "my_rules_of_test.py:14: the weighting Other must be a class derived from AbsWeighting",
        ),
        ("./my_rules_of_test.py:value", "my_rules_of_test.py:25: the weighting value must be a class"),
        ("./my_rules_of_test.py", "which object of it? Write ./my_rules_of_test.py:NAME"),
        ("./missing.py:New", "there is no file ./missing.py"),
        ("missing_of_test.rules:New", "there is no module missing_of_test in"),
        ("my_rules_of_test:", "must be MODULE:NAME or FILE.py:NAME"),
        ("./wrong_syntax.py:New", "wrong_syntax.py:2: SyntaxError"),
        ("./wrong_name.py:New", "wrong_name.py:3: NameError: name 'undefined' is not defined"),
        ("./wrong_import.py:New", "wrong_import.py:1: ModuleNotFoundError: No module named 'missing_of_test'"),
        ("mgdaa", "Did you mean 'MGDA'?"),
    ],
)
def test_mistakes_name_file_and_line(folder: Path, name: str, message: str) -> None:
    (folder / "wrong_syntax.py").write_text("x = 1\ndef New(:\n")
    (folder / "wrong_name.py").write_text("x = 1\n\ny = undefined\n")
    (folder / "wrong_import.py").write_text("import missing_of_test\n")
    with pytest.raises(UsageError) as caught:
        find_weighting(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_command_trains_with_a_rule_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "./my_rules_of_test.py:Mine"
    run = ["train", *SMALL, *QUIET]
    assert main([*run, "--weighting", rule, "--sharp", "2", "--run-dir", "run", "--logger", "csv"]) == 0
    assert "Mine Configuration:\n\tsharp: 2.0" in capsys.readouterr().out
    rows = (folder / "run" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,step,tag,value"
    assert any(row.startswith("0,2,step_weight/left,") for row in rows)
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    resumed = (folder / "run" / "metrics.csv").read_text().splitlines()
    assert resumed[: len(rows)] == rows
    assert any(row.startswith("1,4,test_Acc/right,") for row in resumed)
    assert main(["eval", "run"]) == 0
    capsys.readouterr()
    assert main([*run, "--weighting", "./my_rules_of_test.py:Broken", "--run-dir", "broken"]) == 1
    assert (
        "error: my_rules_of_test.py:22: AttributeError: 'Tensor' object has no attribute 'nonsense'"
        in capsys.readouterr().err
    )
    assert main([*run, "--weighting", "./my_rules_of_test.py:Mine", "--arch", "./my_rules_of_test.py:Mine"]) == 2
    assert "the architecture Mine must be a class derived from AbsArchitecture" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lr", "epochs", "run_dir"])
def test_a_hyper_parameter_with_the_name_of_an_option(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (folder / "my_lr.py").write_text(RULE.replace("sharp", name))
    assert main(["train", *SMALL, *QUIET, "--weighting", "./my_lr.py:Mine"]) == 2
    assert capsys.readouterr().err == (
        f"error: my_lr.py:6: The hyper-parameter {name} of Mine has the name of the option --{name.replace('_', '-')} "
        f"of `fastmtl train`: give it another, such as mine_{name}.\n"
    )


OWN = """
import torch
from torch import nn
from fastmtl.data import DatasetInfo, classes, regression
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric

ROWS = [(torch.randn(6), {"kind": torch.tensor(i % 3), "size": torch.tensor([float(i)])}) for i in range(32)]

def make():
    return DatasetInfo(
        tasks={"kind": classes(3), "size": regression()},
        load_splits=lambda options: options.splits(train=ROWS, test=ROWS[:8], width=6),
    )

class Encoder(nn.Module):
    feature_dim = 5
    def __init__(self, hidden=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 5))
    def forward(self, x):
        return self.layers(x)

class NoWidth(nn.Linear):
    def __init__(self):
        super().__init__(6, 5)

def number():
    return 3

def square(pred, gt):
    return (pred - gt).square().mean()

class Worst(AbsMetric):
    weight = [0]
    def update_fun(self, pred, gt):
        self.record.append((pred - gt).abs().max())
    def score_fun(self):
        return [max(self.record).item()]

class NoDirection(Worst):
    weight = None
"""


def test_data_encoder_loss_and_metric_of_a_file(folder: Path) -> None:
    (folder / "own_of_test.py").write_text(OWN)
    bundle = load(
        "own_of_test:make",
        batch_size=8,
        encoder="./own_of_test.py:Encoder",
        encoder_args={"hidden": 7},
        loss={"size": "./own_of_test.py:square", "kind": {"name": "focal", "gamma": 1.5}},
        metric={"size": "own_of_test:Worst", "kind": {"name": "F1", "num_classes": 3}},
    )
    assert bundle.name == "own_of_test"
    assert bundle.encoder_class().layers[0].out_features == 7
    assert bundle.decoders()["size"](torch.randn(2, 5)).shape == (2, 1)
    assert bundle.task_dict["size"]["metrics"] == ["Worst"]
    assert bundle.task_dict["size"]["weight"] == [0]
    assert bundle.task_dict["size"]["loss_fn"](torch.zeros(2), torch.ones(2)) == 1
    assert bundle.task_dict["kind"]["loss_fn"].gamma == 1.5
    assert bundle.task_dict["kind"]["metrics"] == ["F1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "./own_of_test.py:number"}, "own_of_test.py:28: the data set number must be a DatasetInfo"),
        ({"name": "./own_of_test.py:Worst"}, "the data set Worst must be a DatasetInfo"),
        ({"encoder": "own_of_test:number"}, "the encoder number must make an nn.Module, it makes a int"),
        ({"encoder": "own_of_test:NoWidth"}, "the encoder NoWidth needs an attribute feature_dim"),
        ({"encoder": "own_of_test:Encoder", "encoder_args": {"hiden": 3}}, "cannot be made with {'hiden': 3}"),
        ({"encoder": "own_of_test:Encoder", "pretrained": True}, "it has no pretrained weights"),
        ({"loss": {"sise": "mse"}}, "loss names a task 'sise', but the tasks are kind, size"),
        ({"loss": {"size": "mze"}}, "Unknown loss 'mze'"),
        ({"loss": {"size": "own_of_test:number"}}, "the loss number must be an AbsLoss"),
        ({"metric": {"size": "own_of_test:number"}}, "the metric number must be an AbsMetric"),
        ({"metric": {"size": "own_of_test:NoDirection"}}, "say whether more is better"),
        ({"loss": {"size": 3}}, "loss of size must be a name, or a mapping with a name"),
        ({"path": "nowhere"}, "does not exist"),
    ],
)
def test_mistakes_in_data_encoder_loss_and_metric(folder: Path, given: dict[str, Any], message: str) -> None:
    (folder / "own_of_test.py").write_text(OWN)
    whole = {"name": "./own_of_test.py:make", "encoder": "./own_of_test.py:Encoder", "batch_size": 4} | given
    with pytest.raises(UsageError) as caught:
        load(whole.pop("name"), **whole)
    assert message in str(caught.value)


def test_what_a_file_makes_is_described(folder: Path) -> None:
    (folder / "own_of_test.py").write_text(OWN)
    found = find_dataset("./own_of_test.py:make")
    assert isinstance(found.value, DatasetInfo)
    assert find_encoder("own_of_test:Encoder").value.feature_dim == 5
    with pytest.raises(UsageError, match=r"^own_of_test.py:16: MTAN needs an encoder made of stages"):
        find_architecture("mtan").value(
            task_name=["a"],
            encoder_class=find_encoder("own_of_test:Encoder").value.build,
            decoders=torch.nn.ModuleDict({"a": torch.nn.Linear(5, 1)}),
            rep_grad=False,
            multi_input=False,
            device=torch.device("cpu"),
        )


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("timm:resnet18", "timm"), ("torch_geometric:GCN", "torch_geometric")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.nn.models", None)
        with pytest.raises(UsageError, match=f"needs the package {package}: pip install 'fastmtl-torch"):
            find_encoder(name)


@pytest.mark.parametrize("kind", ["dataset", "strategy", "architecture"])
def test_new_files_pass_their_tests(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", kind, "MyOwnThing"]) == 0
    assert "fastmtl train" in capsys.readouterr().out
    file = folder / "test_my_own_thing.py"
    names: dict[str, Any] = {"__name__": "made", "__file__": str(file)}
    exec(compile(file.read_text(), str(file), "exec"), names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
    assert main(["new", kind, "MyOwnThing"]) == 2
    assert "my_own_thing.py exists" in capsys.readouterr().err


OF_TASKS = """
import torch
from fastmtl.metrics import AccMetric
from fastmtl.trainer.log.logger import Logger

def loss(pred, gt):
    return torch.nn.functional.cross_entropy(pred, gt)

class Metric(AccMetric):
    weight = [1]
    metrics_names = ["mine"]

class Log(Logger):
    def __init__(self, folder):
        pass
"""


def test_a_run_with_code_of_files_is_evaluated_from_any_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "of_tasks_of_test.py").write_text(OF_TASKS)
    words = ["--loss", "left=./of_tasks_of_test.py:loss", "--metric", "left=./of_tasks_of_test.py:Metric"]
    words += ["--logger", "csv,./of_tasks_of_test.py:Log"]
    assert main(["train", *words, *SMALL, *QUIET, "--run-dir", "run"]) == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    capsys.readouterr()
    assert main(["eval", str(folder / "run"), "--json"]) == 0
    assert "mine" in capsys.readouterr().out
    resumed = ["train", "--resume", str(folder / "run"), "--epochs", "2"]
    assert main(resumed) == 0


def test_paths_of_a_configuration_become_absolute(folder: Path) -> None:
    (folder / "bert").mkdir()
    config = TrainConfig(
        dataset="./data.py:make",
        encoder="hf:bert",
        loss={"a": {"name": "./my.py:Loss", "delta": 2}, "b": "huber"},
        logger="csv, ./my.py:Log",
    ).resolved()
    assert config.dataset == f"{folder}/data.py:make"
    assert config.encoder == f"hf:{folder}/bert"
    assert config.loss == {"a": {"name": f"{folder}/my.py:Loss", "delta": 2}, "b": "huber"}
    assert config.logger == f"csv,{folder}/my.py:Log"
    names = ("timm:convnext_tiny", "hf:distilbert-base-uncased", "mypkg.rules:New", "resnet18")
    assert [whole_spec(name) for name in names] == list(names)
