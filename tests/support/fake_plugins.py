"""Fake installed distributions: real *.dist-info folders, which importlib.metadata really discovers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent, indent

HEAD = """\
from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import (
    CallbackSpec, CommandSpec, FamilySpec, ModelSpec, PromptSpec, RewardSpec, WeightsSpec
)

"""

CONFIG = '''\
from pydantic import Field
from alignprop_core.specs import RewardConfig

class Options(RewardConfig):
    """Options of the fake reward."""

    quality: int = Field(default=95, ge=1, le=95, description="How good.")
    size: tuple[int, int] = Field(default=(8, 8), description="Two numbers.")
    weights: str | None = Field(default=None, description="A file.")
'''

REWARD = """\
from alignprop_core.reward import Reward
from {package}.config import Options

class Fake(Reward):
    Config = Options

    def score(self, batch):
        return batch.images.mean(dim=(1, 2, 3)).float() * self.config.quality
"""


def rewards_hook(body: str) -> str:
    """Return a hook module whose reward hook has this body."""
    return f"{HEAD}@hookimpl\ndef alignprop_register_rewards():\n{indent(dedent(body), '    ')}"


def reward_spec(name: str, package: str, more: str = "") -> str:
    """Return source of a RewardSpec."""
    facts = f'name="{name}", summary="Fake.", factory="{package}.reward:Fake", config="{package}.config:Options"'
    return f"RewardSpec({facts}{', ' + more if more else ''})"


def install(
    folder: Path,
    distribution: str,
    module: str | None = None,
    *,
    version: str = "1.2",
    requires: tuple[str, ...] = ("alignprop-core>=0.1,<0.2",),
    entry_points: str | None = None,
    reward: str = REWARD,
    config: str = CONFIG,
    files: Mapping[str, str] | None = None,
) -> str:
    """Write a distribution into a folder that is on sys.path and return its package's name.

    Args:
        folder: where site-packages would be.
        distribution: its name; the package is named alike.
        module: source of its hook module; one that offers a reward named like the package, if None.
        version: its version.
        requires: Requires-Dist lines.
        entry_points: text of entry_points.txt, if not one entry point that names the package.
        reward: source of its reward module.
        config: source of its options module.
        files: sources of further modules, by file name.
    """
    package = distribution.replace("-", "_").lower()
    source = module if module is not None else rewards_hook(f"return [{reward_spec(package, package)}]")
    home = folder / package
    home.mkdir(parents=True)
    (home / "__init__.py").write_text(source)
    (home / "config.py").write_text(config)
    (home / "reward.py").write_text(reward.replace("{package}", package))
    for name, text in (files or {}).items():
        (home / name).write_text(text)
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}\n")
    (info / "entry_points.txt").write_text(entry_points or f"[alignprop]\nmain = {package}\n")
    return package


def outside_a_terminal() -> dict[str, str]:
    """Return the environment without a terminal's size: importing readline, as pytest does, sets it for all processes.

    Where it is set, tables are printed for a terminal of that width, by rich.
    """
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
