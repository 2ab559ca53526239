"""Early stopping: evaluations while training, when a run stops, which LoRA is its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import alignprop_evaluation
import alignprop_report
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import Registry
from alignprop_core.training.callback import Callback
from alignprop_core.training.trainer import Trainer
from tests.support.processes import train_in_processes
from tests.support.toy_rewards import alignprop_register_rewards, registry
from tests.support.toy_runs import Interrupt, adapters, changed, metrics, toy_data


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    base = toy_data(
        tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 1}, sampling={"steps": 1, "guidance_scale": 2.0}
    )
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Path(Trainer(config, **{"registry": registry()} | options).train())


def test_evaluations_are_lines_of_metrics_with_the_same_seeds(make: Callable[..., RunConfig]) -> None:
    seen = []

    class Watch(Callback):
        def on_evaluation(self, trainer: Trainer, results: Any) -> None:
            seen.append((trainer.step_number, results["total"]))

    folder = train(make(evaluation__every=4, sampling__steps=3), callbacks=[Watch()])
    rows = metrics(folder, "evaluation")
    assert [row["step"] for row in rows] == [0, 4, 6], "before the first step, along the way, after the last"
    assert seen == [(row["step"], row["evaluation"]["total"]) for row in rows]
    first, last = rows[0]["evaluation"], rows[-1]["evaluation"]
    assert first["drift"] == 0
    assert last["drift"] > 0
    assert last["scores"]["redness"]["mean"] > first["scores"]["redness"]["mean"]
    assert last["scores"]["red_share"]["mean"] == pytest.approx(last["total"], abs=1e-6)
    assert first["diversity"] > 0
    assert [row["step"] for row in metrics(folder, "terms")] == [1, 2, 3, 4, 5, 6], "the steps' own lines are as before"


def test_the_run_stops_early_and_restores_the_best(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    # Trained for more red, monitored for less: the start stays the best, and the second evaluation is one too many.
    config = make(
        training__steps=50,
        sampling__steps=3,
        evaluation__every=2,
        evaluation__at_end=True,
        early_stopping={"monitor": "red_share", "mode": "min", "patience": 2, "restore_best": True},
    )
    folder = train(config)
    assert [row["step"] for row in metrics(folder, "total")][-1] == 4
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["step"] == 0
    assert "did not improve at 2 evaluations in a row" in written["stopped"]
    assert written["drift"]["tuned"] == 0
    assert written["diversity"]["base"]["mean"] == written["diversity"]["tuned"]["mean"]
    assert all(not tensor.any() for name, tensor in adapters(folder).items() if "lora_B" in name)
    printed = capsys.readouterr().err
    assert "stopped at step 4: held-out red_share did not improve" in printed
    assert "the run's LoRA is the best one, of step 0" in printed


def test_the_best_lora_is_kept_beside_the_last_and_is_what_was_evaluated(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    # The best lies in the middle: after step 4 the learning rate of this run makes nothing better.
    options: dict[str, Any] = {"training__steps": 4, "evaluation__every": 2, "sampling__steps": 3}
    config = make(**options, early_stopping={"max_drift": 1e-9})
    folder = train(config)
    best = load_file(folder / "lora" / "best" / "pytorch_lora_weights.safetensors")
    assert all(not tensor.any() for name, tensor in best.items() if "lora_B" in name), "only the start had no drift"
    assert any(tensor.any() for name, tensor in adapters(folder).items() if "lora_B" in name)
    assert metrics(folder, "total")[-1]["step"] == 2
    again = make(**options, output=str(tmp_path / "again"))
    free = train(again)
    best = load_file(free / "lora" / "best" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in adapters(free).items()), "red rose to the end"


def test_a_resumed_run_that_stops_early_equals_the_uninterrupted_one(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "evaluation__every": 2,
        "evaluation__at_end": True,
        "optimizer__ema_decay": 0.9,
        "regularization__weight": 0.1,
        "early_stopping": {"patience": 2, "restore_best": True},
        "training__steps": 4,
    }
    straight = train(make(**options))
    config = make(**options, output=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    resumed = train(config, resume=tmp_path / "broken")
    for name, tensor in adapters(straight).items():
        assert torch.equal(adapters(resumed)[name], tensor), name
    for key in ("evaluation", "total"):
        ours, theirs = (
            [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in metrics(folder, key)]
            for folder in (resumed, straight)
        )
        assert ours == theirs
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in (straight, resumed))
    assert one == two


def test_an_interrupted_evaluation_is_repeated(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    straight = train(make(evaluation__every=2, training__steps=4))
    config = make(evaluation__every=2, training__steps=4, output=str(tmp_path / "broken"))
    trainer = Trainer(config, registry=registry())

    def interrupt(*_: object) -> None:
        if trainer.step_number == 2:
            raise KeyboardInterrupt

    trainer.denoiser.register_forward_pre_hook(lambda *_: None if torch.is_grad_enabled() else interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    folder = train(config, resume=tmp_path / "broken")
    assert metrics(folder, "evaluation") == metrics(straight, "evaluation")


def test_a_stopped_run_stays_stopped_until_its_limits_allow_more(make: Callable[..., RunConfig]) -> None:
    toys = SimpleNamespace(alignprop_register_rewards=alignprop_register_rewards)
    plugins = {"alignprop-evaluation": alignprop_evaluation, "alignprop-report": alignprop_report}
    known = Registry.from_plugins({"toy-rewards": toys, **plugins})
    options: dict[str, Any] = {"evaluation__every": 2, "training__steps": 8}
    folder = train(make(**options, early_stopping={"max_drift": 1e-9}), registry=known)
    assert metrics(folder, "total")[-1]["step"] == 2
    lines = metrics(folder)
    assert lines[-1] == {"step": 2, "stopped": lines[-1]["stopped"]}
    assert lines[-1]["stopped"].endswith("is above early_stopping.max_drift 1e-09")
    reported = f"Stopped early at step 2 of 8: {lines[-1]['stopped']}."
    assert reported in (folder / "report.html").read_text(), "there is no evaluation.json to read it from"
    train(make(**options, early_stopping={"max_drift": 1e-9}), resume=folder, registry=known)
    assert metrics(folder, "total")[-1]["step"] == 2
    assert metrics(folder, "stopped") == lines[-1:], "recorded once"
    train(make(**options), resume=folder, registry=known)
    assert metrics(folder, "total")[-1]["step"] == 8
    assert metrics(folder, "stopped") == [], "it continued to its end"
    assert "Finished after 8 steps." in (folder / "report.html").read_text()
    assert [row["step"] for row in metrics(folder, "evaluation")] == [0, 2, 4, 6, 8]


# -- impossible configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"early_stopping__patience": 3},
            "early_stopping.patience: needs evaluations while training; set evaluation.every",
        ),
        ({"early_stopping__restore_best": True}, "early_stopping.restore_best: needs evaluations"),
        ({"early_stopping__max_drift": 0.2}, "early_stopping.max_drift: needs evaluations"),
        ({"evaluation__every": 2, "prompts__heldout": None}, "evaluation.every: there is nothing to evaluate on"),
        (
            {"evaluation__every": 2, "early_stopping__min_diversity": 0.5, "evaluation__images_per_prompt": 1},
            "early_stopping.min_diversity: needs pairs",
        ),
        ({"evaluation__diversity_encoder": "clip"}, '"clip" is not the label of a term; the labels are redness'),
        ({"early_stopping__patience": 0, "evaluation__every": 2}, "early_stopping.patience"),
        ({"optimizer__max_skipped_steps": 0}, "optimizer.max_skipped_steps"),
        ({"optimizer__ema_decay": 1.0}, "optimizer.ema_decay"),
        ({"regularization__weight": -1.0}, "regularization.weight"),
    ],
)
def test_impossible_settings_are_refused(
    make: Callable[..., RunConfig], overrides: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**overrides)
    assert words in str(caught.value).replace(" (from the command line)", "")


def test_a_monitored_score_that_is_not_measured_is_refused_before_anything_loads(
    make: Callable[..., RunConfig],
) -> None:
    config = make(evaluation__every=2, early_stopping__monitor="red_shar", model__base="owner/name")
    with pytest.raises(ConfigError, match=r'no evaluation measures "red_shar".*Did you mean "red_share"'):
        Trainer(config, registry=registry())


def test_an_encoder_without_image_features_is_refused(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r'reward of "redness" has no image features'):
        train(make(evaluation__every=2, evaluation__diversity_encoder="redness"))


@pytest.mark.slow
def test_two_processes_stop_together(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "evaluation__every": 2,
        "early_stopping": {"max_drift": 1e-9},
        "regularization__weight": 0.1,
    }
    one = train(make(**options, output=str(tmp_path / "one")))
    stopped = "assert trainer.step_number == 2, trainer.step_number"
    two = train_in_processes(make(**options, output=str(tmp_path / "two")), after=stopped)
    for a, b in zip(metrics(one, "total"), metrics(two, "total"), strict=True):
        assert b["total"] == pytest.approx(a["total"], abs=1e-5)
        assert b["regularization"] == pytest.approx(a["regularization"], rel=1e-3, abs=1e-9)
