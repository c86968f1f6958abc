"""What docstrings need before Markdown reads them: roles become links, and angle brackets stay visible."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Function, Object, Parameter, ParameterKind, Parameters

ROOT = Path(__file__).resolve().parents[2]
# Packages whose docstring is on a page.
PAGES = tuple(f"fastmtl.{name}" for name in ("aggregation", "autojac", "loss", "metrics", "ops", "scalarization"))

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(~?)([\w.]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_")
_SPANS = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
_SECTION = re.compile(r"\s*(?:Args|Attributes|Example|Raises|Returns|Source|Yields):")


@functools.cache
def _public() -> dict[str, str]:
    """Return the public names with their arguments, None for what takes none, as the test of the interface has them."""
    text = (ROOT / "tests" / "public_api.txt").read_text()
    return dict(re.findall(r"^([\w.]+)(?:\((.*)\))?", text, re.MULTILINE))


def public_path(path: str) -> str | None:
    """Return by which path users import what is defined at ``path``; None if it is not public."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        for start in range(end, len(parts)):
            found = ".".join([*parts[:end], *parts[start:]])
            if found in _public():
                return found
    return None


def anchor(public: str) -> str:
    """Return the path under which the reference has a public name: its own module's where that has the same name."""
    is_module = (ROOT / f"{public.replace('.', '/')}.py").is_file() and public not in PAGES
    return f"{public}.{public.rpartition('.')[2]}" if is_module else public


def _resolved(name: str, owner: Object) -> str | None:
    """Return the public path of a name as it is written in the docstring of ``owner``."""
    first, _, rest = name.partition(".")
    scope: Any = owner
    while scope is not None:
        if first in scope.members:
            member = scope.members[first]
            path = member.target_path if member.is_alias else member.path
            return public_path(f"{path}.{rest}" if rest else path)
        scope = scope.parent
    return name if name in PAGES else public_path(name)


def _prose(text: str, owner: Object) -> str:
    """Return a paragraph with links in place of roles, and with ``<`` as a character outside of code."""

    def link(found: re.Match[str]) -> str:
        name = found[2].rpartition(".")[2] if found[1] else found[2]
        target = _resolved(found[2], owner)
        return f"`{name}`" if target is None else f"[`{name}`][{anchor(target)}]"

    parts = _SPANS.split(_ROLE.sub(link, _LINK.sub(r"[\1](\2)", text)))
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def declared_arguments(text: str) -> Parameters:
    """Return the arguments of a constructor that the sources do not show, from their text without annotations."""
    found = ast.parse(f"def f({re.sub(r'<[^>]*>', '...', text)}): pass").body[0]
    assert isinstance(found, ast.FunctionDef)
    names, plain = found.args, [*found.args.posonlyargs, *found.args.args]
    defaults = [None] * (len(plain) - len(names.defaults)) + names.defaults
    result = [Parameter("self", kind=ParameterKind.positional_or_keyword)]
    for argument, default in zip(plain, defaults, strict=True):
        result.append(_parameter(argument, ParameterKind.positional_or_keyword, default))
    if names.vararg:
        result.append(_parameter(names.vararg, ParameterKind.var_positional))
    for argument, default in zip(names.kwonlyargs, names.kw_defaults, strict=True):
        result.append(_parameter(argument, ParameterKind.keyword_only, default))
    if names.kwarg:
        result.append(_parameter(names.kwarg, ParameterKind.var_keyword))
    return Parameters(*result)


def _parameter(argument: ast.arg, kind: ParameterKind, default: ast.expr | None = None) -> Parameter:
    return Parameter(argument.arg, kind=kind, default=None if default is None else ast.unparse(default))


def converted(docstring: str, owner: Object) -> str:
    """Return a docstring whose prose is Markdown; code, which an empty line precedes, is left as it is."""
    result, depth, was_code = [], 0, False
    for block in re.split(r"(\n[ \t]*\n)", docstring):
        first = next(iter(block.strip("\n").split("\n")), "")
        indent = len(first) - len(first.lstrip())
        if not block.strip():
            result.append(block)
            continue
        if indent < depth:
            depth = 0
        if ">>>" in block:
            head, arrows, code = block.partition(">>>")
            result.append(_prose(head.replace("Example:", "Examples:"), owner) + arrows + code)
        elif indent >= depth + 4 and (was_code or result):
            result.append(block)
            was_code = True
            continue
        else:
            result.append(_prose(re.sub(r"::$", ":", block), owner))
        was_code = False
        if _SECTION.fullmatch(first):
            depth = indent + 4
    return "".join(result)


class Package(Extension):
    """Converts every docstring once it is loaded, and gives classes the constructor that settings make them."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Convert the docstring of one object, and its constructor."""
        if obj.docstring is not None:
            obj.docstring.value = converted(obj.docstring.value, obj)
        if not obj.is_class or any("dataclass" in str(each.value) for each in obj.decorators):
            return
        written = obj.members.get("__init__")
        if isinstance(written, Function) and not written.decorators:
            return
        arguments = _public().get(public_path(obj.path) or "", "")
        if arguments and arguments != "..." and "*args" not in arguments:
            obj.set_member("__init__", Function("__init__", parameters=declared_arguments(arguments), parent=obj))
