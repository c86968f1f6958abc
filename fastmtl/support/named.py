"""Objects by name: of fastmtl, of an installed package (entry points), or of a module or file of the user's.

``"MGDA"``, ``"mypkg.rules:New"``, ``"./my_rule.py:New"``. Mistakes are reported with the user's file and line.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.support.names import known_name, resolve_name

__all__ = ["Found", "Kind", "is_spec", "line_in_own_code", "own_place", "place_of", "short_name", "whole_spec"]

T = TypeVar("T")

_OURS = Path(__file__).resolve().parents[1]
# Files of Python and of installed packages: no user has written them.
_INSTALLED = tuple(
    Path(path).resolve()
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_loaded_files: set[Path] = set()


class Found(NamedTuple, Generic[T]):
    """What a name stands for.

    Attributes:
        name: The name in its own spelling; of a file, with its absolute path.
        value: The object.
    """

    name: str
    value: T


class Kind(NamedTuple):
    """A kind of object that can be named.

    Attributes:
        what: What it is called in messages, such as ``"weighting"``.
        group: The group of entry points where packages list theirs.
    """

    what: str
    group: str

    def find(self, name: str, table: Mapping[str, Any]) -> Found[Any]:
        """Return the object of a name: of ``table``, in any case, of an entry point, or ``place:object``.

        Raises:
            UsageError: There is no such name, module, file or object, or its code cannot be imported.
        """
        if isinstance(name, str) and is_spec(name):
            return _from_spec(name, self.what)
        if isinstance(name, str) and name.endswith(".py"):
            raise UsageError(f"{self.what} {name!r} is a file: which object of it? Write {name}:NAME.")
        known = known_name(name, table)
        if known is not None:
            return Found(known, table[known])
        points = _entry_points(self.group)
        spelled = resolve_name(name, {choice: choice for choice in (*table, *points)}, self.what)
        return Found(spelled, _load_point(points[spelled], self.what))

    def find_class(self, name: str, table: Mapping[str, type[T]], base: type[T]) -> Found[type[T]]:
        """Return the class of a name, which must derive from ``base``.

        Raises:
            UsageError: As of :meth:`find`, or the object is something else.
        """
        found = self.find(name, table)
        if found.value is table.get(found.name):
            return found
        if not isinstance(found.value, type) or not issubclass(found.value, base):
            kind = "a class" if isinstance(found.value, type) else f"of type {type(found.value).__name__}"
            parents = ", ".join(parent.__name__ for parent in getattr(found.value, "__bases__", ()))
            derived = f" derived from {parents}" if parents else ""
            raise UsageError(
                f"{place_of(found.value, found.name)}: the {self.what} {short_name(found.name)} must be a class "
                f"derived from {base.__name__} of {base.__module__.rpartition('.')[0]}, it is {kind}{derived}."
            )
        return found


def is_spec(name: str) -> bool:
    """Return whether a name is ``module:object`` or ``file.py:object``."""
    return ":" in name


def short_name(name: str) -> str:
    """Return a name without the module or file that it is in."""
    return name.rpartition(":")[2]


def whole_spec(name: str) -> str:
    """Return a name with the absolute path of the file or folder that is in it, any other name as it is."""
    place, colon, rest = name.rpartition(":")
    if place == "hf":
        # A model of transformers, in a folder or on the hub.
        folder = Path(rest).expanduser()
        return f"hf:{folder.resolve()}" if rest.startswith((".", "/", "~")) or folder.is_dir() else name
    return f"{Path(place).expanduser().resolve()}:{rest}" if colon and _is_file(place) else name


def place_of(value: object, name: str = "") -> str:
    """Return ``file:line`` of a class or function, or the part of ``name`` before the colon."""
    owner: Any = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    module = sys.modules.get(getattr(owner, "__module__", "") or "")
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        line = _lines_of(Path(place)).get(short_name(name).partition(".")[0])
        return _relative(Path(place)) + (f":{line}" if line else "")
    try:
        file, line = inspect.getsourcefile(owner), inspect.getsourcelines(owner)[1]
    except (OSError, TypeError):
        return getattr(module, "__file__", None) or place or repr(value)
    return f"{_relative(Path(file or ''))}:{line}"


def own_place(value: object) -> str:
    """Return ``"file:line: "`` of a class or function of the user's, ``""`` of one that is installed.

    Of a ``functools.partial`` it is that of its function.
    """
    while isinstance(value, functools.partial):
        value = value.func
    owner: Any = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    try:
        file, line = inspect.getsourcefile(owner), inspect.getsourcelines(owner)[1]
    except (OSError, TypeError):
        return ""
    return "" if file is None or _is_installed(Path(file).resolve()) else f"{_relative(Path(file))}:{line}: "


def line_in_own_code(error: BaseException) -> str | None:
    """Return ``file:line`` of the innermost call in code that was loaded by name; None if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(Path(error.filename))}:{error.lineno}"
    folders = {file.parent for file in _loaded_files}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [
        frame
        for frame in frames
        if (path := Path(frame.filename).resolve()) in _loaded_files
        or (not _is_installed(path) and any(folder in path.parents for folder in folders))
    ]
    return f"{_relative(Path(own[-1].filename))}:{own[-1].lineno}" if own else None


