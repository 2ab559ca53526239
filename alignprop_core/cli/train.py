"""`alignprop train`: fine-tune on a run config."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignprop_core.cli import common
from alignprop_core.errors import RunError

if TYPE_CHECKING:
    from alignprop_core.evaluation.compare import Comparison
    from alignprop_core.mix.term import Term
    from alignprop_core.training.trainer import Trainer


def train(
    config: Path = typer.Argument(help="A run config (YAML)."),
    overrides: list[str] = typer.Argument(None, metavar="KEY=VALUE", help="Overrides, such as training.steps=20."),
    resume: str = typer.Option("", help="Resume from `latest` (in the output folder), a run folder or a checkpoint."),
    edited: bool = typer.Option(
        False, "--edited", help="Resume even if files or a reward's code have changed, for example after a fix."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier run in the output folder."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Load and try everything, on one image; train and write nothing."
    ),
) -> None:
    """Fine-tune a model on the rewards of a run config."""
    common.quiet_libraries()
    from alignprop_core.config.load import load_config, located
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.training.preflight import check_inputs

    registry = default_registry()
    settings = load_config(config, overrides or [], registry=registry)
    where = Path(settings.output) if resume == "latest" else Path(resume) if resume else None
    with located(config, overrides or []):
        # Before the trainer's libraries, whose import takes many seconds.
        inputs = check_inputs(settings, registry, resume=where, edited=edited, overwrite=overwrite)
        from alignprop_core.devices import device_and_dtype

        device_and_dtype(settings.training.device, settings.training.mixed_precision)
        with common.status("loading rewards and model"):
            from alignprop_core.training.trainer import Trainer

            console = common.console(stderr=True)
            trainer = Trainer(
                settings, registry=registry, edited=edited, overwrite=overwrite, inputs=inputs, console=console
            )
        if dry_run:
            common.print_facts(_facts(trainer))
            common.console().print("Everything loads, and an image was generated. All rewards score it.")
            return
        with explains_resume(trainer):
            run = trainer.train()
    if trainer.processes.is_main_process:
        finish(trainer, run.folder)
    if trainer.processes.num_processes > 1:
        trainer.processes.destroy_process_group()


def _facts(trainer: Trainer) -> list[tuple[str, str]]:
    config = trainer.config
    size = sum(p.numel() for p in trainer.parameters)
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps
    return [
        ("model", f"{config.model.base} ({type(trainer.pipeline).__name__}) on {trainer.device}"),
        ("prompts", f"{len(trainer.prompts)} to train on, {len(trainer.heldout) if trainer.heldout else 0} held out"),
        ("rewards", ", ".join(f"{_weight(term)} x {term.label}" for term in trainer.mix.terms)),
        ("mix", config.mix.combine),
        ("adapters", f"rank {config.lora.rank}, {size:,} parameters in {len(trainer.parameters) // 2} layers"),
        ("steps", f"{config.training.steps} of {per_step} images"),
        ("output", str(trainer.output)),
    ]


def _weight(term: Term) -> str:
    """Return a weight, or its schedule."""
    if isinstance(term.weight, Mapping):
        return " -> ".join(f"{weight:g} ({step})" for step, weight in sorted(term.weight.items()))
    return f"{term.weight:g}"


@contextmanager
def explains_resume(trainer: Trainer) -> Iterator[None]:
    """Say what a run that fails or is interrupted has saved, and how to resume it."""
    try:
        yield
    except RunError as error:
        if trainer.processes.is_main_process:
            error.add_note(_what_is_left(trainer, "failed"))
        raise
    except KeyboardInterrupt:
        if trainer.processes.is_main_process:
            common.note(f"\n{_what_is_left(trainer, 'was interrupted')}")
        raise


def _what_is_left(trainer: Trainer, end: str) -> str:
    """Return how many steps a run has done, which checkpoint is saved, and how to resume from it."""
    from alignprop_core.registry.local import split_file_name

    done = trainer.step_number
    came = f"The run {end} after {done} of {trainer.config.training.steps} steps."
    saved = sorted((trainer.output / "checkpoints").glob("step-*"))
    if not saved:
        return f"{came} No checkpoint was saved."
    step = int(saved[-1].name.removeprefix("step-"))
    state = "That state" if step == done else f"The state after step {step}"
    again = shlex.join(["alignprop", "train", str(trainer.output / "config.yaml"), "--resume", "latest"])
    files = any(split_file_name(term.name) for term in trainer.config.rewards)
    changed = " (and --edited, if you fix its file)" if files else ""
    return f"{came} {state} is saved in {saved[-1]}. Resume from it with{changed}:\n{again}"


def finish(trainer: Trainer, folder: Path) -> None:
    """Print the results of a run: the evaluation, why it stopped early, and where its files are."""
    if trainer.comparison is not None:
        print_comparison(trainer.comparison)
    lora = f"{folder / 'lora'}  (diffusers: pipe.load_lora_weights; ComfyUI and A1111: {folder.name}.safetensors)"
    facts = [("LoRA", lora)]
    if trainer.stop_reason is not None:
        facts.insert(0, ("stopped", f"at step {trainer.step_number}: {trainer.stop_reason}"))
    # Previews and the report are optional.
    made = [("images", folder / "images"), ("metrics", folder / "metrics.jsonl"), ("report", folder / "report.html")]
    common.print_facts([*facts, *((what, str(path)) for what, path in made if path.exists())])


def print_comparison(comparison: Comparison) -> None:
    """Print a table: each reward and measure, base against tuned, with the paired interval."""
    from alignprop_core.evaluation.table import EvaluationTable

    table = EvaluationTable(comparison.as_json())
    common.console().print(f"\nHeld-out prompts {comparison.prompts.name}, the same seeds for each model")
    common.print_table(table.columns, table.rows)
    common.console().print(table.note)
