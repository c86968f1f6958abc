"""Gram matrices from sketches of the gradients: unbiased estimates, whose error is measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from fastmtl import ops
from fastmtl.engine.layerwise.signs import Signs
from fastmtl.engine.layerwise.uses import Use
from fastmtl.engine.layerwise.vjps import LayerwiseVJPs
from fastmtl.engine.layerwise.ways import Sketched, Way, omega_of
from fastmtl.engine.weights import Rows
from fastmtl.support.kinds import Settings, State

__all__ = ["LARGEST_ERROR", "SketchedVJPs"]

# Standard deviation of an entry of the Gram matrix, over the norms of its two gradients.
LARGEST_ERROR = 0.03


@dataclass(eq=False)
class SketchedVJPs(LayerwiseVJPs):
    """Layer by layer, with sketches of the gradients where they cost least.

    The first step, and one in ``check_every``, computes the gradients too, and its update is exact. From these follows
    the variance of each layer's part, of which a layer may have as large a share of `LARGEST_ERROR`'s as it has of what
    sketches save; others, such as a first convolution with most of the gradients' norm, are left out until the next.

    Args are those of `LayerwiseVJPs`, and:

    Args:
        width: Columns k of Omega.
        check_every: Steps from one comparison with the exact Gram matrix to the next.
        seed: Of the random signs.

    Attributes:
        left: Steps to the next comparison.
    """

    width: int = field(kw_only=True)
    check_every: int = field(kw_only=True)
    seed: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.signs = Signs(self.device, self.seed)
        self.left = 0
        # The same for all graphs of a step: Omega, and the sums of the first one's inputs.
        self._omegas: dict[Tensor, Tensor] = {}
        self._totals: dict[Tensor, Tensor] = {}
        self._begins = True

    @override
    def begin(self, first: bool) -> bool:
        self._begins = first
        if first:
            self.left -= 1
            self.checking = self.left < 0
        return self.checking or super().begin(first)

    @override
    def _looked_at(self) -> Collection[Tensor]:
        return self.layers if self.checking else super()._looked_at()

    @override
    def _ways(self, found: Mapping[Tensor, Sequence[Use]]) -> dict[Tensor, Way]:
        if self._begins:
            self._draw(found)
        ways = super()._ways({weight: uses for weight, uses in found.items() if weight not in self._omegas})
        for weight, omega in self._omegas.items():
            if weight in found:
                ways[weight] = Sketched(found[weight], omega)
        return ways

    def _draw(self, found: Mapping[Tensor, Sequence[Use]]) -> None:
        """Draw the matrices Omega of a step, which follow from the plan, whatever this process's graph uses of it."""
        assert self.plan is not None
        drawn = [weight for weight, way in self.plan.ways.items() if way == "sketched"]
        candidates = [weight for weight, layer in self.layers.items() if layer.best(exact=False) == "sketched"]
        self._totals = self._sums(candidates if self.checking else drawn, found)
        shapes = [(groups, width - 1, fan_in) for groups, width, fan_in in (self.layers[one].omega for one in drawn)]
        signs = self.signs.draw(shapes)
        self._omegas = {
            weight: omega_of(self._totals[weight], of_weight) for weight, of_weight in zip(drawn, signs, strict=True)
        }

    @torch.no_grad()
    def _sums(self, weights: Sequence[Tensor], uses: Mapping[Tensor, Sequence[Use]]) -> dict[Tensor, Tensor]:
        """Return the sums (g, fan_in) of the inputs of these weights' layers, over all processes."""
        sums = []
        for weight in weights:
            groups, _, fan_in = self.layers[weight].omega
            total = torch.zeros(groups, fan_in, device=self.device)
            for use in uses.get(weight, ()):
                total = total + use.total()
            sums.append(total)
        if self.comm.shards_rows:
            sums = self.comm.all_reduce_coalesced(sums)
        return dict(zip(weights, sums, strict=True))

    @override
    def _learn(self, rows: Rows, gram: Tensor) -> None:
        norms = gram.diagonal()
        products = norms[:, None] * norms
        products = products.where(products > 0, torch.inf)
        places: dict[Tensor, int] = {param: place for place, param in enumerate(self.params)}
        variances = [
            (self._variance(weight, total, [row[places[weight]] for row in rows]) / products).max()
            for weight, total in self._totals.items()
        ]
        layers = [self.layers[weight] for weight in self._totals]
        gains = [layer.costs[layer.best(exact=True)] - layer.costs["sketched"] for layer in layers]
        # All at once, as each read waits for the device.
        values = torch.stack(variances).tolist() if variances else []
        allowed = LARGEST_ERROR**2 / max(sum(gains), 1e-300)
        shares = zip(self._totals, values, gains, strict=True)
        tasks = len(rows) // self.samples
        self._adopt(tasks, {weight for weight, variance, gain in shares if not variance <= allowed * gain})
        # A step of float16 that overflowed has shown nothing.
        self.left = self.check_every - 1 if bool(gram.isfinite().all()) else 0
        assert self.plan is not None
        self._tell(self.plan)

    def _variance(self, weight: Tensor, total: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
        """Return bounds (T, T) on the variances of a layer's part of the Gram matrix.

        With what the gradients g_t (out, in) are beside the mean direction the part is ``tr(g_s^T g_t)``, and the
        variance of its estimate from k - 1 random rows at most ``2 |g_s^T g_t|_F^2 / (k - 1)``, which is also
        ``2 <g_s g_s^T, g_t g_t^T> / (k - 1)``.
        """
        groups, width, fan_in = self.layers[weight].omega
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        mean = omega_of(total, torch.zeros(groups, 1, fan_in, dtype=dtype, device=total.device))[:, :1]
        rests = []
        for grad in grads:
            flat = (torch.zeros_like(weight) if grad is None else grad).to(dtype)
            rest = (flat.mT if self.layers[weight].flipped else flat).unflatten(0, (groups, -1)).flatten(2)
            rests.append(rest - (rest @ mean.mT) * mean)
        if rests[0].shape[1] <= fan_in:
            squares = ops.gram([[rest @ rest.mT] for rest in rests])
        else:
            # Many outputs: their products do not fit.
            squares = torch.stack([torch.stack([(a.mT @ b).double().square().sum() for b in rests]) for a in rests])
        return squares * (2 / (width - 1))

    @override
    def state_dict(self, names: Mapping[Tensor, str]) -> State:
        return super().state_dict(names) | {"left": self.left, "generator": self.signs.generator.get_state()}

    @override
    def load_state_dict(self, state: Settings, names: Mapping[Tensor, str]) -> None:
        super().load_state_dict(state, names)
        if self.plan is None:
            return
        self.left = state["left"]
        generator = state["generator"].cpu()
        # Generators of other devices have states of their own.
        if generator.shape == self.signs.generator.get_state().shape:
            self.signs.generator.set_state(generator)
