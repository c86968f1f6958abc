"""The command line from outside: exit codes, one sentence for each error, and help that says what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmtl.cli import main
from fastmtl.ops._registry import OPS


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trian", "error: No such command 'trian'. Did you mean 'train'?"),
        ("train --archh mtan", "error: Unknown option '--archh'. Did you mean '--arch'?"),
        ("train extra", "error: Got unexpected extra argument(s) (extra)."),
        ("train --arch mtann", "error: Unknown architecture 'mtann'. Did you mean 'MTAN'? Known: HPS, MTAN"),
        ("train --weighting mgd", "error: Unknown weighting 'mgd'. Did you mean 'MGDA'?"),
        ("train --dataset multimnis", "error: Unknown data set 'multimnis'. Did you mean 'multimnist'?"),
        (
            "train --encoder hf:bert --encoder-args lora=8",
            "error: lora trains adapters beside weights that stay as they are",
        ),
        ("train --dataset-path nowhere", "error: The data folder 'nowhere' does not exist."),
        ("train --multi-input", "error: multi_input is True, but the data set multimnist has inputs"),
        ("train --epochs 0", "error: epochs must be at least 1, got 0."),
        ("train --epochs x", "error: Invalid value for '--epochs'"),
        ("train --config no.yaml", "error: There is no configuration file no.yaml."),
        ("train --resume nowhere", "error: There is no run directory nowhere."),
        ("train --resume a --config b", "error: --resume goes on with a run as it is configured"),
        ("train --mgda-gn l2", "error: mgda_gn is a hyper-parameter of MGDA, but the weighting is EW"),
        ("train --weighting mgda --mgda_gn l3", "error: mgda_gn of MGDA must be one of none, l2, loss, loss+"),
        ("train --compile sometimes", "error: compile must be true, false or auto, got 'sometimes'."),
        ("eval", "error: Missing argument 'RUN'."),
        ("eval nowhere", "error: There is no run directory nowhere."),
        ("eval nowhere --jsn", "error: Unknown option '--jsn'. Did you mean '--json'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(sentence)
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "a run that cannot begin leaves nothing"


@pytest.mark.parametrize("by_flag", [True, False])
def test_traceback_on_demand(
    by_flag: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not by_flag:
        monkeypatch.setenv("FASTMTL_TRACEBACK", "1")
    assert main(["eval", "nowhere", *(["--traceback"] if by_flag else [])]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("error: There is no run directory nowhere.\n")


def test_unforeseen_failure_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("fastmtl.data.describe_all", fail)
    assert main(["data", "list"]) == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: first line (--traceback shows where)\n"


def test_error_of_the_system_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        Path("no such folder/file").read_text()

    monkeypatch.setattr("fastmtl.data.describe_all", fail)
    assert main(["data", "list"]) == 1
    wanted = "error: no such folder/file cannot be used: No such file or directory (--traceback shows where)\n"
    assert capsys.readouterr().err == wanted


def test_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmtl.data.describe_all", interrupt)
    assert main(["data", "list"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fastmtl

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastmtl.__version__}\n"


def test_help_of_train_groups_every_setting_and_hyper_parameter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastmtl.cli.options import own_hyper_options
    from fastmtl.support.hyper import declared
    from fastmtl.trainer.run.config import TrainConfig

    monkeypatch.setenv("COLUMNS", "140")
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name, spec in declared(TrainConfig).items():
        assert (f"--{name.replace('_', '-')} " in text) == spec.flag
        assert f"─ {spec.panel} ─" in text
    assert "--mgda-gn" in text
    assert "─ Hyper-parameters of MGDA ─" in text
    assert "HPS, MTAN" in text
    settings = {f"--{name.replace('_', '-')}" for name in declared(TrainConfig)}
    assert settings.isdisjoint(each.option for each in own_hyper_options())


@pytest.mark.parametrize("line", ["--help", "train --help", "eval --help", "data --help", "data list --help"])
def test_help_is_exit_code_0(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 0
    assert "Usage: fastmtl" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["", "data", "bench"])
def test_incomplete_command_shows_help(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert "Usage: fastmtl" in shown.out + shown.err
    assert "error" not in shown.err


def test_bench_list_names_the_operators_and_the_whole_update(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed[:2] == ["gram", "combine"]
    measured_with = {"cagrad_update": "cagrad", "graddrop_rows": "graddrop", "excess_risk_": "ema_gram"}
    measured_with |= {"famo_weights": "famo", "famo_step_": "famo", "moco_rates_": "moco", "moco_step_": "moco"}
    measured_with["group_rows"] = "sum_rows"
    assert set(listed) == {measured_with.get(op, op.rstrip("_")) for op in OPS} | {"update"}


def test_bench_refuses_an_unknown_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--op", "gran"]) == 2
    assert "Unknown op 'gran'. Did you mean 'gram'?" in capsys.readouterr().err


@pytest.mark.parametrize("bench", ["kernels", "step", "autojac"])
def test_benches_refuse_devices_and_threads_that_cannot_be(bench: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", bench, "--device", "gpu"]) == 2
    assert capsys.readouterr().err == "error: device must be cpu, cuda, cuda:<index> or mps, got 'gpu'.\n"
    assert main(["bench", bench, "--threads", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: Invalid value for '--threads'")


def test_bench_fails_on_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastmtl.benchmarks import runner
    from fastmtl.benchmarks.registry import Case, Variant

    def wrong(op: str, device: torch.device, quick: bool) -> list[Case]:
        variants = {"fastmtl": Variant(call=lambda: torch.ones(()), allowed=1e-6)}
        return [Case(name="small", dtype="float32", variants=variants, error=float)]

    monkeypatch.setattr(runner, "cases_of", wrong)
    assert main(["bench", "kernels", "--op", "gram", "--quick"]) == 1
    shown = capsys.readouterr()
    assert "WRONG: error 1.0e+00" in shown.out, shown.err
    assert " us " not in shown.out


def test_data_list_names_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert "multimnist" in capsys.readouterr().out
    assert main(["data", "list", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names[:2] == ["multimnist", "multimnist-multi"]


@pytest.mark.slow
def test_doctor_tells_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_help_brings_no_torch() -> None:
    code = "import sys, fastmtl.cli; fastmtl.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastmtl", "eval"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: Missing argument 'RUN'.\n")
