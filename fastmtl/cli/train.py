"""`fastmtl train`: one run, from the command line to the run directory."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import typer

from fastmtl.cli.build import build_trainer, first_inputs, load_data, whole_path
from fastmtl.cli.options import split_values
from fastmtl.data import DataBundle
from fastmtl.deploy.card import card_of
from fastmtl.deploy.facts import ModelFacts, facts_of
from fastmtl.distributed import elastic, shard, together
from fastmtl.errors import CheckpointError, FastmtlError, UsageError
from fastmtl.recipes import find_recipe
from fastmtl.support.hyper import declared
from fastmtl.support.named import short_name
from fastmtl.trainer import Trainer
from fastmtl.trainer.log.jsonl import JsonlLogger
from fastmtl.trainer.log.logger import Logger
from fastmtl.trainer.log.named import named_logger
from fastmtl.trainer.log.plot import PlotLogger
from fastmtl.trainer.log.progress import ProgressLogger
from fastmtl.trainer.log.tensorboard import TensorBoardLogger
from fastmtl.trainer.run.config import TrainConfig, config_of, names_in, read_config
from fastmtl.trainer.run.directory import RunDirectory, Tee, write_atomically
from fastmtl.trainer.run.settings import print_settings

__all__ = ["train"]


def train(
    *,
    config: Path | None,
    recipe: str | None,
    scale: str | None,
    run_dir: Path | None,
    resume: Path | None,
    **values: object,
) -> None:
    """Run the command with a YAML file or recipe, the directory to make or to go on with, and flags, None if not given.

    Raises:
        FastmtlError: Anything about the run cannot be as asked.
        typer.Exit: Ctrl-C, with exit code 130.
    """
    if resume is not None and any(given is not None for given in (config, recipe, scale, run_dir)):
        raise UsageError(
            "--resume goes on with a run as it is configured: leave out --config, --recipe, --scale and --run-dir."
        )
    settings, hyper = split_values(values)
    # torchrun may have started this process again, to go on with the run.
    began = RunDirectory(run_dir) if run_dir is not None and elastic.was_restarted(run_dir) else None
    if began is not None and began.last.exists():
        resume = began.path
    if resume is None:
        asked = _config(config, recipe, scale, settings).with_hyper(hyper)
        _check_adapters(asked)
    else:
        asked = _config_to_resume(RunDirectory.open(resume), settings, hyper)
    with together(asked.peer_timeout) as peers:
        last = None if resume is None else RunDirectory(resume).last
        complete, bundle = load_data(asked)
        if peers is not None and not peers.is_main_process:
            _run(build_trainer(complete, bundle, resume=last), complete, bundle)
        else:
            _train_in(_place(run_dir, resume, began, complete, bundle), complete, bundle, resume=last)


def _config(config: Path | None, recipe: str | None, scale: str | None, settings: Mapping[str, object]) -> TrainConfig:
    if config is not None:
        if recipe is not None or scale is not None:
            raise UsageError("--config and --recipe both say how to train: give one of them.")
        return read_config(config, **settings)
    if recipe is None:
        if scale is not None:
            raise UsageError("--scale is that of a recipe: give --recipe.")
        return TrainConfig(**settings)  # type: ignore[arg-type]
    found = find_recipe(recipe)
    return config_of(found.at(scale), found.file, **settings)


def _check_adapters(config: TrainConfig) -> None:
    if config.encoder_args.get("lora") and not config.pretrained and config.load_path is None:
        raise UsageError(
            "lora trains adapters beside weights that stay as they are, which would be random: give --pretrained, or "
            "--load-path of weights."
        )


def _place(
    run_dir: Path | None, resume: Path | None, began: RunDirectory | None, config: TrainConfig, bundle: DataBundle
) -> RunDirectory:
    """Return the run directory, made if the run is new."""
    if resume is not None:
        return RunDirectory.open(resume)
    if run_dir is None:
        return RunDirectory.create_named(
            bundle.name, short_name(config.arch), short_name(config.weighting), datetime.now()
        )
    run = RunDirectory.create(run_dir) if began is None else RunDirectory.create_again(run_dir)
    elastic.mark(run.path)
    return run


def _run(trainer: Trainer, config: TrainConfig, bundle: DataBundle) -> None:
    train, test, val = bundle.train, bundle.test, bundle.val if config.validate else None
    if trainer.peers.size > 1:
        train = shard(train, trainer.peers)
        test = shard(test, trainer.peers, whole=True)
        val = None if val is None else shard(val, trainer.peers, whole=True)
    trainer.train(train, test, config.epochs, val_dataloaders=val)


def _config_to_resume(run: RunDirectory, settings: Mapping[str, object], hyper: Mapping[str, object]) -> TrainConfig:
    if not run.last.exists():
        raise CheckpointError(f"{run.path} has no {run.last.name} to go on from: it ended before its first checkpoint.")
    run.check_writable()
    before = read_config(run.config).resolved()
    if settings.get("dataset_path") is not None:
        settings = {**settings, "dataset_path": whole_path(str(settings["dataset_path"]))}
    after = read_config(run.config, **settings).with_hyper(hyper)
    specs = declared(TrainConfig)
    for name, spec in specs.items():
        if not spec.resumable and getattr(before, name) != getattr(after, name):
            may_change = ", ".join(option for option in specs if specs[option].resumable)
            raise UsageError(
                f"{name} cannot change when a run goes on, only {may_change} can: for a new run like this one give "
                f"--config {run.config} in place of --resume."
            )
    return after


def _train_in(run: RunDirectory, config: TrainConfig, bundle: DataBundle, resume: Path | None) -> None:
    with Tee.recording(run.log):
        progress = ProgressLogger()
        try:
            _print_banner(config, bundle, run)
            trainer = build_trainer(
                config,
                bundle,
                save_path=run.path,
                profile=run.trace if config.profile else None,
                resume=resume,
                logger=[*_file_loggers(config, run), progress],
            )
            write_atomically(run.config, config.as_yaml())
            _model_facts(bundle).write(run.facts)
            _run(trainer, config, bundle)
            write_atomically(run.card, card_of(run))
        except KeyboardInterrupt:
            progress.close()
            saved = f"interrupted: the state is in {run.last}; go on with `fastmtl train --resume {run.path}`"
            nothing = f"interrupted before the first checkpoint: {run.path} has nothing to go on from"
            print(saved if run.last.exists() else nothing, file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            progress.close()
            _keep_what_matters(run, error)
            raise
        print(f"Run directory: {run.path}")
        print(f"Evaluate it: fastmtl eval {run.path}")


def _model_facts(bundle: DataBundle) -> ModelFacts:
    inputs = first_inputs(bundle)
    if bundle.multi_input:
        # The inputs of all tasks have one form.
        inputs = next(iter(inputs.values()))
    facts = facts_of(bundle.task_dict, bundle.outputs, bundle.labels, bundle.kinds, inputs, bundle.facts)
    return replace(facts, builds_encoder=bundle.builds_encoder)


def _print_banner(config: TrainConfig, bundle: DataBundle, run: RunDirectory) -> None:
    """Print the configuration of a run, by part."""
    rows = ", ".join(f"{count:,} {split}" for split, count in bundle.rows.items())
    general = {
        "Mode": "train",
        "Weighting": config.weighting,
        "Architecture": config.arch,
        "Rep_Grad": config.rep_grad,
        "Multi_Input": config.multi_input,
        "Seed": config.seed,
        "Run Directory": run.path,
        "Load Path": config.load_path,
        "Device": config.device or "auto",
        "Compile": config.compile,
    }
    data = {"Data Set": f"{bundle.name} ({rows})", "Encoder": bundle.encoder, "Batch Size": config.batch_size}
    print_settings(
        [
            ("General", general),
            ("Data", data),
            (short_name(config.weighting), config.weight_args),
            (short_name(config.arch), config.arch_args),
            ("Optimizer", config.optim_param),
            ("Scheduler", config.scheduler_param),
        ]
    )
    print("=" * 40)


def _file_loggers(config: TrainConfig, run: RunDirectory) -> list[Logger]:
    loggers: list[Logger] = [JsonlLogger(run.metrics)]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(run.tensorboard))
    names = [name for name in names_in(config.logger) if name.lower() not in ("jsonl", "tensorboard")]
    loggers += [named_logger(name, run.path) for name in names]
    if config.plot:
        loggers.append(PlotLogger(run.curves, run.metrics))
    return loggers


def _keep_what_matters(run: RunDirectory, error: Exception) -> None:
    """Put the error into the log; a run that never began leaves nothing, so that the next try may take its name."""
    foreseen = isinstance(error, FastmtlError)
    if foreseen and not run.config.exists():
        run.discard()
        return
    # A disk that is full for the run is full for its log, and the error at hand says more.
    with contextlib.suppress(OSError), run.log.open("a", encoding="utf-8") as log:
        log.write(f"error: {error}\n" if foreseen else "".join(traceback.format_exception(error)))
