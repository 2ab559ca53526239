"""`alignprop sample`: pictures from a model, with or without a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from alignprop_core.cli import common


def sample(
    prompts: list[str] = typer.Argument(help="What to draw; one picture a prompt and seed."),
    model: str = typer.Option(help="A registered model, a hub id, a diffusers folder or a .safetensors file."),
    lora: Path | None = typer.Option(None, help="A LoRA folder or file, or a run folder."),
    strength: float = typer.Option(1.0, help="Strength of the LoRA; 0 is the base model."),
    steps: int = typer.Option(50, help="Denoising steps."),
    guidance_scale: float = typer.Option(7.5, help="Classifier-free guidance; 1 is off."),
    negative_prompt: str = typer.Option("", help="What to lead away from."),
    width: int | None = typer.Option(None, help="Pixels; the model's own if left out."),
    height: int | None = typer.Option(None, help="Pixels; the model's own if left out."),
    seed: int = typer.Option(0, help="The first seed; each further picture of a prompt takes the next."),
    count: int = typer.Option(1, min=1, help="Pictures of each prompt."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:N or mps."),
    output: Path = typer.Option(Path("samples"), help="Folder for the pictures."),
) -> None:
    """Draw pictures; the same seed gives the picture diffusers gives for it."""
    common.quiet_libraries()
    from alignprop_core.cli.inputs import check_model_options, sampling_settings
    from alignprop_core.errors import under
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    settings = sampling_settings(
        {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
        }
    )
    check_model_options(model, lora, registry)
    from alignprop_core.devices import choose_device

    with under("--device"):
        where = choose_device(device)
    with common.status("loading the model"):
        from alignprop_core.cli.models import open_sampler

        sampler = open_sampler(model, settings, device=where, registry=registry, lora_path=lora, strength=strength)

    import torch

    from alignprop_core._files import safe_name
    from alignprop_core.evaluation.sheet import save_picture, to_picture
    from alignprop_core.training.progress import progress_bar

    files: list[Path] = []
    names = unlike([safe_name(prompt, longest=60) for prompt in prompts])
    with progress_bar(common.console(stderr=True)) as bar, torch.no_grad():
        task = bar.add_task("drawing", total=len(prompts) * count, figures="")
        for name, prompt in zip(names, prompts, strict=True):
            for number in range(seed, seed + count):
                image = sampler([prompt], generator=torch.Generator().manual_seed(number))[0]
                file = output / f"{name}-{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                save_picture(to_picture(image), file)
                files.append(file)
                bar.advance(task)
    for file in files:
        common.console().print(str(file), soft_wrap=True)


def unlike(names: Sequence[str]) -> list[str]:
    """Return file names, each different: prompts that differ in signs, or far behind, have the same one."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return found
