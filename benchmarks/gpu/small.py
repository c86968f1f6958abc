"""Small calls of every op, checked against the references: what a sanitizer watches on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import BackendError

__all__ = ["cases", "check"]

_SHAPES = ((1,), (63,), (33, 7), (4099,), (0,))
_SOLVERS: dict[str, tuple[Any, ...]] = {
    "aligned": (),
    "cagrad": (0.5,),
    "cagrad_update": (0.5,),
    "config": (),
    "fairgrad": (2.0,),
    "imtl": (),
    "min_norm": (),
    "nash": (),
    "upgrad": (1e-4, 1e-4),
}


def _rows(num_rows: int, device: torch.device) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(num_rows)
    flat: list[Tensor | None] = [
        torch.randn(shape, generator=generator).to(device) for _ in range(num_rows) for shape in _SHAPES
    ]
    if num_rows > 2:
        flat[1] = None
    return flat


def cases(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the name of an op and its arguments."""
    for num_rows in (2, 3, 8, 16, 40, 128):
        flat = _rows(num_rows, device)
        weights = torch.linspace(-1, 1, num_rows, dtype=torch.float64, device=device)
        yield "gram", (flat, num_rows)
        yield "gram", (flat, num_rows, [0, 1, 1, 2, 2])
        yield "combine", (flat, num_rows, weights)
        random = torch.tensor([7, 11], device=device)
        yield "graddrop_rows", (flat, num_rows, weights.abs(), random, [])
        state = [torch.ones(shape, device=device) for _ in range(num_rows) for shape in _SHAPES]
        yield "ema_gram_", (state, flat, num_rows, weights, weights)
        yield "excess_risk_", ([torch.ones_like(tensor) for tensor in state], flat, num_rows, 1e-7)
        grads = [torch.ones(5, 3, 7, device=device) * (t + 1) for t in range(num_rows)]
        yield "graddrop", (grads[:1], grads, 0.25, random)
        yield "graddrop", (grads, grads, 0.25, random)
    ids = torch.tensor([7, 2, 7, 0, 2, 7], device=device)
    yield "group_rows", (ids,)
    grouped = torch.tensor([3, 1, 4, 0, 2, 5], device=device), torch.tensor([0, 1, 3, 6], device=device)
    for width in (1, 33, 257):
        values = [torch.ones(6, width, device=device) * (t + 1) for t in range(3)]
        yield "sum_rows", (values, *grouped, None, None)
        yield "sum_rows", (values, *grouped, ids.clamp(max=5), torch.linspace(-1, 1, 6, device=device))
    for size in (2, 8, 40):
        jacobian = torch.randn(size, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).to(device)
        gram = jacobian @ jacobian.T
        orders = torch.arange(size, device=device).expand(size, size).contiguous()
        for name, rest in _SOLVERS.items():
            yield name, (gram, *rest)
        yield "pcgrad", (gram, orders)
        yield "gradvac", (gram, orders, torch.zeros_like(gram), 0.5)
        yield "nonneg_qp", (gram, jacobian.sum(dim=1))
        yield "dual_cone", (gram, torch.eye(size, dtype=torch.float64, device=device))
        first_bad = torch.zeros(5, size, dtype=torch.float64, device=device)
        steps = torch.zeros(2, dtype=torch.int64, device=device)
        losses = torch.where(torch.arange(size, device=device) == size - 1, torch.nan, 1.0)
        yield "watch_", (torch.zeros((), device=device), steps, first_bad, losses, gram, weights[:size], None)
        shares = torch.linspace(0.1, 1, size, device=device)
        yield "cap_norm", (gram, shares, 1.0)
        yield "famo_weights", (shares, shares + 1, shares)
        moments = [shares.clone() for _ in range(3)]
        yield "famo_step_", (*moments, torch.ones((), device=device), shares + 1, shares + 0.9, shares, 0.1, 1e-3)
        yield "moco_rates_", (torch.ones((), device=device), shares, gram, 0.5, 0.5)
        yield "moco_step_", (shares.clone(), gram, torch.ones((), device=device), 0.1, 0.5, 0.1)


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors of a result, or of arguments, in order."""
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def _on_cpu(value: Any) -> Any:
    """Return a copy of an argument, on the CPU."""
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value.cpu().clone() if isinstance(value, Tensor) else value


def check(device: torch.device, only: str | None = None, backend: str = "auto") -> int:
    """Compare the cases of all ops, or of one, with the references on the CPU and return how many there were.

    Args:
        device: Where the ops run.
        only: Name of an op.
        backend: ``"auto"`` for the one that the dispatcher takes; of another one, the ops that it has.

    Raises:
        AssertionError: An op differs from its reference.
    """
    count = 0
    for name, arguments in cases(device):
        if only not in (None, name):
            continue
        try:
            op = getattr(torch.ops.fastmtl, name) if backend == "auto" else ops.implementation(name, backend)
        except BackendError:
            continue
        # State is written: both start from the same one, and it is compared too.
        again = _on_cpu(arguments)
        got = _tensors(op(*arguments))
        want = _tensors(ops.implementation(name, "reference")(*again))
        if name.endswith("_"):
            got, want = [*got, *_tensors(arguments)], [*want, *_tensors(again)]
        for one, other in zip(got, want, strict=True):
            # Sums that nearly cancel keep the rounding of what they are sums of.
            scale = float(other.nan_to_num().abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(
                one.cpu(), other, rtol=1e-5, atol=1e-6 * scale, check_stride=False, equal_nan=True
            )
        count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--op")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    done = check(options.device, options.op, options.backend)
    print(f"{done} cases agree with the references")
    if not done:
        raise SystemExit(1)
