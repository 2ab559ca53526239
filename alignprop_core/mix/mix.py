"""Many rewards combined into one gradient at the images: sum, normalized, balanced and pcgrad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignprop_core.config.rewards import MixConfig
from alignprop_core.mix.conflicts import project_conflicts
from alignprop_core.mix.offload import Offload
from alignprop_core.mix.running import Running, one_over
from alignprop_core.mix.stats import StepStats
from alignprop_core.mix.term import Term
from alignprop_core.reward import ImageBatch

Pullback = Callable[[Tensor], Tensor]
"""Maps a gradient at the images to the place where terms are balanced, such as the latents they were decoded from."""


class Mix:
    """Weighted rewards, combined into one gradient.

    A term contributes c_k, its clipped score (`Term.clipped`). With factors f_k that are constant within a step, the
    objective of an image is the sum of f_k * c_k, and the mix's gradient is the objective's:

        sum         f_k = weight
        normalized  f_k = weight / running standard deviation of the raw scores
        balanced    f_k = weight / running root mean square of the batch gradient norm of the raw score
        pcgrad      balanced, then each term's gradient without the part that conflicts with another's; the result is
                    the gradient of no objective (the logged total is that of balanced)

    Running statistics come from earlier steps, so a step's factors are known before its first image and do not depend
    on chunking or the number of processes; `update` adds a step, `needs_calibration` is true until there is one. They
    are kept above `scale_floor` times their highest value, so that a term whose gradient fades is not scaled up
    without limit.

    With one term, every mode gives the gradient of `sum` times a positive number, except for `per_sample`, which
    scales each image's gradient to the same norm.

    Args:
        terms: at least one; labels are unique.
        config: the `mix` section of the run config.
    """

    def __init__(self, terms: Sequence[Term], config: MixConfig | None = None) -> None:
        if not terms:
            raise ValueError("a mix needs at least one term")
        self.terms = tuple(terms)
        self.config = config or MixConfig()
        self.running = {term.label: Running() for term in self.terms}

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the terms in their order."""
        return tuple(term.label for term in self.terms)

    @property
    def at_latent(self) -> bool:
        """Whether terms are balanced at the latents, where `pullback` leads, instead of at the images."""
        return self.config.balance_at == "latent" and self.config.combine in ("balanced", "pcgrad")

    @property
    def needs_calibration(self) -> bool:
        """Whether the factors are undefined until `update` has added a first step's statistics."""
        return self.config.combine != "sum" and not all(running.mass for running in self.running.values())

    def to(self, device: torch.device | str) -> Mix:
        """Move all rewards to a device, or only for each use (`mix.offload`); returns the mix."""
        device = torch.device(device)
        for term in self.terms:
            if not self.config.offload or device.type == "cpu":
                term.reward.to(device)
        if self.config.offload and device.type != "cpu":
            self.terms = tuple(replace(term, offload=Offload(term.reward, device)) for term in self.terms)
        return self

    def factors(self, step: int = 0) -> list[float]:
        """Return f_k, the factor of each term's clipped score after `step` optimizer steps.

        With `per_sample` these are the factors before each image's own gradient norm is taken into account.
        """
        weights = [term.weight_at(step) for term in self.terms]
        if self.config.combine == "sum":
            return weights
        found = []
        for term, weight in zip(self.terms, weights, strict=True):
            running = self.running[term.label]
            size, highest = (
                (running.std, running.highest_std)
                if self.config.combine == "normalized"
                else (running.gradient, running.highest_gradient)
            )
            found.append(weight * one_over(size, highest, self.config.scale_floor))
        return found

    def gradient(
        self, batch: ImageBatch, sample_weights: Tensor, *, step: int = 0, pullback: Pullback | None = None
    ) -> tuple[Tensor, StepStats]:
        """Return the gradient of the objective, and the batch's statistics.

        Each reward is scored and differentiated once (once per micro-batch); `pullback` is called once per term.

        Args:
            batch: B images without a graph of their own, (B, 3, H, W).
            sample_weights: (B,), each sample's share of the objective; the shares of a whole step add up to 1.
            step: optimizer steps done.
            pullback: needed for `balance_at: latent` and used only there.

        Returns:
            The gradient (direction of ascent), (B, 3, H, W) or in the shape that `pullback` gives; and the statistics.
        """
        # Each reward is differentiated once, weighted by the samples' shares. Everything that depends on the scores
        # (clipping, factors, projection) is a coefficient of these gradients and enters afterwards.
        shares = sample_weights.to(batch.images)
        parts = [self._differentiate(term, batch, shares) for term in self.terms]
        raw = torch.stack([score for score, _ in parts], dim=1)  # (B, K)
        at_image = torch.stack([gradient for _, gradient in parts], dim=1)  # (B, K, 3, H, W)
        del parts
        # Clipping is a function of the score alone: a slope (B, K) of 1, 0 or -1 on the raw score's gradient.
        counts = [term.clipped(raw[:, i]) for i, term in enumerate(self.terms)]
        clipped, slopes = (torch.stack(columns, dim=1) for columns in zip(*counts, strict=True))
        place, image_squares = at_image, None
        if self.at_latent:
            if pullback is None:
                raise ValueError("balance_at: latent needs `pullback`")
            # Norms are always reported at the images, so they are computed before moving to the latents: (B, K).
            image_squares = at_image.flatten(2).square().sum(2) * slopes.square()
            place = torch.stack([pullback(at_image[:, i]) for i in range(len(self.terms))], dim=1)
        flat = place.flatten(2)
        # All that follows needs only the inner products of the K gradients, so no image-sized tensor is copied.
        products = torch.bmm(flat, flat.transpose(1, 2))  # (B, K, K), of the raw scores' gradients
        sizes = products.diagonal(dim1=1, dim2=2)
        clipped_products = products * slopes.unsqueeze(1) * slopes.unsqueeze(2)
        if self.config.per_sample:
            factors = self._factors_per_sample(step, sizes, shares)
        else:
            # Written on the device: the host would wait for a copy.
            factors = torch.stack([sizes.new_full((), factor) for factor in self.factors(step)]).expand_as(sizes)
        reached = factors * slopes  # (B, K), d objective / d raw score
        scaled_products = products * reached.unsqueeze(1) * reached.unsqueeze(2)
        if self.config.combine == "pcgrad":
            multiples = project_conflicts(scaled_products)
        else:
            # No projection: every scaled gradient consists of itself alone.
            multiples = torch.eye(len(self.terms), device=sizes.device, dtype=sizes.dtype).expand_as(scaled_products)
        whole = multiples.sum(1)  # (B, K): how much of each scaled gradient the result contains
        if image_squares is None:
            image_squares = clipped_products.diagonal(dim1=1, dim2=2)

        stats = StepStats.zeros(self.labels, factors.device)
        exact = raw.to(stats.sums)  # float64, so that variances survive the subtraction of squares
        weighted = (clipped * factors.to(clipped)).to(stats.sums)
        stats["images"] = len(raw)
        stats["moving"] = ((slopes != 0) & (factors != 0)).sum()
        stats["total"] = weighted.sum()
        stats["raw"] = exact.sum(0)
        stats["raw_square"] = exact.square().sum(0)
        stats["weighted"] = weighted.sum(0)
        stats["factor"] = factors.to(stats.sums).sum(0)
        stats["saturated"] = (slopes == 0).sum(0)
        stats["size_square"] = sizes.sum(0)
        stats["image_square"] = image_squares.sum(0)
        # Inner product of a term's part of the result with the result; over the terms these add up to its square.
        stats["share"] = torch.einsum("bkm,bmn,bn->k", multiples, scaled_products, whole)
        stats["gram"] = clipped_products.sum(0)
        # Sum over terms of coefficient * gradient, (B, ...).
        coefficients = (whole * reached).to(flat).unsqueeze(1)
        return torch.bmm(coefficients, flat).view(place[:, 0].shape), stats

    def update(self, stats: StepStats) -> None:
        """Add a whole step's statistics, of all its batches and processes, to the running ones."""
        sums = [stats[name].tolist() for name in ("raw", "raw_square", "size_square")]
        for running, (raw, raw_square, size_square) in zip(self.running.values(), zip(*sums, strict=True), strict=True):
            running.add(raw / stats.images, raw_square / stats.images, size_square, self.config.decay)

    def why_idle(self, step: int, stats: StepStats) -> str:
        """Return why no image of a step with these statistics has a gradient."""
        if not any(term.weight_at(step) for term in self.terms):
            return "every weight is 0 at this step"
        if not any(self.factors(step)):
            return "no term has a nonzero standard deviation or gradient to scale by"
        if not stats["moving"]:
            return "every image is at the ceiling, floor or target of every term"
        return "the gradient of every score is 0 (a score that rounds or counts cannot be trained on)"

    def state(self) -> dict[str, dict[str, float]]:
        """Return the running statistics for a checkpoint."""
        return {label: running.as_json() for label, running in self.running.items()}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restore what `state` returned; terms that are not in it start without statistics."""
        for label in self.running:
            self.running[label] = Running.from_json(state[label]) if label in state else Running()

    # -- inside -------------------------------------------------------------------------------------------------

    def _differentiate(self, term: Term, batch: ImageBatch, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw scores, (B,), and the gradient of their weighted sum at the images, (B, 3, H, W)."""
        scores, gradients = [], []
        size = self.config.reward_batch_size or len(batch)
        # Offloaded weights must stay on the device until the backward pass is done.
        with term.placed, torch.enable_grad():
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                # A leaf for each micro-batch, so that its graph is freed before the next one is built.
                images = part.images.detach().requires_grad_()
                score = term.score(ImageBatch(images=images, prompts=part.prompts, metadata=part.metadata))
                with term.named("raised in its backward pass"):
                    (gradient,) = torch.autograd.grad((score * shares[start : start + size].to(score)).sum(), images)
                scores.append(score.detach())
                gradients.append(gradient)
        return torch.cat(scores), torch.cat(gradients)

    def _factors_per_sample(self, step: int, sizes: Tensor, shares: Tensor) -> Tensor:
        """Return factors that normalize each image's gradient, (B, K), from the squared gradient norms (B, K)."""
        # A batch norm of 1 is, with equal shares that add up to 1, a norm of sqrt(share) per sample: (B, 1).
        usual = shares.to(sizes).sqrt().unsqueeze(1)
        weights = _on_device([term.weight_at(step) for term in self.terms], sizes)
        highest = _on_device([self.running[term.label].highest_gradient for term in self.terms], sizes)
        least = self.config.scale_floor * highest * usual
        # Rounding can make the product of a vanishing gradient with itself negative.
        norms = torch.maximum(sizes.clamp(min=0).sqrt(), least)
        return torch.where(least > 0, weights * usual / torch.where(least > 0, norms, 1), 0)


def _on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor, (K,), on another one's device, filled there: the host would wait for a copy."""
    return torch.stack([like.new_full((), number) for number in numbers])
