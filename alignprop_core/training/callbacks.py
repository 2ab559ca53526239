"""What a run does along the way, each a callback: progress, previews, LoRA files, checkpoints, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console

from alignprop_core import lora
from alignprop_core.errors import OutputError
from alignprop_core.evaluation.compare import Comparison
from alignprop_core.evaluation.sheet import before_after, grid, save_picture
from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.checkpoint import save_checkpoint
from alignprop_core.training.lora_names import lora_metadata, lora_name
from alignprop_core.training.measures import Measures
from alignprop_core.training.progress import progress_bar, terms_line
from alignprop_core.training.trainer import Trainer


class ProgressBar(Callback):
    """A bar with the reward and the time left; in a pipe, a line a step instead."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = progress_bar(self.console)

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar."""
        self.task = self.bar.add_task(
            "training", total=trainer.config.training.steps, completed=trainer.step_number, figures=""
        )
        self.bar.start()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Move the bar on."""
        if record.dropped:
            self.console.print(f"step {record.step} dropped: {record.dropped}", highlight=False, soft_wrap=True)
        terms = terms_line(record)
        if self.console.is_terminal:
            self.bar.update(self.task, completed=record.step, figures=f"reward {record.reward:.4g}  {terms}")
        else:
            self.console.print(
                f"step {record.step}/{trainer.config.training.steps}  reward {record.reward:.4g}  {terms}  "
                f"{record.seconds:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def on_evaluation(self, trainer: Trainer, figures: Mapping[str, Any]) -> None:
        """Print a line."""
        scores = "  ".join(f"{label} {score['mean']:.4g}" for label, score in figures["scores"].items())
        further = [f"drift {figures['drift']:.3g}"]
        further += [] if figures["diversity"] is None else [f"diversity {figures['diversity']:.3g}"]
        self.console.print(
            f"held-out at step {trainer.step_number}  {scores}  {'  '.join(further)}", highlight=False, soft_wrap=True
        )

    def on_end(self, trainer: Trainer) -> None:
        """Take the bar away."""
        self.bar.stop()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Take the bar away, so that the message stands below it."""
        self.bar.stop()


class Previews(Callback):
    """Pictures at fixed prompts and seeds, in images/."""

    def on_start(self, trainer: Trainer) -> None:
        """Draw before the first step."""
        if trainer.config.samples.at_start and trainer.config.samples.every and trainer.step_number == 0:
            self.draw(trainer)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Draw every `samples.every` steps."""
        every = trainer.config.samples.every
        if every and record.step % every == 0:
            self.draw(trainer)

    def draw(self, trainer: Trainer) -> None:
        """Write images/step-NNNNNN.png: one picture a prompt, captioned."""
        settings = trainer.config.samples
        prompts = (trainer.heldout or trainer.prompts).prompts
        chosen = [prompts[i % len(prompts)] for i in range(settings.count)]
        pictures = []
        with torch.no_grad(), trainer.guarding.as_saved():
            for i, prompt in enumerate(chosen):
                noise = trainer.sampler.noise(seed=settings.seed, step=0, indices=[i])
                pictures.append(trainer.sampler.decode(trainer.sampler.sample([prompt], noise).latents)[0])
        save_picture(grid(pictures, chosen), trainer.folder.inside(f"images/step-{trainer.step_number:06d}.png"))


class LoraFiles(Callback):
    """lora/: a file every `save.every` steps in kohya's layout, and both formats at the end."""

    def __init__(self) -> None:
        self.name = ""

    def on_start(self, trainer: Trainer) -> None:
        """Name the files after the run."""
        self.name = lora_name(trainer.folder.path)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write a file every `save.every` steps and keep the newest."""
        settings = trainer.config.save
        if settings.every and record.step % settings.every == 0:
            file = trainer.folder.inside(f"lora/{self.name}-{record.step:06d}.safetensors")
            with trainer.guarding.as_saved():
                header = lora_metadata(trainer)
                lora.save_kohya(trainer.denoiser, file, metadata=header, component=trainer.denoiser_name)
            if settings.keep is not None:
                trainer.folder.keep_newest(f"lora/{self.name}-*.safetensors", settings.keep)

    def on_end(self, trainer: Trainer) -> None:
        """Write the final LoRA in both formats."""
        trainer.folder.inside("lora/x")
        lora.save(
            trainer.denoiser,
            trainer.folder.lora,
            name=self.name,
            metadata=lora_metadata(trainer),
            component=trainer.denoiser_name,
        )


class Checkpoints(Callback):
    """checkpoints/: complete state every `training.checkpoint_every` (or `save.every`) steps, and at the end."""

    def __init__(self) -> None:
        self.saved = 0

    def on_start(self, trainer: Trainer) -> None:
        """Remember where a resumed run began."""
        self.saved = trainer.step_number

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write a checkpoint when one is due."""
        training = trainer.config.training
        every = training.checkpoint_every or trainer.config.save.every
        if record.step == training.steps or trainer.stop_reason or (every and record.step % every == 0):
            self.save(trainer)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Keep the last good state of a run that fails or is interrupted; a full disk keeps the checkpoint before."""
        if self.saved < trainer.step_number and trainer.consistent and not isinstance(error, OutputError):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint and keep the newest."""
        save_checkpoint(trainer.folder, trainer.checkpoint())
        self.saved = trainer.step_number
        trainer.folder.keep_newest("checkpoints/step-*", trainer.config.training.keep_checkpoints)


class Evaluation(Callback):
    """evaluation.json at the end: base against tuned on held-out prompts, with a before/after sheet in images/."""

    def __init__(self, measures: Measures) -> None:
        self.measures = measures
        self.result: Comparison | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Load the measures before the first step, so that one that cannot load does not cost the run."""
        if trainer.config.evaluation.at_end and trainer.heldout is not None:
            self.measures.load()

    def on_end(self, trainer: Trainer) -> None:
        """Evaluate and write."""
        if trainer.config.evaluation.at_end and trainer.heldout is not None:
            self.result = self.measures.compare({"base": self.measures.base, "tuned": nullcontext})
            told = {"step": trainer.saved_step, "stopped": trainer.stop_reason}
            trainer.folder.write_json("evaluation.json", self.result.as_json() | told)
            save_picture(before_after(self.result), trainer.folder.inside("images/before_after.png"))
