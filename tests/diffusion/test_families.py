"""Model families: images equal the pipeline's, gradients equal plain autograd's, plain diffusers reads the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    ZImagePipeline,
)
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, LoraConfig, ModelLora, SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import draw_truncation
from alignprop_core.errors import ConfigError, ModelError
from alignprop_core.lora import adapters
from alignprop_core.lora.layers import layers_of
from alignprop_core.lora.names import flatten_name, unflatten_name
from alignprop_core.registry.registry import default_registry
from alignprop_core.testing.pipelines import tiny_flux, tiny_flux2_klein, tiny_pipeline, tiny_t5_tokenizer, tiny_vae

PROMPTS = ["a fox", "three owls on a blue hill"]
FAMILIES = ["stable_diffusion_xl", "stable_diffusion_3", "flux", "flux2_klein", "z_image"]
STEPS = 3


class InFloat64(FlowMatchEulerDiscreteScheduler):
    """diffusers' step without its rounding of latents to float32."""

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor]:
        i = self.timesteps.tolist().index(float(timestep))
        return (latents + (self.sigmas[i + 1] - self.sigmas[i]) * prediction,)


def own_image(pipe: Any, **arguments: Any) -> Tensor:
    """Return what the pipeline itself generates."""
    images: Tensor = pipe(**call(pipe, output_type="pt", **arguments)).images
    return images


def call(pipe: Any, **arguments: Any) -> dict[str, Any]:
    """Return the arguments of a pipeline's call."""
    if isinstance(pipe, Flux2KleinPipeline) and "negative_prompt" in arguments:
        arguments["negative_prompt_embeds"], _ = pipe.encode_prompt(arguments.pop("negative_prompt"))
    generator = torch.Generator().manual_seed(3)
    fixed = {"prompt": list(PROMPTS), "num_inference_steps": STEPS, "generator": generator, "width": 32, "height": 32}
    return fixed | arguments


