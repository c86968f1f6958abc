"""Early stopping: each task's best epoch, the tasks that are no longer trained, and when a run is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastmtl.distributed import Alone, Peers
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.names import resolve_name
from fastmtl.trainer.log.meter import PerformanceMeter

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Follows each task's scores on the data that choose the best epoch.

    A task improves in an epoch if its mean relative improvement over the first epoch, that of ``count_improvement`` for
    this task alone, is greater than in all epochs before.

    Args:
        tasks: The tasks.
        patience: Epochs without improvement of any task that is trained after which a run is over; None for no end.
        of_tasks: Task to the epochs without its improvement after which it is no longer trained; the run is over when
            no task is.
        peers: The processes, which all do what the leading one decides.

    Attributes:
        best: Task to its best epoch so far: ``improvement``, ``epoch``, and ``result``, the test scores of that epoch.
        stopped: Task to the last epoch in which it was trained.
        last: The last epoch, where a run was stopped; None before.

    Raises:
        UsageError: A patience is no whole number of at least 1, or of no task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        patience: int | None = None,
        of_tasks: Mapping[str, Any] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.tasks = list(tasks)
        self.patience = patience
        known = {task: task for task in self.tasks}
        given = {} if of_tasks is None else of_tasks
        self.of_tasks = {
            known.get(task) or resolve_name(task, known, "task of task_patience"): given[task] for task in given
        }
        for task, epochs in self.of_tasks.items():
            if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
                raise UsageError(f"task_patience of {task} must be a whole number of at least 1, got {epochs!r}.")
        self.peers = peers or Alone()
        self.begin()

    def begin(self) -> None:
        """Forget all epochs."""
        self.best: dict[str, State] = {}
        self.stopped: dict[str, int] = {}
        self.last: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether the run was stopped."""
        return self.last is not None

    @property
    def is_asked_for(self) -> bool:
        """Whether anything may be stopped."""
        return self.patience is not None or bool(self.of_tasks)

    def after_epoch(self, epoch: int, meter: PerformanceMeter) -> None:
        """Look at the scores of an epoch, after it was evaluated.

        Raises:
            UsageError: A task with a patience has no labels in the data that choose the best epoch.
        """
        for task, improvement in meter.improvements.items():
            # NaN is no improvement.
            if improvement > self.best.get(task, {"improvement": float("-inf")})["improvement"]:
                self.best[task] = {"improvement": improvement, "epoch": epoch, "result": meter.results[task]}
        for task, patience in self.of_tasks.items():
            if task not in meter.improvements:
                split = "validation" if meter.has_val else "test"
                raise UsageError(f"task_patience of {task} needs labels of it in the {split} data, which have none.")
            if task not in self.stopped and self._waited(epoch, [task]) >= patience:
                self.stopped[task] = epoch
                print(f"{task} is no longer trained: its best epoch is {self._best_epoch(task)}")
        self._look(epoch)
        if self.is_asked_for:
            # Scores may differ in their last digits from process to process.
            self.load_state_dict(self.peers.all_gather_object(self.state_dict())[0])

    def go_on(self, state: Settings, epoch: int) -> None:
        """Take up the state of a run after an epoch, by the patience of this one.

        A task that was no longer trained is trained again if it has no patience any more.
        """
        self.load_state_dict(state)
        self.stopped = {task: last for task, last in self.stopped.items() if task in self.of_tasks}
        self.last = None
        self._look(epoch)

    def _look(self, epoch: int) -> None:
        """Find out whether the run is over after an epoch."""
        trained = [task for task in self.tasks if task not in self.stopped]
        if not trained or (self.patience is not None and self._waited(epoch, trained) >= self.patience):
            self.last = epoch

    def trained(self, batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Return batches of inputs and labels by task, without the labels of tasks that are no longer trained."""
        return map(self._without_stopped, batches) if self.stopped else batches

    def describe(self) -> str:
        """Return each task's best epoch in a line."""
        found = (f"{task} {self._best_epoch(task)}" for task in self.tasks)
        return f"Best epoch of each task: {', '.join(found)}"

    def state_dict(self) -> State:
        """Return what a resumed run needs."""
        return {"best": self.best, "stopped": self.stopped, "last": self.last}

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken."""
        self.best, self.stopped, self.last = dict(state["best"]), dict(state["stopped"]), state["last"]

    def _without_stopped(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        inputs, labels = batch
        return inputs, {task: of_task for task, of_task in labels.items() if task not in self.stopped}

    def _waited(self, epoch: int, tasks: Sequence[str]) -> int:
        """Return how many epochs have passed since one of the tasks improved."""
        return epoch - max((self.best[task]["epoch"] for task in tasks if task in self.best), default=-1)

    def _best_epoch(self, task: str) -> object:
        return self.best[task]["epoch"] if task in self.best else "none"
