"""`alignprop lora`: scale, mix, convert and bake LoRA files; every result in both formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from alignprop_core.cli import common
from alignprop_core.cli.extensions import ExtensibleGroup

if TYPE_CHECKING:
    from alignprop_core.lora.whole import WholeLora

app = typer.Typer(cls=ExtensibleGroup, help="Scale, mix, convert and bake LoRA files.", no_args_is_help=True)

_LORA = typer.Argument(help="A LoRA file of either format, a LoRA folder or a run folder.")
_OUTPUT = typer.Option(..., help="Folder for the result: diffusers' file, and NAME.safetensors in kohya's layout.")
_NAME = typer.Option("", help="Name of the kohya file; the output folder's if left out.")

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf", re.IGNORECASE)


class _TakesNegativeNumbers(TyperCommand):
    """A command whose last argument may be a number below zero, which would look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        numbers = [
            i
            for i, word in enumerate(args)
            if _NEGATIVE.fullmatch(word) and not (i and args[i - 1].startswith("--"))  # an option's value
        ]
        if numbers and "--" not in args:
            others = [word for i, word in enumerate(args) if i not in numbers]
            args = [*others, "--", *(args[i] for i in numbers)]
        return super().parse_args(ctx, args)


@app.command(cls=_TakesNegativeNumbers)
def scale(
    lora: Path = _LORA,
    strength: float = typer.Argument(help="Factor on the weight change, such as 0.7 or -1."),
    output: Path = _OUTPUT,
    name: str = _NAME,
) -> None:
    """Multiply a LoRA's weight change, so that strength 1 of the result is this strength of the original."""
    from alignprop_core.lora.merging import scale as scaled
    from alignprop_core.lora.whole import read_whole

    _write(scaled(read_whole(lora), strength), output, name)


@app.command()
def convert(
    lora: Path = _LORA,
    output: Path = _OUTPUT,
    name: str = _NAME,
    to: str = typer.Option("both", help="diffusers, kohya or both."),
) -> None:
    """Write a LoRA of either format in the other, or in both."""
    from alignprop_core.errors import UserError
    from alignprop_core.lora.whole import read_whole

    if to not in ("both", "diffusers", "kohya"):
        raise UserError(f"--to {to}: choose diffusers, kohya or both.")
    _write(read_whole(lora), output, name, ("diffusers", "kohya") if to == "both" else (to,))


@app.command()
def mix(
    loras: list[Path] = typer.Argument(help="Two or more LoRAs for one base model."),
    output: Path = _OUTPUT,
    weights: str = typer.Option("", help="One number a LoRA, commas between; equal parts of 1 if left out."),
    sweep: str = typer.Option(
        "", help="For two LoRAs: shares of the second, such as 0,0.25,0.5,0.75,1; a folder in --output for each."
    ),
    rank: int | None = typer.Option(
        None, min=1, help="Highest rank of the result; exact, with ranks added up, if not."
    ),
    name: str = _NAME,
) -> None:
    """Mix LoRAs: the result changes weights by the weighted sum of their changes. Factors are never averaged."""
    from alignprop_core.errors import UserError
    from alignprop_core.lora.merging import mix as mixed
    from alignprop_core.lora.whole import read_whole

    if sweep and (weights or len(loras) != 2):
        raise UserError("--sweep mixes two LoRAs at several shares: give two LoRAs and no --weights.")
    read = [read_whole(lora) for lora in loras]
    names = [str(lora) for lora in loras]
    given = _numbers(weights, "--weights") if weights else [1 / len(loras)] * len(loras)
    shares = _numbers(sweep, "--sweep")
    plans = [([1 - s, s], output / f"{s:g}", f"{name or output.name}-{s:g}") for s in shares]
    for factors, folder, called in plans or [(given, output, name)]:
        result = mixed(read, factors, rank=rank, names=[Path(lora).name for lora in names])
        _write(result.lora, folder, called)
        if rank is not None:
            worst = f"; at most {result.worst:.2%}, in {result.worst_layer}" if result.worst_layer else ""
            common.print_facts([("error", f"{result.error:.2%} of the exact mix's weight change{worst}")])


@app.command()
def bake(
    lora: Path = _LORA,
    model: str = typer.Option(
        ..., help="The base model: a registered model, a hub id, a folder or a .safetensors file."
    ),
    output: Path = typer.Option(..., help="Folder for the complete diffusers model; new or empty."),
    strength: float = typer.Option(1.0, help="Factor on the weight change."),
    vae: str | None = typer.Option(None, help="Another autoencoder: a diffusers folder or a hub id."),
    precision: str = typer.Option("fp32", help="Number format of the written weights: fp32, fp16 or bf16."),
) -> None:
    """Add a LoRA to a model's own weights and write the model, for programs that know nothing of adapters."""
    common.quiet_libraries()
    from alignprop_core.errors import UserError

    formats = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if precision not in formats:
        raise UserError(f"--precision {precision}: choose fp32, fp16 or bf16.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already and is not empty; choose another folder.")
    from alignprop_core.lora.whole import read_whole

    read = read_whole(lora)
    with common.status("loading the model"):
        import torch

        from alignprop_core.diffusion.loading import load_pipeline
        from alignprop_core.lora.fusing import bake as bake_in
        from alignprop_core.lora.fusing import save_pipeline
        from alignprop_core.registry.registry import default_registry

        pipeline = load_pipeline(model, registry=default_registry(), device="cpu", vae=vae)
    baked = bake_in(pipeline, read, strength, dtype=getattr(torch, formats[precision]), path=lora)
    save_pipeline(pipeline, output)
    common.print_facts(
        [
            ("model", str(output)),
            ("layers changed", str(baked.layers)),
            ("lost to rounding", f"{baked.lost:.2g} of the weight change, in {precision}"),
        ]
    )


def _write(lora: WholeLora, output: Path, name: str, formats: tuple[str, ...] = ("diffusers", "kohya")) -> None:
    from alignprop_core._files import safe_name
    from alignprop_core.lora.whole import write_whole

    files = write_whole(lora, output, name or safe_name(output.absolute().name), formats=formats)
    common.print_facts([("LoRA", str(file)) for file in files] + [("rank", str(lora.rank))])


def _numbers(text: str, option: str) -> list[float]:
    from alignprop_core.errors import UserError

    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{option} {text}: write numbers with commas between them, such as 0.5,0.5.") from None
