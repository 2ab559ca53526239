"""The run config's sections on rewards and their mix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import default_label
from alignprop_core.validation import InvalidConfig, Problems


def loader_in(data: Mapping[str, Any], registry: Registry) -> tuple[str, BaseModel] | None:
    """Return key and config of the loader of a reward entry that is not validated yet; unknown keys are ignored.

    Raises:
        InvalidConfig: the value under a loader's key is wrong.
        PluginError: a key's loader is not available.
    """
    known = registry.loader_keys()
    for key, value in data.items():
        if key in known and key not in RewardTerm.model_fields and value is not None:
            return key, registry.loader_config(key, value)
    return None


def _loader_config(key: str, value: object, registry: Registry) -> BaseModel:
    """Return the config of the loader that an entry's key, which is not a field, belongs to."""
    if key not in registry.loader_keys():
        further = sorted({offer.name for offer in registry.loaders()})
        raise PydanticCustomError("unknown_key", "unknown key", {"further": further})
    try:
        return registry.loader_config(key, value)
    except InvalidConfig as error:
        raise Problems([(problem.key, problem.message) for problem in error.problems]) from None
    except PluginError as error:
        raise Problems([("", str(error))]) from None


def _checked(value: object) -> object:
    return value() if isinstance(value, partial) else value


class RewardTerm(Section):
    """One reward of a mix. Higher scores are better."""

    # Besides its fields, an entry may have one key of a loader that a plugin offers, such as `isolation`. The registry
    # with these keys is `context["registry"]` of the validation, or else that of the installed plugins.
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_checked)]] = Field(init=False)

    name: Text
    """A reward of an installed plugin (distribution/reward if two offer the name), or a class or function in a Python
    file, which the run executes: ./my_rewards.py:MyReward, relative to this config."""
    weight: float | Annotated[dict[int, float], Field(min_length=1)] = 1.0
    """Weight in the mix; negative minimizes the score, zero is refused. Or a schedule {steps done: weight}, linear
    between its points and constant outside them: {0: 0.0, 20: 1.0}."""
    ceiling: float | None = None
    """Scores are clipped to at most this, in the reward's unit: samples above it have no gradient."""
    floor: float | None = None
    """With a negative weight: scores are clipped to at least this; samples below it have no gradient."""
    target: float | None = None
    """Replaces the score by minus its distance to this value; cannot be combined with ceiling or floor."""
    label: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]*$")] = ""
    """Name in logs and reports; unique. The default is the reward's name."""
    options: dict[str, Any] = Field(default={})
    """Options of the reward; `alignprop rewards show NAME` lists them."""

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
        keys = registry.loader_keys()
        fields = {key: value for key, value in data.items() if key in cls.model_fields}
        extra = {
            key: partial(_loader_config, str(key), value, registry)
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
                raise Problems(
                    [("weight", "is not a schedule. Write {steps done: weight}, such as {0: 0.0, 20: 1.0}.")]
                )
            data = {**data, "weight": dict(zip(steps, weight.values(), strict=True))}
        return data

    @model_validator(mode="after")
    def _term_says_something(self) -> Self:
        schedule = self.weight if isinstance(self.weight, dict) else {0: self.weight}
        weighs = any(schedule.values())
        problems: list[tuple[str, str]] = []

        def refuse(key: str, message: str) -> None:
            problems.append((key, message))

        first, *further = self.model_extra or {"": None}
        for key in further:
            refuse(key, f"cannot be combined with {first}: a reward has one loader; keep one of the two.")
        for step in schedule:
            if step < 0:
                refuse("weight", f"has a schedule point at {step}. Keys are steps done, from 0.")
        if not weighs:
            refuse("weight", "a weight of 0 trains nothing. List the reward under evaluation.rewards to report it.")
        elif self.floor is not None and min(schedule.values()) >= 0:
            refuse(
                "floor",
                "needs a negative weight: with a positive one it would remove the gradient of the lowest scores. "
                f"To raise scores to {self.floor:g} and no further, set ceiling: {self.floor:g}; to approach it "
                f"from both sides, set target: {self.floor:g}.",
            )
        if self.ceiling is not None and weighs and max(schedule.values()) <= 0:
            refuse(
                "ceiling",
                "needs a positive weight: with a negative one it would remove the gradient of the highest scores. "
                f"To lower scores to {self.ceiling:g} and no further, set floor: {self.ceiling:g}; to approach it "
                f"from both sides, set target: {self.ceiling:g} with a positive weight.",
            )
        if self.floor is not None and self.ceiling is not None and self.floor >= self.ceiling:
            refuse("floor", f"is {self.floor:g}; it must be below the ceiling, {self.ceiling:g}.")
        if self.target is not None:
            for key in ("ceiling", "floor"):
                if getattr(self, key) is not None:
                    refuse(key, "cannot be combined with target, which bounds the score on both sides. Keep one.")
            if min(schedule.values()) < 0:
                refuse("weight", "is negative, which would drive scores away from the target without limit.")
        if problems:
            raise Problems(problems)
        return self


class MixConfig(Section):
    """How several rewards are combined into one gradient."""

    combine: Literal["sum", "normalized", "balanced", "pcgrad"] = "sum"
    """sum: the weighted sum of the scores. normalized: each score over its running standard deviation. balanced: each
    term's gradient over its running norm, so that a weight means the same for every reward.
    pcgrad: balanced, and the part of a term's gradient that conflicts with another's is projected out."""
    balance_at: Literal["image", "latent"] = "image"
    """Where balanced and pcgrad compare and add gradients: at the images, or at the final latents, which costs one
    decoder backward pass per term."""
    per_sample: bool = False
    """balanced and pcgrad normalize every image's gradient, not only the batch's. This changes the direction even of a
    single term, and keeps gradients from fading near a goal."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running statistics per step; 0 uses the last step alone."""
    scale_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Running statistics are kept above this fraction of their highest value so far, which limits how much a term with
    a fading gradient or standard deviation is scaled up."""
    reward_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images a reward scores at a time; null is all decoded images. Changes memory and time only."""
    offload: bool = False
    """Keep the rewards' weights in host memory between uses; no effect on a CPU."""

    @model_validator(mode="after")
    def _only_what_the_mode_uses(self) -> Self:
        problems = [
            (key, f"combine: {self.combine} does not use it. Remove it, or choose combine: balanced or pcgrad.")
            for key, used in (("balance_at", self.balance_at != "image"), ("per_sample", self.per_sample))
            if used and self.combine in ("sum", "normalized")
        ]
        if problems:
            raise Problems(problems)
        return self
