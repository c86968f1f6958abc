"""Embedding tables, sparse or dense: steps on the touched rows equal those of plain autograd."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

import fastmtl
from fastmtl import aggregation
from fastmtl.autojac import jac_to_grad, mtl_backward
from fastmtl.engine.tables import TableVJP, table_uses
from fastmtl.errors import UsageError
from fastmtl.trainer.optim.masking import MaskedOptimizer
from fastmtl.trainer.optim.tables import SparseAdam
from fastmtl.trainer.setup.combinations import check_distributed
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.weighting import WEIGHTINGS
from tests.aggregation.test_aggregators import ALL as AGGREGATORS
from tests.trainer.toy import flat, loaders, make_trainer

# Those that keep numbers of the size of the table for each task.
KEEPERS = [name for name, strategy in WEIGHTINGS.items() if strategy.needs == "rows"]
OTHERS = [name for name, strategy in WEIGHTINGS.items() if strategy.needs in ("losses", "gram")]
REPS = [name for name, strategy in WEIGHTINGS.items() if strategy.needs == "reps"]
BILEVEL = [name for name, strategy in WEIGHTINGS.items() if strategy.needs == "lookahead"]
ROWS = 60


class Tables(nn.Module):
    """A table of bags, and one of which two look-ups are taken; by plain indexing, or as modules."""

    def __init__(self, sparse: bool | None) -> None:
        super().__init__()
        self.plain = sparse is None
        self.bags = nn.EmbeddingBag(ROWS, 8, mode="mean", sparse=bool(sparse))
        self.single = nn.Embedding(ROWS, 8, sparse=bool(sparse))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 37).long() % ROWS
        if self.plain:
            looked = self.bags.weight[ids].mean(1) + self.single.weight[ids[:, 0]] * self.single.weight[ids[:, 1]]
        else:
            looked = self.bags(ids) + self.single(ids[:, 0]) * self.single(ids[:, 1])
        return torch.tanh(self.out(looked))


def train(kind: bool | None, weighting: Any = "MGDA", **options: Any) -> Any:
    sgd = {"optim_param": {"optim": "sgd", "lr": 0.3}}
    options = ({} if weighting == "MConFIG" else sgd) | options
    rows = options.pop("rows", 24)
    trainer = make_trainer(weighting, encoder_class=partial(Tables, kind), count=3, **options)
    torch.manual_seed(1)
    random.seed(1)
    trainer.train(loaders(3, rows=rows), loaders(3), 2)
    return trainer


def agree(one: Any, other: Any, **tolerance: float) -> None:
    for (name, value), want in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, want, msg=name, **(tolerance or {"rtol": 1e-6, "atol": 1e-9}))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighting", [*OTHERS, *REPS, *BILEVEL])
def test_steps_equal_those_of_plain_autograd(weighting: str, sparse: bool) -> None:
    options: dict[str, Any] = {"rep_grad": weighting in REPS}
    if weighting in BILEVEL:
        # The task weights move far, from 1/3 to 0.6 and less than 0.1.
        options |= {"weight_args": {"outer_lr": 0.5}, "rows": 48}
    if sparse:
        agree(train(True, weighting, **options), train(False, weighting, **options), rtol=1e-9, atol=1e-12)
    else:
        agree(train(False, weighting, **options), train(None, weighting, **options))


def test_every_strategy_is_trained_on_tables_or_refused() -> None:
    assert {*OTHERS, *REPS, *BILEVEL, *KEEPERS} == set(WEIGHTINGS)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"clip_grad_norm": 0.01},
        {"update_weights_every": 2},
        {"weight_momentum": 0.5},
        {"optim_param": {"optim": "sgd", "lr": 0.1, "momentum": 0.9}},
        {"optim_param": {"optim": "adagrad", "lr": 0.1}},
        {"rows": 22},
        {"tasks_per_step": 2},
        {"vjps": "batched"},
        {"vjps": "layerwise"},
        {"rep_grad": True},
        {"architecture": "MMoE", "arch_args": {"num_experts": [2], "img_size": [6]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("sparse", [False, True])
def test_options_go_with_tables(options: dict[str, Any], sparse: bool) -> None:
    agree(train(sparse, **options), train(None, **options))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
def test_dense_optimizers_keep_their_meaning(weighting: str) -> None:
    adam = {"optim_param": {"optim": "adam", "lr": 0.05, "weight_decay": 0.01}}
    agree(train(False, weighting, **adam), train(None, weighting, **adam))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("weighting", KEEPERS)
def test_strategies_with_state_of_the_tables_size(weighting: str) -> None:
    agree(train(False, weighting), train(None, weighting))
    with pytest.raises(UsageError, match=f"{weighting} keeps .* sparse=False"):
        train(True, weighting)


def test_sparse_adam_moves_the_touched_rows_only() -> None:
    options = {"optim_param": {"optim": "sparseadam", "lr": 0.1}}
    for weighting in ("EW", "UPGrad"):
        trainer = make_trainer(weighting, encoder_class=partial(Tables, True), count=3, **options)
        table = trainer.model.encoder.bags.weight
        start = table.detach().clone()
        data = loaders(3, rows=8)
        trainer.train(data, data, 1)
        ids = ((next(iter(data))[0].abs() * 37).long() % ROWS).unique()
        moved = (table.detach() != start).any(1).nonzero().squeeze(1)
        assert torch.equal(moved, ids)
        # The first step of Adam has the learning rate's length in each entry.
        torch.testing.assert_close(
            (table.detach() - start)[ids].abs(), torch.full((len(ids), 8), 0.1), rtol=0.1, atol=0
        )
        assert trainer.optimizer.state[trainer.model.encoder.out.weight]["step"] == 1


def test_sparse_adam_is_torchs_for_sparse_and_adam_for_dense_gradients() -> None:
    table, dense = torch.randn(6, 2), torch.randn(3)
    params = [nn.Parameter(each.clone()) for each in (table, dense)] + [
        nn.Parameter(each.clone()) for each in (table, dense)
    ]
    ours = SparseAdam(params[:2], lr=0.1)
    theirs = torch.optim.SparseAdam([params[2]], lr=0.1), torch.optim.Adam([params[3]], lr=0.1)
    for step in range(3):
        grads = [
            torch.sparse_coo_tensor([[step, 5, step]], torch.randn(3, 2), (6, 2), check_invariants=True),
            torch.randn(3),
        ]
        for index, param in enumerate(params):
            param.grad = grads[index % 2].clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for one, other in zip(params[:2], params[2:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("optim", ["sgd", "sparseadam", "adagrad"])
def test_a_step_that_is_not_finite_changes_no_table(optim: str) -> None:
    trainer = make_trainer(
        "MGDA", encoder_class=partial(Tables, True), count=3, optim_param={"optim": optim, "lr": 0.1}
    )
    data = loaders(3, rows=8)
    trainer.train(data, data, 1)
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.step.guard.found_inf.fill_(1)
    trainer.model.encoder.bags(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
    trainer.step.optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(
    ("optim", "setting"),
    [
        ("sgd", {"weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "dampening": 0.5}),
        ("adagrad", {"weight_decay": 0.1}),
        ("sparseadam", {"weight_decay": 0.1}),
        ("sparseadam", {"amsgrad": True}),
    ],
)
def test_what_no_optimizer_can_do_with_tables_is_refused(optim: str, setting: dict[str, Any], groups: bool) -> None:
    encoder = partial(Tables, True)
    settings = {"params": {"encoder": setting}} if groups else setting
    message = f"{list(setting)[-1]} of {optim}.* must be .* in a group with sparse gradients .encoder.bags.weight."
    with pytest.raises(UsageError, match=f"(?i){message}"):
        make_trainer("EW", encoder_class=encoder, optim_param={"optim": optim, "lr": 0.1, **settings})
    # Other parameters may have it.
    for elsewhere in ({"params": {"encoder.out": setting, "decoders": setting}}, {"momentum": 0.5}):
        if "momentum" not in elsewhere or optim == "sgd":
            make_trainer("EW", encoder_class=encoder, optim_param={"optim": optim, "lr": 0.1, **elsewhere})


@pytest.mark.parametrize("setting", [{"weight_decay": 0.1}, {"amsgrad": True}])
def test_sparse_adam_itself_refuses_what_it_would_leave_out(setting: dict[str, Any]) -> None:
    table, dense = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))
    optimizer = SparseAdam([table, dense], lr=0.1, **setting)
    dense.grad = torch.ones(3)
    optimizer.step()
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    before = dense.detach().clone()
    with pytest.raises(UsageError, match=f"{next(iter(setting))} of SparseAdam must be"):
        optimizer.step()
    assert torch.equal(dense, before)


@pytest.mark.parametrize("optim", ["sgd", "sparseadam", "adagrad"])
def test_steps_on_tables_are_the_same_on_other_devices(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"optim_param": {"optim": optim, "lr": 0.1, **({"momentum": 0.9} if optim == "sgd" else {})}}
    here = train(True, **options)
    elsewhere = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(MaskedOptimizer, "on_host", elsewhere, raising=False)
    agree(here, train(True, **options), rtol=0, atol=0)


def test_shards_and_strategies_that_remember_rows_take_no_sparse_table() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, 8, sparse=True), nn.Linear(8, 3)

        def forward(self, rep: Tensor) -> Tensor:
            out: Tensor = self.out(rep + self.table((rep[:, 0] > 0).long()))
            return out

    heads = nn.ModuleDict({"task0": Head(), "task1": nn.Linear(8, 1)})
    trainer = make_trainer("EW", decoders=heads, optim_param={"optim": "sgd", "lr": 0.1})
    check_distributed(trainer.model, "EW", StepOptions())
    with pytest.raises(UsageError, match=r"FSDP2 cannot .* \(sparse=False for decoders.task0.table.weight\)"):
        check_distributed(trainer.model, "EW", StepOptions(shard="fsdp"))
    # Strategies that keep numbers of shared parameters do not look at it.
    make_trainer("MoCo", decoders=heads, optim_param={"optim": "sgd", "lr": 0.1})


@pytest.mark.parametrize("optim", ["rmsprop", "adam", "adamw"])
def test_an_optimizer_without_sparse_gradients_names_those_that_have_them(optim: str) -> None:
    with pytest.raises(UsageError, match=f"{optim} takes no sparse gradients.*sgd, adagrad or sparseadam"):
        make_trainer("EW", encoder_class=partial(Tables, True), optim_param={"optim": optim, "lr": 0.1})
    table = nn.Parameter(torch.ones(4, 2))
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        getattr(torch.optim, {"rmsprop": "RMSprop", "adam": "Adam", "adamw": "AdamW"}[optim])([table]).step()


def test_rows_are_undone_where_the_flag_cannot_be_read() -> None:
    trainer = make_trainer(
        "MGDA", encoder_class=partial(Tables, True), count=3, optim_param={"optim": "sparseadam", "lr": 0.1}
    )
    data = loaders(3, rows=8)
    trainer.train(data, data, 1)
    masked = trainer.step.optimizer
    masked.on_host = False
    kept = {id(param): param.detach().clone() for param in trainer.model.parameters()}
    moments = trainer.optimizer.state[trainer.model.encoder.bags.weight]["exp_avg"]
    before = moments.clone()
    table = trainer.model.encoder.bags.weight
    for flag, moves in ((1.0, False), (0.0, True)):
        trainer.optimizer.zero_grad()
        trainer.step.guard.found_inf.fill_(flag)
        trainer.model.encoder.bags(torch.tensor([[1, 2, 1]])).square().sum().backward()
        masked.step()
        assert torch.equal(table, kept[id(table)]) != moves
        assert torch.equal(moments, before) != moves


def test_the_table_has_no_dense_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither gradients nor undone steps nor comparisons make one.
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a dense copy")

    monkeypatch.setattr(Tensor, "to_dense", refuse)
    for weighting in ("EW", "MGDA", "PCGrad", "UPGrad"):
        trainer = train(True, weighting)
        assert trainer.model.encoder.bags.weight.grad.is_sparse


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("sparse", "optim"),
    [
        (False, {"optim": "adam", "lr": 0.1}),
        (True, {"optim": "sparseadam", "lr": 0.1}),
        # What is remembered of each row is sparse too.
        (True, {"optim": "sgd", "lr": 0.1, "momentum": 0.9}),
    ],
)
def test_resuming_is_exact(sparse: bool, optim: dict[str, Any], tmp_path: Any) -> None:
    make = partial(make_trainer, "UPGrad", encoder_class=partial(Tables, sparse), count=3, optim_param=optim)
    make(save_path=str(tmp_path)).train(loaders(3), loaders(3), 1)
    resumed, whole = make(resume=str(tmp_path / "last.pt")), make()
    for trainer in (resumed, whole):
        trainer.train(loaders(3), loaders(3), 2)
    agree(resumed, whole, rtol=0, atol=0)


# What a look-up may be; each is compared with autograd's gradient.
def _bag(mode: str, **options: Any) -> Any:
    return lambda weight, ids: nn.functional.embedding_bag(ids, weight, mode=mode, **options)


def _ragged(weight: Tensor, ids: Tensor) -> Tensor:
    offsets = torch.tensor([0, 0, 3, 3, 7, 12])
    return nn.functional.embedding_bag(ids.flatten(), weight, offsets, mode="mean")


def _weighted(weight: Tensor, ids: Tensor) -> Tensor:
    scale = torch.linspace(-1, 2, ids.numel(), dtype=weight.dtype).view(ids.shape)
    return nn.functional.embedding_bag(ids, weight, mode="sum", per_sample_weights=scale, sparse=True)


LOOKUPS = {
    "plain": lambda weight, ids: nn.functional.embedding(ids, weight),
    "sparse": lambda weight, ids: nn.functional.embedding(ids, weight, sparse=True),
    "padding": lambda weight, ids: nn.functional.embedding(ids, weight, padding_idx=2),
    "padding from the end": lambda weight, ids: nn.functional.embedding(ids, weight, padding_idx=-1),
    "sum": _bag("sum"),
    "sparse sum": _bag("sum", sparse=True),
    "mean": _bag("mean"),
    "padded sum": _bag("sum", padding_idx=2),
    "padded mean": _bag("mean", padding_idx=2),
    "sparse padded mean": _bag("mean", padding_idx=2, sparse=True),
    "ragged": _ragged,
    "weighted": _weighted,
    "int32": lambda weight, ids: nn.functional.embedding(ids.int(), weight),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_every_look_up_is_understood(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 3, dtype=torch.float64, requires_grad=True, generator=generator)
    ids = torch.randint(4, (3, 5), generator=generator)
    ids[1] = 39
    ids[2] = 2
    looked = LOOKUPS[name](weight, ids)
    outputs = [looked.square().sum() + LOOKUPS[name](weight, ids + 0).sum(), looked.sin().sum()]
    vjp = TableVJP(outputs, [weight])
    assert list(vjp.tables) == [weight]
    for output in outputs:
        (want,) = torch.autograd.grad(output, weight, retain_graph=True)
        (got,) = vjp([output], [None], [weight], True)
        assert got is not None
        assert got.is_sparse
        assert got.is_coalesced()
        torch.testing.assert_close(got.to_dense(), want.to_dense())
    assert vjp([looked], [None], [weight], True) == [None]


@pytest.mark.parametrize(
    "look_up",
    [
        lambda weight, ids: nn.functional.embedding_bag(ids, weight, mode="max"),
        lambda weight, ids: nn.functional.embedding(ids, weight, scale_grad_by_freq=True),
        lambda weight, ids: nn.functional.embedding(ids, weight) @ weight.mT,
        lambda weight, ids: nn.functional.embedding(ids, weight * 2),
        lambda weight, ids: nn.functional.embedding(ids.repeat(40, 1), weight),
        lambda weight, ids: torch.cat([nn.functional.embedding(ids, weight, sparse=s) for s in (True, False)]),
    ],
)
def test_other_uses_of_a_table_are_left_to_autograd(look_up: Any) -> None:
    weight = torch.randn(40, 3, requires_grad=True)
    assert table_uses([look_up(weight, torch.tensor([[1, 2]]))], [weight]) == {}


def test_a_hooked_table_is_left_to_autograd() -> None:
    weight = torch.randn(40, 3, requires_grad=True)
    weight.register_hook(lambda grad: grad * 2)
    assert table_uses([nn.functional.embedding(torch.tensor([1]), weight)], [weight]) == {}


def test_edges_pass_through() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    product = weight * 2
    (got,) = TableVJP([product], [weight])([product.sum()], [None], [GradientEdge(product.grad_fn, 0)], False)
    assert got is not None
    assert torch.equal(got, torch.ones(4, 3))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("weighting", ["mgda", "upgrad", "pcgrad", "mean", "graddrop"])
def test_balance_takes_sparse_gradients(weighting: str) -> None:
    grads = []
    for kind in (None, True):
        torch.manual_seed(0)
        net = Tables(kind)
        heads = [nn.Linear(8, 1) for _ in range(2)]
        inputs = torch.randn(8, 6)
        for _ in range(2):
            features = net(inputs)
            torch.manual_seed(3)
            fastmtl.balance([head(features).square().mean() for head in heads], shared=net, weighting=weighting)
        grads.append([param.grad for param in net.parameters()])
        if kind:
            assert net.bags.weight.grad.is_sparse or weighting == "graddrop"
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other.to_dense())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
def test_steps_of_balance_equal_those_of_the_dense_network(aggregator: aggregation.Aggregator) -> None:
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net, heads, own = Tables(sparse), nn.ModuleList(nn.Linear(8, 1) for _ in range(3)), deepcopy(aggregator)
        optimizer = torch.optim.SGD([*net.parameters(), *heads.parameters()], lr=0.3)
        inputs = torch.randn(3, 8, 6)
        for batch in inputs:
            features = net(batch)
            losses = [(head(features) - t).square().mean() for t, head in enumerate(heads)]
            optimizer.zero_grad()
            fastmtl.balance(losses, shared=net, weighting=own)
            optimizer.step()
        found.append(flat(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("aggregator", ["UPGrad", "Mean", "GradDrop", "ConFIG"])
def test_mtl_backward_takes_sparse_gradients(aggregator: str) -> None:
    grads = []
    for kind in (None, True):
        torch.manual_seed(0)
        net = Tables(kind)
        heads = [nn.Linear(8, 1) for _ in range(2)]
        features = net(torch.randn(8, 6))
        mtl_backward([head(features).square().mean() for head in heads], features=features)
        if kind:
            assert net.bags.weight.jac.is_sparse
        torch.manual_seed(3)
        jac_to_grad(net.parameters(), getattr(aggregation, aggregator)())
        grads.append([param.grad for param in net.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other.to_dense())


def test_all_parameters_move() -> None:
    trainer = make_trainer(
        "MGDA", encoder_class=partial(Tables, True), count=3, optim_param={"optim": "sgd", "lr": 0.3}
    )
    before = flat(trainer.model.parameters())
    trainer.train(loaders(3), loaders(3), 1)
    assert not torch.equal(before, flat(trainer.model.parameters()))
