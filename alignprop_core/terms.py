"""From the run config's reward entries to loaded terms: rewards to train on, and measures to report beside them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from alignprop_core.config import RewardTerm, RunConfig
from alignprop_core.errors import ConfigError, PromptError, RewardError, TrialError, UserError, under
from alignprop_core.mix import Term
from alignprop_core.model_files import find_base, find_vae
from alignprop_core.prompts import PromptSet, listed
from alignprop_core.registry import Registry
from alignprop_core.reward import ImageBatch, Reward


def load_terms(entries: Sequence[RewardTerm], registry: Registry, *, where: str = "") -> list[Term]:
    """Load the rewards of config entries; the first that cannot load raises with its plugin's own traceback.

    Args:
        entries: the rewards.
        registry: where they are looked up.
        where: key of the entries in the run config, for messages; empty if they stand in none.
    """
    return [
        Term(
            label=entry.label,
            reward=_load(entry, registry, f"{where}.{i}" if where else ""),
            weight=entry.weight,
            ceiling=entry.ceiling,
            floor=entry.floor,
            target=entry.target,
            differentiable=registry.of(entry.isolation).reward(entry.name).spec.differentiable,
        )
        for i, entry in enumerate(entries)
    ]


def _load(entry: RewardTerm, registry: Registry, key: str) -> Reward:
    try:
        with under(key) if key else nullcontext():
            return registry.of(entry.isolation).load_reward(entry.name, entry.options)
    except RewardError as error:
        if entry.isolation is None:
            raise
        named = RewardError(f'Reward "{entry.label}": {error}')
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        raise named from error


def check_prompts(terms: Sequence[Term], prompts: PromptSet) -> None:
    """Let every reward look at the prompts it will be given, so that it is not a step that finds the wrong one.

    Raises:
        PromptError: naming the prompts a reward cannot use, each with its line, and the reward.
        RewardError: a reward failed to look.
    """
    problems = []
    for term in terms:
        for i, (prompt, metadata) in enumerate(zip(prompts.prompts, prompts.metadata, strict=True)):
            try:
                with term.named("could not look at a prompt:"):
                    term.reward.check_prompt(prompt, metadata)
            except UserError as error:
                problems.append(prompts.problem(i, error))
    if problems:
        raise PromptError(listed(problems))


def with_given(config: RunConfig, registry: Registry) -> RunConfig:
    """Return the config with a term of weight 1 for every reward object of the registry that it does not mention.

    Raises:
        ConfigError: then, too, there is nothing to train on.
    """
    named = {entry.name for entry in (*config.rewards, *config.evaluation.rewards)}
    added = [
        RewardTerm(name=name, options=registry.reward_options(name).model_dump(mode="json"))
        for name in registry.given
        if name not in named
    ]
    if not (config.rewards or added):
        with under("rewards"):
            raise ConfigError("there is nothing to train on; name a reward, or pass an object from Python (rewards=).")
    # Validated anew: a label may be taken.
    return RunConfig.model_validate({**dict(config), "rewards": [*config.rewards, *added]}) if added else config


def score_advice(entry: RewardTerm, registry: Registry) -> str:
    """Return how a term's reward is tried on a picture, as the end of a sentence; empty where no command can.

    Args:
        entry: the term; its label is nothing a command knows.
        registry: which of the names are objects from Python, that no command can find.
    """
    if entry.isolation is not None or entry.name in registry.given:
        return ""
    try:
        usual = registry.reward_options(entry.name).model_dump(mode="json")
    except ConfigError:  # one has no default
        usual = {}
    words = ["--reward", entry.name]
    for key, value in entry.options.items():
        if key not in usual or usual[key] != value:
            words += ["-o", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return f"with `alignprop score IMAGE {shlex.join(words)}`"


UNKNOWN_SIZE = (512, 512)
"""Height and width of the trial's picture where the model's own are not known before it loads: Stable Diffusion's."""


