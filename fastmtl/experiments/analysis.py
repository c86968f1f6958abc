"""Which tasks of a run help or hurt each other, from its log and from a look at its checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl.engine.labels import labelled_places
from fastmtl.errors import UsageError
from fastmtl.experiments.figures import Picture, conflict_matrices, layer_matrix, lines
from fastmtl.experiments.reading import Run, pandas
from fastmtl.experiments.report import PlainTable, Section
from fastmtl.support.extras import need
from fastmtl.trainer import Trainer
from fastmtl.trainer.log.logger import pair_names
from fastmtl.trainer.probe import GramProbe
from fastmtl.trainer.setup.loaders import train_batches

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["FEWEST_SHARED", "Look", "groups_of", "look_at", "section_of"]

# Below this share of common examples, the affinity of two tasks says nothing (arXiv:2604.07848).
FEWEST_SHARED = 0.3
_MOST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Look:
    """What some training batches show at a checkpoint.

    Attributes:
        cosines: A row per layer of the shared network, from input to output, and ``"all"``; a column per pair of tasks.
        shared: By pair of tasks, the share of the examples with a label of either that have labels of both.
        batches: Number of batches.
    """

    cosines: DataFrame
    shared: dict[str, float]
    batches: int


def look_at(trainer: Trainer, loaders: Any, batches: int) -> Look:
    """Return the cosines of the task gradients by layer, and which examples the tasks share, over training batches.

    The cosines are of the Gram matrices' mean over the batches. Nothing is trained.

    Raises:
        UsageError: The network has no shared parameters.
    """
    problem = trainer.step.problem
    if not problem.shared_params or len(problem.tasks) < 2:
        raise UsageError(f"{trainer.architecture} shares nothing between tasks: there are no gradients to compare.")
    layers = _layers(trainer.model, problem.shared_params)
    names = list(dict.fromkeys(layers))
    probe = GramProbe(problem)
    groups = [names.index(layer) for layer in layers]
    trainer.model.train()
    grams: list[Tensor] = []
    overlap = _Overlap(problem.tasks)
    for inputs, labels in itertools.islice(
        train_batches(loaders, list(problem.tasks), trainer.multi_input, batches), batches
    ):
        if not trainer.multi_input:
            overlap.add({task: _labelled_rows(problem.losses[task], labels.get(task)) for task in problem.tasks})
        inputs, labels = trainer.prepared((inputs, labels))
        grams.append(probe.gram(inputs, labels, groups).cpu().double())
    mean = torch.stack(grams).nanmean(0)
    rows = {name: _cosines(gram) for name, gram in zip([*names, "all"], [*mean, mean.sum(0)], strict=True)}
    frame = pandas().DataFrame.from_dict(rows, orient="index", columns=pair_names(problem.tasks))
    return Look(cosines=frame, shared=overlap.shares(), batches=len(grams))


def _layers(model: nn.Module, params: Sequence[nn.Parameter]) -> list[str]:
    """Return the module of each parameter by name."""
    names = {id(param): name for name, param in model.named_parameters()}
    return [names[id(param)].rpartition(".")[0] or names[id(param)] for param in params]


def _cosines(gram: Tensor) -> list[float]:
    norms = gram.diagonal().sqrt()
    row, column = torch.triu_indices(len(gram), len(gram), 1)
    found: list[float] = (gram[row, column] / norms[row] / norms[column]).tolist()
    return found


def _labelled_rows(loss: Any, labels: Any) -> Tensor | None:
    """Return which rows of a batch have a label, None if none of them is known to."""
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        return None
    known = labelled_places(loss, labels)
    return known.reshape(len(known), -1).any(1).cpu()


class _Overlap:
    """Counts the examples that pairs of tasks have labels of."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = list(tasks)
        self._counts = {pair: [0, 0] for pair in pair_names(tasks)}

    def add(self, rows: Mapping[str, Tensor | None]) -> None:
        size = next((len(known) for known in rows.values() if known is not None), 0)
        masks = {task: torch.zeros(size, dtype=torch.bool) if known is None else known for task, known in rows.items()}
        for a, b in itertools.combinations(self._tasks, 2):
            if len(masks[a]) != len(masks[b]):
                continue
            counts = self._counts[f"{a}:{b}"]
            counts[0] += int((masks[a] & masks[b]).sum())
            counts[1] += int((masks[a] | masks[b]).sum())

    def shares(self) -> dict[str, float]:
        return {pair: both / either if either else 0.0 for pair, (both, either) in self._counts.items()}


