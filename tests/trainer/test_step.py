"""A training step: right gradients on every route, and nothing read on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.architecture import HPS
from fastmtl.engine.engine import LossEngine
from fastmtl.engine.methods.representation import Representation
from fastmtl.engine.methods.split import Split
from fastmtl.engine.methods.whole import Whole
from fastmtl.errors import UsageError
from fastmtl.loss import MSELoss
from fastmtl.ops import combine, gram, min_norm
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import AbsWeighting
from tests.host_reads import NoHostRead
from tests.trainer.toy import encoder, flat, loaders, make_trainer, task_dict


class OnePiece(HPS):
    """An architecture in LibMTL's way: its forward is not made of trunk and branch."""

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        rep = self.encoder(inputs)
        tasks = self.task_name if task_name is None else [task_name]
        return {t: self.decoders[t](self._prepare_rep(rep, t, not self.multi_input)) for t in tasks}


def _batch(multi_input: bool = False, count: int = 2) -> tuple[Any, Any]:
    if not multi_input:
        return next(iter(loaders(count)))
    batches = {task: next(iter(loader)) for task, loader in loaders(count, multi_input=True).items()}
    return {t: b[0] for t, b in batches.items()}, {t: b[1] for t, b in batches.items()}


def _task_gradients(trainer: Trainer, inputs: Any, labels: Any) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    """The rows and the sum of the task-specific gradients, by one plain backward pass per task."""
    problem = trainer.step.problem
    rows = []
    for task in problem.tasks:
        if trainer.multi_input:
            loss, _ = problem.single(inputs[task], labels[task], task)
        else:
            loss = problem.whole(inputs, labels)[0][problem.tasks.index(task)]
        rows.append(torch.autograd.grad(loss, [*problem.shared_params, *problem.task_params], allow_unused=True))
    shared = len(problem.shared_params)
    own = []
    for column in zip(*(row[shared:] for row in rows), strict=True):
        found = [grad for grad in column if grad is not None]
        own.append(torch.stack(found).sum(0) if found else None)
    return [list(row[:shared]) for row in rows], own


