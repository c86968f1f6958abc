"""The options of a run, each in one place: name, type, default, limits, what it does.

The trainer's signature, the flags of ``fastmtl train``, ``config.yaml``, the checks and ``docs/options.md`` come from
here. `StepOptions` are those a step takes, `TrainerOptions` also those of its trainer; what only the command has is in
`fastmtl.trainer.run.config.TrainConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fastmtl.engine.groups import settled_groups
from fastmtl.support.hyper import check, option
from fastmtl.trainer.optim.schedule import RESUMED
from fastmtl.trainer.precision import PRECISIONS

__all__ = ["StepOptions", "TrainerOptions"]

_model, _training = partial(option, panel="Model"), partial(option, panel="Optimisation")
_machine, _logging = partial(option, panel="Machine"), partial(option, panel="Logging")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of the training step.

    Raises:
        UsageError: A value has the wrong type, lies outside its range or is none of the allowed ones.
    """

    accumulate: int = _training(
        None,
        "Batches per step. Each task's gradient is averaged over the labels of all of them, then the strategy is "
        "called. Losses must be means over the entries that have labels, and finite where there are none.",
        otherwise=1,
        least=1,
    )
    gradient_accumulation_steps: int | None = _training(
        None, "Another name for accumulate.", least=1, same_as="accumulate"
    )
    clip_grad_norm: float | None = _training(
        None, "Greatest norm of all gradients of the update together; no limit if not given.", above=0, finite=False
    )
    update_weights_every: int = _training(
        1,
        "Steps from one solve to the next, for strategies that use the Gram matrix. The steps between them keep the "
        "last weights and need one backward pass in all, not one per task (GradVac, MoDo and SDMGrad only save the "
        "solve).",
        least=1,
    )
    weight_momentum: float = _training(
        0.0,
        "Decay of a moving average of the task weights, which then takes their place (CR-MOGM: Zhou et al., NeurIPS "
        "2022); 0 for none.",
        least=0,
        below=1,
    )
    tasks_per_step: int | None = _training(
        None,
        "Tasks trained in a step, in turn, so that all come up equally often; the parameters and the state of the "
        "others stay as they are. All if not given.",
        least=1,
    )
    groups: str | dict[str, str] = _training(
        "all",
        "Groups of shared parameters, each with a Gram matrix and weights of its own, for strategies that use one: all "
        "in one; module, by the blocks of the network; layer, by the modules that have them; or by regular expressions "
        "of their names, the first that is found counts, REGEX=NAME,REGEX=NAME. Task-specific parameters get the mean "
        "of the groups' weights.",
    )
    gram: str = _training(
        "exact",
        "For several processes. exact: the Gram matrix of the whole batch's gradients; training equals that of one "
        "process. local: the mean of the processes' Gram matrices; less is sent, but results differ.",
        choices=("exact", "local"),
    )
    shard: str = _training(
        "none",
        "With several processes: fsdp for a shard of parameters, gradients and optimizer state in each "
        "(torch.distributed.fsdp.fully_shard); none for all of them in each.",
        choices=("none", "fsdp"),
    )
    precision: str = _machine(
        "fp32",
        "What the network computes in: bf16 and fp16 by autocast, with losses, Gram matrix and update in float32; fp16 "
        "scales the losses and skips steps that overflow.",
        choices=PRECISIONS,
    )
    compile: bool | Literal["auto"] = _machine(
        False,
        "Compile the forward and backward passes; auto trains the first steps both ways, keeps the faster and says "
        "which.",
        resumable=True,
    )
    cuda_graph: bool | Literal["auto"] = _machine(
        False,
        "Capture the step as a CUDA graph and replay it; where that is impossible, it runs eagerly and says why. auto "
        "tries it on CUDA, keeps the faster of the eager and the captured step and says which.",
        resumable=True,
    )
    vjps: str = _machine(
        "auto",
        "How the tasks' gradients are computed in the shared network: sequential, one task after the other; "
        "batched, together, by torch's batching rules; layerwise (or compressed), layer by layer, as far as the "
        "Gram matrix needs them, and one gradient for the update; sketch, likewise, with an unbiased estimate of "
        "the Gram matrix; blockwise, with groups, one block of the network after the other, so that the gradients "
        "of one at most are in memory; traced, compiled in one graph with the forward pass. Where a method is not "
        "supported, sequential takes its place. auto tries the methods from 8 tasks on, on CUDA from 3, keeps the "
        "fastest and says which; below, it is sequential, or traced if compile is on and the network small and "
        "without convolutions. batched, layerwise, blockwise and sketch leave the shared network eager if compile "
        "is on.",
        choices=("auto", "sequential", "batched", "layerwise", "compressed", "blockwise", "sketch", "traced"),
    )
    sketch_width: int = _machine(
        32, "With vjps=sketch: rows of the random matrices; the error falls with their square root.", least=2
    )
    gram_check_every: int = _machine(
        100,
        "With vjps=sketch: steps from one comparison with the exact Gram matrix to the next; the first step has one.",
        least=1,
    )
    cotangents: str = _machine(
        "auto",
        "With vjps=layerwise or sketch, the gradients of the layers' outputs: keep them until the weights are known or "
        "recompute them by a second backward pass. auto keeps them where that takes no more memory than the gradients "
        "of all tasks.",
        choices=("auto", "keep", "recompute"),
    )

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "groups", settled_groups(self.groups))


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(StepOptions):
    """Options of the trainer that are settings of a run of ``fastmtl train`` too."""

    load_strict: bool = _model(
        True,
        "Refuse a load_path whose names or shapes differ from the model's. If off, what fits is loaded, such as a "
        "backbone, and listed; a strategy's own parameters fit only the same strategy and tasks.",
    )
    resume_schedule: str = _training(
        "new",
        "What a resumed run follows if its epochs, learning rates or optimizer settings differ from the checkpoint's. "
        "new: its own schedule, from the step reached. stored: the checkpoint's.",
        choices=RESUMED,
        resumable=True,
    )
    checkpoint_every: int | None = _training(
        None, "Steps after which last.pt is written; only at the end of an epoch if not given.", least=1, resumable=True
    )
    early_stopping: int | None = _training(
        None,
        "Epochs after which the run ends if no task has improved in them, on the validation data or, without, on the "
        "test data.",
        least=1,
    )
    task_patience: dict[str, int] | None = _training(
        None,
        "Epochs after which a task is no longer trained if it has not improved in them, click=3,conversion=5; the run "
        "ends when no task is trained.",
    )
    sync_batch_norm: bool = _training(
        False, "With several processes, batch norms take the statistics of the whole batch."
    )
    device: str | int | torch.device | None = _machine(
        None, "cpu, cuda, cuda:1, mps; the first GPU, or else the CPU, if not given.", resumable=True
    )
    tf32: bool | None = _machine(
        None, "On CUDA, round float32 products and convolutions to TF32, or not; torch's settings if not given."
    )
    channels_last: bool = _machine(
        False, "Keep images and convolutions in channels-last memory format, which GPUs prefer."
    )
    peer_timeout: float | None = _machine(
        None,
        "With several processes, seconds that one waits for another before it ends with an error; torch's default if "
        "not given.",
        above=0,
        resumable=True,
    )
    log_every: int = _logging(
        20, "Steps between two reads of losses and weights from the device.", least=1, resumable=True
    )
    limit_batches: int | None = option(None, "Steps of each pass at most, for a quick try.", least=1, panel="Data")
