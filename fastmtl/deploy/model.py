"""`fastmtl.load`: the model of a run, ready to predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmtl.architecture import AbsArchitecture, find_architecture
from fastmtl.data.collate import join_inputs
from fastmtl.data.encoders import find_encoder
from fastmtl.data.images import IMAGE_SUFFIXES, as_image, is_image
from fastmtl.data.loading import Parts, parts_of
from fastmtl.data.loading import load as load_data
from fastmtl.data.registry import find_dataset
from fastmtl.deploy.facts import ModelFacts, TaskFacts, example_of
from fastmtl.errors import CheckpointError, FastmtlError, UsageError
from fastmtl.trainer.checkpoint.files import differences, model_state, read_checkpoint
from fastmtl.trainer.run.config import TrainConfig, names_in, read_config
from fastmtl.trainer.run.directory import RunDirectory
from fastmtl.trainer.setup.checks import find_device
from fastmtl.trainer.setup.lazy import settle_shapes
from fastmtl.trainer.setup.loaders import to_device
from fastmtl.weighting import WEIGHTINGS

__all__ = ["WEIGHTS", "RunModel", "load"]

# The weights of an exported folder.
WEIGHTS = "model.safetensors"


class RunModel(nn.Module):
    """The network of a run, in evaluation mode: ``model(inputs)`` gives the predictions by task.

    Attributes:
        network: The architecture with its encoder and decoders.
        tasks: Task name to what its predictions are.
        config: The configuration of the run.
        facts: What is known of inputs and data.
        run: The run directory, or the exported folder.
        weights: The file that the weights are from.
    """

    def __init__(
        self,
        network: AbsArchitecture,
        parts: Parts,
        config: TrainConfig,
        facts: ModelFacts,
        run: RunDirectory,
        weights: Path,
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.facts = facts
        self.run = run
        self.weights = weights
        self._parts = parts
        self.eval()

    @property
    def tasks(self) -> dict[str, TaskFacts]:
        """Task name to what its predictions are."""
        return self.facts.tasks

    @property
    def multi_input(self) -> bool:
        """Whether the tasks were trained on inputs of their own."""
        return self.network.multi_input

    @property
    def reads_texts(self) -> bool:
        """Whether its inputs are tokens of texts, of any length."""
        return self._parts.encoder.value.tokenize is not None

    def forward(self, inputs: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the predictions by task, of some ``tasks`` or of all.

        Args:
            inputs: A batch, as the data set gives it: images (batch, 3, h, w), for example.
            tasks: Names of tasks.
        """
        if self.multi_input:
            names = list(self.tasks) if tasks is None else list(tasks)
            return {task: self.network(inputs, task)[task] for task in names}
        if tasks is not None and self.network.splits:
            features = self.network.trunk(inputs)
            return {task: self.network.decoders[task](self.network.branch(features, task)) for task in tasks}
        predictions = self.network(inputs)
        return {task: predictions[task] for task in (tasks or self.tasks)}

    def read(self, rows: Sequence[Mapping[str, Any]], folder: str | Path = ".") -> Any:
        """Return a batch of inputs, on the model's device.

        Args:
            rows: A row of columns for each example; an image is the column ``image``, a PIL image, its bytes, or the
                path of a file.
            folder: Where relative paths in the rows begin.

        Raises:
            UsageError: The data set does not say how rows are read, or a row cannot be.
        """
        read, info = self._parts.info.read_row, self._parts.info
        if read is None:
            raise UsageError(
                f"The data set {info.name} does not say how new examples are read: give its DatasetInfo a read_row, "
                f"or call the model with tensors."
            )
        facts = {**self.facts.data, "folder": str(folder)}
        inputs = [read(_Row(_with_image(row, Path(folder))), facts) for row in rows]
        device = next(self.parameters()).device
        return to_device(join_inputs(inputs, self._parts.encoder.value.tokenize), device)

    def predict(
        self, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str] | None = None, folder: str | Path = "."
    ) -> dict[str, Any]:
        """Return the predictions for rows of columns, see :meth:`read`, without gradients."""
        with torch.inference_mode():
            return self(self.read(rows, folder), tasks)


class _Row(dict[str, Any]):
    """The columns of a row; one that there is not is named to the user."""

    def __missing__(self, name: str) -> Any:
        raise UsageError(f"A row has no column {name!r}, which is an input, only {', '.join(self) or 'none'}.")


