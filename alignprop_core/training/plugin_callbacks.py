"""Callbacks of plugins: those that `training.trackers` names, and those that join every run. Imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from alignprop_core.errors import PluginError, under
from alignprop_core.registry.guard import describe
from alignprop_core.registry.offers import Offer, belongs, matching
from alignprop_core.registry.registry import Registry, build, load_class
from alignprop_core.specs import CallbackSpec
from alignprop_core.training.callback import Callback

DISTRIBUTION_OF = {"tensorboard": "alignprop-trackers", "wandb": "alignprop-trackers"}
"""Well-known trackers: where one is missing, the error names the distribution to install."""


def find_callback(name: str, registry: Registry) -> Offer[CallbackSpec]:
    """Return the callback that `training.trackers` names; `PluginError` if not exactly one plugin offers it."""
    if name in DISTRIBUTION_OF and not matching(name, registry.callbacks()):
        raise registry.missing(f'The tracker "{name}"', DISTRIBUTION_OF[name])
    return registry.callback(name)


def check_trackers(names: Sequence[str], registry: Registry) -> None:
    """Raise `UserError`, with the run config's key, if a tracker is unknown."""
    for i, name in enumerate(names):
        with under(f"training.trackers.{i}"):
            find_callback(name, registry)


def named_callbacks(names: Sequence[str], registry: Registry) -> list[Callback]:
    """Build the callbacks that `training.trackers` names; automatic ones join anyway and are left out."""
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


def results_written(folder: Path, registry: Registry) -> None:
    """Call `on_results` of the automatic callbacks."""
    for callback in automatic_callbacks(registry):
        callback.on_results(folder)


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
