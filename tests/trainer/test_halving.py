"""Halves of batches for strategies that look ahead: rows are cut as rows, and what is no row is not cut in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from fastmtl import Trainer
from fastmtl.engine.halving import Halving
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import encoder, flat, halves, loaders, make_trainer, task_dict

LABELS = {"task": torch.arange(4)}
BILEVEL = ["MOML", "AutoLambda", "FORUM"]


class Named(NamedTuple):
    left: Tensor
    right: Tensor


class Graph:
    """Nodes of several graphs, as graph libraries put them into one object."""

    def __init__(self, nodes: Tensor, index: Tensor) -> None:
        self.nodes = nodes
        self.index = index

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return self


def test_rows_are_cut_in_any_container() -> None:
    x = torch.arange(8).reshape(4, 2)
    inputs = {"x": x, "pair": (x, [x]), "named": Named(x, x), "array": x.numpy(), "scale": torch.tensor(2.0), "k": 3}
    (first, _), (second, labels) = halves((inputs, LABELS))
    assert first["pair"][1][0].tolist() == first["array"].tolist() == [[0, 1], [2, 3]]
    assert second["named"].right.tolist() == second["x"].tolist() == [[4, 5], [6, 7]]
    assert isinstance(second["named"], Named)
    assert (second["scale"].item(), second["k"], labels["task"].tolist()) == (2.0, 3, [2, 3])


@pytest.mark.parametrize("kind", [list, tuple])
def test_an_entry_for_each_row(kind: Any) -> None:
    ragged = kind(torch.ones(3, size) for size in (2, 5, 3, 4))
    boxes = kind({"boxes": torch.ones(4, 4), "name": str(k)} for k in range(4))
    (first, _), (second, labels) = halves(({"images": ragged, "names": kind("abcd")}, {"det": boxes, **LABELS}))
    assert [image.shape[1] for image in first["images"]] == [2, 5]
    assert [image.shape[1] for image in second["images"]] == [3, 4]
    assert list(second["names"]) == ["c", "d"]
    assert [each["name"] for each in labels["det"]] == ["2", "3"]
    graphs = kind(Graph(torch.ones(k), torch.ones(k)) for k in range(4))
    assert halves((graphs, LABELS))[1][0] == graphs[2:]


@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences(is_sorted: bool) -> None:
    lengths = [5, 4, 3, 1] if is_sorted else [3, 1, 5, 4]
    rows = [torch.randn(length, 2) for length in lengths]
    packed = pack_sequence(rows, enforce_sorted=is_sorted)
    found = [half[0] for half in halves((packed, LABELS))]
    for half, own in zip(found, (rows[:2], rows[2:]), strict=True):
        padded, known = pad_packed_sequence(half, batch_first=True)
        assert known.tolist() == [len(row) for row in own]
        assert all(torch.equal(padded[i, : len(row)], row) for i, row in enumerate(own))
        assert (half.sorted_indices is None) == is_sorted


def test_tensors_of_other_layouts() -> None:
    rows = [torch.ones(k + 1, 2) * k for k in range(4)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert [row.shape[0] for row in halves((nested, LABELS))[1][0].unbind()] == [3, 4]
    sparse = torch.eye(4).to_sparse()
    assert torch.equal(halves((sparse, LABELS))[1][0].to_dense(), torch.eye(4)[2:])


@pytest.mark.parametrize(
    ("inputs", "labels", "part"),
    [
        (torch.ones(7, 4, 6), LABELS, r"inputs has the length 7 where the labels have 4 rows"),
        ({"x": torch.ones(4, 2), "classes": torch.ones(9)}, LABELS, r"inputs\['classes'\] has the length 9"),
        (Graph(torch.ones(9), torch.ones(9)), LABELS, r"inputs is or contains a Graph, which has no known rows"),
        ({"g": [{"a": Graph(torch.ones(2), torch.ones(2))}]}, LABELS, r"inputs\['g'\] has the length 1"),
        (
            torch.ones(4, 2),
            {"a": torch.ones(4), "b": torch.ones(9)},
            r"labels\['b'\] has 9 rows and labels\['a'\] has 4",
        ),
        ([torch.ones(4, 2)] * 4, LABELS, r"inputs is a list of 4 parts with 4 rows each"),
        (3, {"task": None}, "nothing in it has rows"),
    ],
)
def test_what_may_not_be_rows_is_refused(inputs: Any, labels: Any, part: str) -> None:
    with pytest.raises(UsageError, match=f"cannot be halved: {part}.*Give Trainer split_batch"):
        halves((inputs, labels))


def test_a_list_is_what_it_was_in_the_batches_before() -> None:
    """Two inputs beside each other, and images of variable size: with as many rows as entries both look alike."""
    few = {"task": torch.arange(2)}
    pair, images = Halving(), Halving()
    pair([torch.ones(4, 3), torch.ones(4, 3)], LABELS)
    (first, _), _ = pair([torch.ones(2, 3), torch.zeros(2, 3)], few)
    assert [part.shape for part in first] == [(1, 3), (1, 3)]
    images([torch.ones(2, size) for size in (5, 6, 7, 8)], LABELS)
    (first, _), _ = images([torch.ones(2, 5), torch.ones(2, 6)], few)
    assert [part.shape for part in first] == [(2, 5)]


def test_dictionaries_beside_each_other_and_one_for_each_row() -> None:
    """Two views of a batch, and what is known of each row; boxes may be as many as rows in each."""
    views = ({"x": torch.arange(4)}, {"x": torch.arange(4), "mask": torch.ones(4)})
    (first, _), (second, _) = halves((views, LABELS))
    assert isinstance(first, tuple)
    assert [part["x"].tolist() for part in (*first, *second)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    halve = Halving()
    for counts in ((1, 2, 3, 4), (4, 4, 4, 4), (2, 2)):
        targets = [{"boxes": torch.ones(count, 4)} for count in counts]
        images = torch.ones(len(counts), 3, 5, 5)
        (_, labels), _ = halve(images, {"det": targets})
        assert labels["det"] == targets[: len(counts) // 2]


def test_tasks_with_inputs_of_their_own_have_rows_of_their_own() -> None:
    inputs = {"a": torch.arange(4), "b": torch.arange(6), "c": torch.arange(1)}
    first, second = Halving()(inputs, dict(inputs), multi_input=True)
    assert {task: half.tolist() for task, half in first[0].items()} == {"a": [0, 1], "b": [0, 1, 2], "c": [0]}
    assert {task: half.tolist() for task, half in second[1].items()} == {"a": [2, 3], "b": [3, 4, 5], "c": [0]}


def _pack(batch: Any) -> Any:
    x, labels = batch
    return pack_padded_sequence(x[:, None], torch.ones(len(x)), batch_first=True), labels


class Unpacked(nn.Module):
    """The toy's encoder, behind sequences of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, inputs: Any) -> Tensor:
        if isinstance(inputs, Graph):
            return self.inner(inputs.nodes[inputs.index])
        if isinstance(inputs, Mapping):
            return self.inner(inputs["x"].mean(0))
        if isinstance(inputs, list):
            return self.inner(torch.stack(inputs))
        return self.inner(pad_packed_sequence(inputs, batch_first=True)[0][:, 0])


