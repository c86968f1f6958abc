"""Gram matrices layer by layer: no weight gradients but those of the update, where that costs less.

With the inputs X (n, in) and the cotangents D_t (n, out) of its outputs, a layer's part of the Gram matrix is
``<D_s^T X, D_t^T X>``, which needs no T gradients ``D_t^T X``; the update needs one, ``(sum_t w_t D_t)^T X``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.gradients import agree, summed
from fastmtl.engine.graph import batches_well
from fastmtl.engine.jacobian import BatchGradients, detached
from fastmtl.engine.layerwise.plan import RATES, Layer, Plan, layer_of, make_plan
from fastmtl.engine.layerwise.update import LayerwiseUpdate
from fastmtl.engine.layerwise.uses import Use, weight_uses
from fastmtl.engine.layerwise.ways import Compressed, Ghost, Way, gradient_of
from fastmtl.engine.methods.split import Split
from fastmtl.engine.model import Tasks
from fastmtl.engine.regions import Regions
from fastmtl.engine.side_effects import without_side_effects
from fastmtl.engine.trees import tensors_of
from fastmtl.engine.vjp import batched_vjps, vjp
from fastmtl.engine.weights import Row, Rows
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.profiling import part

__all__ = ["Layerwise"]

# Cotangents per batched backward pass; more need more memory for the gradients of the layers' outputs.
_AT_ONCE = 4
# With more numbers in a layer's outputs, operators do not gain by being batched.
_SMALL = 2**18
_WAYS = ("direct", "sketched", "compressed", "ghost")


class Layerwise(Split):
    """For strategies that need the gradients for one Gram matrix only.

    Each linear or convolutional layer goes the way that costs least; see `fastmtl.engine.layerwise`. For all other
    parameters, and for layers that gain nothing, the rows hold the gradients.

    Args:
        structure: What is known of the network.
        regions: The network's functions.
        comm: The other processes.
        weighs_heads: Whether the gradients of the task-specific parameters are weighted.
        report: Called with the plan, or with the reason why there is none.
        kept: Whether the cotangents of the layers' outputs are kept; chosen if None.
    """

    only_if_cut = True

    def __init__(
        self,
        structure: Structure,
        regions: Regions,
        comm: Comm,
        weighs_heads: bool,
        report: Callable[[str], None],
        kept: bool | None = None,
    ) -> None:
        super().__init__(structure, regions, comm, weighs_heads)
        self.report = report
        self.kept = kept
        self.width: int | None = None
        self.layers: dict[Tensor, Layer] = {}
        self.plan: Plan | None = None
        self._batches: bool | None = None
        self._told = False

    def prepare(self, batch: Batch) -> None:
        """Find out whether the network can be cut, and once which layers need no weight gradients."""
        super().prepare(batch)
        if self.plan is None and self.structure.against_cut is None:
            self._look(batch)
            self._adopt()

    def _look(self, batch: Batch) -> None:
        """Find the layers, in a pass in which their weights' gradients are compared with autograd's."""
        problem = self.problem
        rates = RATES.get(problem.model.device.type, RATES["cpu"])
        with without_side_effects(problem):
            features = tensors_of(problem.trunk(batch.inputs))
            weights = [param for param in problem.shared_params if param.dim() > 1]
            uses = {weight: found for weight, found in weight_uses(features, weights).items() if _are_saved(found)}
            proven = self._proven(features, uses)
            missing = self.structure.any([weight not in proven for weight in weights])
            for weight in (weight for weight, is_missing in zip(weights, missing, strict=True) if not is_missing):
                layer = layer_of(proven[weight], len(problem.tasks), self.width, rates, self.comm.shares_batches)
                self.layers[weight] = self._agreed(layer)

    def _agreed(self, layer: Layer) -> Layer:
        """Return a layer with the costs that it has in the main process, whose part of a batch may be larger."""
        if not self.comm.shares_batches:
            return layer
        costs = torch.tensor(list(layer.costs.values()), dtype=torch.float64, device=self.problem.model.device)
        self.comm.broadcast([costs])
        return replace(layer, costs=dict(zip(layer.costs, costs.tolist(), strict=True)))

    def _adopt(self, exact: Set[Tensor] = frozenset()) -> None:
        """Go by the main process's plan from now on, in which some weights must not be sketched."""
        plan = make_plan(self.layers, self.problem.shared_params, len(self.problem.tasks), self.kept, exact)
        if self.comm.shares_batches:
            codes = [_WAYS.index(plan.ways.get(weight, "direct")) for weight in self.layers]
            shared = torch.tensor([plan.kept, *codes], device=self.problem.model.device)
            self.comm.broadcast([shared])
            kept, *codes = shared.tolist()
            ways = {weight: _WAYS[code] for weight, code in zip(self.layers, codes, strict=True) if code}
            plan = replace(plan, ways=ways, kept=bool(kept))
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self.plan = plan
        self.possible = bool(plan.ways)

    def _tell(self, plan: Plan) -> None:
        if self._told:
            return
        self._told = True
        if plan.ways:
            count = sum(param.dim() > 1 for param in self.problem.shared_params)
            self.report(f"vjps: layer by layer, {plan.described(count, self.width)}")
        else:
            self.report("vjps: no layer would gain by going another way than the direct one")

    def split(self, batch: Batch) -> BatchGradients:
        """Run the forward pass, the VJPs down to the outputs of the layers, and their parts of the Gram matrix."""
        plan = self.plan
        assert plan is not None
        checks = self._checks()
        if not checks:
            self._tell(plan)
        if not plan.ways and not checks:
            return super().split(batch)
        features, losses, preds, cotangents, task_grads = self.heads(self.trunk(batch), batch)
        with part("VJPs"):
            update = self._differentiated(features, cotangents, plan, batch.tasks, checks)
        return BatchGradients(*detached(losses, preds), update.rows, task_grads, update)

    def _differentiated(
        self, features: Sequence[Tensor], cotangents: Rows, plan: Plan, tasks: Tasks, checks: bool
    ) -> LayerwiseUpdate:
        """Run the VJPs; return how weights become gradients, with the rows that have the Jacobian's Gram matrix."""
        shared = self.problem.shared_params
        found = weight_uses(features, self.layers if checks else plan.ways)
        uses = {weight: found[weight] for weight in plan.ways if weight in found}
        ways = self._ways(uses, plan)
        if checks:
            self._look_at(found)
        # Sketches that other processes send are added to, whether or not this one uses the layer.
        covered = list(plan.ways if self.comm.shards_rows else uses)
        update = LayerwiseUpdate(
            params=shared,
            covered=covered,
            uses=uses,
            ways=ways,
            keeps=plan.kept,
            features=features,
            cotangents=cotangents,
            tasks=tasks,
            shapes=[self.layers[param].sketch if param in plan.ways else tuple(param.shape) for param in shared],
            learn=self._learn,
        )
        others = [param for param in shared if param not in uses]
        edges = [use.edge for of_weight in uses.values() for use in of_weight]
        exact = list(uses) if checks else []
        for grads in self._vjps(features, cotangents, [*edges, *others, *exact]):
            pieces = dict(zip([*others, *exact], grads[len(edges) :], strict=True))
            if checks:
                update.exact_rows.append([pieces[param] for param in shared])
            rest = iter(grads)
            for weight, of_weight in uses.items():
                of_uses = [next(rest) for _ in of_weight]
                pieces[weight] = ways[weight].piece(of_uses)
                if plan.kept:
                    update.kept[weight].append(of_uses)
            if any(pieces[weight] is not None for weight in covered if weight not in uses):
                raise UsageError(
                    "With several processes and vjps='sketch' every step must use a layer's weight in the same way."
                )
            update.rows.append([pieces[param] for param in shared])
        return update

    def _checks(self) -> bool:
        """Return whether this step computes the exact Gram matrix too."""
        return False

    def _look_at(self, uses: Mapping[Tensor, Sequence[Use]]) -> None:
        """Look at the layers in a step that computes the exact Gram matrix too."""

    def _learn(self, rows: Rows, gram: Tensor) -> None:
        """Learn from the exact rows and their Gram matrix (T, T)."""

    def _ways(self, uses: Mapping[Tensor, Sequence[Use]], plan: Plan) -> dict[Tensor, Way]:
        """Return the way of each weight in this step."""
        return {weight: self._way(plan.ways[weight], found) for weight, found in uses.items()}

    def _way(self, name: str, uses: Sequence[Use]) -> Way:
        return Ghost(uses) if name == "ghost" else Compressed(uses)

    def _proven(self, features: Sequence[Tensor], uses: Mapping[Tensor, Sequence[Use]]) -> dict[Tensor, Sequence[Use]]:
        """Return the uses of those weights whose gradients from the layers' cotangents are autograd's."""
        edges = [use.edge for found in uses.values() for use in found]
        halved = self.problem.low_precision is not None
        # Small enough for float16.
        scale = 1 / max(1, *(feature.numel() for feature in features)) if halved else 1.0
        # Masks and the like have none.
        first, second = (
            [torch.randn_like(feature) * scale if feature.requires_grad else None for feature in features]
            for _ in range(2)
        )
        grads = vjp(features, first, [*uses, *edges], retain=True)
        if self.kept is None or not self.kept:
            both = vjp(features, summed([first], [second])[0], edges, retain=True)
            apart = summed([grads[len(uses) :]], [vjp(features, second, edges, retain=True)])[0]
            if any(self.structure.any([not agree(both, apart, halved)])):
                # As with hooks that limit gradients: a pass of the weighted cotangents is not the sum of their passes.
                self.kept = True
        rest = iter(grads[len(uses) :])
        proven: dict[Tensor, Sequence[Use]] = {}
        for (weight, found), grad in zip(uses.items(), grads[: len(uses)], strict=True):
            own = gradient_of(found, [next(rest) for _ in found])
            coarse = halved or weight.dtype in (torch.bfloat16, torch.float16)
            if own is not None and grad is not None and agree([own.to(grad.dtype)], [grad], coarse):
                proven[weight] = found
        return proven

    def _vjps(
        self, features: Sequence[Tensor], cotangents: Rows, wanted: Sequence[Tensor | GradientEdge]
    ) -> Iterator[Row]:
        """Yield the VJPs, batched where possible; the graph is kept for the inputs of the layers."""
        if self._batches is None:
            largest = max((layer.outputs for layer in self.layers.values()), default=0)
            self._batches = largest <= _SMALL and batches_well(features)
        for start in range(0, len(cotangents), _AT_ONCE):
            some = cotangents[start : start + _AT_ONCE]
            yield from self._together(features, some, wanted) or (
                vjp(features, cotangent, wanted, retain=True) for cotangent in some
            )

    def state_dict(self) -> State:
        """Return what a resumed run needs: the plan, and what it follows from."""
        if self.plan is None:
            return {}
        names: dict[Tensor, str] = {param: name for name, param in self.problem.model.named_parameters()}
        return {
            "layers": {names[weight]: asdict(layer) for weight, layer in self.layers.items()},
            "ways": {names[weight]: way for weight, way in self.plan.ways.items()},
            "kept": self.plan.kept,
            "numbers": self.plan.numbers,
            "width": self.width,
            "in_parts": self.comm.shares_batches,
        }

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken, if the plan that was made there holds here."""
        shared = set(self.problem.shared_params)
        params: dict[str, Tensor] = {
            name: param for name, param in self.problem.model.named_parameters() if param in shared
        }
        if not self.can_load(state) or not params.keys() >= state["layers"].keys():
            return
        self.layers = {params[name]: Layer(**layer) for name, layer in state["layers"].items()}
        ways = {params[name]: way for name, way in state["ways"].items()}
        kept = state["kept"] if self.kept is None else self.kept
        self._follow(Plan(ways=ways, kept=kept, numbers=state["numbers"]))

    def can_load(self, state: Settings) -> bool:
        """Return whether a `state_dict` has a plan with sketches like these."""
        here = self.width, self.comm.shares_batches
        return "layers" in state and (state["width"], state["in_parts"]) == here

    def _together(
        self, features: Sequence[Tensor], cotangents: Rows, wanted: Sequence[Tensor | GradientEdge]
    ) -> Rows | None:
        if not self._batches:
            return None
        try:
            return batched_vjps(features, cotangents, wanted)
        except RuntimeError:
            self._batches = False
            return None


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
