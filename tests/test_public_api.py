"""The public interface does not change unnoticed."""

from __future__ import annotations

import yaml

import fastmtl
from tests.public_api import FILE, lines
from tests.test_packaging import ROOT


def test_public_names_and_their_arguments_are_frozen() -> None:
    before, now = FILE.read_text().splitlines(), lines()
    removed = [line for line in before if line not in now]
    added = [line for line in now if line not in before]
    assert (removed, added) == ([], []), "python -m tests.public_api, and a line in CHANGELOG.md"


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastmtl.__version__
