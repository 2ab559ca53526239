"""Evaluation on held-out prompts while training, with early stopping."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.evaluation.compare import Variant
from alignprop_core.evaluation.measures import measure_entries
from alignprop_core.evaluation.statistics import summary
from alignprop_core.lora import adapters
from alignprop_core.mix.stats import StepStats
from alignprop_core.registry.code_checksum import code_checksum
from alignprop_core.registry.registry import Registry
from alignprop_core.training.callback import Callback
from alignprop_core.training.lora_files import save_lora
from alignprop_core.training.progress import ProgressBar
from alignprop_core.training.resume import file_checksum
from alignprop_evaluation.early_stopping import Basis, EarlyStopping

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer

STATE, BEST = "early_stopping", "best"
"""Names of the callback's state and of the best adapters in checkpoints."""


class HeldOutEvaluation(Callback):
    """Evaluates every `evaluation.every` steps, before the first and after the last, and applies early stopping.

    Each evaluation is a line of metrics.jsonl, {"step": ..., "evaluation": {...}}; the best LoRA so far is in
    lora/best/, in both formats. Checkpoints contain what is known from the evaluations, and the best adapters.

    Attributes:
        stopping: what is known from the evaluations so far.
        best: the best evaluated adapters so far, as `adapters.state` returns them, or None.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Evaluate the start; a resumed run repeats an interrupted evaluation, and stops if it should have stopped.

        A run that measures something else than before takes this evaluation for its first.
        """
        if trainer.evaluator is None or trainer.config.evaluation.every is None:
            return  # named under training.trackers, where it does nothing
        self.stopping = EarlyStopping(trainer.config.early_stopping)
        self.best: dict[str, Tensor] | None = trainer.callback_tensors.get(BEST) or None
        self.bar = next((other.bar for other in trainer.callbacks if isinstance(other, ProgressBar)), None)
        self._restore(trainer)
        last = self.stopping.state.step
        if last is None or (last != trainer.step_number and self._is_due(trainer)):
            self.evaluate(trainer)
        elif reason := self.stopping.stop_reason():
            trainer.stop(reason)

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Evaluate when it is due."""
        if self._is_due(trainer):
            self.evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Report why the run stopped; with `early_stopping.restore_best`, make the best adapters the run's result."""
        if trainer.evaluator is None or trainer.config.evaluation.every is None:
            return
        step = self.stopping.state.best_step
        if trainer.stop_reason is not None:
            self._report(trainer, f"stopped at step {trainer.step_number}: {trainer.stop_reason}")
        if step is None or self.best is None:
            self._report(
                trainer, "no evaluation was within the limits of early_stopping; the LoRA is that of the last step"
            )
        elif trainer.config.early_stopping.restore_best:
            trainer.adopt(self.best, step)
            self._report(trainer, f"the run's LoRA is the best one, of step {step} (also in lora/best)")
        elif step != trainer.step_number:
            self._report(trainer, f"the best LoRA, of step {step}, is in lora/best; the run's is that of the last step")

    def evaluate(self, trainer: Trainer) -> None:
        """Evaluate the adapters as they would be saved now, write a line, and update early stopping."""
        evaluator, stopping, config = trainer.evaluator, self.stopping, trainer.config.early_stopping
        if evaluator is None:
            return
        with trainer.as_saved():
            variant = evaluator.evaluate({"tuned": nullcontext}, self.bar).variants["tuned"]
            results: dict[str, Any] = {
                "total": self._total(trainer, variant),
                "scores": {label: summary(values) for label, values in variant.scores.items()},
                "drift": variant.drift,
                "diversity": fmean(variant.diversity) if variant.diversity else None,
            }
            monitored = results["scores"].get(config.monitor, {}).get("mean", results["total"])
            best = stopping.update(trainer.step_number, monitored, results["drift"], results["diversity"])
            if best:
                self.best = adapters.state(trainer.denoiser)
                if config.restore_best:
                    evaluator.best = evaluator.last
                self._save_best(trainer)
        self._remember(trainer)
        trainer.folder.append_metrics({"step": trainer.step_number, "evaluation": results | {"best": best}})
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer, results)
        if reason := stopping.stop_reason():
            trainer.stop(reason)

    def _remember(self, trainer: Trainer) -> None:
        """Give the state to the trainer, for checkpoints."""
        trainer.callback_state[STATE] = self.stopping.as_json()
        trainer.callback_tensors[BEST] = self.best or {}

    def _restore(self, trainer: Trainer) -> None:
        """Restore the state of a checkpoint, and its best LoRA and the LoRA's files if it still counts."""
        if (state := trainer.callback_state.get(STATE)) is not None:
            self.stopping.load(state)
        if why := self.stopping.rebase(basis_of(trainer)):
            self.best = None
            self._report(
                trainer,
                f"evaluations are not compared with those before the resume: {why}; the one at step "
                f"{trainer.step_number} is the first that counts",
            )
        self._remember(trainer)
        if self.best is None:
            # Files of a best LoRA that does not count, or that is newer than the checkpoint.
            if (stale := trainer.folder.lora / "best").is_dir():
                shutil.rmtree(stale)
            return
        own = adapters.state(trainer.denoiser)
        adapters.load_state(trainer.denoiser, self.best)
        self._save_best(trainer)
        adapters.load_state(trainer.denoiser, own)

    @staticmethod
    def _is_due(trainer: Trainer) -> bool:
        every, step = trainer.config.evaluation.every, trainer.step_number
        return every is not None and (step % every == 0 or step == trainer.config.training.steps)

    def _total(self, trainer: Trainer, variant: Variant) -> float:
        """Return the mix's total, on a scale that is the same at every evaluation of a run.

        Weights are those at the end of a schedule. With `sum` a term counts in its own unit, as in training; with the
        other modes, whose scale changes during the run, in standard deviations of its scores at the first evaluation.
        """
        terms, stds = trainer.mix.terms, self.stopping.state.stds
        if not stds:
            stds.update({term.label: pstdev(variant.scores[term.label]) or 1.0 for term in terms})
        total = 0.0
        for term in terms:
            clipped = float(term.clipped(torch.tensor(variant.scores[term.label], dtype=torch.float64))[0].mean())
            unit = 1.0 if trainer.config.mix.combine == "sum" else stds[term.label]
            total += term.weight_at(trainer.config.training.steps) * clipped / unit
        return total

    def _save_best(self, trainer: Trainer) -> None:
        save_lora(trainer, "lora/best", step=self.stopping.state.best_step)

    @staticmethod
    def _report(trainer: Trainer, text: str) -> None:
        trainer.console.print(text, highlight=False, markup=False, soft_wrap=True)


