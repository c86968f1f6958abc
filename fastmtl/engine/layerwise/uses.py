"""Linear and convolutional layers, found in an autograd graph by the nodes that use their weights.

What counts is the graph, not the modules: a weight that is used functionally, such as those of
``nn.MultiheadAttention``, is found too, and one that is also used in another way is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from fastmtl.engine.graph import Node, graph_nodes, is_leaf, root_nodes

__all__ = ["ConvUse", "LinearUse", "Use", "unfolded", "weight_uses"]

# Nodes between a weight and the operator that uses it.
_TRANSPOSES, _CASTS = "TBackward0", "ToCopyBackward0"
# Positions of an example.
_FEW, _LONG = 4, 64


@dataclass(frozen=True, slots=True, eq=False)
class LinearUse:
    """``inputs @ weight.T`` of inputs (n, in), or ``inputs @ weight`` of a weight (in, out) if ``flipped``.

    Attributes:
        weight: The parameter.
        edge: The graph's edge of the outputs.
        flipped: Whether the weight is (in, out).
        samples: The number n of examples times positions.
        groups: Groups g of inputs and outputs that have weights of their own.
    """

    weight: Tensor
    edge: GradientEdge
    flipped: bool
    samples: int

    groups = 1

    @property
    def fan_in(self) -> int:
        """Return the number of inputs."""
        return self.weight.shape[0 if self.flipped else 1]

    @property
    def fan_out(self) -> int:
        """Return the number of outputs."""
        return self.weight.shape[1 if self.flipped else 0]

    @property
    def inputs(self) -> Tensor:
        """Return the inputs (n, in)."""
        node: Node = self.edge.node
        saved: Tensor = node._saved_mat1 if hasattr(node, "_saved_mat1") else node._saved_self
        return saved.detach()

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return the gradient of the weight for a cotangent (n, out)."""
        return self.inputs.mT @ cotangent if self.flipped else cotangent.mT @ self.inputs

    def total(self) -> Tensor:
        """Return the sum of the inputs over the samples, (1, in)."""
        inputs = self.inputs
        return inputs.sum(0, keepdim=True, dtype=_summed_in(inputs))

    def project(self, omega: Tensor) -> Tensor:
        """Return the inputs times the rows of a matrix Omega (1, k, in), (n, k), as :meth:`sketch` takes them."""
        inputs = self.inputs
        return inputs @ omega[0].to(inputs.dtype).mT

    def sketch(self, cotangent: Tensor, projected: Tensor) -> Tensor:
        """Return the gradient of the weight times Omega, (1, out, k)."""
        return (cotangent.mT @ projected)[None]

    def matrix(self) -> Tensor:
        """Return (1, n, in)."""
        return self.inputs[None]

    def columns(self, cotangent: Tensor) -> Tensor:
        """Return (1, n, out)."""
        return cotangent[None]


