"""The committed table of what works together is what the code does."""

from __future__ import annotations

import pytest

from tests.architecture.support import PAGE, page


@pytest.mark.slow
def test_every_architecture_with_every_strategy() -> None:
    assert page() == PAGE.read_text(encoding="utf-8"), "python -m tests.architecture.support writes it anew"
