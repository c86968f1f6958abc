"""Optimizers and schedulers by LibMTL's names, and an update that can be masked on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["OPTIMIZERS", "SCHEDULERS", "MaskedOptimizer", "make_optimizer", "make_scheduler"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULERS: dict[str, Any] = {
    "exp": lr_scheduler.ExponentialLR,
    "step": lr_scheduler.StepLR,
    "cos": lr_scheduler.CosineAnnealingLR,
    "reduce": lr_scheduler.ReduceLROnPlateau,
}
_FUSED = ("sgd", "adam", "adamw", "adagrad")


def make_optimizer(
    params: Iterable[nn.Parameter], optim_param: Mapping[str, Any], device: torch.device, sparse: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer that ``{"optim": name, ...}`` describes; fused where torch has that.

    Args:
        params: What it updates.
        optim_param: Its name and arguments.
        device: The device of the parameters.
        sparse: Some gradients are sparse.

    Raises:
        UsageError: No or an unknown name, an argument the optimizer does not take, or gradients.
    """
    name = _name_of(optim_param, "optim", "optim_param")
    args = {key: value for key, value in optim_param.items() if key != "optim"}
    kind = resolve_name(name, OPTIMIZERS, "optimizer")
    params = list(params)
    if sparse and kind not in (torch.optim.SGD, torch.optim.Adagrad):
        raise UsageError(
            f"{name} takes no sparse gradients, which an embedding has: use sgd or adagrad, or sparse=False."
        )
    fused = (
        kind in [OPTIMIZERS[each] for each in _FUSED]
        and device.type in ("cpu", "cuda")
        and not (kind is torch.optim.Adagrad and device.type != "cpu")
        and not (sparse or any(param.is_complex() for param in params))
        and not args.keys() & {"fused", "foreach", "differentiable", "capturable"}
    )
    try:
        return kind(params, **(args | ({"fused": True} if fused else {})))
    except (TypeError, ValueError) as cause:
        raise UsageError(f"optim_param {dict(optim_param)} cannot be used: {cause}.") from cause


def make_scheduler(optimizer: torch.optim.Optimizer, scheduler_param: Mapping[str, Any] | None) -> Any:
    """Return the scheduler that ``{"scheduler": name, ...}`` describes, or None.

    Raises:
        UsageError: An unknown name, or arguments the scheduler does not take.
    """
    if scheduler_param is None:
        return None
    kind = resolve_name(_name_of(scheduler_param, "scheduler", "scheduler_param"), SCHEDULERS, "scheduler")
    args = {key: value for key, value in scheduler_param.items() if key != "scheduler"}
    for period in ("step_size", "T_max"):
        # Torch divides by it after the first epoch, when that epoch would be lost.
        if not args.get(period, 1) > 0:
            raise UsageError(f"{period} of scheduler_param must be at least 1, got {args[period]}.")
    try:
        return kind(optimizer, **args)
    except (TypeError, ValueError) as cause:
        raise UsageError(f"scheduler_param {dict(scheduler_param)} cannot be used: {cause}.") from cause


def _name_of(param: Mapping[str, Any], key: str, what: str) -> str:
    if not isinstance(param, Mapping) or key not in param:
        raise UsageError(f"{what} must name the {key} as {{{key!r}: ...}}, got {param!r}.")
    return str(param[key])


class MaskedOptimizer:
    """Runs an optimizer so that nothing changes while a device flag is 1, without reading the flag.

    Fused optimizers look at the flag themselves, as they do for gradient scalers; the others are undone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
        self.optimizer = optimizer
        self.found_inf = found_inf
        self.fused = bool(optimizer.defaults.get("fused"))
        if self.fused:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients unless the flag is 1."""
        self._start_momentum()
        if self.fused:
            self.optimizer.step()
            return
        params = [param for group in self.optimizer.param_groups for param in group["params"] if param.grad is not None]
        state = self.optimizer.state
        before = [(param.clone(), {name: each.clone() for name, each in _tensors(state[param])}) for param in params]
        self.optimizer.step()
        masked = self.found_inf != 0
        for param, (old, remembered) in zip(params, before, strict=True):
            param.copy_(torch.where(masked, old, param))
            for name, each in _tensors(state[param]):
                # Torch counts steps on the host unless told otherwise; one that was skipped is then counted too.
                if each.device == masked.device:
                    each.copy_(torch.where(masked, remembered.get(name, torch.zeros_like(each)), each))

    def _start_momentum(self) -> None:
        """Give parameters their momentum at their first gradient.

        Fused SGD does so only where all of them begin together, and leaves it uninitialised if that step is skipped.
        SGD begins with the gradient itself as momentum, undampened: ``m v + (1 - d) g = g`` of a ``v = d g / m`` that
        is put there before the first step that is not skipped. Which that is, the optimizer's state knows.
        """
        if not isinstance(self.optimizer, torch.optim.SGD):
            return
        for group in self.optimizer.param_groups:
            momentum, dampening = group["momentum"], group["dampening"]
            for param in group["params"] if momentum else ():
                if param.grad is None:
                    continue
                state = self.optimizer.state[param]
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


def _tensors(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in state.items() if isinstance(value, Tensor)]
