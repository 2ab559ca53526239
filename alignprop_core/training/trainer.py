"""The trainer: a run config becomes a run folder with a LoRA that scores higher."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from alignprop_core import lora
from alignprop_core.config import RunConfig, resolved_yaml
from alignprop_core.devices import device_and_dtype, keep_freed_memory, peak_memory
from alignprop_core.diffusion import Sampler, family_for, load_pipeline
from alignprop_core.diffusion.noise import seeded
from alignprop_core.environment import environment
from alignprop_core.errors import RunError, under
from alignprop_core.mix import Figures, Mix, StepFigures
from alignprop_core.preflight import check_inputs
from alignprop_core.registry import Registry, default_registry
from alignprop_core.reward import Reward
from alignprop_core.runs import RunFolder
from alignprop_core.terms import check_prompts, load_terms, try_local, with_given
from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)
from alignprop_core.training.guarding import Guarding
from alignprop_core.training.heldout import check_watch
from alignprop_core.training.objective import Outcome, backpropagate


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
        overwrite: bool = False,
        pipeline: Any = None,
    ) -> None:
        self.registry = (registry or default_registry()).with_rewards(rewards or {})
        self.config = config = with_given(config, self.registry)
        self.callbacks = list(callbacks)
        self.state = PartialState(cpu=config.training.device == "cpu")
        self.device, self.dtype = device_and_dtype(config.training)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.output = Path(config.output)
        self._overwrite = overwrite
        inputs = check_inputs(config, self.registry, resume=resume, overwrite=overwrite, loads_model=pipeline is None)
        checkpoint = None if inputs.checkpoint is None else load_checkpoint(inputs.checkpoint)
        check_watch(config, self.registry)
        self.prompts, self.heldout = inputs.prompts, inputs.heldout
        self.mix = Mix(load_terms(config.rewards, self.registry, where="rewards"), config.mix).to(self.device)
        with under("prompts.train"):
            check_prompts(self.mix.terms, self.prompts)
        if self.heldout is not None:
            with under("prompts.heldout"):
                check_prompts(self.mix.terms, self.heldout)
        try_local(self.mix.terms, config.rewards, self.registry, prompts=self.prompts, device=self.device)
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
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
        )
        self.schedule = self._new_schedule(done=0)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.guarding = Guarding(config, self.parameters)
        self.stop_reason: str | None = None
        self._adopted_step: int | None = None
        self.progress = _Progress()
        self._folder: RunFolder | None = None
        self._resumed = checkpoint is not None
        if checkpoint is not None:
            self._restore(checkpoint)

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
        self._folder = self._open_folder() if main else RunFolder(self.output, lock=None)
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

    def step(self) -> StepRecord:
        """Do one optimizer step."""
        started = time.perf_counter()
        step = self.progress.step
        self.optimizer.zero_grad(set_to_none=True)
        first = self.mix.unmeasured  # its images are made twice: once to learn the terms' sizes
        if first:
            self._learn_sizes([self._accumulate(part, send=False) for part in self._parts()])
        outcomes = [self._accumulate(part) for part in self._parts()]
        record, figures = self._measure(outcomes)
        rate = float(self.schedule.get_last_lr()[0])
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        dropped = self.guarding.steps.judge(step + 1, figures.score, record["grad_norm"], overflow_expected=overflow)
        self._update(figures, learn=not first and dropped is None, dropped=dropped is not None)
        return StepRecord(
            step=step + 1,
            learning_rate=rate,
            kept_steps=len(self.sampler.plan(seed=self.config.training.seed, step=step).kept),
            reward_queries=self.progress.reward_queries,
            seconds=time.perf_counter() - started,
            peak_memory=peak_memory(self.device),
            regularization=self._regularization(outcomes, figures.images),
            dropped=dropped,
            **record,
        )

    def _parts(self) -> list[list[int]]:
        """Return this process's sample indices, a list for each accumulated batch.

        Indices are global: a step covers 0 .. batch_size * gradient_accumulation_steps - 1 over all processes, so the
        run is the same on any number of them.
        """
        training, state = self.config.training, self.state
        parts = []
        for batch in range(training.gradient_accumulation_steps):
            whole = range(batch * training.batch_size, (batch + 1) * training.batch_size)
            parts.append(list(whole[state.process_index :: state.num_processes]))
        return [part for part in parts if part]

    def _accumulate(self, indices: Sequence[int], *, send: bool = True) -> Outcome:
        step, training = self.progress.step, self.config.training
        chosen = choose_prompts(len(self.prompts.prompts), seed=training.seed, step=step, indices=indices)
        noise = self.sampler.noise(seed=training.seed, step=step, indices=indices)
        return backpropagate(
            self.sampler,
            self.mix,
            [self.prompts.prompts[i] for i in chosen],
            [self.prompts.metadata[i] for i in chosen],
            noise,
            share=1.0 / (training.batch_size * training.gradient_accumulation_steps),
            scale=float(self.scaler.scale(torch.ones((), device=self.device))),
            step=step,
            send=send,
        )

    def _learn_sizes(self, outcomes: Sequence[Outcome]) -> None:
        """Give the mix a whole step's figures before its first step."""
        flat = self._figures(outcomes)
        if self.state.num_processes > 1:
            torch.distributed.all_reduce(flat)
        figures = StepFigures.read(Figures.from_flat(flat, len(self.mix.terms)), self.mix.labels)
        self.mix.update(figures)
        self.progress.reward_queries += figures.images

    def _figures(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Return the sums over this process's images, as `Figures.flat` lays them out."""
        zeros = Figures.zeros(len(self.mix.terms), self.device)
        return sum((outcome.figures for outcome in outcomes), start=zeros).flat()

    def _measure(self, outcomes: Sequence[Outcome]) -> tuple[dict[str, Any], StepFigures]:
        """Sum gradients over processes, clip, and bring the step's figures to the host in one transfer."""
        flat = self._figures(outcomes)
        if self.state.num_processes > 1:
            self._sum_over_processes(flat)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        limit = self.config.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        *sums, grad_norm = torch.cat([flat, norm.to(flat).view(1)]).tolist()
        figures = StepFigures.read(
            Figures.from_flat(torch.tensor(sums, dtype=torch.float64), len(self.mix.terms)), self.mix.labels
        )
        idle = None if figures.moving else self.mix.why_idle(self.progress.step)
        record = {"reward": figures.reward, "terms": figures.terms, "grad_norm": grad_norm}
        return record | {"cosines": figures.cosines, "idle": idle}, figures

    def _sum_over_processes(self, figures: Tensor) -> None:
        """Add up gradients and figures of all processes in place; each sample's share is of the whole step."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        torch.distributed.all_reduce(flat)
        torch.distributed.all_reduce(figures)
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def _regularization(self, outcomes: Sequence[Outcome], images: int) -> float:
        """Return the mean over the step's samples of the losses beside the rewards."""
        if not self.config.regularization.weight:
            return 0.0
        whole = torch.zeros((), device=self.device)
        for outcome in outcomes:
            whole += torch.stack(outcome.aux).sum()
        if self.state.num_processes > 1:
            torch.distributed.all_reduce(whole)
        return float(whole) / images

    def _update(self, figures: StepFigures, *, learn: bool, dropped: bool) -> None:
        self.progress.updating = True
        before = self.scaler.get_scale()
        # Even a zero gradient would move the adapters: by momentum and weight decay.
        moves = figures.moving and not dropped
        if moves:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        # A step that did nothing, was dropped, or was skipped for float16 overflow counts neither for the schedule nor
        # for the average.
        if moves and self.scaler.get_scale() >= before:
            self.schedule.step()
            if self.guarding.average is not None:
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
            "schedule": self.schedule.last_epoch,
            "scaler": self.scaler.state_dict(),
            "mix": self.mix.state(),
            "guarding": self.guarding.as_json(),
        }
        adapter, optimizer = lora.state(self.denoiser), optimizer_tensors(self.optimizer)
        return Checkpoint(adapter, optimizer, state, self.guarding.tensors())

    def _restore(self, checkpoint: Checkpoint) -> None:
        lora.load_state(self.denoiser, checkpoint.adapter)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.schedule = self._new_schedule(done=int(checkpoint.state["schedule"]))
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.mix.load_state(checkpoint.state.get("mix", {}))
        self.progress.step = int(checkpoint.state["step"])
        self.progress.reward_queries = int(checkpoint.state["reward_queries"])
        if "guarding" in checkpoint.state:
            self.guarding.load(checkpoint.state["guarding"], checkpoint.extra)

    def _new_schedule(self, done: int) -> LRScheduler:
        """Return the learning-rate schedule as it stands after `done` steps."""
        settings = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = settings.learning_rate
        schedule: LRScheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
            self.optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=self.config.training.steps,
            last_epoch=done - 1,
        )
        return schedule

    def _open_folder(self) -> RunFolder:
        if self._resumed and (self.output / "config.yaml").is_file():
            folder = RunFolder.open(self.output)
            folder.truncate_metrics(self.progress.step)
        else:
            folder = RunFolder.create(self.output, overwrite=self._overwrite)
        folder.write_text("config.yaml", resolved_yaml(self.config))
        folder.write_json("environment.json", self._environment())
        return folder

    def _environment(self) -> dict[str, Any]:
        config = self.config
        terms = (*config.rewards, *config.evaluation.rewards)
        isolated = {
            term.label: self.registry.elsewhere(term.isolation).origin(term.name) for term in terms if term.isolation
        }
        names = [term.name for term in terms if not term.isolation]
        local = {name: found.origin for name in names if (found := self.registry.local(name)) is not None}
        offers = [self.registry.reward(name) for name in names if name not in local]
        model = self.registry.find_model(config.model.base)
        used = {offer.distribution for offer in offers} | ({model.distribution} if model else set())
        known = environment(used, [offer.spec for offer in offers])
        return known | {
            "local_rewards": local,
            "isolated_rewards": isolated,
            "training_device": str(self.device),
        }


def choose_prompts(count: int, *, seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Return which of `count` prompts each global sample index gets at this step.

    Every step shuffles all prompts anew, so a step has no prompt twice before it has all of them once; the choice
    depends on (seed, step, index) alone.
    """
    order = torch.randperm(count, generator=seeded(seed, "prompts", step)).tolist()
    return [order[index % count] for index in indices]
