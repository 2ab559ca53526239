"""`alignprop evaluate`: held-out prompts, base against tuned, the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alignprop_core.cli import common

if TYPE_CHECKING:
    from alignprop_core.config.rewards import RewardTerm
    from alignprop_core.config.sections import RunConfig
    from alignprop_core.prompts import PromptSet
    from alignprop_core.registry.registry import Registry


def evaluate(
    run: Path | None = typer.Argument(None, metavar="[RUN]", help="A run folder; its config says what to evaluate."),
    model: str = typer.Option("", help="Instead of a run: a model ..."),
    lora: Path | None = typer.Option(
        None, help="... and a LoRA folder or file. With a run: one of its files, or any other, instead of its result."
    ),
    prompts: str = typer.Option("", help="Held-out prompts: a registered set or a file; a run's own if left out."),
    reward: list[str] = typer.Option([], help="Rewards to report beside the run's own (repeat the option)."),
    option: list[str] = typer.Option(
        [], "--option", "-o", metavar="[NAME.]KEY=VALUE", help="One of a --reward's options; of several, NAME's."
    ),
    steps: int | None = typer.Option(None, help="Denoising steps; a run's own (or 50) if left out."),
    guidance_scale: float | None = typer.Option(None, help="Guidance; a run's own (or 7.5) if left out."),
    images_per_prompt: int | None = typer.Option(None, min=1, help="Images of each prompt; 4 if left out."),
    seed: int | None = typer.Option(None, min=0, help="Seed of the noise; 1234 if left out."),
    strengths: str = typer.Option(
        "", help="Evaluate the LoRA at these strengths instead, such as 0,0.25,0.5,0.75,1,1.25: rewards against drift."
    ),
    soup: Path | None = typer.Option(
        None,
        help="Another LoRA or run: at share s, 1 - s of the first and s of this one (--strengths gives the shares).",
    ),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:N or mps."),
    output: Path | None = typer.Option(None, help="Folder for evaluation.json and the sheet; the run folder's own."),
    json: bool = common.JSON_OPTION,
) -> None:
    """Evaluate a run, or a model with a LoRA, on held-out prompts; or a whole curve of strengths or shares."""
    common.quiet_libraries()
    from alignprop_core.cli.inputs import check_model_options, model_of_run, reward_entries, sampling_settings
    from alignprop_core.config.load import located
    from alignprop_core.config.sections import EvaluationConfig
    from alignprop_core.errors import UserError, under
    from alignprop_core.locate import find_lora
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.training.preflight import check_rewards

    if (run is None) == (not model):
        raise UserError("Give a run folder, or --model M with --lora DIR.")
    if run is not None and lora is not None and output is None:
        raise UserError("--lora beside a run takes --output FOLDER: the run folder keeps the run's own evaluation.")
    if (strengths or soup) and run is None and lora is None:
        raise UserError("--strengths and --soup need a LoRA: give a run folder, or --lora DIR beside --model.")
    points = _points(strengths, soup is not None)
    registry = default_registry()
    config: RunConfig | None = None
    known: dict[str, Any] = {"model": model, "lora": lora}
    with nullcontext() if run is None else located(run / "config.yaml"):
        if run is not None:
            config, known = model_of_run(run, lora, registry)
            check_rewards(config, registry)
        chosen = _prompts(prompts, (config and config.prompts.heldout) or "", registry)
        own = [] if config is None else [*config.rewards, *config.evaluation.rewards]
        entries = _with_further(own, reward_entries(reward, option, registry))
        if not entries:
            raise UserError("There is nothing to measure: give --reward NAME.")
        changes = {"steps": steps, "guidance_scale": guidance_scale}
        sampling = sampling_settings(
            {**(config.sampling.model_dump() if config else {}), **{k: v for k, v in changes.items() if v is not None}}
        )
        changes = {"images_per_prompt": images_per_prompt, "seed": seed}
        evaluation = (config.evaluation if config else EvaluationConfig()).model_copy(
            update={k: v for k, v in changes.items() if v is not None}
        )
        if run is None:
            check_model_options(model, lora, registry)
        if soup is not None:
            with under("--soup"):
                find_lora(soup)
        from alignprop_core.devices import choose_device

        with under("--device"):
            where = choose_device(device)
        with common.status("loading rewards and model"):
            from alignprop_core.evaluation.evaluator import Evaluator, evaluation_terms

            key = "--prompts" if prompts else "prompts.heldout"
            terms = evaluation_terms(entries, chosen, registry, device=where, prompts_key=key)
            from alignprop_core._files import write_json
            from alignprop_core.diffusion.sampler import Sampler
            from alignprop_core.evaluation.compare import Switch
            from alignprop_core.evaluation.sheet import before_after, save_image
            from alignprop_core.training.plugin_callbacks import results_written

            sampler = Sampler.load(**known, sampling=sampling, device=where, registry=registry)
    evaluator = Evaluator(sampler, terms, chosen, evaluation)
    if points:
        from alignprop_core.cli.sweep import evaluate_sweep

        evaluate_sweep(evaluator, points=points, soup=soup, folder=output or run, json=json, registry=registry)
        return
    tuned = known["lora"] is not None
    variants: dict[str, Switch] = {"base": evaluator.base, "tuned": nullcontext} if tuned else {"model": nullcontext}
    result = evaluator.evaluate(variants, drift=tuned)
    folder = output or run
    if folder is not None:
        write_json(folder / "evaluation.json", result.as_json() | _trained_step(folder))
        save_image(before_after(result), folder / "images" / "before_after.png")
        results_written(folder, registry)
    if json:
        common.print_json(result.as_json())
        return
    from alignprop_core.cli.train import print_comparison

    print_comparison(result)
    if folder is not None:
        sheet = folder / "images" / "before_after.png"
        common.print_facts([("results", str(folder / "evaluation.json")), ("sheet", str(sheet))])


def _trained_step(folder: Path) -> dict[str, Any]:
    """Return which step's LoRA a run has, and why it stopped, from its evaluation: a new one is of the same LoRA."""
    path = folder / "evaluation.json"
    if not (folder / "config.yaml").is_file() or not path.is_file():
        return {}  # not a run, but a folder that --output names
    try:
        known = loads(path.read_bytes())
    except ValueError:
        return {}
    return {key: known[key] for key in ("step", "stopped") if key in known} if isinstance(known, dict) else {}


