"""What the families with flow matching share: a transformer, Euler's method, and guidance in one call."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.families.stable_diffusion import check_tokenizer
from alignprop_core.diffusion.schedulers import FlowMatchEuler, Scheduler
from alignprop_core.errors import ConfigError, ModelError

DEFAULT_GUIDANCE = SamplingConfig.model_fields["guidance_scale"].default


class FlowFamily(Family):
    """A pipeline with a transformer that predicts the velocity of a flow, text encoders and a VAE."""

    denoiser_name = "transformer"
    schedulers = ("flow_match_euler",)
    parts: ClassVar[tuple[str, ...]]
    """The parts that a pipeline needs."""
    optional: ClassVar[str] = ""
    """Parts that may be missing, for the message."""
    packing: ClassVar[int] = 1
    """Channels of the transformer for each latent channel: 4 if it reads 2x2 latents as one."""
    reads: ClassVar[tuple[tuple[str, str, str, int], ...]] = ()
    """Text encoder, its width's key, the key of the width that the transformer reads, and how many times as wide."""
    own_sigmas: ClassVar[bool] = True
    """Whether the pipeline passes sigmas from 1 to 1/T to the scheduler, in place of the scheduler's own."""
    takes_true_cfg: ClassVar[bool] = False
    """Whether the family reads `sampling.true_cfg_scale`."""

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        if sampling.true_cfg_scale is not None and not self.takes_true_cfg:
            raise ConfigError(
                f"sampling.true_cfg_scale is for guidance-distilled models; this is a {self.title} model, whose key is "
                "sampling.guidance_scale."
            )
        if sampling.eta:
            raise ConfigError(f"sampling.eta is {sampling.eta:g}, but only DDIM has it; this model uses flow matching.")
        for part, encoder in pipeline.components.items():
            if part.startswith("text_encoder") and encoder is not None:
                check_tokenizer(getattr(pipeline, part.replace("text_encoder", "tokenizer")), encoder)

    @classmethod
    def check(cls, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a pipeline without all of its parts, or of parts that do not fit each other."""
        if missing := [part for part in cls.parts if part not in parts]:
            lacks = f"The model has no {' and no '.join(missing)}"
            raise ModelError(f"{lacks}; a {cls.title} model needs all of its parts{cls.optional}.")
        network, vae, scheduler = parts["transformer"], parts["vae"], parts["scheduler"]
        channels, out = network.get("in_channels"), network.get("out_channels")
        if isinstance(channels, int) and isinstance(out, int) and channels != out:
            raise ModelError(
                f"The transformer has {channels} input channels and {out} output channels: it also reads an image. "
                "alignprop runs models that turn a prompt alone into an image; use the model it was made from."
            )
        latents = vae.get("latent_channels")
        if isinstance(channels, int) and isinstance(latents, int) and latents * cls.packing != channels:
            wanted = f"{channels // cls.packing}{' (packed by 4)' if cls.packing > 1 else ''}"
            raise ModelError(
                f"The VAE has {latents} latent channels and the transformer {wanted}: they are of different models. "
                f"Use the model's own VAE, or another one with {channels // cls.packing} latent channels."
            )
        for part, key, read, times in cls.reads:
            has, wants = parts[part].get(key), network.get(read)
            if isinstance(has, int) and isinstance(wants, int) and has * times != wants:
                raise ModelError(
                    f"The {part} gives {has * times} numbers per token and the transformer reads {wants}: they are of "
                    "different models."
                )
        if "prediction_type" in scheduler or "beta_schedule" in scheduler:
            raise ModelError(
                f"The model's scheduler is for diffusion (it has betas or a prediction_type); a {cls.title} model "
                "needs one for flow matching, FlowMatchEulerDiscreteScheduler."
            )

    @property
    def decoder(self) -> nn.Module:
        """The VAE."""
        vae: nn.Module = self.pipeline.vae
        return vae

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance; 1 is a single prediction, without a negative prompt."""
        return self.sampling.guidance_scale

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels for each latent, along a side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def patch(self) -> int:
        """Latents for each token of the transformer, along a side."""
        return 2

    @property
    def side(self) -> int:
        """The model's own width and height in pixels."""
        return int(getattr(self.pipeline, "default_sample_size", 128) * self.pipeline.vae_scale_factor)

    @property
    def largest(self) -> int | None:
        """The largest width and height in pixels; None without a limit."""
        return None

    def warn_of_guidance(self, why: str) -> None:
        """Warn if `sampling.guidance_scale` is set, which has no effect."""
        if self.sampling.guidance_scale not in (1.0, DEFAULT_GUIDANCE):
            warnings.warn(
                f"sampling.guidance_scale is {self.sampling.guidance_scale:g} and has no effect: {why}. Remove the key "
                "or set it to 1.",
                stacklevel=2,
            )

    def shift(self, tokens: int) -> float:
        """Return how much the sigmas are shifted for an image of so many tokens (`use_dynamic_shifting`)."""
        config = self.pipeline.scheduler.config
        # A straight line through two points: (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        low, high = config["base_shift"], config["max_shift"]
        slope = (high - low) / (many - few)
        return float(tokens * slope + (low - slope * few))

    def scheduler(self, device: torch.device) -> Scheduler:
        """Return Euler's method over the pipeline's own sigmas, shifted for the image's size if the model is set so."""
        config, steps, (_, rows, columns) = self.pipeline.scheduler.config, self.sampling.steps, self.latent_shape()
        mu = self.shift(rows * columns // self.patch**2) if config.get("use_dynamic_shifting") else None
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist() if self.own_sigmas else None
        return FlowMatchEuler(config, steps, mu=mu, sigmas=sigmas, device=device)

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H / f, W / f), f pixels for each latent; the model's own size unless width and height are set."""
        sides, needed = [], self.factor * self.patch
        for name, side in (("height", self.sampling.height), ("width", self.sampling.width)):
            side = side or self.side
            if side % needed or (self.largest is not None and side > self.largest):
                limit = "" if self.largest is None else f", at most {self.largest}"
                raise ConfigError(f"sampling.{name} is {side}; this model needs a multiple of {needed}{limit}.")
            sides.append(side // self.factor)
        return self.channels, sides[0], sides[1]

    @abstractmethod
    def velocity(self, latents: Tensor, timestep: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Return the transformer's velocity, (N, C, h, w), for latents (N, C, h, w), in their dtype; no guidance.

        Args:
            latents: in full precision.
            timestep: 0-dim.
            texts: encoded prompts, name -> (N, ...).
        """

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return uncond + scale * (cond - uncond) (Ho & Salimans 2022), or the plain prediction without guidance.

        Negative and positive prompts run in one call of the transformer.
        """
        if conditioning.negative is None:
            return self.velocity(latents, timestep, conditioning.positive)
        halves = (Conditioning(conditioning.negative, None), Conditioning(conditioning.positive, None))
        texts = Conditioning.cat(halves).positive
        # In full precision: guidance multiplies the difference of two similar numbers.
        uncond, cond = self.velocity(torch.cat([latents] * 2), timestep, texts).chunk(2)
        guided: Tensor = uncond + self.guidance * (cond - uncond)
        return guided

    def decode(self, latents: Tensor) -> Tensor:
        """Return VAE(latents / scaling_factor + shift_factor) / 2 + 1/2."""
        config = self.pipeline.vae.config
        return self.pixels(latents / config.scaling_factor + (config.get("shift_factor") or 0.0))

    def pixels(self, latents: Tensor) -> Tensor:
        """Return VAE(latents) / 2 + 1/2, for latents as the VAE has them, in their dtype."""
        vae = self.pipeline.vae
        pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels.to(latents.dtype) * 0.5 + 0.5


def pack(latents: Tensor) -> Tensor:
    """Return 2x2 patches as tokens, (N, h/2 * w/2, 4C), of latents (N, C, h, w)."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Return latents of a shape (N, C, h, w), from what `pack` returns of them."""
    n, c, h, w = shape
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def positions(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of each token of an image, (rows * columns,) each, without waiting for the device."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return row.repeat_interleave(columns, output_size=rows * columns), column.repeat(rows)
