"""Layers whose shapes the first inputs decide have them before anything counts, copies or trains parameters."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from fastmtl import Trainer
from fastmtl.cli.build import build_trainer, load_data
from fastmtl.errors import UsageError
from fastmtl.model import StagedEncoder, resnet18
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import flat, loaders, make_trainer, task_dict

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Encoder(StagedEncoder):
    """Stages of linear layers, lazy or not."""

    lazy = True

    def __init__(self) -> None:
        def linear(inputs: int, outputs: int) -> nn.Module:
            return nn.LazyLinear(outputs) if self.lazy else nn.Linear(inputs, outputs)

        def stage(inputs: int) -> nn.Module:
            norm = nn.LazyBatchNorm1d() if self.lazy else nn.BatchNorm1d(8)
            return nn.Sequential(linear(inputs, 8), norm, nn.Dropout(0.2), nn.ReLU())

        super().__init__(nn.Identity(), [stage(6), stage(8)], [8, 8])


class Eager(Encoder):
    lazy = False


def _decoders(lazy: bool) -> dict[str, nn.Module]:
    return {f"task{t}": nn.LazyLinear(n) if lazy else nn.Linear(8, n) for t, n in enumerate((3, 1))}


def _made(lazy: bool, weighting: Any = "MGDA", architecture: str = "HPS", **options: Any) -> Trainer:
    """Return a trainer of the network with lazy layers, or of the same without; seeded before its first layer."""
    if lazy and "example_inputs" not in options:
        options["example_inputs"] = {"task0": X, "task1": X[:3]} if options.get("multi_input") else X
    torch.manual_seed(0)
    return Trainer(
        weighting=weighting,
        architecture=architecture,
        task_dict=task_dict(),
        encoder_class=Encoder if lazy else Eager,
        decoders=_decoders(lazy),
        optim_param={"optim": "adam", "lr": 0.01},
        scheduler_param=None,
        device="cpu",
        **{"rep_grad": False, "multi_input": False, **options},
    )


def _end(trainer: Trainer, epochs: int = 2) -> Tensor:
    data = {"multi_input": trainer.multi_input}
    trainer.train(loaders(shuffle=True, **data), loaders(**data), epochs)
    return flat([*trainer.model.parameters(), *trainer.model.buffers()])


def _same_names(one: Trainer, other: Trainer) -> bool:
    return list(one.model.state_dict()) == list(other.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"rep_grad": True}, {"multi_input": True}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize(
    "architecture", ["HPS", "STL", "MMoE", "CGC", "DSelect_k", "MTAN", "PLE", "Cross_stitch", "LTB"]
)
def test_training_is_that_of_the_network_without_lazy_layers(architecture: str, options: dict[str, Any]) -> None:
    if options.get("multi_input") and architecture in ("Cross_stitch", "LTB"):
        pytest.skip("takes one input")
    weighting = "EW" if architecture == "STL" or options.get("rep_grad") else "MGDA"
    eager = _made(False, weighting, architecture, **options)
    lazy = _made(True, weighting, architecture, **options)
    assert _same_names(lazy, eager)
    assert [param.shape for param in lazy.model.parameters()] == [param.shape for param in eager.model.parameters()]
    # Gates and attention are drawn with the network, lazy layers after it.
    lazy.model.load_state_dict(eager.model.state_dict())
    ends = []
    for trainer in (eager, lazy):
        torch.manual_seed(7)
        ends.append(_end(trainer))
    assert torch.equal(*ends)


def test_a_seed_gives_what_it_gives_without_lazy_layers() -> None:
    """Weights and the random numbers after them; dropout and batch norm of the first pass leave no trace."""
    assert torch.equal(_end(_made(True)), _end(_made(False)))


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_every_strategy_knows_the_shapes(name: str) -> None:
    needs_reps = WEIGHTINGS[name].needs == "reps"
    eager, lazy = (_made(lazy, name, rep_grad=needs_reps) for lazy in (False, True))
    assert [value.shape for value in lazy.model.state_dict().values()] == [
        value.shape for value in eager.model.state_dict().values()
    ]
    assert torch.equal(flat(lazy.model.parameters()), flat(eager.model.parameters()))


def test_the_pass_leaves_no_trace() -> None:
    class Counting(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.norm = nn.BatchNorm1d(6)

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen.add_(1)
            random.random(), np.random.rand(), torch.rand(3)
            return super().forward(self.norm(inputs))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer = make_trainer("EW", encoder_class=Counting, example_inputs=X, decoders=_decoders(True))
    encoder: Any = trainer.model.encoder
    assert encoder.seen == 0
    assert encoder.norm.running_mean.tolist() == [0.0] * 6
    assert encoder.norm.num_batches_tracked == 0
    assert encoder.stages[0][1].running_mean.tolist() == [0.0] * 8
    assert all(module.training for module in trainer.model.modules())
    after = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    assert after == (random.random(), np.random.rand())


def test_saving_and_going_on(tmp_path: Path) -> None:
    trainer = _made(True, save_path=str(tmp_path))
    _end(trainer, 1)
    again = _made(True, load_path=str(tmp_path))
    assert torch.equal(flat(again.model.parameters()), flat(trainer.model.parameters()))
    resumed = _made(True, resume=str(tmp_path / "last.pt"))
    assert torch.equal(flat(resumed.model.parameters()), flat(trainer.model.parameters()))


def test_without_example_inputs_one_sentence_says_what_to_give() -> None:
    sentence = r"^decoders\.task0, decoders\.task1, encoder\.stages\.0\.0 and 3 more are lazy, .* give Trainer"
    with pytest.raises(UsageError, match=sentence):
        _made(True, example_inputs=None)


def test_a_function_is_asked_only_if_there_are_lazy_layers() -> None:
    def inputs() -> Tensor:
        asked.append(1)
        return X

    asked: list[int] = []
    _made(False, example_inputs=inputs)
    assert not asked
    _made(True, example_inputs=inputs)
    assert asked == [1]


def test_layers_that_only_training_reaches() -> None:
    class Aside(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.LazyLinear(8)

        def forward(self, inputs: Tensor) -> Tensor:
            rep = super().forward(inputs)
            return rep + self.aside(inputs) if self.training else rep

    trainer = make_trainer("EW", encoder_class=Aside, example_inputs=X)
    assert trainer.model.encoder.aside.weight.shape == (8, 6)
    assert trainer.model.encoder.stages[0][1].running_mean.tolist() == [0.0] * 8


def test_layers_that_nothing_reaches() -> None:
    class Never(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.LazyLinear(8)

    with pytest.raises(UsageError, match=r"encoder\.never is lazy and not reached by example_inputs"):
        make_trainer("EW", encoder_class=Never, example_inputs=X)


class Giving:
    def __call__(self) -> Tensor:
        return X


def test_a_method_of_an_object_is_a_function() -> None:
    assert _made(True, example_inputs=Giving().__call__).model.encoder.stages[0][0].weight.shape == (8, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"example_inputs": torch.ones(3, 4, 5, 6)}, "example_inputs cannot go through the network"),
        (
            {"example_inputs": X, "multi_input": True},
            "must be a dictionary by task when multi_input is True, got Tensor",
        ),
        (
            {"example_inputs": {"task0": X}, "multi_input": True},
            r"^decoders\.task1 is lazy and not reached .*, which has no inputs of task1, only of 'task0'\.$",
        ),
        ({"example_inputs": (X, {"task0": X})}, r"looks like a pair of inputs and labels: give the inputs alone\.$"),
        (
            {"example_inputs": ({"task0": X}, {"task0": X}), "multi_input": True},
            r"got tuple\. It looks like a pair of inputs and labels",
        ),
        (
            {"example_inputs": loaders()},
            r"looks like a loader: give the inputs of a batch, next\(iter\(loader\)\)\[0\]",
        ),
        ({"example_inputs": iter(loaders())}, "looks like a loader"),
        ({"example_inputs": {"task0": loaders()}, "multi_input": True}, "looks like a loader"),
        ({"example_inputs": Giving()}, "looks like a function, but is an object of a class: give its __call__"),
    ],
)
def test_inputs_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _made(True, **options)


class LateEncoder(nn.Module):
    """Makes its layer in its first pass, without torch's lazy modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.layer is None:
            self.layer = nn.Linear(inputs.shape[1], 8)
        return self.layer(inputs)


