"""backward and jac: values, cotangents, chunks, fields and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastmtl.aggregation import UPGrad
from fastmtl.autojac import backward, jac
from fastmtl.engine.graph import batches_well
from fastmtl.errors import UsageError


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    out = model(torch.randn(2, 5, dtype=torch.float64))
    return model, [out[0], out[1].square().sum()]


def one_by_one(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    rows = [torch.autograd.grad(entry, inputs, retain_graph=True) for output in outputs for entry in output.reshape(-1)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("chunk", [None, 1, 2, 4, 100])
def test_jac_has_one_row_per_entry(chunk: int | None) -> None:
    model, outputs = network()
    params = list(model.parameters())
    expected = one_by_one(outputs, params)
    torch.testing.assert_close(jac(outputs, params, parallel_chunk_size=chunk), tuple(expected))


def test_many_rows_are_batched_where_operators_allow() -> None:
    model = nn.Linear(3, 20)
    out = model(torch.randn(3))
    assert batches_well([out])
    expected = one_by_one([out], list(model.parameters()))
    torch.testing.assert_close(jac(out, model.parameters()), tuple(expected))
    conv = nn.Conv1d(1, 2, 3)(torch.randn(1, 1, 9))
    assert not batches_well([conv])
    compiled = torch.compile(lambda x: (x @ model.weight.T).tanh(), backend="aot_eager")
    assert not batches_well([compiled(torch.randn(4, 3))])


def test_jac_outputs_apply_the_chain_rule() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    hidden = x**2
    outer = jac([hidden.sum(), hidden[0] - hidden[1]], hidden, retain_graph=True)
    torch.testing.assert_close(jac(hidden, x, jac_outputs=outer[0]), (torch.tensor([[2.0, 4.0], [2.0, -4.0]]),))


def test_repeated_inputs_are_returned_repeatedly_and_unused_ones_as_zeros() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    first, unused, again = jac(a.sum(), [a, b, a])
    assert torch.equal(first, torch.ones(1, 2))
    assert torch.equal(first, again)
    assert torch.equal(unused, torch.zeros(1, 3))


def test_backward_fills_the_fields_of_all_leaves_and_adds_up() -> None:
    model, outputs = network()
    expected = one_by_one(outputs, list(model.parameters()))
    backward(outputs, retain_graph=True)
    backward(outputs)
    for param, jacobian in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.jac, 2 * jacobian)
        assert param.grad is None


def test_backward_takes_an_aggregator_as_before_0_9() -> None:
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    backward([param @ torch.tensor([-1.0, 1.0]), (param**2).sum()], UPGrad())
    torch.testing.assert_close(param.grad, torch.tensor([0.5, 2.5]))
    assert not hasattr(param, "jac")


def test_the_graph_is_freed_unless_retained() -> None:
    x = torch.ones(2, requires_grad=True)
    y = (x**2).sum()
    backward(y, retain_graph=True)
    backward(y)
    with pytest.raises(RuntimeError, match="second time"):
        backward(y)


def test_a_tensor_that_retains_its_grad_gets_a_jacobian() -> None:
    x = torch.ones(2, requires_grad=True)
    hidden = 2 * x
    hidden.retain_grad()
    backward(3 * hidden, inputs=[hidden])
    assert torch.equal(hidden.jac, 3 * torch.eye(2))


def test_rows_keep_the_layout_of_the_parameter() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    backward([weight.sum(), (weight**2).sum()])
    assert weight.jac[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight.jac[1], 2 * weight.detach())


def test_errors_name_the_argument() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.sum()
    for call, words in (
        (lambda: backward([]), "tensors must hold at least one"),
        (lambda: backward([y, y]), "once"),
        (lambda: backward(y, parallel_chunk_size=0), "parallel_chunk_size"),
        (lambda: backward(x), r"tensors\[0\]"),
        (lambda: backward(y, inputs=[2 * x]), ".jac"),
        (lambda: backward([y, 2 * y], jac_tensors=[torch.ones(1)]), "same length"),
        (lambda: backward([y, 2 * y], jac_tensors=[torch.ones(1), torch.ones(2)]), "number of rows"),
        (lambda: jac(y, x, jac_outputs=torch.ones(3, 2)), "Shape mismatch"),
        (lambda: jac([], x), "outputs"),
        (lambda: jac(y, [x, torch.ones(2)]), r"inputs\[1\]"),
        (lambda: jac(y.detach(), x), r"outputs\[0\]"),
    ):
        with pytest.raises(UsageError, match=words):
            call()


def test_rows_of_another_number_are_not_added() -> None:
    x = torch.ones(2, requires_grad=True)
    backward([x.sum(), x.prod()])
    with pytest.raises(UsageError, match="rows"):
        backward(x.sum())
