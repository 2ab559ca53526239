"""`alignprop rewards new`: create a plugin from a template."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"


def new(
    name: str = typer.Argument(help="The reward's name in snake_case, such as warm_colors."),
    prompts: bool | None = typer.Option(None, "--prompts/--no-prompts", help="The reward reads prompts. [asked; no]"),
    weights: bool | None = typer.Option(None, "--weights/--no-weights", help="The reward has a network. [asked; no]"),
    license: str | None = typer.Option(None, help="Apache-2.0, MIT or BSD-3-Clause. [asked; Apache-2.0]"),
    author: str = typer.Option("", help="Author for the package metadata and the license."),
    to: Path | None = typer.Option(None, help="Output folder. [default: alignprop-NAME]"),
) -> None:
    """Create a plugin with one reward that can be installed, passes its tests and can be trained on.

    On a terminal, asks for options that are not given; elsewhere uses the defaults.
    """
    import re

    from alignprop_core._files import write_atomic
    from alignprop_core.errors import OutputError, UserError, did_you_mean
    from alignprop_template.scaffold import LICENSES, reward_project

    if not re.fullmatch(NAME, name):
        raise UserError(
            f'"{name}" is not a reward name: use lowercase letters, digits and single underscores, such as warm_colors.'
        )
    asking = sys.stdin.isatty() and sys.stdout.isatty()
    if prompts is None:
        prompts = asking and typer.confirm("Does the reward read the prompts?", default=False)
    if weights is None:
        weights = asking and typer.confirm("Does it have a network with weights?", default=False)
    if license is None:
        license = typer.prompt(f"License ({', '.join(LICENSES)})", default=LICENSES[0]) if asking else LICENSES[0]
    if license not in LICENSES:
        raise UserError(
            f'--license: "{license}" is not one of {", ".join(LICENSES)}.{did_you_mean(license, LICENSES)} For another '
            "license, create the plugin with one of these and change LICENSE, pyproject.toml and the spec."
        )
    folder = to or Path("alignprop-" + name.replace("_", "-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists already. Choose another name, or another folder with --to.")
    project = reward_project(name, prompts=prompts, weights=weights, license=license, author=author)
    for path, data in project.items():
        write_atomic(folder / path, data)
    local = folder if folder.is_absolute() else f"./{folder}"  # pip reads a bare name as a distribution
    score = next(path for path in project if path.endswith("/reward.py"))
    typer.echo(f"Created a plugin with the reward {name} in {folder} ({len(project)} files). Next:\n")
    typer.echo(f'  pip install -e "{local}[test]"\n  python -m pytest {folder}\n  alignprop rewards check {name}')
    typer.echo(f"\nThen write your own score() in {folder / score}.")
