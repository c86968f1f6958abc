"""Layers that are frozen and unfrozen between epochs."""

from __future__ import annotations

from fastmtl.errors import UsageError
from fastmtl.trainer.state import TrainerState

__all__ = ["follow_freezing"]


def follow_freezing(trainer: TrainerState) -> None:
    """Train from now on the parameters that require gradients now.

    Raises:
        UsageError: Shared parameters are among them that were not, and something is kept for each of those that
            were.
    """
    params = dict(trainer.model.named_parameters())
    for param in params.values():
        if not param.requires_grad:
            # An optimizer moves what has a gradient of zeros, by its momentum.
            param.grad = None
    added = {name for name, param in params.items() if param.requires_grad} - trainer.trained_names
    if not added:
        return
    shared, kept = set(trainer.model.get_share_params()), None
    if trainer.storage.is_sharded:
        kept = "shards are made"
    elif any(params[name] in shared for name in added):
        if trainer.model.row_states:
            kept = f"{trainer.weighting} remembers gradients"
        elif trainer.model.groups(**trainer.kwargs["weight_args"]) is not None:
            kept = f"{trainer.weighting} makes groups"
    if kept is not None:
        raise UsageError(
            f"Parameters require gradients that did not before, and {kept} of those that did: make a new Trainer."
        )
    state = trainer.step.state_dict()
    trainer.step = trainer.make_step(trainer.step.options)
    trainer.step.load_state_dict(state)
