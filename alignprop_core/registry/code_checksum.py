"""A checksum of the code of a function or class, whether it is in a file or was typed into a notebook. No torch."""

from __future__ import annotations

import dis
import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

SCHEME = f"code-{sys.version_info.major}.{sys.version_info.minor}:"
"""Prefix of a checksum: compiled code differs between Python versions, so only checksums of one version compare."""

_LIBRARIES = {"alignprop_core", "torch", "builtins", "abc", "typing", "collections", "pydantic"}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type(...))


def code_checksum(code: Any) -> str:
    """Return the checksum of a function's or a class's code, with those it calls in its own package.

    Comments, formatting and docstrings do not count; constants, default values, closures and global constants do.
    """
    parts = "\n".join(_code(code, _package(code), set()))
    return SCHEME + hashlib.sha256(parts.encode()).hexdigest()


def _package(code: Any) -> str:
    return str(getattr(code, "__module__", None) or type(code).__module__).partition(".")[0]


def _code(found: Any, package: str, seen: set[int]) -> Iterator[str]:
    """Yield what a value means for the result: its code, or the value itself if it is simple."""
    if isinstance(found, _SIMPLE):
        yield f"{type(found).__name__} {found!r}"
    elif id(found) in seen:
        return
    elif isinstance(found, (tuple, list)):
        seen |= {id(found)} if isinstance(found, list) else set()  # a list may contain itself
        yield type(found).__name__
        yield from (part for item in found for part in _code(item, package, seen))
    elif isinstance(found, (set, frozenset)):  # their order changes with every process
        yield from sorted(part for item in found for part in _code(item, package, seen))
    elif isinstance(found, Mapping):
        seen.add(id(found))
        yield from (part for item in found.items() for part in _code(item, package, seen))
    elif isinstance(found, CodeType):
        yield found.co_code.hex()
        yield from found.co_names
        yield from (part for item in found.co_consts for part in _code(item, package, seen))
    elif isinstance(found, FunctionType):
        seen.add(id(found))
        if _package(found) == package:
            yield from _function(found, package, seen)
    elif isinstance(found, type):
        seen.add(id(found))
        yield from _class(found, package, seen)
    elif isinstance(found, partial):
        yield from _code((found.func, found.args, found.keywords), package, seen)
    elif isinstance(found, (staticmethod, classmethod, MethodType)):
        yield from _code(found.__func__, package, seen)
    elif isinstance(found, property):
        yield from _code((found.fget, found.fset), package, seen)
    else:
        yield type(found).__qualname__
        if _package(found) == package:
            yield from _code(type(found), package, seen)


def _function(function: FunctionType, package: str, seen: set[int]) -> Iterator[str]:
    code = function.__code__
    yield code.co_code.hex()
    yield from code.co_names
    documented = code.co_consts[:1] == (function.__doc__,)
    yield from _code(code.co_consts[1 if documented else 0 :], package, seen)
    yield from _code((function.__defaults__, function.__kwdefaults__), package, seen)
    for cell in function.__closure__ or ():
        try:
            yield from _code(cell.cell_contents, package, seen)
        except ValueError:  # not filled yet
            continue
    for name in sorted(set(_globals(code))):
        if name in function.__globals__:
            yield from (name, *_code(function.__globals__[name], package, seen))


def _globals(code: CodeType) -> Iterator[str]:
    """Yield the global names that code reads, functions inside it included."""
    yield from (str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    yield from (name for part in code.co_consts if isinstance(part, CodeType) for name in _globals(part))


def _class(kind: type, package: str, seen: set[int]) -> Iterator[str]:
    """Yield the code of a class and of its bases outside the libraries: methods and simple attributes."""
    for base in kind.__mro__:
        if _package(base) in _LIBRARIES or (base is not kind and id(base) in seen):
            continue
        seen.add(id(base))
        yield base.__qualname__
        for name, value in sorted(vars(base).items()):
            if isinstance(value, (FunctionType, staticmethod, classmethod, property)) or not name.startswith("_"):
                yield from (name, *_code(value, _package(base), seen))
