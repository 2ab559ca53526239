"""Base models as people have them: each runs as diffusers runs it, or is refused with one message that names it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from alignprop_core.diffusion import loading, networks
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import UserError
from alignprop_core.registry.registry import Registry
from tests.support.single_file import single_file_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of torch, with numpy 2
]
slow = pytest.mark.slow

Edit = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def load(base: Path, **options: Any) -> Sampler:
    settings = {"steps": 2, "guidance_scale": 3.0} | options.pop("sampling", {})
    return Sampler.load(str(base), sampling=settings, device="cpu", registry=Registry.from_plugins({}), **options)


def refusal(base: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(base, **options)
    assert "\n" not in str(caught.value), "one message on one line"
    return str(caught.value)


def image(sampler: Sampler) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = sampler(["a fox"], generator=torch.Generator().manual_seed(1))
    return found


def own_image(pipe: Any, **options: Any) -> torch.Tensor:
    """Return what diffusers' pipeline itself generates."""
    pipe.set_progress_bar_config(disable=True)
    start = torch.Generator().manual_seed(1)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": start, "output_type": "pt"} | options
    found: torch.Tensor = pipe("a fox", **settings).images
    return found


def edit(name: str, **values: Any) -> Edit:
    """Change keys of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text(encoding="utf-8")) | values
        kept = {key: value for key, value in content.items() if value is not ...}
        file.write_text(json.dumps(kept), encoding="utf-8")

    return change


def index(**values: Any) -> Edit:
    return edit("model_index.json", **values)


def scheduler(**values: Any) -> Edit:
    return edit("scheduler/scheduler_config.json", **values)


def remove(*names: str) -> Edit:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:90])


def rebuild(part: str, kind: Any, **values: Any) -> Edit:
    """Replace a network by one of another configuration, with random weights."""

    def change(folder: Path) -> None:
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        options = {key: value for key, value in config.items() if not key.startswith("_")} | values
        shutil.rmtree(folder / part)
        kind(**options).save_pretrained(folder / part)

    return change


def unet(**values: Any) -> Edit:
    return rebuild("unet", UNet2DConditionModel, **values)


def other_scheduler(name: str, **values: Any) -> Edit:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "scheduler")
        getattr(diffusers, name)(**values).save_pretrained(folder / "scheduler")
        index(scheduler=["diffusers", name])(folder)

    return change


def code(folder: Path) -> None:
    """Put a pipeline of its own code into the folder, as the hub has some."""
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')", encoding="utf-8")
    index(_class_name=["own", "Pipeline"])(folder)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

REFUSED: dict[str, tuple[Edit, str]] = {
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "is not a diffusers folder: it has no model_index.json"),
    "index cut off": (cut("model_index.json"), "model_index.json' is not a valid JSON file"),
    "index of a list": (lambda f: (f / "model_index.json").write_text("[]"), "names no pipeline class"),
    "index without a class": (index(_class_name=...), "names no pipeline class"),
    "unknown class": (
        index(_class_name="FancyPipeline"),
        "run a FancyPipeline; it runs Flux",
    ),
    "inpainting class": (index(_class_name="StableDiffusionInpaintPipeline"), "run a StableDiffusionInpaintPipeline"),
    "refiner": (index(_class_name="StableDiffusionXLImg2ImgPipeline"), "cannot run a StableDiffusionXLImg2ImgPipe"),
    "own code": (code, "cannot run a .*own.*Pipeline"),
    "no text encoder": (index(text_encoder=[None, None]), "The model has no text_encoder"),
    "no tokenizer": (index(tokenizer=...), "The model has no tokenizer"),
    "no VAE": (index(vae=[None, None]), "The model has no vae"),
    "unknown class of a part": (index(unet=["diffusers", "UNet9D"]), "`diffusers` has no class `UNet9D`"),
    "UNet's folder missing": (remove("unet"), "unet at .* could not be loaded: .*no file named config.json"),
    "UNet's config cut off": (cut("unet/config.json"), "unet.config.json: cannot be read as JSON"),
    "scheduler's folder missing": (remove("scheduler"), "no file named scheduler_config.json"),
    "tokenizer's folder missing": (remove("tokenizer"), "tokenizer at .*model has 2 tokens and the text encoder 514"),
    "tokenizer without a vocabulary": (
        remove("tokenizer/tokenizer.json"),
        r"tokenizer at .*tokenizer has 2 tokens .*vocab\.json and merges\.txt, or tokenizer\.json\) is missing",
    ),
    "tokenizer without its config": (remove("tokenizer/tokenizer_config.json"), "tokenizer_config.json is missing"),
    "inpainting UNet": (unet(in_channels=9), "UNet has 9 input channels .* an inpainting model"),
    "editing UNet": (unet(in_channels=8), "UNet has 8 input channels .*InstructPix2Pix"),
    "UNet with a variance": (unet(out_channels=8), "4 input channels and 8 output channels"),
    "UNet of Stable Diffusion XL": (
        unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
        "addition_embed_type: text_time.* Stable Diffusion XL",
    ),
    "upscaler": (unet(num_class_embeds=10), "num_class_embeds: 10"),
    "UNet of another text encoder": (unet(cross_attention_dim=64), "gives 32 numbers per token and the UNet reads 64"),
    "latent consistency": (unet(time_cond_proj_dim=8), "latent consistency model"),
    "16-channel VAE": (rebuild("vae", AutoencoderKL, latent_channels=16), "VAE has 16 latent channels and the UNet 4"),
    "UNet without a size": (unet(sample_size=None), r"sampling\.width and sampling\.height must be set"),
    "pickled UNet": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
        "unet at .* no file named diffusion_pytorch_model.safetensors",
    ),
    "link to nothing": (
        lambda f: (remove("unet/diffusion_pytorch_model.safetensors")(f), (f / "unet/x.safetensors").symlink_to("no")),
        "unet at .* no file named diffusion_pytorch_model.safetensors",
    ),
    "flow matching": (other_scheduler("FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler.*matching"),
    "flow prediction": (scheduler(prediction_type="flow_prediction"), "prediction_type: flow_prediction"),
    "misspelt spacing": (scheduler(timestep_spacing="traling"), 'Did you mean "trailing"'),
    "noise predicted at zero SNR": (
        scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        "zero terminal SNR",
    ),
}


ALSO_ELSEWHERE = {
    *("flow matching", "flow prediction", "misspelt spacing", "noise predicted at zero SNR", "no VAE"),
    *("tokenizer without its config", "link to nothing", "upscaler", "editing UNet", "UNet with a variance"),
}
"""Tested without a model in test_schedulers.py, or in the same way as another one."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) if n in ALSO_ELSEWHERE else n for n in REFUSED])
def test_a_folder_that_is_no_base_model_is_refused(name: str, folder: Path) -> None:
    change, expected = REFUSED[name]
    change(folder)
    assert re.search(expected, refusal(folder))
    assert not (folder / "executed").exists()


