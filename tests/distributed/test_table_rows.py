"""What goes between processes for tables with sparse gradients, what it adds up to, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmtl
from fastmtl.data import ClickRows
from fastmtl.data.tensors import batch_loader
from fastmtl.distributed import find_peers, peers, shard
from fastmtl.distributed.table_rows import TableRows
from fastmtl.errors import UsageError
from fastmtl.loss import BCELoss
from fastmtl.metrics import AUCMetric
from fastmtl.model import Bag, Categorical, FeatureEncoder, Numeric
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, in_processes
from tests.distributed.looking import Looking, heads
from tests.trainer.toy import flat, loaders, make_trainer

pytestmark = pytest.mark.usefixtures("in_float64")

SGD = {"optim_param": {"optim": "sgd", "lr": 0.1}}


def _gradients(rank: int) -> list[list[Tensor | None]]:
    """Two gradients of four tables: of repeated rows, none here, none anywhere, and without any row."""
    generator = torch.Generator().manual_seed(rank)

    def sparse(rows: int, count: int, *width: int, dtype: torch.dtype = torch.float64) -> Tensor:
        ids = torch.randint(rows, (1, count), generator=generator)
        values = torch.randn(count, *width, generator=generator, dtype=dtype)
        return torch.sparse_coo_tensor(ids, values, (rows, *width), check_invariants=True)

    other = None if rank == 1 else sparse(7, 3, 2, dtype=torch.float32)
    return [
        [sparse(50, 9, 3), other, None, sparse(5, 0, 4)],
        [sparse(50, 4, 3) if rank else None, None, None, sparse(5, 0, 4)],
    ]


def _sum(_: None) -> Any:
    group = find_peers()
    assert group is not None
    tables = [torch.empty(50, 3), torch.empty(7, 2, dtype=torch.float32), torch.empty(4, 2), torch.empty(5, 4)]
    rows = TableRows(tables, group)
    given = _gradients(group.rank)
    return rows.reduce(given), rows.all_reduce(given)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sums_are_those_of_dense_gradients(size: int, tmp_path: Path) -> None:
    found = in_processes(size, tmp_path, _sum, None)
    given = [_gradients(rank) for rank in range(size)]
    for t in range(2):
        for k in range(4):
            known = [grad.to_dense() for of_rank in given if (grad := of_rank[t][k]) is not None]
            whole = [sums[t][k] for _, sums in found]
            if not known:
                assert whole == [None] * size
                continue
            for sums in whole:
                assert sums.is_sparse
                assert sums.is_coalesced()
                assert sums.dtype == known[0].dtype
                assert torch.equal(sums._indices(), sums._indices().unique(dim=1))
                torch.testing.assert_close(sums.to_dense(), sum(known, torch.zeros_like(known[0])))
                assert torch.equal(sums.to_dense(), whole[0].to_dense())
            # Each row is in one process only.
            owned = torch.cat([pieces[t][k]._indices()[0] for pieces, _ in found])
            assert len(owned) == len(owned.unique())
            assert torch.equal(owned.sort().values, whole[0]._indices()[0])


def _count(given: list[tuple[str, int, dict[str, Any]]]) -> list[tuple[float, int, int]]:
    """Return for each case the elements that a process sends for tables, and the rows touched by it and by all."""
    return [_count_step(*case) for case in given]


def _count_step(weighting: str, rows: int, options: dict[str, Any]) -> tuple[float, int, int]:
    group = find_peers()
    assert group is not None
    trainer = make_trainer(weighting, "HPS", TASKS, encoder_class=partial(Looking, rows), **SGD, **options)
    first, second = list(shard(loaders(TASKS), group))[:2]
    trainer.step([first], StepBuffer())
    sent = 0.0

    def all_to_all(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, given: Tensor, sizes: Any = None, counts: Any = None, **kwargs: Any) -> Any:
            nonlocal sent
            kept = len(given) // group.size if counts is None else counts[group.rank]
            # Not the numbers of rows, which do not depend on them.
            sent += 0 if counts is None else len(given) - kept
            return real(out, given, sizes, counts, **kwargs)

        return call

    def all_gather(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, part: Tensor, **kwargs: Any) -> Any:
            nonlocal sent
            sent += len(part) * (group.size - 1)
            return real(out, part, **kwargs)

        return call

    real = peers.Peers.all_gather_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", all_to_all(dist.all_to_all_single))

        def of_tables(self: Any, part: Tensor, sizes: Any) -> Any:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(peers, "_all_gather", all_gather(peers._all_gather))
                return real(self, part, sizes)

        patch.setattr(peers.Peers, "all_gather_parts", of_tables)
        trainer.step([second], StepBuffer())
        whole = [0]
        patch.setattr(dist, "all_reduce", _longest(dist.all_reduce, whole))
        trainer.step([second], StepBuffer())
    # No message has the size of a table.
    assert whole[0] < 8 * 1000
    tables = ("bags", "single", "rare")
    grads = {name: getattr(trainer.model.encoder, name).weight.grad for name in tables}
    ids = (second[0].abs() * 37).long()
    here = len(ids.unique()) + len(ids[:, :2].unique()) + len(ids[second[0][:, 0] > 1, 2].unique())
    return sent / 2, here, sum(grad._nnz() for grad in grads.values() if grad is not None)


def _longest(real: Callable[..., Any], found: list[int]) -> Callable[..., Any]:
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[0] = max(found[0], tensor.numel())
        return real(tensor, *args, **kwargs)

    return call


TRAFFIC: list[tuple[str, dict[str, Any], int]] = [
    ("MGDA", {}, TASKS),
    ("EW", {}, 1),
    ("MGDA", {"gram": "local"}, 1),
    ("MGDA", {"rep_grad": True}, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_traffic_is_that_of_the_touched_rows(size: int, tmp_path: Path) -> None:
    cases = [(name, rows, options) for name, options, _ in TRAFFIC for rows in (1000, 100_000)]
    for found in in_processes(size, tmp_path, _count, cases):
        for (name, options, gradients), small, large in zip(TRAFFIC, found[::2], found[1::2], strict=True):
            assert small == large, (name, options)
            sent, here, touched = small
            # Values of 8 columns and an id for each row; owners have about 1/W of the rows.
            most = here * (8 * gradients + 1) + 1.7 * touched * 9 * (size - 1) / size
            assert touched < 150
            assert 0.3 * most < sent <= most, (name, options)


def _local_step(_: None) -> Any:
    group = find_peers()
    assert group is not None
    trainer = make_trainer("MGDA", "HPS", TASKS, encoder_class=Looking, gram="local", **SGD)
    before = flat(trainer.model.parameters())
    buffer = StepBuffer()
    trainer.step([next(iter(shard(loaders(TASKS), group)))], buffer)
    assert trainer.step.latest is not None
    return before, flat(trainer.model.parameters()), trainer.step.latest.gram, trainer.step.latest.weights


def test_the_local_gram_matrix(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, _local_step, None)
    trainer = make_trainer("MGDA", "HPS", TASKS, encoder_class=Looking, **SGD)
    inputs, labels = next(iter(loaders(TASKS)))
    shared = list(trainer.model.encoder.parameters())
    own = list(trainer.model.decoders.parameters())
    rows, of_own, grams = [], [], []
    for rank in range(2):
        features = trainer.model.encoder(inputs[rank::2])
        losses = []
        for t in range(TASKS):
            pred, gt = trainer.model.decoders[f"task{t}"](features), labels[f"task{t}"][rank::2]
            losses.append(nn.functional.mse_loss(pred, gt) if t % 2 else nn.functional.cross_entropy(pred, gt))
        grads = [_dense_grads(loss, shared) for loss in losses]
        rows.append(torch.stack(grads))
        of_own.append(_dense_grads(torch.stack(losses).sum(), own))
        grams.append(rows[-1] @ rows[-1].T)
    for before, after, gram, weights in found:
        torch.testing.assert_close(gram, sum(grams) / 2, rtol=1e-9, atol=0)
        # Decoders come first.
        update = torch.cat([(of_own[0] + of_own[1]) / 2, weights @ (rows[0] + rows[1]) / 2])
        torch.testing.assert_close(after, before - 0.1 * update, rtol=1e-9, atol=1e-12)


def _dense_grads(loss: Tensor, params: list[Any]) -> Tensor:
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    pairs = zip(grads, params, strict=True)
    return flat([torch.zeros_like(param) if grad is None else grad.to_dense() for grad, param in pairs])


def _poisoned(weighting: str) -> bool:
    """Return whether tables stay as they are when one process sees a NaN, and move when none does."""
    group = find_peers()
    assert group is not None
    trainer = make_trainer(weighting, "HPS", TASKS, encoder_class=Looking, **SGD)
    first, (inputs, labels) = list(shard(loaders(TASKS), group))[:2]
    states = [flat(trainer.model.encoder.parameters())]
    trainer.step([first], StepBuffer())
    states.append(flat(trainer.model.encoder.parameters()))
    if group.is_main_process:
        labels = labels | {"task1": labels["task1"] * torch.inf}
    trainer.step([(inputs, labels)], StepBuffer())
    states.append(flat(trainer.model.encoder.parameters()))
    return not torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def _tasks() -> dict[str, Any]:
    kinds = {"metrics": ["AUC"], "weight": [1]}
    return {task: {**kinds, "metrics_fn": AUCMetric(), "loss_fn": BCELoss()} for task in ("click", "conversion")}


def _recommend(architecture: str) -> Tensor:
    """Return the parameters of the recommender of docs/recommender.md after an epoch."""
    group = find_peers()
    features = [
        Categorical("user", 500, 8, sparse=True),
        Categorical("item", 300, 8, table="items", sparse=True),
        Bag("watched", 300, 8, table="items", sparse=True),
        Numeric("price"),
    ]
    sized = {"users": 500, "items": 300}
    train, test = ClickRows(96, **sized), ClickRows(64, first=10**6, **sized)
    torch.manual_seed(0)
    trainer = fastmtl.Trainer(
        task_dict=_tasks(),
        weighting="UPGrad",
        architecture=architecture,
        encoder_class=lambda: FeatureEncoder(features, (32, 16)),
        decoders=nn.ModuleDict({task: nn.Linear(16, 1) for task in _tasks()}),
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": "sparseadam", "lr": 0.01},
        scheduler_param=None,
        device="cpu",
    )
    trainer.model.double()
    given, held_out = batch_loader(train, 32, shuffle=True), batch_loader(test, 32)
    if group is not None:
        given, held_out = shard(given, group), shard(held_out, group, whole=True)
    trainer.train(given, held_out, 1)
    return flat(trainer.model.parameters())


@pytest.mark.slow
def test_a_recommender(tmp_path: Path) -> None:
    for of_rank in in_processes(2, tmp_path, _recommend, "ESMM"):
        alone = _recommend("ESMM")
        assert (of_rank - alone).norm() <= 1e-9 * alone.norm()


class _Net(nn.Module):
    """A shared network with tables, and three heads, one of which has a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.heads = Looking(), nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1), heads()["task1"]])

    def forward(self, inputs: Tensor) -> list[Tensor]:
        features = self.shared(inputs)
        return [(head(features) - t).square().mean() for t, head in enumerate(self.heads)]


