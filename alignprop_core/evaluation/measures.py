"""Config entries of what evaluations measure: rewards and the measures they name in `evaluate_with`. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError, did_you_mean, under
from alignprop_core.registry.registry import Registry

TOTAL = "total"
"""The value of `early_stopping.monitor` that means the mix's weighted sum."""


def measure_entries(entries: Sequence[RewardTerm], registry: Registry) -> list[RewardTerm]:
    """Return entries for the measures that the given rewards name in `evaluate_with`.

    A measure gets the options that it has in common with its reward, such as a JPEG quality. A measure that is already
    listed with the same options, under any label, is not added again.
    """
    added: list[RewardTerm] = []
    for entry in entries:
        source = registry.source(entry.loader)  # a measure is loaded in the same way as its reward
        for name in source.reward(entry.name).spec.evaluate_with:
            known = source.option_names(name)
            options = {key: value for key, value in entry.options.items() if key in known}
            same = (name, options, entry.loader)
            if any((other.name, other.options, other.loader) == same for other in (*entries, *added)):
                continue
            taken = {other.label for other in (*entries, *added)}
            label = name if name not in taken else f"{name}.{entry.label}"
            data = {"name": name, "label": label, "options": options, **(entry.model_extra or {})}
            added.append(RewardTerm.model_validate(data, context={"registry": registry}))
    return added


def check_monitor(config: RunConfig, registry: Registry) -> None:
    """Raise `ConfigError` if evaluations do not measure `early_stopping.monitor`; loads nothing."""
    entries = [*config.rewards, *config.evaluation.rewards]
    labels = [TOTAL, *(entry.label for entry in (*entries, *measure_entries(entries, registry)))]
    monitor = config.early_stopping.monitor
    if monitor not in labels:
        with under("early_stopping.monitor"):
            raise ConfigError(
                f'no evaluation measures "{monitor}". Choose one of: {", ".join(labels)}.'
                f"{did_you_mean(monitor, labels)}"
            )