def guided(family: str, scale: float, negative: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of classifier-free guidance and the arguments of the pipeline's call that mean the same."""
    texts = {"negative_prompt": [negative] * 2}
    if family == "flux":  # beside the scale that is an input of the network
        own = {"guidance_scale": 3.5, "true_cfg_scale": scale}
        return own | {"negative_prompt": negative}, own | texts
    off = 0.0 if family == "z_image" else 1.0
    return {"guidance_scale": scale, "negative_prompt": negative}, {
        "guidance_scale": scale if scale > 1 else off,
        **(texts if negative else {}),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("scale", "negative"), [(5.0, ""), (5.0, "blur"), (1.0, "")])
def test_image_equals_the_pipelines_own(family: str, scale: float, negative: str) -> None:
    pipe, (settings, arguments) = tiny_pipeline(family), guided(family, scale, negative)
    theirs = own_image(pipe, **arguments)
    with torch.no_grad():
        sampler = Sampler(pipe, SamplingConfig(steps=STEPS, **settings))
        ours = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_of_another_aspect_ratio_equals_the_pipelines_own(family: str) -> None:
    pipe, (settings, arguments) = tiny_pipeline(family), guided(family, 4.0)
    theirs = own_image(pipe, width=64, height=32, **arguments)
    with torch.no_grad():
        sampler = Sampler(pipe, SamplingConfig(steps=STEPS, width=64, height=32, **settings))
        ours = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
    assert ours.shape == (2, 3, 32, 64)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_block_is_adapted_and_kohyas_names_are_read(family: str) -> None:
    pipe = tiny_pipeline(family)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    adapters.attach(network, rank=2)
    names = [name for name, _ in layers_of(network, adapters.ADAPTER)]
    blocks = {name for name, m in network.named_modules() if name.rsplit(".", 1)[-1] in ("attn", "attn1", "attention")}
    assert {name.rsplit(".", 2 if name.endswith(".0") else 1)[0] for name in names} >= blocks
    assert [unflatten_name(flatten_name(name)) for name in names] == names


def test_guidance_is_an_input_of_flux_dev_and_no_input_of_distilled_models() -> None:
    """At every scale, 1 included; [schnell] has sigmas without a shift for the size."""
    pipe = tiny_flux(guidance_embeds=True)
    for scale in (1.0, 3.5):
        theirs = own_image(pipe, guidance_scale=scale)
        with torch.no_grad():
            sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=scale))
            ours = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for distilled in (tiny_flux(guidance_embeds=False), tiny_flux2_klein(distilled=True)):
        with pytest.warns(UserWarning, match=r"guidance_scale is 3\.5 and has no effect: .* distilled"):
            sampler = Sampler(distilled, SamplingConfig(steps=STEPS, guidance_scale=3.5))
        with torch.no_grad():
            ours = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
        assert sampler.conditioning(PROMPTS).negative is None
        torch.testing.assert_close(ours, own_image(distilled), atol=1e-5, rtol=0)
        Sampler(distilled, SamplingConfig())  # no warning about the default


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # diffusers' own call of it
def test_xl_decodes_in_float32_where_the_pipeline_does_and_leaves_the_pipeline_as_it_is() -> None:
    pipe = tiny_pipeline("stable_diffusion_xl").to(torch.float16)
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).half()
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS))
    found = sampler.decode(latents.float())
    assert pipe.vae.dtype == torch.float16
    # The end of the pipeline's own call: its scheduler takes no step, and its UNet is not called.
    pipe.scheduler.set_timesteps = lambda *_, **__: None
    pipe.scheduler.timesteps, pipe.scheduler.num_inference_steps = torch.tensor([]), 1
    theirs = pipe("a fox", latents=latents, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(found, theirs.float(), atol=2e-3, rtol=0)


def attached(pipe: Any) -> list[torch.nn.Parameter]:
    """Attach an adapter of the pipeline's dtype whose B is not zero."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    parameters = adapters.attach(network, rank=2, dtype=network.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return parameters


def test_image_with_sigmas_shifted_for_its_size_equals_the_pipelines_own() -> None:
    pipe = tiny_pipeline("stable_diffusion_3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    theirs = own_image(pipe, guidance_scale=4.0)
    with torch.no_grad():
        sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=4.0))
        ours = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def own_latents(pipe: Any, **arguments: Any) -> Tensor:
    """Return the result of the pipeline's own call, with a graph through all of it."""
    if isinstance(pipe, ZImagePipeline):
        return z_image_latents(pipe, **arguments)
    latents: Tensor = type(pipe).__call__.__wrapped__(pipe, **call(pipe, output_type="latent", **arguments)).images
    return latents


def z_image_latents(pipe: Any, guidance_scale: float) -> Tensor:
    """Do what Z-Image's own call does, which rounds to float32 in every step."""
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    latents, (positive, negative) = latents.to(pipe.device), pipe.encode_prompt(list(PROMPTS))
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    for t in pipe.scheduler.timesteps.to(pipe.device):
        images, time = latents.repeat(2, 1, 1, 1).unsqueeze(2), ((1000 - t) / 1000).expand(4)
        out = torch.stack(pipe.transformer(list(images), time, positive + negative, return_dict=False)[0]).squeeze(2)
        cond, uncond = out.chunk(2)
        latents = pipe.scheduler.step(-(cond + guidance_scale * (cond - uncond)), t, latents)[0]
    return latents


def pixels(pipe: Any, sampler: Sampler, latents: Tensor) -> Tensor:
    """Decode what a pipeline returns as latents; its own pixels would be clipped without a gradient."""
    if isinstance(pipe, Flux2KleinPipeline):  # returns them as the VAE has them
        decoded: Tensor = pipe.vae.decode(latents).sample / 2 + 0.5
        return decoded
    if isinstance(pipe, FluxPipeline):
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    return sampler.decode(latents)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_plain_autograd(family: str, device: str) -> None:
    pipe = tiny_pipeline(family).to(device, torch.float64)
    parameters = attached(pipe)

    def gradient(images: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype, device=images.device).view_as(images).cos()
        return torch.cat([g.flatten() for g in torch.autograd.grad((weights * images).sum(), parameters)])

    settings, arguments = guided(family, 4.0)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, **settings), BackpropConfig(strategy="full"))
    found = gradient(sampler(PROMPTS, generator=torch.Generator().manual_seed(3)))
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = InFloat64.from_config(pipe.scheduler.config)
    expected = gradient(pixels(pipe, sampler, own_latents(pipe, **arguments)))
    assert sampler.engine.pool.enabled == (device == "cuda")
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_prediction_reads_no_value_and_no_memory_of_the_host(family: str) -> None:
    """So that its CUDA graph can be captured: on the meta device there are no values."""
    pipe = tiny_pipeline(family)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, **guided(family, 4.0)[0]))
    conditioning = sampler.conditioning(PROMPTS)
    latents = torch.randn(2, *sampler.latent_shape)
    sampler.family.predict(latents, sampler.scheduler.timesteps[0], conditioning)  # tables are made once
    pipe.transformer.to("meta")
    assert conditioning.negative is not None
    parts = [
        {name: tensor.to("meta") for name, tensor in p.items()} for p in (conditioning.positive, conditioning.negative)
    ]
    found = sampler.family.predict(latents.to("meta"), sampler.scheduler.timesteps[0].to("meta"), Conditioning(*parts))
    assert found.shape == latents.shape