def _end(weighting: str, data: Any, **options: Any) -> Tensor:
    trainer = make_trainer(weighting, encoder_class=Unpacked, **options)
    trainer.train(data, data, 2)
    return flat([*trainer.model.parameters(), *trainer.model.buffers(), torch.tensor(trainer.meter.loss_item)])


def _plain(weighting: str) -> Tensor:
    trainer = make_trainer(weighting)
    data = loaders()
    trainer.train(data, data, 2)
    return flat([*trainer.model.parameters(), *trainer.model.buffers(), torch.tensor(trainer.meter.loss_item)])


@pytest.mark.parametrize("weighting", BILEVEL)
def test_training_on_other_batches_is_training_on_their_rows(weighting: str) -> None:
    expected = _plain(weighting)
    packed = [_pack(batch) for batch in loaders()]
    torch.testing.assert_close(_end(weighting, packed), expected)
    listed = [(list(x), labels) for x, labels in loaders()]
    torch.testing.assert_close(_end(weighting, listed), expected)


def _halve_graph(inputs: Graph, labels: Mapping[str, Tensor]) -> Any:
    middle = len(inputs.index) // 2
    return (
        (Graph(inputs.nodes, inputs.index[:middle]), {task: own[:middle] for task, own in labels.items()}),
        (Graph(inputs.nodes, inputs.index[middle:]), {task: own[middle:] for task, own in labels.items()}),
    )


class OwnHalves(Trainer):
    def split_batch(self, inputs: Any, labels: Any) -> Any:
        return _halve_graph(inputs, labels)


@pytest.mark.parametrize("weighting", BILEVEL)
def test_a_hook_halves_graphs(weighting: str) -> None:
    data = [(Graph(x.flip(0), torch.arange(len(x)).flip(0)), labels) for x, labels in loaders()]
    torch.testing.assert_close(_end(weighting, data, split_batch=_halve_graph), _plain(weighting))


def test_the_hook_may_be_a_method() -> None:
    data = [(Graph(x, torch.arange(len(x))), labels) for x, labels in loaders()]
    torch.manual_seed(0)
    trainer = OwnHalves(
        task_dict(),
        "MOML",
        "HPS",
        Unpacked,
        {"task0": nn.Linear(8, 3), "task1": nn.Linear(8, 1)},
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": "sgd", "lr": 0.05},
        scheduler_param=None,
        device="cpu",
    )
    trainer.train(data, data, 1)
    assert np.isfinite(trainer.meter.loss_item).all()


