"""What `alignprop evaluate` does with --strengths and --soup: a table and a JSON file, which plugins may plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from alignprop_core import lora
from alignprop_core._files import write_json
from alignprop_core.cli import common
from alignprop_core.cli.models import TRAINED
from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import UserError
from alignprop_core.evaluation.diversity import Encoder
from alignprop_core.evaluation.sweep import curve
from alignprop_core.lora.layers import adapter_names
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.registry.registry import Registry
from alignprop_core.training.plugin_callbacks import results_written
from alignprop_core.training.progress import progress_bar

_OTHER = "soup"


def evaluate_curve(
    sampler: Sampler,
    terms: Sequence[Term],
    prompts: PromptSet,
    config: EvaluationConfig,
    encoder: Encoder,
    *,
    points: Sequence[float],
    soup: Path | None,
    folder: Path | None,
    json: bool,
    registry: Registry,
) -> None:
    """Evaluate the LoRA on the sampler's model at several strengths, or at several shares of it and another."""
    denoiser = sampler.family.denoiser
    if soup is not None:
        lora.attach_frozen(sampler.family.pipeline, soup, 0.0, _OTHER)
    names = [TRAINED] if soup is None else [TRAINED, _OTHER]
    _denoiser_only(sampler, names)

    def put(point: float) -> None:
        lora.set_strength(denoiser, point if soup is None else 1 - point, name=TRAINED)
        if soup is not None:
            lora.set_strength(denoiser, point, name=_OTHER)

    @contextmanager
    def base() -> Iterator[None]:
        with ExitStack() as off:
            for name in names:
                off.enter_context(lora.disabled(denoiser, name=name))
            yield

    with progress_bar(common.console(stderr=True)) as bar:
        total = len({*points, 0.0}) * len(prompts) * config.images_per_prompt
        task = bar.add_task("evaluating", total=total, figures="")
        result = curve(
            sampler,
            terms,
            prompts,
            config,
            name="strength" if soup is None else "share",
            points=points,
            first=0.0,
            put=put,
            base=base,
            encoder=encoder,
            advance=lambda images: bar.advance(task, images),
        )
    name = "strengths" if soup is None else "soup"
    data = result.as_json() | ({} if soup is None else {"soup": str(soup)})
    files = []
    if folder is not None:
        files = [folder / f"{name}.json", folder / "images" / f"{name}.png"]
        write_json(files[0], data)
        results_written(folder, registry)
    if json:
        common.print_json(data)
        return
    console = common.console()
    console.print(f"\n{data['images']} images of {len(prompts)} prompts ({prompts.name}) at each {result.name}")
    common.print_table(*result.rows())
    if files:
        shown = [("results", files[0]), ("plot", files[1])]
        common.print_facts([(what, str(path)) for what, path in shown if path.is_file()])


def _denoiser_only(sampler: Sampler, names: Sequence[str]) -> None:
    """Refuse LoRAs that change a text encoder: its encodings are kept, and would not follow the strength."""
    for component, module in sampler.family.pipeline.components.items():
        changed = isinstance(module, nn.Module) and module is not sampler.family.denoiser
        if changed and adapter_names(module) & set(names):
            raise UserError(f"This LoRA also changes the {component}; curves are for LoRAs of the denoiser alone.")
