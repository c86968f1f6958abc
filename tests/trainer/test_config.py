"""One configuration behind command line and YAML: what it accepts, fills in, refuses and writes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmtl.errors import UsageError
from fastmtl.trainer.run.config import TrainConfig, read_config
from fastmtl.trainer.setup.options import StepOptions


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        # YAML 1.1 reads a number like 1e-4, without a point, as text.
        ("lr", "1e-4", 1e-4),
        ("lr", 1, 1.0),
        ("epochs", "7", 7),
        ("epochs", 7.0, 7),
        ("rep_grad", "yes", True),
        ("compile", True, True),
        ("compile", "on", True),
        ("compile", "OFF", False),
        ("compile", "Auto", "auto"),
        ("optim", "SGD", "sgd"),
        ("scheduler", None, None),
        ("train_size", None, None),
        ("train_size", "100", 100),
    ],
)
def test_values_come_out_in_the_type_of_their_setting(name: str, given: Any, wanted: Any) -> None:
    value = getattr(TrainConfig(**{name: given}), name)
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("epochs", "ten", "epochs must be a whole number, got 'ten'"),
        ("epochs", 2.5, "epochs must be a whole number, got 2.5"),
        ("epochs", True, "epochs must be a whole number, got True"),
        ("train_size", True, "train_size must be a whole number"),
        ("epochs", float("inf"), "epochs must be a whole number"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("lr", 0, "lr must be above 0, got 0.0"),
        ("lr", float("nan"), "lr must be a number, got nan"),
        ("lr", [1], "lr must be a number"),
        ("lr", float("inf"), "lr must be a finite number, got inf"),
        ("gamma", "inf", "gamma must be a finite number, got inf"),
        ("seed", 2**32, "seed must be at most 4294967295, got 4294967296"),
        ("threads", 100_000, "threads must be at most 1024, got 100000"),
        ("rep_grad", "perhaps", "rep_grad must be true or false"),
        ("compile", "sometimes", "compile must be true, false or auto, got 'sometimes'"),
        ("optim", "sdg", "Did you mean 'sgd'?"),
        ("weight_args", "l2", "weight_args must be `key: value` pairs"),
        ("dataset", None, "dataset must be text"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, given: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{name: given})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 2, "gradient_accumulation_steps": 4}, "accumulate is 2, but gradient_accumulation_steps, "),
        ({"accumulate": 1, "gradient_accumulation_steps": 4}, "is 4: give one."),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ],
)
def test_two_names_of_an_option_may_not_differ(options: dict[str, Any], message: str) -> None:
    for owner in (TrainConfig, StepOptions):
        with pytest.raises(UsageError, match=message):
            owner(**options)


def test_an_option_has_either_name(tmp_path: Path) -> None:
    for owner in (TrainConfig, StepOptions):
        assert [owner(**given).accumulate for given in ({}, {"accumulate": 3}, {"gradient_accumulation_steps": 3})] == [
            1,
            3,
            3,
        ]
        assert owner(accumulate=3, gradient_accumulation_steps=3) == owner(accumulate=3)
    path = _file(tmp_path, "accumulate: 3\n")
    assert read_config(path, gradient_accumulation_steps=5).accumulate == 5
    path = _file(tmp_path, "gradient_accumulation_steps: 3\n")
    assert read_config(path).accumulate == 3
    assert read_config(path, accumulate=5).accumulate == 5


def test_resolved_spells_names_and_fills_hyper_parameters() -> None:
    config = TrainConfig(arch="mtan", weighting="mgda").resolved()
    assert (config.arch, config.weighting) == ("MTAN", "MGDA")
    assert config.weight_args == {"mgda_gn": "none"}
    assert TrainConfig(weighting="mgda", weight_args={"MGDA-GN": "l2"}).resolved().weight_args == {"mgda_gn": "l2"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "mtann"}, "Unknown architecture 'mtann'. Did you mean 'MTAN'?"),
        ({"weighting": "mgd"}, "Unknown weighting 'mgd'. Did you mean 'MGDA'?"),
        ({"weighting": "mgda", "weight_args": {"mgda_gm": "l2"}}, "Did you mean 'mgda_gn'?"),
        ({"weighting": "mgda", "weight_args": {"mgda_gn": "l3"}}, "must be one of none, l2, loss, loss+"),
        ({"weighting": "rlw", "weight_args": {"mgda_gn": "l2"}}, "RLW has no hyper-parameters"),
    ],
)
def test_resolved_refuses_unknown_names(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**settings).resolved()
    assert message in str(caught.value)


def test_hyper_parameters_find_their_owner() -> None:
    assert TrainConfig(weighting="mgda").with_hyper({"mgda_gn": "loss"}).weight_args == {"mgda_gn": "loss"}
    with pytest.raises(UsageError, match="mgda_gn is a hyper-parameter of MGDA, but the weighting is EW"):
        TrainConfig().with_hyper({"mgda_gn": "loss"})


def test_yaml_reads_back_to_an_equal_configuration(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "weighting": "mgda",
        "weight_args": {"mgda_gn": "none"},
        "compile": "auto",
        "lr": 3e-5,
        "device": "cpu",
    }
    for config in (TrainConfig(), TrainConfig(**settings).resolved()):
        assert read_config(_file(tmp_path, config.as_yaml())) == config


def test_hyper_parameters_of_an_architecture_are_kept_in_the_file(tmp_path: Path) -> None:
    config = TrainConfig(arch="cgc").with_hyper({"num_experts": "2,1", "img_size": "3 32 32"})
    assert config.arch_args == {"img_size": [3, 32, 32], "num_experts": [2, 1]}
    assert read_config(_file(tmp_path, config.as_yaml())).resolved().arch_args == config.arch_args
    plain = read_config(_file(tmp_path, TrainConfig(arch="cgc").resolved().as_yaml())).resolved()
    assert plain.arch_args == {"img_size": [], "num_experts": [1, 1]}


def test_configuration_file_names_every_setting() -> None:
    assert list(yaml.safe_load(TrainConfig().as_yaml())) == [each.name for each in fields(TrainConfig)]


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "arch: mtan\nepochs: 3\n")
    config = read_config(path, epochs=5)
    assert (config.arch, config.epochs, config.lr) == ("mtan", 5, TrainConfig().lr)


def test_another_weighting_leaves_the_hyper_parameters_of_the_first(tmp_path: Path) -> None:
    path = _file(tmp_path, "weighting: MGDA\nweight_args: {mgda_gn: l2}\n")
    assert read_config(path, weighting="rlw").resolved().weight_args == {}
    assert read_config(path, weighting="mgda").resolved().weight_args == {"mgda_gn": "l2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("archh: mtan\n", "Did you mean 'arch'?"),
        ("- arch\n", "must hold `key: value` lines"),
        ("arch: [mtan\n", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no configuration file"):
        read_config(tmp_path / "no.yaml")
    with pytest.raises(UsageError, match=r"cannot be read: Is a directory\."):
        read_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not text in UTF-8"):
        read_config(tmp_path / "binary.yaml")


def test_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert read_config(_file(tmp_path, "# nothing yet\n")) == TrainConfig()


def test_scheduler_and_optimizer_take_only_what_is_theirs() -> None:
    config = TrainConfig(optim="adam", scheduler="cos", epochs=9)
    assert "momentum" not in config.optim_param
    assert config.scheduler_param == {"scheduler": "cos", "T_max": 9, "eta_min": 0.0}
    assert TrainConfig(optim="sgd").optim_param["momentum"] == TrainConfig().momentum
    assert TrainConfig().scheduler_param is None


@pytest.mark.parametrize("scheduler", ["step", "exp", "cos", "reduce", "onecycle", "poly", "warmup"])
@pytest.mark.parametrize("optim", ["adam", "adamw", "sgd", "adagrad", "rmsprop", "nadam", "radam", "adafactor"])
def test_every_optimizer_and_scheduler_can_be_made(optim: str, scheduler: str) -> None:
    import torch

    from fastmtl.trainer.optim.optimizer import make_optimizer
    from fastmtl.trainer.optim.schedule import Place, make_schedule

    config = TrainConfig(optim=optim, scheduler=scheduler, warmup=3 if scheduler == "warmup" else 0)
    assert config.scheduler_param is not None
    params = dict(torch.nn.Linear(2, 2).named_parameters())
    optimizer = make_optimizer(params, config.optim_param, torch.device("cpu"))
    assert optimizer.param_groups[0]["lr"] == config.lr
    schedule = make_schedule(optimizer, config.scheduler_param)
    schedule.begin(Place(epochs=2, steps=4))
    assert schedule.scheduler is not None


def test_groups_warm_up_and_steps_of_a_file(tmp_path: Path) -> None:
    text = "optim: sgd\ngroup_args: {encoder: {lr: 0.5}}\nscheduler: cos\nwarmup: 2\nschedule_per: Step\n"
    config = read_config(_file(tmp_path, text))
    assert config.optim_param["params"] == {"encoder": {"lr": 0.5}}
    assert config.scheduler_param == {"scheduler": "cos", "eta_min": 0.0, "warmup": 2, "per": "step"}
    assert TrainConfig(scheduler="poly", power=0.9).scheduler_param == {"scheduler": "poly", "power": 0.9}
    assert TrainConfig(warmup=3).scheduler_param == {"scheduler": "warmup", "warmup": 3}
    assert TrainConfig(scheduler="onecycle").scheduler_param == {"scheduler": "onecycle"}
    with pytest.raises(UsageError, match="lbfgs cannot be used: it computes the loss several times in a step"):
        TrainConfig(optim="lbfgs")


def test_settings_of_groups_are_checked_before_data_are_there(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("group_args: {encoder: {lr: 1e-4}}\n")
    assert read_config(path).group_args == {"encoder": {"lr": "1e-4"}}
    for value, message in [
        ("{encoder: {lr: null}}", "lr of the group 'encoder' in params of optim_param must be a number, got None"),
        ("{encoder: {lr: -1e-2}}", "The group 'encoder' in params of optim_param.*Invalid learning rate"),
        ("{encoder: {speed: 1}}", "params of optim_param has 'speed', which Adam does not take"),
        ("{encoder: 1}", "params of optim_param must be {beginning of names: settings}"),
    ]:
        path.write_text(f"group_args: {value}\n")
        with pytest.raises(UsageError, match=message):
            read_config(path)


def test_lists_in_yaml_are_names_with_commas(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("logger: [csv, jsonl]\ninputs: [length, width]\n")
    config = read_config(tmp_path / "c.yaml")
    assert (config.logger, config.inputs) == ("csv,jsonl", "length,width")
