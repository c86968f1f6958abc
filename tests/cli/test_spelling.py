"""Options in LibMTL's spelling, with or without values, and the nearest one on a typo."""

from __future__ import annotations

import pytest

from fastmtl.cli.spelling import spell
from fastmtl.errors import UsageError

KNOWN = {"--arch", "--compile", "--mgda-gn", "--num-experts", "--gradvac-beta"}


def _spell(line: str) -> list[str]:
    return spell(line.split(), KNOWN, {"--compile": "on"}, {"--num-experts"})


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--mgda_gn l2 RUN", "--mgda-gn l2 RUN"),
        ("--mgda_gn=L_2", "--mgda-gn=L_2"),
        ("--GradVac_beta 0.5", "--gradvac-beta 0.5"),
        ("--compile --arch mtan", "--compile=on --arch mtan"),
        ("--arch mtan --compile", "--arch mtan --compile=on"),
        ("--compile auto --arch mtan", "--compile=auto --arch mtan"),
        ("--compile=off", "--compile=off"),
        ("--num_experts 3 1 --arch ple", "--arch ple --num-experts=3,1"),
        ("--num-experts 3 --num-experts=1", "--num-experts=3,1"),
        ("-- --archh", "-- --archh"),
    ],
)
def test_options_in_the_spelling_the_parser_knows(line: str, wanted: str) -> None:
    assert _spell(line) == wanted.split()


def test_nearest_option_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        _spell("--mgda-gm l2")
    assert str(caught.value) == "Unknown option '--mgda-gm'. Did you mean '--mgda-gn'?"


def test_option_that_begins_so_is_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown option '--grad'\. Did you mean '--gradvac-beta'\?"):
        _spell("--grad 3")


def test_option_like_none_points_to_the_help() -> None:
    with pytest.raises(UsageError) as caught:
        _spell("--zzzz")
    assert str(caught.value) == "Unknown option '--zzzz'. `--help` lists them all."
