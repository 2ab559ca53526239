"""Settings of an isolated reward: the mapping under `isolation` in a reward entry. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1)]


class IsolationConfig(BaseModel):
    """A reward in its own Python environment, computed by a worker process there."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    python: Text = Field(
        description="Python interpreter of the environment, such as envs/hpsv2/bin/python, relative to this config; "
        "`alignprop rewards isolate NAME` creates an environment.",
        json_schema_extra={"format": "path"},
    )
    device: Text = Field(
        default="auto",
        description="Device of the reward; auto is the run's device, or the CPU if the environment does not support "
        "it; or cpu, cuda:N, mps.",
    )
    timeout: float = Field(default=300.0, gt=0, description="Seconds a batch may take.")
    start_timeout: float = Field(default=900.0, gt=0, description="Seconds for loading the reward.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Limit on the worker's resident memory in GiB; null is no limit."
    )
