"""`alignprop demo`: fine-tune a small model in minutes and show what changed."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignprop_core.cli import common
from alignprop_core.cli.train import explains_resume, finish

if TYPE_CHECKING:
    from alignprop_core.config.sections import RunConfig


def demo(
    overrides: list[str] = typer.Argument(None, metavar="KEY=VALUE", help="Overrides, such as training.steps=5."),
    model: str = typer.Option("starter", help="A registered model that has a demo."),
    output: Path = typer.Option(Path("demo"), help="Run folder; an earlier run of this demo in it is replaced."),
) -> None:
    """Fine-tune a registered model on its demo config and write a before/after sheet."""
    common.quiet_libraries()
    from alignprop_core.config.load import load_config
    from alignprop_core.errors import PluginError
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    offer = registry.model(model)
    if not offer.spec.demo:
        with_demo = [other.spec.name for other in registry.models() if other.spec.demo]
        raise PluginError(f'Model "{model}" has no demo; these have one: {", ".join(with_demo) or "none"}.')
    package, _, file = offer.spec.demo.partition(":")
    with as_file(files(package) / file) as path:
        settings = load_config(path, [*(overrides or []), f"output={output}"], registry=registry)
    with common.status("loading rewards and model"):
        from alignprop_core.training.trainer import Trainer

        console = common.console(stderr=True)
        trainer = Trainer(settings, registry=registry, overwrite=_is_demo(output, settings), console=console)
    with explains_resume(trainer):
        run = trainer.train()
    finish(trainer, run.folder)
    common.print_facts([("before and after", str(run / "images" / "before_after.png"))])


def _is_demo(folder: Path, settings: RunConfig) -> bool:
    """Whether a run folder contains an earlier run of this demo, and not another run of the user's."""
    from yaml import YAMLError, safe_load

    try:
        earlier = safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return bool(
            earlier["model"]["base"] == settings.model.base
            and earlier["prompts"]["train"] == settings.prompts.train
            and [term["name"] for term in earlier["rewards"]] == [term.name for term in settings.rewards]
        )
    except (OSError, YAMLError, KeyError, TypeError):
        return False
