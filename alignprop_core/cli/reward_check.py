"""`alignprop rewards check`: run the conformance checks on a reward."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from alignprop_core.cli import common
from alignprop_core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from alignprop_core.testing import Verdict


def check(
    name: str = typer.Argument(help="A reward's name."),
    options: list[str] = typer.Argument(None, metavar="KEY=VALUE", help="Its options, such as weights=starter."),
    prompt: list[str] = typer.Option([], help="A prompt to score with; can be repeated."),
    skip: list[str] = typer.Option([], metavar="CHECK", help="Skip a check; can be repeated."),
    json: bool = common.JSON_OPTION,
) -> None:
    """Check that an installed reward meets the contract: shapes, dtypes, gradients, independence of samples and more.

    The exit code is 1 if a check fails.
    """
    common.quiet_libraries()
    from alignprop_core.config.input import apply_overrides
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    registry.reward(name)  # report a wrong name before importing torch
    values, _ = apply_overrides({}, options or [])
    registry.reward_options(name, values)
    from alignprop_core.testing import CHECKS, Subject, run_checks
    from alignprop_core.testing.subject import DEFAULT_PROMPTS

    known = [check.name for check in CHECKS]
    for wrong in (one for one in skip if one not in known):
        hint = did_you_mean(wrong, known)
        raise UserError(f'--skip: there is no check "{wrong}".{hint} The checks are: {", ".join(known)}.')
    subject = Subject(name, values, prompts=tuple(prompt) or DEFAULT_PROMPTS, registry=registry)
    with common.status(f"loading {name}"):
        _ = subject.reward
    with common.status(f"checking {name}"):
        verdicts = list(run_checks(subject, dict.fromkeys(skip, "--skip")))
    passed = all(verdict.status != "failed" for verdict in verdicts)
    if json:
        checks = [asdict(verdict) for verdict in verdicts]
        common.print_json({"reward": name, "options": values, "passed": passed, "checks": checks})
    else:
        _print(name, verdicts)
    if not passed:
        raise typer.Exit(1)


def _print(name: str, verdicts: list[Verdict]) -> None:
    rows = [[v.check, v.status, f"{v.description}\n{v.message}".rstrip()] for v in verdicts]
    common.print_table(["check", "result", "description"], rows)
    for verdict in verdicts:
        if verdict.traceback:
            common.note(f"{verdict.check}:\n{verdict.traceback}")
    count = Counter(verdict.status for verdict in verdicts)
    text = ", ".join(f"{number} {status}" for status, number in count.most_common())
    end = "The reward is not ready for runs." if count["failed"] else "The reward meets the contract."
    typer.echo(f"{name}: {text}. {end}")
