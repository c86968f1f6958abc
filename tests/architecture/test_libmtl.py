"""LibMTL's checkpoints load, and its networks compute what ours do. Runs where FASTMTL_LIBMTL names a checkout."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl import model as own_models
from fastmtl.architecture import ARCHITECTURES

CHECKOUT = os.environ.get("FASTMTL_LIBMTL", "")
pytestmark = [
    pytest.mark.libmtl,
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="FASTMTL_LIBMTL names no checkout of LibMTL"),
]

IMAGE = (3, 64, 64)
ARGS: dict[str, dict[str, Any]] = {
    "MMoE": {"img_size": IMAGE, "num_experts": [2]},
    "CGC": {"img_size": IMAGE, "num_experts": [2, 1, 1]},
    "PLE": {"img_size": IMAGE, "num_experts": [1, 1, 1]},
    "DSelect_k": {"img_size": IMAGE, "num_experts": [3], "num_nonzeros": 2, "kgamma": 1.0},
}
NAMES = ["HPS", "MTAN", "Cross_stitch", "MMoE", "CGC", "PLE", "DSelect_k", "LTB"]
MULTI_INPUT = ["HPS", "MTAN", "MMoE", "CGC", "DSelect_k"]
TASKS = ["first", "second"]
# Relative L2 errors of outputs and of gradients.
ALLOWED = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-3)}


@pytest.fixture(scope="module")
def theirs() -> Iterator[ModuleType]:
    """LibMTL's package without its trainer, which asks for more than torch."""
    package = ModuleType("LibMTL")
    package.__path__ = [str(Path(CHECKOUT).expanduser() / "LibMTL")]
    sys.modules["LibMTL"] = package
    for name in ("architecture", "model"):
        setattr(package, name, importlib.import_module(f"LibMTL.{name}"))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "LibMTL"]:
        del sys.modules[name]


def _pair(theirs: Any, name: str, encoder: str, **options: Any) -> tuple[Any, Any]:
    """Return LibMTL's network and ours, each built from the same seed."""
    dim = 2048 if encoder == "resnet50" else 512
    decoders = nn.ModuleDict(
        {task: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, 5)) for task in TASKS}
    )
    found = []
    for classes, models in ((vars(theirs.architecture), theirs.model), (ARCHITECTURES, own_models)):
        torch.manual_seed(1)
        network = classes[name](
            task_name=TASKS,
            encoder_class=getattr(models, encoder),
            decoders=copy.deepcopy(decoders),
            device=torch.device("cpu"),
            **{"rep_grad": False, "multi_input": False, **options},
            **ARGS.get(name, {}),
        )
        network.epochs, network.epoch = 20, 3
        if hasattr(network, "_binary_codes"):
            # It reads the codes from text, of which numpy 2 takes "0" for true too.
            bits = [[int(bit) for bit in f"{expert:02b}"] for expert in range(3)]
            network._binary_codes = torch.tensor([bits], dtype=torch.bool)
        found.append(network)
    return found[0], found[1]


def _results(network: Any, inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return outputs and the gradients of one step, as LibMTL's trainer takes it."""
    torch.manual_seed(2)
    if isinstance(inputs, Tensor):
        preds = network(inputs)
    else:
        preds = {task: network(x, task)[task] for task, x in inputs.items()}
    # What forward left in .grad goes, as in its trainer.
    network.zero_grad()
    generator = torch.Generator().manual_seed(4)
    for task in TASKS:
        direction = torch.randn(preds[task].shape, generator=generator, dtype=preds[task].dtype)
        ((preds[task] - direction) ** 2).mean().backward(retain_graph=True)
    if network.rep_grad:
        reps = network.rep if isinstance(network.rep, dict) else dict.fromkeys(TASKS, network.rep)
        torch.autograd.backward([reps[task] for task in TASKS], [network.rep_tasks[task].grad for task in TASKS])
    found = {f"output of {task}": pred.detach() for task, pred in preds.items()}
    grads = {key: param.grad for key, param in network.named_parameters()}
    missing = sorted(key for key, grad in grads.items() if grad is None)
    found["gradient"] = torch.cat([grad.flatten() for grad in grads.values() if grad is not None])
    kept = [value for key, value in network.state_dict().items() if key not in grads]
    found["buffers"] = torch.cat([value.flatten().to(found["gradient"]) for value in kept] or [torch.zeros(1)])
    found["missing"] = torch.tensor([hash(key) % 1000003 for key in missing])
    return found


def _inputs(dtype: torch.dtype, multi_input: bool) -> Any:
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(3, *IMAGE, generator=generator).to(dtype) for _ in TASKS]
    return dict(zip(TASKS, batches, strict=True)) if multi_input else batches[0]


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
@pytest.mark.parametrize("name", NAMES)
def test_same_initial_weights_and_keys(theirs: Any, name: str, encoder: str) -> None:
    reference, ours = _pair(theirs, name, encoder)
    ours_state = ours.state_dict()
    for key, value in reference.state_dict().items():
        # LibMTL's PLE leaves a random image in the statistics of its first expert.
        if name != "PLE" or not any(each in key for each in ("running_", "num_batches")):
            assert torch.equal(value, ours_state[key]), key
    ours.load_state_dict(reference.state_dict(), strict=True)
    shared = [sum(p.numel() for p in network.get_share_params()) for network in (reference, ours)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rep_grad", [False, True], ids=["params", "rep"])
@pytest.mark.parametrize("multi_input", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
@pytest.mark.parametrize("name", NAMES)
def test_same_outputs_and_gradients(
    theirs: Any, name: str, encoder: str, multi_input: bool, rep_grad: bool, training: bool
) -> None:
    if multi_input and name not in MULTI_INPUT:
        pytest.skip(f"LibMTL's {name} takes one input for all tasks")
    reference, ours = _pair(theirs, name, encoder, multi_input=multi_input, rep_grad=rep_grad)
    ours.load_state_dict(reference.state_dict(), strict=True)
    start = copy.deepcopy(reference.state_dict())
    for dtype, (output_error, gradient_error) in ALLOWED.items():
        found = []
        for network in (reference, ours):
            network.load_state_dict(start)
            network.to(dtype)
            network.epoch = 3
            network.train(training)
            found.append(_results(network, _inputs(dtype, multi_input)))
        want, got = found
        assert want.keys() == got.keys()
        assert torch.equal(want["missing"], got["missing"])
        for key in want:
            allowed = gradient_error if key == "gradient" else output_error
            assert want[key].shape == got[key].shape, key
            error = (got[key] - want[key]).double().norm() / want[key].double().norm().clamp(min=1e-300)
            assert error <= allowed, f"{key} in {dtype}: {error}"