@pytest.mark.parametrize("weighting", BILEVEL)
def test_time_major_batches_are_refused_before_anything_moves(weighting: str) -> None:
    data = [({"x": x.expand(5, *x.shape)}, labels) for x, labels in loaders()]
    trainer = make_trainer(weighting, encoder_class=Unpacked)
    before = flat([*trainer.model.parameters(), *trainer.model.buffers()])
    with pytest.raises(UsageError, match=r"inputs\['x'\] has the length 5 where the labels have 8 rows.*split_batch"):
        trainer.train(data, data, 1)
    assert torch.equal(flat([*trainer.model.parameters(), *trainer.model.buffers()]), before)


def test_time_major_batches_with_a_hook() -> None:
    def halve(inputs: Any, labels: Any) -> Any:
        x = inputs["x"]
        cut = x.shape[1] // 2
        return [
            ({"x": x[:, part]}, {task: own[part] for task, own in labels.items()})
            for part in (slice(0, cut), slice(cut, None))
        ]

    data = [({"x": x.expand(5, *x.shape)}, labels) for x, labels in loaders()]
    torch.testing.assert_close(_end("FORUM", data, split_batch=halve), _plain("FORUM"), rtol=1e-4, atol=1e-5)


class Swapped(nn.Linear):
    """A decoder whose predictions have the rows in their second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T[None]


def test_forum_reports_predictions_that_are_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("FORUM", decoders={"task0": Swapped(8, 3), "task1": nn.Linear(8, 1)})
    loss = trainer.meter.losses["task0"]
    monkeypatch.setattr(loss, "compute_loss", lambda pred, gt: nn.functional.cross_entropy(pred[0].T, gt))
    x, labels = next(iter(loaders()))
    trainer.model.epoch = 0
    expected = trainer.model(x)["task0"].detach()
    _, (preds,) = trainer.step([(x, labels)], StepBuffer())
    torch.testing.assert_close(preds["task0"], expected)


@pytest.mark.parametrize("made", [None, 3, [(1, {})], [(1, {}), (2, 3)]])
def test_a_hook_that_returns_something_else(made: Any) -> None:
    trainer = make_trainer("MOML", split_batch=lambda inputs, labels: made)
    with pytest.raises(UsageError, match="split_batch must return two pairs of inputs and labels by task"):
        trainer.train(loaders(), loaders(), 1)


def test_strategies_that_take_whole_batches_take_any() -> None:
    data = [({"x": x.expand(5, *x.shape)}, labels) for x, labels in loaders()]
    for weighting in ("MoDo", "SDMGrad", "MGDA"):
        assert _end(weighting, data).isfinite().all()


def _collated(rows: int) -> list[tuple[str, ...]]:
    return [tuple(f"{name}{row}" for row in range(rows)) for name in "ab"]


def test_words_collated_beside_each_other() -> None:
    x, halve = torch.ones(4, 2), Halving()
    (first, _), (second, _) = halve({"x": x, "words": _collated(4)}, LABELS)
    assert first["words"] == [("a0", "a1"), ("b0", "b1")]
    assert second["words"] == [("a2", "a3"), ("b2", "b3")]
    few = {"task": torch.arange(2)}
    assert halve({"x": x[:2], "words": _collated(2)}, few)[0][0]["words"] == [("a0",), ("b0",)]
    for words in (_collated(2), list(_collated(2)), [{"w": part} for part in _collated(2)], [_collated(2)] * 2):
        with pytest.raises(UsageError, match=r"inputs\['words'\] is a list of 2 parts with 2 rows each"):
            Halving()({"x": x[:2], "words": words}, few)
    assert halves(({"x": x}, {"task": _collated(4)}))[0][1] == {"task": [("a0", "a1"), ("b0", "b1")]}
    with pytest.raises(UsageError, match=r"labels\['task'\] is a list of 2 parts with 2 rows each"):
        halves(({"x": x[:2]}, {"task": _collated(2)}))


def test_plain_lists_that_are_no_rows_stay_whole_and_those_of_the_batchs_length_are_cut() -> None:
    inputs = {"x": torch.ones(4, 2), "sizes": [[32, 32], [64, 64]], "names": list("abcd"), "k": [[1, 2, 3]] * 4}
    first = halves((inputs, LABELS))[0][0]
    assert (first["sizes"], first["names"], first["k"]) == ([[32, 32], [64, 64]], ["a", "b"], [[1, 2, 3]] * 2)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_rows(layout: torch.layout) -> None:
    rows = torch.eye(5, 3) * 2
    (first, _), (second, _) = halves((rows.to_sparse(layout=layout), {"task": torch.arange(5)}))
    assert first.layout == second.layout == layout
    assert torch.equal(torch.cat([first.to_dense(), second.to_dense()]), rows)
    blocks = torch.eye(4).to_sparse_bsr((2, 2))
    with pytest.raises(UsageError, match=r"cannot be halved: inputs\['x'\] is a tensor .*sparse_bsr"):
        halves(({"x": blocks}, LABELS))
