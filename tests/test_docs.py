"""The code in the documentation runs, page by page; its links, and the files that it names, exist."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fastmtl import data
from fastmtl.cli.options import page
from fastmtl.data import DATASETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES_WITH_LINKS = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])


def _blocks(page: Path) -> list[str]:
    """Return the Python code of a page, each block after as many empty lines as it has lines above it in the page."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]


def _module(page: str, **given: Any) -> dict[str, Any]:
    """Run the code of a page as one module, as the page says: later blocks see what earlier ones defined."""
    names: dict[str, Any] = {"__name__": page, **given}
    for block in _blocks(DOCS / f"{page}.md"):
        exec(compile(block, f"{page}.md", "exec"), names)
    return names


def _run(page: str, capsys: pytest.CaptureFixture[str], least: int = 4) -> dict[str, Any]:
    assert len(_blocks(DOCS / f"{page}.md")) >= least
    names = _module(page)
    assert "Epoch: 0000 | TRAIN:" in capsys.readouterr().out
    return names


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_new_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(DATASETS)
    try:
        names = _run("new_dataset", capsys)
        assert "blobs" in DATASETS
    finally:
        DATASETS.clear()
        DATASETS.update(before)
    assert names["bundle"].rows == {"train": 64, "test": 32}
    assert names["trainer"].meter.results["size"][0] <= names["trainer"].meter.results["size"][1]


def test_new_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("new_architecture", capsys)
    trainer = names["train"](names["FastResidual"], "EW")
    assert trainer.model.splits
    assert not names["train"](names["Residual"], "EW").model.splits
    assert len(names["train"](names["Mixture"], "EW", experts=4).model.experts) == 4


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("training", capsys)
    assert names["trainer"].model.loss_fn["size"].log_variance.item() != 0


def test_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastmtl.experiments.figures.curves", lambda summary: [])
    names = _module("experiments")
    assert list(names["results"].table.index) == ["STL", "EW", "Even", "CAGrad"]
    assert names["results"].missing == []
    assert "delta_m" in capsys.readouterr().out


def test_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("groups", capsys, least=1)["trainer"].model.grouping.of == [0, 0, 1, 1]


def test_new_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("new_strategy", capsys)
    assert (names["weights"] > 0).all()
    assert not names["trainer"].step.is_foreign
    assert names["by_hand"].step.is_foreign


def test_index(capsys: pytest.CaptureFixture[str]) -> None:
    names = _module("index")
    assert all(loss < 0.7 for loss in names["losses"])
    assert "tensor([" in capsys.readouterr().out


def test_start(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("start", capsys, least=3)
    assert names["latest"].weights.sum().item() == pytest.approx(1)
    assert all(param.grad is not None for param in names["encoder"].parameters())


def test_missing_labels(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("missing_labels", capsys, least=3)
    assert names["PositiveOnly"]().compute_loss(torch.zeros(3), names["labels"]).item() == pytest.approx(0.5)


def test_recommender(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("recommender", capsys)
    assert names["trainer"].model.encoder.stem.tables["0_user"].weight.grad.is_sparse
    assert names["labels"]["conversion"].isnan().tolist() == [False, True]


def test_distributed() -> None:
    loaders: dict[str, DataLoader[int]] = {"train_loader": DataLoader(range(2)), "test_loader": DataLoader(range(1))}
    assert _module("distributed", **loaders)["train_loader"] is loaders["train_loader"]


def test_libmtl(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("libmtl", capsys, least=1)["trainer"].model.epoch == 1


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    _module("methods")
    assert capsys.readouterr().out == "-3.9 %\n"


@pytest.mark.slow
def test_compile(capsys: pytest.CaptureFixture[str]) -> None:
    _run("compile", capsys, least=1)


def test_every_page_with_code_is_run() -> None:
    tested = set(re.findall(r'_(?:run|module)\("(\w+)"', Path(__file__).read_text()))
    assert {page.stem for page in DOCS.glob("*.md") if _blocks(page)} == tested


def test_readme(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load = data.load

    def few_rows(name: str, batch_size: int) -> data.DataBundle:
        whole = load(name, batch_size=batch_size, n_train=batch_size)
        rows: DataLoader[Any] = DataLoader([whole.train.dataset[row] for row in range(8)], batch_size=4)
        return replace(whole, train=rows, test=rows)

    monkeypatch.setattr(data, "load", few_rows)
    program, own_loop = _blocks(ROOT / "README.md")
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), names)
    assert "Epoch: 0000 | TRAIN:" in capsys.readouterr().out

    shared = nn.Linear(3, 4)
    features = shared(torch.randn(5, 3))
    losses = [nn.Linear(4, 1)(features).square().mean() for _ in range(2)]
    exec(compile(own_loop, "README.md", "exec"), {"shared": shared, "features": features, "losses": losses})
    assert all(param.grad is not None for param in shared.parameters())


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", _prose(page)):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["docs/design.md", "docs/distributed.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    folders = ("fastmtl", "csrc", "kernels", "benchmarks", "tests", "docs", ".ci")
    files = [f"/{file.relative_to(ROOT)}" for folder in folders for file in (ROOT / folder).rglob("*")]
    files += [f"/{file.name}" for file in ROOT.iterdir()]
    for name in re.findall(r"`([\w.]+(?:/[\w.]+)*(?:\.(?:py|cpp|cu|h|csv|sh|md)|/))`", _prose(ROOT / page)):
        assert any(file.endswith(f"/{name.rstrip('/')}") for file in files), name


def test_names_beside_a_file_are_in_it() -> None:
    text = _prose(DOCS / "design.md")
    pairs = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", text)
    pairs += [(file, name) for name, file in re.findall(r"`(\w[\w.]*)`\s+\(`([\w/]+\.py)`\)", text)]
    assert len(pairs) > 12
    for file, name in pairs:
        source = (ROOT / "fastmtl" / file).read_text()
        assert re.search(rf"(class|def) {name.rpartition('.')[2]}\b", source), f"{name} in {file}"


def test_options_page_is_up_to_date() -> None:
    assert (DOCS / "options.md").read_text() == page(), "python -m fastmtl.cli.options > docs/options.md"
