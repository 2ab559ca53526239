"""The adapters' moving average, weight decay and regularization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignprop_core.config.sections import RunConfig
from alignprop_core.lora import adapters as lora
from alignprop_core.lora.formats import read_lora
from alignprop_core.mix.stats import StepStats
from alignprop_core.training.callback import Callback
from alignprop_core.training.ema import EMA
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import registry
from tests.support.toy_runs import changed, metrics, toy_data


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    base = toy_data(
        tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 1}, sampling={"steps": 1, "guidance_scale": 2.0}
    )
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Path(Trainer(config, registry=registry(), **options).train())


def test_the_average_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = EMA([parameter], decay=0.5)
    expected = torch.zeros(3)
    for n in range(6):
        with torch.no_grad():
            parameter += 1
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.values[0], expected)
    with average.swapped_in():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.detach(), torch.full((3,), 6.0))


def test_the_average_is_saved_and_evaluated(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    class Watch(Callback):
        def on_step(self, trainer: Trainer, stats: StepStats) -> None:
            assert trainer.ema is not None
            self.raw = lora.state(trainer.denoiser)
            self.average = [value.clone() for value in trainer.ema.values]

    watch = Watch()
    trainer = Trainer(make(optimizer__ema_decay=0.9, evaluation__every=3), registry=registry(), callbacks=[watch])
    folder = trainer.train()
    raw, mean = torch.cat([t.flatten() for t in watch.raw.values()]), torch.cat([t.flatten() for t in watch.average])
    assert not torch.allclose(raw, mean)
    saved = read_lora(folder)["denoiser"]
    live = lora.current(trainer.denoiser)
    assert all(torch.equal(saved[name].down, live[name].down) for name in live)
    assert torch.equal(torch.cat([p.detach().flatten() for p in trainer.parameters]), mean)
    kept = load_file(folder / "checkpoints" / "step-000006" / "adapter.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in watch.raw.items()), (
        "training continues from the raw values"
    )


def test_weight_decay_and_regularization_limit_the_drift(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    def drift(name: str, **options: object) -> float:
        folder = train(make(evaluation__every=6, training__steps=6, output=str(tmp_path / name), **options))
        return float(metrics(folder, "evaluation")[-1]["evaluation"]["drift"])

    free = drift("free")
    assert drift("decayed", optimizer__weight_decay=20.0) < 0.8 * free
    assert drift("pulled", regularization__weight=50.0) < 0.8 * free
    pulled = metrics(tmp_path / "pulled", "total")
    assert pulled[0]["regularization"] == 0
    assert pulled[-1]["regularization"] > 0
    assert all(row["regularization"] == 0 for row in metrics(tmp_path / "free", "total"))
