"""The trainer: a run config becomes a run folder with a LoRA that scores higher."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from alignprop_core.config.advice import score_advice
from alignprop_core.config.given import with_given
from alignprop_core.config.load import Given, load_config
from alignprop_core.devices import device_and_dtype, keep_freed_memory, peak_memory, processes
from alignprop_core.diffusion.compiling import COMPILE_GAIN, COMPILE_SECONDS
from alignprop_core.diffusion.costs import Costs
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import RunError, under
from alignprop_core.evaluation.evaluator import NOT_FINITE, Evaluator, evaluation_terms
from alignprop_core.lora import adapters
from alignprop_core.mix.load import check_prompts, load_terms
from alignprop_core.mix.mix import Mix
from alignprop_core.mix.stats import StepStats
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.runs.fingerprints import files_of
from alignprop_core.runs.folder import RunFolder
from alignprop_core.runs.metrics import STOPPED
from alignprop_core.training import given_pipeline, out_of_memory
from alignprop_core.training.callback import Callback
from alignprop_core.training.checkpoint import Checkpoint, load_checkpoint, optimizer_tensors
from alignprop_core.training.diagnosis import locate_not_finite
from alignprop_core.training.ema import EMA
from alignprop_core.training.folder import open_folder
from alignprop_core.training.optimizer import Optimizer
from alignprop_core.training.preflight import Inputs, check_inputs
from alignprop_core.training.result import Run
from alignprop_core.training.resume import check_files, check_objects
from alignprop_core.training.standard import standard_callbacks
from alignprop_core.training.step import StepGradient
from alignprop_core.training.step_check import StepCheck
from alignprop_core.training.trial import try_all

if TYPE_CHECKING:
    from alignprop_core.evaluation.compare import Comparison


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
        config: the run config: a `RunConfig`, a dict or a YAML file.
        registry: installed plugins; discovered if None.
        rewards: functions, classes or objects by name, beside the rewards of plugins; what the config does not mention
            gets weight 1.
        callbacks: called after the standard callbacks.
        resume: a run folder or checkpoint to resume from.
        edited: resume even if files or the code of a reward have changed, for example after a bug fix.
        overwrite: replace an earlier run in the output folder.
        inputs: what `preflight.check_inputs` returned, if it has run already.
        pipeline: a loaded diffusers pipeline to train instead of loading `model.base`.
        console: where progress is shown; standard error if None.

    Attributes:
        callbacks: the standard callbacks, which write the run folder, then those given.
        ema: the adapters' moving average (`optimizer.ema_decay`), or None.
        evaluator: evaluates on held-out prompts, or None for a run that does not.
        callback_state: what callbacks keep in checkpoints, by names of their own: JSON.
        callback_tensors: tensors that callbacks keep in checkpoints, by names of their own.
        costs: what a step was predicted to need, on a GPU, after `train()` has started.
        comparison: base against tuned on held-out prompts, after the end of a run that evaluates.
        preview: the first of the last preview images, (3, H, W) in [0, 1].
        stop_reason: why the run stopped before its last step, or None.
    """

    def __init__(
        self,
        config: Given,
        *,
        registry: Registry | None = None,
        rewards: Mapping[str, object] | None = None,
        callbacks: Sequence[Callback] = (),
        resume: str | os.PathLike[str] | None = None,
        edited: bool = False,
        overwrite: bool = False,
        inputs: Inputs | None = None,
        pipeline: Any = None,
        console: Console | None = None,
    ) -> None:
        self.registry = (registry or default_registry()).with_rewards(rewards or {})
        self.config = config = with_given(load_config(config, registry=self.registry), self.registry)
        self.processes = processes(cpu=config.training.device == "cpu")
        self.device, self.dtype = device_and_dtype(config.training.device, config.training.mixed_precision)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.output = Path(config.output)
        self._overwrite = overwrite
        self._given = pipeline
        inputs = inputs or check_inputs(
            config,
            self.registry,
            resume=None if resume is None else Path(resume),
            edited=edited,
            overwrite=overwrite,
            loads_model=pipeline is None,
        )
        self._resumed_from = inputs.checkpoint
        find_files = partial(files_of, config, self.registry, inputs.prompts, inputs.heldout, model=pipeline is None)
        Thread(target=find_files, daemon=True).start()  # checksums of large weights, while these are loaded
        if inputs.checkpoint is not None and not edited:
            check_objects(inputs.checkpoint, self.registry.given, config)
        checkpoint = None if inputs.checkpoint is None else load_checkpoint(inputs.checkpoint)
        self.prompts, self.heldout = inputs.prompts, inputs.heldout
        self.mix = Mix(load_terms(config.rewards, self.registry, where="rewards"), config.mix).to(self.device)
        for key, prompts in (("prompts.train", self.prompts), ("prompts.heldout", self.heldout)):
            if prompts is not None:
                with under(key):
                    check_prompts(self.mix.terms, prompts)
        evaluates = self.heldout is not None and (config.evaluation.at_end or config.evaluation.every is not None)
        reported = self._evaluation_terms() if evaluates else None
        if pipeline is not None:
            given_pipeline.prepare(pipeline, config, self.device, self.dtype)
        self.sampler = Sampler.load(
            pipeline or config.model.base,
            adapter=config.lora,
            seed=config.training.seed,
            sampling=config.sampling,
            backprop=config.backprop,
            regularization=config.regularization.weight,
            frozen=config.model.loras,
            device=self.device,
            mixed_precision=config.training.mixed_precision,
            registry=self.registry,
            parts=config.model.parts,
        )
        self.parameters = self.sampler.trainable_parameters()
        self.optimizer = Optimizer(config, self.parameters)
        self.gradient = StepGradient(config, self.sampler, self.mix, self.prompts, self.optimizer, self.processes)
        self.costs: Costs | None = None
        advice = {entry.label: score_advice(entry, self.registry) for entry in config.rewards}
        self.step_check = StepCheck(config.optimizer, advice)
        self.ema = None if config.optimizer.ema_decay is None else EMA(self.parameters, config.optimizer.ema_decay)
        self.callback_state: dict[str, Any] = {}
        self.callback_tensors: dict[str, dict[str, Tensor]] = {}
        self.evaluator: Evaluator | None = None
        if reported is not None and self.heldout is not None:
            remember, failures = config.evaluation.at_end, self.output / "images" / NOT_FINITE
            self.evaluator = Evaluator(
                self.sampler, reported, self.heldout, config.evaluation, remember=remember, failures=failures
            )
        self.comparison: Comparison | None = None
        self.preview: Tensor | None = None
        self.stop_reason: str | None = None
        self._adopted_step: int | None = None
        self.progress = _Progress()
        self._folder: RunFolder | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        self._files = find_files(read={term.label: term.files for term in self.mix.terms})
        if inputs.checkpoint is not None and not edited:
            check_files(inputs.checkpoint, self._files)
        with out_of_memory.explained(self):
            try_all(self, reported or self.mix.terms)
        self.console = console or Console(stderr=True)
        self.callbacks = [*standard_callbacks(self), *callbacks]

    def _evaluation_terms(self) -> list[Any]:
        assert self.heldout is not None
        return evaluation_terms(
            [*self.config.rewards, *self.config.evaluation.rewards],
            self.heldout,
            self.registry,
            device=self.device,
            loaded=self.mix.terms,
            where="evaluation.rewards",
        )

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline that is trained."""
        return self.sampler.family.pipeline

    @property
    def denoiser(self) -> nn.Module:
        """The network that carries the adapter."""
        return self.sampler.family.denoiser

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
        """The open run folder, while `train()` runs."""
        if self._folder is None:
            raise RunError("The run folder exists only after train() has started.")
        return self._folder

    def as_saved(self) -> AbstractContextManager[None]:
        """Give the adapters the values that are saved and evaluated: their moving average where there is one."""
        return nullcontext() if self.ema is None else self.ema.swapped_in()

    # -- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> Run:
        """Run all remaining steps; returns the run.

        Raises:
            RunError: a reward or a gradient is not finite, or a reward broke its contract. Everything saved stays.
        """
        main = self.processes.is_main_process
        # Every process checks when it is built that the folder is free: none may create it before all have.
        self.processes.wait_for_everyone()
        callbacks = self.callbacks if main else []
        first = self.progress.step
        self._folder = self._open() if main else RunFolder(self.output, lock=None)
        try:
            self.prepare()
            for callback in callbacks:
                callback.on_start(self)
            while self.progress.step < self.config.training.steps and not self._should_stop():
                started = time.perf_counter()
                with out_of_memory.explained(self):
                    stats = self.step()
                stats.seconds, stats.peak_memory = time.perf_counter() - started, peak_memory(self.device)
                if self.costs is not None and self.progress.step == first + 1:
                    stats.predicted = self.costs.as_json()
                if main:
                    self.folder.append_metrics(stats.as_json())
                for callback in callbacks:
                    callback.on_step(self, stats)
                self.step_check.raise_if_failing()
            self.step_check.raise_if_failing(ended=True)
            if main and self.stop_reason is not None:
                self.folder.append_metrics({"step": self.progress.step, STOPPED: self.stop_reason})
            self._finish()
            for callback in callbacks:
                callback.on_end(self)
            self.processes.wait_for_everyone()
        except BaseException as error:
            for callback in callbacks:
                callback.on_error(self, error)
            raise
        finally:
            for callback in callbacks:
                callback.on_close(self)
            self._folder.close()
            self.sampler.engine.release()
        return Run(self.output, registry=self.registry, trained=self.pipeline, model=self._given)

    def _open(self) -> RunFolder:
        return open_folder(
            self.config,
            self.registry,
            device=self.device,
            checkpoint=self._resumed_from,
            step=self.progress.step,
            overwrite=self._overwrite,
            files=self._files,
        )

    def step(self) -> StepStats:
        """Do one optimizer step and return its statistics."""
        step = self.progress.step
        self.optimizer.zero_grad()
        calibrated = self.mix.needs_calibration  # then the step's images are generated twice
        if calibrated:
            self.progress.reward_queries += self.gradient.calibrate(step)
        stats = self.gradient.compute(step)
        stats.step, stats.learning_rate = step + 1, self.optimizer.lr
        stats.idle = None if stats.moving else self.mix.why_idle(step, stats)
        locate = partial(locate_not_finite, self, step)
        stats.skipped = self.step_check.reason_to_skip(step + 1, stats, locate)
        self.progress.updating = True
        changed = self.optimizer.step(skip=not stats.moving or stats.skipped is not None)
        if changed and self.ema is not None:
            self.ema.update()
        self.progress.step += 1
        self.progress.reward_queries += stats.images
        if not calibrated and stats.skipped is None:
            self.mix.update(stats)
        self.progress.updating = False
        stats.reward_queries = self.progress.reward_queries
        return stats

    def prepare(self) -> None:
        """On a GPU, choose what is in memory at a time, compile and capture the networks, and predict a step's costs.

        The first step would do most of it by itself; only `train()` needs the prediction.
        """
        training = self.config.training
        if self.device.type != "cuda" or self.progress.step >= training.steps:
            return
        with out_of_memory.explained(self):
            self.costs = self.gradient.costs(self.progress.step)
            left = (training.steps - self.progress.step) * self.costs.seconds
            if training.compile == "blocks" or (training.compile == "auto" and left * COMPILE_GAIN > COMPILE_SECONDS):
                with self.console.status("compiling the denoiser's blocks: minutes the first time, then cached"):
                    self.sampler.engine.compile()
                    self.costs = self.gradient.costs(self.progress.step)

    @property
    def consistent(self) -> bool:
        """Whether adapters, optimizer and step number belong together: not inside an update, not after the end."""
        return not self.progress.updating and self._adopted_step is None

    # -- the end ------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End the run after this step, as if it were the last; for callbacks (the main process decides)."""
        self.stop_reason = reason

    def adopt(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Make these adapters, of an earlier step, the run's result; only after the last step."""
        adapters.load_state(self.denoiser, tensors)
        self._adopted_step = step

    @property
    def saved_step(self) -> int:
        """Step of the adapters that are saved now: the run's own, or the best one's once that is adopted."""
        return self.progress.step if self._adopted_step is None else self._adopted_step

    def _should_stop(self) -> bool:
        """Whether a callback ended the run; callbacks run on the main process, and all stop together."""
        if self.processes.num_processes > 1:
            reason = [self.stop_reason]
            torch.distributed.broadcast_object_list(reason, src=0)
            self.stop_reason = reason[0]
        return self.stop_reason is not None

    def _finish(self) -> None:
        """After the last step: the adapters permanently take the values that are saved."""
        if self.ema is not None:
            self.ema.copy_to_parameters()
        self._adopted_step = self.progress.step

    # -- state --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Return the complete state of the run."""
        state = {
            **self.callback_state,  # first: a callback cannot replace the trainer's own
            "step": self.progress.step,
            "reward_queries": self.progress.reward_queries,
            "schedule": self.optimizer.schedule.last_epoch,
            "mix": self.mix.state(),
            "step_check": self.step_check.as_json(),
            "ema_updates": 0 if self.ema is None else self.ema.updates,
        }
        parts = {**self.callback_tensors, "average": {} if self.ema is None else self.ema.tensors()}
        extra = {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
        return Checkpoint(adapters.state(self.denoiser), optimizer_tensors(self.optimizer.adamw), state, extra)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = dict(checkpoint.state)
        adapters.load_state(self.denoiser, checkpoint.adapter)
        self.optimizer.load(int(state.pop("schedule")), checkpoint.optimizer)
        self.mix.load_state(state.pop("mix"))
        self.progress.step = int(state.pop("step"))
        self.progress.reward_queries = int(state.pop("reward_queries"))
        self.step_check.load(state.pop("step_check"))
        updates, tensors = int(state.pop("ema_updates")), self.callback_tensors
        for key, value in checkpoint.extra.items():
            part, _, name = key.partition("/")
            tensors.setdefault(part, {})[name] = value
        average = tensors.pop("average", {})
        if self.ema is not None:
            self.ema.load(average, updates)
        self.callback_state = state  # what is left
