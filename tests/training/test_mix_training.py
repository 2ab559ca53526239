"""Mixes in a training run: chunking does not change the run, and costs do not grow with the number of rewards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from alignprop_core.config.sections import RunConfig
from alignprop_core.lora import adapters as lora
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch
from alignprop_core.training.progress import ProgressBar
from alignprop_core.training.trainer import Trainer
from tests.support import toy_rewards
from tests.support.processes import train_in_processes
from tests.support.toy_rewards import Redness
from tests.support.toy_runs import adapters, changed, metrics, toy_data


class Shade(Redness):
    """Dark images; not everywhere in conflict with redness."""

    def score(self, batch: Any) -> Tensor:
        shade: Tensor = -self.config.gain * (batch.images**2).flatten(1).mean(1)
        return shade


def registry() -> Registry:
    return toy_rewards.registry().with_rewards({"shade": Shade()})


MODES: dict[str, dict[str, Any]] = {
    "sum": {},
    "normalized": {"combine": "normalized"},
    "balanced": {"combine": "balanced"},
    "pcgrad": {"combine": "pcgrad"},
    "latent": {"combine": "balanced", "balance_at": "latent"},
    "per_sample": {"combine": "balanced", "per_sample": True},
}


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Build a trainer on redness and shade; keyword arguments are overrides, dots written as double underscores."""
    base = toy_data(
        tiny_model,
        tmp_path,
        prompts={"train": str(tmp_path / "prompts.txt")},
        rewards=[{"name": "redness", "options": {"gain": 1000.0}}, {"name": "shade", "weight": 1.0}],
        # A large epsilon, so that gradients that are nothing but rounding do not become steps of full size.
        optimizer={"learning_rate": 1e-2, "epsilon": 1e-3},
        sampling={"steps": 2, "guidance_scale": 2.0},
        training={"steps": 2, "batch_size": 4, "device": "cpu"},
    )

    def build(resume: Path | None = None, **overrides: object) -> Trainer:
        known = registry()
        return Trainer(changed(base, overrides, known), registry=known, resume=resume)

    return build


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=2e-3, atol=2e-5)


# -- the run is the run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_chunks_and_micro_batches_give_the_same_run(
    make: Callable[..., Trainer], tmp_path: Path, mode: str
) -> None:
    """Batches of three are denoised as two and one, decoded two at a time and scored one at a time."""
    whole = make(mix=MODES[mode], training__batch_size=6).train()
    parts = {"training__batch_size": 3, "training__gradient_accumulation_steps": 2, "mix__reward_batch_size": 1}
    chunks = {"backprop__sample_batch_size": 2, "backprop__decode_batch_size": 2}
    other = make(mix=MODES[mode], **parts, **chunks, output=str(tmp_path / "parts")).train()
    same(adapters(whole), adapters(other))
    for a, b in zip(metrics(whole), metrics(other), strict=True):
        for label in ("redness", "shade"):
            assert b["terms"][label] == pytest.approx(a["terms"][label], rel=1e-3, abs=1e-4)
        assert b["cosines"] == pytest.approx(a["cosines"], abs=1e-3)


@pytest.mark.parametrize("mode", ["normalized", "latent"])  # one for each kind of running statistics
def test_a_resumed_mix_is_the_run(make: Callable[..., Trainer], tmp_path: Path, mode: str) -> None:
    straight = make(mix=MODES[mode]).train()
    broken = tmp_path / "broken"
    make(mix=MODES[mode], training__steps=1, output=str(broken)).train()
    state = json.loads((broken / "checkpoints/step-000001/state.json").read_text())
    assert state["mix"]["redness"]["mass"] > 0
    resumed = make(mix=MODES[mode], output=str(broken), resume=broken).train()
    for name, tensor in adapters(straight).items():
        assert torch.equal(adapters(resumed)[name], tensor), name
    keys = ("terms", "cosines", "total", "reward_queries")
    assert [[line[key] for key in keys] for line in metrics(resumed)] == [
        [line[key] for key in keys] for line in metrics(straight)
    ]


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(make: Callable[..., Trainer], tmp_path: Path) -> None:
    options: dict[str, Any] = {"mix": MODES["balanced"], "training__steps": 2, "training__batch_size": 3}
    one = make(**options).train()
    same_statistics = (
        "import torch.distributed as dist\n"
        "states = [None, None]\n"
        "dist.all_gather_object(states, trainer.mix.state())\n"
        "assert states[0] == states[1], states\n"
    )
    config = make(**options, output=str(tmp_path / "two")).config
    two = train_in_processes(config, module="tests.training.test_mix_training", after=same_statistics)
    same(adapters(one), adapters(two))
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b["terms"]["redness"] == pytest.approx(a["terms"]["redness"], rel=1e-3, abs=1e-4)


# -- cost -------------------------------------------------------------------------------------------------------------


