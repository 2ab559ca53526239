"""Checks of the declarations: the spec and the options, and whether the reward agrees with them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

from alignprop_core.errors import ConfigError
from alignprop_core.hookspecs import PROJECT
from alignprop_core.testing.subject import CheckFailed, NotApplicable, Subject, fails_as, require


def check_spec_without_torch(subject: Subject) -> None:
    """The hook module and the module of the options class can be imported without torch."""
    if subject.plugins.local(subject.name) is not None:
        raise NotApplicable("the reward is from a Python file or object, not from a plugin")
    offer = subject.plugins.reward(subject.name)
    modules = [offer.spec.config.partition(":")[0]]
    try:
        points = distribution(offer.distribution).entry_points
        modules += [point.module for point in points if point.group == PROJECT]
    except PackageNotFoundError:
        pass  # a registry of plain objects has no entry points
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
    require(
        not last.startswith("TORCH "),
        f"importing {last.removeprefix('TORCH ')} imports torch, which makes listings slow. Import torch only in the "
        "module of the factory.",
    )
    require(done.returncode == 0, f"importing {' and '.join(modules)} fails: {last}")


def check_spec_facts(subject: Subject) -> None:
    """The spec has a license, a valid typical range, and the same options class as the reward."""
    spec = subject.spec
    local = subject.plugins.local(subject.name) is not None
    require(spec.license or local, "its spec has no license. Give an SPDX identifier, such as Apache-2.0 or MIT.")
    low, high = spec.typical_range or (0.0, 1.0)
    require(
        math.isfinite(low) and math.isfinite(high) and low < high,
        f"typical_range ({low:g}, {high:g}) is not a range: give two finite numbers, the lower one first.",
    )
    declared, reward = subject.plugins.reward_config_class(subject.name), type(subject.reward)
    require(
        issubclass(declared, reward.Config),
        f"its spec has the options class {declared.__name__}, but {reward.__name__}.Config is "
        f"{reward.Config.__name__}. Set Config in the reward to the class in the spec.",
    )


def check_config_round_trip(subject: Subject) -> None:
    """Options are unchanged when written as JSON and read again; unknown options are refused."""
    options = subject.plugins.reward_options(subject.name, subject.options)
    written = json.loads(options.model_dump_json())
    read = subject.plugins.reward_options(subject.name, written)
    changed = [name for name in type(options).model_fields if getattr(read, name) != getattr(options, name)]
    require(
        read == options,
        f"its options change when a run's config.yaml is read again: {', '.join(changed)}. A validator must accept its "
        "own result and leave it unchanged.",
    )
    try:
        subject.plugins.reward_options(subject.name, {**written, "no_option_has_this_name": 1})
    except ConfigError:
        return
    raise CheckFailed('it accepts unknown options, so misspelled options are not reported. Keep extra="forbid".')


def check_json_schema(subject: Subject) -> None:
    """The options have a JSON Schema with a description for every option."""
    with fails_as("its options have no JSON Schema: {error}"):
        schema = json.loads(json.dumps(subject.plugins.reward_config_class(subject.name).model_json_schema()))
    missing = [name for name, facts in schema.get("properties", {}).items() if not facts.get("description")]
    require(not missing, f"these options have no description: {', '.join(missing)}. Use Field(description=...).")