@dataclass(frozen=True, slots=True, eq=False)
class ConvUse:
    """A convolution of inputs (B, channels, *sizes), of any number of dimensions, with zeros as padding.

    Attributes are those of `LinearUse`; with groups each has a matrix (out, fan_in) of its own.
    """

    weight: Tensor
    edge: GradientEdge
    samples: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    flipped = False

    @property
    def fan_in(self) -> int:
        """Return the number of entries of a filter."""
        return self.weight[0].numel()

    @property
    def fan_out(self) -> int:
        """Return the number of filters of each group."""
        return self.weight.shape[0] // self.groups

    @property
    def inputs(self) -> Tensor:
        """Return the inputs (B, channels, *sizes)."""
        node: Node = self.edge.node
        saved: Tensor = node._saved_input
        return saved.detach()

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return the gradient of the weight for a cotangent (B, filters, *sizes)."""
        inputs = self.inputs
        if inputs.device.type == "cpu" and len(self.stride) < 3 and self.samples <= _FEW * len(inputs):
            # The library's kernel is slow on them.
            return (self.columns(cotangent).mT @ self.matrix()).reshape(self.weight.shape)
        _, grad, _ = torch.ops.aten.convolution_backward(
            cotangent,
            inputs,
            # Only its shape and memory format matter.
            self.weight.detach().to(inputs.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            (False, True, False),
        )
        return grad

    def total(self) -> Tensor:
        """Return the sum of the patches over the samples, but for the borders: that of the channels, (g, fan_in)."""
        inputs = self.inputs
        channels = inputs.sum([0, *range(2, inputs.dim())], dtype=_summed_in(inputs)).unflatten(0, (self.groups, -1))
        return channels.repeat_interleave(self.weight[0, 0].numel(), 1)

    def project(self, omega: Tensor) -> Tensor:
        """Return the convolution with the filters of a matrix Omega (g, k, fan_in), (B, g k, *sizes)."""
        inputs = self.inputs
        filters = omega.reshape(-1, *self.weight.shape[1:]).to(inputs.dtype)
        arguments = self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups
        return torch.convolution(inputs, filters, None, *arguments)

    def sketch(self, cotangent: Tensor, projected: Tensor) -> Tensor:
        """Return the gradient of the weight times Omega, (g, filters / g, k)."""
        if self.samples < _LONG * len(cotangent) or not cotangent.is_contiguous():
            return self._by_group(cotangent) @ self._by_group(projected).mT
        # Example by example, where the products are large enough to be worth more than a copy of the cotangent.
        of_group = cotangent.flatten(2).unflatten(1, (self.groups, -1))
        return (of_group @ projected.flatten(2).unflatten(1, (self.groups, -1)).mT).sum(0)

    def _by_group(self, outputs: Tensor) -> Tensor:
        """Return (B, channels, *sizes) as (g, channels / g, n)."""
        return outputs.flatten(2).transpose(0, 1).reshape(self.groups, -1, self.samples)

    def matrix(self) -> Tensor:
        """Return (g, n, fan_in)."""
        patches = unfolded(self.inputs, self.weight.shape[2:], self.stride, self.padding, self.dilation)
        by_group = patches.unflatten(2, (self.groups, -1)).permute(2, 0, 1, 3)
        return by_group.reshape(self.groups, self.samples, -1)

    def columns(self, cotangent: Tensor) -> Tensor:
        """Return (g, n, filters / g)."""
        return self._by_group(cotangent).mT


# One use of a weight in a graph: the outputs are linear in the weight and in the inputs.
Use: TypeAlias = LinearUse | ConvUse


def _summed_in(inputs: Tensor) -> torch.dtype:
    """Return the dtype of sums, which in float16 may overflow."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def unfolded(
    inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the patches (B, S, channels x kernel) that a convolution of one or two dimensions multiplies."""
    if len(kernel) == 1:
        inputs = inputs[:, :, None]
        kernel, stride, dilation = ((1, *sizes) for sizes in (kernel, stride, dilation))
        padding = (0, *padding)
    return functional.unfold(inputs, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)).mT


def weight_uses(outputs: Sequence[Tensor], weights: Collection[Tensor]) -> dict[Tensor, list[Use]]:
    """Return the uses of those of the weights that the graph of ``outputs`` uses in linear layers and nowhere else."""
    wanted = {weight for weight in weights if not weight._backward_hooks}
    edges: Counter[Tensor] = Counter()
    uses: dict[Tensor, list[Use]] = {}
    for node in graph_nodes(root_nodes(outputs)):
        kind = type(node).__name__
        if kind in (_TRANSPOSES, _CASTS):
            continue
        for place, (child, _) in enumerate(node.next_functions):
            found = None if child is None else _weight_of(child)
            if found is None or found[0] not in wanted:
                continue
            weight, transposed = found
            edges[weight] += 1
            use = _use(node, kind, place, weight, transposed)
            if use is not None:
                uses.setdefault(weight, []).append(use)
    return {
        weight: found
        for weight, found in uses.items()
        # Of uses of two kinds, such as with the weight and with its transpose, the inputs cannot be put together.
        if len(found) == edges[weight] and len({(type(use), use.fan_in, use.groups, use.flipped) for use in found}) == 1
    }


def _weight_of(node: Node) -> tuple[Tensor, bool] | None:
    """Return the leaf that a node passes on unchanged but for its dtype, and whether transposed; None for others."""
    transposed = False
    while not is_leaf(node):
        kind = type(node).__name__
        if kind not in (_TRANSPOSES, _CASTS):
            return None
        transposed ^= kind == _TRANSPOSES
        node = node.next_functions[0][0]
        if node is None:
            return None
    return node.variable, transposed


def _use(node: Node, kind: str, place: int, weight: Tensor, transposed: bool) -> Use | None:
    """Return the use of a weight as an argument of a node, None if the node is no linear layer."""
    edge = GradientEdge(node, 0)
    if kind == "AddmmBackward0" and place == 2 and node._saved_alpha == 1 and weight.dim() == 2:
        return LinearUse(weight, edge, not transposed, node._saved_mat1.shape[0])
    if kind == "MmBackward0" and place == 1 and weight.dim() == 2:
        return LinearUse(weight, edge, not transposed, node._saved_self.shape[0])
    if kind == "ConvolutionBackward0" and place == 1 and not transposed and not node._saved_transposed:
        geometry = tuple(node._saved_stride), tuple(node._saved_padding), tuple(node._saved_dilation)
        inputs = node._saved_input
        kernel = weight.shape[2:]
        sizes = (
            (size + 2 * pad - reach * (width - 1) - 1) // step + 1
            for size, width, step, pad, reach in zip(inputs.shape[2:], kernel, *geometry, strict=True)
        )
        samples = len(inputs)
        for size in sizes:
            samples *= size
        return ConvUse(weight, edge, samples, *geometry, node._saved_groups)
    return None
