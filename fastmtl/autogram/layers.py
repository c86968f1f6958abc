"""Gram matrices of a layer's per-sample gradients, from its inputs and the gradients of its outputs.

With the input x_s and the output's gradient g_s at position s (a token, a place of an image), the gradient of a
sample is ``sum_s g_s x_s^T``, and the product of two samples' gradients ``sum_st <g_s, g_t> <x_s, x_t>``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.engine.layerwise.uses import unfolded

__all__ = ["SHORTCUTS", "bias_gram", "positions", "weight_gram"]


def _linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    return inputs.reshape(len(inputs), -1, module.in_features)


def _conv(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    assert not isinstance(module.padding, str)
    return unfolded(inputs, module.kernel_size, module.stride, module.padding, module.dilation)


# For each kind of layer: the function from its inputs to (B, S, in) positions.
SHORTCUTS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]]
SHORTCUTS = {nn.Linear: _linear, nn.Conv1d: _conv, nn.Conv2d: _conv}


def positions(module: nn.Module, inputs: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return a layer's inputs (B, S, in) and its outputs' D gradients (D, B, S, out) by position; None for others."""
    unfold = SHORTCUTS.get(type(module))
    if unfold is None:
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return None
    slopes = torch.stack(grads)
    if isinstance(module, nn.Linear):
        slopes = slopes.reshape(*slopes.shape[:2], -1, module.out_features)
    else:
        slopes = slopes.flatten(3).mT
    return unfold(module, inputs), slopes


def weight_gram(inputs: Tensor, slopes: Tensor) -> Tensor:
    """Return the (D B, D B) float64 Gram matrix of the weight's gradients, from the tensors of :func:`positions`."""
    count, batch, places, width = slopes.shape
    rows, size = count * batch, inputs.shape[-1] * width
    by_places = (batch * places) ** 2 * (inputs.shape[-1] + count * count * (width + 1))
    by_gradients = rows * places * size + rows * rows * size
    if by_gradients <= by_places:
        gradients = torch.einsum("dbso,bsi->dboi", slopes, inputs).reshape(rows, size)
        return (gradients @ gradients.mT).double()
    flat_inputs = inputs.reshape(batch * places, -1)
    flat_slopes = slopes.reshape(count, batch * places, width)
    products = flat_inputs @ flat_inputs.mT
    pairs = torch.einsum("dpo,eqo->dpeq", flat_slopes, flat_slopes) * products[:, None]
    return pairs.reshape(count, batch, places, count, batch, places).sum((2, 5)).reshape(rows, rows).double()


def bias_gram(slopes: Tensor) -> Tensor:
    """Return the (D B, D B) float64 Gram matrix of the bias's gradients from (D, B, S, out)."""
    gradients = slopes.sum(2).flatten(0, 1)
    return (gradients @ gradients.mT).double()
