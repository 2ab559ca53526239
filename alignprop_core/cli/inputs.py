"""From options of commands to checked settings, before torch is imported: a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

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
from alignprop_core.validation import explain


def check_model_options(model: str, lora: Path | None, registry: Registry) -> None:
    """Raise `UserError` if --model or --lora is a path to nothing."""
    with under("--model"):
        find_base(model, registry)
    if lora is not None:
        with under("--lora"):
            find_lora(lora)


def model_of_run(run: Path, lora: Path | None, registry: Registry) -> tuple[RunConfig, dict[str, Any]]:
    """Return a run's config, and its model with its LoRA as keywords for `Sampler.load`.

    Args:
        run: the run folder.
        lora: a LoRA to use instead of the run's result.
        registry: where names are looked up.

    Raises:
        UserError: there is no such run, or its model or LoRA is missing.
    """
    config = load_config(run / "config.yaml", registry=registry)
    lora = run / "lora" if lora is None else lora
    find_lora(lora)
    check_model(config, registry)
    return config, {
        "model": config.model.base,
        "lora": lora,
        "vae": config.model.vae,
        "frozen": config.model.loras,
        "mixed_precision": config.training.mixed_precision,
    }


def sampling_settings(values: Mapping[str, Any]) -> SamplingConfig:
    """Check sampling settings given as options; `UserError` naming the options that are wrong."""
    try:
        return SamplingConfig(**values)
    except ValidationError as error:
        problems = explain(error, SamplingConfig)
        raise UserError("\n".join(f"--{p.key.replace('_', '-')}: {p.message}" for p in problems)) from error


def reward_entries(names: Sequence[str], options: Sequence[str], registry: Registry) -> list[RewardTerm]:
    """Return rewards given with `--reward NAME`, and their options with `--option NAME.key=value`, as config entries.

    With one reward an option needs no name. Everything is checked that can be without loading the rewards.

    Raises:
        UserError: a reward is unknown or given twice, an option is wrong or of no given reward, or weights are missing.
    """
    given: dict[str, list[str]] = {}
    for name in names:
        registry.reward(name)
        if default_label(name) in map(default_label, given):
            raise UserError(f"--reward {name} is given twice.")
        given[name] = []
    for option in options:
        if "=" not in option:
            raise UserError(f"--option {option}: write KEY=VALUE, such as quality=80.")
        whose = [n for n in given if option.startswith((f"{n}.", f"{default_label(n)}."))]
        if whose:
            prefix = next(p for p in (f"{whose[0]}.", f"{default_label(whose[0])}.") if option.startswith(p))
            given[whose[0]].append(option.removeprefix(prefix))
        elif len(given) == 1:
            given[next(iter(given))].append(option)
        else:
            known = ", ".join(default_label(n) for n in given) or "none"
            raise UserError(f"--option {option}: say whose, NAME.key=value; the rewards given are: {known}.")
    return [_entry(name, changes, registry) for name, changes in given.items()]


def _entry(name: str, changes: Sequence[str], registry: Registry) -> RewardTerm:
    label = default_label(name)
    values, _ = apply_overrides({}, changes)
    checked = registry.reward_options(name, values, where=f"--option {label}")
    entry = RewardTerm.model_validate({"name": name, "options": checked.model_dump(mode="json")})
    with under(f"--option {label}.weights"):
        check_weights(entry, registry)
    return entry
