"""Before a run, one image is generated and scored with every reward: what would fail at step 1 fails at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core import cli
from alignprop_core.config.sections import RunConfig
from alignprop_core.config.yaml import dump_yaml
from alignprop_core.errors import ModelError, RewardError, RunError, TrialError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig, RewardSpec
from alignprop_core.testing.fixtures import isolated_registry  # noqa: F401
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import alignprop_register_rewards
from tests.support.toy_runs import changed, toy_data


class Picky(Reward):
    """A plugin's reward that records what it scores, and does not like foxes if `fails` says how."""

    fails = ""
    seen: list[tuple[tuple[int, ...], str, bool]] = []  # noqa: RUF012

    def score(self, batch: ImageBatch) -> Tensor:
        Picky.seen.append((tuple(batch.images.shape), batch.prompts[0], batch.images.requires_grad))
        score = batch.images.mean((1, 2, 3))
        if Picky.fails == "raises":
            raise ValueError(f"cannot read {batch.prompts[0]!r}")
        if Picky.fails == "gradient":
            score.register_hook(lambda gradient: gradient * torch.inf)
        return score * torch.nan if Picky.fails == "score" else score


class Plugin:
    @hookimpl
    def alignprop_register_rewards(self) -> list[RewardSpec]:
        made = {
            "summary": "For tests.",
            "factory": f"{__name__}:Picky",
            "config": f"{RewardConfig.__module__}:RewardConfig",
        }
        return [
            *alignprop_register_rewards(),
            RewardSpec(name="picky", **made),
            RewardSpec(name="picky_measure", differentiable=False, **made),
        ]


def registry() -> Registry:
    return Registry.from_plugins({"toys": Plugin()})


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    Picky.fails, Picky.seen = "", []
    base = toy_data(tiny_model, tmp_path, rewards=[{"name": "redness"}, {"name": "picky"}])
    base["evaluation"] = {"rewards": [{"name": "picky_measure"}]}
    base["prompts"]["heldout"] = ["a held-out cat"]
    return lambda **overrides: changed(base, overrides, registry())


def test_every_reward_scores_one_image_of_the_runs_size_and_prompts_and_the_networks_are_called_twice(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(module: Any, *_: object) -> None:
        calls.append(type(module).__name__)

    from alignprop_core.diffusion import sampler

    load = sampler.load_pipeline

    def watched(*arguments: Any, **options: Any) -> Any:
        pipeline = load(*arguments, **options)
        pipeline.unet.conv_in.register_forward_pre_hook(counted)
        return pipeline

    monkeypatch.setattr(sampler, "load_pipeline", watched)
    Trainer(make(sampling__steps=30, sampling__width=48), registry=registry())
    assert Picky.seen == [((1, 3, 32, 48), "a fox", True), ((1, 3, 32, 48), "a held-out cat", False)]
    assert len(calls) <= 4, "two steps, with guidance in one call or two"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"raised ValueError: cannot read 'a fox'"),
        ("score", r"returned a score that is not finite \(nan\)"),
        ("gradient", "its gradient is not finite"),
    ],
)
def test_a_reward_of_a_plugin_that_fails_has_its_key_and_nothing_is_written(
    make: Callable[..., RunConfig], how: str, words: str
) -> None:
    Picky.fails = how
    config = make()
    tried = 'trial before training, with one image of 32x32 pixels and 2 denoising steps, for the prompt "a fox"'
    with pytest.raises(TrialError, match=rf'^rewards\.1\.name: Reward "picky":? {words}.*{tried}') as caught:
        Trainer(config, registry=registry())
    assert caught.value.exit_code == 2
    assert not Path(config.output).exists()


def test_a_measure_that_fails_is_found_before_training_too(make: Callable[..., RunConfig]) -> None:
    Picky.fails = "raises"
    config = make(rewards=[{"name": "redness"}])
    with pytest.raises(RewardError, match=r"^evaluation\.rewards\.0\.name: .*cannot read 'a held-out cat'"):
        Trainer(config, registry=registry())


def test_a_dry_run_tries_every_reward(
    make: Callable[..., RunConfig],
    isolated_registry: Callable[..., Registry],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    isolated_registry({"toys": Plugin()})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(make().model_dump(mode="json", exclude_unset=True)))
    assert cli.run(["train", str(path), "--dry-run"]) == 0
    assert "All rewards score it" in capsys.readouterr().out
    Picky.fails = "raises"
    assert cli.run(["train", str(path), "--dry-run"]) == 2
    assert "rewards.1.name: " in capsys.readouterr().err


def test_a_network_that_does_not_fit_its_pipeline_is_named_before_training(
    make: Callable[..., RunConfig], tiny_sd: Callable[..., Any]
) -> None:
    pipeline = tiny_sd()
    first = pipeline.unet.conv_in
    pipeline.unet.conv_in = torch.nn.Conv2d(first.in_channels + 5, first.out_channels, 3, padding=1)
    with pytest.raises(ModelError, match=r"^model\.base: the model loads, but cannot generate an image: RuntimeError"):
        Trainer(make(), registry=registry(), pipeline=pipeline)


def test_a_model_whose_images_are_not_finite_is_found_before_training(
    make: Callable[..., RunConfig], tiny_sd: Callable[..., Any]
) -> None:
    pipeline = tiny_sd()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(RunError, match=r'decoded by the vae .*, for the prompt "a fox" \(sample 0, seed 0\)') as caught:
        Trainer(make(), registry=registry(), pipeline=pipeline)
    assert caught.value.exit_code == 1
