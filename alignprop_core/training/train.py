"""Training from Python: what `alignprop train` does, with functions, objects and loaded pipelines."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from alignprop_core.config.base import as_section
from alignprop_core.config.given import name_rewards, new_output
from alignprop_core.config.input import merge_sections
from alignprop_core.config.load import Given, load_config, located, read_run
from alignprop_core.config.model import PromptsConfig
from alignprop_core.config.sections import RunConfig
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.training.callback import Callback
from alignprop_core.training.given_pipeline import base_of
from alignprop_core.training.result import Run
from alignprop_core.training.resume import run_of
from alignprop_core.training.trainer import Trainer

Section = Mapping[str, Any] | BaseModel | None
"""A section of the run config: a mapping of its keys, or the section itself."""

MAX_DRAWN = 1000
"""Most prompts that are drawn from a prompt function; a run that needs more uses each several times."""


def train(
    config: Given | None = None,
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    prompts: Any = None,
    rewards: Any = None,
    output: str | os.PathLike[str] | None = None,
    sampling: Section = None,
    backprop: Section = None,
    lora: Section = None,
    optimizer: Section = None,
    regularization: Section = None,
    mix: Section = None,
    training: Section = None,
    save: Section = None,
    previews: Section = None,
    evaluation: Section = None,
    early_stopping: Section = None,
    callbacks: Sequence[Callback] = (),
    registry: Registry | None = None,
    resume: str | os.PathLike[str] | None = None,
    edited: bool = False,
    overwrite: bool = False,
) -> Run:
    """Fine-tune a model on rewards, as `alignprop train` does.

    Every section of the run config is a keyword, and replaces that of `config` key by key.

    Args:
        config: a YAML file, a dict or a `RunConfig`; None if the keywords say everything. With `resume`, None is the
            config of that run.
        overrides: `key.path=value` changes, as on the command line.
        model: a registered model, a hub id, a folder, a .safetensors file, or a loaded diffusers pipeline, which
            carries the trained adapter afterwards and can be trained again; or the section `model` with `base`. The run
            records the name a pipeline was loaded from, so weights changed since then are not found again by
            `Run("runs/red")`: save such a pipeline and load it, or pass `Run(..., model=pipeline)`.
        prompts: a list of texts (or of mappings with `prompt` and metadata), a registered set, a file, a function that
            returns a prompt or (prompt, metadata), as TRL's; or the section `prompts` with `train` and `heldout`.
            A function is called once per training image, at most 1000 times, before training, with the global random
            state seeded by `training.seed`.
        rewards: one or a list of: a function `(images)`, `(images, prompts)` or `(images, prompts, metadata)` that
            returns (B,) scores, or scores and a dict; a `Reward` class or object; a reward's name; or an entry as in
            the run config, whose `name` may also be the reward itself. Or a mapping from names to rewards, which adds
            them to the config's with weight 1.
        output: the run folder; a new numbered one in runs/, which is printed, if None.
        sampling: how images are sampled: steps, guidance, size.
        backprop: which denoising steps keep their gradient.
        lora: the trained adapter.
        optimizer: AdamW and its schedule.
        regularization: pull toward the base model.
        mix: how several rewards are combined.
        training: steps, batch size, seed, device.
        save: files saved during training.
        previews: preview images.
        evaluation: base against tuned on held-out prompts.
        early_stopping: when the run stops early.
        callbacks: called after the standard callbacks.
        registry: installed plugins; discovered if None.
        resume: a run, its folder or a checkpoint to resume from; "latest" is the output folder.
        edited: resume even if files or the code of a reward have changed, for example after a bug fix.
        overwrite: replace an earlier run in the output folder.

    Raises:
        UserError: something given is wrong, with the messages of the command line.
    """
    named = {"model": model, "prompts": prompts, "rewards": rewards, "sampling": sampling, "backprop": backprop}
    named |= {"lora": lora, "optimizer": optimizer, "regularization": regularization, "mix": mix, "training": training}
    named |= {"save": save, "previews": previews, "evaluation": evaluation, "early_stopping": early_stopping}
    named |= {"output": None if output is None else str(output)}
    data = _sections(named)
    if resume == "latest" and output is not None:
        resume = output
    checkpoint = None if resume is None or resume == "latest" else Path(resume)
    if config is None and checkpoint is not None:
        run = run_of(checkpoint)
        config, data = run / "config.yaml", {"output": str(run)} | data
    if config is None or isinstance(config, Mapping):
        config, data = {}, merge_sections(_sections(config or {}), data)[0]
    registry = name_rewards(data, registry or default_registry())
    pipeline = _take_pipeline(data, registry)
    prompt_function = _take_prompt_function(data, checkpoint)
    chosen: list[str] = []

    def choose_output(config: Mapping[str, Any]) -> str:
        chosen.append(new_output(config))
        return chosen[0]

    settings = load_config(config, overrides, registry=registry, sections=data, default_output=choose_output)
    if prompt_function is not None:
        settings = _with_drawn_prompts(settings, prompt_function)
    with located(config, overrides, sections=data):
        trainer = Trainer(
            settings,
            registry=registry,
            callbacks=callbacks,
            resume=Path(settings.output) if resume == "latest" else checkpoint,
            edited=edited,
            overwrite=overwrite,
            pipeline=pipeline,
        )
        if chosen and trainer.processes.is_main_process:
            print(f"Run folder: {chosen[0]}")
        return trainer.train()


def _sections(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections as mappings, in the shape of a run config."""
    sections: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", exclude_unset=True)
        if name in ("model", "prompts") and value is not None and not isinstance(value, Mapping):
            value = {"base" if name == "model" else "train": value}
        if value is not None:
            sections[name] = dict(value) if isinstance(value, Mapping) else value
    for key, prompts in sections.get("prompts", {}).items():
        if prompts is not None and not isinstance(prompts, str) and hasattr(prompts, "__iter__"):
            sections["prompts"][key] = [_prompt(entry) for entry in prompts]
    return sections


