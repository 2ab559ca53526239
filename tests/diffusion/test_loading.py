"""Base models by name, folder and hub id: frozen, never unpickled, with errors that list what was tried."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.errors import ModelError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import ModelSpec

FOLDER = Path()


def folder_of_the_model() -> Path:
    return FOLDER


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture
def registry(model: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(f"{__name__}.FOLDER", model)

    @hookimpl
    def alignprop_register_models() -> list[ModelSpec]:
        return [ModelSpec(name="tiny", summary="For tests.", path=f"{__name__}:folder_of_the_model")]

    return Registry.from_plugins({"tiny-model": SimpleNamespace(alignprop_register_models=alignprop_register_models)})


def weights(pipeline: Any) -> torch.Tensor:
    value: torch.Tensor = pipeline.unet.conv_in.weight
    return value.contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folder_loads_frozen_in_eval_mode_and_in_the_requested_dtype(
    model: Path, registry: Registry, dtype: torch.dtype
) -> None:
    pipeline = load_pipeline(str(model), registry=registry, dtype=dtype)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not part.training
        assert all(not p.requires_grad and p.dtype == dtype for p in part.parameters())


def test_registered_name_gives_the_folders_model(model: Path, registry: Registry) -> None:
    named, direct = (load_pipeline(base, registry=registry) for base in ("tiny", str(model)))
    assert torch.equal(weights(named), weights(direct))


def test_another_vae(tiny_sd: Callable[..., Any], model: Path, registry: Registry, tmp_path: Path) -> None:
    other = tiny_sd(seed=9)
    other.save_pretrained(tmp_path / "whole")
    other.vae.save_pretrained(tmp_path / "vae_alone")
    expected = other.vae.decoder.conv_in.weight
    for vae in (tmp_path / "whole", tmp_path / "vae_alone"):
        pipeline = load_pipeline(str(model), registry=registry, parts={"vae": str(vae)})
        assert torch.equal(pipeline.vae.decoder.conv_in.weight.contiguous(), expected)
        assert not any(p.requires_grad for p in pipeline.vae.parameters())


def test_errors_for_unknown_names_list_what_was_tried(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='Did you mean "tiny"'):
        load_pipeline("tinny", registry=registry)
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_pipeline(str(tmp_path), registry=registry)
    with pytest.raises(ModelError, match="does not exist"):
        load_pipeline(str(tmp_path / "gone.safetensors"), registry=registry)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers calls its hub library so
def test_hub_id_that_cannot_be_reached_is_named(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"^model\.base: nobody/nothing is not on this machine"):
        load_pipeline("nobody/nothing", registry=registry)


def test_pickled_weights_are_never_read(model: Path, registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (str(tmp_path / "executed"),))

    torch.save({"x": 1}, folder / "unet" / "diffusion_pytorch_model.bin")
    import pickle

    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError):
        load_pipeline(str(folder), registry=registry)
    assert not (tmp_path / "executed").exists()


def test_broken_weights_are_named(model: Path, registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_pipeline(str(folder), registry=registry)
