"""`alignprop lora`: inspect, convert, scale, merge and fuse LoRA files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from alignprop_core.cli import common

if TYPE_CHECKING:
    from alignprop_core.lora.files import LoraFile
    from alignprop_lora.merging import Merged

_LORA = typer.Argument(help="A LoRA file in diffusers' or kohya's format, a LoRA folder or a run folder.")
_OUTPUT = typer.Option(..., help="Output folder for the diffusers file and the kohya file NAME.safetensors.")
_NAME = typer.Option("", help="Name of the kohya file; the default is the name of the output folder.")

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf", re.IGNORECASE)


class _TakesNegativeNumbers(TyperCommand):
    """A command whose last argument may be a negative number, which would be parsed as an option."""

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


def info(lora: Path = _LORA, json: bool = common.JSON_OPTION) -> None:
    """Show a LoRA's rank, alpha, base model, layers and header metadata."""
    from safetensors import safe_open

    from alignprop_core.locate import find_lora
    from alignprop_core.lora.formats import read_lora

    file = find_lora(lora)
    parts = read_lora(file)
    with safe_open(file, framework="pt") as opened:
        header: dict[str, str] = opened.metadata() or {}
    keys = ("alignprop.base_model", "modelspec.architecture", "ss_base_model_version")
    base = next((header[key] for key in keys if key in header), None)
    layers = [(component, name, factors) for component, part in parts.items() for name, factors in part.items()]
    if json:
        listed = [
            {"component": component, "layer": name, "rank": factors.rank, "alpha": factors.scale * factors.rank}
            for component, name, factors in layers
        ]
        common.print_json({"file": str(file), "base_model": base, "layers": listed, "header": header})
        return
    ranks, alphas = ({f.rank for *_, f in layers}, {f.scale * f.rank for *_, f in layers})
    common.print_facts(
        [
            ("file", str(file)),
            ("base model", base or "not in the header"),
            ("rank", ", ".join(map(str, sorted(ranks)))),
            ("alpha", ", ".join(f"{alpha:g}" for alpha in sorted(alphas))),
            ("layers", str(len(layers))),
        ]
    )
    # One row per kind of layer: a model has hundreds of layers that differ only in their block numbers.
    kinds = Counter((component, re.sub(r"\b\d+\b", "*", name), factors.rank) for component, name, factors in layers)
    common.print_table(["component", "layer", "rank", "count"], [[*kind, n] for kind, n in sorted(kinds.items())])
    if header:
        common.print_table(["header", "value"], sorted(header.items()))


def convert(
    lora: Path = _LORA,
    output: Path = _OUTPUT,
    name: str = _NAME,
    to: str = typer.Option("both", help="diffusers, kohya or both."),
) -> None:
    """Convert a LoRA between diffusers' and kohya's formats."""
    from alignprop_core.errors import UserError
    from alignprop_lora.reading import read_file

    if to not in ("both", "diffusers", "kohya"):
        raise UserError(f"--to {to}: choose diffusers, kohya or both.")
    _write(read_file(lora), output, name, ("diffusers", "kohya") if to == "both" else (to,))


scaling = typer.Typer(add_completion=False, rich_markup_mode=None)
"""An app, because the function of a command cannot name a command class."""


@scaling.command(cls=_TakesNegativeNumbers)
def scale(
    lora: Path = _LORA,
    strength: float = typer.Argument(help="Factor on the weight change, such as 0.7 or -1."),
    output: Path = _OUTPUT,
    name: str = _NAME,
) -> None:
    """Multiply a LoRA's weight change by a factor: the result at strength 1 is the original at that strength."""
    from alignprop_lora.merging import scale as scaled
    from alignprop_lora.reading import read_file

    _write(scaled(read_file(lora), strength), output, name)


