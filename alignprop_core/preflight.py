"""What of a run can be checked before torch is imported: a mistyped path is said at once. No torch, no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignprop_core.config import RewardTerm, RunConfig
from alignprop_core.errors import under
from alignprop_core.model_files import find_base, find_lora, find_vae
from alignprop_core.prompts import PromptSet, load_prompts
from alignprop_core.registry import Registry
from alignprop_core.resume import find_checkpoint
from alignprop_core.runs import RunFolder
from alignprop_core.weights.find import check_named_file


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    Attributes:
        prompts: to train on.
        heldout: for evaluation, if the config names some.
        checkpoint: the folder of the checkpoint to go on from, if any.
    """

    prompts: PromptSet
    heldout: PromptSet | None
    checkpoint: Path | None


def check_inputs(
    config: RunConfig,
    registry: Registry,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    loads_model: bool = True,
) -> Inputs:
    """Check that a run's output is free and its files are there, and read its prompts; changes nothing.

    Args:
        config: the run config.
        registry: where names are looked up.
        resume: a run folder or checkpoint to go on from.
        overwrite: whether an earlier run in the output folder may be replaced.
        loads_model: whether the model is loaded from the config, and not passed from Python.

    Raises:
        UserError: with the run config's key.
    """
    checkpoint = None if resume is None else find_checkpoint(resume, config)
    if checkpoint is None:
        RunFolder.check_free(config.output, overwrite=overwrite)
    with under("prompts.train"):
        prompts = load_prompts(config.prompts.train, registry)
    heldout = None
    if config.prompts.heldout is not None:
        with under("prompts.heldout"):
            heldout = load_prompts(config.prompts.heldout, registry)
    if loads_model:
        check_model(config, registry)
    if config.lora.init_from is not None:
        with under("lora.init_from"):
            find_lora(config.lora.init_from)
    check_rewards(config, registry)
    return Inputs(prompts, heldout, checkpoint)


def check_model(config: RunConfig, registry: Registry) -> None:
    """Raise `UserError`, with the run config's key, if the base model or what is added to it is a path to nothing."""
    with under("model.base"):
        find_base(config.model.base, registry)
    if config.model.vae is not None:
        with under("model.vae"):
            find_vae(config.model.vae)
    for i, extra in enumerate(config.model.loras):
        with under(f"model.loras.{i}.path"):
            find_lora(extra.path)


def check_rewards(config: RunConfig, registry: Registry) -> None:
    """Raise `WeightsError`, with the run config's key, if weights a reward's options name are missing."""
    for where, entries in (("rewards", config.rewards), ("evaluation.rewards", config.evaluation.rewards)):
        for i, entry in enumerate(entries):
            with under(f"{where}.{i}.options.weights"):
                check_weights(entry, registry)


def check_weights(entry: RewardTerm, registry: Registry) -> None:
    """Raise `WeightsError` if a reward's option `weights` names a file that is missing.

    A class from Python or a file may mean anything by its option of that name, and is left alone.
    """
    weights = entry.options.get("weights")
    if isinstance(weights, str) and (entry.isolation is not None or registry.local(entry.name) is None):
        check_named_file(weights, reward=entry.name)
