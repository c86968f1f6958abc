"""balance with groups of parameters: a Gram matrix and weights for each, as in the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.aggregation import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    FairGrad,
    GradDrop,
    GradVac,
    GradVacWeighting,
    GramianWeightedAggregator,
    MGDAWeighting,
    NashMTL,
    PCGrad,
    UPGrad,
    Weighting,
)
from fastmtl.errors import UsageError
from tests.trainer.grouped import batches_of, double_trainer
from tests.trainer.toy import fill_grads

TASKS, ROWS = 3, 8
MAKE: dict[str, Callable[[], Any]] = {
    "MGDA": MGDA,
    "PCGrad": PCGrad,
    "CAGrad": lambda: CAGrad(0.5),
    "UPGrad": UPGrad,
    "UPGrad preferring": lambda: UPGrad(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    "NashMTL": lambda: NashMTL(TASKS, max_norm=0.0),
    "IMTLG": IMTLG,
    "FairGrad": lambda: FairGrad(1.0),
    "FairGrad of the mean": lambda: FairGrad(0.0),
    "AlignedMTL": AlignedMTL,
}
# The trainer's names and options of the same rules.
IN_TRAINER: dict[str, tuple[str, dict[str, Any]]] = {
    "MGDA": ("MGDA", {}),
    "PCGrad": ("PCGrad", {}),
    "CAGrad": ("CAGrad", {"rescale": 0}),
    "UPGrad": ("UPGrad", {}),
    "NashMTL": ("Nash_MTL", {"max_norm": 0.0}),
}

pytestmark = pytest.mark.usefixtures("in_float64")


class Net(nn.Module):
    """The first loss does not reach the last layer, and no loss the one that is left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second", "unused", "last")})
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS))

    def losses(self, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = torch.randn(ROWS, 4, generator=generator), torch.randn(ROWS, TASKS, generator=generator)
        middle = self.shared["second"](self.shared["first"](inputs).tanh()).tanh()
        features = [middle, *[self.shared["last"](middle)] * (TASKS - 1)]
        return [
            (head(each)[:, 0] - labels[:, t]).square().mean()
            for t, (head, each) in enumerate(zip(self.heads, features, strict=True))
        ]

    def rows(self, losses: list[Tensor]) -> dict[str, Tensor]:
        """Return the Jacobian (T, P_l) of each layer, by plain autograd."""
        return {name: torch.stack([_row(loss, layer) for loss in losses]) for name, layer in self.shared.items()}


def _row(loss: Tensor, layer: nn.Module) -> Tensor:
    params = list(layer.parameters())
    grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads])


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all draws of orders be the same."""
    keys = torch.rand(TASKS, TASKS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda like: keys.expand_as(like))


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("way", ["balance", "balanced"])
@pytest.mark.parametrize("name", MAKE)
def test_each_group_has_what_the_rule_gives_it_alone(name: str, way: str) -> None:
    """Two calls whose gradients add up, so that what is remembered of each group counts."""
    net, aggregator = Net(), MAKE[name]()
    alone = {layer: MAKE[name]() for layer in net.shared}
    wanted = {layer: torch.zeros(20) for layer in net.shared}
    own = torch.zeros(5 * TASKS)
    for seed in (1, 2):
        for layer, rows in net.rows(net.losses(seed)).items():
            wanted[layer] += alone[layer](rows)
        heads = torch.autograd.grad(sum(net.losses(seed)), list(net.heads.parameters()))
        own += torch.cat([grad.flatten() for grad in heads])
        if way == "balance":
            weights = fastmtl.balance(net.losses(seed), shared=net.shared, weighting=aggregator, groups="layer")
            assert weights is not None
            assert weights.shape == (4, TASKS)
        else:
            fastmtl.balanced(net.losses(seed), shared=net.shared, weighting=aggregator, groups="layer").backward()
    for layer, module in net.shared.items():
        grads = [param.grad for param in module.parameters()]
        if layer == "unused":
            assert grads == [None, None]
        else:
            torch.testing.assert_close(torch.cat([grad.flatten() for grad in grads]), wanted[layer])
    torch.testing.assert_close(torch.cat([param.grad.flatten() for param in net.heads.parameters()]), own)


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("groups", ["module", "layer", {r"stages\.0": "early", ".": "late"}], ids=str)
@pytest.mark.parametrize("name", IN_TRAINER)
def test_the_shared_gradients_are_those_of_the_trainer(name: str, groups: Any) -> None:
    rule, options = IN_TRAINER[name]
    trainer = double_trainer(rule, groups=groups, weight_args=options)
    batches = batches_of(trainer)
    fill_grads(trainer, batches)
    params = list(trainer.model.get_share_params())
    wanted = [param.grad.clone() for param in params]
    for param in trainer.model.parameters():
        param.grad = None
    inputs, labels = batches[0]
    preds = trainer.model(inputs)
    losses = [trainer.task_dict[task]["loss_fn"].compute_loss(preds[task], labels[task]) for task in trainer.task_name]
    weights = fastmtl.balance(losses, shared=trainer.model.encoder, weighting=MAKE[name](), groups=groups)
    assert weights is not None
    assert weights.shape == (len(trainer.model.grouping.names), TASKS)
    for param, want in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad, want, rtol=1e-9, atol=1e-12)


def test_the_cap_of_the_norm_is_that_of_the_whole_update() -> None:
    net = Net()
    fastmtl.balance(net.losses(), shared=net.shared, weighting=NashMTL(TASKS, max_norm=0.01), groups="layer")
    grads = [param.grad for param in net.shared.parameters() if param.grad is not None]
    assert float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()) == pytest.approx(0.01)


class _Doubled(Weighting[Tensor]):
    """A weighting of a user's, which knows nothing of groups."""

    def forward(self, gram: Tensor) -> Tensor:
        assert gram.shape == (TASKS, TASKS)
        return 2 * gram.diagonal() / gram.diagonal().sum().clamp(min=1e-9)


