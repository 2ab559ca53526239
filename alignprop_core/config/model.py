"""The run config's sections on the model: model, prompts, sampling, backprop, lora."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from alignprop_core.config.base import Pixels, Positive, Section, Text
from alignprop_core.config.schedulers import SCHEDULERS, canonical_scheduler
from alignprop_core.locate import PARTS
from alignprop_core.prompts import prompt_entry
from alignprop_core.validation import Problems


class ModelLora(Section):
    """A LoRA applied to the base model and frozen."""

    path: Text
    """Path of a LoRA folder or a .safetensors file."""
    strength: float = 1.0
    """Factor on the weight change; 1 is the LoRA as trained."""


class ModelConfig(Section):
    """The base model."""

    base: Text
    """A registered model, a hub id, a diffusers folder, or one .safetensors file with a complete model."""
    vae: Text | None = None
    """Another autoencoder instead of the model's own: a diffusers folder, a hub id or a .safetensors file."""
    unet: Text | None = None
    """A .safetensors file with the UNet, as ComfyUI keeps it, instead of the weights at `base`."""
    transformer: Text | None = None
    """The same for a transformer (Stable Diffusion 3, FLUX, Z-Image)."""
    text_encoder: Text | None = None
    """The same for the text encoder, or the first of several (CLIP-L)."""
    text_encoder_2: Text | None = None
    """The same for the second text encoder (CLIP-G; T5 in FLUX.1)."""
    text_encoder_3: Text | None = None
    """The same for the third text encoder (T5 in Stable Diffusion 3)."""
    loras: list[ModelLora] = Field(default=[])
    """LoRAs that belong to the base model; applied and frozen."""

    @property
    def parts(self) -> dict[str, str]:
        """The parts that are not from `base`: name -> file, or for the autoencoder also folder or hub id."""
        return {part: value for part in PARTS if (value := getattr(self, part)) is not None}


_Prompt = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["prompt"]}]})]
PromptSource = Text | Annotated[list[_Prompt], Field(min_length=1)]
"""A registered set, a file, or a list of texts and of mappings with the key `prompt` and metadata."""


class PromptsConfig(Section):
    """The prompts."""

    train: PromptSource
    """Prompts to train on: a registered set, a .txt or .jsonl file, or a list."""
    heldout: PromptSource | None = None
    """Prompts never trained on, for evaluation: a registered set, a file or a list."""

    @field_validator("train", "heldout")
    @classmethod
    def _plain(cls, value: str | list[Any] | None) -> str | list[Any] | None:
        if not isinstance(value, list):
            return value
        entries: list[Any] = []
        problems = []
        for i, item in enumerate(value):
            try:
                prompt, metadata = prompt_entry(item)
                entries.append({"prompt": prompt, **metadata} if metadata else prompt)
            except ValueError as error:
                problems.append((str(i), str(error)))
        if problems:
            raise Problems(problems)
        return entries


_Scheduler = Annotated[
    str,
    AfterValidator(canonical_scheduler),
    WithJsonSchema({"anyOf": [{"enum": list(SCHEDULERS)}, {"type": "string"}]}),
]


class SamplingConfig(Section):
    """How images are sampled, in training, previews and evaluation."""

    scheduler: _Scheduler | None = None
    """The update rule of a denoising step, by its name here, by its class in diffusers (EulerDiscreteScheduler) or by
    another common name ("DPM++ 2M Karras"). null uses the one for the model's kind: ddim for Stable Diffusion 1, 2 and
    XL, flow_match_euler for the other families."""
    steps: int = Field(default=50, ge=1)
    """Denoising steps per image."""
    guidance_scale: float = Field(default=7.5, ge=1)
    """Classifier-free guidance scale; 1 turns guidance off. For FLUX.1 [dev] it is an input of the network, made for
    about 3.5; models distilled to run without guidance need 1 or ignore it."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """DDIM eta: 0 is deterministic, 1 adds noise as DDPM does."""
    width: Pixels | None = None
    """Image width in pixels; null uses the model's own."""
    height: Pixels | None = None
    """Image height in pixels; null uses the model's own."""
    negative_prompt: str = ""
    """Negative prompt for classifier-free guidance."""
    true_cfg_scale: Annotated[float, Field(ge=1)] | None = None
    """FLUX.1: scale of true classifier-free guidance, with the negative prompt; null turns it off."""

    @model_validator(mode="after")
    def _eta_with_ddim(self) -> Self:
        if self.eta and self.scheduler not in (None, "ddim"):
            raise Problems([("eta", f"{self.scheduler} has no eta, only ddim has. Remove it, or set scheduler: ddim.")])
        return self


Strategy = Literal["last_k", "uniform", "gaussian", "full", "drtune", "refl", "bernoulli", "sparse", "bridge", "leap"]