def drawn_size(config: RunConfig, registry: Registry, pipeline: Any = None) -> tuple[int, int] | None:
    """Return (height, width) of a run's images in pixels; loads no model.

    Args:
        config: the run config.
        registry: where its model is looked up.
        pipeline: a loaded pipeline that is trained instead of `model.base`.

    Returns:
        What `sampling` says, else the model's own; None where that is not known before the model loads: a single file,
        or a model of the hub that is not on this machine.
    """
    height, width = config.sampling.height, config.sampling.width
    if height and width:
        return height, width
    own = _size_from_files(config, registry) if pipeline is None else _size_of(pipeline)
    return None if own is None else (height or own[0], width or own[1])


def _size_of(pipeline: Any) -> tuple[int, int] | None:
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    side = getattr(getattr(network, "config", None), "sample_size", None)
    return _pixels(side, getattr(pipeline, "vae_scale_factor", None))


def _size_from_files(config: RunConfig, registry: Registry) -> tuple[int, int] | None:
    base = find_base(config.model.base, registry)
    network = _settings(base, "unet") or _settings(base, "transformer")
    vae = find_vae(config.model.vae) if config.model.vae is not None else base
    levels = (_settings(vae, "vae") or _settings(vae, "")).get("block_out_channels")
    return _pixels(network.get("sample_size"), 2 ** (len(levels) - 1) if levels else None)


def _pixels(side: Any, factor: int | None) -> tuple[int, int] | None:
    """Return a latent's size, a number or two, in pixels."""
    if not side or not factor:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return int(height * factor), int(width * factor)


def _settings(model: Path | str, part: str) -> dict[str, Any]:
    """Return the config.json of a network of a folder, or of a hub model that is on this machine; empty for none."""
    name = f"{part}/config.json" if part else "config.json"
    file: Any = Path(model) / name
    if isinstance(model, str) and not Path(model).is_dir():
        file = try_to_load_from_cache(model, name)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    found: dict[str, Any] = json.loads(Path(file).read_bytes())
    return found


def try_local(
    terms: Sequence[Term],
    entries: Sequence[RewardTerm],
    registry: Registry,
    *,
    prompts: PromptSet,
    device: torch.device,
    size: tuple[int, int] | None = None,
    where: str = "rewards",
) -> None:
    """Score one picture of noise with rewards from Python, a file or another environment: do they give a gradient?

    A plugin's spec declares that and its tests hold it to it; a class written a minute ago may well not have one, and
    an environment may lack something that scoring needs. To find out at the first step would cost the loading of a
    model. The picture has the size, dtype and range of the run's.

    Args:
        terms: the loaded rewards.
        entries: what the config says of them, in the same order.
        registry: where they were looked up.
        prompts: the run's; the first one is used.
        device: where the rewards are.
        size: (height, width) in pixels, as `drawn_size` tells; None is `UNKNOWN_SIZE`.
        where: key of the entries in the run config.

    Raises:
        TrialError: naming the term and its key, if it raises, breaks its contract or gives no gradient.
    """
    height, width = size or UNKNOWN_SIZE
    # As the sampler decodes: float32 (a float64 model, which no config asks for, would give float64) in [0, 1].
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    first: dict[str, Any] = {"prompts": prompts.prompts[:1], "metadata": prompts.metadata[:1]}
    whose = "the size the run draws" if size else "as the model's own size is not known before it loads"
    tried = f"This was a trial before training, with 1 random image of {width}x{height} pixels ({whose})."
    for i, (term, entry) in enumerate(zip(terms, entries, strict=True)):
        if entry.isolation is None and registry.local(entry.name) is None:
            continue
        batch = ImageBatch(images=images.clone().requires_grad_(), **first)
        try:
            with torch.enable_grad():
                term.score(batch)
        except (UserError, RewardError) as error:
            failed = TrialError(f"{str(error).rstrip('.')}. {tried}")
            failed.key = f"{where}.{i}.name"
            for note in getattr(error, "__notes__", ()):
                failed.add_note(note)
            raise failed from error
