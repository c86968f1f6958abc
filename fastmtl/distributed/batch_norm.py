"""Batch norm with the statistics of the whole batch, on any device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmtl.distributed.peers import Peers

__all__ = ["SyncBatchNorm", "synchronize"]

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the parts of a batch that several processes have; ``torch.nn.SyncBatchNorm`` needs a GPU.

    In training, means, variances and the two sums in the gradient are reduced over the processes. The gradients of
    weight and bias are this process's terms of a sum, as for other parameters. Evaluation is torch's.

    Attributes:
        peers: The processes; all must call it equally often, in the same order.
    """

    peers: Peers

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (rows, C, ...) inputs channel by channel."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        out, mean, var, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.peers)
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return out
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            step = self.num_batches_tracked.double().reciprocal() if self.momentum is None else self.momentum
            # Torch's running variance is the unbiased one.
            for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                running.copy_(running + (new.to(running.dtype) - running) * step)
        return out


class _Normalize(torch.autograd.Function):
    """Normalises by the statistics of all parts; also returns mean, variance and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, peers: Peers
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = (moment.double() for moment in torch.var_mean(exact, _others(x), correction=0))
        count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        # The difference of sums of squares loses digits, hence float64.
        sums = peers.all_reduce(torch.cat([mean * count, (var + mean * mean) * count, count]))
        total, squares, count = sums.split([len(mean), len(mean), 1])
        mean = total / count
        var = (squares / count - mean * mean).clamp(min=0)
        scale = (var + eps).rsqrt()
        normal = (exact - _wide(mean, exact)) * _wide(scale, exact)
        ctx.save_for_backward(normal, weight, scale, count)
        ctx.peers = peers
        ctx.has_bias = bias is not None
        out = normal if weight is None else normal * _wide(weight, exact)
        out = out if bias is None else out + _wide(bias, exact)
        ctx.mark_non_differentiable(mean, var, count)
        return out.to(x.dtype, copy=out is normal), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        normal, weight, scale, count = ctx.saved_tensors
        exact = grad.to(normal.dtype)
        dims = _others(grad)
        of_bias, of_weight = exact.sum(dims), (exact * normal).sum(dims)
        sums = ctx.peers.all_reduce(torch.cat([of_bias, of_weight]).double()) / count
        shift, tilt = sums.chunk(2)
        factor = scale if weight is None else scale * weight.double()
        of_x = (exact - _wide(shift, exact) - normal * _wide(tilt, exact)) * _wide(factor, exact)
        of_params = (None if weight is None else of_weight.to(weight.dtype), of_bias if ctx.has_bias else None)
        return of_x.to(grad.dtype), *of_params, None, None


def _others(x: Tensor) -> list[int]:
    """Return all dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Return (C,) values in the dtype of ``like`` (rows, C, ...), in a shape that broadcasts with it."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


@functools.cache
def _keep_out_of_graphs() -> None:
    """Let a network that is compiled call the norms eagerly: messages cannot be compiled."""
    SyncBatchNorm.forward = torch.compiler.disable(SyncBatchNorm.forward)  # type: ignore[method-assign]


def synchronize(model: nn.Module, peers: Peers, compiles: bool = False) -> None:
    """Turn a model's batch norms into :class:`SyncBatchNorm`, in place.

    Classes derived from torch's batch norms are left as they are. Where the model ``compiles``, its graphs end before
    each norm and begin after it.
    """
    if compiles:
        _keep_out_of_graphs()
    for module in model.modules() if peers.size > 1 else ():
        if module is not model and type(module) in _KINDS:
            vars(module)["peers"] = peers
            module.__class__ = SyncBatchNorm
