"""Offers of plugins, and lookup by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from alignprop_core.registry.discovery import BLOCK_VARIABLE, normalized
from alignprop_core.specs import RewardSpec, Spec

S = TypeVar("S")


@dataclass(frozen=True)
class Offer(Generic[S]):
    """A spec that a plugin offers, with the plugin's distribution."""

    spec: S
    distribution: str
    version: str

    @property
    def name(self) -> str:
        """The name in the spec."""
        return str(getattr(self.spec, "name", ""))

    @property
    def full_name(self) -> str:
        """`distribution/name`, which is unambiguous if another distribution offers the same name."""
        return f"{self.distribution}/{self.name}"


def matching(name: str, offers: tuple[Offer[S], ...]) -> list[Offer[S]]:
    """Return the offers a name means, written alone or as `distribution/name`."""
    # A prompt set's own name contains a slash ("starter/simple_animals"), so both readings are tried.
    head, _, rest = name.partition("/")
    distribution = normalized(head)
    return [o for o in offers if name == o.name or (rest == o.name and distribution == normalized(o.distribution))]


def conflict(what: str, name: str, found: list[Offer[S]]) -> str:
    """Return the message that several offers have a name, and how to choose one."""
    names = " and ".join(f"{offer.distribution} {offer.version}" for offer in found)
    if len({offer.distribution for offer in found}) == 1:
        return (
            f'{found[0].distribution} offers the {what} "{name}" {len(found)} times, which is a bug of the plugin. '
            f"Report it, or keep the plugin out with {BLOCK_VARIABLE}={found[0].distribution}."
        )
    choices = " or ".join(f'"{offer.full_name}"' for offer in found)
    return (
        f'The {what} "{name}" is offered by {names}. Write {choices} to choose, or keep one out with {BLOCK_VARIABLE}.'
    )


def trainable(spec: RewardSpec) -> bool:
    """Whether a reward may be in a training mix."""
    return spec.differentiable and spec.scope == "sample"


def belongs(offer: Offer[Any]) -> str:
    """Return the name of an offer in messages: `Reward "x" of my-plugin 1.0`."""
    what = type(offer.spec).__name__.removesuffix("Spec").lower() if isinstance(offer.spec, Spec) else "offer"
    return f'{what.capitalize()} "{offer.name}" of {offer.distribution} {offer.version}'.rstrip()