RUN: dict[str, Edit] = {
    "v prediction at zero SNR": scheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "nothing but betas": lambda f: (f / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", **BETAS}), encoding="utf-8"
    ),
    "Euler": other_scheduler("EulerDiscreteScheduler", **BETAS, timestep_spacing="leading"),
    "UNet that projects the text": unet(encoder_hid_dim=32, encoder_hid_dim_type="text_proj"),
    "size of two numbers": unet(sample_size=[4, 6]),
    "a link to the weights": lambda f: (
        (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "blob"),
        (f / "unet/diffusion_pytorch_model.safetensors").symlink_to(f / "blob"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_an_odd_folder_that_diffusers_runs_gives_its_image(name: str, folder: Path) -> None:
    RUN[name](folder)
    expected = own_image(DiffusionPipeline.from_pretrained(folder))
    torch.testing.assert_close(image(load(folder)), expected, atol=1e-5, rtol=0)


def test_a_size_in_the_config_replaces_the_one_that_a_model_lacks(folder: Path) -> None:
    unet(sample_size=None)(folder)
    expected = own_image(DiffusionPipeline.from_pretrained(folder), height=32, width=48)
    sampler = load(folder, sampling={"height": 32, "width": 48})
    torch.testing.assert_close(image(sampler), expected, atol=1e-5, rtol=0)


def as_variant(folder: Path, name: str, *parts: str) -> None:
    for part in parts:
        (file,) = (folder / part).glob("*.safetensors")
        half = {key: value.half() for key, value in load_file(file).items()}
        save_file(half, file.with_suffix(f".{name}.safetensors"), metadata={"format": "pt"})
        file.unlink()


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), pytest.param(("unet",), marks=slow)])
def test_a_folder_of_fp16_files_alone_loads_as_that_variant(folder: Path, parts: tuple[str, ...]) -> None:
    as_variant(folder, "fp16", *parts)
    expected = own_image(DiffusionPipeline.from_pretrained(folder, variant="fp16").to(torch.float32))
    torch.testing.assert_close(image(load(folder)), expected, atol=1e-5, rtol=0)


def test_the_variant_of_shards_and_the_plain_weights_beside_one(folder: Path, tiny_sd: Callable[..., Any]) -> None:
    shutil.copy(
        folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/diffusion_pytorch_model.ema.safetensors"
    )
    assert networks._variant(folder / "unet") is None
    shutil.rmtree(folder / "unet")
    tiny_sd().unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="300KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert networks._variant(folder / "unet") == "fp16"
    loaded = loading.load_pipeline(str(folder), registry=Registry.from_plugins({}))
    assert torch.equal(loaded.unet.conv_in.weight.contiguous(), tiny_sd().unet.conv_in.weight)


# -- another VAE ------------------------------------------------------------------------------------------------------


def tiny_autoencoder() -> AutoencoderTiny:
    """A TAESD of the tiny model's factor, with random weights."""
    widths, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks,
        )


def test_a_tiny_autoencoder_decodes_as_in_diffusers_and_gives_a_gradient(tiny_model: Path, tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "taesd")
    pipe = DiffusionPipeline.from_pretrained(tiny_model, vae=AutoencoderTiny.from_pretrained(tmp_path / "taesd"))
    sampler = load(tiny_model, parts={"vae": str(tmp_path / "taesd")}, rank=2)
    torch.testing.assert_close(image(sampler), own_image(pipe), atol=1e-5, rtol=0)
    sampler(["a fox"]).square().sum().backward()
    assert sum(float(p.grad.norm()) for p in sampler.trainable_parameters() if p.grad is not None) > 0


