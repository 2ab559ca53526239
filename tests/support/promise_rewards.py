"""A reward that passes every conformance check, and for each check rewards that fail it and, if possible, no other."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig, RewardSpec
from tests.support.promise_options import Drifting, Lenient, Options, Silent


class HeavyOptions(Options):
    """Options in a module that imports torch."""


class Good(Reward):
    """A small network's answer, and a little red: a gradient everywhere, nothing special."""

    Config = Options
    config: Options

    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(4, 1, 3))

    def score(self, batch: ImageBatch) -> Tensor:
        return self.of(batch.images)

    def of(self, images: Tensor) -> Tensor:
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        x = images.to(dtype)
        for layer in self.network:
            if isinstance(layer, nn.Conv2d):
                assert layer.bias is not None
                x = nn.functional.conv2d(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype), padding=layer.padding)
            else:
                x = layer(x)
        return self.config.gain * (x.mean((1, 2, 3)).to(dtype) + images.to(dtype)[:, 0].mean((1, 2)))


class Kinked(Good):
    """Total variation and left-right symmetry: correct, with kinks that a finite difference may step over."""

    def score(self, batch: ImageBatch) -> Tensor:
        x = batch.images
        variation = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        symmetry = (x - x.flip(3)).abs().mean((1, 2, 3))
        return self.config.gain * (variation - symmetry).to(x.dtype if x.dtype == torch.float64 else torch.float32)


class Measure(Good):
    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch)


class BatchMean(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).mean()


class FixedSize(Good):
    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__(config)
        self.head = nn.Linear(64 * 64 * 3, 1)

    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch) + 0 * self.head(batch.images.flatten(1).float())[:, 0].to(torch.float32)


