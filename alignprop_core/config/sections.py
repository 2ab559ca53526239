"""The run config and its sections on training, as pydantic models.

Values are strict (`"8"` is not 8, `true` is not 1) and frozen; unknown keys are refused. `load_config` reads a file,
resolves paths and checks names against the installed plugins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from alignprop_core.config.aliases import ALIASES, RENAMED
from alignprop_core.config.base import Positive, Section, Seed, Text
from alignprop_core.config.model import BackpropConfig, LoraConfig, ModelConfig, PromptsConfig, SamplingConfig
from alignprop_core.config.rewards import MixConfig, RewardTerm
from alignprop_core.specs import DEVICE_PATTERN
from alignprop_core.validation import Problems


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    epsilon: Positive = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient norm over all adapters to this value; null never clips."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule after the warm-up; linear and cosine end at zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises from zero."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Saved LoRAs, previews and evaluations use an exponential moving average of the adapters with this decay (lower in
    the first steps); null uses the adapters as they are."""
    spike_threshold: Annotated[float, Field(gt=1)] | None = 1000.0
    """A step is skipped when its gradient norm exceeds this many times the median of the last 32 steps; null skips only
    steps that are not finite."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """The run fails when this many steps in a row had to be skipped."""


class RegularizationConfig(Section):
    """Regularization toward the base model."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared difference between the predictions with and without the adapters, over the steps that
    keep their gradient; subtracted from the mix's total. 0 turns it off, at no cost."""


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads off as false


class TrainingConfig(Section):
    """The training loop."""

    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    batch_size: int = Field(default=8, ge=1)
    """Images per batch across all processes; multiply by gradient_accumulation_steps for one optimizer step."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches summed into one optimizer step."""
    seed: Seed = 0
    """Seed of the prompt order, the noise and the truncation."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the networks; no is float32."""
    device: Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)] = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""
    compile: Annotated[Literal["off", "blocks", "auto"], BeforeValidator(_off)] = "off"
    """On a GPU, compile the denoiser's blocks: minutes before the first step of the first run, then faster steps. auto:
    if the run is long enough to save that time."""
    trackers: list[Text] = Field(default=[])
    """Where metrics are also logged: tensorboard, wandb, or the name of a plugin's callback."""


