"""Specs: what a plugin declares about what it provides. Imports no torch.

Hooks return specs, and listing commands read them. The code behind a spec (`factory`, `config`) is imported only when
a run uses it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

API_VERSION = 1
"""Version of the plugin contract: specs, hooks, `Reward` and `ImageBatch`."""

OLDEST_API_VERSION = 1
"""The oldest version that this core accepts."""

DEPRECATED_API_VERSIONS: dict[int, str] = {}
"""Deprecated versions -> what to change, and the last core that accepts them."""

SnakeName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
ScopedName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*(/[a-z0-9][a-z0-9_]*)?$")]
CommandPath = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*( [a-z][a-z0-9-]*)?$")]
ObjectPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
"""Names of devices, in a config and in options."""


def default_label(name: str) -> str:
    """Return a reward's name in logs: its own, or a Python class's in snake_case."""
    if ".py:" in name:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(":")[2]).lower()
    return name.rpartition("/")[2]


class RewardConfig(BaseModel):
    """Base of every reward's options: unknown keys are refused, values are frozen. Describe every field."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Spec(BaseModel):
    """Common part of all specs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: str = Field(description="One line for listings.")
    # Not API_VERSION: a spec without a version was written for the first one, whichever core reads it.
    api_version: int = Field(default=1, description="Version of the plugin API that the spec was written for.")
    license: str = Field(default="", description="SPDX identifier of the code or data behind this spec.")
    source: str = Field(default="", description="Where it comes from: repository or page.")


class WeightsFile(BaseModel):
    """One file of weights: its source, size and checksum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repository: str = Field(default="", description="Hub repository id; empty if the file ships in a package.")
    file: str = Field(description="File name inside the repository or package.")
    revision: str = Field(default="", description="Branch, tag or commit of the repository; empty means main.")
    sha256: str | None = Field(default=None, description="Checksum, lower-case hex.")
    bytes: int | None = Field(default=None, ge=0, description="Size in bytes.")
    license: str = Field(default="", description="License of the weights.")


class RewardSpec(Spec):
    """A reward of a plugin. Higher scores are always better."""

    name: SnakeName = Field(description="The field's standard term, snake_case.")
    factory: ObjectPath = Field(description='Class path, "package.module:Class"; a subclass of Reward.')
    config: ObjectPath = Field(description='Options class, "package.config:Class"; its module imports no torch.')
    differentiable: bool = Field(default=True, description="Whether score() gives a gradient at the pixels.")
    needs_prompts: bool = Field(default=False, description="Whether score() reads batch.prompts.")
    input: Literal["image"] = Field(default="image", description="What it scores; other values are reserved.")
    scope: Literal["sample", "batch"] = Field(
        default="sample", description='"batch" is reserved for rewards that compare samples (evaluation only).'
    )
    unit: str = Field(default="", description="Unit of the score.")
    typical_range: tuple[float, float] | None = Field(default=None, description="Usual range of the score.")
    evaluate_with: tuple[str, ...] = Field(
        default=(), description="True measures reported beside it in evaluations, by reward name."
    )
    citation: str = Field(default="", description="Paper or repository to cite.")
    weights: tuple[WeightsFile, ...] = Field(default=(), description="Weights it may load.")

    @model_validator(mode="before")
    @classmethod
    def _one_or_many_measures(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("evaluate_with"), str):
            data = {**data, "evaluate_with": (data["evaluate_with"],)}
        return data


class ModelSpec(Spec):
    """A base model by name: a diffusers folder that ships in a package, or a hub repository."""

    name: SnakeName = Field(description="Name for `model.base`, snake_case.")
    path: str = Field(
        description='"package.module:function" returning the folder as a Path, or a hub repository id "owner/name".'
    )
    resolution: int | None = Field(default=None, description="Native width and height in pixels.")
    demo: str = Field(
        default="", description='"package:relative/file.yaml": a run config that demonstrates the model in minutes.'
    )
    weights: tuple[WeightsFile, ...] = Field(default=(), description="Its files: their sources and licenses.")


class FamilySpec(Spec):
    """A family of pipelines the sampler can differentiate through."""

    name: SnakeName = Field(description="The family's name, such as `stable_diffusion`.")
    factory: ObjectPath = Field(description='"package.module:Class", a subclass of alignprop_core.diffusion.Family.')
    pipelines: tuple[str, ...] = Field(description="diffusers pipeline class names it handles.")


class PromptSpec(Spec):
    """A set of prompts by name, such as `starter/simple_animals`."""

    name: ScopedName = Field(description="Name for `prompts.train`: snake_case, optionally with one slash.")
    path: str = Field(description='"package:relative/file.jsonl" (or .txt): a file that ships in a package.')
    size: int | None = Field(default=None, description="Number of prompts.")


class WeightsSpec(Spec):
    """A named set of weights for rewards (such as `starter`), chosen with `weights: NAME`."""

    name: SnakeName = Field(description="Name for the option `weights`, snake_case.")
    reward: SnakeName = Field(description="The reward these weights are for.")
    path: str = Field(description='"package:relative/file.safetensors": a file that ships in a package.')
    weights: tuple[WeightsFile, ...] = Field(
        default=(), description="The same file with its license, and the checksum and size to verify."
    )


class CallbackSpec(Spec):
    """A callback that watches runs, such as a tracker or a report."""

    name: SnakeName = Field(description="Name for `training.trackers`, snake_case.")
    factory: ObjectPath = Field(
        description='"package.module:Class", a subclass of alignprop_core.Callback; built without arguments.'
    )
    automatic: bool = Field(
        default=False, description="Whether it joins every run, or only those whose `training.trackers` names it."
    )


class CommandSpec(Spec):
    """A command of `alignprop`; `summary` is its line in the help."""

    path: CommandPath = Field(description='Words after `alignprop`: "report", or "rewards isolate" in a group.')
    factory: ObjectPath = Field(
        description='"package.module:function", a function with typer\'s arguments and options, or a `typer.Typer` app '
        "with one command; imported when the command runs or shows its own help."
    )
    group_summary: str = Field(default="", description="Line of a new group in the help.")

    @property
    def name(self) -> str:
        """The path, which identifies a command."""
        return self.path


class LoaderSpec(Spec):
    """A key of reward entries that changes where a reward comes from, such as `isolation`; `summary` describes it."""

    name: SnakeName = Field(description="The key in a reward entry, snake_case.")
    config: ObjectPath = Field(
        description='"package.config:Class", a pydantic model of the value under the key; its module imports no torch. '
        'A field with `json_schema_extra={"format": "path"}` is a path, relative to the run config.'
    )
    factory: ObjectPath = Field(
        description='"package.module:Class", called with the checked config and the registry; it returns a '
        "`RewardLoader`. Its module imports no torch."
    )
