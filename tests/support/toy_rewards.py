"""Rewards for tests: one that works, and one for each way to break the contract."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from pydantic import Field
from torch import Tensor

import alignprop_evaluation
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig, RewardSpec


class RednessConfig(RewardConfig):
    gain: float = Field(default=1.0, description="Factor.")


class Redness(Reward):
    """Mean of red minus half of green and blue, times a gain."""

    Config = RednessConfig
    config: RednessConfig

    def score(self, batch: ImageBatch) -> Tensor:
        red, green, blue = batch.images.mean((2, 3)).unbind(1)
        return self.config.gain * (red - (green + blue) / 2)


class RedShare(Redness):
    """The same as a measure, without a gradient."""

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch)


class BatchMean(Redness):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).mean()


class NotANumber(Redness):
    """NaN in batches; the trial before a run, of one image, passes."""

    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch) * (float("nan") if len(batch) > 1 else 1.0)


class NanGradient(Redness):
    """An infinite slope in batches; the trial before a run, of one image, passes."""

    def score(self, batch: ImageBatch) -> Tensor:
        if len(batch) == 1:
            return super().score(batch)
        return ((batch.images - batch.images.detach()) ** 2).sum((1, 2, 3)).sqrt()


class NoGradient(Redness):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).detach()


class Python(Redness):
    def score(self, batch: ImageBatch) -> Tensor:
        return [0.0] * len(batch)  # type: ignore[return-value]


class Crashes(Redness):
    """Raises at its third batch; the trial before a run, of one image, does not count."""

    calls = 0

    def score(self, batch: ImageBatch) -> Tensor:
        type(self).calls += len(batch) > 1
        if type(self).calls > 2:
            raise ZeroDivisionError("the third call is one too many")
        return super().score(batch)


CLASSES = {
    "redness": Redness,
    "batch_mean": BatchMean,
    "not_a_number": NotANumber,
    "nan_gradient": NanGradient,
    "no_gradient": NoGradient,
    "python_list": Python,
    "crashes": Crashes,
}


@hookimpl
def alignprop_register_rewards() -> list[RewardSpec]:
    specs = [
        RewardSpec(
            name=name,
            summary="For tests.",
            factory=f"tests.support.toy_rewards:{kind.__name__}",
            config="tests.support.toy_rewards:RednessConfig",
            evaluate_with="red_share" if name == "redness" else (),
        )
        for name, kind in CLASSES.items()
    ]
    measure = RewardSpec(
        name="red_share",
        summary="For tests.",
        factory="tests.support.toy_rewards:RedShare",
        config="tests.support.toy_rewards:RednessConfig",
        differentiable=False,
    )
    return [*specs, measure]


def registry() -> Registry:
    plugin = SimpleNamespace(alignprop_register_rewards=alignprop_register_rewards)
    return Registry.from_plugins({"toy-rewards": plugin, "alignprop-evaluation": alignprop_evaluation})
