"""The run config's rewards and how they are mixed: every key, its type, unit, default and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alignprop_core.config.base import Section, Text
from alignprop_core.errors import PluginError
from alignprop_core.registry.loaders import DISTRIBUTION_OF
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import default_label
from alignprop_core.validation import InvalidConfig, Problems


def loader_in(data: Mapping[str, Any], registry: Registry) -> tuple[str, BaseModel] | None:
    """Return key and config of the loader of a reward entry that is not validated yet; unknown keys are ignored.

    Raises:
        InvalidConfig: the value under a loader's key is wrong.
        PluginError: a key's loader is not available.
    """
    known = {offer.name for offer in registry.loaders()} | DISTRIBUTION_OF.keys()
    for key, value in data.items():
        if key in known and key not in RewardTerm.model_fields and value is not None:
            return key, registry.loader_config(key, value)
    return None


@dataclass(frozen=True)
class _Extra:
    """A key of an entry that is not a field, on its way to being validated."""

    key: str
    value: object
    registry: Registry

    def checked(self) -> BaseModel:
        """Return the loader's config."""
        known = {offer.name for offer in self.registry.loaders()}
        if self.key not in known | DISTRIBUTION_OF.keys():
            raise PydanticCustomError("unknown_key", "unknown key", {"further": sorted(known)})
        try:
            return self.registry.loader_config(self.key, self.value)
        except InvalidConfig as error:
            raise Problems([(problem.key, problem.message) for problem in error.problems]) from None
        except PluginError as error:
            raise Problems([("", str(error))]) from None


def _checked(value: object) -> object:
    return value.checked() if isinstance(value, _Extra) else value


class RewardTerm(Section):
    """One reward of a mix. Higher scores are better."""

    # Besides its fields, an entry may have one key of a loader that a plugin offers, such as `isolation`. The registry
    # with these keys is `context["registry"]` of the validation, or else that of the installed plugins.
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_checked)]] = Field(init=False)

    name: Text = Field(
        description="A reward of an installed plugin (distribution/reward where two offer the name), or a class in a "
        "Python file: ./my_rewards.py:MyReward, relative to this config. Such a file is run."
    )
    weight: float | Annotated[dict[int, float], Field(min_length=1)] = Field(
        default=1.0,
        description="Factor in the mix; negative asks for less of it, zero is refused. Or a schedule, {steps done: "
        "weight}, linear between its points and constant outside them: {0: 0.0, 20: 1.0}.",
    )
    ceiling: float | None = Field(
        default=None, description="A sample that scores above this gains nothing more (in the reward's unit)."
    )
    floor: float | None = Field(
        default=None,
        description="With a negative weight: a sample that scores below this gains nothing more.",
    )
    target: float | None = Field(
        default=None,
        description="What counts is minus the distance of a sample's score to this, from above and below alike; goes "
        "without ceiling and floor.",
    )
    label: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]*$")] = Field(
        default="", description="Name in logs and reports; unique; the default is the reward's name."
    )
    options: dict[str, Any] = Field(default={}, description="The reward's own options: `alignprop rewards show NAME`.")

    @property
    def loader(self) -> tuple[str, BaseModel] | None:
        """Key and config of the loader that the reward comes from; None if it is in this environment."""
        return next(iter((self.model_extra or {}).items()), None)

    @model_validator(mode="before")
    @classmethod
    def _find_loader(cls, data: object, info: ValidationInfo) -> object:
        # Extra values are validated by their keys, which pydantic does not pass on: so each goes with its key.
        if not isinstance(data, dict) or data.keys() <= cls.model_fields.keys():
            return data
        registry = (info.context or {}).get("registry") or default_registry()
        keys = {offer.name for offer in registry.loaders()} | DISTRIBUTION_OF.keys()
        fields = {key: value for key, value in data.items() if key in cls.model_fields}
        extra = {
            key: _Extra(str(key), value, registry)
            for key, value in data.items()
            if key not in fields and (value is not None or key not in keys)
        }
        return {**fields, **extra}

    @model_validator(mode="before")
    @classmethod
    def _label_from_name(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        name, weight = data.get("name"), data.get("weight")
        if isinstance(name, str) and data.get("label") in (None, ""):
            data = {**data, "label": default_label(name)}
        if isinstance(weight, dict):
            # JSON and some YAML writers know text keys only.
            steps = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in weight]
            numbers = [*steps, *weight.values()]
            if not steps or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
                raise Problems([("weight", "is no schedule: write {steps done: weight}, such as {0: 0.0, 20: 1.0}.")])
            data = {**data, "weight": dict(zip(steps, weight.values(), strict=True))}
        return data

    @model_validator(mode="after")
    def _term_says_something(self) -> Self:
        schedule = self.weight if isinstance(self.weight, dict) else {0: self.weight}
        first, *further = self.model_extra or {"": None}
        problems = [
            (key, f"does not go with {first}: a reward has one loader; keep one of the two.") for key in further
        ]
        problems += [
            ("weight", f"is a schedule with a point at {step}; its keys are steps done, from 0.")
            for step in schedule
            if step < 0
        ]
        if not any(schedule.values()):
            problems.append(
                ("weight", "a weight of 0 trains nothing; list the reward under evaluation.rewards to watch it.")
            )
        elif self.floor is not None and min(schedule.values()) >= 0:
            problems.append(
                (
                    "floor",
                    "goes with a negative weight: with a positive one it would leave alone just the samples that score "
                    f"low. To raise scores to {self.floor:g} and no further write ceiling: {self.floor:g}; to bring "
                    f"them there from both sides, target: {self.floor:g}.",
                )
            )
        if self.ceiling is not None and any(schedule.values()) and max(schedule.values()) <= 0:
            problems.append(
                (
                    "ceiling",
                    "goes with a positive weight: with a negative one it would leave alone just the samples that score "
                    f"high. To lower scores to {self.ceiling:g} and no further write floor: {self.ceiling:g}; to bring "
                    f"them there from both sides, target: {self.ceiling:g} with a positive weight.",
                )
            )
        if self.floor is not None and self.ceiling is not None and self.floor >= self.ceiling:
            problems.append(("floor", f"is {self.floor:g}; it lies below the ceiling, {self.ceiling:g}."))
        if self.target is not None:
            problems += [
                (key, "does not go with a target, which holds the score from both sides; keep one.")
                for key in ("ceiling", "floor")
                if getattr(self, key) is not None
            ]
            if min(schedule.values()) < 0:
                problems.append(("weight", "is negative, which with a target drives scores away from it without end."))
        if problems:
            raise Problems(problems)
        return self


