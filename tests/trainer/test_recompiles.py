"""How often a compiled step compiles: for other shapes, sets of tasks and trainers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.logger import Logger
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.test_compile import REGIONS
from tests.trainer.toy import flat, loaders, make_trainer

# More sets of tasks than are compiled.
PAIRS = [*itertools.combinations(range(6), 2)][:11]


def _graphs(trainer: Any, vjps: str) -> list[int]:
    return [getattr(trainer.step.engine.regions, region).graphs for region in REGIONS[vjps][1]]


@pytest.mark.slow
@pytest.mark.parametrize("vjps", REGIONS)
def test_other_sizes_of_the_last_batch_compile_once_more_at_most(vjps: str, request: pytest.FixtureRequest) -> None:
    torch.compiler.reset()
    if vjps == "sequential":
        # Inductor, which may want to know a size, sees these functions in the graph that is traced.
        request.getfixturevalue("eager_kernels")
    trainer = make_trainer(compile=True, vjps=vjps, encoder_class=lambda: MLPEncoder(6, [8]))
    batches = {rows: next(iter(loaders(rows=rows, batch=rows))) for rows in (8, 5, 7, 3, 6)}
    graphs = []
    for rows in (8, 5, 8, 7, 3, 6):
        trainer.step([batches[rows]], StepBuffer())
        graphs.append(_graphs(trainer, vjps))
    assert set(graphs[0]) == {1}
    assert set(graphs[1]) == set(graphs[-1]) == {2}


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are counted and run as they are."""

    def backend(region: Any, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        region.graphs += 1
        return graph

    monkeypatch.setattr("fastmtl.engine.regions._Region._backend", backend)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize("vjps", REGIONS)
def test_steps_of_many_sets_of_tasks_are_compiled_for_some_and_say_so(vjps: str) -> None:
    torch.compiler.reset()
    messages: list[str] = []

    class Listener(Logger):
        def on_compile(self, message: str) -> None:
            messages.append(message)

    found = []
    for compile in (False, True):
        trainer = make_trainer(count=6, compile=compile, vjps=vjps if compile else "sequential", logger=Listener())
        inputs, labels = next(iter(loaders(6)))
        for a, b in PAIRS * 2:
            some = {f"task{t}": labels[f"task{t}"] for t in (a, b)}
            trainer.step([(inputs, some)], StepBuffer(), [a, b])
        found.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(found[0], found[1])
    *trunk, last = _graphs(trainer, vjps)
    assert (trunk, last) == ([1] * len(trunk), 9)
    name = REGIONS[vjps][0][-1]
    assert messages.count(f"{name}: compiled for 9 sets of tasks, eager for further ones") == 1
    assert sum(message.startswith(f"compiled {name} again, for other shapes or tasks, in") for message in messages) == 8
    assert len([message for message in messages if "trunk" in message]) == 2 * len(trunk)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize("vjps", REGIONS)
def test_accumulated_batches_of_many_sets_of_tasks_are_compiled_for_some_and_say_so(vjps: str) -> None:
    torch.compiler.reset()
    messages: list[str] = []

    class Listener(Logger):
        def on_compile(self, message: str) -> None:
            messages.append(message)

    trainer = make_trainer(count=6, compile=True, vjps=vjps, accumulate=2, logger=Listener())
    inputs, labels = next(iter(loaders(6)))
    for some in [*PAIRS[:7], *itertools.combinations(range(6), 3)][:12]:
        part = {f"task{t}": labels[f"task{t}"] for t in some}
        trainer.step([(inputs, part), (inputs, labels)], StepBuffer())
    assert _graphs(trainer, vjps)[-1] == 9
    assert messages.count(f"{REGIONS[vjps][0][-1]}: compiled for 9 sets of tasks, eager for further ones") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize("vjps", REGIONS)
def test_many_trainers_in_one_process_are_all_compiled(vjps: str) -> None:
    torch.compiler.reset()
    batch = next(iter(loaders()))
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(5):
            # Networks of one shape share their guards, but each trainer compiles its own.
            trainer = make_trainer(compile=True, vjps=vjps)
            trainer.step([batch], StepBuffer())
            assert set(_graphs(trainer, vjps)) == {1}