@pytest.mark.parametrize(
    ("architecture", "multi_input", "route"),
    [
        ("HPS", False, Split),
        ("MTAN", False, Split),
        (OnePiece, False, Whole),
        ("HPS", True, Whole),
        ("MTAN", True, Whole),
        (OnePiece, True, Whole),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mgda_update_is_the_min_norm_combination(architecture: Any, multi_input: bool, route: type, count: int) -> None:
    trainer = make_trainer(
        "MGDA", architecture, count, multi_input=multi_input, optim_param={"optim": "sgd", "lr": 0.0}
    )
    inputs, labels = _batch(multi_input, count)
    assert type(trainer.step.engine.method) is route
    rows, own = _task_gradients(trainer, inputs, labels)
    expected = combine(rows, min_norm(gram(rows)))
    trainer.step([(inputs, labels)], StepBuffer())
    for param, want in zip(trainer.step.problem.shared_params, expected, strict=True):
        torch.testing.assert_close(param.grad, want)
    for param, want in zip(trainer.step.problem.task_params, own, strict=True):
        assert (param.grad is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(param.grad, want)


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize("architecture", ["HPS", "MTAN", OnePiece])
def test_ew_update_is_the_sum_of_gradients(architecture: Any, multi_input: bool, rep_grad: bool) -> None:
    trainer = make_trainer(
        "EW", architecture, multi_input=multi_input, rep_grad=rep_grad, optim_param={"optim": "sgd", "lr": 0.0}
    )
    inputs, labels = _batch(multi_input)
    assert type(trainer.step.engine) is LossEngine
    rows, _ = _task_gradients(trainer, inputs, labels)
    trainer.step([(inputs, labels)], StepBuffer())
    for k, param in enumerate(trainer.step.problem.shared_params):
        torch.testing.assert_close(param.grad, rows[0][k] + rows[1][k])
    assert all(param.grad.abs().sum() > 0 for param in trainer.step.problem.shared_params)


@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize("architecture", ["HPS", "MTAN", OnePiece])
def test_rep_grad_weights_the_representation_gradients(architecture: Any, multi_input: bool) -> None:
    options = {"multi_input": multi_input, "optim_param": {"optim": "sgd", "lr": 0.0}}
    trainer = make_trainer("MGDA", architecture, rep_grad=True, **options)
    assert isinstance(trainer.step.engine.method, Representation)
    inputs, labels = _batch(multi_input)
    buffer = StepBuffer()
    trainer.step([(inputs, labels)], buffer)
    records = buffer.flush(0, 1)
    assert records.weights is not None
    weights = torch.from_numpy(records.weights[0]).float()
    plain = make_trainer("MGDA", architecture, **options)
    plain.model.load_state_dict(trainer.model.state_dict())
    rows, own = _task_gradients(plain, inputs, labels)
    # The weights come from the representations, the update is the same combination of the parameters' gradients.
    for k, param in enumerate(trainer.step.problem.shared_params):
        torch.testing.assert_close(param.grad, weights[0] * rows[0][k] + weights[1] * rows[1][k])
    decoders = {id(param) for param in trainer.model.decoders.parameters()}
    for param, want in zip(trainer.step.problem.task_params, own, strict=True):
        if id(param) in decoders:
            torch.testing.assert_close(param.grad, want)


def test_rep_grad_refuses_representations_of_different_size() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.first(x), self.second(x)]

    decoders = nn.ModuleDict({"task0": nn.Linear(8, 3), "task1": nn.Linear(5, 1)})
    trainer = make_trainer(encoder_class=Uneven, decoders=decoders, rep_grad=True)
    with pytest.raises(ValueError, match=r"representations of one size.*task0: \(8, 8\), task1: \(8, 5\)"):
        trainer.step([_batch()], StepBuffer())


@pytest.mark.parametrize("gn", ["none", "l2", "loss", "loss+"])
def test_mgda_normalisations(gn: str) -> None:
    trainer = make_trainer(optim_param={"optim": "sgd", "lr": 0.0}, weight_args={"mgda_gn": gn})
    inputs, labels = _batch()
    rows, _ = _task_gradients(trainer, inputs, labels)
    losses = [loss.item() for loss in trainer.step.problem.whole(inputs, labels)[0]]
    sizes = []
    for row, loss in zip(rows, losses, strict=True):
        norm = flat(row).norm().item()
        sizes.append({"none": 1.0, "l2": norm, "loss": loss, "loss+": loss * norm}[gn])
    scaled = [[grad / size for grad in row] for row, size in zip(rows, sizes, strict=True)]
    expected = combine(scaled, min_norm(gram(scaled)))
    trainer.step([(inputs, labels)], StepBuffer())
    for param, want in zip(trainer.step.problem.shared_params, expected, strict=True):
        torch.testing.assert_close(param.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize("optim", ["sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_a_step_reads_nothing_on_the_host(weighting: str, rep_grad: bool, multi_input: bool, optim: str) -> None:
    trainer = make_trainer(
        weighting, rep_grad=rep_grad, multi_input=multi_input, optim_param={"optim": optim, "lr": 1e-3}
    )
    inputs, labels = _batch(multi_input)
    buffer = StepBuffer()
    trainer.step([(inputs, labels)], buffer)
    with NoHostRead():
        losses, (preds,) = trainer.step([(inputs, labels)], buffer)
        trainer.meter.update(losses, preds, labels)
    assert len(buffer) == 2


def test_no_host_reads_fails_on_item() -> None:
    with NoHostRead(), pytest.raises(AssertionError, match="read on the host"):
        torch.ones(()).item()


def test_frozen_and_unused_parameters() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 8)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.used(x))

    trainer = make_trainer(encoder_class=Partly)
    trainer.step([_batch()], StepBuffer())
    encoder: Any = trainer.model.encoder
    assert encoder.used.weight.grad is not None
    assert encoder.unused.weight.grad is None
    assert encoder.frozen.weight.grad is None


class LibMTLStyle(AbsWeighting):
    """The weighting of LibMTL's manual, chapter 9: it overrides backward."""

    def backward(self, losses: Tensor, **kwargs: Any) -> np.ndarray:
        grads = self._get_grads(losses, mode="backward")
        if self.rep_grad:
            per_grads, grads = grads
        weights = torch.full((self.task_num,), kwargs["size"]).to(self.device)
        if self.rep_grad:
            self._backward_new_grads(weights, per_grads=per_grads)
        else:
            self._backward_new_grads(weights, grads=grads)
        return weights.cpu().numpy()


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("multi_input", [False, True])
def test_a_strategy_written_for_libmtl(rep_grad: bool, multi_input: bool) -> None:
    options: dict[str, Any] = {
        "rep_grad": rep_grad,
        "multi_input": multi_input,
        "optim_param": {"optim": "sgd", "lr": 0.0},
        "weight_args": {"size": 0.5},
    }
    trainer = make_trainer(LibMTLStyle, **options)
    inputs, labels = _batch(multi_input)
    plain = make_trainer("EW", multi_input=multi_input)
    rows, own = _task_gradients(plain, inputs, labels)
    buffer = StepBuffer()
    trainer.step([(inputs, labels)], buffer)
    for k, param in enumerate(trainer.step.problem.shared_params):
        torch.testing.assert_close(param.grad, 0.5 * (rows[0][k] + rows[1][k]))
    for param, want in zip(trainer.step.problem.task_params, own, strict=True):
        torch.testing.assert_close(param.grad, want)
    records = buffer.flush(0, 1)
    assert records.weights is not None
    np.testing.assert_allclose(records.weights, [[0.5, 0.5]])


def test_a_backward_that_leaves_the_encoder_out_is_refused() -> None:
    class Losses(AbsWeighting):
        def backward(self, losses: Tensor, **kwargs: Any) -> np.ndarray:
            losses.sum().backward()
            return np.ones(self.task_num)

    with pytest.raises(UsageError, match="Losses leaves the shared parameters without gradients"):
        make_trainer(Losses, rep_grad=True).step([_batch()], StepBuffer())
    trainer = make_trainer(Losses)
    trainer.step([_batch()], StepBuffer())
    assert all(param.grad is not None for param in trainer.step.problem.shared_params)


def test_rep_grad_without_prepare_rep_is_refused() -> None:
    class Forgetful(OnePiece):
        def _prepare_rep(self, rep: Any, task: str, same_rep: Any = None) -> Any:
            return rep

    with pytest.raises(UsageError, match="rep_grad must be False for Forgetful"):
        make_trainer("MGDA", Forgetful, rep_grad=True).step([_batch()], StepBuffer())


def test_backward_alone_limits_the_norm_as_the_trainer_does() -> None:
    inputs, labels = _batch()
    trainer = make_trainer("Nash_MTL", weight_args={"max_norm": 1e-3})
    losses = trainer.step.problem.whole(inputs, labels)[0]
    trainer.model.backward(torch.stack(list(losses)), **trainer.kwargs["weight_args"])
    norm = torch.cat([param.grad.flatten() for param in trainer.step.problem.shared_params]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
@pytest.mark.parametrize("rep_grad", [False, True])
def test_backward_called_as_libmtl_does(weighting: str, rep_grad: bool) -> None:
    """A loop of the user's own, around the model alone."""
    inputs, labels = _batch()
    stepped = make_trainer(weighting, rep_grad=rep_grad, optim_param={"optim": "sgd", "lr": 0.0})
    stepped.step([(inputs, labels)], StepBuffer())
    trainer = make_trainer(weighting, rep_grad=rep_grad)
    losses, _ = trainer.step.problem.whole(inputs, labels)
    weights = trainer.model.backward(torch.stack(list(losses)), **trainer.kwargs["weight_args"])
    assert weights.shape == (2,)
    for got, want in zip(trainer.model.parameters(), stepped.model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_a_second_look_at_a_batch_leaves_no_trace_in_batch_norms(options: dict[str, Any]) -> None:
    found = []
    for name in ("EW", "FAMO"):
        trainer = make_trainer(name, encoder_class=lambda: nn.Sequential(encoder(), nn.BatchNorm1d(8)), **options)
        trainer.step([_batch()] * trainer.step.batches, StepBuffer())
        found.append({key: value for key, value in trainer.model.named_buffers() if "encoder" in key})
    assert found[0].keys() == found[1].keys() != set()
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


class _Odd(MSELoss):
    """A mean squared error in another shape or dtype."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Any:
        return self.change(super().compute_loss(pred, gt))


def _with_loss(change: Callable[[Tensor], Any], weighting: str) -> Any:
    tasks = task_dict()
    tasks["task1"]["loss_fn"] = _Odd(change)
    return make_trainer(weighting, task_dict=tasks)


ODD: dict[str, Callable[[Tensor], Any]] = {
    "one entry": lambda loss: loss.reshape(1),
    "float64": lambda loss: loss.double(),
}


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "UW", "IMTL", "FAMO", "MoCo", "Nash_MTL"])
@pytest.mark.parametrize("odd", ODD)
def test_losses_of_other_shapes_and_dtypes(odd: str, weighting: str) -> None:
    found = []
    for change in (ODD[odd], lambda loss: loss):
        trainer = _with_loss(change, weighting)
        trainer.train(loaders(), loaders(), 1)
        found.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
@pytest.mark.parametrize(
    ("change", "got"),
    [(lambda loss: loss.expand(4), r"shape \(4,\)"), (lambda loss: 0.5, "float")],
    ids=["four", "float"],
)
def test_a_loss_that_is_no_scalar_is_refused(change: Callable[[Tensor], Any], got: str, weighting: str) -> None:
    trainer = _with_loss(change, weighting)
    with pytest.raises(UsageError, match=f"compute_loss of _Odd, the loss of task1, must return a scalar.*got {got}"):
        trainer.train(loaders(), loaders(), 1)


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "Nash_MTL", "UPGrad"])
def test_a_loss_that_depends_on_nothing_takes_no_part(weighting: str) -> None:
    trainer = _with_loss(lambda loss: torch.zeros(()), weighting)
    before = [param.clone() for param in trainer.model.decoders["task1"].parameters()]
    trainer.train(loaders(), loaders(), 1)
    assert all(map(torch.equal, before, trainer.model.decoders["task1"].parameters()))
    assert flat(trainer.model.parameters()).isfinite().all()


@pytest.mark.parametrize(("weighting", "options"), [("IMTL", {}), ("MGDA", {"architecture": OnePiece}), ("EW", {})])
def test_predictions_keep_no_activations(weighting: str, options: dict[str, Any]) -> None:
    trainer = make_trainer(weighting, **options)
    trainer.model.epoch = 0
    _, (preds,) = trainer.step([next(iter(loaders()))], StepBuffer())
    assert [pred.grad_fn for pred in preds.values()] == [None, None]


def test_inputs_of_their_own_are_differentiated_task_by_task() -> None:
    alive: list[int] = []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            alive.append(alive[-1] + 1 if alive else 1)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            alive.append(alive[-1] - 1)
            return grads[0]

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, x: Tensor) -> Any:
            return Kept.apply(self.inner(x))

    trainer = make_trainer("MGDA", count=4, multi_input=True, encoder_class=Counting)
    batches = {task: next(iter(loader)) for task, loader in loaders(4, multi_input=True).items()}
    inputs, labels = ({task: batch[i] for task, batch in batches.items()} for i in (0, 1))
    # The first step finds out what the graphs have in common.
    trainer.step([(inputs, labels)], StepBuffer())
    alive.clear()
    trainer.step([(inputs, labels)], StepBuffer())
    assert alive == [1, 0] * 4


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "Nash_MTL"])
def test_what_is_unfrozen_between_epochs_is_trained(weighting: str) -> None:
    trainer = make_trainer(weighting, update_weights_every=1, optim_param={"optim": "sgd", "lr": 0.05})
    first: Any = trainer.model.encoder.get_submodule("stages.0")
    first.requires_grad_(False)
    trainer.train(loaders(), loaders(), 1)
    kept = flat(first.parameters())
    trainer.train(loaders(), loaders(), 1)
    assert torch.equal(flat(first.parameters()), kept)
    first.requires_grad_(True)
    trainer.train(loaders(), loaders(), 1)
    assert not torch.equal(flat(first.parameters()), kept)


@pytest.mark.parametrize(
    ("weighting", "args", "reason"),
    [("MoCo", {}, "MoCo remembers gradients"), ("GradVac", {"GradVac_group_type": 1}, "GradVac makes groups")],
)
def test_what_is_kept_is_kept_of_the_same_parameters(weighting: str, args: dict[str, Any], reason: str) -> None:
    def frozen() -> nn.Module:
        network = encoder()
        next(network.parameters()).requires_grad_(False)
        return network

    trainer = make_trainer(weighting, encoder_class=frozen, weight_args=args)
    first, last = list(trainer.model.encoder.parameters())[::3]
    trainer.train(loaders(), loaders(), 1)
    for param in (last, *trainer.model.decoders["task0"].parameters()):
        param.requires_grad_(False)
    kept = last.clone()
    trainer.train(loaders(), loaders(), 1)
    assert torch.equal(last, kept)
    last.requires_grad_(True)
    trainer.train(loaders(), loaders(), 1)
    assert not torch.equal(last, kept)
    first.requires_grad_(True)
    with pytest.raises(UsageError, match=f"Parameters require gradients that did not before, and {reason}"):
        trainer.train(loaders(), loaders(), 1)


def test_a_rule_of_libmtls_leaves_frozen_layers_where_they_are() -> None:
    trainer = make_trainer(LibMTLStyle, weight_args={"size": 0.5})
    trainer.train(loaders(), loaders(), 1)
    frozen: Any = trainer.model.encoder.get_submodule("stages.0")
    frozen.requires_grad_(False)
    kept = flat(frozen.parameters())
    trainer.train(loaders(), loaders(), 1)
    assert torch.equal(flat(frozen.parameters()), kept)


@pytest.mark.parametrize("optim", ["adam", "adamw", "rmsprop"])
def test_optimizers_that_take_no_sparse_gradients_say_so(optim: str) -> None:
    with pytest.raises(UsageError, match=f"{optim} takes no sparse gradients"):
        make_trainer("EW", encoder_class=_Sparse, optim_param={"optim": optim, "lr": 0.05})


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8, sparse=True)

    def forward(self, x: Tensor) -> Any:
        return self.table(x.abs().long() % 5).sum(1)


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


@pytest.mark.parametrize("kind", [_Sparse, _Complex])
def test_gradients_that_fused_optimizers_do_not_take(kind: type[nn.Module]) -> None:
    trainer = make_trainer("EW", encoder_class=kind, optim_param={"optim": "sgd", "lr": 0.05})
    before = [param.clone() for param in trainer.model.encoder.parameters()]
    trainer.train(loaders(), loaders(), 1)
    assert not any(map(torch.equal, before, trainer.model.encoder.parameters()))