def test_guidance_with_a_model_named_turbo_shows_a_warning() -> None:
    pipe = tiny_pipeline("z_image")
    pipe.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    with pytest.warns(UserWarning, match="is 7.5, but Z-Image-Turbo was distilled to run without guidance"):
        Sampler(pipe, SamplingConfig())
    Sampler(pipe, SamplingConfig(guidance_scale=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_the_same_gradient(family: str) -> None:
    pipe = tiny_pipeline(family).to(torch.float64)
    parameters = attached(pipe)
    recomputed: list[bool] = []
    found = []
    for recomputes in (False, True):
        backprop = BackpropConfig(strategy="last_k", checkpoint_steps=False, checkpoint_blocks=recomputes)
        sampler = Sampler(pipe, SamplingConfig(steps=1, **guided(family, 4.0)[0]), backprop)
        images = sampler(PROMPTS)
        layer = next(
            m
            for name, m in sampler.family.denoiser.named_modules()
            if name.endswith((".attn.to_q", ".attn2.to_q", ".attention.to_q"))
        )
        with layer.register_forward_hook(lambda *_, flag=recomputes: recomputed.append(flag)):
            found.append(torch.autograd.grad(images.square().sum(), parameters))
    assert set(recomputed) == {True}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_diffusers_loads_model_and_lora_with_the_same_images(family: str, tmp_path: Path) -> None:
    tiny_pipeline(family).save_pretrained(tmp_path / "model")
    pipe = load_pipeline(str(tmp_path / "model"), registry=default_registry())
    attached(pipe)
    settings, arguments = guided(family, 4.0)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, width=32, height=32, **settings))
    with torch.no_grad():
        ours = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
        with sampler.without_lora():
            assert (ours - sampler(PROMPTS, generator=torch.Generator().manual_seed(3))).abs().max() > 1e-3
    sampler.save_lora(tmp_path / "lora", "adapter")
    # For transformers, the second file has OneTrainer's names, which ComfyUI reads and diffusers does not.
    for weights in ("pytorch_lora_weights.safetensors", "adapter.safetensors")[: 2 if hasattr(pipe, "unet") else 1]:
        lacking = {"text_encoder_3": None, "tokenizer_3": None} if family == "stable_diffusion_3" else {}
        plain = DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True, **lacking)
        plain.set_progress_bar_config(disable=True)
        plain.load_lora_weights(tmp_path / "lora", weight_name=weights)
        torch.testing.assert_close(ours, own_image(plain, **arguments), atol=1e-4, rtol=0)


def test_another_vae_and_stacked_loras_with_a_flow(tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux")
    pipe.save_pretrained(tmp_path / "model")
    tiny_pipeline("flux", seed=5).vae.save_pretrained(tmp_path / "vae")
    attached(pipe)
    sampling: dict[str, Any] = {"steps": STEPS, "width": 32, "height": 32}
    sampler = Sampler(pipe, SamplingConfig(**sampling))
    sampler.save_lora(tmp_path / "lora")
    with torch.no_grad():
        latents = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=1)).latents
    both = Sampler.load(
        str(tmp_path / "model"),
        adapter=LoraConfig(rank=2, init_from=str(tmp_path / "lora")),
        frozen=[ModelLora(path=str(tmp_path / "lora"), strength=-1.0)],
        parts={"vae": str(tmp_path / "vae")},
        sampling=sampling,
    )
    with torch.no_grad():
        # The frozen LoRA and the trainable one cancel each other out.
        found, noise = both.sample(PROMPTS, both.noise(PROMPTS, seed=1)).latents, both.noise(PROMPTS, seed=1)
        with both.without_lora():
            negated = both.sample(PROMPTS, noise).latents
        with sampler.without_lora():
            plain = sampler.sample(PROMPTS, noise).latents
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
        assert (negated - plain).abs().max() > 1e-2
        assert (plain - latents).abs().max() > 1e-2
        assert (both.decode(plain) - sampler.decode(plain)).abs().max() > 1e-2


