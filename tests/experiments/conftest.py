"""Fixtures for the tests of experiments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def _without_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmtl.experiments.figures.conflict_matrices", lambda name, runs: None)
        patch.setattr("fastmtl.experiments.analysis._pictures", lambda run, logged, look: [])
        patch.setattr("fastmtl.experiments.figures.curves", lambda summary: [])
        patch.setattr("fastmtl.experiments.figures.task_weights", lambda summary: [])
        patch.setattr("fastmtl.experiments.figures.trade_off", lambda summary: None)
        yield


# Drawing takes longer than all else here. The one of a module is for experiments that a whole module looks at.
undrawn = pytest.fixture(_without_figures)
undrawn_in_module = pytest.fixture(_without_figures, scope="module")
