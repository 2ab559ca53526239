"""Evaluation on held-out prompts while training, and what follows from it: the best LoRA is kept, the run stopped."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from alignprop_core import lora
from alignprop_core.evaluation.compare import Variant
from alignprop_core.evaluation.statistics import summary
from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.guards import spread
from alignprop_core.training.lora_names import lora_metadata, lora_name
from alignprop_core.training.measures import Measures

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


class HeldOut(Callback):
    """Evaluates every `evaluation.every` steps, before the first and after the last, and goes by `guards`.

    Each evaluation is a line of metrics.jsonl, {"step": ..., "evaluation": {...}}; the best LoRA so far lies in
    lora/best/, in both formats.

    Args:
        measures: what to evaluate with.
        console: where to say what happened.
        bar: the run's progress bar, to show the evaluation's progress in.
    """

    def __init__(self, measures: Measures, console: Console | None = None, bar: Progress | None = None) -> None:
        self.measures = measures
        self.console = console or Console(stderr=True)
        self.bar = bar

    def on_start(self, trainer: Trainer) -> None:
        """Evaluate the start; a resumed run makes up for what was interrupted, and stops if it had gone far enough."""
        if trainer.config.evaluation.every is None:
            return
        self.measures.load()
        last = trainer.guarding.heldout.standing.step
        if last is None or (last != trainer.step_number and self._due(trainer)):
            self.evaluate(trainer)
        elif reason := trainer.guarding.heldout.stop_reason():
            trainer.stop(reason)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Evaluate when it is time."""
        if self._due(trainer):
            self.evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Say why the run stopped; with `guards.keep_best`, take the best adapters for the run's own."""
        if trainer.config.evaluation.every is None:
            return
        step = trainer.guarding.heldout.standing.best_step
        if trainer.stop_reason is not None:
            self._say(f"stopped at step {trainer.step_number}: {trainer.stop_reason}")
        if step is None or trainer.guarding.best is None:
            self._say("no evaluation was within the limits of guards; the LoRA is that of the last step")
        elif trainer.config.guards.keep_best:
            trainer.adopt(trainer.guarding.best, step)
            self._say(f"the run's LoRA is the best one, of step {step} (also in lora/best)")
        elif step != trainer.step_number:
            self._say(f"the best LoRA, of step {step}, is in lora/best; the run's is that of the last step")

    def evaluate(self, trainer: Trainer) -> None:
        """Evaluate the adapters as they would be saved now, write a line, and let the guard judge."""
        with trainer.guarding.as_saved():
            result = self.measures.compare({"tuned": nullcontext}, self.bar)
            figures = self.figures(trainer, result.variants["tuned"])
            watched = figures["scores"].get(trainer.config.guards.watch, {}).get("mean", figures["reward"])
            best = trainer.guarding.heldout.judge(trainer.step_number, watched, figures["drift"], figures["diversity"])
            if best:
                trainer.guarding.best = lora.state(trainer.denoiser)
                if trainer.config.guards.keep_best:
                    self.measures.best = self.measures.last
                self._save_best(trainer)
        trainer.folder.append_metrics({"step": trainer.step_number, "evaluation": figures | {"best": best}})
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer, figures)
        if reason := trainer.guarding.heldout.stop_reason():
            trainer.stop(reason)

    @staticmethod
    def _due(trainer: Trainer) -> bool:
        every, step = trainer.config.evaluation.every, trainer.step_number
        return every is not None and (step % every == 0 or step == trainer.config.training.steps)

    def figures(self, trainer: Trainer, variant: Variant) -> dict[str, Any]:
        """Return an evaluation's figures: `scores`, the mix's total `reward`, `drift` and `diversity`."""
        return {
            "reward": self._total(trainer, variant),
            "scores": {label: summary(values) for label, values in variant.scores.items()},
            "drift": variant.drift,
            "diversity": sum(variant.diversity) / len(variant.diversity) if variant.diversity else None,
        }

    def _total(self, trainer: Trainer, variant: Variant) -> float:
        """Return the mix's total, on a scale that is the same at every evaluation of a run.

        Weights are those at the end of a schedule. With `sum` a term counts in its own unit, as in training; with the
        other modes, whose scale moves with the run, in standard deviations of its scores at the first evaluation.
        """
        terms, spreads = trainer.mix.terms, trainer.guarding.heldout.standing.spreads
        if not spreads:
            spreads.update({term.label: spread(variant.scores[term.label]) for term in terms})
        total = 0.0
        for term in terms:
            counted = float(term.counted(torch.tensor(variant.scores[term.label], dtype=torch.float64))[0].mean())
            unit = 1.0 if trainer.config.mix.combine == "sum" else spreads[term.label]
            total += term.weight_at(trainer.config.training.steps) * counted / unit
        return total

    def _save_best(self, trainer: Trainer) -> None:
        trainer.folder.inside("lora/best/x")
        lora.save(
            trainer.denoiser,
            trainer.folder.lora / "best",
            name=lora_name(trainer.folder.path),
            metadata=lora_metadata(trainer),
            component=trainer.denoiser_name,
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
