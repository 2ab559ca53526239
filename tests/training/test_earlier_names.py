"""Run folders with the names of earlier versions are read: evaluated, sampled from, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import alignprop_evaluation
from alignprop_core.cli import run
from alignprop_core.config.aliases import upgraded
from alignprop_core.config.load import load_config
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import Registry
from alignprop_core.training.checkpoint import load_checkpoint
from alignprop_core.training.trainer import Trainer
from tests.support.toy_runs import adapters, metrics, toy_data

REWARD = '''
from alignprop_core import Reward


class Red(Reward):
    """Red images."""

    def score(self, batch):
        return batch.images[:, 0].mean((1, 2)) - batch.images[:, 2].mean((1, 2))
'''


def earlier_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved config as it was written before 0.1."""
    new = json.loads(json.dumps(config))
    lora, training, save = new["lora"], new["training"], new["save"]
    previews, stopping, optimizer = new.pop("previews"), new.pop("early_stopping"), new["optimizer"]
    lora["targets"], lora["rank_stabilized"] = lora.pop("target_modules"), lora.pop("use_rslora")
    training["checkpoint_every"], training["keep_checkpoints"] = save.pop("state_every"), save.pop("state_keep")
    new["samples"] = {"every": previews["every"], "at_start": True, "seed": previews["seeds"][0], "count": 4}
    new["guards"] = {
        "watch": "reward" if stopping["monitor"] == "total" else stopping["monitor"],
        "lower_is_better": stopping["mode"] == "min",
        "patience": stopping["patience"],
        "keep_best": stopping["restore_best"],
        "drift_limit": stopping["max_drift"],
        "diversity_floor": stopping["min_diversity"],
        "explosion": optimizer.pop("spike_threshold"),
        "max_dropped_steps": optimizer.pop("max_skipped_steps"),
    }
    return dict(new)


def earlier_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state.json as it was written before 0.1."""
    check, stopping, updates = state.pop("step_check"), state.pop("early_stopping"), state.pop("ema_updates")
    basis, stds = stopping.pop("basis"), stopping.pop("stds")
    watched = {
        key.replace("early_stopping.monitor", "guards.watch"): value for key, value in basis["monitored"].items()
    }
    subject = {"pictures": basis["images"], "diversity": basis["diversity"], "watched": watched}
    check["dropped"] = check.pop("skipped")
    mix = {
        label: {name.replace("highest_std", "highest_spread"): value for name, value in running.items()}
        for label, running in state["mix"].items()
    }
    guarding = {"steps": check, "heldout": {**stopping, "spreads": stds, "subject": subject}, "averaged": updates}
    return state | {"mix": mix, "guarding": guarding}


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of four steps, and one of two steps whose folder has the earlier names."""
    folder = tmp_path_factory.mktemp("earlier")
    (folder / "red.py").write_text(REWARD)
    known = Registry.from_plugins({"alignprop-evaluation": alignprop_evaluation})

    def config(steps: int, name: str) -> RunConfig:
        data = toy_data(
            tiny_model,
            folder,
            rewards=[{"name": f"{folder / 'red.py'}:Red", "label": "red"}],
            lora={"rank": 2, "target_modules": ["to_q", "to_v"], "use_rslora": True},
            optimizer={"learning_rate": 1e-2, "ema_decay": 0.9, "spike_threshold": 500.0},
            mix={"combine": "normalized"},
            training={"steps": steps, "batch_size": 2, "device": "cpu"},
            save={"every": None, "state_every": 2, "state_keep": 3},
            previews={"every": None, "seeds": [7], "prompts": None},
            evaluation={"at_end": False, "images_per_prompt": 2, "every": 1},
            sampling={"steps": 1, "guidance_scale": 2.0},
            early_stopping={"patience": 9, "restore_best": True},
            output=str(folder / name),
        )
        return load_config(data, registry=known)

    straight = Trainer(config(4, "straight"), registry=known).train()
    earlier = Trainer(config(2, "earlier"), registry=known).train()
    file, state = earlier / "config.yaml", earlier / "checkpoints" / "step-000002" / "state.json"
    file.write_text(yaml.safe_dump(earlier_config(yaml.safe_load(file.read_text())), sort_keys=False))
    state.write_text(json.dumps(earlier_state(json.loads(state.read_text()))))
    return {"straight": straight, "earlier": earlier, "config": config, "registry": known}


def test_a_config_with_the_earlier_names_has_the_same_values(runs: dict[str, Any]) -> None:
    found = load_config(runs["earlier"] / "config.yaml", registry=runs["registry"])
    expected = runs["config"](2, "earlier").model_dump()
    expected["previews"]["prompts"] = None
    assert found.model_dump() == expected
    assert upgraded({"samples": {}, "guards": {}}) == {"early_stopping": {"mode": "max"}}, "sections may be missing"


def test_only_a_run_folder_is_read_by_the_earlier_names(runs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(runs["earlier"] / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"guards: unknown key.*early_stopping"):
        load_config(tmp_path / "config.yaml", registry=runs["registry"])


def test_a_checkpoint_with_the_earlier_names_has_the_same_state(runs: dict[str, Any]) -> None:
    checkpoint = Path("checkpoints/step-000002")
    earlier = load_checkpoint(runs["earlier"] / checkpoint).state
    today = load_checkpoint(runs["straight"] / checkpoint).state
    # What was monitored is not read back, because its description has other words.
    today["early_stopping"]["basis"]["monitored"] = {}
    earlier["step_check"].pop("dropped", None)
    assert {k: v for k, v in earlier.items() if k != "mix"} == {k: v for k, v in today.items() if k != "mix"}


def test_a_run_with_the_earlier_names_resumes_to_the_same_adapters(runs: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    shutil.copytree(runs["earlier"], folder)
    config = runs["config"](4, "earlier").model_copy(update={"output": str(folder)})
    resumed = Trainer(config, registry=runs["registry"], resume=folder).train()
    for name, tensor in adapters(runs["straight"]).items():
        assert torch.equal(adapters(resumed)[name], tensor), name
    assert [row["step"] for row in metrics(resumed, "total")] == [1, 2, 3, 4]
    assert [row["step"] for row in metrics(resumed, "evaluation")] == [0, 1, 2, 3, 4]
    ours, theirs = (metrics(folder, "evaluation")[-1]["evaluation"] for folder in (resumed, runs["straight"]))
    assert ours == theirs


def test_the_commands_read_a_run_with_the_earlier_names(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(runs["earlier"]), "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["tuned"]["red"]["n"] == 8
    capsys.readouterr()
    assert run(["sample", "a fox", "--run", str(runs["earlier"]), "--output", str(tmp_path / "images")]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
