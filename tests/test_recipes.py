"""Recipes: each can be trained as it is written, scales and flags change it, and errors are sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmtl.cli import main
from fastmtl.data import find_dataset
from fastmtl.errors import UsageError
from fastmtl.experiments.published import names_of_published
from fastmtl.recipes import find_recipe, names_of_recipes
from fastmtl.trainer.run.config import config_of, read_config
from tests.data.test_tables import write_aliexpress

OWN = """
title: My own
settings: {dataset: multimnist, encoder: conv, batch-size: 32, train_size: 64, weighting: UW, epochs: 3}
scales: {tiny: {about: one epoch, settings: {epochs: 1}}}
"""


@pytest.mark.parametrize("name", names_of_recipes())
def test_each_recipe_is_a_valid_configuration(name: str) -> None:
    recipe = find_recipe(name)
    for scale in (None, *recipe.scales):
        config = config_of(recipe.at(scale), recipe.file, weighting="mgda").resolved()
        find_dataset(config.dataset)
    assert recipe.published is None or recipe.published in names_of_published()
    assert recipe.title
    assert recipe.about


def test_a_recipe_of_ones_own_trains_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    run = tmp_path / "run"
    command = ["train", "--recipe", str(file), "--scale", "tiny", "--weighting", "ew", "--run-dir", str(run)]
    assert main([*command, "--no-plot", "--no-tensorboard"]) == 0
    config = read_config(run / "config.yaml")
    assert (config.weighting, config.epochs, config.batch_size, config.encoder) == ("EW", 1, 32, "conv")


@pytest.mark.slow
def test_aliexpress_is_trained_and_compared_with_published_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, rows in (("train", 4100), ("test", 300)):
        write_aliexpress(tmp_path, split, rows)
    words = ["--recipe", "aliexpress", "--scale", "small", "--dataset-path", str(tmp_path), "--seeds", "1", "--no-stl"]
    out = str(tmp_path / "out")
    assert main(["compare", *words, "--published", "aliexpress-nl", "--jobs", "1", "--out", out]) == 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert "fastmtl: EW" in table
    assert "0.7292" in table


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names_of_recipes())
    assert main(["recipes", "qm9"]) == 0
    assert capsys.readouterr().out == find_recipe("qm9").file.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("a: [", "not valid YAML"),
        ("title: x", "must have `settings:`"),
        ("settings: {}\nextra: 1", "has the key 'extra'"),
        ("settings: {}\nscales: {small: 3}", "must be names"),
        ("settings: {}\nselection: 0", "must be best or a number"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=words):
        find_recipe(str(file))


def test_options_that_do_not_go_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    for words, sentence in (
        (["--scale", "small"], "give --recipe"),
        (["--recipe", str(file), "--config", str(file)], "give one of them"),
        (["--recipe", str(file), "--scale", "large"], "scale of own"),
        (["--recipe", "qm8"], "qm9"),
    ):
        assert main(["train", *words]) != 0
        assert sentence in capsys.readouterr().err
    with pytest.raises(UsageError, match="has no scales"):
        find_recipe(_without_scales(tmp_path)).at("small")


def _without_scales(folder: Path) -> str:
    file = folder / "plain.yaml"
    file.write_text("settings: {epochs: 1}")
    return str(file)