def merge(
    loras: list[Path] = typer.Argument(help="Two or more LoRAs for the same base model."),
    output: Path = _OUTPUT,
    weights: str = typer.Option("", help="Weights, one per LoRA, separated by commas; the default is 1/n for each."),
    sweep: str = typer.Option(
        "", help="With two LoRAs: shares of the second, such as 0,0.25,0.5,0.75,1; one folder in --output per share."
    ),
    rank: int | None = typer.Option(
        None, min=1, help="Maximum rank of the result; without it, the result is exact and the ranks add up."
    ),
    name: str = _NAME,
) -> None:
    """Merge LoRAs: the weighted sum of their weight changes, not an average of their factors."""
    from alignprop_core.errors import UserError
    from alignprop_lora.merging import merge as merged
    from alignprop_lora.reading import read_file

    if sweep and (weights or len(loras) != 2):
        raise UserError("--sweep merges two LoRAs at several shares: give two LoRAs and no --weights.")
    read = [read_file(lora) for lora in loras]
    names = [lora.name for lora in loras]
    given = common.numbers(weights, "--weights") if weights else [1 / len(loras)] * len(loras)
    shares = common.numbers(sweep, "--sweep") if sweep else []
    results = [([1 - s, s], output / f"{s:g}", f"{name or output.name}-{s:g}") for s in shares]
    for factors, folder, file in results or [(given, output, name)]:
        result = merged(read, factors, rank=rank, names=names)
        _write(result.lora, folder, file)
        if rank is not None:
            common.print_facts([("rank limit", _approximation(result))])


def fuse(
    lora: Path = _LORA,
    model: str = typer.Option(..., help=f"Base model: {common.MODELS}."),
    output: Path = typer.Option(..., help="Output folder for the complete diffusers model; must be new or empty."),
    strength: float = typer.Option(1.0, help="Factor on the weight change."),
    vae: str | None = typer.Option(None, help="Another autoencoder: a diffusers folder or a hub id."),
    precision: str = typer.Option("fp32", help="Number format of the weights: fp32, fp16 or bf16."),
) -> None:
    """Fuse a LoRA into a model's weights and write the complete model, for programs without LoRA support."""
    common.quiet_libraries()
    from alignprop_core.errors import UserError

    formats = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if precision not in formats:
        raise UserError(f"--precision {precision}: choose fp32, fp16 or bf16.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already and is not empty; choose another folder.")
    from alignprop_lora.reading import read_file

    read = read_file(lora, portable=False)
    with common.status("loading the model"):
        import torch

        from alignprop_core.diffusion.loading import load_pipeline
        from alignprop_core.registry.registry import default_registry
        from alignprop_lora import fusing

        pipeline = load_pipeline(model, registry=default_registry(), device="cpu", parts={"vae": vae} if vae else {})
    result = fusing.fuse(pipeline, read, strength, dtype=getattr(torch, formats[precision]), path=lora)
    fusing.save_pipeline(pipeline, output)
    common.print_facts(
        [
            ("model", str(output)),
            ("layers changed", str(result.layers)),
            ("rounding", f"{precision} differs from the exact weight change by {result.rounding_error:.2%} of it"),
        ]
    )


def _approximation(merged: Merged) -> str:
    """Describe what a rank limit leaves out, which is the user's choice and not a failure."""
    if not merged.max_error_layer:
        return "leaves nothing out: the merge is exact"
    return (
        f"the weight change differs from the exact merge's by {merged.error:.2%} "
        f"(at most {merged.max_error:.2%}, in {merged.max_error_layer}); a higher --rank is closer, no --rank is exact"
    )


def _write(lora: LoraFile, output: Path, name: str, formats: tuple[str, ...] = ("diffusers", "kohya")) -> None:
    from alignprop_core._files import safe_name
    from alignprop_core.lora.files import write_files

    files = write_files(lora, output, name or safe_name(output.absolute().name), formats=formats)
    rank = max(layer.rank for part in lora.parts.values() for layer in part.values())
    common.print_facts([("LoRA", str(file)) for file in files] + [("rank", str(rank))])