def _prompts(given: str, own: str, registry: Registry) -> PromptSet:
    from alignprop_core.errors import UserError, under
    from alignprop_core.prompts import load_prompts

    if not (given or own):
        raise UserError("There are no held-out prompts: give --prompts SET_OR_FILE.")
    with under("--prompts" if given else "prompts.heldout"):
        return load_prompts(given or own, registry)


def _with_further(own: Sequence[RewardTerm], given: Sequence[RewardTerm]) -> list[RewardTerm]:
    """Return a run's rewards and those of --reward; one with the options of a run's own is measured already."""
    entries = list(own)
    for entry in given:
        if any((other.name, other.options) == (entry.name, entry.options) for other in own):
            continue
        taken = {other.label for other in own}
        label = next(label for n in count(1) if (label := entry.label if n == 1 else f"{entry.label}.{n}") not in taken)
        entries.append(entry.model_copy(update={"label": label}))
    return entries


def _points(text: str, soup: bool) -> list[float]:
    """Read comma-separated numbers; the usual ones where a curve is asked for without any."""
    from alignprop_core.errors import UserError

    if not text:
        return [0.0, 0.25, 0.5, 0.75, 1.0] if soup else []
    try:
        points = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--strengths {text}: write numbers with commas between them, such as 0,0.5,1.") from None
    if not all(abs(point) <= 1000 for point in points):
        raise UserError(f"--strengths {text}: give finite numbers, such as 0,0.5,1.")
    return [float(f"{point:g}") for point in points]
