"""Rewards without a plugin: code in a Python file that a config names, and code passed from Python. No torch.

A config's `name: ./my_rewards.py:Redness` runs that file with the rights of whoever starts the run. So only a path
written out as one is taken: it starts with `./`, `../`, `~` or `/` and ends in `.py:Name`; nothing is searched for.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isfunction, signature
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from alignprop_core.errors import PluginError, did_you_mean
from alignprop_core.registry.guard import guarded_as
from alignprop_core.registry.offers import Offer
from alignprop_core.specs import RewardSpec, default_label

if TYPE_CHECKING:
    from alignprop_core.reward import Reward

_FILE = re.compile(r"^(?P<path>.+\.py):(?P<name>[^:/\\]*)$")
_EXPLICIT = re.compile(r"^(\./|\.\./|~|/|[A-Za-z]:[\\/]|\.\\|\.\.\\)")
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")


@dataclass(frozen=True)
class LocalReward:
    """A reward that no plugin offers.

    Attributes:
        offer: its spec, as a plugin would give it; the distribution is the file, or the module of the code.
        kind: its class.
        code: the class or function that computes the score.
        given: the object itself, if there is one: passed from Python, or made of a function.
        sha256: of the file it comes from; empty if it was passed from Python.
    """

    offer: Offer[RewardSpec]
    kind: type[Reward]
    code: Any
    given: Reward | None = None
    sha256: str = ""

    @property
    def origin(self) -> dict[str, str]:
        """Where it comes from, for a run's environment.json: file and checksum, or module; and class or function."""
        where = {"file": self.offer.distribution, "sha256": self.sha256}
        what = "class" if isinstance(self.code, type) else "function"
        return (where if self.sha256 else {"module": self.code.__module__}) | {what: _name(self.code)}


def split_file_name(name: str) -> tuple[str, str] | None:
    """Return the path and the class or function of a reward's name that means a Python file, or None."""
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
        PluginError: the file is missing or raises (with its own traceback), or the name is
            missing in it or not a reward.
    """
    parts = split_file_name(name)
    if parts is None:
        return None
    path, code_name = Path(parts[0]), parts[1]
    absolute_name(name, Path())  # refuses a path that is not written as one
    try:
        source = path.expanduser().read_bytes()
    except OSError as error:
        raise PluginError(f"{path}: cannot be read: {error.strerror or error}. It should contain a reward.") from None
    digest = hashlib.sha256(source).hexdigest()
    module = _run(path, source, digest)
    code = getattr(module, code_name, None)
    if code is None or not (isfunction(code) or _is_reward_class(code)):
        raise PluginError(_no_reward(path, code_name, code, module))
    try:
        return _local(default_label(name), code, str(path), digest)
    except PluginError as error:
        raise PluginError(f"{path}: {error}") from None


def given_reward(name: str, code: object) -> LocalReward:
    """Check a reward passed from Python: a function, or a class or object of `Reward`.

    Raises:
        PluginError: the name is not snake_case, or the value is not a reward.
    """
    if not _NAME.match(name):
        raise PluginError("names are snake_case: letters, digits and underscores.")
    return _local(name, code, getattr(code, "__module__", None) or type(code).__module__)


def code_name(code: Any) -> str:
    """Return the name of a function, or of the class of an object, in snake_case; empty for a lambda."""
    while isinstance(code, partial):
        code = code.func
    name = default_label(f".py:{getattr(code, '__name__', type(code).__name__)}")
    return "" if "lambda" in name else re.sub(r"[^a-z0-9_]", "", name).lstrip("_0123456789")


def _is_reward_class(code: object) -> bool:
    from alignprop_core.reward import Reward

    return isinstance(code, type) and issubclass(code, Reward) and code is not Reward


def _local(name: str, code: Any, origin: str, sha256: str = "") -> LocalReward:
    from alignprop_core.registry.function import FunctionReward
    from alignprop_core.reward import Reward

    kind, given = code, None
    if isinstance(code, Reward):
        code, kind, given = type(code), type(code), code
        origin = kind.__module__
    elif not _is_reward_class(code):
        if isinstance(code, type) or not callable(code):
            what = f"the class {code.__name__}" if isinstance(code, type) else f"of type {type(code).__name__}"
            raise PluginError(f"must be a function, or a class or object of alignprop_core.Reward, not {what}.")
        kind, given = FunctionReward, FunctionReward(code)
    return LocalReward(_offer(name, kind, code, origin), kind, code, given, sha256)


def _name(code: Any) -> str:
    return str(getattr(code, "__qualname__", type(code).__qualname__))


def _offer(name: str, kind: type[Reward], code: Any, origin: str) -> Offer[RewardSpec]:
    summary = ((code.__doc__ or "").strip().splitlines() or [f"{_name(code)}, without a description."])[0]
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
    """Loads the source that was read, instead of Python's cached bytecode for the path.

    So the code that a run records is the code that it runs, and nothing is written beside the user's file.
    """

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, self.path)


def _run(path: Path, source: bytes, digest: str) -> ModuleType:
    """Load a file's source as a module; the same content is loaded once per process."""
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
        with guarded_as(lambda failure: PluginError(f"{path}: cannot be run: {failure}.")):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _no_reward(path: Path, name: str, found: object, module: ModuleType) -> str:
    if found is not None:
        return f"{path}: {name} is not a function or a subclass of alignprop_core.Reward."
    own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    rewards = [key for key, value in own.items() if _is_reward_class(value) or _takes_images(value)]
    missing = f"{path}: there is no {name or 'class or function named after the colon'} in it"
    if hint := did_you_mean(name, rewards):
        return f"{missing}.{hint}"
    return f"{missing}; " + (f"its rewards are {', '.join(rewards)}." if rewards else "it does not contain a reward.")


def _takes_images(value: object) -> bool:
    return isfunction(value) and next(iter(signature(value).parameters), "") == "images"
