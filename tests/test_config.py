"""LibMTL's argument parser: every optimizer and scheduler works, names are forgiving, the banner is LibMTL's."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fastmtl import config
from fastmtl.architecture import ARCHITECTURES
from fastmtl.config import LibMTL_args, prepare_args
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper
from fastmtl.trainer.optim.optimizer import OPTIMIZERS, make_optimizer
from fastmtl.trainer.optim.recipe import SCHEDULERS
from fastmtl.trainer.optim.schedule import Place, make_schedule


def _parse(line: str) -> argparse.Namespace:
    return LibMTL_args.parse_args(line.split())


def test_defaults_are_libmtl_s() -> None:
    params = _parse("")
    assert (params.mode, params.seed, params.gpu_id, params.weighting, params.arch) == ("train", 0, "0", "EW", "HPS")
    assert (params.rep_grad, params.multi_input, params.save_path, params.load_path) == (False, False, None, None)
    kwargs, optim_param, scheduler_param = prepare_args(params)
    assert kwargs == {"weight_args": {"loss_weights": ()}, "arch_args": {}}
    assert optim_param == {"optim": "adam", "lr": 1e-4, "weight_decay": 1e-5}
    assert scheduler_param is None


def test_hyper_parameters_of_architectures_are_spelled_as_in_libmtl() -> None:
    line = "--arch DSelect_k --img_size 3 32 32 --num_experts 4 --num_nonzeros 3 --kgamma 0.5"
    kwargs, _, _ = prepare_args(_parse(line))
    assert kwargs["arch_args"] == {"img_size": [3, 32, 32], "num_experts": [4], "num_nonzeros": 3, "kgamma": 0.5}
    kwargs, _, _ = prepare_args(_parse("--arch PLE --num_experts 2 1 1 --shared_gate"))
    assert kwargs["arch_args"] == {"img_size": (), "num_experts": [2, 1, 1], "shared_gate": True}


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_optimizer_and_scheduler_can_be_built(optim: str, scheduler: str) -> None:
    line = (
        f"--optim {optim.upper()} --scheduler {scheduler} --lr 0.3 --weight_decay 0.1 --gamma 0.25 --T_max 7 --power 2"
    )
    line += " --warmup 4" if scheduler == "warmup" else ""
    _, optim_param, scheduler_param = prepare_args(_parse(line))
    params = dict(nn.Linear(2, 2, bias=False).named_parameters())
    optimizer = make_optimizer(params, optim_param, torch.device("cpu"))
    assert type(optimizer) is OPTIMIZERS[optim]
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0].get("weight_decay", 0.1) == 0.1
    schedule = make_schedule(optimizer, scheduler_param)
    schedule.begin(Place(epochs=3, steps=5))
    assert type(schedule.scheduler) is SCHEDULERS[scheduler]
    expected = {
        "step": ("gamma", 0.25), "exp": ("gamma", 0.25), "cos": ("T_max", 7), "reduce": ("factor", 0.25),
        "onecycle": ("total_steps", 15), "poly": ("power", 2), "warmup": ("start_factor", 0.2),
    }  # fmt: skip
    name, value = expected[scheduler]
    assert getattr(schedule.scheduler, name) == value


def test_warm_up_and_steps_leave_the_length_to_the_trainer() -> None:
    params = _parse("--scheduler cos --warmup 2 --eta_min 0.1")
    params.epochs = 12
    assert prepare_args(params)[2] == {"scheduler": "cos", "eta_min": 0.1, "warmup": 2}
    assert prepare_args(_parse("--warmup 3"))[2] == {"scheduler": "warmup", "warmup": 3}
    params = _parse("--scheduler exp")
    for name in ("warmup", "schedule_per", "power"):
        delattr(params, name)
    assert prepare_args(params)[2] == {"scheduler": "exp", "gamma": 0.5}
    params = _parse("--scheduler cos --schedule_per step --T_max 40")
    assert prepare_args(params)[2] == {"scheduler": "cos", "T_max": 40, "eta_min": 0.0, "per": "step"}


def test_momentum_is_for_sgd() -> None:
    assert prepare_args(_parse("--optim sgd --momentum 0.7"))[1]["momentum"] == 0.7


def test_reduce_takes_larger_improvements_as_better() -> None:
    scheduler_param = prepare_args(_parse("--scheduler reduce"))[2]
    assert scheduler_param is not None
    assert scheduler_param["mode"] == "max"


def test_cos_takes_its_length_from_a_script_s_epochs() -> None:
    params = _parse("--scheduler cos --eta_min 0.01")
    with pytest.raises(UsageError, match="T_max"):
        prepare_args(params)
    params.epochs = 12
    assert prepare_args(params)[2] == {"scheduler": "cos", "T_max": 12, "eta_min": 0.01}


def test_hyper_parameters_come_from_the_class() -> None:
    assert prepare_args(_parse("--weighting mgda"))[0]["weight_args"] == {"mgda_gn": "none"}
    assert prepare_args(_parse("--weighting MGDA --mgda_gn loss+"))[0]["weight_args"] == {"mgda_gn": "loss+"}
    assert prepare_args(_parse("--weighting EW --mgda_gn loss+"))[0]["weight_args"] == {"loss_weights": ()}


def test_lists_flags_and_shared_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated:
        hyper: ClassVar[dict[str, Hyper]] = {
            "sizes": Hyper(type=int, default=None, help="sizes in %", many=True),
            "gate": Hyper(type=bool, default=True, help="use a gate"),
        }

    class Other:
        hyper: ClassVar[dict[str, Hyper]] = {"sizes": Hyper(type=int, default=[1], help="sizes", many=True)}

    monkeypatch.setitem(ARCHITECTURES, "Gated", Gated)
    monkeypatch.setitem(ARCHITECTURES, "Other", Other)
    parser = config._make_parser()
    assert "Gated, Other: sizes in %" in parser.format_help()
    params = parser.parse_args(["--arch", "gated", "--sizes", "3", "4", "--no-gate"])
    assert prepare_args(params)[0]["arch_args"] == {"sizes": [3, 4], "gate": False}
    params = parser.parse_args(["--arch", "other"])
    assert prepare_args(params)[0]["arch_args"] == {"sizes": [1]}


def test_no_hyper_parameter_takes_the_name_of_another_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = config.hyper_options().keys()
    monkeypatch.setattr(config, "hyper_options", dict)
    general = vars(config._make_parser().parse_args([])).keys()
    assert {"lr", "gamma", "step_size"} <= general
    assert not general & declared


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--weighting mgd", "Unknown weighting 'mgd'. Did you mean 'MGDA'"),
        ("--arch mtann", "Unknown architecture 'mtann'. Did you mean 'MTAN'"),
        ("--optim adm", "Unknown optimizer 'adm'. Did you mean 'adam'"),
        ("--scheduler stp", "Unknown scheduler 'stp'. Did you mean 'step'"),
        ("--weighting MGDA --mgda_gn l3", "mgda_gn of MGDA must be one of none, l2, loss, loss+"),
    ],
)
def test_mistakes_are_named(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare_args(_parse(line))
    assert message in str(caught.value)


def test_a_script_may_define_a_flag_again() -> None:
    parser = config._make_parser()
    parser.add_argument("--patience", type=str, default="mine")
    assert parser.parse_args([]).patience == "mine"


def test_the_banner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare_args(_parse("--weighting mgda --scheduler step --seed 3"))
    lines = [
        "=" * 40,
        "General Configuration:",
        "\tMode: train",
        "\tWighting: MGDA",
        "\tArchitecture: HPS",
        "\tRep_Grad: False",
        "\tMulti_Input: False",
        "\tSeed: 3",
        "\tSave Path: None",
        "\tLoad Path: None",
        "\tDevice: cpu",
        "MGDA Configuration:",
        "\tmgda_gn: none",
        "Optimizer Configuration:",
        "\toptim: adam",
        "\tlr: 0.0001",
        "\tweight_decay: 1e-05",
        "Scheduler Configuration:",
        "\tscheduler: step",
        "\tstep_size: 100",
        "\tgamma: 0.5",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_namespace_made_by_hand_needs_no_hyper_parameters() -> None:
    values: dict[str, Any] = vars(_parse("--weighting MGDA"))
    del values["mgda_gn"]
    assert prepare_args(argparse.Namespace(**values))[0]["weight_args"] == {"mgda_gn": "none"}


def test_a_script_may_bring_an_architecture_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_args(_parse("--arch DIY --img_size 3 32 32"))[0]["arch_args"] == {}
    assert "\tArchitecture: DIY\n" in capsys.readouterr().out