class Standardised(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        scores = super().score(batch)
        return (scores - scores.mean()) / scores.std(correction=1 if len(scores) > 1 else 0)


class Squeezed(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).squeeze()


class Half(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).to(batch.images.dtype)


class NoFloat64(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).float()


class NanOnFlat(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        images = batch.images
        flat = images.flatten(1).std(1)
        return super().score(batch) + 0 * (flat / flat).to(torch.float32).to(super().score(batch).dtype)


class Huge(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return 1000 * super().score(batch)


class ReadsPrompts(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        length = torch.tensor([float(len(prompt)) for prompt in batch.prompts], device=batch.images.device)
        return super().score(batch) + length


class Neighbours(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        scores = super().score(batch)
        return scores - 0.5 * scores.mean()


class InPlace(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        scores = super().score(batch)
        if not batch.images.requires_grad:
            batch.images.mul_(0.5)
        return scores


class WritesMetadata(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        for metadata in batch.metadata:
            metadata["seen"] = True  # type: ignore[index]
        return super().score(batch)


class Random(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        scores = super().score(batch)
        return scores + 0.01 * torch.randn(1, device=scores.device).to(scores.dtype)


class Thawed(Good):
    def freeze(self) -> Reward:
        super().freeze()
        self.network.requires_grad_(True)
        return self


class Trains(Good):
    def train(self, mode: bool = True) -> Reward:
        nn.Module.train(self, mode)
        return self


class Autocast(Good):
    def of(self, images: Tensor) -> Tensor:
        x = 1000 * images.flatten(1)
        one = torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device)
        steady = super().of(images)
        return steady + ((x @ one)[:, 0].to(steady.dtype) - x.sum(1).to(steady.dtype)) * (
            1.0 if torch.is_autocast_enabled("cpu") else 0.0
        )


class StaysBehind(Good):
    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__(config)
        self.mean = torch.tensor([0.4, 0.4, 0.4]).view(1, 3, 1, 1)

    def score(self, batch: ImageBatch) -> Tensor:
        scores = super().score(batch)
        return scores + (batch.images - self.mean).mean((1, 2, 3)).to(scores.dtype)


class OnTheCpu(Measure):
    def score(self, batch: ImageBatch) -> Tensor:
        super().score(batch)
        return torch.zeros(len(batch), dtype=torch.float64 if batch.images.dtype == torch.float64 else torch.float32)


class Detached(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).detach()


class LooseGraph(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        free = torch.zeros((), requires_grad=True)
        return super().score(batch).detach() + free


class Rounds(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return (super().score(batch) * 10).round()


class NormAtZero(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        scores = super().score(batch)
        return scores + batch.images.flatten(1).square().sum(1).sqrt().to(scores.dtype) * 1e-3


class HalfDetached(Good):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch) + self.of(batch.images.detach())  # the slope is half the true one


class Clamps(Good):
    def of(self, images: Tensor) -> Tensor:
        return super().of(images.clamp(0.01, 0.99))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class Descends(Good):
    def of(self, images: Tensor) -> Tensor:
        return super().of(_Reversed.apply(images))


def _spec(kind: type[Reward], **facts: Any) -> RewardSpec:
    config = facts.pop("config", Options)
    defaults: dict[str, Any] = {"summary": "For tests.", "license": "Apache-2.0", "typical_range": (-2.0, 2.0)}
    return RewardSpec(
        name="subject",
        factory=f"{kind.__module__}:{kind.__name__}",
        config=f"{config.__module__}:{config.__name__}",
        **{**defaults, **facts},
    )


BREAKERS: dict[str, list[tuple[RewardSpec, str]]] = {
    "spec_without_torch": [(_spec(Good, config=HeavyOptions), "imports torch")],
    "spec_facts": [
        (_spec(Good, license=""), "has no license"),
        (_spec(Good, typical_range=(2, -2)), "is not a range"),
        (_spec(Good, typical_range=(0, math.inf)), "is not a range"),
        (_spec(Good, config=Silent), "Set Config in the reward"),
    ],
    "config_round_trip": [
        (_spec(Good, config=Drifting), "change when a run's config.yaml is read again: gain"),
        (_spec(Good, config=Lenient), "accepts unknown options"),
    ],
    "json_schema": [(_spec(Good, config=Silent), "no description: gain")],
    "shape": [(_spec(BatchMean), "must return"), (_spec(FixedSize), "32x32 images in a batch of 1 fail")],
    "batch_of_one": [(_spec(Squeezed), "Look for squeeze"), (_spec(Standardised), "Look for a standard deviation")],
    "dtype": [
        (_spec(Half), r"torch\.bfloat16 images fail"),
        (_spec(NoFloat64), r"torch\.float64 images give torch\.float32 scores"),
    ],
    "finite": [(_spec(NanOnFlat), "black images: the scores are .nan")],
    "range": [(_spec(Huge), "far outside the declared typical_range")],
    "prompts_declared": [(_spec(ReadsPrompts), "Declare needs_prompts=True")],
    "samples_independent": [(_spec(Neighbours), "must not depend on its neighbors")],
    "input_unchanged": [
        (_spec(InPlace), "modifies the images"),
        (_spec(WritesMetadata), "modifies the prompts or the metadata"),
    ],
    "deterministic": [(_spec(Random), "Look for dropout")],
    "frozen": [(_spec(Thawed), "not frozen"), (_spec(Trains), "into training mode")],
    "mixed_precision": [(_spec(Autocast), "under bfloat16 autocast")],
    "device_move": [
        (_spec(StaysBehind), "a tensor was not moved"),
        (_spec(OnTheCpu, differentiable=False), "scores of images on meta are on cpu"),
    ],
    "differentiable": [
        (_spec(Detached), "without a gradient"),
        (_spec(LooseGraph), "no gradient reaches batch.images"),
        (_spec(Good, differentiable=False), "Declare differentiable=True"),
    ],
    "gradient": [
        (_spec(Rounds), "is zero, so nothing can be learned"),
        (_spec(NormAtZero), "uniform image of value 0"),
    ],
    "gradcheck": [(_spec(HalfDetached), "Part of the score is detached")],
    "saturated_pixels": [(_spec(Clamps), "white and black areas cannot learn")],
    "improves": [(_spec(Descends), "points in the wrong direction")],
}
"""Check -> rewards that fail it, and a pattern that the message must match."""

GOOD = {
    "a reward": _spec(Good),
    "a reward with kinks": _spec(Kinked),
    "a measure": _spec(Measure, differentiable=False),
}


def hook_of(spec: RewardSpec) -> object:
    """A plugin with this one reward."""

    @hookimpl
    def alignprop_register_rewards() -> list[RewardSpec]:
        return [spec]

    return SimpleNamespace(alignprop_register_rewards=alignprop_register_rewards)


def registry_of(spec: RewardSpec) -> Registry:
    """A registry with this one reward."""
    return Registry.from_plugins({"promise-rewards": hook_of(spec)})
