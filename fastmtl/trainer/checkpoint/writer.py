"""The checkpoints that a trainer writes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastmtl.distributed import Peers
from fastmtl.trainer.checkpoint.data import TrainingData
from fastmtl.trainer.checkpoint.files import save_atomically
from fastmtl.trainer.checkpoint.resume import run_state
from fastmtl.trainer.checkpoint.start import described
from fastmtl.trainer.state import TrainerState

__all__ = ["Checkpoints"]


class Checkpoints:
    """Writes ``best.pt`` and ``last.pt`` of a trainer that has a ``save_path``."""

    def __init__(self, trainer: TrainerState) -> None:
        self._trainer = trainer
        self.data: TrainingData | None = None
        # Whether processes have parts of what is saved, so that all of them must take part.
        self.gathers = False
        # Whether any process writes.
        self._saves = False

    def agree(self, peers: Peers) -> None:
        """Find out whether all processes take part; the leading one alone writes."""
        trainer = self._trainer
        in_pieces = trainer.step.comm.shards_rows and bool(trainer.model.row_states)
        self._saves = peers.all_gather_object(trainer.save_path is not None)[0]
        self.gathers = self._saves and (in_pieces or trainer.storage.is_sharded)
        if not peers.is_main_process:
            trainer.save_path = None

    def last_one(self) -> str | None:
        """Return the path of ``last.pt``, None if there is none."""
        folder = self._trainer.save_path
        return None if folder is None or not (folder / "last.pt").exists() else str(folder / "last.pt")

    def save_best(self, epoch: int) -> None:
        """Write the network, with the strategy's own parameters, if ``epoch`` is the best so far."""
        trainer = self._trainer
        if trainer.save_path is None and not self.gathers:
            return
        trainer.guard.check(self.last_one())
        if trainer.meter.best_result["epoch"] != epoch:
            return
        remembered, state = trainer.model.remembered(), trainer.storage.whole_state(trainer.model.state_dict())
        if trainer.save_path is None:
            return
        self._check_finite(state)
        best = trainer.save_path / "best.pt"
        best_state = {key: value for key, value in state.items() if key not in remembered}
        save_atomically(described(trainer.model, best_state), best)
        print(f"Save Model {epoch} to {best}")
        trainer.logger.on_checkpoint(best, "best")

    def save_last(self, epoch: int, batch: int, *, gather: bool = True) -> None:
        """Write everything that is needed to go on with step ``batch`` of epoch ``epoch``.

        Args:
            epoch: The epoch.
            batch: The step.
            gather: Whether all processes call this.
        """
        trainer = self._trainer
        # A process alone may have been given the path since.
        if not (self._saves if trainer.peers.size > 1 else trainer.save_path is not None):
            return
        assert self.data is not None
        # Of an interrupt other processes know nothing.
        gather = gather or trainer.peers.size == 1
        place = {"epoch": epoch, "batch": batch} | self.data.place(batch, trainer.meter.loss_sums(), gather)
        if trainer.save_path is None and not self.gathers:
            return
        state = run_state(trainer)
        if trainer.save_path is None:
            return
        trainer.guard.check(self.last_one())
        self._check_finite(state["model"])
        path = trainer.save_path / "last.pt"
        save_atomically(state | place, path)
        trainer.logger.on_checkpoint(path, "last")

    def _check_finite(self, state: Mapping[str, torch.Tensor]) -> None:
        params = [state[name] for name, _ in self._trainer.model.named_parameters() if name in state]
        self._trainer.guard.check_saved(params, self.last_one())
