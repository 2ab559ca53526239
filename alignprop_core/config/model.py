"""The run config's sections on what is drawn and tuned: model, prompts, sampling, backprop, lora. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alignprop_core.config.base import Pixels, Positive, Section, Text
from alignprop_core.validation import Problems


class ModelLora(Section):
    """A LoRA applied to the base model and frozen."""

    path: Text = Field(description="A LoRA folder or a .safetensors file.")
    strength: float = Field(default=1.0, description="Factor on its weight change; 1 is the LoRA as trained.")


class ModelConfig(Section):
    """The base model."""

    base: Text = Field(
        description="A registered model, a hub id, a diffusers folder, or one .safetensors file with a whole model."
    )
    vae: Text | None = Field(default=None, description="Another autoencoder: a diffusers folder or a hub id.")
    loras: list[ModelLora] = Field(default=[], description="LoRAs applied to the base model, frozen while training.")


class PromptsConfig(Section):
    """What to draw."""

    train: Text = Field(description="Prompts to train on: a registered set, or a .txt or .jsonl file.")
    heldout: Text | None = Field(
        default=None, description="Prompts never trained on, for evaluation: a registered set or a file."
    )


class SamplingConfig(Section):
    """How images are sampled, in training and evaluation alike."""

    scheduler: Literal["ddim"] = Field(default="ddim", description="The sampler's update rule.")
    steps: int = Field(default=50, ge=1, description="Denoising steps an image.")
    guidance_scale: float = Field(default=7.5, ge=1, description="Classifier-free guidance; 1 is off.")
    eta: float = Field(default=0.0, ge=0, le=1, description="DDIM noise: 0 is deterministic, 1 is DDPM-like.")
    width: Pixels | None = Field(default=None, description="Image width in pixels; null is the model's own.")
    height: Pixels | None = Field(default=None, description="Image height in pixels; null is the model's own.")
    negative_prompt: str = Field(default="", description="What guidance leads away from.")
    true_cfg_scale: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="Real classifier-free guidance for guidance-distilled families; null is off."
    )


Strategy = Literal["last_k", "uniform", "gaussian", "full", "drtune", "refl", "bernoulli"]

_USED_BY: dict[str, tuple[str, ...]] = {
    "k": ("last_k", "drtune"),
    "mean": ("gaussian",),
    "std": ("gaussian",),
    "keep_probability": ("bernoulli",),
    "refl_steps": ("refl",),
}


class BackpropConfig(Section):
    """Which denoising steps keep their gradient, and what memory that may take."""

    strategy: Strategy = Field(
        default="uniform",
        description="last_k: the last k steps (DRaFT-K). uniform: the last K, K drawn from 1..steps once a batch "
        "(AlignProp). gaussian: K drawn from a normal. full: all. drtune: k spaced steps, network input detached. "
        "refl: a clean-image estimate at one late step. bernoulli: each step kept at random.",
    )
    k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Steps that keep their gradient, with last_k and drtune; null is 1."
    )
    mean: float | None = Field(default=None, description="gaussian: mean of K in steps; null is half the steps.")
    std: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="gaussian: standard deviation of K in steps; null is a sixth of the steps."
    )
    keep_probability: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="bernoulli: probability that a step keeps its gradient; null is 0.5."
    )
    refl_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="refl: the step is drawn among the last this many; null is a quarter of the steps."
    )
    lv_samples: int = Field(
        default=0, ge=0, description="Further one-step samples of each final latent (DRaFT-LV); with last_k of 1 only."
    )
    checkpoint_steps: Literal["auto"] | bool = Field(
        default="auto", description="Recompute kept steps on the way back to save memory; auto: where memory is short."
    )
    checkpoint_decoder: Literal["auto"] | bool = Field(
        default="auto", description="Recompute the decoder on the way back to save memory; auto: where memory is short."
    )
    sample_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Images denoised at a time; null is all. Changes cost, never values."
    )
    decode_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Images decoded and scored at a time; null is all. Changes cost, never values."
    )

    @model_validator(mode="after")
    def _only_what_the_strategy_uses(self) -> Self:
        problems = [
            (key, f"strategy {self.strategy} does not use it; remove it, or choose strategy {' or '.join(strategies)}.")
            for key, strategies in _USED_BY.items()
            if getattr(self, key) is not None and self.strategy not in strategies
        ]
        if self.lv_samples and (self.strategy != "last_k" or (self.k or 1) != 1):
            problems.append(("lv_samples", "needs strategy: last_k with k: 1 (DRaFT-LV); set them, or lv_samples: 0."))
        if problems:
            raise Problems(problems)
        return self


class LoraConfig(Section):
    """The adapters that are trained."""

    rank: int = Field(default=8, ge=1, description="Rank of the weight changes.")
    alpha: Positive | None = Field(default=None, description="Scale: the change is alpha / rank * B A; null is rank.")
    target_modules: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="Layers to adapt, by name ending; null is the family's attention projections."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    init_from: Text | None = Field(
        default=None,
        description="Go on from this LoRA: a folder or a .safetensors file; null starts at zero.",
    )
