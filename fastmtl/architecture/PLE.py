"""Progressive layered extraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.experts import (
    IMG_SIZE,
    NUM_EXPERTS,
    Experts,
    count_experts,
    make_experts,
    make_gate,
    mix,
    read,
    size_of_gates,
)
from fastmtl.architecture.stages import Stages
from fastmtl.support.hyper import Hyper

__all__ = ["PLE"]


class PLE(AbsArchitecture):
    """Progressive Layered Extraction: CGC at every stage of the encoder.

    At level i each task's gate mixes the outputs of the shared experts and of its own experts for the task's mixture of
    level i - 1. With ``shared_gate=True``, as in the paper, the shared experts read a shared mixture instead, which at
    every level but the last a further gate makes of the outputs of all experts. The levels are a ResNet's stem and
    layers, or the stages of a ``fastmtl.model.StagedEncoder``.

    With ``img_size``, the size of an input, a gate reads the flattened mixture of level i - 1, as in LibMTL; without,
    the mean features of the level's shared experts. Experts that are a ``FeatureEncoder`` share its tables, whose
    vectors are the inputs of the first level, also of its gates. The shared parameters are those of the shared experts.

    Source: Tang et al., "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized
    Recommendations", RecSys 2020.

    Raises:
        UsageError: The encoder is not made of stages, or ``num_experts`` does not fit the tasks.
    """

    needs_stages = True
    hyper = {  # noqa: RUF012
        "img_size": IMG_SIZE,
        "num_experts": NUM_EXPERTS,
        "shared_gate": Hyper(type=bool, default=False, help="A shared path with a gate of its own, as in the paper."),
    }

    def _make_network(self) -> None:
        shared, *specific = count_experts(self.kwargs["num_experts"], self.task_num, "PLE")
        experts, self.bottom = make_experts(self.encoder_class, shared)
        counts = zip(self.task_name, specific, strict=True)
        Stages.of(experts[0], "PLE", made_by=self.encoder_class)
        own = {task: make_experts(self.encoder_class, count, self.bottom)[0] for task, count in counts}
        img_size = size_of_gates(self.kwargs["img_size"], self.bottom)
        self.encoder = _Extraction(experts, own, img_size, bool(self.kwargs["shared_gate"]))

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        """Return the predictions by task name, of ``task_name`` alone if it is given."""
        reps = self.encoder(self.bottom(inputs), self.task_name if task_name is None else [task_name])
        return {task: self.decoders[task](self._prepare_rep(rep, task, same_rep=False)) for task, rep in reps.items()}

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the shared experts."""
        return [*self.bottom.parameters(), *cast(_Extraction, self.encoder).shared_layer.parameters()]


def _by_level(experts: Sequence[nn.Module]) -> list[tuple[nn.Module, ...]]:
    return list(zip(*(Stages.of(expert, "PLE").levels() for expert in experts), strict=True))


class _Extraction(nn.Module):
    def __init__(
        self,
        shared: Sequence[nn.Module],
        specific: Mapping[str, Sequence[nn.Module]],
        img_size: Sequence[int],
        shared_gate: bool,
    ) -> None:
        super().__init__()
        self.img_size = list(img_size)
        dims = Stages.of(shared[0], "PLE").level_dims()
        parts = {task: _by_level(experts) for task, experts in specific.items()}
        self.specific_layer = nn.ModuleDict(
            {
                str(i): nn.ModuleDict({task: Experts(levels[i]) for task, levels in parts.items()})
                for i in range(len(dims))
            }
        )
        self.shared_layer = nn.ModuleDict({str(i): Experts(level) for i, level in enumerate(_by_level(shared))})
        self.sizes = self._level_sizes() if self.img_size else [[dim] for dim in dims]
        widths = [prod(size) for size in self.sizes]
        self.gate_specific = nn.ModuleDict(
            {
                task: nn.ModuleList(make_gate(width, len(shared) + len(experts)) for width in widths)
                for task, experts in specific.items()
            }
        )
        every = len(shared) + sum(map(len, specific.values()))
        self.gate_shared = nn.ModuleList(make_gate(width, every) for width in widths[:-1]) if shared_gate else None

    @torch.no_grad()
    def _level_sizes(self) -> list[list[int]]:
        """Return the input size of each level, from a pass of one random input."""
        modes = [(module, module.training) for module in self.modules()]
        # Evaluation mode does not update batch norm's statistics.
        self.eval()
        x = torch.rand(self.img_size).unsqueeze(0)
        sizes = [list(x.shape[1:])]
        for level in list(self.shared_layer.values())[:-1]:
            x = cast(Experts, level)[0](x)
            sizes.append(list(x.shape[1:]))
        for module, training in modes:
            module.training = training
        return sizes

    def forward(self, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return the representations of ``tasks``."""
        if self.gate_shared is not None:
            return self._with_shared_path(inputs, tasks)
        reps = {}
        for task in tasks:
            reps[task] = inputs
            for i, experts in enumerate(self.shared_layer.values()):
                reps[task] = self._level(i, task, reps[task], experts(reps[task]), self._specific(i, task, reps[task]))
        return reps

    def _with_shared_path(self, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        assert self.gate_shared is not None
        reps, common = dict.fromkeys(self.gate_specific, inputs), inputs
        for i, experts in enumerate(self.shared_layer.values()):
            last = i == len(self.gate_shared)
            shared = experts(common)
            specific = {task: self._specific(i, task, rep) for task, rep in reps.items() if task in tasks or not last}
            if not last:
                selector = self.gate_shared[i](self._read(i, common, shared))
                common = mix(torch.cat([shared, *specific.values()]), selector)
            reps = {task: self._level(i, task, reps[task], shared, outputs) for task, outputs in specific.items()}
        return {task: reps[task] for task in tasks}

    def _specific(self, level: int, task: str, rep: Tensor) -> Tensor:
        return cast(nn.ModuleDict, self.specific_layer[str(level)])[task](rep)

    def _level(self, level: int, task: str, rep: Tensor, shared: Tensor, specific: Tensor) -> Tensor:
        gate = cast(nn.ModuleList, self.gate_specific[task])[level]
        return mix(torch.cat([shared, specific]), gate(self._read(level, rep, shared)))

    def _read(self, level: int, rep: Tensor, shared: Tensor) -> Tensor:
        return read(rep, shared, self.sizes[level] if self.img_size else ())
