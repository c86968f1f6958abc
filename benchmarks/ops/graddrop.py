"""graddrop: against the same rule in torch operators, on representations and on the rows of a Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from fastmtl.benchmarks.registry import Case, Variant
from fastmtl.benchmarks.shapes import as_matrix, as_vector, resnet18, rows_of, size_of
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]


def _plain(signed: Tensor, noise: Tensor) -> Tensor:
    purity = 0.5 * (1 + signed.sum(0) / signed.abs().sum(0))
    return ((purity > noise) & (signed > 0)) | ((purity < noise) & (signed < 0))


def _error_of(want: Tensor, near: Tensor) -> Callable[[Sequence[Tensor]], float]:
    """Return a measure of results where no rounding can turn the choice of a sign."""

    def error(got: Sequence[Tensor]) -> float:
        flat = as_vector(got).double()
        return float(((flat - want).abs() / (want.abs() + 1)).masked_fill(near, 0).max())

    return error


def _near(signed: Tensor, noise: Tensor) -> Tensor:
    purity = 0.5 * (1 + signed.sum(0) / signed.abs().sum(0))
    return ((purity - noise).abs() < 1e-5) | (signed.abs() < 1e-5).any(0)


def _reps(tasks: int, batch: int, features: tuple[int, ...], device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    rep = torch.randn(batch, *features, generator=generator, device=device)
    grads = [torch.randn(batch, *features, generator=generator, device=device) for _ in range(tasks)]
    noise = torch.rand(features, generator=generator, device=device)
    random = torch.tensor([1, 0], device=device)
    signed = torch.stack([(grad.double() * rep.sign()).sum(0) for grad in grads])
    want = sum(grad.double() * keep for grad, keep in zip(grads, _plain(signed, noise.double()), strict=True))
    assert isinstance(want, Tensor)

    def torch_ops() -> list[Tensor]:
        keeps = _plain(torch.stack([(grad * rep.sign()).sum(0) for grad in grads]), noise)
        return [torch.stack([grad * keep for grad, keep in zip(grads, keeps, strict=True)]).sum(0)]

    # A float32 sum over the tasks, one after the other.
    allowed = max(4, tasks) * torch.finfo(torch.float32).eps
    return Case(
        name=f"{batch} x {'x'.join(map(str, features))}, T={tasks}",
        dtype="float32",
        variants={
            "fastmtl": Variant(call=lambda: ops.graddrop([rep], grads, 0.0, random, noise), allowed=allowed),
            "torch ops": Variant(call=torch_ops, allowed=allowed),
        },
        error=_error_of(want.flatten(), _near(signed, noise).expand_as(rep).flatten()),
        bytes_read=(tasks + 1) * rep.numel() * 4,
        bytes_written=rep.numel() * 4,
        reads=[rep, *grads],
        writes=[torch.empty_like(rep)],
    )


def _rows(tasks: int, device: torch.device) -> Case:
    shapes = resnet18()
    rows = rows_of(shapes, tasks, device, torch.float32)
    jacobian = as_matrix(rows)
    random, leak = torch.tensor([1, 0], device=device), torch.zeros(tasks, device=device)
    wide = jacobian.double()
    signs = torch.stack([wide.clamp(min=0).sum(0), wide.clamp(max=0).sum(0)])
    mean = (signs * signs.abs()).sum(0) / signs.abs().sum(0)
    del wide

    def error(got: Sequence[Tensor] | Tensor) -> float:
        """Return the share of elements that are not the sum of one sign, or how far off they are on average."""
        flat = as_vector(got).double()
        strange = ((flat - signs).abs().min(0).values > 1e-5).double().mean()
        return float(torch.maximum(strange, (flat - mean).mean().abs()))

    def torch_ops() -> Tensor:
        return (jacobian * _plain(jacobian, torch.rand_like(jacobian[0]))).sum(0)

    return Case(
        name=f"ResNet-18 rows, T={tasks}",
        dtype="float32",
        variants={
            "fastmtl": Variant(call=lambda: ops.graddrop_rows(rows, leak, random), allowed=2e-3),
            "torch ops": Variant(call=torch_ops, allowed=2e-3),
        },
        error=error,
        bytes_read=size_of(shapes) * tasks * 4,
        bytes_written=size_of(shapes) * 4,
        reads=[t for row in rows for t in row],
        writes=[torch.empty_like(t) for t in rows[0]],
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield representations of a ResNet's last stages, then rows."""
    for tasks in (3,) if quick else (2, 3, 8, 16, 40):
        yield _reps(tasks, 64, (512, 7, 7), device)
    if not quick:
        yield _reps(3, 128, (512,), device)
    for tasks in (3,) if quick else (2, 3, 8, 16, 40):
        yield _rows(tasks, device)
