"""Models in separate files, as ComfyUI keeps them, or in one: images equal those of the diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import ModelError
from alignprop_core.testing.pipelines import tiny_pipeline
from tests.support.original_names import original_weights
from tests.support.single_file import open_clip_weights, unet_weights, vae_weights

STEPS = 2
WHOLE = ["stable_diffusion_xl", "stable_diffusion_3"]
"""Families of which people have complete models in one file."""
FAMILIES = [*WHOLE, "flux", "z_image"]
SIZE = {"width": 32, "height": 32}


def image(model: Path, parts: Mapping[str, Path] | None = None) -> Tensor:
    given = {part: str(file) for part, file in (parts or {}).items()}
    sampler = Sampler.load(model, sampling={"steps": STEPS, "guidance_scale": 2.0, **SIZE}, parts=given)
    with torch.no_grad():
        return sampler(["a fox"], generator=torch.Generator().manual_seed(3))


def save(tensors: Mapping[str, Tensor], file: Path) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, file)
    return file


def separate(pipe: Any, folder: Path) -> dict[str, Path]:
    """Write each network into a file as ComfyUI's users have it; returns part -> file."""
    prefix = "model.diffusion_model."
    names = [name for name in pipe.components if name == "vae" or name.startswith("text_encoder")]
    weights = {name: dict(getattr(pipe, name).state_dict()) for name in names if getattr(pipe, name) is not None}
    if hasattr(pipe, "unet"):
        weights["unet"] = {f"{prefix}{name}": value for name, value in unet_weights(pipe.unet).items()}
    elif type(pipe.transformer).__name__ == "FluxTransformer2DModel":
        weights["transformer"] = dict(pipe.transformer.state_dict())  # diffusers converts FLUX.1's true width alone
    else:
        original = original_weights(pipe.transformer)
        weights["transformer"] = {f"{prefix}{name}": value for name, value in original.items()}
    weights["vae"] = vae_weights(pipe.vae)
    # transformers 4, whose names these files have, keeps CLIP's layers in "text_model".
    for name, part in weights.items():
        if name.startswith("text_encoder") and "CLIP" in type(getattr(pipe, name)).__name__:
            outer = ("text_model.", "text_projection.")
            weights[name] = {
                key if key.startswith(outer) else f"text_model.{key}": value for key, value in part.items()
            }
    return {name: save(part, folder / f"{name}.safetensors") for name, part in weights.items()}


def without_weights(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Path]]:
    """A diffusers folder, its copy without weights, and the weights in one file for each part."""
    folder = tmp_path_factory.mktemp("parts")
    pipe = tiny_pipeline(request.param)
    pipe.save_pretrained(folder / "model")
    return folder / "model", without_weights(folder / "model", folder / "configs"), separate(pipe, folder)


def test_the_image_equals_that_of_the_folder(case: tuple[Path, Path, dict[str, Path]]) -> None:
    model, configs, files = case
    torch.testing.assert_close(image(configs, files), image(model), atol=1e-5, rtol=0)


