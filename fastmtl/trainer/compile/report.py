"""How much of a training step ran compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

from fastmtl.engine.regions import Regions

__all__ = ["CompileReport", "measure_compiled"]


@dataclass(kw_only=True, slots=True)
class CompileReport:
    """How much of a training step ran compiled.

    Attributes:
        share: Time in compiled forward and backward passes divided by the time of the step.
        regions: The compiled regions, by name.
        graph_breaks: Places where a region fell into more than one graph.
        recompiles: Graphs compiled after a region's first call, for other shapes or values.
    """

    share: float
    regions: list[str]
    graph_breaks: int
    recompiles: int

    def __str__(self) -> str:
        return (
            f"compiled {' and '.join(self.regions)} and their gradients: {self.share:.0%} of the step, "
            f"{self.graph_breaks} graph breaks, {self.recompiles} recompiles"
        )


def measure_compiled(step: Callable[[], object], regions: Regions) -> CompileReport:
    """Run one training step under the profiler and say how much of it was compiled.

    Args:
        step: Runs the step; it has run before, so that its compilations are done.
        regions: The regions it runs.
    """
    # The profiler announces itself on stderr at any lower level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, record_function("fastmtl::step"):
        step()
    compiled = total = 0.0
    for event in profiler.events() or []:
        if event.name == "fastmtl::step":
            total = event.cpu_time_total
        elif event.name == "CompiledFunctionBackward" or event.name.startswith("Torch-Compiled Region"):
            compiled += event.cpu_time_total
    used = regions.used()
    return CompileReport(
        share=compiled / total if total else 0.0,
        regions=[region.name for region in used],
        graph_breaks=sum(sum(region.first.values()) - len(region.first) for region in used),
        recompiles=sum(region.graphs - sum(region.first.values()) for region in used),
    )
