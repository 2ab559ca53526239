"""`alignprop evaluate --strengths` and `--soup`: a table and a JSON file, which plugins may plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from alignprop_core import lora
from alignprop_core._files import write_json
from alignprop_core.cli import common
from alignprop_core.diffusion.sampler import LOADED, Sampler
from alignprop_core.errors import UserError
from alignprop_core.evaluation.evaluator import Evaluator
from alignprop_core.evaluation.sweep import sweep
from alignprop_core.lora.layers import adapter_names
from alignprop_core.registry.registry import Registry
from alignprop_core.training.plugin_callbacks import results_written

_OTHER = "soup"


def evaluate_sweep(
    evaluator: Evaluator,
    *,
    points: Sequence[float],
    soup: Path | None,
    folder: Path | None,
    json: bool,
    registry: Registry,
) -> None:
    """Evaluate the LoRA on the evaluator's model at several strengths, or at several shares of it and another."""
    sampler, prompts = evaluator.sampler, evaluator.prompts
    denoiser = sampler.family.denoiser
    if soup is not None:
        lora.attach_frozen(sampler.family.pipeline, soup, 0.0, _OTHER)
    names = [LOADED] if soup is None else [LOADED, _OTHER]
    _denoiser_only(sampler, names)

    def apply(point: float) -> None:
        lora.set_strength(denoiser, point if soup is None else 1 - point, name=LOADED)
        if soup is not None:
            lora.set_strength(denoiser, point, name=_OTHER)

    @contextmanager
    def base() -> Iterator[None]:
        with ExitStack() as off:
            for name in names:
                off.enter_context(lora.disabled(denoiser, name=name))
            yield

    what = "strength" if soup is None else "share"
    result = sweep(evaluator, name=what, points=points, first=0.0, apply=apply, base=base)
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
    """Refuse LoRAs that change a text encoder: its encodings are cached and would not follow the strength."""
    for component, module in sampler.family.pipeline.components.items():
        changed = isinstance(module, nn.Module) and module is not sampler.family.denoiser
        if changed and adapter_names(module) & set(names):
            raise UserError(f"This LoRA also changes the {component}; sweeps work for LoRAs of the denoiser alone.")
