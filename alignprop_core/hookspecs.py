"""The hooks that a plugin may implement. Imports no torch.

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

from alignprop_core.specs import (
    CallbackSpec,
    CommandSpec,
    FamilySpec,
    LoaderSpec,
    ModelSpec,
    PromptSpec,
    RewardSpec,
    WeightsSpec,
)

PROJECT = "alignprop"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def alignprop_register_rewards() -> Iterable[RewardSpec]:  # type: ignore[empty-body]
    """Return the rewards this plugin offers.

    Called at every listing and run, so it must be fast: no torch, no files. `factory` and `config` of a spec are
    imported only when a run names the reward.

    Returns:
        Any iterable of specs. Anything else is reported as this plugin's error; other plugins are unaffected.
    """


@hookspec
def alignprop_register_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Return base models by name, for `model.base` in a run config.

    Returns:
        Any iterable of specs. A `path` in them is imported, or looked up, only when a run names the model.
    """


@hookspec
def alignprop_register_families() -> Iterable[FamilySpec]:  # type: ignore[empty-body]
    """Return families of diffusers pipelines the sampler can run.

    A family adapter defines how a kind of pipeline encodes prompts, predicts and decodes; see
    `alignprop_core.diffusion.Family`.

    Returns:
        Any iterable of specs. A base model's pipeline class is looked up in their `pipelines`.
    """


@hookspec
def alignprop_register_prompts() -> Iterable[PromptSpec]:  # type: ignore[empty-body]
    """Return named prompt sets, for `prompts.train` and `prompts.heldout` in a run config.

    Returns:
        Any iterable of specs. Their files are read only when a run names the set.
    """


@hookspec
def alignprop_register_weights() -> Iterable[WeightsSpec]:  # type: ignore[empty-body]
    """Return named sets of weights for rewards, chosen with `weights: NAME` in a reward's options.

    The reward may belong to another plugin, so a package of small weights needs no dependency on the rewards.

    Returns:
        Any iterable of specs, one for each reward of a set; several may have the same `name` and file.
    """


@hookspec
def alignprop_register_callbacks() -> Iterable[CallbackSpec]:  # type: ignore[empty-body]
    """Return callbacks that watch runs, such as trackers and reports.

    An automatic callback joins every run; if it raises, a warning is shown and the run continues without it. Any other
    callback joins the runs whose `training.trackers` names it; if that one raises, the run fails.

    Returns:
        Any iterable of specs. A `factory` in them is imported only when a run uses the callback.
    """


@hookspec
def alignprop_register_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Return commands of `alignprop`, at the top or in a group such as `rewards`.

    A path of the core, or one that another plugin offers too, is an error that names both distributions; it affects no
    other command.

    Returns:
        Any iterable of specs. A `factory` in them is imported only when the command runs or shows its own help.
    """


@hookspec
def alignprop_register_loaders() -> Iterable[LoaderSpec]:  # type: ignore[empty-body]
    """Return loaders: keys of reward entries that change where a reward comes from.

    An entry such as `{name: redness, isolation: {...}}` takes its reward, its options class and its measures from the
    loader `isolation` instead of the registry. An entry has at most one loader.

    Returns:
        Any iterable of specs. `config` and `factory` of a spec are imported only when an entry has the key.
    """
