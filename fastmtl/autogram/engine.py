"""The engine: Gram matrices layer by layer where possible, rows of the Jacobian for the other parameters."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fastmtl.aggregation.rows import gram_of
from fastmtl.autogram.layers import SHORTCUTS, bias_gram, positions, weight_gram
from fastmtl.autojac.jac import jac, showing_all
from fastmtl.engine.graph import graph_nodes, is_leaf
from fastmtl.errors import UsageError
from fastmtl.layerwise import Layerwise, gramian_of

__all__ = ["Engine"]

_KEY = "fastmtl.autogram"
_MIXES_SAMPLES = (nn.modules.batchnorm._BatchNorm, nn.RNNBase)
_KEEPS_STATISTICS = (nn.modules.instancenorm._InstanceNorm,)


def _remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Store the layer and its input in the graph node, so that they are freed with the graph."""
    if isinstance(output, Tensor) and output.grad_fn is not None and len(args) == 1 and isinstance(args[0], Tensor):
        notes: Any = output.grad_fn.metadata
        notes[_KEY] = (module, args[0].detach(), output.output_nr)


class Engine:
    """Computes the Gram matrix of a tensor's Jacobian with respect to the parameters of some modules.

    With independent samples (``batch_dim``) the Gram matrices of linear and convolutional layers follow from their
    inputs and the gradients of their outputs, which one backward pass computes for all samples; per-sample gradients
    are built layer by layer where that is cheaper. All other layers go as those of :class:`fastmtl.Layerwise`, and what
    is left needs the rows of the Jacobian.

    Typical use, with one loss per sample::

        engine = Engine(model, batch_dim=0)
        losses = criterion(model(inputs), labels)  # reduction="none"
        losses.backward(weighting(engine.compute_gramian(losses)))

    Args:
        modules: Modules whose parameters that require grad are differentiated, submodules included.
        batch_dim: The dimension of samples in the differentiated tensor. Samples must be independent of each other, and
            the first dimension of every layer's input. None makes no assumption.

    Raises:
        UsageError: With ``batch_dim``, a module mixes samples: batch norm, a recurrent network, running statistics.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, section 6.
    """

    def __init__(self, *modules: nn.Module, batch_dim: int | None) -> None:
        self._modules = modules
        self._batch_dim = batch_dim
        self._layerwise = Layerwise()
        if batch_dim is not None:
            for layer in {layer for module in modules for layer in module.modules()}:
                self._check(layer)
                if type(layer) in SHORTCUTS:
                    weakref.finalize(self, layer.register_forward_hook(_remember).remove)

    @staticmethod
    def _check(layer: nn.Module) -> None:
        if not any(param.requires_grad for param in layer.parameters(recurse=False)):
            return
        keeps = isinstance(layer, _KEEPS_STATISTICS) and layer.track_running_stats
        if isinstance(layer, _MIXES_SAMPLES) or keeps:
            raise UsageError(
                f"batch_dim must be None with a {type(layer).__name__} in the modules, as it mixes the samples of a "
                "batch or keeps statistics of them."
            )

    def compute_gramian(self, output: Tensor, /) -> Tensor:
        """Return the Gram matrix of the gradients of all entries of ``output``; keeps the graph.

        Args:
            output: A tensor of m entries.

        Returns:
            (m, m), in the order of ``output.flatten()`` and its dtype.

        Raises:
            UsageError: ``output`` depends on no parameter that requires grad.
        """
        params = dict.fromkeys(
            param for module in self._modules for param in module.parameters() if param.requires_grad
        )
        if output.grad_fn is None or not params:
            raise UsageError("output must depend on parameters of the engine's modules that require grad.")
        gram, covered = self._by_layers(output)
        others = [param for param in params if param not in covered]
        if others:
            with showing_all([output], others, "modules"):
                rows = gramian_of(self._layerwise, output, others)
            if rows is None:
                rows = gram_of(jac(output, others, retain_graph=True))
            gram = rows if gram is None else gram + rows
        assert gram is not None
        return gram.to(output.dtype)

    def _by_layers(self, output: Tensor) -> tuple[Tensor | None, set[Tensor]]:
        """Return the Gram matrix of the layers with a shortcut, and their parameters."""
        if self._batch_dim is None or not output.dim():
            return None, set()
        ordered = output.movedim(self._batch_dim, -1)
        ordered = ordered.reshape(-1, ordered.shape[-1])
        calls, uses = self._calls(output)
        calls = {
            layer: notes
            for layer, notes in calls.items()
            if all(len(inputs) == ordered.shape[-1] for _, inputs in notes)
            and all(uses[param] == len(notes) for param in layer.parameters() if param.requires_grad)
        }
        edges = [edge for notes in calls.values() for edge, _ in notes]
        if not edges:
            return None, set()
        by_edge = iter(_slopes(ordered, edges))
        gram = torch.zeros(output.numel(), output.numel(), dtype=torch.float64, device=output.device)
        covered: set[Tensor] = set()
        for layer, notes in calls.items():
            parts = [positions(layer, inputs, next(by_edge)) for _, inputs in notes]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                inputs, grads = (torch.cat([part[k] for part in known], dim=1 + k) for k in (0, 1))
                gram += _layer_gram(layer, inputs, grads)
                covered.update(param for param in layer.parameters() if param.requires_grad)
        places = torch.arange(output.numel(), device=output.device).reshape(output.shape)
        order = places.movedim(self._batch_dim, -1).reshape(-1).argsort()
        return gram[order][:, order], covered

    def _calls(self, output: Tensor) -> tuple[dict[nn.Module, list[tuple[GradientEdge, Tensor]]], Counter[Tensor]]:
        """Return the calls of each layer that the output depends on, and the number of uses of each parameter."""
        layers = {layer for module in self._modules for layer in module.modules()}
        calls: dict[nn.Module, list[tuple[GradientEdge, Tensor]]] = {}
        uses: Counter[Tensor] = Counter()
        for node in graph_nodes([output.grad_fn]):
            uses.update(child.variable for child, _ in node.next_functions if is_leaf(child))
            layer, inputs, output_nr = node.metadata.get(_KEY, (None, None, 0))
            if layer in layers and any(param.requires_grad for param in layer.parameters()):
                calls.setdefault(layer, []).append((GradientEdge(node, output_nr), inputs))
        return calls, uses


def _slopes(rows: Tensor, edges: Sequence[GradientEdge]) -> list[list[Tensor]]:
    """Return for each edge the gradients of the sums of the D rows (D, B), which hold each sample's gradient."""
    grads = [
        torch.autograd.grad(row, edges, torch.ones_like(row), retain_graph=True, allow_unused=True) for row in rows
    ]
    columns = []
    for column in zip(*grads, strict=True):
        like = next(grad for grad in column if grad is not None)
        columns.append([torch.zeros_like(like) if grad is None else grad for grad in column])
    return columns


@torch.no_grad()
def _layer_gram(layer: nn.Module, inputs: Tensor, slopes: Tensor) -> Tensor:
    parts = []
    for name, param in layer.named_parameters():
        if param.requires_grad:
            parts.append(weight_gram(inputs, slopes) if name == "weight" else bias_gram(slopes))
    return torch.stack(parts).sum(0)
