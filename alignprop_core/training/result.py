"""The result of a run, opened from its folder: metrics, evaluation, LoRA, images and pipeline. No torch at import."""

from __future__ import annotations

import json
import os
import warnings
from base64 import b64encode
from collections.abc import Sequence
from functools import cached_property
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_core.config.base import as_section
from alignprop_core.config.load import read_run
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import under
from alignprop_core.evaluation.table import EvaluationTable
from alignprop_core.locate import DIFFUSERS_NAME, find_base, find_lora
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.runs.folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

    from alignprop_core.diffusion.sampler import Sampler

_SHEET_WIDTH = 900
"""Pixels of the image in a notebook."""


class Run:
    """A run: what training returns, and what `Run("runs/red")` opens. Usable as the path of its folder.

    Args:
        folder: the run folder.
        model: a loaded pipeline to use instead of the run's base model; needed for a run on a pipeline that has no name
            to load it by. `sample` leaves it as it was.
        registry: installed plugins; discovered if None.
        trained: the pipeline that was trained, for `sample`; loaded when needed if None.

    Raises:
        OutputError: the folder is not a run folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: Any = None,
        registry: Registry | None = None,
        trained: Any = None,
    ) -> None:
        self.folder = RunFolder.open(Path(folder), lock=False).path
        self.registry = registry or default_registry()
        self._model, self._trained = model, model or trained

    # -- what is in the folder ----------------------------------------------------------------------------------

    @cached_property
    def config(self) -> RunConfig:
        """The run config, complete; `ConfigError` if config.yaml is wrong."""
        return as_section(RunConfig, read_run(self.folder), "", {"registry": self.registry})

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per step: step, total, the terms, grad_norm and so on; read anew each time."""
        return [row for row in self._rows() if "terms" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations while training (`evaluation.every`): step, total, scores, drift, diversity."""
        return [{"step": row["step"], **row["evaluation"]} for row in self._rows() if "evaluation" in row]

    @property
    def evaluation(self) -> EvaluationTable | None:
        """Base against tuned on held-out prompts, as a table; None if the run has no evaluation."""
        path = self.folder / "evaluation.json"
        return EvaluationTable(json.loads(path.read_bytes())) if path.is_file() else None

    @property
    def lora(self) -> Path:
        """The LoRA in diffusers' format. ComfyUI's is beside it."""
        return self.folder / "lora" / DIFFUSERS_NAME

    @property
    def report(self) -> Path:
        """The HTML report, which alignprop-report writes."""
        return self.folder / "report.html"

    def _rows(self) -> list[dict[str, Any]]:
        return RunFolder.open(self.folder, lock=False).read_metrics()

    # -- images -------------------------------------------------------------------------------------------------

    def sample(
        self, prompts: str | Sequence[str], seed: int = 0, *, lora: bool = True, strength: float = 1.0
    ) -> list[Image]:
        """Generate one image per prompt with the run's sampling settings; the model is loaded once and kept.

        Args:
            prompts: the prompts; each has its own generator of this seed.
            seed: the seed, as in diffusers.
            lora: False for the base model.
            strength: factor on the LoRA's weight change.
        """
        from alignprop_core.lora.swapping import applied
        from alignprop_core.training.given_pipeline import own_adapters

        sampler = self._sampler
        pipeline = sampler.family.pipeline
        loras: list[tuple[str | Path, float]] = [(extra.path, extra.strength) for extra in self.config.model.loras]
        if lora:
            loras.append((find_lora(self.lora), strength))
        texts = [prompts] if isinstance(prompts, str) else prompts
        with applied(pipeline, loras, own_adapters(pipeline)):
            return [sampler([text], seed=seed, output="pil")[0] for text in texts]

    @cached_property
    def _sampler(self) -> Sampler:
        from alignprop_core.diffusion.sampler import Sampler

        config = self.config
        if self._trained is None:
            with under("model.base"):
                find_base(config.model.base, self.registry)
        return Sampler.load(
            config.model.base if self._trained is None else self._trained,
            sampling=config.sampling,
            mixed_precision=config.training.mixed_precision,
            registry=self.registry,
            parts=config.model.parts,
        )

    def pipeline(self, *, lora: bool = True) -> Any:
        """Return a plain diffusers pipeline with the LoRA loaded by `load_lora_weights`, and the model's scheduler.

        It is loaded anew; for a run on a loaded pipeline it is that pipeline, without alignprop's adapters.

        Args:
            lora: False for the base model.
        """
        from alignprop_core.devices import choose_device, network_dtype
        from alignprop_core.diffusion.loading import load_pipeline
        from alignprop_core.lora.adapters import ADAPTER
        from alignprop_core.lora.swapping import active_adapters, also_activate
        from alignprop_core.training.given_pipeline import detach_own

        config, pipeline = self.config, self._model
        if pipeline is None:
            device = choose_device("auto")
            dtype = network_dtype(config.training.mixed_precision, device)
            base, parts = config.model.base, config.model.parts
            with under("model.base"):
                pipeline = load_pipeline(base, registry=self.registry, device=device, dtype=dtype, parts=parts)
        else:
            detach_own(pipeline)
        others = active_adapters(pipeline)  # LoRAs that the passed pipeline has; loading another switches them off
        # Names of adapters that a later training on the pipeline removes.
        loras = {f"frozen_{i}": (Path(extra.path), extra.strength) for i, extra in enumerate(config.model.loras)}
        if lora:
            loras[ADAPTER] = (self.lora, 1.0)
        for name, (path, _) in loras.items():
            file = find_lora(path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        if loras:
            pipeline.set_adapters(list(loras), [strength for _, strength in loras.values()])
            also_activate(others, loras)
        return pipeline

    # -- as a path ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, part: str | os.PathLike[str]) -> Path:
        """Return the path of a file in the folder: `run / "lora"`."""
        return self.folder / part

    def __str__(self) -> str:
        """Return the folder."""
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    # -- in a notebook ------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        """Return the before/after sheet or the last preview, the evaluation, and where the LoRA is."""
        images = self.folder / "images"
        sheets = [images / "before_after.png", *sorted(images.glob("step-*.png"), reverse=True)]
        sheet = next((inline_image(path) for path in sheets if path.is_file()), "")
        table = "" if self.evaluation is None else self.evaluation._repr_html_()
        return f"{sheet}{table}<p>LoRA: <code>{escape(str(self.lora))}</code></p>"


def inline_image(path: Path) -> str:
    """Return an image file as HTML that contains it, small enough for a notebook."""
    from PIL import Image

    content = BytesIO()
    with Image.open(path) as image:
        image.thumbnail((_SHEET_WIDTH, 4 * _SHEET_WIDTH))
        image.convert("RGB").save(content, "JPEG", quality=85)
    return f'<img alt="{escape(path.stem)}" src="data:image/jpeg;base64,{b64encode(content.getvalue()).decode()}">'