def basis_of(trainer: Trainer) -> Basis:
    """Return what a run's evaluations measure, as far as a resumed run may change it."""
    config, prompts = trainer.config, trainer.heldout
    settings, stopping = config.evaluation, config.early_stopping
    entries = [*config.rewards, *settings.rewards]
    entries += measure_entries(entries, trainer.registry)
    found = {entry.label: _reward(entry, trainer.registry) for entry in entries}
    monitored: dict[str, Any] = {"early_stopping.monitor": stopping.monitor, "early_stopping.mode": stopping.mode}
    if stopping.monitor in found:
        monitored[f'the reward "{stopping.monitor}"'] = found[stopping.monitor]
    else:
        ends = {term.label: term.weight_at(config.training.steps) for term in trainer.mix.terms}
        monitored["the mix's weights at the last step (training.steps)"] = ends
    diversity: dict[str, Any] = {"evaluation.diversity_encoder": settings.diversity_encoder}
    if settings.diversity_encoder is not None:
        diversity[f'the reward "{settings.diversity_encoder}"'] = found[settings.diversity_encoder]
    return Basis(
        images={
            "the content of prompts.heldout": {"sha256": prompts and prompts.checksum},
            "evaluation.images_per_prompt": settings.images_per_prompt,
            "evaluation.seed": settings.seed,
        },
        diversity=diversity,
        monitored=monitored,
    )


def _reward(entry: RewardTerm, registry: Registry) -> dict[str, Any]:
    given = None if entry.loader else registry.given.get(entry.name)
    checksum = file_checksum(entry.name) if given is None else code_checksum(given.code)
    known = {"name": entry.name, "options": entry.options, "sha256": checksum}
    # Through JSON, as in a checkpoint: a tuple comes back as a list.
    found: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return found
