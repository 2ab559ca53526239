"""Callbacks of plugins: those that a run config asks for, and those that join every run. Imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import PluginError, under
from alignprop_core.registry.guard import describe
from alignprop_core.registry.offers import Offer, belongs, matching
from alignprop_core.registry.registry import Registry, build, load_class
from alignprop_core.specs import CallbackSpec
from alignprop_core.training.callback import Callback

EARLY_STOPPING = "early_stopping"
"""Name of the callback that evaluates while training (`evaluation.every`)."""

WELL_KNOWN = {
    "tensorboard": ('The tracker "tensorboard"', "alignprop-trackers"),
    "wandb": ('The tracker "wandb"', "alignprop-trackers"),
    EARLY_STOPPING: ("Evaluation while training", "alignprop-evaluation"),
}
"""Where one of these callbacks is missing, the error says what it is and which distribution to install."""


def find_callback(name: str, registry: Registry) -> Offer[CallbackSpec]:
    """Return the callback of this name; `PluginError` if not exactly one plugin offers it."""
    if name in WELL_KNOWN and not matching(name, registry.callbacks()):
        raise registry.missing(*WELL_KNOWN[name])
    return registry.callback(name)


def check_callbacks(config: RunConfig, registry: Registry) -> None:
    """Raise `UserError`, with the run config's key, if a callback that it asks for is not available."""
    asked = {f"training.trackers.{i}": name for i, name in enumerate(config.training.trackers)}
    if config.evaluation.every is not None:
        asked["evaluation.every"] = EARLY_STOPPING
    for key, name in asked.items():
        with under(key):
            find_callback(name, registry)


def named_callbacks(names: Sequence[str], registry: Registry) -> list[Callback]:
    """Build the callbacks of these names; automatic ones join anyway and are left out."""
    offers = dict.fromkeys(find_callback(name, registry) for name in names)
    return [_built(offer) for offer in offers if not offer.spec.automatic]


def automatic_callbacks(registry: Registry) -> list[Callback]:
    """Build the callbacks of plugins that join every run; one that cannot be built is left out with a warning."""
    built: list[Callback] = []
    for offer in registry.callbacks():
        if offer.spec.automatic:
            try:
                built.append(Contained(offer, _built(offer)))
            except PluginError as error:
                warnings.warn(f"{error} It is left out.", stacklevel=2)
    return built


def _built(offer: Offer[CallbackSpec]) -> Callback:
    """Import and build a callback; `PluginError` if that fails."""
    return build(offer, load_class(offer, offer.spec.factory, "class", Callback), PluginError)


class Contained(Callback):
    """A callback nobody asked for by name: the first time it raises, a warning is shown and it is called no more.

    Args:
        offer: the plugin's offer, for the warning.
        callback: the plugin's callback.
    """

    def __init__(self, offer: Offer[CallbackSpec], callback: Callback) -> None:
        self.offer = offer
        self.failed = False
        for name in vars(Callback):
            if name.startswith("on_"):
                setattr(self, name, partial(self._call, getattr(callback, name)))

    def _call(self, method: Callable[..., None], *args: object) -> None:
        if self.failed:
            return
        try:
            method(*args)
        except (Exception, SystemExit) as error:
            self.failed = True
            message = f"{belongs(self.offer)} failed: {describe(error)}. Everything else continues without it."
            warnings.warn(message, stacklevel=2)
