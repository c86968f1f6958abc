"""Which way a layer's part of the Gram matrix is computed: a cost model, and where the cotangents are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from fastmtl.engine.layerwise.uses import ConvUse, Use

__all__ = ["RATES", "Layer", "Plan", "Rates", "layer_of", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What operations cost, in multiplications and additions of a large float32 matrix product.

    Attributes:
        convolution: One of a convolution, or of its weight's gradient.
        double: One of a float64 product.
        cholesky: One of a float64 Cholesky factorisation.
        number: Reading or writing a number.
        call: Calling an operator.
    """

    convolution: float
    double: float
    cholesky: float
    number: float
    call: float


# By the type of the device: measured on two cores of a Xeon; for CUDA from the data sheet of an H100.
RATES = {
    "cpu": Rates(convolution=1.1, double=2.0, cholesky=6.0, number=10.0, call=2e5),
    "cuda": Rates(convolution=1.5, double=8.0, cholesky=200.0, number=60.0, call=4e8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What a plan needs to know of a weight.

    Attributes:
        costs: The cost of each way, its part of the second phase included.
        outputs: Numbers of the layer's outputs.
        omega: The shape (g, k, fan_in) of the matrix of a sketch.
        sketch: The shape (g, out, k) of a sketch.
        flipped: Whether the weight is (in, out).
    """

    costs: Mapping[str, float]
    outputs: int
    omega: tuple[int, int, int]
    sketch: tuple[int, int, int]
    flipped: bool

    def best(self, exact: bool) -> str:
        """Return the way of least cost, without a sketch if it must be ``exact``."""
        ways = [way for way in self.costs if not (exact and way == "sketched")]
        return min(ways, key=self.costs.__getitem__)

    def numbers(self, way: str) -> int:
        """Return the numbers that a way keeps for each task: the cotangent, and its piece or, in float64, a copy."""
        pieces = {"sketched": math.prod(self.sketch), "compressed": self.outputs, "ghost": 2 * self.outputs}
        return self.outputs + pieces[way]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The way of each weight that leaves the direct one, in which autograd computes T gradients.

    Attributes:
        ways: ``"sketched"``, ``"compressed"`` or ``"ghost"`` by weight.
        kept: Whether the cotangents of the layers' outputs are kept for the second phase, which else computes them anew
            by one more backward pass.
        numbers: How many numbers the kept cotangents and pieces have, or would have.
    """

    ways: Mapping[Tensor, str]
    kept: bool
    numbers: int

    def described(self, count: int, width: int | None) -> str:
        """Return the plan for ``count`` weights in a few words."""
        names = {"sketched": f"sketched (width {width})"}
        parts = [f"{number} {names.get(way, way)}" for way, number in sorted(Counter(self.ways.values()).items())]
        parts.append(f"{count - len(self.ways)} direct")
        size = f"{4e-6 * self.numbers:.3g} MB in float32"
        where = f"cotangents kept ({size})" if self.kept else f"a second backward pass, as cotangents would need {size}"
        return f"{', '.join(parts)}; {where}"


def layer_of(uses: Sequence[Use], tasks: int, width: int | None, rates: Rates, additive: bool = False) -> Layer:
    """Return what a plan needs to know of a weight.

    Args:
        uses: The uses of the weight.
        tasks: T.
        width: The width k of a sketch, None without.
        rates: Those of the device.
        additive: Whether the pieces of several processes must add up, as sketches do.
    """
    one = uses[0]
    n, f, o, g, k = sum(use.samples for use in uses), one.fan_in, one.fan_out, one.groups, width or 0
    product = rates.convolution if isinstance(one, ConvUse) else 1.0
    gradient = g * n * f * o * product
    # The rows are written, read for the Gram matrix and read again to be combined.
    costs = {"direct": tasks * (gradient + 3 * rates.number * g * f * o + rates.call)}
    second = gradient + rates.number * tasks * g * n * o + 3 * rates.call
    calls = rates.call * len(uses) * (4 + 3 * tasks)
    if width is not None and k < f:
        projected = g * n * f * k * product + 2 * rates.number * g * n * k
        pieces = g * n * o * k + 2 * rates.number * g * n * o + 2 * rates.number * g * o * k
        costs["sketched"] = second + projected + tasks * pieces + calls
    if not additive and (not isinstance(one, ConvUse) or len(one.stride) < 3):
        products = g * n * n * f * rates.double + 4 * rates.number * g * n * f
        pieces = g * n * n * o * 0.6 + 5 * rates.number * g * n * o
        costs["compressed"] = second + products + rates.cholesky * g * n**3 / 3 + tasks * pieces + 2 * calls
        in_double = (g * n * n * o + tasks * g * n * o) * rates.double + 8 * rates.number * g * n * o
        costs["ghost"] = second + products + tasks * in_double + calls
    return Layer(costs=costs, outputs=g * n * o, omega=(g, k, f), sketch=(g, o, k), flipped=one.flipped)


def make_plan(
    layers: Mapping[Tensor, Layer],
    params: Sequence[Tensor],
    tasks: int,
    kept: bool | None = None,
    exact: Set[Tensor] = frozenset(),
) -> Plan:
    """Return the plan of least cost.

    Cotangents are kept where they, the pieces and the gradients of the weights that stay direct are no more numbers
    than the T gradients of all parameters. Where all do not fit, as many layers leave the direct way as do, or a second
    backward pass computes the cotangents anew, whichever costs less.

    Args:
        layers: The weights that may leave the direct way.
        params: All parameters whose gradients are combined.
        tasks: T.
        kept: Whether the cotangents are kept; chosen if None.
        exact: Weights that are not sketched.
    """
    best = {weight: layer.best(weight in exact) for weight, layer in layers.items()}
    gains = {weight: layer.costs["direct"] - layer.costs[best[weight]] for weight, layer in layers.items()}
    leaving = [weight for weight, way in best.items() if way != "direct"]
    # Numbers by which a kept cotangent exceeds the gradient in whose place it is.
    excess = {weight: layers[weight].numbers(best[weight]) - weight.numel() for weight in leaving}

    def plan(weights: Collection[Tensor], keeps: bool) -> Plan:
        chosen = [weight for weight in leaving if weight in weights]
        numbers = tasks * sum(layers[weight].numbers(best[weight]) for weight in chosen)
        return Plan(ways={weight: best[weight] for weight in chosen}, kept=keeps, numbers=numbers)

    if kept is not None:
        return plan(set(leaving), kept)
    total = sum(excess.values())
    fitting = sorted(leaving, key=lambda weight: gains[weight] / max(1, excess[weight]), reverse=True)
    while total > 0 and fitting:
        total -= excess[fitting.pop()]
    if len(fitting) == len(leaving):
        return plan(set(leaving), True)
    # Half as much again for what is not a product, such as norms.
    second_pass = 1.5 * sum(layer.costs["direct"] for layer in layers.values()) / tasks
    if sum(gains[weight] for weight in leaving) - second_pass > sum(gains[weight] for weight in fitting):
        return plan(set(leaving), False)
    return plan(set(fitting), True)
