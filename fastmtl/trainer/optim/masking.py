"""An optimizer's step that can be masked on the device, and what stands against that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.sparse import check_sparse_tensor_invariants

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.trainer.optim.optimizer import OPTIMIZERS

__all__ = ["MaskedOptimizer", "can_be_masked", "is_capturable"]

# What they keep begins with zeros, and what they count does not matter, so that a step can be undone on the device.
_UNDONE = tuple(OPTIMIZERS[name] for name in ("sgd", "rmsprop", "adadelta", "muon") if name in OPTIMIZERS)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer looks at the flag of a gradient scaler by itself."""
    return all(bool(group.get("fused")) for group in optimizer.param_groups)


def can_be_masked(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step can be left out, with all that is kept of it, without the host knowing."""
    return is_fused(optimizer) or type(optimizer) in _UNDONE


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a graph of a step can be replayed, as the host counts nothing in it."""
    return type(optimizer) in OPTIMIZERS.values() and (
        "capturable" in optimizer.defaults or type(optimizer).__name__ in ("SGD", "Muon")
    )


class MaskedOptimizer:
    """Runs an optimizer so that nothing changes while a device flag is 1.

    Fused optimizers look at the flag themselves, as they do for gradient scalers; the others are undone. Where that
    would not be all, as of what begins with other numbers than zeros or is counted on the host, and steps are left out
    for good reasons, the flag is read.

    Args:
        optimizer: The optimizer.
        found_inf: The flag, a scalar.
        skips: Whether a run goes on after steps in which the flag is 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, found_inf: Tensor, skips: bool = False) -> None:
        self.optimizer = optimizer
        self.found_inf = found_inf
        self.fused = is_fused(optimizer)
        self.on_host = found_inf.device.type == "cpu"
        self.reads = skips and not can_be_masked(optimizer)
        self._has_run = False
        if self.fused:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def params(self) -> Iterator[Tensor]:
        """Yield the tensors that it updates."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def zero_grad(self, to_none: bool) -> None:
        """Take away all gradients, or fill them with zeros, as the optimizer does."""
        method = self.optimizer.zero_grad
        if not to_none or getattr(method, "__func__", None) is not torch.optim.Optimizer.zero_grad:
            method(set_to_none=to_none)
            return
        # Torch's own does the same with a record for the profiler, which takes longer in small steps.
        for param in self.params():
            param.grad = None

    def step(self) -> None:
        """Update the parameters from their gradients unless the flag is 1."""
        if isinstance(self.optimizer, torch.optim.SGD):
            self._start_momentum(self.optimizer)
        if self.fused:
            self._run()
        elif self.reads or self._reads_for_tables():
            if not self.found_inf.item():
                with torch.no_grad():
                    self._run()
        else:
            self._run_undone()

    def _reads_for_tables(self) -> bool:
        """Return whether there are sparse gradients for which the flag is read.

        On the CPU that costs less than copies of their rows. Momentum is sparse too, with rows of many steps, of which
        a step changes all.
        """
        tables = [
            param
            for group in self.optimizer.param_groups
            for param in group["params"]
            if param.grad is not None and param.grad.is_sparse
        ]
        state = self.optimizer.state
        return bool(tables) and (
            self.on_host or any(tensor.is_sparse for param in tables for _, tensor in _tensors(state.get(param, {})))
        )

    def _run(self) -> None:
        """Run a step; the first one shows whether it can be run as it is."""
        if self._has_run:
            # Optimizers make sparse tensors; torch warns where it is not told whether to check their indices.
            with check_sparse_tensor_invariants(enable=False):
                self.optimizer.step()
            return
        try:
            with check_sparse_tensor_invariants(enable=False):
                self.optimizer.step()
        except (FastmtlError, torch.OutOfMemoryError):
            raise
        except Exception as cause:
            raise UsageError(
                f"The optimizer {type(self.optimizer).__name__} cannot take a step: {cause}. It gets the gradients of "
                "one backward pass, in .grad, and no closure."
            ) from cause
        self._has_run = True

    @torch.no_grad()
    def _run_undone(self) -> None:
        params = [param for group in self.optimizer.param_groups for param in group["params"] if param.grad is not None]
        state = self.optimizer.state
        rows = [_rows(param.grad) for param in params]
        before = [
            (_part(param, of_param), {name: _part(tensor, of_param) for name, tensor in _tensors(state[param])})
            for param, of_param in zip(params, rows, strict=True)
        ]
        self._run()
        masked = self.found_inf != 0
        for param, of_param, (old, remembered) in zip(params, rows, before, strict=True):
            _put(param, of_param, torch.where(masked, old, _part(param, of_param)))
            for name, tensor in _tensors(state[param]):
                # Torch counts steps on the host unless told otherwise; one that was skipped is then counted too.
                if tensor.device == masked.device:
                    new = _part(tensor, of_param)
                    _put(tensor, of_param, torch.where(masked, remembered.get(name, torch.zeros_like(new)), new))

    @torch.no_grad()
    def _start_momentum(self, optimizer: torch.optim.SGD) -> None:
        """Give parameters their momentum at their first gradient.

        Fused SGD does so only where all of them begin together, and leaves it uninitialised if that step is skipped.
        SGD begins with the gradient itself as momentum, undampened: ``m v + (1 - d) g = g`` of a ``v = d g / m`` that
        is put there before the first step that is not skipped. Which that is, the optimizer's state knows.
        """
        for group in optimizer.param_groups:
            momentum, dampening = group["momentum"], group["dampening"]
            for param in group["params"] if momentum else ():
                if param.grad is None:
                    continue
                state = optimizer.state[param]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(param.grad)
                    if dampening:
                        state["unmoved"] = torch.ones_like(self.found_inf)
                if "unmoved" not in state:
                    continue
                begins = (state["unmoved"] != 0) & (self.found_inf == 0)
                grad = -param.grad if group["maximize"] else param.grad
                start = (grad + group["weight_decay"] * param) * (dampening / momentum)
                buffer = state["momentum_buffer"]
                buffer.copy_(torch.where(begins, start, buffer))
                state["unmoved"].mul_(self.found_inf)


def _rows(grad: Tensor | None) -> Tensor | None:
    """Return the rows of a table that an update by its gradient changes; None for all."""
    if grad is None or not grad.is_sparse or grad.sparse_dim() != 1:
        return None
    # Old values are written back to a row that is there twice, twice the same ones.
    return grad._indices()[0]


def _part(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return a copy of what an update may change."""
    return tensor.clone() if rows is None or not tensor.dim() else tensor[rows]


def _put(tensor: Tensor, rows: Tensor | None, part: Tensor) -> None:
    """Write to where :func:`_part` read."""
    if rows is None or not tensor.dim():
        tensor.copy_(part)
    else:
        tensor.index_copy_(0, rows, part)


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that an optimizer keeps of a parameter, in containers too, each with a name."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{name}.{index}")
