"""Every weight of a base model comes from its file: incomplete files are refused, complete ones load unchanged."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.errors import ModelError
from alignprop_core.registry.registry import Registry
from tests.support.single_file import single_file_weights

NETWORKS = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
COUNTS = {"text_encoder": 36, "unet": 208, "vae": 180}
LINKS = "ignore:The `local_dir_use_symlinks`:UserWarning"  # diffusers calls its hub library so

Weights = dict[str, torch.Tensor]


@pytest.fixture
def registry() -> Registry:
    return Registry.from_plugins({})


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged; caplog listens at the root, to which the libraries' loggers pass nothing on."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def file_of(folder: Path, part: str) -> Path:
    (found,) = (folder / part).glob("*.safetensors")
    return found


def change(file: Path, how: Callable[[Weights], Weights]) -> None:
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def assert_same_weights(loaded: Any, expected: Any) -> None:
    for part in NETWORKS:
        ours, theirs = getattr(loaded, part).state_dict(), getattr(expected, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value.contiguous(), theirs[name]), f"{part}: {name}"


@pytest.mark.parametrize("part", NETWORKS)
def test_missing_weights_are_refused_with_part_path_number_and_names(
    part: str, folder: Path, registry: Registry, said: pytest.LogCaptureFixture
) -> None:
    names = sorted(load_file(file_of(folder, part)))[5:10]
    change(file_of(folder, part), without(*names))
    with pytest.raises(ModelError) as caught:
        load_pipeline(str(folder), registry=registry)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith(f"{part} at {folder / part} does not fit: ")
    shown = ", ".join(name.removeprefix("text_model.") for name in names[:3])
    assert f"5 of the {COUNTS[part]} weights of {NETWORKS[part]} missing ({shown} and 2 more)" in message
    assert "download it again" in message
    assert not said.records, "the libraries' own report stands beside the one message"


@pytest.mark.parametrize("part", NETWORKS)
def test_weights_of_another_shape_are_refused_with_both_shapes(part: str, folder: Path, registry: Registry) -> None:
    weights = load_file(file_of(folder, part))
    name = max(weights)
    change(file_of(folder, part), lambda weights: {**weights, name: torch.zeros(3, 5)})
    with pytest.raises(ModelError) as caught:
        load_pipeline(str(folder), registry=registry)
    shapes = f"{name.removeprefix('text_model.')} is (3, 5), not {tuple(weights[name].shape)}"
    assert f"1 of the {COUNTS[part]} weights of {NETWORKS[part]} of another shape ({shapes})" in str(caught.value)
    assert "missing" not in str(caught.value)


def test_names_of_another_version_are_refused(folder: Path, registry: Registry) -> None:
    """A text encoder with random weights would ignore every prompt."""
    import transformers

    change(file_of(folder, "text_encoder"), lambda weights: {f"v9.{name}": value for name, value in weights.items()})
    with pytest.raises(ModelError, match="36 of the 36 weights") as caught:
        load_pipeline(str(folder), registry=registry)
    assert f"transformers than the installed {transformers.__version__}" in str(caught.value)


def test_shard_without_the_weights_its_index_promises_is_refused(
    folder: Path, tiny_sd: Callable[..., Any], registry: Registry
) -> None:
    shutil.rmtree(folder / "unet")
    unet = tiny_sd().unet
    unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    assert_same_weights(load_pipeline(str(folder), registry=registry), tiny_sd())
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    gone = min(load_file(shards[-1]))
    change(shards[-1], without(gone))
    with pytest.raises(ModelError, match=rf"1 of the 208 weights of UNet2DConditionModel missing \({gone}\)"):
        load_pipeline(str(folder), registry=registry)


def test_truncated_text_encoder_is_refused_with_its_path(folder: Path, registry: Registry) -> None:
    file = file_of(folder, "text_encoder")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"text_encoder at {folder / 'text_encoder'} is damaged"):
        load_pipeline(str(folder), registry=registry)


def test_another_vae_is_checked_in_the_same_way(tiny_model: Path, folder: Path, registry: Registry) -> None:
    change(file_of(folder, "vae"), without("decoder.conv_out.bias"))
    for vae in (folder, folder / "vae"):
        with pytest.raises(ModelError, match=rf"vae at {folder / 'vae'} .* missing \(decoder\.conv_out\.bias\)"):
            load_pipeline(str(tiny_model), registry=registry, parts={"vae": str(vae)})
    # The one that is replaced is not even looked at.
    load_pipeline(str(folder), registry=registry, parts={"vae": str(tiny_model)})


def test_unexpected_weights_are_ignored_with_a_warning(
    folder: Path, tiny_sd: Callable[..., Any], registry: Registry, said: pytest.LogCaptureFixture
) -> None:
    change(file_of(folder, "unet"), lambda weights: {**weights, "trainer_state.step": torch.zeros(1)})
    assert_same_weights(load_pipeline(str(folder), registry=registry), tiny_sd())
    (record,) = said.records
    assert record.levelno == logging.WARNING
    assert "trainer_state.step" in record.getMessage()


def test_every_file_is_read_once(folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import transformers

    read: list[str] = []
    for name in NETWORKS.values():
        kind = getattr(diffusers, name, None) or getattr(transformers, name)

        def spy(_: Any, /, *args: Any, original: Any = kind.from_pretrained, kind: str = name, **kwargs: Any) -> Any:
            read.append(kind)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(spy))
    load_pipeline(str(folder), registry=registry)
    assert sorted(read) == sorted(NETWORKS.values())


def as_stable_diffusion_1(folder: Path) -> None:
    """Lay a folder out as Stable Diffusion 1.5 is published: names of its day, and files that nobody needs beside."""
    from transformers import CLIPImageProcessor

    attention = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(weights: Weights) -> Weights:
        for ours, old in attention.items():
            weights = {
                name.replace(f"attentions.0.{ours}.", f"attentions.0.{old}."): value for name, value in weights.items()
            }
        return weights

    def with_position_ids(weights: Weights) -> Weights:
        return {
            **{f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()},
            "text_model.embeddings.position_ids": torch.arange(77)[None],
        }

    change(file_of(folder, "vae"), renamed)
    assert any(".query." in name for name in load_file(file_of(folder, "vae")))
    change(file_of(folder, "text_encoder"), with_position_ids)
    for part in NETWORKS:
        file = file_of(folder, part)
        half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.with_suffix(".bin").write_bytes(b"a pickle, which is not opened")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not looked at")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
    }
    index.pop("requires_safety_checker", None)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def test_folder_in_the_layout_of_stable_diffusion_1_loads_completely_without_a_warning(
    folder: Path, tiny_sd: Callable[..., Any], registry: Registry, said: pytest.LogCaptureFixture
) -> None:
    as_stable_diffusion_1(folder)
    pipeline = load_pipeline(str(folder), registry=registry)
    assert pipeline.safety_checker is None
    assert_same_weights(pipeline, tiny_sd())
    assert not said.records


def test_half_precision_folder_loads(folder: Path, registry: Registry, said: pytest.LogCaptureFixture) -> None:
    for part in NETWORKS:
        change(file_of(folder, part), lambda weights: {name: value.half() for name, value in weights.items()})
    load_pipeline(str(folder), registry=registry)
    assert not said.records


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Put a folder into a hub cache of this test's own, as a download leaves it; returns the snapshot."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, folder: Path) -> Path:
        base, commit = tmp_path / "hub" / f"models--{repository.replace('/', '--')}", "0" * 40
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(commit, encoding="utf-8")
        return Path(shutil.copytree(folder, base / "snapshots" / commit))

    return put


@pytest.mark.filterwarnings(LINKS)
def test_hub_id_in_the_cache_loads_offline_and_is_checked_in_the_same_way(
    folder: Path, tiny_sd: Callable[..., Any], registry: Registry, cache: Callable[[str, Path], Path]
) -> None:
    as_stable_diffusion_1(folder)
    snapshot = cache("owner/name", folder)
    pipeline = load_pipeline("owner/name", registry=registry)
    assert_same_weights(pipeline, tiny_sd())
    assert pipeline.name_or_path == "owner/name"
    file = snapshot / "text_encoder" / "model.safetensors"
    change(file, without("text_model.final_layer_norm.bias"))
    with pytest.raises(ModelError, match=r"text_encoder at .*owner--name.* missing \(final_layer_norm\.bias\)"):
        load_pipeline("owner/name", registry=registry)


@pytest.mark.filterwarnings(LINKS)
def test_single_file_loads_completely_or_not_at_all(
    tiny_model: Path,
    tmp_path: Path,
    tiny_sd: Callable[..., Any],
    registry: Registry,
    cache: Callable[[str, Path], Path],
) -> None:
    cache("stable-diffusion-v1-5/stable-diffusion-v1-5", tiny_model)  # diffusers takes the configurations from there
    file = tmp_path / "whole.safetensors"
    save_file(single_file_weights(tiny_sd()), file)
    assert_same_weights(load_pipeline(str(file), registry=registry), tiny_sd())
    encoder, unet, vae = (
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_out.bias",
    )
    for name, expected in {
        encoder: rf"text_encoder at {file} .* missing \(final_layer_norm\.bias\)",
        unet: f"{file} lacks weights of its denoiser or vae",
        vae: f"{file} lacks weights of its denoiser or vae",
    }.items():
        save_file(without(name)(single_file_weights(tiny_sd())), file)
        with pytest.raises(ModelError, match=expected):
            load_pipeline(str(file), registry=registry)