class SaveConfig(Section):
    """Files saved during training: LoRA files and complete training states."""

    every: Annotated[int, Field(ge=1)] | None = 10
    """Optimizer steps between LoRA files; null saves one at the end only."""
    keep: Annotated[int, Field(ge=1)] | None = 8
    """Number of newest LoRA files to keep; null keeps all."""
    state_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between checkpoints to resume from; null uses save.every."""
    state_keep: int = Field(default=1, ge=1)
    """Number of newest checkpoints to keep."""


class PreviewsConfig(Section):
    """Preview images, generated before the first step, during training, and after the last step."""

    every: Annotated[int, Field(ge=1)] | None = 10
    """Optimizer steps between previews; null generates them at the start and the end only."""
    seeds: list[Seed] = Field(default=[42])
    """Seeds; each preview prompt is generated once per seed."""
    prompts: list[Text] | None = None
    """Prompts of the previews; null uses the first four held-out (or training) prompts, an empty list generates no
    previews."""
    negative_prompt: str | None = None
    """Negative prompt of the previews; null uses sampling.negative_prompt."""


class EvaluationConfig(Section):
    """Evaluation of base against tuned model on held-out prompts, with the same noise."""

    rewards: list[RewardTerm] = Field(default=[])
    """Rewards that are reported but not trained on."""
    images_per_prompt: int = Field(default=4, ge=1)
    """Images per prompt."""
    batch_size: int = Field(default=8, ge=1)
    """Images generated and scored at a time."""
    seed: Seed = 1234
    """Seed of the evaluation noise."""
    at_end: bool = True
    """Evaluate when training ends (needs prompts.heldout)."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations while training, which early_stopping uses; also before the first step and after the
    last (needs prompts.heldout). null evaluates at the end only."""
    diversity_encoder: Text | None = None
    """Features that diversity is measured with: the label of a term whose reward has image features, such as a CLIP
    score; null uses built-in features of layout, color and edges."""


class EarlyStoppingConfig(Section):
    """When a run stops before its last step, and which LoRA is its result (needs evaluation.every)."""

    monitor: Text = "total"
    """Held-out score to monitor: total (the mix's weighted sum), or the label of a term, of an evaluation reward or of
    a true measure."""
    mode: Literal["max", "min"] = "max"
    """max: higher is better. min: lower is better, for a measure such as a file size."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations in a row without a new best; null never stops."""
    max_drift: Positive | None = None
    """Stop when the drift from the base model exceeds this; such an evaluation is never the best."""
    min_diversity: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop when diversity falls below this fraction of its value at the first evaluation; such an evaluation is never
    the best."""
    restore_best: bool = False
    """The run's LoRA is that of the best evaluation instead of the last step."""


def _rewards_are_required(schema: dict[str, Any]) -> None:
    schema["required"] = sorted({*schema["required"], "rewards"}, key=list(schema["properties"]).index)
    del schema["properties"]["rewards"]["default"]


class RunConfig(Section):
    """A training run of alignprop."""

    aliases: ClassVar[Mapping[str, str]] = ALIASES
    renamed: ClassVar[Mapping[str, str]] = RENAMED
    formats: ClassVar[Mapping[str, str]] = {
        "device": "auto, cpu, mps, cuda or cuda:N (as in cuda:0)",
        "label": "letters, digits, dots, dashes and underscores",
    }

    model_config = ConfigDict(json_schema_extra=_rewards_are_required)

    version: Literal[1] = 1
    """Version of this file's format."""
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    backprop: BackpropConfig = BackpropConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    # Required in a file. Empty only where all rewards are passed from Python.
    rewards: list[RewardTerm] = Field(default=[], validate_default=False, min_length=1)
    """Rewards to train on."""
    mix: MixConfig = MixConfig()
    training: TrainingConfig = TrainingConfig()
    save: SaveConfig = SaveConfig()
    previews: PreviewsConfig = PreviewsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    output: Text
    """Run folder to write; it must not contain a run yet."""

    @model_validator(mode="after")
    def _possible_together(self) -> Self:
        problems = _more_steps_than_there_are(self) + _labels_used_twice(self) + _evaluation_is_possible(self)
        if self.training.compile != "off" and not self.backprop.cuda_graphs:
            problems.append(("training.compile", "needs backprop.cuda_graphs: true."))
        if problems:
            raise Problems(problems)
        return self


def _more_steps_than_there_are(config: RunConfig) -> list[tuple[str, str]]:
    steps = config.sampling.steps
    problems = [
        (f"backprop.{key}", f"is {value}, but sampling.steps is only {steps}. Lower it or raise sampling.steps.")
        for key, value in (("k", config.backprop.k), ("refl_steps", config.backprop.refl_steps))
        if value is not None and value > steps
    ]
    mean = config.backprop.mean
    if mean is not None and not 1 <= mean <= steps:
        problems.append(
            ("backprop.mean", f"is {mean:g}; it must be between 1 and {steps}, the number of sampling.steps.")
        )
    if config.training.steps and config.optimizer.warmup_steps > config.training.steps:
        message = f"is {config.optimizer.warmup_steps}, longer than the run (training.steps: {config.training.steps})."
        problems.append(("optimizer.warmup_steps", message))
    return problems


def _evaluation_is_possible(config: RunConfig) -> list[tuple[str, str]]:
    evaluation, stopping, problems = config.evaluation, config.early_stopping, []
    if evaluation.every is not None and config.prompts.heldout is None:
        problems.append(("evaluation.every", "there is nothing to evaluate on; set prompts.heldout."))
    if evaluation.every is None:
        needs = "needs evaluations while training; set evaluation.every."
        asked = [key for key in ("patience", "max_drift", "min_diversity", "restore_best") if getattr(stopping, key)]
        problems += [(f"early_stopping.{key}", needs) for key in asked]
    if stopping.min_diversity is not None and evaluation.images_per_prompt < 2:
        message = "needs pairs of images of one prompt; set evaluation.images_per_prompt to 2."
        problems.append(("early_stopping.min_diversity", message))
    encoder = evaluation.diversity_encoder
    labels = [term.label for term in (*config.rewards, *evaluation.rewards)]
    if encoder is not None and encoder not in labels:
        message = f'"{encoder}" is not the label of a term; the labels are {", ".join(labels)}.'
        problems.append(("evaluation.diversity_encoder", message))
    return problems


def _labels_used_twice(config: RunConfig) -> list[tuple[str, str]]:
    places = [(f"rewards.{i}", term) for i, term in enumerate(config.rewards)]
    places += [(f"evaluation.rewards.{i}", term) for i, term in enumerate(config.evaluation.rewards)]
    first: dict[str, str] = {}
    problems = []
    for place, term in places:
        if (other := first.setdefault(term.label, place)) != place:
            message = f'"{term.label}" is used by {other} already. Give one of them another label.'
            problems.append((f"{place}.label", message))
    return problems
