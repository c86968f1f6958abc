"""Gram matrices without the Jacobian: short rows for linear layers, and one more VJP for the update.

With the inputs X (n, in) and the gradient D_t (n, out) of the outputs, the gradient of a linear layer's weight and bias
is ``[X, 1]^T D_t``. For any L with ``L L^T = [X, 1] [X, 1]^T``, the products of the tasks' gradients are those of
``L^T D_t``, which is as small as the layer's output and, with fewer examples n than inputs, less work. The update
``sum_t w_t row_t`` needs no rows either: it is the VJP of the weighted cotangents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.graph import batches_well, graph_nodes
from fastmtl.engine.jacobian import BatchGradients, detached
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.split import Split
from fastmtl.engine.pullback import TrunkVJP
from fastmtl.engine.regions import Regions
from fastmtl.engine.vjp import batched_vjps, vjp
from fastmtl.engine.weights import Rows
from fastmtl.support.profiling import part

__all__ = ["Compressed", "linear_layers"]

# Cotangents per backward pass; more need more memory for the gradients of the layers' outputs.
_AT_ONCE = 4


def linear_layers(problem: Problem) -> list[nn.Linear]:
    """Return the linear layers whose parameters are shared ones."""
    shared = set(problem.shared_params)
    return [
        module
        for module in problem.model.modules()
        if type(module) is nn.Linear and module.weight in shared and (module.bias is None or module.bias in shared)
    ]


class Compressed(Split):
    """For strategies that need the gradients for one Gram matrix only.

    A linear layer is compressed if its parameters are used once, on fewer examples than it has inputs. For all other
    parameters the rows hold the gradients.
    """

    only_if_cut = True

    def __init__(self, structure: Structure, regions: Regions, comm: Comm, weighs_heads: bool) -> None:
        super().__init__(structure, regions, comm, weighs_heads)
        self._batches: bool | None = None
        self.layers = linear_layers(self.problem)

    def split(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and the VJPs down to the outputs of the compressed layers."""
        with self._calls() as calls:
            outputs = self.trunk(batch)
        features, losses, preds, cotangents, task_grads = self.heads(outputs, batch)
        with part("VJPs"):
            rows = self._compressed(features, cotangents, calls)
        pullback = TrunkVJP(features, cotangents, self.problem.shared_params)
        return BatchGradients(*detached(losses, preds), rows, task_grads, pullback)

    @contextmanager
    def _calls(self) -> Iterator[list[tuple[nn.Linear, Tensor, GradientEdge]]]:
        """Record each call of a layer: its input and the graph edge of its output."""
        calls: list[tuple[nn.Linear, Tensor, GradientEdge]] = []

        def note(layer: nn.Module, args: tuple[object, ...], output: object) -> None:
            assert isinstance(layer, nn.Linear)
            # In low precision, as under the network's own autocast, products would be rounded twice.
            if len(args) != 1 or not isinstance(output, Tensor) or not isinstance(inputs := args[0], Tensor):
                return
            if output.dtype == inputs.dtype == layer.weight.dtype and output.grad_fn is not None:
                calls.append((layer, inputs.detach(), GradientEdge(output.grad_fn, output.output_nr)))

        # A hook of the user's may replace the output.
        handles = [layer.register_forward_hook(note) for layer in self.layers if not layer._forward_hooks]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _compressed(
        self, features: Sequence[Tensor], cotangents: Rows, calls: list[tuple[nn.Linear, Tensor, GradientEdge]]
    ) -> Rows:
        uses: Counter[Tensor] = Counter()
        nodes = list(graph_nodes(feature.grad_fn for feature in features if feature.grad_fn is not None))
        for node in nodes:
            uses.update(child.variable for child, _ in node.next_functions if hasattr(child, "variable"))
        reached = set(nodes)
        chosen = [
            (layer, inputs, edge)
            for layer, inputs, edge in calls
            # An in-place operation on a view replaces its node.
            if edge.node in reached
            and all(uses[param] == 1 for param in layer.parameters())
            and inputs.shape[:-1].numel() + len(cotangents) < layer.in_features
        ]
        factors = [_factor(layer, inputs) for layer, inputs, _ in chosen]
        covered = {param for layer, _, _ in chosen for param in layer.parameters()}
        others = [param for param in self.problem.shared_params if param not in covered]
        wanted: list[Tensor | GradientEdge] = [*others, *(edge for _, _, edge in chosen)]
        rows: Rows = []
        for start in range(0, len(cotangents), _AT_ONCE):
            for grads in self._vjps(features, cotangents[start : start + _AT_ONCE], wanted):
                short = [
                    piece
                    for factor, grad in zip(factors, grads[len(others) :], strict=True)
                    for piece in _times_lower(factor, grad)
                ]
                rows.append([*grads[: len(others)], *short])
        return rows

    def _vjps(self, features: Sequence[Tensor], cotangents: Rows, wanted: Sequence[Tensor | GradientEdge]) -> Rows:
        """Return VJPs, batched where possible; the graph is kept for the update."""
        if self._batches is None:
            self._batches = batches_well(features)
        if self._batches:
            try:
                return batched_vjps(features, cotangents, wanted)
            except RuntimeError:
                self._batches = False
        return [vjp(features, cotangent, wanted, retain=True) for cotangent in cotangents]


def _times_lower(factor: Tensor, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the upper and the lower half of ``L^T D`` of a lower triangular L, without the zeros of its corner."""
    if grad is None:
        return None, None
    flat, half = grad.reshape(len(factor), -1), len(factor) // 2
    return factor[:, :half].mT @ flat, factor[half:, half:].mT @ flat[half:]


def _factor(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return a square L with ``L L^T = X X^T``, X the layer's inputs with a column of ones for the bias.

    With linearly dependent rows rounding could make the factorisation fail; the term added to the diagonal is far below
    the precision of float32.
    """
    flat = inputs.reshape(-1, layer.in_features).double()
    products = flat @ flat.mT
    if layer.bias is not None:
        products += 1
    products.diagonal().add_(1e-13 * products.diagonal().sum())
    return torch.linalg.cholesky_ex(products).L.to(inputs.dtype)