class Counter:
    """Counts backward passes through a point of the graph."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("mode", ["sum", "normalized", "balanced", "pcgrad", "latent"])
def test_three_terms_cost_three_reward_backwards_and_one_of_the_rest(make: Callable[..., Trainer], mode: str) -> None:
    rewards = [{"name": "redness", "label": str(i), "weight": i + 1.0} for i in range(3)]
    trainer = make(mix=MODES[mode], rewards=rewards, backprop__strategy="last_k", backprop__k=2, sampling__steps=3)
    trainer.mix.terms = trainer.mix.terms[:3]  # the object passed from Python is a fourth term
    trainer.mix.running.pop("shade")
    scored, differentiated, decoded, denoised = Counter(), Counter(), Counter(), Counter()

    def watch(module: torch.nn.Module, forward: Counter | None, backward: Counter) -> None:
        def after(_: object, __: object, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            if forward is not None:
                forward()
            if tensor.requires_grad:
                tensor.register_hook(backward)

        module.register_forward_hook(after)

    for term in trainer.mix.terms:
        watch(term.reward, scored, differentiated)
    watch(trainer.pipeline.vae.decoder, None, decoded)
    watch(trainer.denoiser, None, denoised)
    trainer.step()  # the first step generates its images twice, once to calibrate
    for counter in (scored, differentiated, decoded, denoised):
        counter.count = 0
    trainer.step()
    assert scored.count == 3
    assert differentiated.count == 3
    assert decoded.count == (3 if mode == "latent" else 1)
    assert denoised.count == 2, "the two kept steps, once each"


# -- what the mix did -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Terms with 0% of the gradient")  # which is what `sum` is here for
def test_balanced_raises_both_where_sum_lets_the_large_one_win(make: Callable[..., Trainer], tmp_path: Path) -> None:
    gains, images = {}, {"sampling__steps": 3}
    for mode in ("sum", "balanced"):
        trainer = make(
            mix=MODES[mode], training__steps=30, optimizer__epsilon=1e-8, **images, output=str(tmp_path / mode)
        )
        prompts = ["a fox", "a hill"] * 4
        noise = trainer.sampler.noise(prompts, seed=9, step=0)

        def means(trainer: Trainer = trainer, noise: Any = noise, prompts: list[str] = prompts) -> dict[str, float]:
            with torch.no_grad():
                images = trainer.sampler.decode(trainer.sampler.sample(prompts, noise).latents)
                batch = ImageBatch(images=images)
                return {term.label: float(term.score(batch).mean()) for term in trainer.mix.terms}

        before = means()
        trainer.train()
        gains[mode] = {label: after - before[label] for label, after in means().items()}
    assert gains["sum"]["redness"] > 0 > gains["sum"]["shade"], gains
    assert min(gains["balanced"].values()) > 0, gains


def test_every_step_logs_what_the_mix_did(make: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(mix=MODES["balanced"], training__steps=2)
    trainer.callbacks = [ProgressBar(Console(width=300))]
    (first, second) = metrics(trainer.train())
    for line in (first, second):
        assert line["idle"] is None
        assert -1 <= line["cosines"]["redness | shade"] <= 1
        assert sum(term["share"] for term in line["terms"].values()) == pytest.approx(1.0)
        for term in line["terms"].values():
            assert {"raw", "weighted", "factor", "saturated", "grad_norm", "share"} <= term.keys()
            assert term["weighted"] == pytest.approx(term["factor"] * term["raw"], rel=1e-5)
        assert line["total"] == pytest.approx(sum(term["weighted"] for term in line["terms"].values()), abs=1e-6)
    # In the first step the running size is the step's own, so a factor brings the gradient to the weight's size.
    for term in first["terms"].values():
        assert term["factor"] * term["grad_norm"] == pytest.approx(1.0, rel=1e-4)
    assert first["reward_queries"] == 8
    assert second["reward_queries"] == 12
    printed = capsys.readouterr().out
    share = first["terms"]["redness"]["share"]
    raw = first["terms"]["redness"]["raw"]
    assert f"redness {raw:.4g} {round(100 * share)}%" in printed
    assert f"cos {first['cosines']['redness | shade']:.2f}" in printed


def test_schedules_change_the_factors(make: Callable[..., Trainer]) -> None:
    rewards = [{"name": "redness", "weight": {0: 0.0, 2: 1.0}}, {"name": "shade", "weight": 2.0}]
    lines = metrics(make(rewards=rewards, training__steps=4).train())
    assert [line["terms"]["redness"]["factor"] for line in lines] == pytest.approx([0, 0.5, 1, 1])
    assert lines[0]["terms"]["redness"]["share"] == 0
    assert lines[0]["terms"]["redness"]["grad_norm"] > 0


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_step_with_every_image_at_its_ceiling_is_reported_and_changes_nothing(
    make: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    low = [{"name": "redness", "ceiling": -99999.0}, {"name": "shade", "ceiling": -9.0}]
    trainer = make(rewards=low, training__steps=2, optimizer__weight_decay=0.5)
    before = lora.state(trainer.denoiser)
    trainer.callbacks = [ProgressBar(Console(width=300))]
    lines = metrics(trainer.train())
    assert all("every image is at the ceiling" in line["idle"] for line in lines)
    for name, tensor in lora.state(trainer.denoiser).items():
        assert torch.equal(tensor, before[name])
    assert "no update: every image is at the ceiling" in capsys.readouterr().out


def test_momentum_does_not_move_the_adapters_in_an_idle_step(make: Callable[..., Trainer]) -> None:
    fading = [{"name": "redness", "weight": {1: 1.0, 2: 0.0}}, {"name": "shade", "weight": {1: 1.0, 2: 0.0}}]
    trainer = make(rewards=fading)
    trainer.step()
    trainer.step()
    before = lora.state(trainer.denoiser)
    stats = trainer.step()
    assert stats.idle is not None
    assert "weight is 0" in stats.idle
    for name, tensor in lora.state(trainer.denoiser).items():
        assert torch.equal(tensor, before[name])


def test_the_saved_config_keeps_schedules(make: Callable[..., Trainer]) -> None:
    trainer = make(rewards=[{"name": "redness", "weight": {0: 0.0, 20: 1.0}}, {"name": "shade"}], training__steps=1)
    folder = trainer.train()
    from alignprop_core.config.load import load_config

    again = load_config(folder / "config.yaml", registry=trainer.registry)
    assert isinstance(again, RunConfig)
    assert again == trainer.config
    assert again.rewards[0].weight == {0: 0.0, 20: 1.0}
