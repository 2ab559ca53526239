"""The trainer: a run config becomes a run folder with a LoRA that scores higher."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from alignprop_core import lora
from alignprop_core.config.given import with_given
from alignprop_core.config.sections import RunConfig
from alignprop_core.devices import device_and_dtype, keep_freed_memory, peak_memory
from alignprop_core.diffusion.families.find import family_for
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.size import drawn_size
from alignprop_core.errors import RunError, under
from alignprop_core.mix.figures import StepFigures
from alignprop_core.mix.load import check_prompts, load_terms
from alignprop_core.mix.mix import Mix
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import Reward
from alignprop_core.runs.folder import RunFolder
from alignprop_core.runs.metrics import STOPPED
from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.checkpoint import Checkpoint, load_checkpoint
from alignprop_core.training.folder import open_folder
from alignprop_core.training.gradient import StepGradient
from alignprop_core.training.gradient import choose_prompts as choose_prompts
from alignprop_core.training.guarding import Guarding
from alignprop_core.training.preflight import check_inputs
from alignprop_core.training.resume import check_objects
from alignprop_core.training.trial import score_advice, try_local
from alignprop_core.training.updates import Updates


@dataclass
class _Progress:
    step: int = 0
    reward_queries: int = 0
    updating: bool = False


class Trainer:
    """Fine-tunes LoRA adapters on a mix of rewards.

    Building one loads and checks everything and writes nothing; `train()` writes the run folder. Rewards load before
    the model, so that a reward that cannot load costs seconds, not minutes.

    Args:
        config: the run config.
        registry: installed plugins; discovered if None.
        rewards: reward objects by name, beside those of plugins; what the config does not mention gets weight 1.
        callbacks: watchers beside the built-in ones.
        resume: a run folder or checkpoint to go on from.
        edited: go on although the code of a reward was changed since, as after mending it.
        overwrite: replace an earlier run in the output folder.
        pipeline: a loaded diffusers pipeline to train instead of loading `model.base`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        registry: Registry | None = None,
        rewards: Mapping[str, Reward] | None = None,
        callbacks: Sequence[Callback] = (),
        resume: Path | None = None,
        edited: bool = False,
        overwrite: bool = False,
        pipeline: Any = None,
    ) -> None:
        self.registry = (registry or default_registry()).with_rewards(rewards or {})
        self.config = config = with_given(config, self.registry)
        self.callbacks = list(callbacks)
        self.state = PartialState(cpu=config.training.device == "cpu")
        self.device, self.dtype = device_and_dtype(config.training.device, config.training.mixed_precision)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.output = Path(config.output)
        self._overwrite = overwrite
        inputs = check_inputs(
            config, self.registry, resume=resume, edited=edited, overwrite=overwrite, loads_model=pipeline is None
        )
        if inputs.checkpoint is not None and not edited:
            check_objects(inputs.checkpoint, self.registry.given, config)
        checkpoint = None if inputs.checkpoint is None else load_checkpoint(inputs.checkpoint)
        self.prompts, self.heldout = inputs.prompts, inputs.heldout
        self.mix = Mix(load_terms(config.rewards, self.registry, where="rewards"), config.mix).to(self.device)
        with under("prompts.train"):
            check_prompts(self.mix.terms, self.prompts)
        if self.heldout is not None:
            with under("prompts.heldout"):
                check_prompts(self.mix.terms, self.heldout)
        size = drawn_size(config, self.registry, pipeline)
        try_local(self.mix.terms, config.rewards, self.registry, prompts=self.prompts, device=self.device, size=size)
        self.pipeline = pipeline or load_pipeline(
            config.model.base,
            registry=self.registry,
            device=self.device,
            dtype=self.dtype,
            vae=config.model.vae,
        )
        plugins = [offer.spec for offer in self.registry.families()]
        family = family_for(self.pipeline, config.sampling, plugins)
        self.denoiser = family.denoiser
        for number, extra in enumerate(config.model.loras):
            lora.attach_frozen(self.pipeline, extra.path, extra.strength, f"frozen_{number}")
        self.parameters = lora.attach(
            self.denoiser,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            targets=config.lora.targets,
            rank_stabilized=config.lora.rank_stabilized,
            init_from=config.lora.init_from,
            seed=config.training.seed,
        )
        self.sampler = Sampler(
            self.pipeline, config.sampling, config.backprop, family=family, regularization=config.regularization.weight
        )
        self.updates = Updates(config, self.parameters, self.device, self.dtype)
        self.gradient = StepGradient(config, self.sampler, self.mix, self.prompts, self.updates, self.state)
        advice = {entry.label: score_advice(entry, self.registry) for entry in config.rewards}
        self.guarding = Guarding(config, self.parameters, advice)
        self.stop_reason: str | None = None
        self._adopted_step: int | None = None
        self.progress = _Progress()
        self._folder: RunFolder | None = None
        self._resumed_from = inputs.checkpoint
        if checkpoint is not None:
            self._restore(checkpoint)
        self.optimizer, self.schedule, self.scaler = self.updates.optimizer, self.updates.schedule, self.updates.scaler

    @property
    def denoiser_name(self) -> str:
        """Name of the trained network in its pipeline: "unet" or "transformer"."""
        return self.sampler.family.denoiser_name

    @property
    def step_number(self) -> int:
        """Optimizer steps done so far."""
        return self.progress.step

    @property
    def folder(self) -> RunFolder:
        """The open run folder; there is one while `train()` runs."""
        if self._folder is None:
            raise RunError("The run folder exists only once train() has begun.")
        return self._folder

    # -- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run all remaining steps; returns the run folder.

        Raises:
            RunError: a reward or a gradient is not finite, or a reward broke its contract. Everything saved stays.
        """
        main = self.state.is_main_process
        # Every process checks that the folder is free when it is built: none may make it before all are.
        self.state.wait_for_everyone()
        callbacks = self.callbacks if main else []
        self._folder = self._open() if main else RunFolder(self.output, lock=None)
        try:
            for callback in callbacks:
                callback.on_start(self)
            while self.progress.step < self.config.training.steps and not self._stops():
                record = self.step()
                if main:
                    self.folder.append_metrics(record.as_json())
                for callback in callbacks:
                    callback.on_step(self, record)
                self.guarding.steps.check()
            self.guarding.steps.check(ended=True)
            if main and self.stop_reason is not None:
                self.folder.append_metrics({"step": self.progress.step, STOPPED: self.stop_reason})
            self._settle()
            for callback in callbacks:
                callback.on_end(self)
            self.state.wait_for_everyone()
        except BaseException as error:
            for callback in callbacks:
                callback.on_error(self, error)
            raise
        finally:
            self._folder.close()
        return self.output

    def _open(self) -> RunFolder:
        return open_folder(
            self.config,
            self.registry,
            device=self.device,
            checkpoint=self._resumed_from,
            step=self.progress.step,
            overwrite=self._overwrite,
        )

    def step(self) -> StepRecord:
        """Do one optimizer step."""
        started = time.perf_counter()
        step = self.progress.step
        self.updates.clear()
        first = self.mix.unmeasured  # its images are made twice: once to learn the terms' sizes
        if first:
            self.progress.reward_queries += self.gradient.learn_sizes(step)
        taken = self.gradient.take(step)
        figures, grad_norm = taken.figures, taken.grad_norm
        idle = None if figures.moving else self.mix.why_idle(step)
        rate, overflow = self.updates.rate, self.updates.overflow_expected
        norms = {label: norm for label, term in figures.terms.items() if (norm := term["grad_norm"]) is not None}
        dropped = self.guarding.steps.judge(step + 1, figures.score, grad_norm, overflow_expected=overflow, terms=norms)
        self._update(figures, learn=not first and dropped is None, dropped=dropped is not None)
        return StepRecord(
            step=step + 1,
            reward=figures.reward,
            terms=figures.terms,
            grad_norm=grad_norm,
            learning_rate=rate,
            kept_steps=len(self.sampler.plan(seed=self.config.training.seed, step=step).kept),
            reward_queries=self.progress.reward_queries,
            seconds=time.perf_counter() - started,
            peak_memory=peak_memory(self.device),
            cosines=figures.cosines,
            idle=idle,
            regularization=taken.regularization,
            dropped=dropped,
        )

    def _update(self, figures: StepFigures, *, learn: bool, dropped: bool) -> None:
        self.progress.updating = True
        changed = self.updates.apply(moves=figures.moving and not dropped)
        if changed and self.guarding.average is not None:
            self.guarding.average.update()
        self.progress.step += 1
        self.progress.reward_queries += figures.images
        if learn:
            self.mix.update(figures)
        self.progress.updating = False

    @property
    def consistent(self) -> bool:
        """Whether adapters, optimizer and step number belong together: not inside an update, not after the end."""
        return not self.progress.updating and self._adopted_step is None

    # -- the end ------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End the run after this step, as if it were the last; for callbacks (the main process decides)."""
        self.stop_reason = reason

    def adopt(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take these adapters, of an earlier step, for the run's result; only after the last step."""
        lora.load_state(self.denoiser, tensors)
        self._adopted_step = step

    @property
    def saved_step(self) -> int:
        """Step of the adapters that are saved now: the run's own, or the best one's once that is adopted."""
        return self.progress.step if self._adopted_step is None else self._adopted_step

    def _stops(self) -> bool:
        """Whether a callback ended the run; callbacks run on the main process, and all stop together."""
        if self.state.num_processes > 1:
            reason = [self.stop_reason]
            torch.distributed.broadcast_object_list(reason, src=0)
            self.stop_reason = reason[0]
        return self.stop_reason is not None

    def _settle(self) -> None:
        """After the last step: the adapters become what is saved, for good."""
        if self.guarding.average is not None:
            self.guarding.average.copy_to_parameters()
        self._adopted_step = self.progress.step

    # -- state --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Return the complete state of the run."""
        state = {
            "step": self.progress.step,
            "reward_queries": self.progress.reward_queries,
            **self.updates.as_json(),
            "mix": self.mix.state(),
            "guarding": self.guarding.as_json(),
        }
        return Checkpoint(lora.state(self.denoiser), self.updates.tensors(), state, self.guarding.tensors())

    def _restore(self, checkpoint: Checkpoint) -> None:
        lora.load_state(self.denoiser, checkpoint.adapter)
        self.updates.load(checkpoint.state, checkpoint.optimizer)
        self.mix.load_state(checkpoint.state.get("mix", {}))
        self.progress.step = int(checkpoint.state["step"])
        self.progress.reward_queries = int(checkpoint.state["reward_queries"])
        if "guarding" in checkpoint.state:
            self.guarding.load(checkpoint.state["guarding"], checkpoint.extra)
