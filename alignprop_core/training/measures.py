"""What a run is evaluated with, and evaluating variants of the model: nothing that is known is drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

from alignprop_core import lora
from alignprop_core.errors import ConfigError, under
from alignprop_core.evaluation.compare import Comparison, Switch, Variant, compare
from alignprop_core.evaluation.diversity import encoder_of
from alignprop_core.evaluation.drift import Drift
from alignprop_core.evaluation.measures import measure_entries
from alignprop_core.mix.load import check_prompts, load_terms
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.training.progress import progress_bar

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer

BASE = "base"
"""What stands for adapters that change nothing: those switched off, and those whose B is zero."""


class Measures:
    """What a run is evaluated with, loaded once: its rewards, their true measures, further rewards, diversity, drift.

    An evaluation at the run's end often asks for what evaluations along the way have drawn and scored: the base model
    at the start, the adapters at the last step, or the best ones. Those are kept and given again where prompts,
    settings, rewards and the adapters' numbers are all the same.

    Args:
        trainer: the trainer; it has held-out prompts.

    Attributes:
        terms: what is measured, once it is loaded.
        last: which adapters were evaluated last, as `adapters_of` names them.
        best: which adapters are kept beside the base and the last; the guard's best, if the run may end with them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.terms: list[Term] = []
        self.last = self.best = BASE
        self._drift: Drift | None = None
        self._known: dict[str, tuple[object, Variant]] = {}

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
        config, prompts = self.trainer.config.evaluation, self.trainer.heldout
        if prompts is None:
            raise ConfigError("prompts.heldout is not set: there is nothing to evaluate on.")
        adapters = {name: self._adapters(switch) for name, switch in variants.items()}
        asked = (prompts, config, [(term.label, term.reward) for term in self.terms], self.trainer.sampler)
        known = {name: self._known[key][1] for name, key in adapters.items() if self._has(key, asked)}
        found = dict(known)
        if missing := {name: switch for name, switch in variants.items() if name not in known}:
            found |= self._draw(missing, prompts, bar)
        # Pictures and scores of a long list of prompts are not small, and only the evaluation at the end needs them.
        if config.at_end:
            self._known |= {key: (asked, found[name]) for name, key in adapters.items()}
            self.last = next(reversed(adapters.values()))
            self._known = {key: kept for key, kept in self._known.items() if key in (BASE, self.last, self.best)}
        return Comparison(prompts, config, {name: found[name] for name in variants}, self.encoder)

    def _draw(self, variants: Mapping[str, Switch], prompts: PromptSet, bar: Progress | None) -> dict[str, Variant]:
        trainer, config = self.trainer, self.trainer.config.evaluation
        if self._drift is None:
            self._drift = Drift(
                trainer.sampler, prompts.prompts, self.base, seed=config.seed, batch_size=config.batch_size
            )
        with nullcontext(bar) if bar is not None else progress_bar() as progress:
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
        return result.variants

    def _has(self, key: str, asked: object) -> bool:
        return key in self._known and self._known[key][0] == asked

    def _adapters(self, switch: Switch) -> str:
        """Name the adapters of a variant by their numbers."""
        if switch == self.base:
            return BASE
        with switch():
            tensors = lora.state(self.trainer.denoiser)
        if not any(tensor.any() for name, tensor in tensors.items() if name.endswith(".lora_B")):
            return BASE
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()