def _with_image(row: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return a row whose image, if it has one, is that of PIL, or an array."""
    value = row.get("image")
    named = isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)
    return {**row, "image": as_image(value, folder)} if named or is_image(value) else row


def load(run: str | Path, *, checkpoint: str = "best", device: str | torch.device = "cpu") -> RunModel:
    """Return the model of a run; the data it was trained on are not needed, unless its encoder is made of them.

    The code that the run's configuration names as its data set, architecture and encoder is imported and called: load
    only runs that you trust. Its losses, metrics, strategy and loggers are not.

    Args:
        run: A run directory, or a folder that ``fastmtl export --format safetensors`` wrote.
        checkpoint: ``"best"``, ``"last"``, or the path of a ``state_dict``.
        device: Where it goes.

    Raises:
        UsageError: There is no such run, or an object that it names.
        CheckpointError: There is no such checkpoint, it does not fit, or data that the encoder is made of are missing.

    Example::

        model = fastmtl.load("runs/multimnist-hps-mgda-20261130-120000")
        predictions = model(images)["left"].argmax(1)
    """
    folder = RunDirectory.open(run)
    # Losses, metrics, strategy and loggers may be code of others too, and a network needs none of them.
    config, facts = read_config(folder.config).for_network(), ModelFacts.read(folder.facts)
    weights, state = _weights(folder, checkpoint)
    kind = find_architecture(config.arch).value
    info = find_dataset(config.dataset).value
    encoder = find_encoder(
        config.encoder or (info.encoders or ("conv",))[0],
        config.encoder_args,
        stages=kind.needs_stages,
        fitting=info.encoders,
        of=info.name,
    )
    parts = parts_of(info, encoder, facts.data)
    if list(parts.tasks) != list(facts.tasks):
        raise CheckpointError(
            f"{folder.path} was trained on the tasks {', '.join(facts.tasks)}, but {info.name} has "
            f"{', '.join(parts.tasks)}."
        )
    place = find_device(device)
    network = kind(
        task_name=list(parts.tasks),
        encoder_class=_encoder_of_data(config, kind, folder) if facts.builds_encoder else parts.encoder_class,
        decoders=parts.decoders(),
        rep_grad=False,
        multi_input=info.multi_input,
        device=place,
        **config.arch_args,
    )
    if facts.inputs is not None:
        settle_shapes(network, lambda: _examples(facts, info.multi_input))
    _load_state(network, state, weights, config.weighting)
    return RunModel(network.to(place), parts, config, facts, folder, weights)


def _encoder_of_data(config: TrainConfig, kind: type[AbsArchitecture], folder: RunDirectory) -> Callable[[], nn.Module]:
    """Return what makes the encoder that a data set makes of its data, ``Splits.build_encoder``."""
    try:
        return load_data(
            config.dataset,
            batch_size=config.batch_size,
            test_batch_size=config.test_batch_size,
            seed=config.seed,
            path=config.dataset_path,
            n_train=config.train_size,
            num_workers=0,
            encoder=config.encoder,
            encoder_args=config.encoder_args,
            stages=kind.needs_stages,
            inputs=tuple(names_in(config.inputs)),
            tasks=config.tasks,
        ).encoder_class
    except (OSError, FastmtlError) as error:
        raise CheckpointError(
            f"The encoder of {folder.path} is made of its data (build_encoder of Splits), which cannot be loaded: "
            f"{str(error).rstrip('.')}."
        ) from error


def _examples(facts: ModelFacts, multi_input: bool) -> Any:
    example = example_of(facts.inputs, 2)
    return dict.fromkeys(facts.tasks, example) if multi_input else example


def _weights(folder: RunDirectory, checkpoint: str) -> tuple[Path, Mapping[str, Tensor]]:
    """Return the file of a checkpoint and the ``state_dict`` in it."""
    exported = folder.path / WEIGHTS
    if checkpoint == "best" and not folder.best.exists() and exported.exists():
        from safetensors.torch import load_file

        return exported, load_file(exported)
    path = {"best": folder.best, "last": folder.last}.get(checkpoint.lower(), Path(checkpoint))
    content = read_checkpoint(path, torch.device("cpu"))
    if isinstance(content, Mapping) and "model" in content and "names" in content:
        content = content["model"]
    return path, model_state(content, path)


def _load_state(network: nn.Module, state: Mapping[str, Tensor], path: Path, weighting: str) -> None:
    """Load the network's part of a state; the rest must be the strategy's and the losses'."""
    mine = network.state_dict()
    ours = {name: value for name, value in state.items() if name in mine or not _of_training(name, mine, weighting)}
    # A layer that has no shape yet takes any.
    told = differences({name: ours.get(name, value) if is_lazy(value) else value for name, value in mine.items()}, ours)
    if told:
        more = f" and {len(told) - 2} more differences" if len(told) > 2 else ""
        raise CheckpointError(f"The checkpoint {path} is of another model: {'; '.join(told[:2])}{more}.")
    network.load_state_dict(ours)


def _of_training(name: str, network: Iterable[str], weighting: str) -> bool:
    """Return whether a tensor that is not in the network may be a loss's or the strategy's."""
    top, _, below = name.partition(".")
    if any(top == mine.partition(".")[0] for mine in network):
        return False
    if below:
        # The package's own strategies have no modules.
        return top.rstrip("_") == "loss_fn" or weighting not in WEIGHTINGS
    return True