def groups_of(tasks: Sequence[str], cosines: Mapping[str, float]) -> list[list[str]]:
    """Return a suggested grouping: tasks whose gradients agree on average.

    Average-linkage clustering of the distances ``1 - cosine``, cut at 1: groups are joined as long as the mean cosine
    between them is positive. One task per group where none agrees.
    """
    if len(tasks) < 2:
        return [list(tasks)]
    hierarchy = need("scipy.cluster.hierarchy", "experiments", "A grouping of tasks")
    distances = [1 - cosines[pair] for pair in pair_names(tasks)]
    if any(math.isnan(distance) for distance in distances):
        return []
    labels = hierarchy.fcluster(hierarchy.linkage(distances, method="average"), t=1.0, criterion="distance")
    grouped: dict[int, list[str]] = {}
    for task, label in zip(tasks, labels, strict=True):
        grouped.setdefault(int(label), []).append(task)
    return list(grouped.values())


def section_of(run: Run, look: Look | None) -> Section:
    """Return what is to be said of a run.

    Raises:
        UsageError: There is nothing to say: its log has no cosines, and there is no look at its checkpoint.
    """
    section = Section(title=f"{run.arch} with {run.weighting}, seed {run.seed} ({run.path.name})")
    logged = run.signal("cosine")
    if logged.empty and look is None:
        raise UsageError(
            f"{run.path} has no cosines of task gradients in its log, as {run.weighting} needs no gradients: train it "
            f"with --cosines, or leave --batches above 0 to look at its checkpoint."
        )
    pairs = pair_names(run.tasks)
    means: dict[str, float] = (
        look.cosines.loc["all"] if logged.empty and look is not None else logged.mean()
    ).to_dict()
    conflicts = run.signal("conflict").mean() if not logged.empty else {}
    section.tables.append(_pairs(pairs, means, conflicts, look))
    source = "the training log" if not logged.empty else "the checkpoint"
    groups = groups_of(run.tasks, means)
    told = "; ".join(" + ".join(group) for group in groups)
    section.text.append(
        f"Suggested groups by mean cosine ({source}): {told}. Groups are joined as long as the mean cosine between "
        "them is positive; it is a suggestion to test, as agreeing gradients need not make a better network."
    )
    section.text += _warnings(run, look)
    section.pictures += _pictures(run, logged, look)
    return section


def _pairs(pairs: Sequence[str], means: Mapping[str, float], conflicts: Any, look: Look | None) -> PlainTable:
    rows = []
    for pair in pairs:
        row = [
            pair.replace(":", " and "),
            _shown(means.get(pair)),
            _percent(conflicts.get(pair)),
            _verdict(means.get(pair)),
        ]
        if look is not None:
            row[3:3] = [_shown(look.cosines.loc["all", pair]), _percent(look.shared.get(pair))]
        rows.append(row)
    heads = ["tasks", "mean cosine", "steps in conflict", ""]
    if look is not None:
        heads[3:3] = ["cosine at the checkpoint", "examples in common"]
    return PlainTable(heads=heads, rows=rows, caption="Pairs of tasks")


def _shown(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def _verdict(cosine: float | None) -> str:
    if cosine is None or math.isnan(cosine):
        return "unknown"
    return "agree on average" if cosine > 0 else "conflict on average"


def _warnings(run: Run, look: Look | None) -> list[str]:
    if run.config.get("multi_input"):
        return [
            "Warning: each task has examples of its own, so no two gradients are of the same examples. Below 30 % of "
            "common examples the affinity of tasks is noise (arXiv:2604.07848)."
        ]
    few = [pair for pair, share in (look.shared if look is not None else {}).items() if share < FEWEST_SHARED]
    if not few:
        return []
    return [
        f"Warning: fewer than {FEWEST_SHARED:.0%} of the labelled examples are common to {', '.join(few)}. The "
        "affinity of such tasks is noise (arXiv:2604.07848)."
    ]


def _pictures(run: Run, logged: DataFrame, look: Look | None) -> list[Picture]:
    pictures = []
    if not logged.empty:
        worst = logged.mean().nsmallest(_MOST_LINES).index
        some = "" if len(worst) == logged.shape[1] else f" of the {_MOST_LINES} pairs with the lowest ones"
        shown = logged[[pair for pair in logged.columns if pair in set(worst)]]
        pictures.append(lines(shown, "cosine", f"Cosines{some} over the steps; below 0 the tasks conflict.", zero=True))
        matrices = conflict_matrices(run.weighting, [run])
        pictures += [] if matrices is None else [matrices]
    if look is not None:
        layers = look.cosines.drop(index="all")
        picture: Picture = layer_matrix(layers, look.batches)
        pictures.append(picture)
    return pictures
