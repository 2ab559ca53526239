"""Isolated rewards: a reward runs in its own Python environment, with its own package versions.

    rewards:
      - {name: hpsv2_original, isolation: {python: envs/hpsv2/bin/python}}

`describe` runs in that environment and reports what the reward is and whether its options are valid. A worker process
there scores batches and returns the gradient of each image. Images and gradients are exchanged in a memory-mapped file,
everything else as JSON; nothing is pickled. Of the core's requirements, the environment needs torch, pydantic, pluggy,
packaging and safetensors.
"""

from __future__ import annotations

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CommandSpec, LoaderSpec


@hookimpl
def alignprop_register_loaders() -> list[LoaderSpec]:
    """Add the key `isolation` to reward entries."""
    return [
        LoaderSpec(
            name="isolation",
            summary="Run the reward in its own Python environment; null runs it in this one.",
            config="alignprop_isolation.config:IsolationConfig",
            factory="alignprop_isolation.lookup:IsolatedRewards",
            license="Apache-2.0",
        )
    ]


@hookimpl
def alignprop_register_commands() -> list[CommandSpec]:
    """Add the command `alignprop rewards isolate`."""
    return [
        CommandSpec(
            path="rewards isolate",
            summary="Create a Python environment for a reward, and print its entry for a run config.",
            factory="alignprop_isolation.command:isolate",
            license="Apache-2.0",
        )
    ]
