"""Checks of what a plugin declares: its spec without torch, its options, its words against its deeds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

from alignprop_core.hookspecs import PROJECT
from alignprop_core.testing.subject import BrokenPromise, NotApplicable, Subject, close, listed


def check_spec_without_torch(subject: Subject) -> None:
    """The hook module and the options class import without torch, in a fresh process."""
    if subject.plugins.local(subject.name) is not None:
        raise NotApplicable("it comes from a Python file or object, not from a plugin")
    offer = subject.plugins.reward(subject.name)
    modules = [offer.spec.config.partition(":")[0]]
    try:
        points = distribution(offer.distribution).entry_points
        modules += [point.module for point in points if point.group == PROJECT]
    except PackageNotFoundError:
        pass  # a registry made from plain objects has options modules only
    code = (
        "import sys, importlib\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit('TORCH ' + name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if last.startswith("TORCH "):
        raise BrokenPromise(
            f"importing {last.removeprefix('TORCH ')} imports torch. Listings must stay quick: keep torch in the "
            "module that the factory names."
        )
    if done.returncode != 0:
        raise BrokenPromise(f"importing {' and '.join(modules)} fails: {last}")


def check_spec_facts(subject: Subject) -> None:
    """The spec says a licence and a sensible range, and names the options class the reward itself names."""
    spec = subject.spec
    if not spec.license and subject.plugins.local(subject.name) is None:
        raise BrokenPromise("its spec says no license. Give an SPDX identifier, such as Apache-2.0 or MIT.")
    if spec.typical_range is not None:
        low, high = spec.typical_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BrokenPromise(f"typical_range ({low:g}, {high:g}) is no range: two finite numbers, the lower first.")
    declared = subject.plugins.reward_config_class(subject.name)
    named = type(subject.reward).Config
    if not issubclass(declared, named):
        raise BrokenPromise(
            f"its spec names the options class {declared.__name__}, but {type(subject.reward).__name__}.Config is "
            f"{named.__name__}. Set Config in the reward to the class the spec names."
        )


def check_config_round_trip(subject: Subject) -> None:
    """Options written as JSON and read again are the same; unknown ones are refused."""
    from alignprop_core.errors import ConfigError

    options = subject.plugins.reward_options(subject.name, subject.options)
    written = json.loads(options.model_dump_json())
    read = subject.plugins.reward_options(subject.name, written)
    if read != options:
        changed = [name for name in type(options).model_fields if getattr(read, name) != getattr(options, name)]
        raise BrokenPromise(
            f"its options change when a run's config.yaml is read again: {', '.join(changed)}. A validator must accept "
            "what it returned and leave it as it is."
        )
    unknown = "no_option_has_this_name"
    try:
        subject.plugins.reward_options(subject.name, {**written, unknown: 1})
    except ConfigError:
        return
    raise BrokenPromise('it accepts unknown options, so a misspelt one goes unnoticed. Keep extra="forbid".')


def check_json_schema(subject: Subject) -> None:
    """The options give a JSON schema in which every option has a description."""
    kind = subject.plugins.reward_config_class(subject.name)
    try:
        schema = json.loads(json.dumps(kind.model_json_schema()))
    except Exception as error:
        raise BrokenPromise(f"its options give no JSON schema: {type(error).__name__}: {error}") from error
    silent = [name for name, facts in schema.get("properties", {}).items() if not facts.get("description")]
    if silent:
        raise BrokenPromise(f"these options have no description: {', '.join(silent)}. Use Field(description=...).")


def check_range(subject: Subject) -> None:
    """Scores of photographs lie near the declared usual range: within once its width beyond either end."""
    if subject.spec.typical_range is None:
        raise NotApplicable("its spec declares no typical_range")
    low, high = subject.spec.typical_range
    scores = subject.scores()
    if scores.min() < low - (high - low) or scores.max() > high + (high - low):
        raise BrokenPromise(
            f"photographs score {listed(scores)}, far outside the declared typical_range ({low:g}, {high:g}). Mend the "
            "range, or the unit of the score."
        )


def check_prompts_declared(subject: Subject) -> None:
    """A reward that declares it reads no prompts gives the same scores whatever they say."""
    from dataclasses import replace

    if subject.spec.needs_prompts:
        raise NotApplicable("it declares that it reads prompts")
    other = replace(subject, prompts=("something else entirely",))
    other.__dict__["reward"] = subject.reward
    here, there = subject.scores(), other.scores()
    if not close(there, here, 1e-6):
        raise BrokenPromise(
            f"scores change with the prompt ({listed(here)} became {listed(there)}), but its spec says "
            "needs_prompts=False. Declare needs_prompts=True."
        )