def test_parts_of_other_models_are_refused() -> None:
    pipe = tiny_pipeline("stable_diffusion_xl")
    pipe.unet.register_to_config(addition_embed_type=None)
    with pytest.raises(ModelError, match="other inputs than Stable Diffusion XL"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("stable_diffusion_xl")
    pipe.text_encoder.config.hidden_size = 16
    with pytest.raises(ModelError, match="text encoders give 48 numbers per token and the UNet reads 64"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("stable_diffusion_3")
    pipe.vae.register_to_config(latent_channels=4)
    with pytest.raises(ModelError, match="VAE has 4 latent channels and the transformer 16"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("stable_diffusion_3")
    pipe.scheduler = tiny_pipeline("stable_diffusion").scheduler
    with pytest.raises(ModelError, match="needs one for flow matching"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("flux")
    pipe.transformer.register_to_config(in_channels=96)
    with pytest.raises(ModelError, match="96 input channels and 64 output channels: it also reads an image"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("flux")
    pipe.vae.register_to_config(latent_channels=4)
    with pytest.raises(ModelError, match=r"VAE has 4 latent channels and the transformer 16 \(packed by 4\)"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("flux")
    pipe.text_encoder_2.config.d_model = 16
    with pytest.raises(ModelError, match="text_encoder_2 gives 16 numbers per token and the transformer reads 24"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("flux2_klein")
    pipe.vae = tiny_vae(8)
    with pytest.raises(ModelError, match="has no statistics of its latents"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("flux2_klein")
    pipe.tokenizer = tiny_t5_tokenizer()
    with pytest.raises(ModelError, match="has 98 tokens and the text encoder 259"):
        Sampler(pipe, SamplingConfig())
    pipe = tiny_pipeline("flux")
    pipe.tokenizer_2 = None
    with pytest.raises(ModelError, match=r"has no tokenizer_2; a FLUX\.1 model needs all of its parts"):
        Sampler(pipe, SamplingConfig())


@pytest.mark.parametrize(
    ("family", "sampling", "message"),
    [
        ("stable_diffusion_xl", {"scheduler": "flow_match_euler"}, "remove the key or set it to ddim"),
        ("stable_diffusion_3", {"scheduler": "ddim"}, "remove the key or set it to flow_match_euler"),
        ("stable_diffusion_3", {"eta": 0.5}, "sampling.eta is 0.5, but only DDIM has it"),
        ("stable_diffusion_3", {"true_cfg_scale": 2.0}, "whose key is sampling.guidance_scale"),
        ("flux", {"scheduler": "ddim"}, "a FLUX.1 model does not use; remove the key or set it to flow_match_euler"),
        ("flux", {"eta": 0.5}, "sampling.eta is 0.5, but only DDIM has it"),
        ("flux", {"height": 40}, "sampling.height is 40; this model needs a multiple of 16"),
        (
            "flux2_klein",
            {"true_cfg_scale": 2.0},
            r"this is a FLUX\.2 \[klein\] model, whose key is sampling.guidance_scale",
        ),
        ("flux2_klein", {"height": 40}, "sampling.height is 40; this model needs a multiple of 16"),
        ("z_image", {"eta": 0.5}, "sampling.eta is 0.5, but only DDIM has it"),
        ("z_image", {"width": 272}, "sampling.width is 272; this model needs a multiple of 16, at most 256"),
        ("stable_diffusion_3", {"width": 40}, "sampling.width is 40; this model needs a multiple of 16, at most 256"),
    ],
)
def test_settings_that_a_family_does_not_have_are_refused(family: str, sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(tiny_pipeline(family), SamplingConfig(**sampling))


def test_a_flow_whose_steps_add_noise_is_refused() -> None:
    pipe = tiny_pipeline("stable_diffusion_3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ModelError, match="stochastic_sampling: true"):
        Sampler(pipe, SamplingConfig())


@pytest.mark.parametrize("strategy", ["refl", "sparse", "leap"])
def test_strategies_for_flows_equal_their_definition(strategy: Any) -> None:
    """ReFL's clean estimate and weights from sigma's differences, by the definition of a flow."""
    pipe = tiny_pipeline("stable_diffusion_3").to(torch.float64)
    parameters = attached(pipe)
    sampler = Sampler(pipe, SamplingConfig(steps=4, guidance_scale=2.0), BackpropConfig(strategy=strategy))
    noise = sampler.noise(PROMPTS, seed=5)
    plan = draw_truncation(sampler.backprop, sampler.step_sizes, seed=5, step=0)
    out = sampler.sample(PROMPTS, noise, plan)
    weights = torch.linspace(-1, 1, out.latents.numel(), dtype=torch.float64).view_as(out.latents).cos()
    found = torch.autograd.grad((weights * out.latents).sum(), parameters)

    conditioning, sigmas = sampler.conditioning(PROMPTS), InFloat64.from_config(pipe.scheduler.config)
    sigmas.set_timesteps(4)
    assert sampler.step_sizes == pytest.approx((sigmas.sigmas[1:] - sigmas.sigmas[:-1]).tolist())
    latents = noise.initial
    for i, t in enumerate(sigmas.timesteps):
        weight, scale = plan.factors.get(i, (0.0, 0.0))
        velocity = sampler.family.predict(scale * latents + (1 - scale) * latents.detach(), t, conditioning)
        velocity = velocity.detach() + weight * (velocity - velocity.detach())
        if i < plan.first:
            latents = latents.detach()
        if i == plan.stop_at:
            latents = latents - sigmas.sigmas[i] * velocity
            break
        latents = latents + (sigmas.sigmas[i + 1] - sigmas.sigmas[i]) * velocity
    torch.testing.assert_close(out.latents.detach(), latents.detach(), rtol=1e-12, atol=1e-12)
    if strategy != "leap":  # its weight for each sample depends on latents
        expected = torch.autograd.grad((weights * latents).sum(), parameters)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
