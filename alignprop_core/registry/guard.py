"""Runs plugin code so that its errors and output cannot affect the rest. Imports no torch."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from alignprop_core.errors import AlignpropError

_HERE = Path(__file__).parent
_OURS = [str(_HERE / name) for name in ("guard.py", "discovery.py", "registry.py", "local.py")]
_OURS.append(str(_HERE.with_name("prompts.py")))


class PluginFailure(Exception):
    """Code of a plugin raised (or called sys.exit); the plugin's own exception is the cause."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(describe(cause))
        self.traceback = own_traceback(cause)


def describe(error: BaseException) -> str:
    """Return `Type: message` in one line."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_traceback(error: BaseException) -> str:
    """Return the traceback without the frames of this package and of the import machinery."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename not in _OURS and "importlib" not in frame.filename]
    head = ["Traceback (most recent call last):\n", *traceback.format_list(own)] if own else []
    return "".join([*head, *traceback.format_exception_only(error)])


@contextmanager
def guarded() -> Iterator[io.StringIO]:
    """Run a plugin's code: whatever it raises becomes `PluginFailure`, what it prints is captured (and yielded).

    KeyboardInterrupt is not caught.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield printed
    except (Exception, SystemExit) as error:
        raise PluginFailure(error) from error


@contextmanager
def guarded_as(
    error: Callable[[PluginFailure], AlignpropError], passes: type[Exception] | tuple[()] = ()
) -> Iterator[None]:
    """Run a plugin's code: what it raises becomes an error that carries the plugin's own traceback as a note.

    Args:
        error: makes the error.
        passes: exceptions that are raised unchanged.
    """
    try:
        with guarded() as printed:
            yield
    except PluginFailure as failure:
        if isinstance(failure.__cause__, passes):
            raise failure.__cause__ from failure.__cause__.__cause__
        raised = error(failure)
        raised.add_note(failure.traceback)
        raise raised from failure.__cause__
    # Standard output may be a JSON document, so what a plugin prints goes to standard error.
    sys.stderr.write(printed.getvalue())
