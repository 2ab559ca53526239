"""Find the family adapter for a pipeline: the core's own, or one that a plugin registered."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Family
from alignprop_core.errors import ModelError, PluginError
from alignprop_core.specs import FamilySpec

BUILT_IN = (
    FamilySpec(
        name="stable_diffusion",
        summary="Stable Diffusion 1.x and 2.x, epsilon and v prediction.",
        factory="alignprop_core.diffusion.families.stable_diffusion:StableDiffusion",
        pipelines=("StableDiffusionPipeline",),
    ),
    FamilySpec(
        name="stable_diffusion_xl",
        summary="Stable Diffusion XL, epsilon and v prediction.",
        factory="alignprop_core.diffusion.families.stable_diffusion_xl:StableDiffusionXL",
        pipelines=("StableDiffusionXLPipeline",),
    ),
    FamilySpec(
        name="stable_diffusion_3",
        summary="Stable Diffusion 3 and 3.5, flow matching.",
        factory="alignprop_core.diffusion.families.stable_diffusion_3:StableDiffusion3",
        pipelines=("StableDiffusion3Pipeline",),
    ),
    FamilySpec(
        name="flux",
        summary="FLUX.1 [dev] and [schnell], flow matching.",
        factory="alignprop_core.diffusion.families.flux:Flux",
        pipelines=("FluxPipeline",),
    ),
    FamilySpec(
        name="flux2_klein",
        summary="FLUX.2 [klein], distilled and base, flow matching.",
        factory="alignprop_core.diffusion.families.flux2_klein:Flux2Klein",
        pipelines=("Flux2KleinPipeline",),
    ),
    FamilySpec(
        name="z_image",
        summary="Z-Image and Z-Image-Turbo, flow matching.",
        factory="alignprop_core.diffusion.families.z_image:ZImage",
        pipelines=("ZImagePipeline",),
    ),
)


def family_for(pipeline: Any, sampling: SamplingConfig, plugins: Sequence[FamilySpec] = ()) -> Family:
    """Return the adapter for this pipeline's class; a plugin's family comes before the core's.

    Raises:
        ModelError: no family handles the class.
        PluginError: the family's factory is not a `Family`.
    """
    return find_family(type(pipeline).__name__, plugins)(pipeline, sampling)


def find_family(kind: str, plugins: Sequence[FamilySpec] = ()) -> type[Family]:
    """Return the family of pipelines of a class, by its name; raises as `family_for`."""
    for spec in (*plugins, *BUILT_IN):
        if kind in spec.pipelines:
            module, _, attribute = spec.factory.partition(":")
            factory = getattr(import_module(module), attribute, None)
            if not (isinstance(factory, type) and issubclass(factory, Family)):
                raise PluginError(f'The factory of family "{spec.name}", {spec.factory}, is not a Family subclass.')
            return factory
    known = sorted({name for spec in (*plugins, *BUILT_IN) for name in spec.pipelines})
    raise ModelError(f"alignprop cannot run a {kind}; it runs {', '.join(known)}. A plugin can add a family.")