def _balance(given: list[tuple[str, str]]) -> list[list[Tensor]]:
    """Return dense gradients after two accumulated batches, by aggregator and kind of loop."""
    return [_balance_one(*case) for case in given]


def _balance_one(name: str, kind: str) -> list[Tensor]:
    group, net = find_peers(), _Net()
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    model: Any = DistributedDataParallel(net) if kind == "ddp" and group is not None else net
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        losses = model(torch.randn(12, 6, generator=generator)[rank::size])
        torch.manual_seed(3)
        if kind == "balance":
            fastmtl.balance(losses, shared=net.shared, weighting=name)
        else:
            fastmtl.balanced(losses, shared=net.shared, weighting=name).backward()
    table = net.shared.bags.weight.grad
    assert table is not None
    assert table.is_sparse == (name != "graddrop")
    return [param.grad.to_dense() for param in net.parameters() if param.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_loops_of_ones_own(size: int, tmp_path: Path) -> None:
    cases = [(name, kind) for name in ("upgrad", "mean", "graddrop") for kind in ("balance", "balanced")]
    wanted = _balance(cases)
    for found in in_processes(size, tmp_path, _balance, cases):
        for case, grads, others in zip(cases, found, wanted, strict=True):
            assert len(grads) == len(others)
            for grad, other in zip(grads, others, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12, msg=str(case))


class _Tied(nn.Module):
    """Reads a table as a matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table((x[:, 0] > 0).long()) @ self.table.weight
        return found


class _Unnamed(nn.Module):
    """Looks rows up sparsely by a function, so that no module says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding((x[:, 0] > 0).long(), self.weight, sparse=True)


def _refused(_: None) -> Any:
    group = find_peers()
    assert group is not None
    found = []
    for network in (_Tied, _Unnamed):
        for weighting in ("EW", "MGDA"):
            trainer = make_trainer(weighting, "HPS", TASKS, encoder_class=network, **SGD)
            with pytest.raises(UsageError) as caught:
                trainer.step([next(iter(shard(loaders(TASKS), group)))], StepBuffer())
            found.append(str(caught.value))
    with pytest.raises(UsageError) as caught:
        make_trainer("EW", "HPS", TASKS, encoder_class=Looking, shard="fsdp", **SGD)
    return [*found, str(caught.value)], [_poisoned(weighting) for weighting in ("EW", "MGDA")]


def test_refusals_and_steps_that_are_not_finite(tmp_path: Path) -> None:
    for sentences, stayed in in_processes(2, tmp_path, _refused, None):
        assert all("it needs sparse=False" in sentence for sentence in sentences[:2])
        assert all("those of modules with sparse=True" in sentence for sentence in sentences[2:4])
        assert "FSDP2 cannot shard" in sentences[4]
        assert stayed == [True, True]
