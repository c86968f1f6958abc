"""Blocks of a network one after the other: the same numbers, with the gradients of one block at most."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.architecture import HPS
from fastmtl.trainer.log.records import StepBuffer
from tests.live_memory import LiveMemory
from tests.trainer.grouped import TASKS, Blocks, Chain, Counts, batches_of, double_trainer
from tests.trainer.toy import Listener, flat, loaders, make_trainer


class _Skips(nn.Module):
    """What the first layer returns goes round the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        one, other = self.first(inputs).tanh().chunk(2, dim=1)
        return self.third(self.second(torch.cat([one, one], 1)).tanh() + torch.cat([other, other], 1))


class _Crossed(nn.Module):
    """Layers side by side, of which only one is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.second = nn.Linear(6, 1), nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = self.first(inputs).tanh() * self.second(inputs) * self.before(inputs)
        return product


def end_of(name: str, encoder: Any, vjps: str, steps: int = 3, **options: Any) -> tuple[Tensor, list[str], Any]:
    listener = Listener()
    trainer = double_trainer(name, encoder_class=encoder, vjps=vjps, logger=listener, **options)
    torch.manual_seed(3)
    for _ in range(steps):
        trainer.step(batches_of(trainer), StepBuffer())
    latest = trainer.step.latest
    return (
        torch.cat([flat(trainer.model.parameters()), latest.group_weights.flatten(), latest.gram.flatten()]),
        listener.messages,
        trainer,
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MGDA", {}),
        ("PCGrad", {}),
        ("CAGrad", {"groups": "module"}),
        ("UPGrad", {"clip_grad_norm": 0.1}),
        ("Nash_MTL", {"weight_args": {"max_norm": 0.05}}),
        ("Nash_MTL", {"update_weights_every": 2}),
        ("FairGrad", {"groups": {"first|token": "low", ".": "high"}}),
        ("IMTL", {}),
        ("PCD", {}),
        (Counts, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("encoder", [Blocks, Chain, partial(Chain, again=True), _Skips, _Crossed], ids=str)
def test_blocks_one_after_the_other_give_the_numbers_of_all_at_once(
    encoder: Any, name: Any, options: dict[str, Any]
) -> None:
    want, _, _ = end_of(name, encoder, "sequential", **options)
    have, messages, trainer = end_of(name, encoder, "blockwise", **options)
    assert trainer.step.engine.possible
    assert "blocks one after the other" in messages[0]
    torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-10)


class _Tied(nn.Module):
    """The weight of its first layer is used at its end too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(self.second(self.first(inputs).tanh()), self.first.weight)


class _Layers(nn.Module):
    """Twelve layers of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 128, dropout=0.0, batch_first=True) for _ in range(12)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)[:, None]
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, 0]


def test_at_most_one_block_has_the_gradients_of_all_tasks() -> None:
    """Beside what one backward pass takes, the T gradients of the largest block, with some room."""
    tasks, peaks = 4, []
    for name, options in (("EW", {}), ("MGDA", {"groups": "module", "vjps": "blockwise"})):
        decoders = nn.ModuleDict({f"task{t}": nn.Linear(32, 1 if t % 2 else 3) for t in range(tasks)})
        trainer: Any = make_trainer(
            name,
            count=tasks,
            encoder_class=_Layers,
            decoders=decoders,
            optim_param={"optim": "sgd", "lr": 1e-3},
            **options,
        )
        batch = next(iter(loaders(tasks, rows=1, batch=1)))
        # The first step looks at the network.
        trainer.step([batch], StepBuffer())
        trainer.optimizer.zero_grad()
        for comm in trainer.step.engine.method._comms if options else []:
            comm.combination._update = [None] * len(comm.shared)
        with LiveMemory() as live:
            trainer.step([batch], StepBuffer())
        peaks.append(live.peak)
    largest = sum(param.numel() for param in trainer.model.encoder.layers[0].parameters())
    assert peaks[1] <= peaks[0] + 1.3 * tasks * largest


class _Sometimes(Chain):
    """Its first layer can reach the features beside the chain."""

    bypass = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        features: Tensor = self.third(self.second(hidden).tanh())
        return features + hidden if self.bypass else features


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (_Tied, {}, "vjps: all groups at once, as the network is no chain of them"),
        (Chain, {"weight_momentum": 0.5}, "vjps: one after the other, as weight_momentum changes the weights"),
        (Chain, {"accumulate": 2}, "vjps: one after the other, as gradients are accumulated"),
        (Chain, {"groups": {"first|third": "a", "second": "b"}}, "vjps: all groups at once"),
    ],
)
def test_what_is_no_chain_is_said(encoder: Any, options: dict[str, Any], message: str) -> None:
    want, _, _ = end_of("MGDA", encoder, "sequential", **options)
    have, messages, _ = end_of("MGDA", encoder, "blockwise", **options)
    assert message in " ".join(messages)
    torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-10)


class _Scaled(Chain):
    """A hook changes the gradient of what a layer returns."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * 0.5)
        return self.third(self.second(hidden.tanh()))