_USED_BY: dict[str, tuple[str, ...]] = {
    "k": ("last_k", "drtune", "sparse", "bridge"),
    "mean": ("gaussian",),
    "std": ("gaussian",),
    "keep_probability": ("bernoulli",),
    "refl_steps": ("refl",),
    "late_bias": ("sparse", "bridge"),
    "rescale": ("sparse", "bridge"),
    "input_scale": ("bridge", "leap"),
    "leap_tolerance": ("leap",),
}


class BackpropConfig(Section):
    """Truncated backpropagation: which denoising steps keep their gradient, and how memory is saved."""

    strategy: Strategy = "uniform"
    """last_k: the last k steps (DRaFT-K). uniform: the last K steps, K drawn once per batch from 1..steps (AlignProp).
    gaussian: K drawn from a normal distribution. full: all steps. drtune: k evenly spaced steps, network input
    detached. refl: the clean-image estimate of one late step. bernoulli: steps at random. sparse: k random steps,
    network input detached (FlowBP-Sparse). bridge: the same on both sides of a connected step (FlowBP-Bridge). leap:
    two random steps, each extended to the next (LeapAlign)."""
    k: Annotated[int, Field(ge=1)] | None = None
    """last_k, drtune, sparse, bridge: number of steps that keep their gradient; null is 1 (sparse: 3, bridge: 5)."""
    mean: float | None = None
    """gaussian: mean of K in steps; null is half the steps."""
    std: Annotated[float, Field(ge=0)] | None = None
    """gaussian: standard deviation of K in steps; null is a sixth of the steps."""
    keep_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """bernoulli: probability that a step keeps its gradient; null is 0.5."""
    refl_steps: Annotated[int, Field(ge=1)] | None = None
    """refl: the step is drawn from this many last steps; null is a quarter of the steps."""
    late_bias: Annotated[float, Field(ge=0)] | None = None
    """sparse and bridge: step i of 0.. is drawn with probability proportional to (i + 1)^late_bias; null is 2."""
    rescale: Annotated[float, Field(ge=0)] | None = None
    """sparse and bridge: how much the kept steps' gradient grows to replace that of the dropped steps; null is 1."""
    input_scale: Annotated[float, Field(ge=0, le=1)] | None = None
    """bridge and leap: factor on the gradient through the input of the connected step; null is 0.1 (leap: 0.3)."""
    leap_tolerance: Annotated[float, Field(gt=0)] | None = None
    """leap: samples whose leaps miss the chain by less (mean absolute difference of latents) are weighted alike; null
    is 0.1."""
    lv_samples: int = Field(default=0, ge=0)
    """Additional one-step samples of each final latent (DRaFT-LV); needs last_k with k: 1."""
    checkpoint_steps: Literal["auto"] | bool = "auto"
    """Recompute kept steps in the backward pass to save memory; auto: on a GPU always, otherwise if memory is short."""
    checkpoint_blocks: Literal["auto"] | bool = "auto"
    """Recompute the denoiser's blocks inside a kept step to save memory; auto: only if one step's activations do not
    fit."""
    checkpoint_decoder: Literal["auto"] | bool = "auto"
    """Recompute the decoder in the backward pass to save memory; auto: only if memory is short, on a GPU also if one
    image would need more than the denoiser."""
    cuda_graphs: bool = True
    """On a GPU, record the networks' calls once for each shape and replay them, so that it does not wait for Python."""
    sample_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images denoised at a time; null is all, on a GPU as many as fit. Changes memory and time, never values."""
    decode_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images decoded and scored at a time; null is all, on a GPU as many as need no more memory than the denoiser.
    Changes memory and time, never values."""

    @model_validator(mode="after")
    def _only_what_the_strategy_uses(self) -> Self:
        problems = [
            (key, f"strategy {self.strategy} does not use it. Remove it, or choose strategy {' or '.join(strategies)}.")
            for key, strategies in _USED_BY.items()
            if getattr(self, key) is not None and self.strategy not in strategies
        ]
        if self.lv_samples and (self.strategy != "last_k" or (self.k or 1) != 1):
            problems.append(
                ("lv_samples", "needs strategy: last_k with k: 1 (DRaFT-LV). Set them, or set lv_samples: 0.")
            )
        if problems:
            raise Problems(problems)
        return self


class LoraConfig(Section):
    """The trainable adapter."""

    rank: int = Field(default=8, ge=1)
    """Rank of the adapter."""
    alpha: Positive | None = None
    """Scale: the weight change is alpha / rank * B A; null is rank."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | None = None
    """Layers to adapt, by the end of their names; null adapts the attention projections."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    init_from: Text | None = None
    """Start from this LoRA: a folder or a .safetensors file; null starts at zero."""
