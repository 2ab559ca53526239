"""Typed errors, whose messages state what is wrong, where (file, key, plugin), and what to do instead.

The command line prints the message alone and exits with `exit_code`: 2 for input the user can fix, 1 for a failed run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class AlignpropError(Exception):
    """Base of every error alignprop raises on purpose."""

    exit_code = 1


class UserError(AlignpropError):
    """The input is wrong: a file, a key, a value, a name. Exit code 2.

    Attributes:
        key: key of the wrong value, in the run config or an option; the message starts with it.
    """

    exit_code = 2
    key: str | None = None

    def __str__(self) -> str:
        """Return the message, with the key in front."""
        message = super().__str__()
        return message if self.key is None else f"{self.key}: {message}"


class ConfigError(UserError):
    """A run config that cannot be run: unknown key, wrong type, impossible combination."""


class PromptError(UserError):
    """A prompt set or prompt file that cannot be read."""


class PluginError(UserError):
    """A name that no installed plugin offers, that two offer, or whose plugin is broken."""


class WeightsError(UserError):
    """A weights file that is missing, of the wrong format or has the wrong checksum."""


class ModelError(UserError):
    """A base model that cannot be found or is of no supported family."""


class LoraError(UserError):
    """A LoRA file that cannot be read or does not fit the model."""


class OutputError(UserError):
    """An output folder that exists already, is in use, or cannot be written."""


class DeviceError(UserError):
    """A requested device is not available on this machine."""


class RunError(AlignpropError):
    """A run failed. Exit code 1; saved files are kept."""


class RewardError(RunError):
    """A reward broke its contract (shape, finiteness, gradient) or raised."""


class TrialError(UserError, RewardError):
    """A reward failed the trial before training: no run has started, and the config needs a fix. Exit code 2."""

    exit_code = 2


@contextmanager
def under(key: str) -> Iterator[None]:
    """Add a value's key to the `UserError`s raised inside; an error that has a key keeps it."""
    try:
        yield
    except UserError as error:
        if error.key is None:
            error.key = key
        raise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the nearest known name, or an empty string."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{nearest[0]}"?' if nearest else ""


def complaint(error: Exception) -> str:
    """Return another library's error on one line, with its type in front, cut to a readable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
