"""Physics-informed networks: exact solutions, derivatives, and training by every way of taking VJPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmtl import Trainer, aggregation, data
from fastmtl.data.pinns import EQUATIONS, Points, RelativeError
from fastmtl.model import PhysicsEncoder
from fastmtl.model.pinn import Jet


def _jet(function: Any, points: Tensor) -> Jet:
    """Return a function's derivatives at points, one point at a time."""
    jacobian = torch.func.vmap(torch.func.jacrev(function))(points)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(function)))(points)
    return Jet(torch.func.vmap(function)(points), jacobian, hessian.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_exact_solution_solves_the_equation(name: str) -> None:
    equation = EQUATIONS[name]
    points = equation.inside(torch.rand(64, 2, generator=torch.Generator().manual_seed(0))).double()
    jet = _jet(lambda point: equation.solution(point[None])[0], points)
    for residuals in equation.residuals.values():
        assert residuals(jet).abs().max() < 1e-9
    assert jet.first.abs().max() > 1


def test_burgers_solution_is_as_its_conditions_say() -> None:
    equation = EQUATIONS["burgers"]
    numbers = torch.linspace(0, 1, 9, dtype=torch.float64)
    start = equation.sides["initial"](numbers)
    torch.testing.assert_close(equation.solution(start)[:, 0], -torch.sin(torch.pi * start[:, 0]))
    assert equation.solution(equation.sides["boundary"](numbers)).abs().max() < 1e-12


def test_derivatives_are_those_of_the_network() -> None:
    torch.manual_seed(0)
    encoder = PhysicsEncoder(fields=3, width=8, depth=2).double()
    points = torch.rand(7, 2, dtype=torch.float64)
    wanted = _jet(encoder.network, points)
    for found, right in zip(encoder({"inside": points})["inside"], wanted, strict=True):
        torch.testing.assert_close(found, right)
    with torch.no_grad():
        features = encoder({"inside": points, "side": points[:2]})
    assert not features["inside"][2].requires_grad
    torch.testing.assert_close(features["inside"][2], wanted.second)
    torch.testing.assert_close(features["side"], wanted.value[:2])


class _BackwardTwice(PhysicsEncoder):
    """The encoder as others write it: derivatives by autograd, which are differentiated again."""

    def _jet(self, points: Tensor) -> Jet:
        def derivative(column: Tensor) -> Tensor:
            gradient: Tensor = torch.autograd.grad(column.sum(), points, create_graph=True)[0]
            return gradient

        points.requires_grad_()
        value = self.network(points)
        first = torch.stack([derivative(column) for column in value.unbind(1)], 1)
        by_axis = [
            torch.stack([derivative(column)[:, axis] for column in first[:, :, axis].unbind(1)], 1) for axis in range(2)
        ]
        return Jet(value, first, torch.stack(by_axis, 2))


def _losses(network: nn.Module, name: str, inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> list[Tensor]:
    """Return the losses of an equation by a plain program."""
    equation = EQUATIONS[name]
    jet = _jet(network, inputs["inside"])
    inside = [residuals(jet).square().mean() for residuals in equation.residuals.values()]
    return inside + [(network(inputs[side]) - labels[side]).square().mean() for side in equation.sides]


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    # The last bias is in no derivative.
    return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize(
    ("name", "encoder", "options"),
    [
        ("kovasznay", PhysicsEncoder, {"vjps": "sequential"}),
        ("kovasznay", PhysicsEncoder, {"vjps": "layerwise"}),
        ("burgers", _BackwardTwice, {"vjps": "sequential"}),
        ("kovasznay", _BackwardTwice, {"vjps": "batched"}),
        ("kovasznay", _BackwardTwice, {"vjps": "layerwise"}),
        ("kovasznay", _BackwardTwice, {"vjps": "sketch"}),
        pytest.param("kovasznay", PhysicsEncoder, {"vjps": "sequential", "compile": True}, marks=pytest.mark.slow),
        # Torch splits the network's graph where the points become leaves, and warns of their gradients.
        pytest.param(
            "burgers",
            _BackwardTwice,
            {"vjps": "sequential", "compile": True},
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute")],
        ),
        pytest.param("burgers", PhysicsEncoder, {"vjps": "traced", "compile": True}, marks=pytest.mark.slow),
    ],
)
def test_a_step_has_the_gradients_of_a_plain_program(
    name: str, encoder: type[PhysicsEncoder], options: dict[str, Any]
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        bundle = data.load(name, batch_size=20, n_train=20)
        inputs, labels = ({key: value.double() for key, value in part.items()} for part in next(iter(bundle.train)))
        trainer = Trainer(
            task_dict=bundle.task_dict,
            weighting="ConFIG",
            architecture="HPS",
            encoder_class=lambda: encoder(fields=EQUATIONS[name].fields),
            decoders=bundle.decoders(),
            rep_grad=False,
            multi_input=False,
            scheduler_param=None,
            optim_param={"optim": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
            **options,
        )
        network = trainer.model.encoder.network
        losses = _losses(network, name, inputs, labels)
        parameters = list(network.parameters())
        rows = torch.stack([torch.cat([part.flatten() for part in _gradients(loss, parameters)]) for loss in losses])
        old = nn.utils.parameters_to_vector(parameters).detach().clone()
        batches: DataLoader[Any] = DataLoader([(inputs, labels)], batch_size=None)
        trainer.train(batches, batches, 1)
        update = (old - nn.utils.parameters_to_vector(parameters).detach()) / 0.1
        torch.testing.assert_close(update, aggregation.ConFIG()(rows), rtol=1e-6, atol=1e-9)
    finally:
        torch.set_default_dtype(before)


def test_points_are_inside_and_labels_exact() -> None:
    points = Points(EQUATIONS["kovasznay"], rows=64, seed=0)
    inputs, labels = points.__getitems__(list(range(40)))
    assert {name: len(where) for name, where in inputs.items()} == {"inside": 40, "boundary": 4}
    low, high = torch.tensor([-0.5, -0.5]), torch.tensor([1.0, 1.5])
    assert ((inputs["inside"] >= low) & (inputs["inside"] <= high)).all()
    assert ((inputs["boundary"] == low) | (inputs["boundary"] == high)).any(1).all()
    assert (labels["momentum"][:, :2] == 0).all()
    exact = EQUATIONS["kovasznay"].solution(inputs["inside"]).float()
    torch.testing.assert_close(labels["continuity"][:, 1:], exact)
    assert not torch.equal(points.inside, Points(EQUATIONS["kovasznay"], rows=64, seed=1).inside)


def test_the_relative_error_is_over_all_batches() -> None:
    metric = RelativeError(1)
    metric.update_fun(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
    metric.update_fun(torch.tensor([[4.0, 4.0]]), torch.tensor([[0.0, 4.0]]))
    assert metric.score_fun() == pytest.approx([(25 / 2) ** 0.5, (1 / 20) ** 0.5])
    metric.reinit()
    assert all(score != score for score in metric.score_fun())
