"""The processes that train together, and their collectives."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.errors import PeerError, UsageError

__all__ = ["Alone", "Peers", "find_peers", "join", "leave", "peer_errors", "together"]

T = TypeVar("T")

# Seconds that a finished process waits for the others.
_LEAVE_TIMEOUT = 30.0

# The new names; torch 2.11 has the old ones only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def join(timeout: float | None = None) -> Peers | None:
    """Join the process group of ``torchrun``; each process gets one GPU as its current device.

    Tensors on GPUs are sent by NCCL, those on the CPU by gloo. :func:`leave` ends the group, at program exit at the
    latest.

    Args:
        timeout: Seconds a process waits for another before it raises an error; torch's default if None. Only the call
            that creates the group uses it.

    Returns:
        The processes; None if there is only one.

    Raises:
        UsageError: ``timeout`` is not above 0.
    """
    if timeout is not None and not timeout > 0:
        raise UsageError(f"timeout must be above 0 seconds, got {timeout}.")
    if not dist.is_available():
        return None
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if launched and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # Default arguments of its functions keep the default group that exists when torch's compiler imports it. Such a
        # group would outlive leave(), and its threads may abort the process at exit; so it is imported before.
        importlib.import_module("torch.distributed.nn.functional")
        options: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        store, rank, size = next(iter(dist.rendezvous("env://", **options)))  # type: ignore[attr-defined]
        # torchrun's store survives a restart, with the addresses of the earlier processes.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            **options,
        )
        atexit.register(leave, wait=False)
    return find_peers()


def leave(*, wait: bool = True) -> None:
    """Leave the process group, if there is one.

    Args:
        wait: Wait until all processes leave, half a minute at most, as a connection must not close while another
            process uses it. To be False after an error, when the others may never leave.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    try:
        if wait:
            with contextlib.suppress(RuntimeError):
                dist.all_reduce(torch.zeros(1), async_op=True).wait(timedelta(seconds=_LEAVE_TIMEOUT))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together(timeout: float | None = None) -> Iterator[Peers | None]:
    """Join the process group for a ``with`` block; see :func:`join` and :func:`leave`.

    A group that existed before is kept.
    """
    met_before = dist.is_available() and dist.is_initialized()
    succeeded = False
    try:
        yield join(timeout)
        succeeded = True
    finally:
        if not met_before:
            leave(wait=succeeded)


def find_peers() -> Peers | None:
    """Return the processes of torch's default group; None without a group, or with a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return Peers()


class Synced(Protocol):
    """State with sums that can be reduced over the processes."""

    def sync(self, peers: Peers) -> None:
        """Replace the sums by those of all processes."""


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Raise a PeerError in place of the errors of collectives."""
    try:
        yield
    except RuntimeError as cause:
        first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise PeerError(
            f"Another process has ended, or did not answer in time; resume from last.pt, or let torchrun "
            f"--max-restarts do so: {first}"
        ) from cause


