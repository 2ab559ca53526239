"""`alignprop rewards check`: the conformance suite on an installed reward, with a verdict a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from alignprop_core.cli import common

if TYPE_CHECKING:
    from alignprop_core.testing import Verdict

_STYLES = {"kept": "green", "broken": "red", "not applicable": "dim", "skipped": "yellow"}


def check(
    name: str = typer.Argument(help="A reward's name."),
    options: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Its options, such as weights=starter."),
    prompt: list[str] = typer.Option([], help="A prompt to try it with; may be given several times."),
    skip: list[str] = typer.Option([], metavar="CHECK", help="Leave a check out; may be given several times."),
    json: bool = common.JSON_OPTION,
) -> None:
    """Hold an installed reward to everything runs rely on: shape, types, gradient, independence of samples, and so on.

    Exit code 1 if it breaks a promise.
    """
    common.quiet_libraries()
    from alignprop_core.config.input import apply_overrides
    from alignprop_core.errors import UserError, did_you_mean
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    registry.reward(name)  # a wrong name is said before torch is imported
    chosen, _ = apply_overrides({}, options or [])
    registry.reward_options(name, chosen)
    from alignprop_core.testing import CHECKS, Subject, run_checks
    from alignprop_core.testing.subject import DEFAULT_PROMPTS

    known = [check.name for check in CHECKS]
    for wrong in (one for one in skip if one not in known):
        raise UserError(
            f'--skip: there is no check "{wrong}".{did_you_mean(wrong, known)} There are: {", ".join(known)}.'
        )
    subject = Subject(name, chosen, prompts=tuple(prompt) or DEFAULT_PROMPTS, registry=registry)
    with common.status(f"loading {name}"):
        _ = subject.reward
    with common.status(f"checking {name}"):
        verdicts = list(run_checks(subject, dict.fromkeys(skip, "left out with --skip")))
    broken = [verdict for verdict in verdicts if verdict.status == "broken"]
    if json:
        common.print_json(
            {
                "reward": name,
                "options": chosen,
                "passed": not broken,
                "checks": [verdict.as_json() for verdict in verdicts],
            }
        )
    else:
        _print(name, verdicts)
    if broken:
        raise typer.Exit(1)


def _print(name: str, verdicts: list[Verdict]) -> None:
    rows = [
        [
            verdict.check,
            common.styled(verdict.status, _STYLES[verdict.status]),
            verdict.promise if not verdict.message else f"{verdict.promise}\n{verdict.message}",
        ]
        for verdict in verdicts
    ]
    common.print_table(["check", "verdict", "promise, and what was found"], rows)
    for verdict in verdicts:
        if verdict.traceback:
            common.note(f"{verdict.check}:\n{verdict.traceback}")
    count = {status: sum(verdict.status == status for verdict in verdicts) for status in _STYLES}
    words = ", ".join(f"{n} {status}" for status, n in count.items() if n)
    typer.echo(
        f"{name}: {words}. " + ("It keeps its promises." if not count["broken"] else "It is not ready for runs.")
    )
