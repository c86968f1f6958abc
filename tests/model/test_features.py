"""Encoders made from a description of features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model import Bag, Categorical, FeatureEncoder, FeatureTables, Numeric

INPUTS = {
    "age": torch.tensor([30.0, math.nan, 50.0]),
    "pair": torch.tensor([[1, 2], [3, 4], [5, 6]]),
    "job": torch.tensor([0, 4, 4]),
    "seen": torch.tensor([[1, 1, 3], [-1, 2, -1], [-1, -1, -1]]),
}


def test_the_vector_of_a_row_has_all_features_in_order() -> None:
    features = [
        Numeric("age", mean=40.0, std=10.0),
        Numeric("pair", width=2),
        Categorical("job", 5, 3),
        Bag("seen", 4, 2),
        Bag("seen.again", 4, 2, table="seen", mode="sum"),
    ]
    stem = FeatureTables(features)
    assert stem.width == 1 + 2 + 3 + 2 + 2
    jobs, seen = stem.tables["0_job"].weight, stem.tables["1_seen"].weight
    assert jobs.shape == (5, 3)
    assert seen.shape == (5, 2)
    inputs = {**INPUTS, "seen.again": INPUTS["seen"].int()}
    vectors = stem(inputs)
    # A missing number is the mean.
    assert vectors[:, 0].tolist() == [-1, 0, 1]
    assert vectors[:, 1:3].tolist() == INPUTS["pair"].tolist()
    torch.testing.assert_close(vectors[:, 3:6], jobs[INPUTS["job"]])
    nothing = torch.zeros(2)
    torch.testing.assert_close(vectors[:, 6:8], torch.stack([(2 * seen[1] + seen[3]) / 3, seen[2], nothing]))
    torch.testing.assert_close(vectors[:, 8:], torch.stack([2 * seen[1] + seen[3], seen[2], nothing]))
    vectors.sum().backward()
    assert seen.grad is not None
    # Nothing is learned from what only fills up.
    assert seen.grad[[0, 4]].tolist() == [[0, 0], [0, 0]]
    assert "age, pair, job" in repr(stem)


def test_sparse_tables_have_sparse_gradients() -> None:
    encoder = FeatureEncoder(
        [Categorical("job", 5, 3, sparse=True), Bag("seen", 4, 2, sparse=True)], (6, 4), dropout=0.5
    )
    assert encoder.feature_dim == 4
    encoder(INPUTS).sum().backward()
    assert [table.weight.grad.is_sparse for table in encoder.stem.tables.values()] == [True, True]


def test_what_is_set_at_a_table_counts() -> None:
    features = [Categorical("job", 5, 3), Bag("seen", 4, 2), Categorical("one", 4, 2, table="seen")]
    stem = FeatureTables(features)
    tables: dict[str, Any] = dict(stem.tables)
    jobs, seen = tables["0_job"], tables["1_seen"]
    inputs = {**INPUTS, "one": torch.tensor([0, 1, 2])}
    jobs.max_norm = seen.max_norm = 0.1
    vectors = stem(inputs)
    assert vectors[:, :3].norm(dim=1).max() <= 0.1 + 1e-6
    assert seen.weight[[1, 2, 3]].norm(dim=1).max() <= 0.1 + 1e-6
    jobs.max_norm = seen.max_norm = None
    jobs.padding_idx, jobs.scale_grad_by_freq = 0, True
    seen.scale_grad_by_freq = True
    stem(inputs).sum().backward()
    assert jobs.weight.grad[:, 0].tolist() == [0, 0, 0, 0, 1]
    # Read twice by a bag of three, which makes 1/3 of 2/3, and once as a category.
    torch.testing.assert_close(seen.weight.grad[1], torch.full((2,), 1 / 3 + 1))
    jobs.register_forward_hook(lambda module, args, out: out * 0)
    assert stem(inputs)[:, :3].count_nonzero() == 0


def _with_hook(table: nn.Embedding) -> nn.Module:
    table.register_forward_hook(lambda module, args, out: out)
    return table


def _padded(table: nn.Embedding) -> nn.Module:
    table.padding_idx = 0
    return table


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_with_hook, "an Embedding with hooks"),
        (_padded, "an Embedding with a padding_idx"),
        (lambda table: nn.Sequential(table), "a Sequential"),
    ],
)
def test_tables_whose_rows_a_bag_cannot_read(change: Any, what: str) -> None:
    stem = FeatureTables([Bag("seen", 4, 2), Categorical("one", 5, 2)])
    for name in stem.tables:
        stem.tables[name] = change(stem.tables[name])
    inputs = {"seen": torch.tensor([[1, 2]]), "one": torch.tensor([3])}
    with pytest.raises(UsageError, match=f"The table seen is {what}, of which the bag seen reads"):
        stem(inputs)


def test_double_precision() -> None:
    encoder = FeatureEncoder([Numeric("age"), Categorical("job", 5, 3)]).double()
    assert encoder(INPUTS).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureTables([]), "at least one feature"),
        (lambda: FeatureTables([Numeric("a"), Bag("a", 3, 2)]), "got a twice"),
        (lambda: FeatureTables([Bag("a", 3, 2), Bag("b", 4, 2, table="a")]), "a and b share the table a"),
        (lambda: FeatureEncoder([Numeric("a")], ()), "at least one stage"),
        (lambda: Numeric(""), "must have a name"),
        (lambda: Numeric("a", width=0), "width of the feature a must be at least 1"),
        (lambda: Numeric("a", std=0.0), "std above 0"),
        (lambda: Numeric("a", mean=math.nan), "must be finite"),
        (lambda: Categorical("a", 0, 2), "size of the feature a must be an integer of at least 1"),
        (lambda: Categorical("a", 3, True), "dim of the feature a must be an integer"),
        (lambda: Bag("a", 3, 2, mode="max"), "must be mean or sum, got 'max'"),
    ],
)
def test_descriptions_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(3), "takes a dictionary of tensors by feature, got a Tensor"),
        ({"job": torch.tensor([0])}, "must have a tensor of the feature age: they have job"),
        ({"age": torch.ones(2, 2)}, r"age must be \(B,\) numbers, got shape \(2, 2\)"),
        (
            {"job": torch.tensor([0.5])},
            r"job must be \(B,\) int64 or int32 categories, got shape \(1,\), torch.float32",
        ),
        ({"job": torch.tensor([[0]])}, r"job must be \(B,\)"),
        ({"seen": torch.tensor([0])}, r"seen must be \(B, L\)"),
        ({"job": torch.tensor([0, 5])}, "job must have categories from 0 to 4, got 0 to 5: .*Vocabulary"),
        ({"job": torch.tensor([-1, 0])}, "job must have categories from 0 to 4, got -1 to 0"),
        ({"seen": torch.tensor([[4]])}, "seen must have categories from 0 to 3, got 4 to 4"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, message: str) -> None:
    stem = FeatureTables([Numeric("age"), Categorical("job", 5, 3), Bag("seen", 4, 2)])
    complete = isinstance(inputs, dict) and "they have" not in message
    with pytest.raises(UsageError, match=message):
        stem({**INPUTS, **inputs} if complete else inputs)


@pytest.mark.parametrize(
    ("name", "ids"), [("job", [0, 5]), ("job", [-1, 0]), ("one", [4, 0]), ("one", [0, -1]), ("seen", [[0], [4]])]
)
def test_compiled_code_refuses_categories_that_a_table_does_not_have(name: str, ids: Any) -> None:
    # A table that a bag reads has a row more, which only fills up.
    features = [Categorical("job", 5, 3), Bag("seen", 4, 2), Categorical("one", 4, 2, table="seen")]
    stem = FeatureTables(features)
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    inputs = {"job": torch.tensor([0, 4]), "seen": torch.tensor([[3], [-1]]), "one": torch.tensor([0, 3])}
    torch.testing.assert_close(compiled(inputs), stem(inputs))
    with pytest.raises(RuntimeError, match=f"The feature {name} must have categories from 0 to"):
        compiled({**inputs, name: torch.tensor(ids)})


def test_no_rows() -> None:
    empty: dict[str, Tensor] = {name: values[:0] for name, values in INPUTS.items()}
    assert FeatureEncoder([Numeric("age"), Categorical("job", 5, 3), Bag("seen", 4, 2)])(empty).shape == (0, 64)
