"""Callbacks by name, and callbacks that join every run: the core's trackers and those of plugins. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from alignprop_core import __version__
from alignprop_core.errors import ConfigError, PluginError, did_you_mean, under
from alignprop_core.registry.discovery import CORE
from alignprop_core.registry.guard import PluginFailure, describe, guarded
from alignprop_core.registry.offers import Offer, belongs, conflict, matching
from alignprop_core.registry.registry import Registry, load_object
from alignprop_core.specs import CallbackSpec
from alignprop_core.training.callback import Callback

BUILT_IN = (
    CallbackSpec(
        name="tensorboard",
        summary="Event files for TensorBoard in the run folder.",
        factory="alignprop_core.training.trackers:TensorBoard",
    ),
    CallbackSpec(name="wandb", summary="A run of Weights & Biases.", factory="alignprop_core.training.trackers:WandB"),
)


def known_callbacks(registry: Registry) -> tuple[Offer[CallbackSpec], ...]:
    """Return the core's trackers and the callbacks of plugins."""
    return (*(Offer(spec, CORE, __version__) for spec in BUILT_IN), *registry.callbacks())


def find_callback(name: str, registry: Registry) -> Offer[CallbackSpec]:
    """Return the callback that a name of `training.trackers` means.

    Raises:
        ConfigError: no installed plugin offers it, or the core's tracker lacks the package it writes with.
        PluginError: two plugins offer it.
    """
    known = known_callbacks(registry)
    found = matching(name, known)
    if len(found) > 1:
        raise PluginError(conflict("tracker", name, found))
    if not found:
        names = sorted({offer.name for offer in known})
        raise ConfigError(
            f'No installed plugin offers the tracker "{name}".{did_you_mean(name, names)} There are: '
            f"{', '.join(names)}. Install the plugin that offers another one: pip install NAME."
        )
    if found[0].distribution == CORE and find_spec(found[0].name) is None:
        raise ConfigError(f'{name} is not installed. Install it: pip install "alignprop-core[{found[0].name}]".')
    return found[0]


def check_trackers(names: Sequence[str], registry: Registry) -> None:
    """Raise `UserError`, with the run config's key, if a tracker is unknown or its package is not installed."""
    for i, name in enumerate(names):
        with under(f"training.trackers.{i}"):
            find_callback(name, registry)


def named_callbacks(names: Sequence[str], registry: Registry) -> list[Callback]:
    """Build the callbacks that `training.trackers` names; automatic ones join anyway and are left out."""
    offers = dict.fromkeys(find_callback(name, registry) for name in names)
    return [build(offer) for offer in offers if not offer.spec.automatic]


def automatic_callbacks(registry: Registry) -> list[Callback]:
    """Build the callbacks of plugins that join every run; one that cannot be built is left out with a warning."""
    built: list[Callback] = []
    for offer in registry.callbacks():
        if offer.spec.automatic:
            try:
                built.append(Contained(offer, build(offer)))
            except PluginError as error:
                warnings.warn(f"{error} It is left out.", stacklevel=2)
    return built


def results_written(folder: Path, registry: Registry) -> None:
    """Call `on_results` of the automatic callbacks."""
    for callback in automatic_callbacks(registry):
        callback.on_results(folder)


def build(offer: Offer[CallbackSpec]) -> Callback:
    """Import and build a callback; `PluginError` if that fails."""
    factory = load_object(offer, offer.spec.factory, "class")
    if not (isinstance(factory, type) and issubclass(factory, Callback)):
        raise PluginError(f"{belongs(offer)}: {offer.spec.factory} must be a subclass of alignprop_core.Callback.")
    try:
        with guarded():
            return factory()
    except PluginFailure as failure:
        error = PluginError(f"{belongs(offer)}: it could not be built: {failure}.")
        error.add_note(failure.traceback)
        raise error from failure.__cause__


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
