"""The HTML report of a run, or of several: a callback of every run, and the command `report`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CallbackSpec, CommandSpec


@hookimpl
def alignprop_register_callbacks() -> Iterable[CallbackSpec]:
    """Return the callback that writes report.html."""
    return [
        CallbackSpec(
            name="report",
            summary="report.html at the end of a run, and plots of strength curves.",
            factory="alignprop_report.report_callback:Report",
            automatic=True,
        )
    ]


@hookimpl
def alignprop_register_commands() -> Iterable[CommandSpec]:
    """Return `alignprop report`."""
    return [
        CommandSpec(
            path="report",
            summary="Write report.html: results, curves and images on one page that opens offline.",
            factory="alignprop_report.report_command:report",
        )
    ]
