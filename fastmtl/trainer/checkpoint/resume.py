"""What ``last.pt`` holds of a run, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fastmtl.errors import CheckpointError
from fastmtl.trainer.checkpoint.files import Saved, load_model_state, read_checkpoint
from fastmtl.trainer.optim.schedule import storable
from fastmtl.trainer.state import TrainerState

__all__ = ["BEGINNING", "resume_run", "run_state"]

BEGINNING: Saved = {"epoch": 0, "batch": 0, "train_losses": [], "loss_sums": {}}
_HOW = ("fused", "foreach", "capturable")
_NEEDED = ("model", "step", "optimizer", "scheduler", "base_result", "best_result", "rng", "epoch_rng")


def run_state(trainer: TrainerState) -> Saved:
    """Return the state of everything that learns or remembers.

    Where processes have parts of it all of them must call this; the first one then has it whole.
    """
    schedule = trainer.schedule.state_dict()
    model = trainer.storage.whole_state(trainer.model.state_dict())
    optimizer = trainer.storage.whole_optimizer(_optimizer_state(trainer.optimizer))
    return {
        "model": trainer.step.comm.gather_states(model, trainer.model.row_states),
        "step": trainer.step.state_dict(),
        "optimizer": optimizer,
        "optimizer_name": type(trainer.optimizer).__name__,
        "optimizer_groups": trainer.optimizer_groups,
        "scheduler": schedule.pop("state"),
        "schedule": schedule,
        "base_result": trainer.meter.base_result,
        "best_result": trainer.meter.best_result,
        "stopping": trainer.stopping.state_dict(),
        "train_losses": trainer.model.train_loss_buffer.tolist(),
        "names": _names(trainer),
    }


def resume_run(trainer: TrainerState, path: Path) -> Saved:
    """Put a trainer where the run that wrote ``path`` was; return the place in the run, as `BEGINNING` is one.

    Raises:
        CheckpointError: The file is missing, is no ``last.pt``, or is of another run.
    """
    path = path / "last.pt" if path.is_dir() else path
    state = read_checkpoint(path, trainer.device)
    if not isinstance(state, dict) or "names" not in state:
        raise CheckpointError(f"{path} is not a last.pt: to start from the weights of a best.pt, use load_path.")
    if list(state["names"]) != _names(trainer):
        raise CheckpointError(f"The checkpoint {path} is of {state['names']}, this run is of {_names(trainer)}.")
    missing = [key for key in (*BEGINNING, *_NEEDED) if key not in state]
    if missing:
        raise CheckpointError(f"The checkpoint {path} is not whole: it has no {', '.join(missing)}.")
    optimizer_name = type(trainer.optimizer).__name__
    if (other := state.get("optimizer_name", optimizer_name)) != optimizer_name:
        raise CheckpointError(f"The checkpoint {path} is of the optimizer {other}, this run is of {optimizer_name}.")
    if "optimizer_groups" in state and state["optimizer_groups"] != trainer.optimizer_groups:
        _refuse_other_losses(state["optimizer_groups"], trainer, path)
        raise CheckpointError(
            f"The checkpoint {path} has the parameters in other groups of the optimizer than this run: groups cannot "
            "change when a run goes on."
        )
    model = trainer.step.comm.local_states(state["model"], trainer.model.row_states)
    model, optimizer = trainer.storage.load_shards(model), trainer.storage.part_optimizer(state["optimizer"])
    load_model_state(trainer.model, model, path)
    trainer.step.load_state_dict(state["step"])
    _load_optimizer(trainer.optimizer, optimizer, path)
    trainer.schedule.load_state_dict(
        {**state.get("schedule", {}), "state": state["scheduler"], "epoch": state["epoch"]}
    )
    trainer.meter.base_result = state["base_result"]
    trainer.meter.best_result = state["best_result"]
    if "stopping" in state:
        trainer.stopping.go_on(state["stopping"], state["epoch"] - 1)
    place = {key: state[key] for key in (*BEGINNING, "rng", "epoch_rng")}
    # Older ones have none.
    return place | {"data": state.get("data", {})}


def _refuse_other_losses(before: list[list[str]], trainer: TrainerState, path: Path) -> None:
    """Refuse parameters of losses that have come or gone since a checkpoint."""
    stored, now = ({name for group in groups for name in group} for groups in (before, trainer.optimizer_groups))
    learned = {name for name in stored ^ now if name.startswith("loss_fn")}
    if learned and learned == stored ^ now:
        lacking = "this run's losses" if learned & stored else "the checkpoint"
        raise CheckpointError(
            f"{path} is of other losses: {', '.join(sorted(learned)[:3])} is not in {lacking}. A run goes "
            "on with the same losses; to start from its weights, use load_path."
        )


def _optimizer_state(optimizer: torch.optim.Optimizer) -> Saved:
    """Return the state of an optimizer, without settings that a checkpoint cannot hold, such as functions."""
    state = optimizer.state_dict()
    groups = [
        {name: plain for name, value in group.items() for plain in _held(value)} for group in state["param_groups"]
    ]
    return state | {"param_groups": groups}


def _held(value: object) -> list[object]:
    try:
        return [storable(value)]
    except TypeError:
        return []


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Saved, path: Path) -> None:
    """Load a state, but not how its optimizer did its work, which may not be possible on this run's device."""
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"The checkpoint {path} is of an optimizer with groups of {_listed(sizes[0])} parameters, this run's has "
            f"groups of {_listed(sizes[1])}: groups cannot change when a run goes on."
        )
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, made in zip(optimizer.param_groups, before, strict=True):
        group.update({name: value for name, value in made.items() if name in _HOW or name not in group})


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))


def _names(trainer: TrainerState) -> list[object]:
    return [trainer.weighting, trainer.architecture, trainer.task_name]
