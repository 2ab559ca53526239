"""The list of conformance checks, and functions that run them on a reward."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from alignprop_core.testing import declaration_checks, gradient_checks, score_checks
from alignprop_core.testing.subject import CheckFailed, NotApplicable, Subject


@dataclass(frozen=True)
class Check:
    """A conformance check.

    Attributes:
        run: the check; raises `CheckFailed` or `NotApplicable`. Any other exception comes from the reward and is a
            failure as well.
    """

    run: Callable[[Subject], None]

    @property
    def name(self) -> str:
        """Its name in reports and in `skip`, such as `batch_of_one`."""
        return self.run.__name__.removeprefix("check_")

    @property
    def description(self) -> str:
        """What it checks, in one sentence."""
        return " ".join((self.run.__doc__ or "").split("\n\n")[0].split())


CHECKS: tuple[Check, ...] = tuple(
    Check(function)
    for module in (declaration_checks, score_checks, gradient_checks)
    for name, function in vars(module).items()
    if name.startswith("check_")
)
"""All checks: the functions `check_...` of these modules, in their order."""


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    Attributes:
        check: the check's name.
        description: what it checks.
        status: `passed`, `failed`, `not applicable` or `skipped`.
        message: the reason, unless it passed.
        traceback: the reward's traceback, if it raised.
    """

    check: str
    description: str
    status: Literal["passed", "failed", "not applicable", "skipped"]
    message: str = ""
    traceback: str = ""


def judge(check: Check, subject: Subject) -> Verdict:
    """Run one check and return the result; exceptions of the reward become failures."""
    try:
        check.run(subject)
    except NotApplicable as reason:
        return Verdict(check.name, check.description, "not applicable", str(reason))
    except CheckFailed as failure:
        return Verdict(check.name, check.description, "failed", str(failure))
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"
        return Verdict(check.name, check.description, "failed", message, "".join(traceback.format_exception(error)))
    return Verdict(check.name, check.description, "passed")


def run_checks(subject: Subject, skip: Mapping[str, str] | None = None) -> Iterator[Verdict]:
    """Run all checks on a reward and yield the results; a failed check does not stop the others.

    After scores that are not finite the others are skipped: they compare scores, and NaN equals nothing.

    Args:
        subject: the reward. It is built first, so exceptions from building it are raised here.
        skip: name of a check -> why it is skipped.

    Raises:
        ValueError: `skip` names an unknown check.
    """
    skip = dict(skip or {})
    known = [check.name for check in CHECKS]
    if unknown := set(skip) - set(known):
        raise ValueError(f"no check is called {', '.join(sorted(unknown))}; the checks are: {', '.join(known)}")
    _ = subject.reward
    for check in CHECKS:
        if check.name in skip:
            yield Verdict(check.name, check.description, "skipped", skip[check.name])
            continue
        yield (verdict := judge(check, subject))
        if check.name == "finite" and verdict.status == "failed" and not verdict.traceback:
            skip = dict.fromkeys(known, "the scores are not finite, so nothing can be compared") | skip