def test_parameters_that_a_first_pass_makes() -> None:
    trainer = make_trainer("EW", encoder_class=LateEncoder, example_inputs=X)
    before = flat(trainer.model.encoder.parameters())
    trainer.train(loaders(), loaders(), 1)
    assert not torch.equal(flat(trainer.model.encoder.parameters()), before)
    with pytest.raises(UsageError, match=r"parameters that are not trained.*encoder\.layer\.weight.*example_inputs"):
        make_trainer("EW", encoder_class=LateEncoder).train(loaders(), loaders(), 1)


def test_layers_that_pruning_renames_stay_known() -> None:
    trainer = make_trainer("EW")
    trainer.train(loaders(), loaders(), 1)
    prune.l1_unstructured(trainer.model.decoders["task0"], "weight", 0.5)
    trainer.train(loaders(), loaders(), 1)
    assert (trainer.model.decoders["task0"].weight == 0).sum() == 12


def test_the_command_takes_a_batch_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_rows(lazy: bool) -> tuple[Any, Tensor]:
        def decoders(_: object) -> dict[str, nn.Module]:
            kind: Any = nn.LazyLinear if lazy else partial(nn.Linear, 16)
            head = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), kind(10)) for _ in range(2)]
            return {"left": head[0], "right": head[1]}

        config, bundle = load_data(TrainConfig(encoder="conv", train_size=64, batch_size=16, device="cpu"))
        monkeypatch.setattr(type(bundle), "decoders", decoders)
        trainer = build_trainer(config, bundle)
        assert isinstance(bundle.train, DataLoader)
        return trainer, next(iter(bundle.train))[0]

    (lazy, rows), (_, expected) = first_rows(True), first_rows(False)
    width = lazy.model.encoder.feature_dim
    assert lazy.model.decoders["left"][2].weight.shape == (10, width)
    assert torch.equal(rows, expected)


def test_stages_of_unknown_width_are_refused() -> None:
    def resnet() -> nn.Module:
        network = resnet18()
        network.layer2[0].conv1 = nn.LazyConv2d(128, 3, stride=2, padding=1, bias=False)
        return network

    with pytest.raises(UsageError, match="PLE needs the channels between the stages of ResNet"):
        make_trainer("EW", "PLE", encoder_class=resnet, example_inputs=torch.randn(2, 3, 32, 32))


def test_lazy_convolutions() -> None:
    class Images(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))

    trainer = make_trainer(
        "MGDA", encoder_class=Images, example_inputs=torch.randn(2, 3, 8, 8), decoders=_decoders(True)
    )
    assert [tuple(param.shape) for param in trainer.model.encoder.parameters()] == [
        (4, 3, 3, 3),
        (4,),
        (4,),
        (4,),
        (8, 144),
        (8,),
    ]