def test_a_weighting_of_ones_own_is_called_for_each_group() -> None:
    net = Net()
    aggregator = GramianWeightedAggregator(_Doubled())
    weights = fastmtl.balance(net.losses(), shared=net.shared, weighting=aggregator, groups="layer")
    squares = torch.stack([rows.square().sum(1) for rows in net.rows(net.losses()).values()])
    torch.testing.assert_close(weights, 2 * squares / squares.sum(1, keepdim=True).clamp(min=1e-9))


class _Normed(MGDAWeighting):
    """A rule of the package that a user has changed, for one Gram matrix."""

    def weigh(self, gram: Tensor) -> Tensor:
        weights = super().weigh(gram)
        return weights / weights.norm()


def test_a_changed_rule_is_called_for_each_group() -> None:
    net = Net()
    weights = fastmtl.balance(
        net.losses(), shared=net.shared, weighting=GramianWeightedAggregator(_Normed()), groups="layer"
    )
    assert weights is not None
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(4))


def test_groups_of_tables_with_sparse_gradients() -> None:
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", sparse=sparse), nn.Linear(4, 4), nn.Tanh())
        head = nn.Linear(4, TASKS)
        losses = head(trunk(torch.tensor([[0, 3], [3, 5]]))).square().mean(0)
        weights = fastmtl.balance(list(losses), shared=trunk, weighting="upgrad", groups="layer")
        assert weights is not None
        assert weights.shape == (2, TASKS)
        grads = [param.grad for param in trunk.parameters()]
        assert grads[0].is_sparse is sparse
        ends.append([weights, *(grad.to_dense() for grad in grads)])
    torch.testing.assert_close(ends[0], ends[1])
    assert not torch.allclose(ends[0][0][0], ends[0][0][1])


def test_patterns_name_groups_and_frozen_layers_keep_theirs() -> None:
    net, patterns = Net(), {"first|second": "early", "last": "late"}
    before = fastmtl.balance(net.losses(), shared=net.shared, groups=patterns)
    net.shared["first"].requires_grad_(requires_grad=False)
    net.shared["second"].requires_grad_(requires_grad=False)
    after = fastmtl.balance(net.losses(), shared=net.shared, groups=patterns)
    assert before is not None
    assert after is not None
    # Early, other, late: nothing of the first two is trained in the second call.
    assert before.shape == after.shape == (3, TASKS)
    torch.testing.assert_close(after[2], before[2])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shared": "parameters"}, "shared parameters without names"),
        ({"shared": "found"}, "shared parameters without names"),
        ({"weighting": GradVac()}, "GradVac, which does not take a Gram matrix for each"),
        (
            {"weighting": GramianWeightedAggregator(GradVacWeighting() << torch.clone)},
            "which does not take a Gram matrix for each",
        ),
        ({"weighting": GradDrop()}, "GradDrop, which does not take a Gram matrix for each"),
        ({"vjps": fastmtl.Layerwise()}, "vjps, which have one Gram matrix"),
        ({"groups": "blocks"}, "groups must be all, module, layer or regular expressions"),
        ({"groups": {"nothing": "a"}}, "'nothing' comes first for none of the shared parameters"),
    ],
    ids=["parameters", "found", "remembering", "composed", "rows", "vjps", "word", "pattern"],
)
def test_what_groups_need_is_said(given: dict[str, Any], said: str) -> None:
    net = Net()
    shared = {"parameters": net.shared.parameters(), "found": None, "module": net.shared}
    options = {"groups": "layer", **given, "shared": shared[given.get("shared", "module")]}
    with pytest.raises(UsageError, match=said):
        fastmtl.balance(net.losses(), **options)
