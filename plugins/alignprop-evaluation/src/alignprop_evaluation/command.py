"""`alignprop evaluate`: compare the base model and the LoRA on held-out prompts with the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alignprop_core._files import unused_name
from alignprop_core.cli import common
from alignprop_core.errors import UserError, under
from alignprop_core.prompts import PromptSet, load_prompts, warn_about

if TYPE_CHECKING:
    from alignprop_core.config.rewards import RewardTerm
    from alignprop_core.evaluation.compare import Comparison
    from alignprop_core.registry.registry import Registry
    from alignprop_evaluation.sweep import Sweep


def evaluate(
    run: Path | None = typer.Argument(None, metavar="RUN", help="A run folder; its config gives the defaults."),
    model: str = typer.Option("", help=f"Instead of a run, or of its model: {common.MODELS}."),
    lora: Path | None = typer.Option(
        None, help="A LoRA file or folder for --model; with a run, the LoRA to evaluate instead of the run's result."
    ),
    prompts: str = typer.Option("", help="Held-out prompts: a registered set or a file; the default is the run's."),
    reward: list[str] = typer.Option([], help="Reward to report in addition to the run's; can be repeated."),
    option: list[str] = common.REWARD_OPTIONS,
    steps: int | None = typer.Option(None, help="Denoising steps; the default is the run's, or 50."),
    guidance_scale: float | None = typer.Option(None, help="Guidance scale; the default is the run's, or 7.5."),
    images_per_prompt: int | None = typer.Option(
        None, min=1, help="Images per prompt; the default is the run's, or 4."
    ),
    seed: int | None = typer.Option(
        None, min=0, max=common.MAX_SEED, help="Seed of the noise; the default is the run's, or 1234."
    ),
    strengths: str = typer.Option(
        "", help="Evaluate at these strengths of the LoRA, such as 0,0.25,0.5,0.75,1, to compare rewards with drift."
    ),
    soup: Path | None = typer.Option(
        None,
        help="A second LoRA or run: evaluate merges with share s of it and 1 - s of the first, for s in --strengths.",
    ),
    device: str = common.DEVICE_OPTION,
    output: Path | None = typer.Option(None, help="Folder for the results; the default is the run folder."),
    json: bool = common.JSON_OPTION,
) -> None:
    """Evaluate a run, or a model with a LoRA, on held-out prompts; optionally at several strengths."""
    common.quiet_libraries()
    from alignprop_core.cli import inputs
    from alignprop_core.config.load import located
    from alignprop_core.config.sections import EvaluationConfig
    from alignprop_core.locate import find_lora
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.training.preflight import check_rewards

    if run is None and not model:
        raise UserError("Give a run folder, or --model M with --lora DIR.")
    other = "--lora" if lora is not None else "--model" if model else ""
    if run is not None and other and output is None:
        raise UserError(f"{other} with a run needs --output FOLDER: the run folder keeps the run's own evaluation.")
    if (strengths or soup) and run is None and lora is None:
        raise UserError("--strengths and --soup need a LoRA: give a run folder, or --model M with --lora DIR.")
    points = common.numbers(strengths, "--strengths") if strengths else [0, 0.25, 0.5, 0.75, 1] if soup else []
    if not all(abs(point) <= 1000 for point in points):
        raise UserError(f"--strengths {strengths}: give finite numbers, such as 0,0.5,1.")
    registry = default_registry()
    with nullcontext() if run is None else located(run / "config.yaml"):
        config, source = inputs.chosen_model(run, model, lora, registry, scores=True)
        if config is not None:
            check_rewards(config, registry)
        heldout = _heldout_prompts(prompts, (config and config.prompts.heldout) or "", registry)
        own = [] if config is None else [*config.rewards, *config.evaluation.rewards]
        entries = _combined(own, inputs.reward_entries(reward, option, registry))
        if not entries:
            raise UserError("There is nothing to measure: give --reward NAME.")
        sampling = inputs.sampling_settings(config, lora, registry, steps=steps, guidance_scale=guidance_scale)
        evaluation = (config.evaluation if config else EvaluationConfig()).model_copy(
            update=inputs.given(images_per_prompt=images_per_prompt, seed=seed)
        )
        if soup is not None:
            with under("--soup"):
                find_lora(soup)
        where = inputs.device_of(device)
        with common.status("loading rewards and model"):
            from alignprop_core.diffusion.sampler import Sampler
            from alignprop_core.evaluation.evaluator import NOT_FINITE, Evaluator, evaluation_terms
            from alignprop_evaluation.sweep import sweep

            key = "--prompts" if prompts else "prompts.heldout"
            terms = evaluation_terms(entries, heldout, registry, device=where, prompts_key=key)
            sampler = Sampler.load(**source, sampling=sampling, device=where, registry=registry)
    failures = (output or run or Path()) / "images" / NOT_FINITE
    evaluator = Evaluator(sampler, terms, heldout, evaluation, failures=failures)
    result: Comparison | Sweep
    if points:
        result = sweep(evaluator, points, soup)
    elif source["lora"] is None:
        result = evaluator.evaluate({"model": nullcontext}, drift=False)
    else:
        result = evaluator.evaluate({"base": evaluator.base, "tuned": nullcontext})
    folder = output or run
    files = [] if folder is None else _write(result, folder, registry)
    if json:
        common.print_json(result.as_json())
        return
    _print(result)
    common.print_facts([(label, str(path)) for label, path in files])


def _write(result: Comparison | Sweep, folder: Path, registry: Registry) -> list[tuple[str, Path]]:
    """Write the results into a folder and return the files with their labels."""
    from alignprop_core._files import read_table, write_json
    from alignprop_core.evaluation.sheet import before_after, save_image
    from alignprop_core.training.plugin_callbacks import automatic_callbacks
    from alignprop_evaluation.sweep import Sweep

    if isinstance(result, Sweep):
        name = "strengths" if result.soup is None else "soup"
        data, label, image = result.as_json(), "plot", folder / "images" / f"{name}.png"
    else:
        name, label, image = "evaluation", "sheet", folder / "images" / "before_after.png"
        # The run's earlier evaluation names the step of its LoRA and why it stopped, which remain true.
        known = read_table(folder / "evaluation.json") if (folder / "config.yaml").is_file() else {}
        data = result.as_json() | {key: known[key] for key in ("step", "stopped") if key in known}
        save_image(before_after(result), image)
    file = write_json(folder / f"{name}.json", data)
    for callback in automatic_callbacks(registry):
        callback.on_results(folder)  # such as the report, which plots a sweep
    return [("results", file), *([(label, image)] if image.is_file() else [])]


def _print(result: Comparison | Sweep) -> None:
    from alignprop_core.cli.train import print_comparison
    from alignprop_core.evaluation.table import sample_size
    from alignprop_evaluation.sweep import Sweep

    if not isinstance(result, Sweep):
        print_comparison(result)
        return
    common.console().print(f"\nHeld-out prompts {result.comparison.prompts.name}, the same seeds at each {result.name}")
    common.print_table(*result.table())
    common.console().print(sample_size(result.as_json()))


def _combined(own: Sequence[RewardTerm], given: Sequence[RewardTerm]) -> list[RewardTerm]:
    """Return a run's rewards and those of --reward with distinct labels; a reward with the same options only once."""
    entries = list(own)
    for entry in given:
        if not any((other.name, other.options) == (entry.name, entry.options) for other in own):
            label = unused_name(entry.label, {other.label for other in own}, ".")
            entries.append(entry.model_copy(update={"label": label}))
    return entries


def _heldout_prompts(given: str, own: str | Sequence[Any], registry: Registry) -> PromptSet:
    """Return the prompts of --prompts, or the run's own; `UserError` if there are none or they cannot be read."""
    if not (given or own):
        raise UserError("There are no held-out prompts: give --prompts SET_OR_FILE.")
    with under("--prompts" if given else "prompts.heldout"):
        prompts = load_prompts(given or own, registry)
        warn_about(prompts)
        return prompts
