"""Messages between a run and the environment of a reward: JSON documents, and errors as data. No torch."""

from __future__ import annotations

import json
import struct
import traceback
from typing import Any, BinaryIO

from alignprop_core import errors
from alignprop_core.errors import AlignpropError, PluginError, RewardError, UserError
from alignprop_core.validation import InvalidConfig

PROTOCOL = 1
"""Version of these messages; a run and its workers must have the same."""

_LENGTH = struct.Struct("<Q")


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write a message: its length in eight bytes, then JSON. NaN and infinities are written as Python writes them."""
    data = json.dumps(message).encode("utf-8")
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Read a message; None at the end of the stream, including an end in the middle of a message."""
    head = _exactly(stream, _LENGTH.size)
    data = None if head is None else _exactly(stream, _LENGTH.unpack(head)[0])
    if data is None:
        return None
    message: dict[str, Any] = json.loads(data)
    return message


def _exactly(stream: BinaryIO, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def error_data(error: BaseException) -> dict[str, Any]:
    """Return an error as data: the name of its type, its message, and the traceback of an unexpected error."""
    notes = list(getattr(error, "__notes__", ()))
    if not isinstance(error, AlignpropError):
        notes.append("".join(traceback.format_exception(error)))
    found: dict[str, Any] = {"type": type(error).__name__, "message": str(error), "notes": notes}
    if isinstance(error, InvalidConfig):
        found["problems"] = [{"path": list(problem.path), "message": problem.message} for problem in error.problems]
    return found


def error_from(data: dict[str, Any], where: str) -> AlignpropError:
    """Return the error that the data describe.

    An error of the core keeps its type and message. Any other becomes a `RewardError` with the original type, the
    message and `where`; the traceback of the other process is a note.
    """
    kind = getattr(errors, str(data.get("type")), None)
    found: AlignpropError
    if isinstance(kind, type) and issubclass(kind, (UserError, RewardError)):
        found = kind(str(data["message"]))
    elif data.get("type") == "InvalidConfig":
        found = errors.ConfigError(str(data["message"]))
    else:
        text = f": {data['message']}" if data.get("message") else ""
        found = RewardError(f"raised {data.get('type')}{text} (in its own environment, {where}).")
    for note in data.get("notes", ()):
        found.add_note(str(note))
    return found


def check_protocol(answer: dict[str, Any], where: str) -> None:
    """Raise `PluginError` if the other process has another version of these messages."""
    if answer.get("protocol") != PROTOCOL:
        raise PluginError(
            f"{where} has alignprop-core {answer.get('core', 'of an unknown version')}, which is not compatible with "
            "this one; create the environment again: alignprop rewards isolate."
        )