class MixConfig(Section):
    """How several rewards become one direction."""

    combine: Literal["sum", "normalized", "balanced", "pcgrad"] = Field(
        default="sum",
        description="sum: the weighted sum of the scores. normalized: each score over its running standard deviation. "
        "balanced: each term's gradient over its running size, so that weights mean shares. pcgrad: balanced, and what "
        "pulls against another term is taken out.",
    )
    balance_at: Literal["image", "latent"] = Field(
        default="image",
        description="Where balanced and pcgrad measure and add gradients: at the images, or at the final latents, "
        "which costs a decoder backward pass a term.",
    )
    per_sample: bool = Field(
        default=False,
        description="balanced and pcgrad bring every image's gradient to one size, not only the batch's. Changes the "
        "direction even of a single term, and undoes the easing off near a goal.",
    )
    decay: float = Field(
        default=0.9, ge=0, lt=1, description="How much of the running figures a step keeps; 0 is the last step alone."
    )
    scale_floor: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1,
        description="A running figure is held above this part of its highest value so far, so that a term whose "
        "gradient or spread fades is enlarged by so much and no more.",
    )
    reward_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Images a reward scores at a time; null is all that are decoded. Changes cost only."
    )
    offload: bool = Field(
        default=False,
        description="Keep the rewards' weights in the CPU's memory between uses; on a CPU this changes nothing.",
    )

    @model_validator(mode="after")
    def _only_what_the_mode_uses(self) -> Self:
        problems = [
            (key, f"combine: {self.combine} does not use it; remove it, or choose combine: balanced or pcgrad.")
            for key, used in (("balance_at", self.balance_at != "image"), ("per_sample", self.per_sample))
            if used and self.combine in ("sum", "normalized")
        ]
        if problems:
            raise Problems(problems)
        return self
