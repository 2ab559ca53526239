"""`alignprop rewards isolate`: create a Python environment for a reward whose packages conflict with those of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from alignprop_core.cli import common


def isolate(
    name: str = typer.Argument(help="A reward's name, or a class in a Python file: ./my_reward.py:MyReward."),
    into: Path | None = typer.Option(None, help="Folder of the environment; the default is isolated/NAME."),
    plugin: list[str] = typer.Option(
        [],
        help="Distribution with the reward, in any form that pip accepts; the default is the installed plugin that "
        "provides it.",
    ),
    package: list[str] = typer.Option(
        [],
        "--with",
        metavar="REQUIREMENT",
        help="An additional requirement, such as 'protobuf<4'; can be repeated.",
    ),
    share: bool = typer.Option(
        False,
        "--share",
        help="Use the packages of the current environment as well, so that torch is not installed twice.",
    ),
    python: str | None = typer.Option(None, help="Interpreter of the environment; the default is the current one."),
) -> None:
    """Create a Python environment for a reward, and print its entry for a run config.

    The core is installed without diffusers and its other heavy requirements. Packages come from pip's usual sources.
    """
    from alignprop_core.registry.local import absolute_name, split_file_name
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.specs import default_label
    from alignprop_isolation.config import IsolationConfig
    from alignprop_isolation.install import make_environment, python_of, source_of
    from alignprop_isolation.lookup import IsolatedRewards

    registry = default_registry()
    local = split_file_name(name) is not None
    reward = absolute_name(name, Path())
    offered = [] if local or plugin else [registry.reward(name).distribution]
    folder = into or Path("isolated") / default_label(name)
    with common.status("creating the environment"):
        make_environment(
            folder,
            plugin or [one if share else source_of(one) for one in offered],
            packages=package,
            share=share,
            python=python or sys.executable,
            say=common.note,
        )
    inner = python_of(folder)
    # The entry is printed only if the environment answers: a pin may have broken a package.
    found = IsolatedRewards(IsolationConfig(python=str(inner.absolute())), registry).reward(reward)
    origin = f"{found.distribution} {found.version}".rstrip()
    typer.echo(f"{found.name} of {origin} is available in {folder}.\n\nIn a run config:\n")
    typer.echo(f"rewards:\n  - name: {name}\n    isolation: {{python: {inner}}}")
