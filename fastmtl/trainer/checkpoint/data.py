"""Where in an epoch the training data are, and how they go on from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fastmtl.distributed import Peers
from fastmtl.distributed.loading import is_shard, rows_of_batch
from fastmtl.engine.trees import map_tree
from fastmtl.errors import CheckpointError, UsageError
from fastmtl.support.kinds import State
from fastmtl.trainer.checkpoint.epochs import check_batches, is_random
from fastmtl.trainer.checkpoint.files import Saved, rng_state, set_rng_state
from fastmtl.trainer.optim.schedule import storable
from fastmtl.trainer.setup.loaders import Loader, Loaders, Pair, by_task, generators, train_batches

__all__ = ["StatefulLoader", "TrainingData"]

_GO_ON = "A run goes on within an epoch with the loaders that it had"


@runtime_checkable
class StatefulLoader(Protocol):
    """A loader that knows how far it is, as torchdata's ``StatefulDataLoader`` does.

    After ``load_state_dict`` of what ``state_dict`` returned when k batches had been taken, iterating gives the batches
    from the k-th on, and draws their order before ``iter`` returns.
    """

    def state_dict(self) -> State:
        """Return the place in the batches."""

    def load_state_dict(self, state: State) -> None:
        """Go to a place when it is iterated over next."""


class TrainingData:
    """The training loaders of a run, and the place in them.

    Args:
        loaders: The loaders.
        tasks: The tasks.
        multi_input: Whether each task has a loader.
        peers: The processes.

    Attributes:
        loaders: The loaders.
        generators: The random generators that the loaders have of their own.
    """

    def __init__(self, loaders: Loaders, tasks: list[str], multi_input: bool, peers: Peers) -> None:
        # The order of a dictionary may be another when the run goes on.
        self.loaders = {task: by_task(loaders, multi_input)[task] for task in tasks} if multi_input else loaders
        self._tasks = tasks
        self._multi_input = multi_input
        self._peers = peers
        self._by_task = by_task(self.loaders, multi_input)
        self.generators = generators(self.loaders, multi_input)
        # Of loaders of which some draw their order again, all must: they may share random numbers.
        self._has_state = all(self._keeps_place(loader) for loader in self._by_task.values())
        loaders_of = self._by_task.values()
        # What must be the same for an epoch to go on.
        self._batches: Saved = {
            "processes": peers.size,
            "rows": [rows_of_batch(loader, peers) for loader in loaders_of],
            "batches": [len(loader) for loader in loaders_of],
            "divided": all(map(is_shard, loaders_of)),
        }
        # As they were when the epoch began.
        self._epoch_rng: Saved = {}
        self._persisted: list[bool] = []

    def _keeps_place(self, loader: Loader) -> bool:
        """Return whether the state of a loader alone brings back its place."""
        batches = getattr(loader, "batch_sampler", None)
        if not isinstance(loader, StatefulLoader) or batches is None or getattr(loader, "num_workers", None) != 0:
            return isinstance(loader, StatefulLoader)
        # Without workers the order of any other batch sampler would be drawn with the first batch, too late.
        before = rng_state(self.generators)
        try:
            return isinstance(iter(batches), StatefulLoader)
        finally:
            set_rng_state(before, self.generators)

    def place(self, batch: int, loss_sums: State, gather: bool) -> Saved:
        """Return the place after ``batch`` steps of an epoch, for a checkpoint; 0 for an epoch's beginning.

        Args:
            batch: The steps.
            loss_sums: The losses of this process's rows so far.
            gather: Whether all processes call this, so that what each one has is in it.
        """
        place: Saved = {"rng": rng_state(self.generators), "epoch_rng": None, "loss_sums": {}}
        if not batch:
            return place | {"data": {"persisted": self._persisting()}}
        own = {"loss_sums": loss_sums, "loaders": self._states() if self._has_state else None}
        each = self._peers.all_gather_object(map_tree(_on_host, own)) if gather else [own]
        data = {"persisted": self._persisted, "has_state": self._has_state, "each": each}
        return place | {"epoch_rng": self._epoch_rng, "data": self._batches | data}

    def loss_sums(self, start: Mapping[str, Any]) -> Sequence[State]:
        """Return the losses so far of the epoch, in parts, that this process takes over."""
        each = [each["loss_sums"] for each in start.get("data", {}).get("each", [start])]
        if len(each) == self._peers.size:
            return each[self._peers.rank : self._peers.rank + 1]
        return each if self._peers.is_main_process else []

    def _states(self) -> list[object]:
        try:
            return [storable(loader.state_dict()) for loader in self._by_task.values()]  # type: ignore[attr-defined]
        except (AttributeError, TypeError) as error:
            raise UsageError(
                f"state_dict of train_dataloaders must return tensors and plain values, which a checkpoint can hold, "
                f"got {error}."
            ) from None

    def check(self, start: Mapping[str, Any]) -> None:
        """Refuse to go on within an epoch where the rest of its batches would be others.

        Raises:
            CheckpointError: They would be.
        """
        saved = start.get("data", {})
        if not start["batch"] or "has_state" not in saved:
            return
        if saved["has_state"] != self._has_state:
            kept, lacking = ("has", "have none") if saved["has_state"] else ("has no", "have one")
            raise CheckpointError(
                f"{_GO_ON}: the checkpoint {kept} state of train_dataloaders (StatefulDataLoader), those of this run "
                f"{lacking}, and would give the epoch's rows in another order."
            )
        check_batches(saved, self._batches)
        if saved["processes"] != self._peers.size:
            random = self._peers.all_reduce_any([any(map(is_random, self._by_task.values()))])[0]
            if random:
                raise CheckpointError(
                    f"Within an epoch a run cannot go on with {self._peers.size} processes in place of "
                    f"{saved['processes']} where rows are changed at random, as train_dataloaders' are: each process "
                    "draws the numbers of its own rows. Start as many processes as before."
                )
        lost = [before and not now for before, now in zip(saved["persisted"], self._persistent(), strict=False)]
        if any(lost) and self._states_of(saved) is None:
            raise CheckpointError(
                f"{_GO_ON}: workers that last for several epochs drew the order of this one, so give "
                "train_dataloaders persistent_workers and num_workers above 0."
            )

    def batches(self, start: Mapping[str, Any], skip: int, count: int) -> Iterator[Pair]:
        """Return the batches of an epoch from the ``skip``-th on, with the random numbers they had then.

        Args:
            start: Where the epoch begins, or a checkpoint left off.
            skip: The number of batches that are done.
            count: The number of batches of an epoch.
        """
        saved = start.get("data", {})
        self._start_workers(saved.get("persisted", []))
        self._epoch_rng, self._persisted = rng_state(self.generators), self._persisting()
        if not skip:
            return self._train_batches(count)
        self._epoch_rng, self._persisted = start["epoch_rng"], saved.get("persisted", [])
        set_rng_state(self._epoch_rng, self.generators)
        states = self._states_of(saved)
        if states is not None:
            batches = self._train_batches(count - skip, self._taken_up(states))
        else:
            batches = self._train_batches(count)
            for _ in range(skip):
                next(batches)
        set_rng_state(start["rng"], self.generators)
        return batches

    def _states_of(self, saved: Saved) -> list[object] | None:
        """Return the states of this process's loaders; None if there are none, or of other processes."""
        each = saved.get("each", [])
        # After an interrupt there are those of one process.
        if not saved.get("processes") == self._peers.size == len(each):
            return None
        states: list[object] | None = each[self._peers.rank]["loaders"]
        return states

    def _train_batches(self, count: int, begun: Mapping[str | None, Iterator[object]] | None = None) -> Iterator[Pair]:
        return train_batches(self.loaders, self._tasks, self._multi_input, count, begun)

    def _taken_up(self, states: list[object]) -> dict[str | None, Iterator[object]]:
        """Return iterators over the loaders, which are where their states say."""
        begun: dict[str | None, Iterator[object]] = {}
        for (task, loader), state in zip(self._by_task.items(), states, strict=True):
            try:
                loader.load_state_dict(map_tree(_on_host, state))  # type: ignore[attr-defined]
                begun[task] = iter(loader)
            except (AssertionError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{_GO_ON}, with as many workers: {type(loader).__name__} does not take up the state that the "
                    f"checkpoint has ({type(error).__name__}: {error})."
                ) from error
        return begun

    def _persistent(self) -> list[bool]:
        """Return which loaders keep their workers from epoch to epoch."""
        loaders = self._by_task.values()
        return [bool(getattr(each, "persistent_workers", 0) and getattr(each, "num_workers", 0)) for each in loaders]

    def _persisting(self) -> list[bool]:
        """Return which loaders have workers of an earlier epoch, for which the next epoch draws no seeds."""
        loaders = zip(self._by_task.values(), self._persistent(), strict=True)
        return [keeps and getattr(loader, "_iterator", None) is not None for loader, keeps in loaders]

    def _start_workers(self, persisted: list[bool]) -> None:
        """Start the workers that were there before the epoch began; it leaves no trace in the random numbers."""
        before = rng_state(self.generators)
        for loader, was, is_, can in zip(
            self._by_task.values(), persisted, self._persisting(), self._persistent(), strict=False
        ):
            if was and can and not is_:
                iter(loader)
        set_rng_state(before, self.generators)


def _on_host(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf
