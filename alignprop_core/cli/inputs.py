"""Check the options of commands before torch is imported, so that mistakes are reported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from alignprop_core.cli import common
from alignprop_core.config.input import apply_overrides
from alignprop_core.config.load import load_config
from alignprop_core.config.model import SamplingConfig
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import UserError, under
from alignprop_core.locate import find_base, find_lora
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import default_label
from alignprop_core.training.preflight import check_model, check_weights
from alignprop_core.training.result import Run
from alignprop_core.validation import explain

if TYPE_CHECKING:
    import torch


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def device_of(name: str) -> torch.device:
    """Return the device for --device; imports torch."""
    from alignprop_core.devices import choose_device

    with under("--device"):
        return choose_device(name)


def chosen_model(
    run: Path | None, model: str, lora: Path | None, registry: Registry, *, scores: bool
) -> tuple[RunConfig | None, dict[str, Any]]:
    """Return a run's config, if a run is given, and the model and LoRA as keyword arguments of `Sampler.load`.

    Args:
        run: the run folder.
        model: the model, where no run is given, or instead of the run's.
        lora: a LoRA to use instead of the run's result.
        registry: the installed plugins.
        scores: whether the run's rewards are needed; rewards passed from Python are not available to a command.

    Raises:
        UserError: the run, the model or the LoRA does not exist.
    """
    if run is None:
        with under("--model"):
            find_base(model, registry)
        if lora is not None:
            with under("--lora"):
                find_lora(lora)
        return None, {"model": model, "lora": lora}
    config = Run(run, registry=registry).config
    if scores:
        config = load_config(run / "config.yaml", registry=registry)
    if model:
        with under("--model"):
            find_base(model, registry)
        config = config.model_copy(update={"model": config.model.model_copy(update={"base": model})})
    find_lora(lora := lora or run / "lora")
    check_model(config, registry)
    return config, {
        "model": config.model.base,
        "lora": lora,
        "parts": config.model.parts,
        "frozen": config.model.loras,
        "mixed_precision": config.training.mixed_precision,
    }


def sampling_settings(
    config: RunConfig | None, lora: Path | None, registry: Registry, **options: Any
) -> SamplingConfig:
    """Return a run's sampling settings, or the defaults, with the options that were given.

    Args:
        config: the run's config, if a run is given.
        lora: the LoRA; if no run is given but the LoRA is in a run folder, that run's settings count.
        registry: the installed plugins.
        options: the options, None where one was not given.

    Raises:
        UserError: an option is invalid.
    """
    if config is None and lora is not None:
        file = find_lora(lora).absolute()
        for run in (folder for folder in file.parents[1:3] if (folder / "config.yaml").is_file()):
            config = Run(run, registry=registry).config
            common.note(f"note: sampling settings that are not given are those of {run}.")
            break
    try:
        return SamplingConfig(**(config.sampling.model_dump() if config else {}) | given(**options))
    except ValidationError as error:
        problems = explain(error, SamplingConfig)
        raise UserError("\n".join(f"--{p.key.replace('_', '-')}: {p.message}" for p in problems)) from error


def reward_entries(names: Sequence[str], options: Sequence[str], registry: Registry) -> list[RewardTerm]:
    """Return config entries for `--reward NAME` and its options, `--option NAME.key=value`.

    With one reward, options need no name. Checks everything that is possible without loading the rewards.

    Raises:
        UserError: a reward is unknown or given twice, an option is invalid or of no given reward, or weights are
            missing.
    """
    options_of: dict[str, list[str]] = {}
    for name in names:
        registry.reward(name)
        if default_label(name) in map(default_label, options_of):
            raise UserError(f"--reward {name} is given twice.")
        options_of[name] = []
    for option in options:
        if "=" not in option:
            raise UserError(f"--option {option}: write KEY=VALUE, such as quality=80.")
        prefixes = [(name, f"{word}.") for name in options_of for word in (name, default_label(name))]
        if owners := [(name, prefix) for name, prefix in prefixes if option.startswith(prefix)]:
            name, prefix = owners[0]
            options_of[name].append(option.removeprefix(prefix))
        elif len(options_of) == 1:
            options_of[names[0]].append(option)
        else:
            known = ", ".join(default_label(n) for n in options_of) or "none"
            raise UserError(f"--option {option}: write NAME.key=value; the rewards given are: {known}.")
    return [_entry(name, changes, registry) for name, changes in options_of.items()]


def _entry(name: str, changes: Sequence[str], registry: Registry) -> RewardTerm:
    label = default_label(name)
    values, _ = apply_overrides({}, changes)
    checked = registry.reward_options(name, values, where=f"--option {label}")
    entry = RewardTerm.model_validate({"name": name, "options": checked.model_dump(mode="json")})
    with under(f"--option {label}.weights"):
        check_weights(entry, registry)
    return entry
