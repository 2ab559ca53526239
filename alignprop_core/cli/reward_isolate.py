"""`alignprop rewards isolate`: make a Python environment for one reward, beside packages a run could not live with."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from alignprop_core.cli import common


def isolate(
    name: str = typer.Argument(help="A reward's name, or a class in a Python file: ./my_reward.py:MyReward."),
    into: Path | None = typer.Option(None, help="Folder of the environment; the default is isolated/NAME."),
    plugin: list[str] = typer.Option(
        [], help="What offers the reward, as pip takes it; the default is the installed plugin that offers it."
    ),
    package: list[str] = typer.Option(
        [],
        "--with",
        metavar="REQUIREMENT",
        help="A further package or pin, such as 'protobuf<4'; several may be given.",
    ),
    share: bool = typer.Option(
        False,
        "--share",
        help="Let it see this environment's packages behind its own, so that torch is not there twice.",
    ),
    python: str = typer.Option(sys.executable, help="The interpreter to make it with, if not this one."),
) -> None:
    """Make a Python environment for a reward, and say how a run config uses it.

    The core goes in without diffusers and its other heavy requirements. Packages come from where pip finds them.
    """
    from alignprop_core.config.rewards import IsolationConfig
    from alignprop_core.isolation.install import make_environment, python_of, source_of
    from alignprop_core.registry.local import absolute_name, split_file_name
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.specs import default_label

    registry = default_registry()
    local = split_file_name(name) is not None
    reward = absolute_name(name, Path())
    offered = [] if local or plugin else [registry.reward(name).distribution]
    folder = into or Path("isolated") / default_label(name)
    with common.status("making the environment"):
        make_environment(
            folder,
            plugin or [one if share else source_of(one) for one in offered],
            packages=package,
            share=share,
            python=python,
            say=common.note,
        )
    inner = python_of(folder)
    # Nothing is offered before it answers: a pin may have broken what it came with.
    found = registry.elsewhere(IsolationConfig(python=str(inner.absolute()))).reward(reward)
    origin = f"{found.distribution} {found.version}".rstrip()
    typer.echo(f"{found.name} of {origin} answers in {folder}.\n\nIn a run config:\n")
    typer.echo(f"rewards:\n  - name: {name}\n    isolation: {{python: {inner}}}")
