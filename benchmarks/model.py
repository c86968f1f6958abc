"""What a training step must cost on a card: bytes, operations, launches, and the time that they cannot go below.

The network's part is counted op by op on tensors without memory; the part of the gradients' algebra follows from the
number of tasks and parameters. A measured step is held against the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastmtl.benchmarks.work import Work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["CARDS", "Card", "Cost", "algebra", "counted", "print_model", "step_model"]

# Of the argument of one launch, and of each tensor in it beside its pointers: csrc/include/fastmtl/launch_plan.h.
_TABLE_WORDS, _STRIP_WORDS = 4000, 3
_FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Rates of a card, from NVIDIA's data sheets of H100 (SXM), H200 (SXM) and A100 (SXM, 80 GB).

    The sheets state the tensor cores' rates with sparsity; these are the halves without.

    Attributes:
        memory: Bytes per second.
        tensor: Operations per second of the network by precision; convolutions in fp32 use TF32, as torch does.
        float32: Operations per second without tensor cores.
    """

    memory: float
    tensor: dict[str, float]
    float32: float


CARDS = {
    "H100": Card(memory=3.35e12, tensor={"fp32": 494.5e12, "bf16": 989.5e12, "fp16": 989.5e12}, float32=67e12),
    "H200": Card(memory=4.8e12, tensor={"fp32": 494.5e12, "bf16": 989.5e12, "fp16": 989.5e12}, float32=67e12),
    "A100": Card(memory=2.039e12, tensor={"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}, float32=19.5e12),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a part of a step takes.

    Attributes:
        part: Its name.
        bytes: Read and written, every op by itself.
        flops: Multiplications and additions.
        launches: Kernels.
        by_op: Bytes and flops op by op; a part's time is at least the sum over its ops of the longer of the two.
        dense: Whether the operations may run on tensor cores.
    """

    part: str
    bytes: int
    flops: int
    launches: int
    by_op: tuple[tuple[int, int], ...]
    dense: bool = False

    def seconds(self, card: Card, precision: str = "fp32") -> float:
        """Return the least time on a card."""
        rate = card.tensor[precision] if self.dense else card.float32
        return sum(max(size / card.memory, work / rate) for size, work in self.by_op)


class _Counter(TorchDispatchMode):
    """Notes bytes and operations of every op that does not only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        looks = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not looks and not func._schema.name.startswith("aten::empty"):
            packet = func.overloadpacket
            work = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.by_op.append((sum(tensor.numel() * tensor.itemsize for tensor in tensors), int(work)))
        return result


@contextmanager
def counted(costs: list[Cost], part: str, times: int = 1, dense: bool = True) -> Iterator[None]:
    """Count the ops of the block and add their cost, ``times`` over, to ``costs``."""
    counter = _Counter()
    with counter:
        yield
    costs.append(_cost(part, counter.by_op * times, dense=dense))


def _cost(part: str, by_op: Sequence[tuple[int, int]], launches: int | None = None, dense: bool = False) -> Cost:
    return Cost(
        part=part,
        bytes=sum(size for size, _ in by_op),
        flops=sum(work for _, work in by_op),
        launches=len(by_op) if launches is None else launches,
        by_op=tuple(by_op),
        dense=dense,
    )


def algebra(tasks: int, parameters: int, tensors: int) -> list[Cost]:
    """Return the costs between the gradients of T tasks and their update: J read twice, the update written once.

    Args:
        tasks: T.
        parameters: P, elements of one task's gradient, in float32.
        tensors: Of one task's gradient; a launch holds a limited number of them.
    """

    def launches(pointers: int) -> int:
        capacity = _TABLE_WORDS // (_STRIP_WORDS + pointers)
        return -(-tensors // capacity)

    rows = _FLOAT * tasks * parameters
    gram = (rows, tasks * (tasks + 1) * parameters)
    combine = (rows + _FLOAT * parameters, 2 * tasks * parameters)
    return [
        _cost("gram", [gram], 2 * launches(tasks), dense=tasks > 8),
        _cost("solver", [(8 * tasks * tasks, 0)], 1),
        _cost("combine", [combine], launches(tasks + 1)),
    ]


def step_model(net: str, tasks: int, batch: int, size: int | str) -> list[Cost]:
    """Return the costs of a step of a strategy that needs the Gram matrix, with hard parameter sharing and plain SGD.

    Args:
        net: A network of `Work`.
        tasks: Number of tasks.
        batch: Rows of the batch.
        size: Height and width of the images, as a number or ``"288x384"``.

    Raises:
        UsageError: An unknown network.
    """
    work = Work(net=net, arch="HPS", count=tasks, batch=batch, size=size, device=torch.device("meta"))
    encoder, decoders = work.modules()
    shared = list(encoder.parameters())
    costs: list[Cost] = []
    with counted(costs, "forward"):
        features = encoder(work.inputs)
    cut = features.detach().requires_grad_()
    with counted(costs, "heads"):
        for task in work.tasks:
            work.loss(decoders[task](cut), task).backward()
    with counted(costs, f"{tasks} backwards", tasks):
        torch.autograd.grad(features, shared, torch.empty_like(features))
    count = sum(param.numel() for param in shared)
    everything = count + sum(param.numel() for param in decoders.parameters())
    costs += algebra(tasks, count, len(shared))
    # Parameter and gradient read, parameter written.
    return [*costs, _cost("optimizer", [(3 * _FLOAT * everything, 2 * everything)], 1)]


def print_model(
    card: str, net: str, tasks: Sequence[int], batch: int, size: int | str, precision: str = "fp32"
) -> None:
    """Print the cost of each part of a step on a card, and the least time of the whole.

    No part reads anything back to the host. In bf16 and fp16 the network's tensors are counted as float32 all the same,
    as in memory many of them stay: its time is then that of its operations or of those bytes.

    Raises:
        UsageError: An unknown card, network or precision.
    """
    name = resolve_name(card, {name: name for name in CARDS}, "card")
    chosen = CARDS[name]
    if precision not in chosen.tensor:
        raise UsageError(f"precision must be one of {', '.join(chosen.tensor)}, got {precision!r}.")
    for count in tasks:
        costs = step_model(net, count, batch, size)
        print(f"{net}, T={count}, batch {batch}, on {name}, {precision}")
        print(f"{'part':14}{'GB':>10}{'GFLOP':>10}{'launches':>10}{'syncs':>7}{'least ms':>10}")
        total = 0.0
        for cost in costs:
            least = cost.seconds(chosen, precision)
            total += least
            sizes = f"{cost.bytes / 1e9:10.4f}{cost.flops / 1e9:10.2f}"
            print(f"{cost.part:14}{sizes}{cost.launches:10}{0:7}{least * 1e3:10.4f}")
        launches = sum(cost.launches for cost in costs)
        print(f"{'step':14}{'':20}{launches:10}{0:7}{total * 1e3:10.4f}")
