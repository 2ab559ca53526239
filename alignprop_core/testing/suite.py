"""All conformance checks in their order, and running them on one reward."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignprop_core.testing import declaration_checks as declared
from alignprop_core.testing import gradient_checks as gradients
from alignprop_core.testing import score_checks as scored
from alignprop_core.testing.subject import BrokenPromise, NotApplicable, Subject


@dataclass(frozen=True)
class Check:
    """A promise and the function that holds a reward to it.

    Attributes:
        run: raises `BrokenPromise` or `NotApplicable`; anything else it raises came from the reward and is a failure.
    """

    run: Callable[[Subject], None]

    @property
    def name(self) -> str:
        """Its name in reports and in `skip`, such as `batch_of_one`."""
        return self.run.__name__.removeprefix("check_")

    @property
    def promise(self) -> str:
        """What it holds a reward to, in a sentence."""
        return " ".join((self.run.__doc__ or "").split("\n\n")[0].split())


CHECKS: tuple[Check, ...] = tuple(
    Check(run)
    for run in (
        declared.check_spec_without_torch,
        declared.check_spec_facts,
        declared.check_config_round_trip,
        declared.check_json_schema,
        scored.check_shape,
        scored.check_batch_of_one,
        scored.check_dtype,
        scored.check_finite,
        declared.check_range,
        declared.check_prompts_declared,
        scored.check_samples_independent,
        scored.check_input_unchanged,
        scored.check_deterministic,
        scored.check_frozen,
        scored.check_mixed_precision,
        scored.check_device_move,
        gradients.check_differentiable,
        gradients.check_gradient,
        gradients.check_gradcheck,
        gradients.check_saturated_pixels,
        gradients.check_improves,
    )
)


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        check: the check's name.
        promise: what it holds the reward to.
        status: `kept`, `broken`, `not applicable`, or `skipped` because the author said so.
        message: why, unless kept.
        traceback: where the reward raised, if it did.
    """

    check: str
    promise: str
    status: Literal["kept", "broken", "not applicable", "skipped"]
    message: str = ""
    traceback: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the verdict for `--json`."""
        return {"check": self.check, "promise": self.promise, "status": self.status, "message": self.message}


def judge(check: Check, subject: Subject) -> Verdict:
    """Run one check; whatever is raised becomes a verdict."""
    try:
        check.run(subject)
    except NotApplicable as reason:
        return Verdict(check.name, check.promise, "not applicable", str(reason))
    except BrokenPromise as broken:
        return Verdict(check.name, check.promise, "broken", str(broken))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Verdict(check.name, check.promise, "broken", message, "".join(traceback.format_exception(error)))
    return Verdict(check.name, check.promise, "kept")


def run_checks(subject: Subject, skip: Mapping[str, str] | None = None) -> Iterator[Verdict]:
    """Run all checks on a reward, one verdict after another; no check stops the next.

    Args:
        subject: the reward. It is built first, so what its building raises is raised here.
        skip: name of a check -> why it is left out.

    Raises:
        ValueError: `skip` names no check.
    """
    skip = skip or {}
    known = [check.name for check in CHECKS]
    if unknown := set(skip) - set(known):
        raise ValueError(f"no check is called {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    _ = subject.reward
    for check in CHECKS:
        if check.name in skip:
            yield Verdict(check.name, check.promise, "skipped", skip[check.name])
        else:
            yield judge(check, subject)
