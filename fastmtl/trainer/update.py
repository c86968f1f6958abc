"""What moves the parameters of a trainer: its optimizer and its schedule."""

from __future__ import annotations

from dataclasses import replace

from fastmtl.engine.tables import sparse_tables
from fastmtl.trainer.arguments import TrainerArguments
from fastmtl.trainer.optim.optimizer import group_names, make_optimizer
from fastmtl.trainer.optim.schedule import make_schedule
from fastmtl.trainer.setup.combinations import check_steered
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.state import TrainerState

__all__ = ["prepare_update"]


def prepare_update(trainer: TrainerState, options: StepOptions, arguments: TrainerArguments) -> StepOptions:
    """Give a trainer with a model its optimizer and schedule; return the options of the step that go with them.

    Raises:
        UsageError: They cannot be made, or not for all parameters.
    """
    names = [name for name, _ in trainer.model.named_parameters()]
    named = dict(zip(names, trainer.storage.trained, strict=True))
    trainer.known_names = set(names)
    trainer.optimizer = make_optimizer(
        named,
        arguments.optim_param,
        trainer.device,
        make=arguments.optimizer,
        sparse=sparse_tables(trainer.model),
        sharded=trainer.storage.is_sharded,
    )
    check_steered(trainer.model, trainer.weighting, trainer.optimizer)
    trainer.optimizer_groups = group_names(trainer.optimizer, named)
    trainer.storage.follow(trainer.optimizer)
    tell = print if trainer.peers.is_main_process else _say_nothing
    trainer.schedule = make_schedule(
        trainer.optimizer, arguments.scheduler_param, arguments.scheduler, arguments.resume_schedule, tell
    )
    if options.cuda_graph and trainer.schedule.per == "step":
        if options.cuda_graph is True or trainer.device.type == "cuda":
            trainer.logger.on_compile("cuda_graph: the step runs eagerly, as the learning rate changes with every step")
        return replace(options, cuda_graph=False)
    return options


def _say_nothing(_: str) -> None: ...
