"""`DetectorSpec`, with which a plugin declares a detector, and the lookup by name. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from alignprop_core.errors import PluginError, did_you_mean
from alignprop_core.registry.offers import Offer, conflict, matching
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import ObjectPath, SnakeName, Spec, WeightsFile

DETECTORS_HOOK = "alignprop_counting_detectors"


class DetectorSpec(Spec):
    """A detector by name. `license` is that of the code; weights have their own.

    The factory is a function `(name, weights, image_size) -> Detector`: the spec's name, a local and verified weights
    file, and the `image_size` option (None for the detector's default). It raises `WeightsError` if the file does not
    match.
    """

    name: SnakeName = Field(description="Value of the option `detector`; weight sets are registered under it.")
    factory: ObjectPath = Field(description='"package.module:function" that builds the detector.')
    weights: tuple[WeightsFile, ...] = Field(default=(), description="Files it loads; the first is the default.")
    get_weights: str = Field(default="", description="How to get weights if there is no default file.")


def find_detector(name: str, registry: Registry) -> Offer[DetectorSpec]:
    """Find a detector by `name` or `distribution/name`; `PluginError` if no plugin or more than one offers it."""
    offers = registry.offered(DETECTORS_HOOK, DetectorSpec)
    found = matching(name, offers)
    if len(found) == 1:
        return found[0]
    if found:
        raise PluginError(conflict("detector", name, found))
    known = sorted(offer.name for offer in offers)
    hint = did_you_mean(name, known)
    if not hint and name.startswith("yolo") and not any(n.startswith("yolo") for n in known):
        hint = " YOLO comes with `pip install alignprop-ultralytics` (AGPL-3.0)."
    raise PluginError(f'No installed plugin offers the detector "{name}".{hint} Available: {", ".join(known)}.')
