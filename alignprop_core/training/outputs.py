"""What a run writes during training and at the end: previews, LoRA files, checkpoints, the final evaluation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignprop_core.diffusion.finite import require_finite
from alignprop_core.errors import OutputError
from alignprop_core.evaluation.evaluator import Evaluator
from alignprop_core.evaluation.sheet import before_after, grid, save_image
from alignprop_core.mix.stats import StepStats
from alignprop_core.training.callback import Callback
from alignprop_core.training.checkpoint import save_checkpoint
from alignprop_core.training.lora_files import lora_name, save_lora

PREVIEW_PROMPTS = 4
"""How many of the held-out (or training) prompts are previewed where `previews.prompts` names none."""

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


class Previews(Callback):
    """Images of fixed prompts and seeds in images/: before the first step, during training, and after the last."""

    def __init__(self) -> None:
        self.last: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Generate images before the first step."""
        if trainer.step_number == 0:
            self.generate(trainer)

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Generate images every `previews.every` steps."""
        every = trainer.config.previews.every
        if every and stats.step % every == 0:
            self.generate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Generate images after the last step."""
        if self.last != trainer.step_number:
            self.generate(trainer)

    def generate(self, trainer: Trainer) -> None:
        """Write images/step-NNNNNN.png: one image per prompt and seed, with captions."""
        settings = trainer.config.previews
        prompts = settings.prompts
        if prompts is None:
            known = (trainer.heldout or trainer.prompts).prompts
            prompts = [known[i % len(known)] for i in range(PREVIEW_PROMPTS)]
        images: list[Tensor] = []
        captions: list[str] = []
        with torch.no_grad(), trainer.as_saved():
            for seed in settings.seeds:
                for i, prompt in enumerate(prompts):
                    noise = trainer.sampler.noise([prompt], seed=seed, step=0, indices=[i])
                    out = trainer.sampler.sample([prompt], noise, negative_prompt=settings.negative_prompt)
                    decoded = trainer.sampler.decode(out.latents)
                    require_finite(trainer.sampler, decoded, [prompt], noise)
                    images.append(decoded[0])
                    captions.append(prompt if len(settings.seeds) == 1 else f"{prompt} (seed {seed})")
        self.last = trainer.step_number
        if images:
            trainer.preview = images[0]
            save_image(grid(images, captions), trainer.folder.inside(f"images/step-{trainer.step_number:06d}.png"))


class LoraFiles(Callback):
    """lora/: a file in kohya's layout every `save.every` steps, and both formats at the end."""

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Write a file every `save.every` steps and keep the newest."""
        settings = trainer.config.save
        if settings.every and stats.step % settings.every == 0:
            with trainer.as_saved():
                save_lora(trainer, suffix=f"-{stats.step:06d}", formats=("kohya",))
            if settings.keep is not None:
                trainer.folder.keep_newest(f"lora/{lora_name(trainer.folder.path)}-*.safetensors", settings.keep)

    def on_end(self, trainer: Trainer) -> None:
        """Write the final LoRA in both formats."""
        save_lora(trainer)


class Checkpoints(Callback):
    """checkpoints/: the complete state every `save.state_every` (or `save.every`) steps, and at the end."""

    def __init__(self) -> None:
        self.saved = 0

    def on_start(self, trainer: Trainer) -> None:
        """Remember where a resumed run began."""
        self.saved = trainer.step_number

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Write a checkpoint when one is due."""
        every = trainer.config.save.state_every or trainer.config.save.every
        last = stats.step == trainer.config.training.steps or trainer.stop_reason
        if last or (every and stats.step % every == 0):
            self.save(trainer)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Save the last good state of a run that fails or is interrupted; a full disk keeps the one before."""
        if self.saved < trainer.step_number and trainer.consistent and not isinstance(error, OutputError):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint and keep the newest."""
        save_checkpoint(trainer.folder, trainer.checkpoint())
        self.saved = trainer.step_number
        trainer.folder.keep_newest("checkpoints/step-*", trainer.config.save.state_keep)


class FinalEvaluation(Callback):
    """evaluation.json at the end: base against tuned on held-out prompts, with a before/after sheet in images/."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def on_end(self, trainer: Trainer) -> None:
        """Evaluate and write."""
        result = self.evaluator.evaluate({"base": self.evaluator.base, "tuned": nullcontext})
        trainer.comparison = result
        facts = {"step": trainer.saved_step, "stopped": trainer.stop_reason}
        trainer.folder.write_json("evaluation.json", result.as_json() | facts)
        save_image(before_after(result), trainer.folder.inside("images/before_after.png"))
