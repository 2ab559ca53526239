"""Rewards without a plugin: classes in a Python file that a config names, and objects passed from Python. No torch.

A config's `name: ./my_rewards.py:Redness` runs that file with the rights of whoever starts the run. So only a path
written out as one is taken: it starts with `./`, `../`, `~` or `/` and ends in `.py:Name`; nothing is searched for.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from alignprop_core.errors import PluginError
from alignprop_core.registry.guard import PluginFailure, guarded
from alignprop_core.registry.offers import Offer
from alignprop_core.specs import RewardConfig, RewardSpec, default_label

if TYPE_CHECKING:
    from alignprop_core.reward import Reward

_FILE = re.compile(r"^(?P<path>.+\.py):(?P<name>[^:/\\]*)$")
_EXPLICIT = re.compile(r"^(\./|\.\./|~|/|[A-Za-z]:[\\/]|\.\\|\.\.\\)")
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")


@dataclass(frozen=True)
class LocalReward:
    """A reward that no plugin offers.

    Attributes:
        offer: what a plugin would have said of it; its distribution is the file, or the class's module.
        kind: its class.
        given: the object itself, if one was passed from Python.
        sha256: of the file it comes from; empty for an object.
    """

    offer: Offer[RewardSpec]
    kind: type[Reward]
    given: Reward | None = None
    sha256: str = ""

    @property
    def origin(self) -> dict[str, str]:
        """Where it comes from, for a run's environment.json: file and checksum, or module; and the class."""
        where = (
            {"file": self.offer.distribution, "sha256": self.sha256}
            if self.sha256
            else {"module": self.kind.__module__}
        )
        return {**where, "class": self.kind.__qualname__}

    @property
    def config_class(self) -> type[RewardConfig]:
        """Options class: the reward's own `Config`."""
        return self.kind.Config


def split_file_name(name: str) -> tuple[str, str] | None:
    """Return path and class of a reward's name that means a Python file, or None."""
    found = _FILE.match(name)
    return (found["path"], found["name"]) if found else None


def absolute_name(name: str, folder: Path) -> str:
    """Return the name of a reward in a Python file with the path made absolute; other names stay as they are.

    Raises:
        PluginError: the path is not written as one.
    """
    parts = split_file_name(name)
    if parts is None:
        return name
    path, kind = parts
    if not _EXPLICIT.match(path):
        raise PluginError(
            f'"{name}" names a Python file, which would be run; write its path out as one: ./{path}:{kind}.'
        )
    return f"{(folder / Path(path).expanduser()).resolve()}:{kind}"


def public_name(name: str) -> str:
    """Return a reward's name without the folders of a Python file."""
    parts = split_file_name(name)
    return name if parts is None else f"{Path(parts[0]).name}:{parts[1]}"


def from_file(name: str) -> LocalReward | None:
    """Run the Python file that a reward's name means and return the reward; None if the name means no file.

    Raises:
        PluginError: the file is missing or raises (with its own traceback), or the class is missing or no reward.
    """
    parts = split_file_name(name)
    if parts is None:
        return None
    path, kind_name = Path(parts[0]), parts[1]
    absolute_name(name, Path())  # refuses a path that is not written as one
    try:
        source = path.expanduser().read_bytes()
    except OSError as error:
        raise PluginError(f"{path}: cannot be read: {error.strerror or error}. It should hold a reward.") from None
    digest = hashlib.sha256(source).hexdigest()
    module = _run(path, source, digest)
    kind = getattr(module, kind_name, None)
    from alignprop_core.reward import Reward

    if not (isinstance(kind, type) and issubclass(kind, Reward)) or kind is Reward:
        raise PluginError(_no_reward(path, kind_name, kind, module, Reward))
    return LocalReward(_offer(default_label(name), kind, str(path)), kind, sha256=digest)


def given_rewards(rewards: Mapping[str, object]) -> dict[str, LocalReward]:
    """Check reward objects passed from Python and return them by name.

    Raises:
        PluginError: a name is not snake_case, or an object is no reward.
    """
    from alignprop_core.reward import Reward

    found = {}
    for name, reward in rewards.items():
        if not _NAME.match(name):
            raise PluginError(f'rewards["{name}"]: names are snake_case: letters, digits and underscores.')
        if not isinstance(reward, Reward):
            hint = ""
            if isinstance(reward, type):
                hint = f" Pass an object: {reward.__name__}()."
            what = reward.__name__ if isinstance(reward, type) else f"of type {type(reward).__name__}"
            raise PluginError(f'rewards["{name}"]: must be an object of a subclass of Reward, not {what}.{hint}')
        kind = type(reward)
        found[name] = LocalReward(_offer(name, kind, kind.__module__), kind, given=reward)
    return found


def _offer(name: str, kind: type[Reward], origin: str) -> Offer[RewardSpec]:
    summary = ((kind.__doc__ or "").strip().splitlines() or [f"{kind.__name__}, without a description."])[0]
    spec = RewardSpec(
        name=name if _NAME.match(name) else "local",
        summary=summary,
        # What is imported is the class at hand; these say where it came from and are not looked up.
        factory=f"local:{kind.__name__}",
        config=f"local:{kind.Config.__name__}",
        differentiable=kind.differentiable,
    )
    return Offer(spec, origin, "")


class _SourceAsRead(SourceFileLoader):
    """Loads the source that was read, not what Python's cache of compiled files holds for the path.

    What a run writes down as its code is so the code it ran, and nothing is written beside the user's file.
    """

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, self.path)


def _run(path: Path, source: bytes, digest: str) -> ModuleType:
    """Load a file's source as a module; the same content is loaded once a process."""
    stem = re.sub(r"\W", "_", path.stem)
    name = f"alignprop_file_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path, loader=_SourceAsRead(name, str(path), source))
    if spec is None or spec.loader is None:
        raise PluginError(f"{path}: cannot be loaded as a Python file.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks types up by a class's module
    try:
        with guarded() as printed:
            spec.loader.exec_module(module)
    except PluginFailure as failure:
        del sys.modules[name]
        error = PluginError(f"{path}: cannot be run: {failure}.")
        error.add_note(failure.traceback)
        raise error from failure.__cause__
    except BaseException:
        del sys.modules[name]
        raise
    sys.stderr.write(printed.getvalue())
    return module


def _no_reward(path: Path, name: str, found: object, module: ModuleType, base: type[Any]) -> str:
    rewards = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if found is not None:
        return f"{path}: {name} is no subclass of alignprop_core.Reward."
    nearest = get_close_matches(name, rewards, n=1)
    if nearest:
        return f'{path}: has no {name or "class named after the colon"}. Did you mean "{nearest[0]}"?'
    known = f"its rewards are {', '.join(rewards)}" if rewards else "there is no subclass of Reward in it"
    return f"{path}: has no {name or 'class named after the colon'}; {known}."
