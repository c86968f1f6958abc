"""What other projects need repaired to run on today's packages and on any device, in the running process alone."""

from __future__ import annotations

import csv
import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["OnDevice", "repair", "repair_script"]

_OPTIONAL = (
    *("torch_geometric", "torch_geometric.loader", "cvxpy", "qpsolvers", "scipy", "scipy.optimize", "wandb"),
    *("seaborn", "tqdm"),
)


class OnDevice:
    """Torch with another device in the place of the one that is named."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return (lambda *args, **kwargs: self._device) if name == "device" else getattr(torch, name)


def repair() -> None:
    """Give numpy and torch the names back that they dropped, and put stand-ins in the place of what is not installed.

    Only some strategies use it; those fail when they do.
    """
    if not hasattr(np, "alltrue"):
        np.alltrue = np.all  # type: ignore[attr-defined]
    former: Any = torch
    former.symeig = lambda matrix, eigenvectors=True: torch.linalg.eigh(matrix)
    for name in _OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            stub: Any = types.ModuleType(name)
            # Others look whether it is installed.
            stub.__spec__ = ModuleSpec(name, None)
            stub.__getattr__ = lambda attribute: None
            sys.modules[name] = stub
    sys.modules["torch_geometric.loader"].DataLoader = DataLoader  # type: ignore[attr-defined]


def repair_script(device: torch.device, source: str) -> None:
    """Repair what a training script takes for granted: a GPU, the network, processes for its data, former names."""
    repair()
    loader: Any = DataLoader
    module: Any = nn.Module
    tensor: Any = Tensor
    plain_init, plain_load = loader.__init__, module.load_state_dict

    def without_workers(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **{**kwargs, "num_workers": 0, "pin_memory": False})

    def load_unless_none(self: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        return None if isinstance(state, _NoWeights) else plain_load(self, state, *args, **kwargs)

    # Workers would take processors from the step.
    loader.__init__ = without_workers
    # The first weights do not change how long a step takes.
    torch.hub.load_state_dict_from_url = lambda *args, **kwargs: _NoWeights()
    module.load_state_dict = load_unless_none
    if device.type == "cpu":
        tensor.cuda = module.cuda = lambda self, *args, **kwargs: self
    if "transformers" in source:
        _repair_transformers()


def _repair_transformers() -> None:
    """Give transformers the names back that it dropped."""
    # With its first network the package puts another module in its place, which would lack them.
    importlib.import_module("transformers").BertModel  # noqa: B018
    transformers: Any = importlib.import_module("transformers")
    base = transformers.PreTrainedTokenizerBase
    dropped = {"AdamW": torch.optim.AdamW, "DataProcessor": _DataProcessor}
    for owner, names in ((transformers, dropped), (base, {"encode_plus": base.__call__})):
        for name, stand_in in names.items():
            if not hasattr(owner, name):
                setattr(owner, name, stand_in)


class _DataProcessor:
    """Transformers' former base class of what reads a data set's files."""

    @classmethod
    def _read_tsv(cls, file: str, quotechar: str | None = None) -> list[list[str]]:
        with open(file, encoding="utf-8-sig") as lines:
            return list(csv.reader(lines, delimiter="\t", quotechar=quotechar))


class _NoWeights(dict[str, Tensor]):
    """Stands for a file of weights that is not looked for."""
