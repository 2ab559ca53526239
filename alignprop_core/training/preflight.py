"""Checks of a run's inputs before torch is imported: a mistyped path is reported at once. No torch, no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError, UserError, WeightsError, under
from alignprop_core.evaluation.measures import check_monitor
from alignprop_core.locate import find_base, find_lora, find_part
from alignprop_core.prompts import PromptSet, load_prompts, warn_about
from alignprop_core.registry.registry import Registry
from alignprop_core.runs.fingerprints import files_of
from alignprop_core.runs.folder import RunFolder
from alignprop_core.training.plugin_callbacks import check_callbacks
from alignprop_core.training.resume import check_files, find_checkpoint
from alignprop_core.weights.find import cached, check_named_file, find_weights


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    Attributes:
        prompts: the training prompts.
        heldout: the prompts for evaluation, if the config names some.
        checkpoint: folder of the checkpoint to resume from, if any.
    """

    prompts: PromptSet
    heldout: PromptSet | None
    checkpoint: Path | None


def check_inputs(
    config: RunConfig,
    registry: Registry,
    *,
    resume: Path | None = None,
    edited: bool = False,
    overwrite: bool = False,
    loads_model: bool = True,
) -> Inputs:
    """Check that a run's output folder is free, its files exist and its names are known, and read its prompts.

    Changes nothing.

    Args:
        config: the run config.
        registry: where names are looked up.
        resume: a run folder or checkpoint to resume from.
        edited: whether files and the code of rewards may have changed since the run began.
        overwrite: whether an earlier run in the output folder may be replaced.
        loads_model: whether the model is loaded from the config instead of passed from Python.

    Raises:
        UserError: with the run config's key.
    """
    if resume is not None and overwrite:
        raise UserError("overwrite replaces a run, and resume continues it; choose one of them.")
    checkpoint = None if resume is None else find_checkpoint(resume, config)
    if checkpoint is None:
        RunFolder.check_free(config.output, overwrite=overwrite)
    with under("prompts.train"):
        prompts = load_prompts(config.prompts.train, registry)
    heldout = None
    if config.prompts.heldout is not None:
        with under("prompts.heldout"):
            heldout = load_prompts(config.prompts.heldout, registry)
    warn_about(prompts, heldout)
    if loads_model:
        check_model(config, registry)
    if config.lora.init_from is not None:
        with under("lora.init_from"):
            find_lora(config.lora.init_from)
    check_rewards(config, registry)
    check_monitor(config, registry)
    check_callbacks(config, registry)
    if checkpoint is not None and not edited:
        check_files(checkpoint, files_of(config, registry, prompts, heldout, model=loads_model))
    return Inputs(prompts, heldout, checkpoint)


def check_model(config: RunConfig, registry: Registry) -> None:
    """Raise `UserError`, with the run config's key, if the base model, VAE or a LoRA does not exist."""
    with under("model.base"):
        find_base(config.model.base, registry)
    for part, path in config.model.parts.items():
        with under(f"model.{part}"):
            find_part(part, path)
    for i, extra in enumerate(config.model.loras):
        with under(f"model.loras.{i}.path"):
            find_lora(extra.path)


def check_rewards(config: RunConfig, registry: Registry) -> None:
    """Raise `WeightsError`, with the run config's keys, if weights that the rewards' options name are missing."""
    errors = []
    for where, entries in (("rewards", config.rewards), ("evaluation.rewards", config.evaluation.rewards)):
        for i, entry in enumerate(entries):
            try:
                with under(f"{where}.{i}.options.weights"):
                    check_weights(entry, registry)
            except WeightsError as error:
                errors.append(error)
    if len(errors) > 1:
        lines = [f"{len(errors)} rewards have no weights on this machine:", *map(str, errors)]
        raise WeightsError(
            "\n".join([*lines, "`alignprop rewards fetch --config CONFIG` fetches all of a run config."])
        )
    if errors:
        raise errors[0]


def check_weights(entry: RewardTerm, registry: Registry) -> None:
    """Raise `WeightsError` if a reward's option `weights` means a file that is missing.

    Only what is certain before the reward is built. A class from Python or a file may use an option of that name for
    anything, and is not checked.
    """
    weights = entry.options.get("weights")
    if not isinstance(weights, str) or (entry.loader is None and registry.local(entry.name) is not None):
        return
    if weights != "default":
        check_named_file(weights, reward=entry.name)
        return
    files = registry.source(entry.loader).reward(entry.name).spec.weights
    # Only the reward knows which of the spec's files its options choose. But if no option chooses, and no file is here,
    # there is none to load.
    if files and all(file.repository and cached(file) is None for file in files) and _chooses_nothing(entry, registry):
        find_weights("default", reward=entry.name, default=files[0])


def _chooses_nothing(entry: RewardTerm, registry: Registry) -> bool:
    """Whether all options but numbers, true and false are at their defaults: text may name a model or a version."""
    plain = {key: value for key, value in entry.options.items() if value is None or isinstance(value, int | float)}
    try:
        usual = registry.source(entry.loader).reward_options(entry.name, plain)
    except ConfigError:
        return False  # a required option is missing
    return entry.options == (usual if isinstance(usual, dict) else usual.model_dump(mode="json"))
