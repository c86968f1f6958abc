"""What the ops on a Gram matrix share: checks, which raise a UsageError, and references that run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.support.dtypes import wide_dtype

__all__ = ["check_gram", "check_vector", "check_warm", "declare_solver", "solved"]

P = ParamSpec("P")


def check_gram(gram: Tensor) -> None:
    """Refuse what is neither a square matrix of floats with at least one row nor one for each of L groups."""
    square = gram.dim() in (2, 3) and gram.shape[-1] == gram.shape[-2]
    if not square or 0 in gram.shape or not gram.is_floating_point():
        raise UsageError(
            "gram must be a (T, T) matrix or (L, T, T) matrices of floats with L, T >= 1, "
            f"got shape {tuple(gram.shape)} and dtype {gram.dtype}."
        )


def check_vector(name: str, vector: Tensor | None, gram: Tensor) -> None:
    """Refuse a vector, for L groups L of them, that does not hold one number per row of ``gram``; None passes."""
    if vector is None:
        return
    if vector.shape != gram.shape[:-1] or not vector.is_floating_point():
        raise UsageError(
            f"{name} must hold {math.prod(gram.shape[:-1])} floats, one per row of gram, "
            f"got shape {tuple(vector.shape)} and dtype {vector.dtype}."
        )
    if vector.device != gram.device:
        raise UsageError(f"{name} must be on gram's device {gram.device}, got {vector.device}.")


def check_warm(gram: Tensor, warm_start: Tensor | None = None) -> None:
    """Refuse what is no Gram matrix, and weights to start from that do not fit it."""
    check_gram(gram)
    check_vector("warm_start", warm_start, gram)


def _on_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, floats as float64."""
    tensor = tensor.detach().to("cpu")
    return tensor.double() if tensor.is_floating_point() else tensor


def solved(solve: Callable[..., Tensor], shape: torch.Size, gram: Tensor, *args: object, **named: object) -> Tensor:
    """Return the weights of a solver in plain torch on the device of ``gram``, all NaN where G is not finite.

    The solver gets a finite float64 (T, T) Gram matrix and the other arguments, all on the CPU, and returns float64
    weights. It is called for each of L groups, whose tensors are those at its place in the other arguments.
    """
    grams = _on_host(gram)

    def of_group(place: int | None, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return _on_host(value if place is None else value[place])

    def weights_of(place: int | None) -> Tensor:
        matrix = grams if place is None else grams[place]
        if not matrix.isfinite().all():
            return torch.full(shape if place is None else shape[1:], torch.nan, dtype=matrix.dtype)
        others = {name: of_group(place, value) for name, value in named.items()}
        return solve(matrix, *(of_group(place, value) for value in args), **others)

    weights = weights_of(None) if gram.dim() == 2 else torch.stack([weights_of(place) for place in range(len(grams))])
    return weights.to(wide_dtype(gram.device)).to(gram.device)


def declare_solver(
    name: str,
    schema: str,
    *,
    check: Callable[Concatenate[Tensor, P], object],
    solve: Callable[..., Tensor],
    shape: Callable[Concatenate[Tensor, P], torch.Size] | None = None,
    check_contents: Callable[Concatenate[Tensor, P], object] | None = None,
) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Declare an op that turns a Gram matrix and more into weights, (T,) unless ``shape`` says otherwise.

    Given those of L groups of parameters, (L, T, T), and L of everything else that is a tensor, it returns L weights.
    The reference is a ``solve`` as :func:`solved` takes it; all else is as in :func:`fastmtl.ops._registry.declare`.
    """

    def shape_of(gram: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> torch.Size:
        return gram.shape[:-1] if shape is None else shape(gram, *args, **kwargs)

    def reference(gram: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return solved(solve, shape_of(gram, *args, **kwargs), gram, *args, **kwargs)

    def fake(gram: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return gram.new_empty(shape_of(gram, *args, **kwargs), dtype=wide_dtype(gram.device))

    return declare(name, schema, check=check, reference=reference, fake=fake, check_contents=check_contents)
