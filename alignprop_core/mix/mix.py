"""Many rewards to one direction: sum, normalized, balanced and pcgrad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignprop_core.config.rewards import MixConfig
from alignprop_core.mix.combine import project_conflicts, weighted_sum
from alignprop_core.mix.figures import Figures, StepFigures
from alignprop_core.mix.offload import Offload
from alignprop_core.mix.running import Running, one_over
from alignprop_core.mix.term import Term
from alignprop_core.reward import ImageBatch

Pull = Callable[[Tensor], Tensor]
"""Takes a gradient at the images to the place where terms are balanced, such as the latents they were decoded from."""


@dataclass(frozen=True)
class Scores:
    """What a mix made of a batch; tensors are detached.

    Attributes:
        raw: label -> (B,), scores as the rewards gave them.
        weighted: label -> (B,), what each term contributes to the total.
        total: (B,), the mix's objective a sample.
    """

    raw: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    total: Tensor


@dataclass(frozen=True)
class Direction:
    """Where to go, and how it came about.

    Attributes:
        gradient: direction of ascent, (B, 3, H, W) at the images, or in the shape the `pull` gave.
        scores: detached scores.
        figures: sums for the step's log and the running figures.
    """

    gradient: Tensor
    scores: Scores
    figures: Figures


class Mix:
    """Rewards with weights, combined to one direction.

    A term counts c_k = its score within its limits (`Term.counted`). With factors f_k, constants in a step, the
    objective of an image is the sum of f_k * c_k, and the direction its gradient:

        sum         f_k = weight
        normalized  f_k = weight / running standard deviation of the raw scores
        balanced    f_k = weight / running root mean square of the batch gradient norm of the raw score
        pcgrad      balanced, then each term's gradient without what pulls against another's; a direction that is the
                    gradient of no objective (the logged total is that of balanced)

    Running figures are those of the steps before, so that a step's factors are known before its first image and no
    chunking or number of processes changes them; `update` takes in a step, `unmeasured` says that there is none yet.
    They are held above `scale_floor` times their highest value: a term whose gradient fades is not blown up for ever.

    With one term, every mode gives the direction of `sum` times a positive number, except for `per_sample`, which
    brings each image's gradient to one size.

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
    def labels(self) -> list[str]:
        """Labels of the terms in their order."""
        return [term.label for term in self.terms]

    @property
    def at_latent(self) -> bool:
        """Whether terms are balanced where `pull` leads, instead of at the images."""
        return self.config.balance_at == "latent" and self.config.combine in ("balanced", "pcgrad")

    @property
    def unmeasured(self) -> bool:
        """Whether a step's figures have to be taken in by `update` before the factors have a meaning."""
        return self.config.combine != "sum" and not all(running.mass for running in self.running.values())

    def to(self, device: torch.device | str) -> Mix:
        """Move all rewards to a device, or let them come to it for each use (`offload`); returns the mix."""
        device = torch.device(device)
        for term in self.terms:
            if not self.config.offload or device.type == "cpu":
                term.reward.to(device)
        if self.config.offload and device.type != "cpu":
            self.terms = tuple(replace(term, offload=Offload(term.reward, device)) for term in self.terms)
        return self

    def factors(self, step: int = 0) -> list[float]:
        """Return f_k, what each term's counted score is multiplied with after `step` optimizer steps.

        With `per_sample` these are the factors before each image's own size is taken into account.
        """
        weights = [term.weight_at(step) for term in self.terms]
        if self.config.combine == "sum":
            return weights
        floor, found = self.config.scale_floor, []
        for term, weight in zip(self.terms, weights, strict=True):
            running = self.running[term.label]
            spread, gradient = running.spread, running.gradient
            if self.config.combine == "normalized":
                found.append(weight * one_over(spread, running.highest_spread, floor))
            else:
                found.append(weight * one_over(gradient, running.highest_gradient, floor))
        return found

    @torch.no_grad()
    def score(self, batch: ImageBatch, *, step: int = 0) -> Scores:
        """Score a batch without gradients; totals use the factors of `step` (without `per_sample`)."""
        raw = torch.stack([self._raw(term, batch) for term in self.terms], dim=1)
        counted = torch.stack([term.counted(raw[:, i])[0] for i, term in enumerate(self.terms)], dim=1)
        return self._scores(raw, counted * torch.tensor(self.factors(step), device=raw.device, dtype=raw.dtype))

    def direction(
        self, batch: ImageBatch, sample_weights: Tensor, *, step: int = 0, pull: Pull | None = None
    ) -> Direction:
        """Return the direction of ascent, the scores and the figures.

        Each reward is scored and differentiated once (once a micro-batch), `pull` is called once a term.

        Args:
            batch: images without a graph of their own, (B, 3, H, W).
            sample_weights: (B,), each sample's share of the objective; the shares of a whole step add up to 1.
            step: optimizer steps done.
            pull: needed for `balance_at: latent` and used only there.
        """
        shares = sample_weights.to(batch.images)
        parts = [self._differentiate(term, batch, shares) for term in self.terms]
        raw = torch.stack([score for score, _ in parts], dim=1)
        at_image = torch.stack([gradient for _, gradient in parts], dim=1)
        del parts
        counts = [term.counted(raw[:, i]) for i, term in enumerate(self.terms)]
        counted, slopes = (torch.stack(columns, dim=1) for columns in zip(*counts, strict=True))
        place, image_squares = at_image, None
        if self.at_latent:
            if pull is None:
                raise ValueError("balance_at: latent needs `pull`")
            image_squares = at_image.flatten(2).square().sum(2) * slopes.square()
            place = torch.stack([pull(at_image[:, i]) for i in range(len(self.terms))], dim=1)
        flat = place.flatten(2)
        products = torch.bmm(flat, flat.transpose(1, 2))  # (B, K, K), of the raw scores' gradients
        sizes = products.diagonal(dim1=1, dim2=2)
        counted_products = products * slopes.unsqueeze(1) * slopes.unsqueeze(2)
        factors = self._factors_of_samples(step, sizes, shares)
        reached = factors * slopes
        scaled_products = products * reached.unsqueeze(1) * reached.unsqueeze(2)
        if self.config.combine == "pcgrad":
            multiples = project_conflicts(scaled_products)
        else:
            multiples = torch.eye(len(self.terms)).to(scaled_products).expand_as(scaled_products)
        whole = multiples.sum(1)
        scores = self._scores(raw, counted * factors.to(counted))
        return Direction(
            gradient=weighted_sum(place, whole * reached),
            scores=scores,
            figures=self._figures(
                scores=scores,
                counted_slopes=slopes,
                factors=factors,
                sizes=sizes,
                image_squares=counted_products.diagonal(dim1=1, dim2=2) if image_squares is None else image_squares,
                along=torch.einsum("bkm,bmn,bn->k", multiples, scaled_products, whole),
                gram=counted_products.sum(0),
            ),
        )

    def update(self, figures: StepFigures) -> None:
        """Take a whole step's figures, of all its batches and processes, into the running ones."""
        for label, running in self.running.items():
            score, square = figures.score[label], figures.score_square[label]
            running.add(score, square, figures.gradient_square[label], self.config.decay)

    def why_idle(self, step: int) -> str:
        """Return why a step in which no image moves under any term does nothing."""
        if not any(term.weight_at(step) for term in self.terms):
            return "every weight is 0 at this step"
        if not any(self.factors(step)):
            return "no term has a spread or gradient by which it could be scaled"
        return "every image is at the limit (ceiling, floor or target) of every term"

    def state(self) -> dict[str, dict[str, float]]:
        """Return the running figures for a checkpoint."""
        return {label: running.as_json() for label, running in self.running.items()}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Put back what `state` gave; terms that are not in it start anew."""
        for label in self.running:
            self.running[label] = Running.from_json(state[label]) if label in state else Running()

    # -- inside -------------------------------------------------------------------------------------------------

    def _differentiate(self, term: Term, batch: ImageBatch, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw scores, (B,), and the gradient of their weighted sum at the images, (B, 3, H, W)."""
        scores, gradients = [], []
        size = self.config.reward_batch_size or len(batch)
        with term.placed(), torch.enable_grad():
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                images = part.images.detach().requires_grad_()
                score = term.score(ImageBatch(images=images, prompts=part.prompts, metadata=part.metadata))
                with term.named("raised in its backward pass"):
                    (gradient,) = torch.autograd.grad((score * shares[start : start + size].to(score)).sum(), images)
                scores.append(score.detach())
                gradients.append(gradient)
        return torch.cat(scores), torch.cat(gradients)

    def _raw(self, term: Term, batch: ImageBatch) -> Tensor:
        size = self.config.reward_batch_size or len(batch)
        with term.placed():
            return torch.cat([term.score(batch[i : i + size]) for i in range(0, len(batch), size)])

    def _factors_of_samples(self, step: int, sizes: Tensor, shares: Tensor) -> Tensor:
        """Return factors, (B, K), from the squared gradient norms (B, K)."""
        if not self.config.per_sample:
            return torch.tensor(self.factors(step), device=sizes.device, dtype=sizes.dtype).expand_as(sizes)
        # A batch norm of 1 is, with equal shares that add up to 1, a norm of sqrt(share) a sample.
        usual = shares.to(sizes).sqrt().unsqueeze(1)
        weights = torch.tensor([term.weight_at(step) for term in self.terms], device=sizes.device, dtype=sizes.dtype)
        highest = [self.running[term.label].highest_gradient for term in self.terms]
        least = self.config.scale_floor * torch.tensor(highest, device=sizes.device, dtype=sizes.dtype) * usual
        held = torch.maximum(sizes.clamp(min=0).sqrt(), least)
        return torch.where(least > 0, weights * usual / torch.where(least > 0, held, 1), 0)

    def _scores(self, raw: Tensor, weighted: Tensor) -> Scores:
        return Scores(
            raw=dict(zip(self.labels, raw.unbind(1), strict=True)),
            weighted=dict(zip(self.labels, weighted.unbind(1), strict=True)),
            total=weighted.sum(1),
        )

    def _figures(
        self,
        *,
        scores: Scores,
        counted_slopes: Tensor,
        factors: Tensor,
        sizes: Tensor,
        image_squares: Tensor,
        along: Tensor,
        gram: Tensor,
    ) -> Figures:
        zeros = Figures.zeros(len(self.terms), sizes.device)
        raw = torch.stack(list(scores.raw.values()), dim=1).to(zeros.raw)
        still = counted_slopes == 0
        sums = Figures(
            images=torch.tensor(float(len(raw))),
            moving=(~still & (factors != 0)).sum(),
            total=scores.total.to(zeros.raw).sum(),
            raw=raw.sum(0),
            raw_square=raw.square().sum(0),
            weighted=torch.stack(list(scores.weighted.values()), dim=1).to(zeros.raw).sum(0),
            factor=factors.to(zeros.raw).sum(0),
            held=still.to(zeros.raw).sum(0),
            size_square=sizes.to(zeros.raw).sum(0),
            image_square=image_squares.to(zeros.raw).sum(0),
            along=along,
            gram=gram,
        )
        like = {name: value.to(zeros.raw) for name, value in vars(sums).items()}
        return Figures(**like)
