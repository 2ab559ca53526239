"""The hooks a plugin may implement. Importing this module imports no torch.

A plugin is a distribution with an entry point in the group `alignprop` that names a module:

    [project.entry-points.alignprop]
    my_rewards = "my_rewards"

and, in that module (which must stay light: no torch), functions marked with `hookimpl`:

    from alignprop_core.hookspecs import hookimpl
    from alignprop_core.specs import RewardSpec

    @hookimpl
    def alignprop_register_rewards():
        return [RewardSpec(name="redness", ...)]
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from alignprop_core.specs import FamilySpec, ModelSpec, PromptSpec, RewardSpec, WeightsSpec

PROJECT = "alignprop"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def alignprop_register_rewards() -> Iterable[RewardSpec]:  # type: ignore[empty-body]
    """Return the rewards this plugin offers."""


@hookspec
def alignprop_register_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Return base models by name."""


@hookspec
def alignprop_register_families() -> Iterable[FamilySpec]:  # type: ignore[empty-body]
    """Return families of diffusers pipelines the sampler can run."""


@hookspec
def alignprop_register_prompts() -> Iterable[PromptSpec]:  # type: ignore[empty-body]
    """Return named prompt sets."""


@hookspec
def alignprop_register_weights() -> Iterable[WeightsSpec]:  # type: ignore[empty-body]
    """Return named sets of weights for rewards."""
