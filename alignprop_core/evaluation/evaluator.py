"""Evaluate variants of a model on held-out prompts, for the trainer, `alignprop evaluate` and sweeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.diffusion.finite import at_row, first_bad
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import RewardError, under
from alignprop_core.evaluation.compare import Comparison, Switch, Variant
from alignprop_core.evaluation.diversity import diversity_by_prompt, encoder_of
from alignprop_core.evaluation.drift import Drift
from alignprop_core.evaluation.measures import measure_entries
from alignprop_core.evaluation.progress import progress_bar
from alignprop_core.evaluation.sheet import save_image
from alignprop_core.images import to_pil
from alignprop_core.lora import adapters
from alignprop_core.mix.load import check_prompts, load_terms
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch

BASE = "base"
"""Key of adapters that change nothing: those that are off, and those whose B is zero."""

NOT_FINITE = "not_finite.png"
"""File name of an image whose score is not finite."""


def evaluation_terms(
    entries: Sequence[RewardTerm],
    prompts: PromptSet,
    registry: Registry,
    *,
    device: torch.device,
    loaded: Sequence[Term] = (),
    where: str = "",
    prompts_key: str = "prompts.heldout",
) -> list[Term]:
    """Load the rewards that an evaluation reports, and the measures they name in `evaluate_with`.

    Args:
        entries: the rewards.
        prompts: the held-out prompts; every reward checks that it can use them.
        registry: where the rewards are looked up.
        device: where they are moved.
        loaded: terms that are loaded already, such as those of the mix.
        where: key in the run config of the entries that are not loaded, for messages.
        prompts_key: key of the prompts, for messages.
    """
    known = {term.label for term in loaded}
    new = load_terms([entry for entry in entries if entry.label not in known], registry, where=where)
    new += load_terms(measure_entries(entries, registry), registry)
    with under(prompts_key):
        check_prompts(new, prompts)
    for term in new:
        term.reward.to(device)
    return [*loaded, *new]


class Evaluator:
    """Evaluates variants of a model: the same prompts and noise, all rewards and measures, diversity and drift.

    With `remember`, variants whose adapters have the same values are not generated again.

    Args:
        sampler: the sampler; its LoRA can be switched off.
        terms: rewards to report, from `evaluation_terms`; labels are unique.
        prompts: held-out prompts.
        config: images per prompt, batch size, seed, diversity encoder.
        remember: keep images and scores of the base, the last and the best values of the trainable adapter.
        failures: where an image is saved whose score is not finite.

    Attributes:
        last: checksum of the adapters that were evaluated last.
        best: checksum of the adapters that are remembered besides the base and the last.
    """

    def __init__(
        self,
        sampler: Sampler,
        terms: Sequence[Term],
        prompts: PromptSet,
        config: EvaluationConfig,
        *,
        remember: bool = False,
        failures: Path | None = None,
    ) -> None:
        self.sampler, self.terms, self.prompts, self.config = sampler, list(terms), prompts, config
        self.encoder = encoder_of(config.diversity_encoder, self.terms)
        self.remember, self.failures = remember, failures
        self.last = self.best = BASE
        self._known: dict[str, tuple[object, Variant]] = {}

    def base(self) -> AbstractContextManager[object]:
        """Switch the LoRA off inside the block; the base model's own LoRAs stay on."""
        return self.sampler.without_lora()

    @cached_property
    def _drift(self) -> Drift:
        config = self.config
        return Drift(self.sampler, self.prompts.prompts, self.base, seed=config.seed, batch_size=config.batch_size)

    def evaluate(
        self, variants: Mapping[str, Switch], bar: Progress | None = None, *, drift: Drift | bool = True
    ) -> Comparison:
        """Evaluate variants of the model on the held-out prompts.

        Args:
            variants: name -> function that opens a context in which the model is that variant; base first.
            bar: the progress bar to show progress in; a new one if None.
            drift: whether to measure each variant's distance from the base model, or the `Drift` to measure it with.
        """
        keys = {name: self._key(switch) for name, switch in variants.items()} if self.remember else {}
        asked = (self.prompts, self.config, [(term.label, term.reward) for term in self.terms])
        found = {name: self._known[key][1] for name, key in keys.items() if self._known.get(key, ("",))[0] == asked}
        if missing := {name: switch for name, switch in variants.items() if name not in found}:
            found |= self._generate(missing, bar, self._drift if drift is True else drift or None)
        # Images and scores of a long list of prompts take memory, so only three variants are remembered.
        if keys:
            self._known |= {key: (asked, found[name]) for name, key in keys.items()}
            self.last = next(reversed(keys.values()))
            self._known = {key: kept for key, kept in self._known.items() if key in (BASE, self.last, self.best)}
        return Comparison(self.prompts, self.config, {name: found[name] for name in variants}, self.encoder)

    def _generate(
        self, variants: Mapping[str, Switch], bar: Progress | None, drift: Drift | None
    ) -> dict[str, Variant]:
        """Sample and score every prompt with each variant of the model at the same noise."""
        sampler, prompts, config, per = self.sampler, self.prompts, self.config, self.config.images_per_prompt
        # (prompt, global sample index): the index alone decides an image's noise, so batches do not change the images.
        jobs = [(prompt, prompt * per + number) for prompt in range(len(prompts)) for number in range(per)]
        results = {name: Variant({term.label: [] for term in self.terms}) for name in variants}
        features: dict[str, list[Tensor]] = {name: [] for name in variants}
        with nullcontext(bar) if bar is not None else progress_bar() as progress:
            task = progress.add_task("evaluating", total=len(variants) * len(jobs), status="")
            for start in range(0, len(jobs), config.batch_size):
                part = jobs[start : start + config.batch_size]
                texts = [prompts.prompts[prompt] for prompt, _ in part]
                noise = sampler.noise(texts, seed=config.seed, step=0, indices=[index for _, index in part])
                firsts = [row for row, (_, index) in enumerate(part) if index % per == 0]
                # All variants take the same noise: differences between them are paired.
                for name, switch in variants.items():
                    with switch(), torch.no_grad():
                        # (b, 3, H, W) in [0, 1]
                        images = sampler.generate(texts, noise)
                        metadata = [prompts.metadata[prompt] for prompt, _ in part]
                        batch = ImageBatch(images=images, prompts=texts, metadata=metadata)
                        for term in self.terms:
                            scores = term.score(batch)
                            self._require_finite(f'"{term.label}" ({name})', scores, batch, noise)
                            results[name].scores[term.label] += scores.tolist()
                        if per > 1:
                            features[name].append(self.encoder.features(images).cpu())
                    # Only each prompt's first image is kept, as uint8: all images of a long list would fill the memory.
                    results[name].images += list((images[firsts] * 255).round().to(torch.uint8).cpu())
                    progress.advance(task, len(part))
            for name, switch in variants.items():
                if per > 1:
                    results[name].diversity = diversity_by_prompt(torch.cat(features[name]), per)
                if drift is not None:
                    with switch():
                        results[name].drift = drift.measure()
            progress.remove_task(task)
        return results

    def _require_finite(self, whose: str, scores: Tensor, batch: ImageBatch, noise: Noise) -> None:
        """Raise `RewardError` if a score is not finite, naming prompt, sample and seed, and save the image."""
        if (row := first_bad(scores)) is None:
            return
        if self.failures is not None:
            save_image(to_pil(batch.images[row]), self.failures)
        place, saved = f"the score of {whose}, {float(scores[row])}", str(self.failures or "")
        found = at_row(place, row, batch.prompts, noise, saved=saved)
        raise RewardError(f"The evaluation stopped: the first value that is not finite is {found}.")

    def _key(self, switch: Switch) -> str:
        """Return a checksum of the trainable adapter's values in a variant."""
        if switch == self.base:
            return BASE
        with switch():
            tensors = adapters.state(self.sampler.family.denoiser)
        if not any(tensor.any() for name, tensor in tensors.items() if name.endswith(".lora_B")):
            return BASE
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()
