"""Adapters and their files: the weight change of the network equals that of the files, for every reader."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignprop_core.errors import LoraError, OutputError
from alignprop_core.locate import DIFFUSERS_NAME
from alignprop_core.lora import adapters as lora
from alignprop_core.lora.formats import read_lora
from alignprop_core.lora.layers import adaptable
from alignprop_core.lora.names import flatten_name, unflatten_name
from tests.support.tiny import tiny_sd

SCALES = [
    pytest.param({"rank": 4}, id="alpha-is-rank"),
    pytest.param({"rank": 4, "alpha": 11.0}, id="alpha-unlike-rank"),
    pytest.param({"rank": 3, "alpha": 5.0, "use_rslora": True}, id="rank-stabilised"),
]
CONV_TARGETS = [*lora.DEFAULT_TARGETS, "conv1", "conv_shortcut", "proj_in", "ff.net.0.proj"]


def draw(pipeline: StableDiffusionPipeline) -> Tensor:
    images: Tensor = pipeline(
        "a red cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    return images


def randomize(unet: nn.Module, seed: int = 5, size: float = 0.2) -> None:
    """Fill B with random values, as training would, so that the change is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters(unet)[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def live_change(unet: nn.Module) -> dict[str, Tensor]:
    """Return the weight change of the network itself: the response of each adapted layer to unit inputs."""
    changes: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and lora.ADAPTER in module.lora_A:
            changes[name] = module.get_delta_weight(lora.ADAPTER).detach().double()  # peft's own arithmetic
    return changes


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape
        assert (one[name] - two[name]).abs().max() <= tolerance * max(1.0, float(two[name].abs().max())), name


def changes_of(path: Path) -> dict[str, Tensor]:
    return {name: factors.change() for name, factors in read_lora(path)["denoiser"].items()}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with both files of a rank-4 LoRA on the tiny model, alpha unlike rank."""
    unet = tiny_sd().unet
    lora.attach(unet, rank=4, alpha=11.0)
    randomize(unet)
    lora.save(unet, tmp_path / "trained", name="style")
    return tmp_path / "trained"


# --- what is trained -------------------------------------------------------------------------------------------------


def test_only_the_adapter_is_trainable_and_it_starts_as_the_base() -> None:
    pipeline = tiny_sd()
    base = draw(pipeline)
    found = lora.attach(pipeline.unet, rank=4)
    assert [p for p in pipeline.unet.parameters() if p.requires_grad] == found
    assert len(found) == 2 * 4 * 2 * 4  # A and B; q, k, v, out; self and cross attention; four blocks
    assert torch.equal(draw(pipeline), base)
    randomize(pipeline.unet)
    assert not torch.allclose(draw(pipeline), base)


def test_initial_values_depend_on_the_seed_alone() -> None:
    def start(seed: int, global_seed: int, **options: Any) -> dict[str, Tensor]:
        unet = tiny_sd().unet
        torch.manual_seed(global_seed)
        expected = torch.rand(1)
        torch.manual_seed(global_seed)
        lora.attach(unet, rank=4, seed=seed, **options)
        assert torch.equal(torch.rand(1), expected), "the global random state was moved"
        return lora.state(unet)

    one, two, other = start(1, 10), start(1, 20), start(2, 10)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one if key.endswith("lora_A"))
    fewer = start(1, 10, target_modules=["to_k"])
    assert fewer
    assert all(torch.equal(one[key], fewer[key]) for key in fewer), "a layer's start depends on its own name only"
    a = one["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A"]
    bound = 1 / math.sqrt(a.shape[1])
    assert bound * 0.9 < a.abs().max() <= bound


def test_adapters_are_float32_on_a_bfloat16_base() -> None:
    pipeline = tiny_sd().to(torch.bfloat16)
    found = lora.attach(pipeline.unet, rank=2)
    assert {p.dtype for p in found} == {torch.float32}
    assert draw(pipeline).dtype == torch.bfloat16
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16


def test_float64_and_gradient_checkpointing_give_the_same_gradient() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        unet = tiny_sd().unet.double()
        found = lora.attach(unet, rank=2, dtype=torch.float64)
        randomize(unet)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64)
        words = torch.randn(1, 7, 32, generator=generator, dtype=torch.float64)
        unet(latents, 10, words).sample.square().sum().backward()
        assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)
        return [p.grad for p in found if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) == 64
    assert all(g.dtype == torch.float64 and g.abs().max() > 0 for g in plain)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(plain, checkpointed, strict=True))


def test_strength_scales_the_change_and_is_not_saved(tmp_path: Path) -> None:
    pipeline = tiny_sd()
    base = draw(pipeline)
    lora.attach(pipeline.unet, rank=4, alpha=7.0)
    randomize(pipeline.unet)
    tuned, full = draw(pipeline), live_change(pipeline.unet)
    lora.set_strength(pipeline.unet, 0.5)
    assert_same({n: 2 * c for n, c in live_change(pipeline.unet).items()}, full, 1e-6)
    lora.save(pipeline.unet, tmp_path, name="half")
    assert_same(changes_of(tmp_path), full, 1e-6)
    lora.set_strength(pipeline.unet, 0.0)
    assert torch.equal(draw(pipeline), base)
    lora.set_strength(pipeline.unet, 1.0)
    assert torch.equal(draw(pipeline), tuned)
    with pytest.raises(LoraError, match="finite"):
        lora.set_strength(pipeline.unet, math.nan)


def test_disabled_is_the_base_model_and_is_undone_afterwards() -> None:
    pipeline = tiny_sd()
    base = draw(pipeline)
    found = lora.attach(pipeline.unet, rank=4)
    randomize(pipeline.unet)
    tuned = draw(pipeline)
    with lora.disabled(pipeline.unet):
        assert torch.equal(draw(pipeline), base)
        with lora.disabled(pipeline.unet):
            assert torch.equal(draw(pipeline), base)
        assert torch.equal(draw(pipeline), base)
        assert all(p.requires_grad for p in found)
    assert torch.equal(draw(pipeline), tuned)
    assert [p for p in pipeline.unet.parameters() if p.requires_grad] == found
    with pytest.raises(ZeroDivisionError), lora.disabled(pipeline.unet):
        _ = 1 / 0
    assert torch.equal(draw(pipeline), tuned)


def test_state_is_restored_exactly_and_other_shapes_are_refused() -> None:
    unet = tiny_sd().unet
    lora.attach(unet, rank=4)
    randomize(unet)
    saved = lora.state(unet)
    randomize(unet, seed=6)
    lora.load_state(unet, saved)
    assert all(torch.equal(saved[key], value) for key, value in lora.state(unet).items())
    with pytest.raises(LoraError, match=r"lora\.target_modules"):
        lora.load_state(unet, dict(list(saved.items())[2:]))
    other = tiny_sd().unet
    lora.attach(other, rank=2)
    with pytest.raises(LoraError, match=r"lora\.rank"):
        lora.load_state(other, saved)


# --- what the files say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCALES)
def test_both_files_contain_the_weight_change_of_the_network(options: dict[str, Any], tmp_path: Path) -> None:
    unet = tiny_sd().unet
    lora.attach(unet, **options, dtype=torch.float64, target_modules=CONV_TARGETS)
    randomize(unet)
    lora.save(unet, tmp_path, name="style", dtype=torch.float64)
    expected = live_change(unet)
    assert len(expected) > 24
    assert any(change.ndim == 4 and change.shape[-1] == 3 for change in expected.values()), (
        "a convolution is among them"
    )
    assert_same(changes_of(tmp_path / DIFFUSERS_NAME), expected)
    assert_same(changes_of(tmp_path / "style.safetensors"), expected)
    lora.save(unet, tmp_path, name="style")  # float32, as usual
    assert_same(changes_of(tmp_path / DIFFUSERS_NAME), expected, 1e-6)
    assert_same(changes_of(tmp_path / "style.safetensors"), expected, 1e-6)


@pytest.mark.parametrize("options", SCALES)
def test_readers_with_and_without_alpha_compute_the_same_change(options: dict[str, Any], tmp_path: Path) -> None:
    unet = tiny_sd().unet
    lora.attach(unet, **options)
    randomize(unet)
    lora.save(unet, tmp_path, name="style")
    expected = {flatten_name(name): change for name, change in live_change(unet).items()}

    kohya = load_file(tmp_path / "style.safetensors")  # as ComfyUI and A1111 do; never looking at the header
    knows: dict[str, Tensor] = {}
    ignores: dict[str, Tensor] = {}
    for key, down in kohya.items():
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            product = kohya[stem + ".lora_up.weight"].double() @ down.double()
            name = stem.removeprefix("lora_unet_")
            ignores[name], knows[name] = product, product * (kohya[stem + ".alpha"].item() / down.shape[0])
    assert_same(ignores, expected, 1e-6)
    assert_same(knows, expected, 1e-6)

    plain = load_file(tmp_path / DIFFUSERS_NAME)  # as a reader that drops diffusers' adapter metadata
    products = {
        flatten_name(key.removeprefix("unet.").removesuffix(".lora_A.weight")): plain[
            key.replace("lora_A", "lora_B")
        ].double()
        @ a.double()
        for key, a in plain.items()
        if "lora_A" in key
    }
    assert_same(products, expected, 1e-6)


@pytest.mark.parametrize("options", SCALES)
@pytest.mark.parametrize("targets", [None, CONV_TARGETS], ids=["attention", "convolutions"])
def test_diffusers_generates_the_same_images_from_either_file(
    options: dict[str, Any], targets: list[str] | None, tmp_path: Path
) -> None:
    pipeline = tiny_sd()
    base = draw(pipeline)
    lora.attach(pipeline.unet, **options, target_modules=targets)
    randomize(pipeline.unet)
    tuned = draw(pipeline)
    assert (tuned - base).abs().max() > 1e-3
    lora.save(pipeline.unet, tmp_path, name="style")
    sources: list[tuple[str, Callable[[StableDiffusionPipeline], None]]] = [
        ("folder", lambda fresh: fresh.load_lora_weights(tmp_path)),
        ("kohya file", lambda fresh: fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")),
        ("no metadata", lambda fresh: fresh.load_lora_weights(load_file(tmp_path / DIFFUSERS_NAME))),
    ]
    for where, load in sources:
        fresh = tiny_sd()
        load(fresh)
        assert torch.allclose(draw(fresh), tuned, atol=2e-6), where


def test_headers_contain_modelspec_and_settings(tmp_path: Path) -> None:
    unet = tiny_sd().unet
    lora.attach(unet, rank=4, alpha=11.0, use_rslora=True)
    randomize(unet)
    lora.save(unet, tmp_path, name="style", metadata={"modelspec.author": "me", "modelspec.title": "My style"})
    with safe_open(tmp_path / "style.safetensors", framework="pt") as file:
        header = file.metadata()
    for key in ("sai_model_spec", "architecture", "implementation", "title", "date", "hash_sha256"):
        assert header[f"modelspec.{key}"], key
    assert header["modelspec.title"] == "My style"
    assert header["modelspec.author"] == "me"
    assert header["modelspec.architecture"] == "UNet2DConditionModel/lora"
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    with safe_open(tmp_path / DIFFUSERS_NAME, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 4
    assert settings["unet.use_rslora"] is False
    assert LoraConfig(**{key.removeprefix("unet."): value for key, value in settings.items()}).r == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [DIFFUSERS_NAME, "style.safetensors"]


@pytest.mark.parametrize("name", ["pytorch_lora_weights", "../style", "a/b"])
def test_a_name_that_is_not_a_plain_file_name_is_refused(name: str, tmp_path: Path) -> None:
    unet = tiny_sd().unet
    lora.attach(unet, rank=2)
    with pytest.raises(LoraError, match="cannot name"):
        lora.save(unet, tmp_path / "lora", name=name)


def test_a_failed_write_leaves_the_old_file_unchanged(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (trained / "style.safetensors").read_bytes()
    unet = tiny_sd().unet
    lora.attach(unet, rank=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="Not enough disk space for"):
        lora.save(unet, trained, name="style", formats=("kohya",))
    assert (trained / "style.safetensors").read_bytes() == before
    assert sorted(p.name for p in trained.iterdir()) == [DIFFUSERS_NAME, "style.safetensors"]


def test_diffusers_and_peft_files_with_alpha_in_the_header_are_read(tmp_path: Path) -> None:
    pipeline = tiny_sd()
    config = LoraConfig(r=4, lora_alpha=10, use_rslora=True, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 3})
    pipeline.unet.add_adapter(config, "alignprop")
    randomize(pipeline.unet)
    expected = live_change(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="alignprop"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["alignprop"].to_dict(),
    )
    assert_same(changes_of(tmp_path), expected, 1e-6)
    alone = tmp_path / "alone"  # the denoiser's own method writes no component into the names
    pipeline.unet.save_lora_adapter(alone, adapter_name="alignprop")
    assert_same(changes_of(alone), expected, 1e-6)
    wrapped = tmp_path / "peft"
    PeftModel(tiny_sd().unet, config, "alignprop").save_pretrained(wrapped)
    raw = get_peft_model_state_dict(pipeline.unet, adapter_name="alignprop")
    save_file({f"base_model.model.{k}": v for k, v in raw.items()}, wrapped / "alignprop" / "adapter_model.safetensors")
    assert_same(changes_of(wrapped / "alignprop"), expected, 1e-6)
    (wrapped / "alignprop" / "adapter_config.json").unlink()
    with pytest.raises(LoraError, match="scale is unknown"):
        read_lora(wrapped / "alignprop")


def test_files_can_be_float16(trained: Path, tmp_path: Path) -> None:
    unet = tiny_sd().unet
    lora.attach(unet, rank=4, init_from=trained)
    lora.save(unet, tmp_path / "half", name="style", dtype=torch.float16)
    for file in (DIFFUSERS_NAME, "style.safetensors"):
        assert {t.dtype for t in load_file(tmp_path / "half" / file).values()} == {torch.float16}
        assert_same(changes_of(tmp_path / "half" / file), changes_of(trained), 2e-3)


def test_a_wrapper_around_the_denoiser_changes_no_names(trained: Path, tmp_path: Path) -> None:
    unet = tiny_sd().unet
    wrapped = torch.compile(unet)  # nothing is compiled before its first call
    assert isinstance(wrapped, nn.Module)
    lora.attach(wrapped, rank=4, init_from=trained)
    lora.save(wrapped, tmp_path / "wrapped", name="style")
    assert_same(changes_of(tmp_path / "wrapped"), changes_of(trained))
    assert lora.state(wrapped).keys() == lora.state(unet).keys()


@pytest.mark.parametrize("build", ["sd", "sdxl", "sd3", "flux"])
def test_unflatten_name_inverts_flatten_name(build: str) -> None:
    with torch.device("meta"):
        model: nn.Module
        if build == "sd":
            model = UNet2DConditionModel(cross_attention_dim=768)
        elif build == "sdxl":
            model = UNet2DConditionModel(
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                transformer_layers_per_block=2,
            )
        elif build == "sd3":
            model = SD3Transformer2DModel(num_layers=2, pos_embed_max_size=8, dual_attention_layers=(0,))
        else:
            model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    names = list(adaptable(model))
    assert len(names) > 20
    assert [unflatten_name(flatten_name(name)) for name in names] == names


# --- going on from a LoRA, and frozen ones ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["", DIFFUSERS_NAME, "style.safetensors"])
@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"alpha": 3.0, "use_rslora": True}], ids=["plain", "rslora"])
def test_init_from_starts_at_the_change_of_the_file(file: str, options: dict[str, Any], trained: Path) -> None:
    expected = changes_of(trained)
    pipeline = tiny_sd()
    found = lora.attach(pipeline.unet, rank=4, init_from=trained / file, **options)
    assert_same(live_change(pipeline.unet), expected, 1e-6)
    assert all(p.requires_grad for p in found)
    fresh = tiny_sd()
    fresh.load_lora_weights(trained)
    assert torch.allclose(draw(pipeline), draw(fresh), atol=2e-6)
    exact = tiny_sd().unet
    lora.attach(exact, rank=4, init_from=trained / file)
    assert all(torch.equal(f.change(), expected[name]) for name, f in lora.current(exact).items())


def test_init_from_leaves_layers_that_are_not_in_the_file_unchanged(trained: Path) -> None:
    unet = tiny_sd().unet
    lora.attach(unet, rank=4, init_from=trained, target_modules=[*lora.DEFAULT_TARGETS, "proj_in"])
    changes = live_change(unet)
    assert_same({n: c for n, c in changes.items() if "proj_in" not in n}, changes_of(trained), 1e-6)
    assert all(c.abs().max() == 0 for n, c in changes.items() if "proj_in" in n)


def test_init_from_names_the_key_to_set_if_it_does_not_fit(trained: Path) -> None:
    unet = tiny_sd().unet
    with pytest.raises(LoraError, match=r"set lora\.rank=4"):
        lora.attach(unet, rank=8, init_from=trained)
    with pytest.raises(LoraError, match=r"Set lora\.target_modules=\[to_k, to_out\.0, to_q, to_v\]"):
        lora.attach(unet, rank=4, init_from=trained, target_modules=["to_q"])
    with pytest.raises(LoraError, match="another base model"):
        lora.attach(tiny_sd(cross_attention_dim=16).unet, rank=4, init_from=trained)
    assert len(lora.attach(unet, rank=4, init_from=trained)) == 64, "a refusal leaves the model untouched"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # peft, at diffusers' second LoRA
@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_frozen_lora_adds_to_the_trained_one_as_in_diffusers(
    frozen_first: bool, trained: Path, tmp_path: Path
) -> None:
    pipeline = tiny_sd()
    if frozen_first:
        lora.attach_frozen(pipeline, trained, 0.7, "style")
        base = draw(pipeline)
        found = lora.attach(pipeline.unet, rank=2, alpha=5.0)
    else:
        found = lora.attach(pipeline.unet, rank=2, alpha=5.0)
        lora.attach_frozen(pipeline, trained, 0.7, "style")
        base = draw(pipeline)
    assert [p for p in pipeline.unet.parameters() if p.requires_grad] == found
    assert not torch.allclose(base, draw(tiny_sd()))
    randomize(pipeline.unet, seed=8)
    assert [n for n in lora.state(pipeline.unet) if "style" in n] == []
    lora.save(pipeline.unet, tmp_path / "mine", name="mine")
    assert {f.rank for f in read_lora(tmp_path / "mine")["denoiser"].values()} == {2}

    words = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    pipeline.unet(torch.ones(1, 4, 4, 4), 10, words).sample.square().sum().backward()
    assert all(p.grad is not None for p in found)
    assert all(p.grad is None for p in pipeline.unet.parameters() if not p.requires_grad)

    fresh = tiny_sd()
    fresh.load_lora_weights(trained, adapter_name="style")
    fresh.load_lora_weights(tmp_path / "mine", adapter_name="mine")
    fresh.set_adapters(["style", "mine"], [0.7, 1.0])
    assert torch.allclose(draw(pipeline), draw(fresh), atol=2e-6)
    fresh.set_adapters(["style", "mine"], [0.7, 0.4])
    lora.set_strength(pipeline.unet, 0.4)
    assert torch.allclose(draw(pipeline), draw(fresh), atol=2e-6)
    with lora.disabled(pipeline.unet):
        assert torch.equal(draw(pipeline), base)
    with pytest.raises(LoraError, match="another name"):
        lora.attach_frozen(pipeline, trained, 1.0, "style")


def text_encoder_lora(folder: Path) -> Path:
    """A LoRA by diffusers itself that changes the denoiser (rank 2) and the text encoder (rank 3)."""
    pipeline = tiny_sd()
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False), "x")
    pipeline.text_encoder.add_adapter(
        LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False), "x"
    )
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="x"),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder, adapter_name="x"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["x"].to_dict(),
        text_encoder_lora_adapter_metadata=pipeline.text_encoder.peft_config["x"].to_dict(),
    )
    return folder


def test_a_frozen_lora_may_change_the_text_encoder(tmp_path: Path) -> None:
    folder = text_encoder_lora(tmp_path)
    fresh = tiny_sd()
    fresh.load_lora_weights(folder, adapter_name="x")
    fresh.set_adapters(["x"], [0.6])
    pipeline = tiny_sd()
    words = pipeline.encode_prompt("a red cat", "cpu", 1, False)[0]
    lora.attach_frozen(pipeline, folder, 0.6, "x")
    assert not torch.allclose(pipeline.encode_prompt("a red cat", "cpu", 1, False)[0], words)
    assert torch.allclose(draw(pipeline), draw(fresh), atol=2e-6)
    assert not any(p.requires_grad for n, p in pipeline.text_encoder.named_parameters() if "lora_" in n)


def test_a_text_encoder_part_is_never_ignored(tmp_path: Path) -> None:
    folder = text_encoder_lora(tmp_path)
    unet = tiny_sd().unet
    with pytest.raises(LoraError, match="also changes the text_encoder"):
        lora.attach_frozen(unet, folder, 1.0, "x")
    with pytest.raises(LoraError, match=r"List it under model\.loras"):
        lora.attach(unet, rank=2, init_from=folder, target_modules=["to_q"])


# --- bad input -------------------------------------------------------------------------------------------------------


def test_an_unknown_target_suggests_the_nearest_name() -> None:
    unet = tiny_sd().unet
    with pytest.raises(
        LoraError, match=r'no linear or convolution layer named "to_qq"\. Did you mean "to_q"\?.*to_out\.0'
    ):
        lora.attach(unet, rank=4, target_modules=["to_k", "to_qq"])
    with pytest.raises(LoraError, match="empty"):
        lora.attach(unet, rank=4, target_modules=[])
    with pytest.raises(LoraError, match=r"lora\.rank is 0"):
        lora.attach(unet, rank=0)
    with pytest.raises(LoraError, match=r"lora\.alpha"):
        lora.attach(unet, rank=4, alpha=-1.0)
    lora.attach(unet, rank=4)
    with pytest.raises(LoraError, match="already"):
        lora.attach(unet, rank=4)
    with pytest.raises(LoraError, match="no adapter"):
        lora.state(tiny_sd().unet)


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_a_truncated_file_is_refused_with_its_name(keep: int, trained: Path) -> None:
    file = trained / "style.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(LoraError, match=re.escape(str(file))):
        read_lora(file)


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_a_pickle_is_refused_without_opening_it(suffix: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "exploded", "x"))

    (tmp_path / f"pytorch_lora_weights.{suffix}").write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path, tmp_path / f"pytorch_lora_weights.{suffix}"):
        with pytest.raises(LoraError, match="pickled"):
            lora.attach(tiny_sd().unet, rank=4, init_from=path)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_not_plain_lora_are_refused(trained: Path, tmp_path: Path) -> None:
    tensors = load_file(trained / "style.safetensors")
    key = next(iter(tensors)).split(".")[0]

    def refused(changed: dict[str, Tensor], reason: str) -> None:
        file = tmp_path / "other.safetensors"
        save_file(changed, file)
        with pytest.raises(LoraError, match=reason) as caught:
            lora.attach_frozen(tiny_sd(), file, 1.0, "x")
        assert str(file) in str(caught.value)

    refused({**tensors, f"{key}.dora_scale": torch.ones(1)}, "DoRA")
    refused({**tensors, f"{key}.lora_up.weight": torch.full_like(tensors[f"{key}.lora_up.weight"], math.nan)}, "NaN")
    refused({name: t for name, t in tensors.items() if name != f"{key}.lora_up.weight"}, "one factor without the other")
    refused({"a.alpha": torch.ones(())}, "no LoRA keys")
    refused({name.replace("attn1", "attn9"): t for name, t in tensors.items()}, "attn9.*another kind of model")
    refused({**tensors, f"{key}.lora_up.weight": torch.ones(3, 5)}, "do not fit together")
    with pytest.raises(LoraError, match="no such LoRA"):
        read_lora(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraError, match="contains no LoRA"):
        read_lora(tmp_path / "empty")
    (trained / DIFFUSERS_NAME).rename(trained / "second.safetensors")
    with pytest.raises(LoraError, match="several"):
        read_lora(trained)
