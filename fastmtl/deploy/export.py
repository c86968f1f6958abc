"""`fastmtl export`: a model for other programs, checked against its eager outputs."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.deploy.card import card_of
from fastmtl.deploy.facts import example_of
from fastmtl.deploy.model import WEIGHTS, RunModel
from fastmtl.engine.trees import leaves
from fastmtl.errors import FastmtlError, UsageError
from fastmtl.support.extras import need
from fastmtl.support.names import resolve_name
from fastmtl.trainer.run.directory import RunDirectory, write_atomically

__all__ = ["FORMATS", "PARTS", "TOLERANCE", "export"]

FORMATS = ("pt2", "onnx", "safetensors")
PARTS = ("whole", "apart")
# Of the greatest difference from eager outputs, relative to the greatest of those where they are above 1.
TOLERANCE = 1e-5
# Rows of the example, and of the inputs that the exported program is checked with.
_ROWS, _CHECKED = 2, (1, 5)


def export(
    model: RunModel, out: Path, *, format: str, tasks: Sequence[str] = (), parts: str = "whole"
) -> dict[str, float]:
    """Write a model as one program, or its backbone and its heads as one each; return the differences from eager.

    The first dimension of all inputs may have any size, and texts any number of tokens; where the model does not allow
    that, a line says so. Each program is read back and compared with the model on other
    batch sizes than it was exported with.

    Args:
        model: The model, on the CPU.
        out: Folder to write to.
        format: ``"pt2"`` (torch.export), ``"onnx"``, or ``"safetensors"``: the weights with what `fastmtl.load` needs.
        tasks: Tasks whose predictions are wanted; all if empty.
        parts: ``"whole"``, or ``"apart"`` for ``backbone`` and ``head-<task>`` programs: what the backbone gives is
            what heads read.

    Returns:
        File name to the greatest difference from the eager outputs.

    Raises:
        UsageError: There is no such task or format, or the model cannot be taken apart.
        FastmtlError: The model cannot be exported, or the exported program differs.
    """
    format = resolve_name(format, {name: name for name in FORMATS}, "format")
    parts = resolve_name(parts, {name: name for name in PARTS}, "parts")
    names = [resolve_name(task, {name: name for name in model.tasks}, "task") for task in tasks] or list(model.tasks)
    out.mkdir(parents=True, exist_ok=True)
    if format == "safetensors":
        if parts != "whole" or tasks:
            raise UsageError("safetensors holds the whole model: leave out tasks and parts.")
        return _write_weights(model, out)
    write = {"pt2": _write_pt2, "onnx": _write_onnx}[format]
    differences: dict[str, float] = {}
    for name, program, make_inputs in _programs(model, names, parts):
        path = out / f"{name}.{format}"
        if isinstance(make_inputs, _Texts):
            try:
                differences[path.name] = _written(path, program, make_inputs, write, any_length=True)
                continue
            except UsageError:
                raise
            except FastmtlError as error:
                print(f"{path}: for texts of {make_inputs.length} tokens alone, padded or cut to these: {error}")
        differences[path.name] = _written(path, program, make_inputs, write)
    return differences


def _written(path: Path, program: nn.Module, make_inputs: MakeInputs, write: Write, any_length: bool = False) -> float:
    """Write a program and return its greatest difference from the module.

    Raises:
        FastmtlError: It cannot be written, or differs.
    """
    example = make_inputs(_ROWS)
    others = make_inputs.of_other_lengths if any_length and isinstance(make_inputs, _Texts) else make_inputs
    with _quiet():
        try:
            call = write(_exported(program, example, _dynamic(example, any_length)), example, path)
            return _check(path, program, call, others)
        except FastmtlError:
            raise
        except Exception as error:
            # The exporters, and networks that take no other sizes, raise what they like.
            path.unlink(missing_ok=True)
            raise FastmtlError(
                f"{path.stem} cannot be exported as {path.suffix[1:]}: {type(error).__name__}: {_first_line(error)}"
            ) from error


class _Whole(nn.Module):
    """Inputs to predictions by task; one pass through the backbone for all of them."""

    def __init__(self, model: RunModel, tasks: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(tasks)

    def forward(self, inputs: Any) -> dict[str, Any]:
        return self.model(inputs, self.names)


class _Backbone(nn.Module):
    """Inputs to the features that all tasks share."""

    def __init__(self, model: RunModel) -> None:
        super().__init__()
        self.network = model.network

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        features = self.network.trunk(inputs)
        return {f"features{place}": feature for place, feature in enumerate(features)}


class _Head(nn.Module):
    """Shared features to one task's predictions."""

    def __init__(self, model: RunModel, task: str) -> None:
        super().__init__()
        self.network = model.network
        self.task = task

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        network = self.network
        return {self.task: network.decoders[self.task](network.branch(tuple(inputs.values()), self.task))}


def _exported(program: nn.Module, inputs: Any, dims: Any) -> torch.export.ExportedProgram:
    """Return a program without the modules whose parameters its outputs do not depend on."""
    exported = torch.export.export(program, (inputs,), dynamic_shapes=(dims,))
    exported.graph_module.graph.eliminate_dead_code()
    names = exported.graph_signature.inputs_to_parameters
    used = [names[node.name] for node in exported.graph.nodes if node.name in names and node.users]
    copied = copy.deepcopy(program)
    if not _prune(copied, {id(copied.get_parameter(name)) for name in used}):
        return exported
    return torch.export.export(copied, (inputs,), dynamic_shapes=(dims,))


def _prune(module: nn.Module, used: Collection[int]) -> bool:
    """Take away the modules below one that have parameters, but none that is used; return whether there were any."""
    found = False
    for name, child in list(module.named_children()):
        params = list(child.parameters())
        if params and not any(id(param) in used for param in params):
            setattr(module, name, nn.Identity())
            found = True
        else:
            found |= _prune(child, used)
    return found


