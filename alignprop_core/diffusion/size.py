"""The size of a run's images, known before any model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from alignprop_core.config.sections import RunConfig
from alignprop_core.locate import find_base, find_vae
from alignprop_core.registry.registry import Registry
from alignprop_core.weights.read import read_json

UNKNOWN_SIZE = (512, 512)
"""Height and width, in pixels, of the trial images if the model's size is not known before it loads."""


def image_size(config: RunConfig, registry: Registry, pipeline: Any = None) -> tuple[int, int] | None:
    """Return (height, width) of a run's images in pixels; loads no model.

    Args:
        config: the run config.
        registry: where registered models are looked up.
        pipeline: a loaded pipeline that is trained instead of `model.base`.

    Returns:
        The size in `sampling`, else the model's own. None if that is not known before the model loads: the model is a
        single file, or a hub model that is not on this machine.
    """
    height, width = config.sampling.height, config.sampling.width
    if height and width:
        return height, width
    own = _size_from_files(config, registry) if pipeline is None else _size_of(pipeline)
    return None if own is None else (height or own[0], width or own[1])


def _size_of(pipeline: Any) -> tuple[int, int] | None:
    network = getattr(pipeline, "unet", getattr(pipeline, "transformer", None))
    side = getattr(getattr(network, "config", None), "sample_size", None)
    return _pixels(side, getattr(pipeline, "vae_scale_factor", None))


def _size_from_files(config: RunConfig, registry: Registry) -> tuple[int, int] | None:
    base = find_base(config.model.base, registry)
    network = _settings(base, "unet") or _settings(base, "transformer")
    vae = find_vae(config.model.vae) if config.model.vae is not None else base
    settings = _settings(vae, "vae") or _settings(vae, "")
    levels = settings.get("block_out_channels") or settings.get("decoder_block_out_channels")
    return _pixels(network.get("sample_size"), 2 ** (len(levels) - 1) if levels else None)


def _pixels(side: Any, factor: int | None) -> tuple[int, int] | None:
    """Return the size in pixels, (height, width), of a latent's side or sides; None if it is not known."""
    if not side or not factor:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return int(height * factor), int(width * factor)


def _settings(model: Path | str, part: str) -> dict[str, Any]:
    """Return the config.json of a network in a folder or in the hub cache; empty if there is none."""
    name = f"{part}/config.json" if part else "config.json"
    file: Any = Path(model) / name
    if isinstance(model, str) and not Path(model).is_dir():
        file = try_to_load_from_cache(model, name)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    return read_json(Path(file))
