"""Training scripts of other projects on the data of our recipes: which there are, and how they are called."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmtl.errors import UsageError

__all__ = ["Script", "Setting", "find_scripts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a script is asked to do.

    Attributes:
        strategy: Our name of the strategy.
        batch: Rows of a batch.
        data: Folder of the data set; None where it needs none.
    """

    strategy: str
    batch: int
    data: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A training script of a project.

    Attributes:
        project: The project's name.
        file: A file that its checkouts have.
        folder: Where the script is run, in a checkout.
        entry: The script, in that folder.
        arguments: Its command line.
        names: Our name of each strategy to its own; None for LibMTL's, which are ours.
        prepare: Writes what it needs into that folder.
        differs: In what its step is another than the recipe's, beside network and losses as its authors have them.
    """

    project: str
    file: str
    folder: str
    entry: str
    arguments: Callable[[Setting], list[str]] = lambda setting: []
    names: Mapping[str, str] | None = None
    prepare: Callable[[Path, Setting], None] = lambda folder, setting: None
    differs: str = ""

    def has(self, strategy: str, checkout: Path) -> bool:
        """Return whether it can train by a strategy of ours."""
        if self.names is not None:
            return strategy in self.names
        return (checkout / "LibMTL" / "weighting" / f"{strategy}.py").is_file()


def _libmtl(folder: str, entry: str, batch: str, *more: str, above: bool = False) -> Script:
    """Return an example of LibMTL; ``above`` if it is given the folder that holds the data set's."""

    def arguments(setting: Setting) -> list[str]:
        data = Path(setting.data or "")
        given = ["--weighting", setting.strategy, "--dataset_path", str(data.parent if above else data)]
        return [*given, batch, str(setting.batch), "--scheduler", "step", *more]

    folder = f"examples/{folder}"
    return Script(project="LibMTL", file=f"{folder}/{entry}", folder=folder, entry=entry, arguments=arguments)


_OF_FAMO = {
    "EW": "ls",
    "UW": "uw",
    "DWA": "dwa",
    "RLW": "rlw",
    "MGDA": "mgda",
    "PCGrad": "pcgrad",
    "CAGrad": "cagrad",
    "IMTL": "imtl",
    "Nash_MTL": "nashmtl",
    "FAMO": "famo",
}


def _famo(name: str, *more: str) -> Script:
    def arguments(setting: Setting) -> list[str]:
        method = _OF_FAMO[setting.strategy]
        return ["--method", method, "--data-path", str(setting.data), "--batch-size", str(setting.batch), *more]

    file = f"experiments/{name}/trainer.py"
    return Script(project="FAMO", file=file, folder=".", entry=file, arguments=arguments, names=_OF_FAMO)


_OF_CONFIG = {
    "EW": "StandardTrainer()",
    "PCGrad": "get_gradvec_trainer({name}TrainerBasis, PCGradOperator())",
    "ConFIG": "get_gradvec_trainer({name}TrainerBasis, ConFIGOperator())",
    "MConFIG": "get_momentum_trainer({name}TrainerBasis, ConFIGOperator())",
}
# As the guide to ConFIG's experiments calls them, but with as many points as the recipe has.
_CONFIG = """
from conflictfree.grad_operator import *
from lib_pinns.{module}.trainer import *
run_{module}(
    name="step", trainer={trainer}, save_path="trained/", device="cpu", n_losses={losses},
    validation_epoch_frequency=10**9, {points},
)
"""


def _config(equation: str, losses: int, sides: Sequence[str], differs: str = "") -> Script:
    module = equation.lower()

    def prepare(folder: Path, setting: Setting) -> None:
        trainer = _OF_CONFIG[setting.strategy].format(name=equation)
        rows = {"n_internal": setting.batch, **dict.fromkeys(sides, setting.batch // 10)}
        points = ", ".join(f"{name}={count}" for name, count in rows.items())
        text = _CONFIG.format(module=module, trainer=trainer, losses=losses, points=points)
        (folder / "step.py").write_text(text, encoding="utf-8")

    folder = "experiments/PINN"
    return Script(
        project="ConFIG", file=f"{folder}/lib_pinns/{module}/trainer.py", folder=folder, entry="step.py",
        names=_OF_CONFIG, prepare=prepare, differs=differs,
    )  # fmt: skip


def _pareto_images(folder: Path, setting: Setting) -> None:
    """Write images of noise in the form and number of those that Pareto MTL's script reads."""
    rng = np.random.default_rng(0)
    parts = []
    for rows in (120_000, 20_000):
        parts += [rng.integers(0, 256, (rows, 36, 36), dtype=np.uint8), rng.integers(0, 10, (rows, 2))]
    with (folder / "data" / "multi_mnist.pickle").open("wb") as file:
        pickle.dump(parts, file, protocol=4)


_PARETO = Script(
    project="ParetoMTL",
    file="multiMNIST/train.py",
    folder="multiMNIST",
    entry="train.py",
    names={"MGDA": "Pareto MTL"},
    prepare=_pareto_images,
    differs="Pareto MTL's constrained form of MGDA on one grey channel, in batches of 256",
)

_SCRIPTS: dict[str, tuple[Script, ...]] = {
    "nyuv2": (_libmtl("nyu", "main_segnet.py", "--train_bs", "--aug"), _famo("nyuv2")),
    "nyuv2-resnet50": (_libmtl("nyu", "main.py", "--train_bs", "--aug"),),
    "cityscapes": (_famo("cityscapes"),),
    "celeba": (_famo("celeba"),),
    "office-31": (_libmtl("office", "main.py", "--bs", "--multi_input", "--dataset", "office-31"),),
    "office-home": (_libmtl("office", "main.py", "--bs", "--multi_input", "--dataset", "office-home"),),
    "pawsx": (_libmtl("xtreme", "main.py", "--bs", "--multi_input", above=True),),
    "multimnist": (_PARETO,),
    "multifashion": (_PARETO,),
    "multi-fashion-mnist": (_PARETO,),
    "burgers": (_config("Burgers", 3, ("n_boundary", "n_initial")),),
    "kovasznay": (_config("Kovasznay", 2, ("n_boundary",), "two losses: the residuals of both equations are one"),),
}


def find_scripts(recipe: str, checkouts: Sequence[Path]) -> list[tuple[Path, Script]]:
    """Return the scripts of a recipe that are in the checkouts, each with its checkout.

    Raises:
        UsageError: A checkout has none of them.
    """
    scripts, found = _SCRIPTS.get(recipe, ()), []
    for checkout in checkouts:
        of_checkout = [(checkout, script) for script in scripts if (checkout / script.file).is_file()]
        if not of_checkout:
            known = " or ".join(f"{script.project}'s ({script.file})" for script in scripts)
            told = f"it would be {known}" if known else "none is known"
            raise UsageError(f"There is no script for the recipe {recipe} in {checkout}: {told}.")
        found += of_checkout
    return found