MakeInputs = Callable[[int], Any]
Made = tuple[str, nn.Module, MakeInputs]


class _Texts:
    """Makes inputs of a model that reads tokens of texts, for a number of rows."""

    def __init__(self, form: Any) -> None:
        self.form = form
        shapes = [entry["shape"] for entry in form.get("entries", {"": form}).values()]
        self.length = max(shape[0] for shape in shapes)

    def __call__(self, rows: int) -> Any:
        """Return texts of the length that was seen."""
        return example_of(self.form, rows, seed=rows)

    def of_other_lengths(self, rows: int) -> Any:
        """Return texts of another length, which depends on the number of rows."""
        return example_of(self.form, rows, seed=rows, length=max(2, self.length - rows))


def _programs(model: RunModel, tasks: Sequence[str], parts: str) -> Iterator[Made]:
    """Yield the name of each program, the module, and what makes inputs for it, given a number of rows."""

    def plain(rows: int) -> Any:
        return example_of(model.facts.inputs, rows, seed=rows)

    inputs: MakeInputs = _Texts(model.facts.inputs) if model.reads_texts else plain
    if parts == "whole":
        yield "model", _Whole(model, tasks), inputs
        return
    if not model.network.splits or model.multi_input:
        raise UsageError(
            f"parts must be whole for {type(model.network).__name__}"
            f"{' with inputs of each task' if model.multi_input else ''}: it has no backbone that all tasks share."
        )
    backbone = _Backbone(model)
    with torch.no_grad():
        known = backbone(inputs(_ROWS))
    if not all(isinstance(feature, Tensor) for feature in known.values()):
        raise UsageError(f"parts must be whole for {type(model.network).__name__}: its backbone gives no tensors.")
    yield "backbone", backbone, inputs

    def features(rows: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: feature.contiguous() for name, feature in backbone(inputs(rows)).items()}

    for task in tasks:
        yield f"head-{task}", _Head(model, task), features


def _dynamic(inputs: Any, any_length: bool) -> Any:
    """Return which dimensions may have any size: the first of all tensors, and the second of texts."""
    if isinstance(inputs, Tensor):
        batch = {0: torch.export.Dim("batch", min=1, max=2**20)}
        return batch | ({1: torch.export.Dim.AUTO} if any_length else {})
    return {name: _dynamic(entry, any_length) for name, entry in inputs.items()}


Call = Callable[[Any], dict[str, Any]]
Write = Callable[[torch.export.ExportedProgram, Any, Path], Call]


def _write_pt2(program: torch.export.ExportedProgram, inputs: Any, path: Path) -> Call:
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda given: loaded(given)


def _write_onnx(program: torch.export.ExportedProgram, inputs: Any, path: Path) -> Call:
    need("onnxscript", "export", "The format onnx")
    runtime = need("onnxruntime", "export", "The format onnx")
    names = ["input"] if isinstance(inputs, Tensor) else list(inputs)
    with torch.no_grad():
        outputs = list(program.module()(inputs))
    torch.onnx.export(
        program,
        (),
        str(path),
        dynamo=True,
        input_names=names,
        output_names=outputs,
        external_data=False,
        verbose=False,
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}

    def call(given: Any) -> dict[str, Any]:
        by_name = dict(zip(names, [given] if isinstance(given, Tensor) else given.values(), strict=True))
        # An input that changes nothing is not in the graph.
        feed = {name: tensor.numpy() for name, tensor in by_name.items() if name in wanted}
        return dict(zip(outputs, map(torch.from_numpy, session.run(None, feed)), strict=True))

    return call


def _check(path: Path, program: nn.Module, call: Call, make_inputs: MakeInputs) -> float:
    """Return the greatest difference of a program that was read back from the eager one; refuse what differs."""
    worst = 0.0
    for rows in _CHECKED:
        inputs = make_inputs(rows)
        with torch.no_grad():
            wanted, got = leaves(program(inputs)), leaves(call(inputs))
        for one, other in zip(wanted, got, strict=True):
            scale = max(1.0, float(one.abs().max()))
            difference = float((one - other).abs().max()) / scale if one.shape == other.shape else float("nan")
            worst = max(worst, difference) if difference == difference else difference
            if not difference <= TOLERANCE:
                path.unlink(missing_ok=True)
                raise FastmtlError(
                    f"{path.name} differs from the model by {difference:.2g} with {rows} rows, over {TOLERANCE:g}, "
                    "and was removed."
                )
    return worst


def _write_weights(model: RunModel, out: Path) -> dict[str, float]:
    """Write the weights, and what `fastmtl.load` and the Hub read beside them."""
    from safetensors.torch import load_file, save_file

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.network.state_dict().items()}
    path, target = out / WEIGHTS, RunDirectory(out)
    held = next((file for file in (target.last, target.best, target.metrics) if file.exists()), None)
    if held is not None:
        raise UsageError(f"{out} holds a run ({held.name}), whose files the exported ones would replace: name another.")
    save_file(state, path, metadata={"format": "pt"})
    read = load_file(path)
    worst = max(
        (float((read[name] - tensor).abs().max()) for name, tensor in state.items() if tensor.numel()), default=0
    )
    write_atomically(target.config, replace(model.config, dataset_path=None).as_yaml())
    model.facts.write(target.facts)
    if model.weights == model.run.path / WEIGHTS:
        # An exported folder has the card of its weights.
        card = model.run.card.read_text(encoding="utf-8") if model.run.card.exists() else None
    else:
        card = card_of(model.run, model.weights)
    if card is not None:
        write_atomically(target.card, card)
    return {WEIGHTS: worst}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' advice from the user, who can do nothing with it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