def _is_installed(path: Path) -> bool:
    return _OURS in path.parents or any(folder in path.parents for folder in _INSTALLED)


@functools.cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def _from_spec(spec: str, what: str) -> Found[Any]:
    place, _, name = spec.rpartition(":")
    if not place or not name.replace(".", "").isidentifier():
        raise UsageError(f"{what} {spec!r} must be MODULE:NAME or FILE.py:NAME.")
    if _is_file(place):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise UsageError(f"{what} {spec!r}: there is no file {place}.")
        place, module = str(path), _import(lambda: _module_of_file(path), f"{what} {spec!r}", None)
    else:
        if os.getcwd() not in sys.path:
            # As `python -m` does, but after installed packages, whose names a folder here may have by chance.
            sys.path.append(os.getcwd())
        module = _import(lambda: importlib.import_module(place), f"{what} {spec!r}", place)
    if module.__file__ is not None:
        _loaded_files.add(Path(module.__file__).resolve())
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise UsageError(_no_such(module, part, what))
        value = getattr(value, part)
    return Found(f"{place}:{name}", value)


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _module_of_file(path: Path) -> ModuleType:
    """Import a file as the script of a folder: under its own name where no other module has that one."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    if str(path.parent) not in sys.path:
        # So that it finds its neighbours, and worker processes find it.
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    name = path.stem
    known = importlib.util.find_spec(name) if name.isidentifier() else None
    if name not in sys.modules and known is not None and known.origin == str(path):
        _loaded_files.add(path)
        return importlib.import_module(name)
    name = f"fastmtl_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _loaded_files.add(path)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_point(point: EntryPoint, what: str) -> Any:
    value = _import(point.load, f"{what} {point.name!r} of the entry point {point.value}", None)
    module = sys.modules.get(point.module)
    if module is not None and module.__file__ is not None:
        _loaded_files.add(Path(module.__file__).resolve())
    return value


def _import(load: Any, what: str, module: str | None) -> Any:
    try:
        return load()
    except ModuleNotFoundError as error:
        if module is not None and error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"{what}: there is no module {error.name} in {os.getcwd()} or installed.") from error
        raise UsageError(_failed(error, what)) from error
    except FastmtlError as error:
        raise UsageError(f"{_own_line(error)}{error}") from error
    except Exception as error:
        # Whatever runs when a module is imported raises what it likes.
        raise UsageError(_failed(error, what)) from error


def _failed(error: Exception, what: str) -> str:
    text = error.msg if isinstance(error, SyntaxError) else next(iter(str(error).strip().splitlines()), "")
    return f"{_own_line(error)}{type(error).__name__}: {text} (in the import of {what})."


def _own_line(error: BaseException) -> str:
    place = line_in_own_code(error)
    if place is None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            frame for frame in frames if not frame.filename.startswith("<") and not _is_installed(Path(frame.filename))
        ]
        place = f"{_relative(Path(own[-1].filename))}:{own[-1].lineno}" if own else None
    return "" if place is None else f"{place}: "


def _no_such(module: ModuleType, name: str, what: str) -> str:
    file = Path(module.__file__) if module.__file__ is not None else None
    lines = {} if file is None else _lines_of(file)
    names = [known for known in (lines or vars(module)) if not known.startswith("_")]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    place = module.__name__ if file is None else _relative(file)
    line = f" of line {lines[near[0]]}" if near and near[0] in lines else ""
    hint = f" Did you mean {near[0]!r}{line}?" if near else f" It has {', '.join(names) or 'no names'}."
    return f"{place} has no {name!r} for {what}.{hint}"


def _lines_of(path: Path) -> dict[str, int]:
    """Return the lines of the classes, functions and values that a file defines, by name."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    lines: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines[node.name] = node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lines |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
    return lines


def _relative(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (OSError, ValueError):
        return str(path)