class _Token(Chain):
    """One of its features is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(8))

    def forward(self, inputs: Tensor) -> Any:
        return self.third(self.second(self.first(inputs).tanh())), self.token


class _WithToken(HPS):
    """The tasks from the second on use the token."""

    def trunk(self, inputs: Any, task_name: str | None = None) -> Any:
        return self.encoder(inputs)

    def branch(self, features: Any, task: str) -> Any:
        return features[0] if task == "task0" else features[0] * features[1]


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.table((inputs.abs() * 10).long().clamp(max=49)).sum(1)
        out: Tensor = self.last(rows.tanh())
        return out


@pytest.mark.parametrize(
    ("encoder", "network", "least"),
    [(_Scaled, "HPS", 2), (_Token, _WithToken, None), (_Table, "HPS", None)],
    ids=["hook of a tensor", "parameter as a feature", "table"],
)
def test_what_blocks_do_not_show_is_not_lost(encoder: Any, network: Any, least: int | None) -> None:
    ends = []
    for vjps in ("sequential", "blockwise"):
        trainer = double_trainer("UPGrad", architecture=network, encoder_class=encoder, vjps=vjps)
        for _ in range(2):
            trainer.step(batches_of(trainer), StepBuffer())
        ends.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(ends[1], ends[0])
    blocks = trainer.step.engine.method.blocks
    assert least is None or len(blocks.blocks) == least


def test_hooks_of_modules_stand_against_blocks() -> None:
    """They may come after the trainer, and after its first step."""
    ends, listener = [], Listener()
    for vjps in ("sequential", "blockwise"):
        trainer = double_trainer("MGDA", encoder_class=Chain, vjps=vjps, logger=listener)
        trainer.step(batches_of(trainer), StepBuffer())
        trainer.model.encoder.second.register_full_backward_hook(lambda module, given, got: (given[0] * 0.5,))
        trainer.step(batches_of(trainer), StepBuffer())
        ends.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(ends[1], ends[0])
    assert listener.messages[-1] == "vjps: all groups at once as gradients have hooks, which would run twice"


def test_layers_that_return_tuples_are_blocks() -> None:
    class Tuples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(_InTuple() for _ in range(4))

        def forward(self, inputs: Tensor) -> Tensor:
            for layer in self.layers:
                (inputs,) = layer(inputs)
            return inputs

    decoders = nn.ModuleDict({f"task{t}": nn.Linear(6, 1 if t % 2 else 3) for t in range(TASKS)}).double()
    trainer = double_trainer("MGDA", encoder_class=Tuples, decoders=decoders, vjps="blockwise")
    trainer.step(batches_of(trainer), StepBuffer())
    assert len(trainer.step.engine.method.blocks.blocks) == 4


class _InTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> tuple[Tensor]:
        return (inputs + self.inner(inputs).tanh(),)


def test_a_step_that_is_no_chain_is_taken_at_once() -> None:
    trainer = double_trainer("MGDA", encoder_class=_Sometimes, vjps="blockwise", logger=(listener := Listener()))
    plain = double_trainer("MGDA", encoder_class=_Sometimes)
    for bypass in (False, True, False, True):
        for some in (trainer, plain):
            some.model.encoder.bypass = bypass
            some.step(batches_of(some), StepBuffer())
        torch.testing.assert_close(flat(trainer.model.parameters()), flat(plain.model.parameters()))
    assert trainer.step.engine.possible
    assert listener.messages[1:] == ["vjps: all groups at once in a step in which the network is no chain of them"]
