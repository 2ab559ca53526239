"""Evaluation on held-out prompts while training, and what follows from it: the best LoRA is kept, the run stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from alignprop_core import lora
from alignprop_core.config import RunConfig
from alignprop_core.errors import ConfigError, did_you_mean, under
from alignprop_core.evaluation.compare import Comparison, Switch, Variant, compare
from alignprop_core.evaluation.diversity import encoder_of
from alignprop_core.evaluation.drift import Drift
from alignprop_core.evaluation.statistics import summary
from alignprop_core.mix import Term
from alignprop_core.registry import Registry
from alignprop_core.terms import check_prompts, load_terms, measure_entries
from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.guards import spread
from alignprop_core.training.lora_names import lora_metadata, lora_name
from alignprop_core.training.progress import progress_bar

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer

TOTAL = "reward"
"""What `guards.watch` calls the mix's total."""


def check_watch(config: RunConfig, registry: Registry) -> None:
    """Raise `ConfigError` if `guards.watch` names nothing that evaluations measure; loads nothing."""
    entries = [*config.rewards, *config.evaluation.rewards]
    labels = [TOTAL, *(entry.label for entry in (*entries, *measure_entries(entries, registry)))]
    if config.guards.watch not in labels:
        raise ConfigError(
            f'guards.watch: "{config.guards.watch}" is measured by no evaluation; these are: {", ".join(labels)}.'
            f"{did_you_mean(config.guards.watch, labels)}"
        )


class Measures:
    """What a run is evaluated with, loaded once: its rewards, their true measures, further rewards, diversity, drift.

    Args:
        trainer: the trainer; it has held-out prompts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.terms: list[Term] = []
        self._drift: Drift | None = None

    def load(self) -> None:
        """Load the rewards and the encoder, so that one that cannot load does not cost the run."""
        if self.terms:
            return
        config, registry = self.trainer.config, self.trainer.registry
        entries = [*config.rewards, *config.evaluation.rewards]
        loaded = load_terms(config.evaluation.rewards, registry, where="evaluation.rewards")
        loaded += load_terms(measure_entries(entries, registry), registry)
        if self.trainer.heldout is not None:
            with under("prompts.heldout"):
                check_prompts(loaded, self.trainer.heldout)
        for term in loaded:
            term.reward.to(self.trainer.device)
        self.terms = [*self.trainer.mix.terms, *loaded]
        self.encoder = encoder_of(config.evaluation.diversity_encoder, self.terms)

    def base(self) -> AbstractContextManager[object]:
        """Switch the trained adapters off: the model this run started from, other LoRAs included."""
        return lora.disabled(self.trainer.denoiser)

    def compare(self, variants: Mapping[str, Switch], bar: Progress | None = None) -> Comparison:
        """Evaluate variants of the model on the held-out prompts.

        Args:
            variants: name -> context in which the model is that variant.
            bar: where to show progress: one that is shown already, or None for one of its own.
        """
        self.load()
        trainer, config = self.trainer, self.trainer.config.evaluation
        prompts = trainer.heldout
        if prompts is None:
            raise ConfigError("prompts.heldout is not set: there is nothing to evaluate on.")
        if self._drift is None:
            self._drift = Drift(
                trainer.sampler, prompts.prompts, self.base, seed=config.seed, batch_size=config.batch_size
            )
        shown = nullcontext(bar) if bar is not None else progress_bar()
        with shown as progress:
            total = len(variants) * len(prompts) * config.images_per_prompt
            task = progress.add_task("evaluating", total=total, figures="")
            result = compare(
                trainer.sampler,
                self.terms,
                prompts,
                config,
                variants,
                encoder=self.encoder,
                drift=self._drift,
                advance=lambda images: progress.advance(task, images),
            )
            progress.remove_task(task)
        return result


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
