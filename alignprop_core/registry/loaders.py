"""Loaders: keys of reward entries that change where a reward comes from, such as `isolation`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from alignprop_core.registry.offers import Offer
from alignprop_core.specs import RewardConfig, RewardSpec

if TYPE_CHECKING:
    from alignprop_core.reward import Reward

DISTRIBUTION_OF = {"isolation": "alignprop-isolation"}
"""Well-known loader keys and their distributions, so that the error for a missing one says what to install."""


class RewardSource(Protocol):
    """What looks up rewards by name: the registry itself, or the loader of a reward entry."""

    def reward(self, name: str) -> Offer[RewardSpec]:
        """Find a reward; `PluginError` if it is not available."""

    def option_names(self, name: str) -> frozenset[str]:
        """Return the names of a reward's options."""

    def reward_options(
        self, name: str, options: Mapping[str, Any] | None = None, *, where: str = "options"
    ) -> RewardConfig | dict[str, Any]:
        """Check options and return them with their defaults; `ConfigError` with one line for every wrong key."""

    def load_reward(self, name: str, options: Mapping[str, Any] | RewardConfig | None = None) -> Reward:
        """Build a reward with its options."""


@runtime_checkable
class RewardLoader(RewardSource, Protocol):
    """A loader, as the `factory` of a `LoaderSpec` returns it: looks up rewards for the entries that have its key.

    It is built often, so building it is cheap. Only `load_reward` may import torch.
    """

    def origin(self, name: str) -> dict[str, Any]:
        """Return where a reward comes from, as JSON data for a run's environment.json.

        The key `from`, if it has one, is a mapping with the `sha256` of the reward's Python file.
        """