class Peers:
    """A group of processes of ``torch.distributed``.

    Elements that a process sends are counted by the ring model: for n elements over W processes reduce-scatter and
    all-gather take n (W - 1) / W, all-reduce twice that. NCCL's rings do so; gloo implements reduce-scatter as an
    all-reduce of which each process keeps its part, which costs twice as much on the wire.

    Args:
        group: The group, torch's default one if None.

    Attributes:
        rank: This process's number.
        size: The number of processes W.
        is_main_process: Whether this is the process that logs and saves.

    Raises:
        PeerError: Another process has ended, or did not answer in time.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.is_main_process = self.rank == 0
        self._host = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"

    def __reduce__(self) -> tuple[type[Peers], tuple[()]]:
        """Pickle as `Alone`: the other processes are not in the pickle."""
        return Alone, ()

    def __deepcopy__(self, memo: object) -> Peers:
        """Return the same processes."""
        return self

    @peer_errors()
    def _send(self, collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a collective of ``torch.distributed``; do nothing for a single process."""
        return collective(*args, group=self.group, **options) if self.size > 1 else None

    def local_device(self, device: torch.device) -> torch.device:
        """Return the current GPU for a device ``cuda`` without index, with several processes."""
        unnumbered = self.size > 1 and str(device) == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if unnumbered else device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes."""
        self._send(dist.all_reduce, tensor)
        return tensor

    def all_reduce_coalesced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over all processes, with one message per run of equal dtypes."""
        sums: list[Tensor] = []
        for _, same in groupby(tensors, key=lambda tensor: tensor.dtype):
            group = list(same)
            flat = self.all_reduce(torch.cat([tensor.reshape(-1) for tensor in group]))
            parts = flat.split([tensor.numel() for tensor in group])
            sums += [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)]
        return sums

    def all_reduce_any(self, flags: list[bool]) -> list[bool]:
        """Return which flags are set in any process; the host waits for the others' hosts."""
        counts = torch.tensor(flags, dtype=torch.int32, device=self._host)
        self._send(dist.all_reduce, counts, dist.ReduceOp.MAX)
        return [bool(count) for count in counts.tolist()]

    def reduce_scatter(self, out: Tensor, flat: Tensor) -> Callable[[], Any]:
        """Start to fill ``out`` (n / W,) with this process's part of the sum of ``flat`` (n,).

        Returns a function that waits; neither tensor may be changed before.
        """
        return peer_errors()(self._send(_reduce_scatter, out, flat, async_op=True).wait)

    def all_gather(self, out: Tensor, part: Tensor) -> Callable[[], Any]:
        """Start to fill ``out`` (n,) with the parts (n / W,) of all processes; return a function that waits."""
        return peer_errors()(self._send(_all_gather, out, part, async_op=True).wait)

    def exchange(self, numbers: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the numbers that each process has for this one, from those this one has for each; the host waits."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._host)
        theirs = mine.clone()
        self._send(dist.all_to_all_single, theirs, mine)
        return [[int(number) for number in row] for row in theirs.tolist()]

    def all_to_all(self, tensor: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Send ``counts[r]`` elements of a tensor (n,) to process r, in order.

        Returns the elements for this process, ``sizes[r]`` of them from process r.
        """
        received = tensor.new_empty(sum(sizes))
        self._send(dist.all_to_all_single, received, tensor, list(sizes), list(counts))
        return received

    def all_gather_parts(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return the parts of all processes, of ``sizes[r]`` elements from process r; each sends the longest size."""
        longest = max(sizes)
        if not longest:
            return [part] * self.size
        whole = part.new_empty(self.size * longest)
        self.all_gather(whole, torch.nn.functional.pad(part, (0, longest - len(part))))()
        return [row[:size] for row, size in zip(whole.view(self.size, longest), sizes, strict=True)]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main process."""
        for tensor in tensors:
            self._send(dist.broadcast, tensor.detach(), group_src=0)

    def gather_to_main(self, tensor: Tensor) -> list[Tensor] | None:
        """Return all processes' tensors, of one shape, in the main process; None elsewhere."""
        tensors = [tensor.clone() for _ in range(self.size)] if self.is_main_process else None
        self._send(dist.gather, tensor, tensors, group_dst=0)
        return tensors

    def all_gather_object(self, value: T) -> list[T]:
        """Return a picklable value of each process, in the order of their ranks."""
        values = [value] * self.size
        self._send(dist.all_gather_object, values, value)
        return values

    def sync(self, parts: Iterable[Synced]) -> None:
        """Reduce the sums of several objects over the processes."""
        for part in parts if self.size > 1 else ():
            part.sync(self)

    def all_reduce_optional(self, tensor: Tensor | None) -> Tensor | None:
        """Return the sum of a tensor that may be None in some processes; None if it is in all."""
        shapes = self.all_gather_object(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device.type))
        known = next((shape for shape in shapes if shape is not None), None)
        if known is None:
            return None
        if tensor is None:
            shape, dtype, device = known
            tensor = torch.zeros(shape, dtype=dtype, device=self.local_device(torch.device(device)))
        return self.all_reduce(tensor.clone())

    @contextlib.contextmanager
    def printing_on_main_process(self) -> Iterator[None]:
        """Suppress printing in the block, but in the main process."""
        if self.is_main_process:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


class Alone(Peers):
    """A single process."""

    def __init__(self) -> None:
        self.group = None
        self.rank = 0
        self.size = 1
        self.is_main_process = True
        self._host = "cpu"