def _take_pipeline(data: Mapping[str, Any], registry: Registry) -> Any:
    """Replace a loaded pipeline by its name, in place, and return it."""
    model = data.get("model")
    base = model.get("base") if isinstance(model, Mapping) else None
    if isinstance(base, Path):
        data["model"]["base"] = str(base)
    elif hasattr(base, "components"):
        data["model"]["base"] = base_of(base, registry)
        return base
    return None


def _take_prompt_function(data: Mapping[str, Any], checkpoint: Path | None) -> Callable[[], Any] | None:
    """Replace a prompt function, in place, and return it; when resuming, by the prompts that the run has drawn."""
    prompts = data.get("prompts")
    function: Callable[[], Any] | None = prompts.get("train") if isinstance(prompts, Mapping) else None
    if not callable(function):
        return None
    data["prompts"]["train"] = ["drawn from a function"]
    if checkpoint is None:
        return function
    data["prompts"]["train"] = read_run(run_of(checkpoint))["prompts"]["train"]
    return None


def _with_drawn_prompts(config: RunConfig, function: Callable[[], Any]) -> RunConfig:
    training = config.training
    images = training.steps * training.batch_size * training.gradient_accumulation_steps
    with _seeded(training.seed):
        drawn = [_prompt(function()) for _ in range(max(1, min(images, MAX_DRAWN)))]
    prompts = as_section(PromptsConfig, {"train": drawn, "heldout": config.prompts.heldout}, "prompts")
    return config.model_copy(update={"prompts": prompts})


def _prompt(entry: Any) -> Any:
    """Return a prompt, or a mapping with it and its metadata, of a prompt or (prompt, metadata)."""
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping):
        return {"prompt": entry[0], **entry[1]}
    return entry


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random state inside the block, and restore it."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
