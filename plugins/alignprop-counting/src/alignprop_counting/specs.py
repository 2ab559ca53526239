"""What a plugin declares about a detector it offers, and finding one by name. No torch."""

from __future__ import annotations

from pydantic import Field

from alignprop_core.errors import PluginError, did_you_mean
from alignprop_core.offers import Offer, conflict, matching
from alignprop_core.registry import Registry
from alignprop_core.specs import ObjectPath, SnakeName, Spec, WeightsFile

DETECTORS_HOOK = "alignprop_counting_detectors"


class DetectorSpec(Spec):
    """A detector by name. `license` is that of the code; weights carry their own.

    The factory is a function `(name, weights, image_size) -> Detector`: the spec's name, a local and verified weights
    file, and the `image_size` option (None for the detector's own). It raises `WeightsError` if the file does not fit.
    """

    name: SnakeName = Field(description="Name in the option `detector`; also the name its sets of weights are kept by.")
    factory: ObjectPath = Field(description='"package.module:function" that builds the detector.')
    weights: tuple[WeightsFile, ...] = Field(default=(), description="Files it loads; the first is the default.")
    get_weights: str = Field(default="", description="How to come by weights, where there is no default file.")


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
    raise PluginError(f'No installed plugin offers the detector "{name}".{hint} There are: {", ".join(known)}.')
