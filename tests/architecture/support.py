"""The table of what works together, in docs/support.md: every cell is what the code did when it was tried.

``python -m tests.architecture.support`` updates it.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from fastmtl.architecture import ARCHITECTURES
from fastmtl.errors import UsageError
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import loaders, make_trainer, steps_of

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

_TOP = """# What works together

Each cell is the outcome of three training steps on a small problem with three tasks: ✓ they ran and the parameters
changed; a letter: they were refused with the message below. Strategies that work on representations run with
`rep_grad=True`. A test checks this page; `python -m tests.architecture.support` updates it.

## Every architecture with every strategy
"""
_OPTIONS = {
    "one input, parameters": {},
    "one input, `rep_grad`": {"rep_grad": True},
    "inputs per task, parameters": {"multi_input": True},
    "inputs per task, `rep_grad`": {"multi_input": True, "rep_grad": True},
}


def page() -> str:
    """Return the text of the page."""
    sentences: list[str] = []
    combined = [
        [name, *(_cell(arch, name, sentences, rep_grad=rule.needs == "reps") for arch in ARCHITECTURES)]
        for name, rule in WEIGHTINGS.items()
    ]
    options = [
        [
            arch,
            *(_cell(arch, weighting, sentences, **each) for weighting in ("EW", "MGDA") for each in _OPTIONS.values()),
        ]
        for arch in ARCHITECTURES
    ]
    heads = [f"{weighting}, {option}" for weighting in ("EW", "MGDA") for option in _OPTIONS]
    notes = [f"- {_letter(i)}: {sentence}" for i, sentence in enumerate(sentences)]
    return "\n".join(
        [
            _TOP,
            *_table(["", *ARCHITECTURES], combined),
            "\n## Every architecture with every kind of input and gradient\n",
            *_table(["", *heads], options),
            "\n## The messages\n",
            *notes,
            "",
        ]
    )


def _cell(arch: str, weighting: str, sentences: list[str], **options: Any) -> str:
    refused = _refusal(arch, weighting, **options)
    if refused is None:
        return "✓"
    refused = refused.replace(weighting, "*strategy*").replace(arch, "*architecture*")
    if refused not in sentences:
        sentences.append(refused)
    return _letter(sentences.index(refused))


def _refusal(arch: str, weighting: str, **options: Any) -> str | None:
    """Train three steps; return the sentence they were refused with."""
    data = loaders(3, multi_input=options.get("multi_input", False))
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            trainer = make_trainer(weighting, arch, 3, **options, **(steps_of(3) if arch == "ESMM" else {}))
            before = [param.detach().clone() for param in trainer.model.parameters()]
            trainer.train(data, data, 1)
        except UsageError as error:
            return str(error)
    after = list(trainer.model.parameters())
    assert all(param.isfinite().all() for param in after)
    assert any(not value.equal(param) for value, param in zip(before, after, strict=True))
    return None


def _letter(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[index]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---", *[":-:"] * (len(head) - 1)], *rows)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
