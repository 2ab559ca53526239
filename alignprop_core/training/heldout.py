"""Evaluation on held-out prompts while training, and what follows from it: the best LoRA is kept, the run stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from alignprop_core import lora
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.evaluation.compare import Variant
from alignprop_core.evaluation.measures import measure_entries
from alignprop_core.evaluation.statistics import summary
from alignprop_core.registry.registry import Registry
from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.guards import Subject, spread
from alignprop_core.training.lora_names import lora_metadata, lora_name
from alignprop_core.training.measures import Measures
from alignprop_core.training.resume import class_checksum, file_checksum

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
        """Evaluate the start; a resumed run makes up for what was interrupted, and stops if it had gone far enough.

        One that measures something else than before takes this evaluation for its first.
        """
        if trainer.config.evaluation.every is None:
            return
        self.measures.load()
        self._go_on(trainer)
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

    def _go_on(self, trainer: Trainer) -> None:
        """Bring what a checkpoint knows to this run: the best so far and its files, if they still count."""
        guarding = trainer.guarding
        if why := guarding.heldout.measures(subject_of(trainer)):
            guarding.best = None
            self._say(
                f"evaluations are not compared with those before the resume: {why}; the one at step "
                f"{trainer.step_number} is the first that counts"
            )
        if guarding.best is None:
            # Files of a best that does not count, or that came after the checkpoint.
            if (stale := trainer.folder.lora / "best").is_dir():
                shutil.rmtree(stale)
            return
        own = lora.state(trainer.denoiser)
        lora.load_state(trainer.denoiser, guarding.best)
        self._save_best(trainer)
        lora.load_state(trainer.denoiser, own)

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
            metadata=lora_metadata(trainer) | {"alignprop.step": str(trainer.guarding.heldout.standing.best_step)},
            component=trainer.denoiser_name,
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def subject_of(trainer: Trainer) -> Subject:
    """Return what a run's evaluations measure, as far as a resumed run may change it."""
    config, prompts = trainer.config, trainer.heldout
    settings, guards = config.evaluation, config.guards
    texts = None if prompts is None else [[*pair] for pair in zip(prompts.prompts, prompts.metadata, strict=True)]
    entries = [*config.rewards, *settings.rewards]
    entries += measure_entries(entries, trainer.registry)
    found = {entry.label: _reward(entry, trainer.registry) for entry in entries}
    watched: dict[str, Any] = {"guards.watch": guards.watch, "guards.lower_is_better": guards.lower_is_better}
    if guards.watch in found:
        watched[f'the reward "{guards.watch}"'] = found[guards.watch]
    else:
        ends = {term.label: term.weight_at(config.training.steps) for term in trainer.mix.terms}
        watched["the mix's weights at the last step (training.steps)"] = ends
    diversity: dict[str, Any] = {"evaluation.diversity_encoder": settings.diversity_encoder}
    if settings.diversity_encoder is not None:
        diversity[f'the reward "{settings.diversity_encoder}"'] = found[settings.diversity_encoder]
    return Subject(
        pictures={
            "the content of prompts.heldout": {"sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()},
            "evaluation.images_per_prompt": settings.images_per_prompt,
            "evaluation.seed": settings.seed,
        },
        diversity=diversity,
        watched=watched,
    )


def _reward(entry: RewardTerm, registry: Registry) -> dict[str, Any]:
    given = None if entry.loader else registry.given.get(entry.name)
    checksum = file_checksum(entry.name) if given is None else class_checksum(given)
    known = {"name": entry.name, "options": entry.options, "sha256": checksum}
    # By way of JSON, as a checkpoint keeps it: a tuple comes back as a list.
    found: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return found
