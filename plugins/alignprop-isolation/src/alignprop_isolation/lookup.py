"""The rewards of another Python environment: the loader behind the key `isolation`. No torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from alignprop_core.errors import AlignpropError, PluginError
from alignprop_core.registry.offers import Offer, belongs
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import RewardConfig, RewardSpec
from alignprop_core.validation import InvalidConfig, Problem, dotted
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.messages import check_protocol, error_from

if TYPE_CHECKING:
    from alignprop_core.reward import Reward

SECONDS = 120
"""Time limit of `describe`, which imports the hook modules of the plugins there, possibly from a cold disk."""


class IsolatedRewards:
    """The rewards of another Python environment, for one reward entry.

    Args:
        isolation: the settings under `isolation` in the entry.
        registry: the run's registry. Its license policy applies here as well.
    """

    def __init__(self, isolation: IsolationConfig, registry: Registry) -> None:
        self.isolation = isolation
        self.licenses = registry.licenses

    def reward(self, name: str) -> Offer[RewardSpec]:
        """Find a reward there; `PluginError` if it is not offered or the environment does not answer."""
        answer = self._describe(name)
        try:
            spec = RewardSpec.model_validate_json(json.dumps(answer["spec"]))
        except ValidationError as error:
            raise PluginError(f"{self.isolation.python}: its description of {name} cannot be read: {error}") from error
        offer = Offer(spec, str(answer["distribution"]), str(answer["version"]))
        if spec.license and (problem := self.licenses.problem(spec.license)):
            raise PluginError(f"{belongs(offer)} may not be used here: {problem}.")
        return offer

    def option_names(self, name: str) -> frozenset[str]:
        """Return the names of a reward's options."""
        return frozenset(self._describe(name)["schema"].get("properties", {}))

    def origin(self, name: str) -> dict[str, Any]:
        """Return where a reward comes from, for a run's environment.json."""
        answer = self._describe(name)
        spec = self.reward(name).spec
        known = {key: answer[key] for key in ("distribution", "version", "core")}
        weights = {file.file: file.license for file in spec.weights}
        made = {"python": self.isolation.python, "license": spec.license, "weights": weights}
        return {**known, **made, **({"from": answer["origin"]} if answer["origin"] else {})}

    def reward_options(
        self, name: str, options: Mapping[str, Any] | None = None, *, where: str = "options"
    ) -> dict[str, Any]:
        """Check options in the other environment with the reward's own options class; return them with defaults.

        Raises:
            ConfigError: with one line for every wrong key.
            PluginError: the reward is not available there.
        """
        try:
            found: dict[str, Any] = self._describe(name, options or {})["options"]
        except InvalidConfig as error:
            lines = [f"{dotted((where, *problem.path))}: {problem.message}" for problem in error.problems]
            raise InvalidConfig(error.problems, "\n".join(lines)) from None
        return found

    def load_reward(self, name: str, options: Mapping[str, Any] | RewardConfig | None = None) -> Reward:
        """Start a worker there that loads the reward, and return the reward that uses it. Imports torch."""
        from alignprop_isolation.reward import IsolatedReward

        given = options.model_dump(mode="json") if isinstance(options, RewardConfig) else dict(options or {})
        return IsolatedReward(name, given, self.isolation)

    def _describe(self, name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        # Answers are kept for the process, as the discovery of plugins is; errors are not. Each costs a process there,
        # which may import torch: hence the first one has the defaults as well.
        plain = _described(self.isolation.python, name, "null")
        text = json.dumps(dict(options or {}), sort_keys=True, default=str)
        defaults = plain["options"]
        if options is None or (defaults is not None and text in ("{}", json.dumps(defaults, sort_keys=True))):
            return plain
        return _described(self.isolation.python, name, text)


@lru_cache(maxsize=256)
def _described(python: str, name: str, options: str) -> dict[str, Any]:
    if not Path(python).is_file():
        raise PluginError(
            f"{python}: no such file; isolation.python is the Python interpreter of the reward's environment. Create "
            f"an environment: alignprop rewards isolate {name}"
        )
    command = [python, "-I", "-m", "alignprop_isolation.describe"]
    request = json.dumps({"name": name, "options": json.loads(options)})
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, encoding="utf-8", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PluginError(f"{python}: did not describe {name} within {SECONDS} s.") from None
    except OSError as error:
        raise PluginError(f"{python}: cannot be started: {error.strerror or error}.") from None
    answer = _answer(done, python, name)
    check_protocol(answer, python)
    if "error" in answer:
        raise _as_error(answer["error"], python)
    return answer


def _answer(done: subprocess.CompletedProcess[str], python: str, name: str) -> dict[str, Any]:
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if done.returncode == 0 and isinstance(answer, dict):
        return answer
    lines = done.stderr.strip().splitlines()
    why = lines[-1] if lines else f"it exited with code {done.returncode}"
    advice = "alignprop rewards isolate creates an environment that can."
    for ours in ("alignprop-isolation", "alignprop-core"):
        if any(f"No module named '{ours.replace('-', '_')}" in line for line in lines):
            folder = _folder(python)
            again = shlex.join(["alignprop", "rewards", "isolate", name, "--into", folder])
            why = f"{ours} is not installed there"
            advice = f"Remove {folder} and create it again: {again}"
            break
    error = PluginError(f"{python}: cannot describe its rewards: {why.rstrip('.')}. {advice}")
    error.add_note(done.stderr)
    raise error


def _as_error(data: dict[str, Any], python: str) -> AlignpropError:
    if data.get("problems") is not None:
        problems = [Problem(tuple(found["path"]), found["message"]) for found in data["problems"]]
        return InvalidConfig(problems, data["message"])
    error = error_from(data, python)
    # Names in the message are those of the other environment.
    named = type(error)(f"{error} (In the environment of {_folder(python)}.)")
    for note in getattr(error, "__notes__", ()):
        named.add_note(note)
    return named


def _folder(python: str) -> str:
    """Return the folder of the environment that an interpreter belongs to."""
    return os.path.dirname(os.path.dirname(python)) or python