def test_8_bit_weights_are_cast_up_and_multiplied_by_their_scales(
    case: tuple[Path, Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, configs, files = case
    part = "unet" if "unet" in files else "transformer"
    plain, scaled, upcast = {}, {}, {}
    for name, value in load_file(files[part]).items():
        small = value.to(torch.float8_e4m3fn)
        plain[name], upcast[name] = (small, small.float()) if value.ndim > 1 else (value, value)
        scaled[name] = (value * 4).to(torch.float8_e4m3fn) if value.ndim > 1 and name.endswith(".weight") else value
    expected = image(configs, files | {part: save(upcast, tmp_path / "upcast.safetensors")})
    found = image(configs, files | {part: save(plain, tmp_path / "fp8.safetensors")})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - image(model)).abs().max() > 1e-4

    factors = {
        name.removesuffix("weight") + "scale_weight": torch.tensor(0.25)
        for name, value in scaled.items()
        if value.dtype == torch.float8_e4m3fn
    }
    marked = scaled | factors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    upcast = {name: value.float() * (0.25 if value.element_size() == 1 else 1) for name, value in scaled.items()}
    expected = image(configs, files | {part: save(upcast, tmp_path / "upcast.safetensors")})
    found = image(configs, files | {part: save(marked, tmp_path / "scaled.safetensors")})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def refused(model: Path, files: Mapping[str, Path]) -> str:
    with pytest.raises(ModelError) as caught:
        image(model, files)
    return str(caught.value)


def test_what_is_missing_or_wrong_is_refused_by_name(case: tuple[Path, Path, dict[str, Path]], tmp_path: Path) -> None:
    model, configs, files = case
    encoder = max(part for part in files if part.startswith("text_encoder"))
    message = refused(configs, {part: file for part, file in files.items() if part != encoder})
    assert f"model.{encoder} is not set" in message
    assert f"{configs / encoder} has no weights" in message

    part = "unet" if "unet" in files else "transformer"
    other = "transformer" if part == "unet" else "unet"
    assert f"model.{other}: the model has no such part" in refused(model, {other: files[part]})
    assert f"{files['vae']} does not fit" in refused(model, {part: files["vae"]})
    assert f"text_encoder at {files['vae']} does not fit" in refused(model, {"text_encoder": files["vae"]})

    weights = load_file(files[part])
    name = next(name for name, value in weights.items() if value.ndim > 1)
    whole = save({**weights, name: torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    assert "quantized weights that alignprop does not read" in refused(model, {part: whole})
    lacking = save({key: value for key, value in weights.items() if key != name}, tmp_path / "lacking.safetensors")
    assert str(lacking) in refused(model, {part: lacking})
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "model.gguf is a quantized GGUF file" in refused(model, {part: tmp_path / "model.gguf"})
    assert f"gone.safetensors does not exist; model.{part} is one" in refused(
        model, {part: tmp_path / "gone.safetensors"}
    )
    assert "model.base" in refused(files[part], {"text_encoder": files["text_encoder"]})


def whole_file(pipe: Any, file: Path) -> Path:
    """Write a complete model into one file in the original code's names."""
    xl = hasattr(pipe, "unet")
    denoiser = unet_weights(pipe.unet) if xl else original_weights(pipe.transformer)
    found = {f"model.diffusion_model.{name}": value for name, value in denoiser.items()}
    found |= {f"first_stage_model.{name}": value for name, value in vae_weights(pipe.vae).items()}
    first, second = pipe.text_encoder.state_dict(), pipe.text_encoder_2.state_dict()
    if xl:
        start = "conditioner.embedders.0.transformer.text_model."
        found |= {start + name.removeprefix("text_model."): value for name, value in first.items()}
        found |= {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip_weights(second).items()}
    else:
        for start, part in {"clip_l": first, "clip_g": second}.items():
            found |= {f"text_encoders.{start}.transformer.{name}": value for name, value in part.items()}
    return save(found, file)


def distinguishable(pipe: Any) -> Any:
    """Give a pipeline what diffusers knows its kind of file by: numbers of layers, encoders of two widths."""
    torch.manual_seed(0)
    xl, widths = hasattr(pipe, "unet"), {"text_encoder": 16, "text_encoder_2": 48}
    for name, width in widths.items():
        encoder = getattr(pipe, name)
        sizes = {"hidden_size": width, "num_hidden_layers": 10 if name.endswith("2") else 2}
        sizes |= {} if xl else {"projection_dim": 16}
        setattr(pipe, name, type(encoder)(CLIPTextConfig(**encoder.config.to_dict() | sizes)).eval())
    if not xl:
        with torch.no_grad():  # a file has no projection of the first encoder
            pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))
        pipe.transformer = SD3Transformer2DModel.from_config({**pipe.transformer.config, "num_layers": 38}).eval()
    return pipe


@pytest.mark.parametrize("family", WHOLE)
def test_a_complete_model_in_one_file_gives_the_image_of_the_folder(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = distinguishable(tiny_pipeline(family))
    pipe.save_pretrained(tmp_path / "model")
    file = whole_file(pipe, tmp_path / "whole.safetensors")
    # The configs are those of the model's repository, here in a cache of this test's own.
    kind = {
        "stable_diffusion_xl": "stable-diffusion-xl-base-1.0",
        "stable_diffusion_3": "stable-diffusion-3.5-large",
    }
    base = tmp_path / "hub" / f"models--stabilityai--{kind[family]}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    without_weights(tmp_path / "model", base / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(image(file), image(tmp_path / "model"), atol=1e-5, rtol=0)


def test_flux_in_the_original_names_is_converted_completely() -> None:
    """At its true width, on the meta device."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        converted = convert_flux_transformer_checkpoint_to_diffusers(original_weights(network))
    expected = {name: value.shape for name, value in network.state_dict().items()}
    assert {name: value.shape for name, value in converted.items()} == expected
