"""The VJPs of a graph down to the outputs of its layers, in the place of those down to the weights.

With the inputs X (n, in) and the cotangents D_t (n, out) of its outputs, a layer's part of the Gram matrix is
``<D_s^T X, D_t^T X>``, which needs no T gradients ``D_t^T X``; the update needs one, ``(sum_t w_t D_t)^T X``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl.engine.comm import Comm
from fastmtl.engine.gradients import agree, summed
from fastmtl.engine.graph import batches_well
from fastmtl.engine.layerwise.plan import RATES, Layer, Plan, layer_of, make_plan
from fastmtl.engine.layerwise.update import LayerwiseUpdate
from fastmtl.engine.layerwise.uses import Use, weight_uses
from fastmtl.engine.layerwise.ways import Compressed, Ghost, Way, gradient_of
from fastmtl.engine.model import Tasks
from fastmtl.engine.side_effects import preserving_rng_state
from fastmtl.engine.vjp import batched_vjps, vjp, vjp_of_present
from fastmtl.engine.weights import Row, Rows
from fastmtl.errors import UsageError
from fastmtl.support.dtypes import HALF_TYPES
from fastmtl.support.kinds import Settings, State

__all__ = ["LayerwiseVJPs"]

# Cotangents per batched backward pass; more need more memory for the gradients of the layers' outputs.
_AT_ONCE = 4
# With more numbers in a layer's outputs, operators do not gain by being batched.
_SMALL = 2**18
_WAYS = ("direct", "sketched", "compressed", "ghost")


@dataclass(eq=False)
class LayerwiseVJPs:
    """The VJPs of T cotangents, after which each layer has gone the way that costs least.

    For all other parameters, and for layers that gain nothing, the rows hold the gradients.

    Args:
        params: The parameters that the rows are gradients of.
        comm: The other processes.
        report: Called with the plan.
        kept: Whether the cotangents of the layers' outputs are kept until the weights are known; chosen if None.
        samples: Graphs per step, whose rows make one Gram matrix.

    Attributes:
        plan: The way of each layer; None before :meth:`find`.
        width: The width of sketches, None without.
        checking: Whether the exact rows are computed too.
    """

    checking = False

    params: Sequence[Tensor]
    comm: Comm
    report: Callable[[str], None]
    kept: bool | None = None
    samples: int = 1
    width: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.layers: dict[Tensor, Layer] = {}
        self.plan: Plan | None = None
        self._batches: bool | None = None
        self._told = False

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return next((param.device for param in self.params), torch.device("cpu"))

    def find(self, outputs: Sequence[Tensor], tasks: int) -> None:
        """Find the layers of a graph, compare their weights' gradients with autograd's, and plan the ways.

        Runs backward passes of random cotangents and keeps the graph.

        Args:
            outputs: What will be differentiated.
            tasks: T.
        """
        rates = RATES.get(self.device.type, RATES["cpu"])
        weights = [param for param in self.params if param.dim() > 1]
        uses = {weight: found for weight, found in weight_uses(outputs, weights).items() if _are_saved(found)}
        with preserving_rng_state(self.device):
            proven = self._proven(outputs, uses)
        missing = self.comm.any([weight not in proven for weight in weights])
        for weight in (weight for weight, is_missing in zip(weights, missing, strict=True) if not is_missing):
            layer = layer_of(proven[weight], tasks, self.width, rates, self._adds)
            self.layers[weight] = self._agreed(layer)
        self._adopt(tasks)

    @property
    def _adds(self) -> bool:
        """Return whether pieces of several processes, or graphs, must have each other's inner products."""
        return self.comm.shares_batches or self.samples > 1

    def _agreed(self, layer: Layer) -> Layer:
        """Return a layer with the costs that it has in the main process, whose part of a batch may be larger."""
        if not self.comm.shares_batches:
            return layer
        costs = torch.tensor(list(layer.costs.values()), dtype=torch.float64, device=self.device)
        self.comm.broadcast([costs])
        return replace(layer, costs=dict(zip(layer.costs, costs.tolist(), strict=True)))

    def _adopt(self, tasks: int, exact: Set[Tensor] = frozenset()) -> None:
        """Go by the main process's plan from now on, in which some weights must not be sketched."""
        plan = make_plan(self.layers, self.params, tasks, self.kept, exact)
        if self.comm.shares_batches:
            codes = [_WAYS.index(plan.ways.get(weight, "direct")) for weight in self.layers]
            shared = torch.tensor([plan.kept, *codes], device=self.device)
            self.comm.broadcast([shared])
            kept, *codes = shared.tolist()
            ways = {weight: _WAYS[code] for weight, code in zip(self.layers, codes, strict=True) if code}
            plan = replace(plan, ways=ways, kept=bool(kept))
        self.plan = plan

    def _tell(self, plan: Plan) -> None:
        if self._told:
            return
        self._told = True
        if plan.ways:
            count = sum(param.dim() > 1 for param in self.params)
            self.report(f"vjps: layer by layer, {plan.described(count, self.width)}")
        else:
            self.report("vjps: no layer would gain by going another way than the direct one")

    def begin(self, first: bool) -> bool:
        """Begin with a graph, perhaps the first of a step; return False if plain VJPs do for it."""
        assert self.plan is not None
        self._tell(self.plan)
        return bool(self.plan.ways)

    def __call__(
        self,
        outputs: Sequence[Tensor],
        cotangents: Rows,
        tasks: Tasks = (),
        extras: Sequence[Sequence[Tensor]] = (),
        on_extra: Callable[[Sequence[Tensor], Row], None] | None = None,
    ) -> LayerwiseUpdate:
        """Run the VJPs, after :meth:`begin`.

        Args:
            outputs: What to differentiate.
            cotangents: T rows of cotangents of the outputs, None where there is none.
            tasks: The tasks of the step.
            extras: For each row further tensors to differentiate with respect to.
            on_extra: Called with them and their gradients for each row.

        Returns:
            How weights become gradients; its ``rows`` have the Jacobian's Gram matrix.
        """
        plan = self.plan
        assert plan is not None
        found = weight_uses(outputs, self._looked_at())
        uses = {weight: found[weight] for weight in plan.ways if weight in found}
        ways = self._ways(found)
        # Sketches of other processes and graphs go with this one's, whether or not it uses the layer.
        covered = list(plan.ways if self.comm.shards_rows or self.samples > 1 else uses)
        update = LayerwiseUpdate(
            params=self.params,
            covered=covered,
            uses=uses,
            ways=ways,
            keeps=plan.kept,
            outputs=outputs,
            cotangents=cotangents,
            tasks=tasks,
            shapes=[self.layers[param].sketch if param in plan.ways else tuple(param.shape) for param in self.params],
            learn=self._learn,
        )
        others = [param for param in self.params if param not in uses]
        edges = [use.edge for of_weight in uses.values() for use in of_weight]
        exact = list(uses) if self.checking else []
        wanted: list[Tensor | GradientEdge] = [*edges, *others, *exact]
        for number, grads in enumerate(self._vjps(outputs, cotangents, wanted, extras)):
            pieces = dict(zip([*others, *exact], grads[len(edges) : len(wanted)], strict=True))
            if self.checking:
                update.exact_rows.append([pieces[param] for param in self.params])
            rest = iter(grads)
            for weight, of_weight in uses.items():
                of_uses = [next(rest) for _ in of_weight]
                pieces[weight] = ways[weight].piece(of_uses)
                if plan.kept:
                    update.kept[weight].append(of_uses)
            if any(pieces[weight] is not None for weight in covered if weight not in uses):
                raise UsageError(
                    "With vjps='sketch' and several processes, or several batches per step, every pass must use a "
                    "layer's weight in the same way."
                )
            update.rows.append([pieces[param] for param in self.params])
            if on_extra is not None:
                on_extra(extras[number], grads[len(wanted) :])
        return update

    def _looked_at(self) -> Collection[Tensor]:
        """Return the weights whose uses are looked up."""
        assert self.plan is not None
        return self.plan.ways

    def _learn(self, rows: Rows, gram: Tensor) -> None:
        """Learn from the exact rows and their Gram matrix."""

    def _ways(self, found: Mapping[Tensor, Sequence[Use]]) -> dict[Tensor, Way]:
        """Return the ways of those weights that leave the direct one."""
        assert self.plan is not None
        ways = self.plan.ways
        kept = {weight: uses for weight, uses in found.items() if weight in ways}
        return {weight: Ghost(uses) if ways[weight] == "ghost" else Compressed(uses) for weight, uses in kept.items()}

    def _proven(self, outputs: Sequence[Tensor], uses: Mapping[Tensor, Sequence[Use]]) -> dict[Tensor, Sequence[Use]]:
        """Return the uses of those weights whose gradients from the layers' cotangents are autograd's."""
        edges = [use.edge for found in uses.values() for use in found]
        halved = any(use.inputs.dtype in HALF_TYPES for found in uses.values() for use in found)
        # Small enough for float16.
        scale = 1 / max(1, *(output.numel() for output in outputs)) if halved else 1.0
        # Masks and the like have none.
        first, second = (
            [torch.randn_like(output) * scale if output.requires_grad else None for output in outputs] for _ in range(2)
        )
        grads = vjp(outputs, first, [*uses, *edges], retain=True)
        if self.kept is None or not self.kept:
            both = vjp(outputs, summed([first], [second])[0], edges, retain=True)
            apart = summed([grads[len(uses) :]], [vjp(outputs, second, edges, retain=True)])[0]
            if any(self.comm.any([not agree(both, apart, halved)])):
                # As with hooks that limit gradients: a pass of the weighted cotangents is not the sum of their passes.
                self.kept = True
        rest = iter(grads[len(uses) :])
        proven: dict[Tensor, Sequence[Use]] = {}
        for (weight, found), grad in zip(uses.items(), grads[: len(uses)], strict=True):
            own = gradient_of(found, [next(rest) for _ in found])
            if own is not None and grad is not None and agree([own.to(grad.dtype)], [grad], halved):
                proven[weight] = found
        return proven

    def _vjps(
        self,
        outputs: Sequence[Tensor],
        cotangents: Rows,
        wanted: Sequence[Tensor | GradientEdge],
        extras: Sequence[Sequence[Tensor]],
    ) -> Iterator[Row]:
        """Yield the VJPs, batched where possible; the graph is kept for the inputs of the layers."""
        if extras:
            for cotangent, extra in zip(cotangents, extras, strict=True):
                yield vjp_of_present(outputs, cotangent, [*wanted, *extra], retain=True)
            return
        if self._batches is None:
            largest = max((layer.outputs for layer in self.layers.values()), default=0)
            self._batches = largest <= _SMALL and batches_well(outputs)
        for start in range(0, len(cotangents), _AT_ONCE):
            some = cotangents[start : start + _AT_ONCE]
            yield from self._together(outputs, some, wanted) or (
                vjp_of_present(outputs, cotangent, wanted, retain=True) for cotangent in some
            )

    def _together(
        self, outputs: Sequence[Tensor], cotangents: Rows, wanted: Sequence[Tensor | GradientEdge]
    ) -> Rows | None:
        if not self._batches:
            return None
        try:
            return batched_vjps(outputs, cotangents, wanted)
        except RuntimeError:
            self._batches = False
            return None

    def state_dict(self, names: Mapping[Tensor, str]) -> State:
        """Return what a resumed run needs: the plan, and what it follows from, by the parameters' names."""
        if self.plan is None:
            return {}
        return {
            "layers": {names[weight]: asdict(layer) for weight, layer in self.layers.items()},
            "ways": {names[weight]: way for weight, way in self.plan.ways.items()},
            "kept": self.plan.kept,
            "numbers": self.plan.numbers,
            "width": self.width,
            "in_parts": self._adds,
        }

    def load_state_dict(self, state: Settings, names: Mapping[Tensor, str]) -> None:
        """Go on where `state_dict` was taken, if the plan that was made there holds for these parameters."""
        params = {names[param]: param for param in self.params}
        if not self.can_load(state) or not params.keys() >= state["layers"].keys():
            return
        self.layers = {params[name]: Layer(**layer) for name, layer in state["layers"].items()}
        ways = {params[name]: way for name, way in state["ways"].items()}
        kept = state["kept"] if self.kept is None else self.kept
        self.plan = Plan(ways=ways, kept=kept, numbers=state["numbers"])

    def can_load(self, state: Settings) -> bool:
        """Return whether a `state_dict` has a plan with sketches like these."""
        return "layers" in state and (state["width"], state["in_parts"]) == (self.width, self._adds)


class _Ops(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.detach.default
        return func(*args, **kwargs or {})


def _are_saved(uses: Sequence[Use]) -> bool:
    """Return whether the graph holds the inputs, and does not compute them anew, as in a checkpoint."""
    with _Ops() as ops_run:
        for use in uses:
            _ = use.inputs
    return not ops_run.count
