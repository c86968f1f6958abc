"""Runs a command line and turns what goes wrong into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import typer

from fastmtl.cli.app import app
from fastmtl.errors import FastmtlError
from fastmtl.support import env

__all__ = ["FAILED", "INTERRUPTED", "USAGE", "main"]

FAILED = 1
USAGE = 2
INTERRUPTED = 130

# Unknown options, missing arguments and the like all derive from the base of BadParameter.
_COMMAND_LINE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `fastmtl` command with the ``arguments`` after the program's name; those of ``sys.argv`` if not given.

    Returns:
        The exit code: 0, 1 for an unforeseen failure, 2 for bad input, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here so that it may stand anywhere and covers errors in the command line itself.
    shown_in_full = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        shown_in_full |= env.read("FASTMTL_TRACEBACK") == "1"
        with contextlib.nullcontext() if shown_in_full else _plain_warnings():
            code = app(args=words, prog_name="fastmtl", standalone_mode=False)
    except FastmtlError as error:
        return _report(error, _in_own_code(error, str(error)), USAGE, shown_in_full)
    except _COMMAND_LINE_ERROR as error:
        return _report(error, _sentence(error), USAGE, shown_in_full)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has had enough; nothing is left to flush to at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
            text = f"{error.filename} cannot be used: {error.strerror}"
        else:
            text = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            text = _in_own_code(error, text)
        return _report(error, f"{text} (--traceback shows where)", FAILED, shown_in_full)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as a sentence each, without the file and line of the code that gives them."""
    before = warnings.formatwarning
    warnings.formatwarning = _as_sentence
    try:
        yield
    finally:
        warnings.formatwarning = before


def _as_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    # Torch adds the place in its C++ code.
    text = re.sub(r"\(Triggered internally at .*\)$", "", " ".join(str(message).split()))
    return f"warning: {text.strip()}\n"


def _report(error: BaseException, sentence: str, code: int, shown_in_full: bool) -> int:
    if shown_in_full:
        traceback.print_exception(error)
    # Without a sentence, the command line was incomplete and the help has been shown.
    return _say(f"error: {sentence}", code) if sentence else code


def _in_own_code(error: BaseException, text: str) -> str:
    """Return what is said of an error, with the line in the user's file where it was raised, if it was in one."""
    from fastmtl.support.named import line_in_own_code

    place = line_in_own_code(error)
    return text if place is None or text.startswith(place) else f"{place}: {text}"


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def _sentence(error: Exception) -> str:
    describe = getattr(error, "format_message", None)
    text = " ".join(str(describe() if describe is not None else error).split())
    return text if text.endswith((".", "?")) or not text else f"{text}."
