"""`alignprop rewards new`: a complete plugin to start from."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"


def new(
    name: str = typer.Argument(help="The reward's name, snake_case, such as warm_colours."),
    prompts: bool | None = typer.Option(None, "--prompts/--no-prompts", help="Whether it reads prompts. [asked; no]"),
    weights: bool | None = typer.Option(None, "--weights/--no-weights", help="Whether it has a network. [asked; no]"),
    license: str | None = typer.Option(None, help="Apache-2.0, MIT or BSD-3-Clause. [asked; Apache-2.0]"),
    author: str = typer.Option("", help="Who stands in its metadata, and in a licence that names somebody."),
    to: Path | None = typer.Option(None, help="Folder to write. [default: alignprop-NAME]"),
) -> None:
    """Write a plugin with one reward that installs, passes its tests and trains as it is.

    What no flag says is asked on a terminal; elsewhere the default is taken.
    """
    import re

    from alignprop_core.cli.scaffold import LICENSES, reward_project
    from alignprop_core.errors import OutputError, UserError, did_you_mean

    if not re.fullmatch(NAME, name):
        raise UserError(
            f'"{name}" is no name for a reward: use small letters, digits and single underscores, such as warm_colours.'
        )
    asking = sys.stdin.isatty() and sys.stdout.isatty()
    if prompts is None:
        prompts = asking and typer.confirm("Does the reward read the prompts?", default=False)
    if weights is None:
        weights = asking and typer.confirm("Does it have a network with weights?", default=False)
    if license is None:
        license = typer.prompt(f"Licence ({', '.join(LICENSES)})", default=LICENSES[0]) if asking else LICENSES[0]
    if license not in LICENSES:
        raise UserError(
            f'--license: "{license}" is none of {", ".join(LICENSES)}.{did_you_mean(license, LICENSES)} For another '
            "one, write the plugin with one of these and change LICENSE, pyproject.toml and the spec."
        )
    folder = to or Path("alignprop-" + name.replace("_", "-"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists already. Choose another name, or another folder with --to.")
    project = reward_project(name, prompts=prompts, weights=weights, license=license, author=author)
    try:
        for path, data in project.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from error
    typer.echo(f"{folder}: a plugin with the reward {name} ({len(project)} files). Next:\n")
    for command in (
        f'pip install -e "{_shown(folder)}[test]"',
        f"python -m pytest {folder}",
        f"alignprop rewards check {name}",
    ):
        typer.echo(f"  {command}")
    score = next(path for path in project if path.startswith("src/") and path.endswith("/reward.py"))
    typer.echo(f"\nThen write your own score() in {folder / score}.")


def _shown(folder: Path) -> str:
    """Write a folder so that pip takes it for one: with a leading ./ or absolute."""
    return str(folder) if folder.is_absolute() else f"./{folder}"