def test_messages_about_a_vae_name_it(tiny_model: Path, tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    wide = {**tiny_sd().vae.config, "latent_channels": 16}
    AutoencoderKL(**{k: v for k, v in wide.items() if not k.startswith("_")}).save_pretrained(tmp_path / "wide")
    (tmp_path / "nothing").mkdir()
    for vae, expected in {
        tmp_path / "wide": "VAE has 16 latent channels and the UNet 4",
        tmp_path / "nothing": "nothing is not an autoencoder's folder: it has no config.json",
        tiny_model / "unet": f"model.vae: {tiny_model / 'unet'} is a UNet2DConditionModel; .* AutoencoderTiny",
        Path("nobody/vae"): "model.vae: nobody/vae is not on this machine .* set it to a local diffusers folder",
    }.items():
        message = refusal(tiny_model, parts={"vae": str(vae)})
        assert re.search(expected, message)
        assert "model.base" not in message


# -- files ------------------------------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]


def parts(weights: Weights, *starts: str) -> Weights:
    return {name: value for name, value in weights.items() if name.startswith(starts)}


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
OTHER_FILES: dict[str, tuple[Callable[[Any], Weights], str]] = {
    "LoRA": (
        lambda _: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 32)},
        "contains a LoRA; set model.loras to it",
    ),
    "LoRA of diffusers": (lambda _: {"unet.to_q.lora_A.weight": torch.zeros(4, 32)}, "contains a LoRA"),
    "embedding": (lambda _: {"emb_params": torch.zeros(4, 768)}, "contains a textual-inversion embedding"),
    "embedding of diffusers": (lambda _: {"<cat-toy>": torch.zeros(768)}, "a textual-inversion embedding"),
    "UNet": (lambda pipe: dict(pipe.unet.state_dict()), "contains a UNet alone"),
    "original UNet": (lambda pipe: parts(single_file_weights(pipe), UNET), "contains a UNet alone"),
    "VAE": (lambda pipe: dict(pipe.vae.state_dict()), "contains a VAE alone; set model.vae"),
    "text encoder": (lambda pipe: dict(pipe.text_encoder.state_dict()), "contains a text encoder alone"),
    "no text encoder": (lambda pipe: parts(single_file_weights(pipe), UNET, VAE), "denoiser without a text encoder"),
    "no VAE": (lambda pipe: parts(single_file_weights(pipe), UNET, TEXT), "denoiser without a VAE"),
    "inpainting": (
        lambda pipe: single_file_weights(pipe) | {f"{UNET}input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)},
        r'another kind \("inpainting"',
    ),
    "FLUX": (
        lambda pipe: (
            single_file_weights(pipe)
            | {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4)}
        ),
        r'another kind \("flux.*model\.base to its diffusers folder or hub id and model\.transformer to this file',
    ),
    "something else": (lambda _: {f"layer.{n}": torch.zeros(2) for n in range(5)}, r"no model .* layer\.0"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_base_model_is_refused_by_what_it_is(
    name: str, tiny_sd: Callable[..., Any], tmp_path: Path
) -> None:
    build, expected = OTHER_FILES[name]
    file = tmp_path / "file.safetensors"
    save_file({key: value.contiguous() for key, value in build(tiny_sd()).items()}, file)
    message = refusal(file)
    assert message.startswith(str(file))
    assert re.search(expected, message)


def test_a_file_is_judged_by_its_content(
    tiny_sd: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights = single_file_weights(tiny_sd())
    whole = tmp_path / "whole.safetensors"
    save_file(weights, whole)
    repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert re.search(rf"{whole} .* {repository}, which is not .* hf download {repository}", refusal(whole))
    base = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (base / "snapshots").mkdir()
    os.symlink(tiny_model, base / "snapshots" / ("0" * 40))
    for name in ("MODEL.CKPT", "model"):  # safetensors, whatever their name is
        loaded = loading.load_pipeline(str(shutil.copy(whole, tmp_path / name)), registry=Registry.from_plugins({}))
        assert torch.equal(loaded.unet.conv_in.weight.contiguous(), tiny_sd().unet.conv_in.weight)
    pickled = {"pickle.CKPT": True, "pickle": True, "pickle.safetensors": True, "older.pt": False}
    for name, zipped in pickled.items():
        torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert "is a pickle, which can run code" in refusal(tmp_path / name)
    for name, content, expected in (
        ("empty.safetensors", b"", "an empty file"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("page.safetensors", b"<!DOCTYPE html>", "a web page"),
        ("small.gguf", b"GGUF\x03\0\0\0\0\0\0", "GGUF"),
        ("cut.safetensors", whole.read_bytes()[:5000], "is damaged"),
        ("text", b"a fox", "unknown format"),
    ):
        (tmp_path / name).write_bytes(content)
        assert expected in refusal(tmp_path / name)
