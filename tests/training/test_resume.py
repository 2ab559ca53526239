"""Resuming: evaluations are compared only where they measure the same, changed reward code is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import PluginError
from alignprop_core.prompts import PromptSet
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.runs.fingerprints import files_of
from alignprop_core.training.folder import environment
from alignprop_core.training.preflight import Inputs, check_inputs
from alignprop_core.training.resume import check_files
from alignprop_core.training.trainer import Trainer
from alignprop_evaluation.early_stopping import Basis
from alignprop_evaluation.while_training import basis_of
from tests.support.toy_rewards import registry
from tests.support.toy_runs import adapters, changed, metrics, toy_data

SMALL = {"name": "redness", "label": "small", "options": {"gain": -1.0}}
SOURCE = '''
from alignprop_core import Reward


class Mine(Reward):
    """For tests."""

    def score(self, batch):
        return batch.images.mean((1, 2, 3))
'''
FEATURES = """
    def image_features(self, images):
        return images.mean((2, 3))
"""
LEARNS = {"sampling__steps": 3}
"""One denoising step is too few for a score that rises with every step of training."""
NEW = "evaluations are not compared with those before the resume"


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config of short runs that evaluate; keyword arguments are overrides, dots as double underscores."""
    evaluation = {"at_end": False, "images_per_prompt": 2, "every": 1, "rewards": [SMALL]}
    sampling = {"steps": 1, "guidance_scale": 2.0}
    base = toy_data(tiny_model, tmp_path, sampling=sampling, evaluation=evaluation)
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, {"training__steps": 2} | overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Path(Trainer(config, registry=registry(), **options).train())


def stopping_state(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    found: dict[str, Any] = json.loads((newest / "state.json").read_text())["early_stopping"]
    return found


# -- what evaluations measure ------------------------------------------------------------------------------------------


def test_a_resumed_run_that_monitors_something_else_starts_a_new_best(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make(**LEARNS))  # it monitors the total, which is positive and rises
    assert stopping_state(folder)["best"] > 0
    first = stopping_state(folder)["first_diversity"]
    assert NEW not in capsys.readouterr().err
    # The other score is its negative: below the best so far whatever happens, and falling.
    options: dict[str, Any] = {
        "early_stopping": {"monitor": "small", "patience": 2, "restore_best": True},
        "training__steps": 6,
    }
    train(make(**LEARNS, **options), resume=folder)
    printed = capsys.readouterr().err
    assert f'{NEW}: early_stopping.monitor (was "total", is "small") changed; the one at step 2 is the first' in printed
    assert printed.count(NEW) == 1
    assert stopping_state(folder)["best"] < 0
    assert stopping_state(folder)["best_step"] == 2
    assert stopping_state(folder)["first_diversity"] == first, "nothing about it changed"
    assert metrics(folder, "total")[-1]["step"] == 4, "two evaluations were no better than its own first"
    best = load_file(folder / "lora" / "best" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in adapters(folder).items())
    train(make(**LEARNS, **options | {"early_stopping__patience": 3}), resume=folder)
    assert NEW not in capsys.readouterr().err, "reported once, and more patience changes nothing of it"
    assert stopping_state(folder)["best_step"] == 2


def test_a_diversity_limit_set_later_uses_the_first_diversity_measured(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make(evaluation__images_per_prompt=1))
    assert stopping_state(folder)["first_diversity"] is None
    train(make(early_stopping__min_diversity=0.01, training__steps=3), resume=folder)
    at = {row["step"]: row["evaluation"]["diversity"] for row in metrics(folder, "evaluation")}
    assert stopping_state(folder)["first_diversity"] == at[2] > 0
    assert "evaluation.images_per_prompt (was 1, is 2) changed; the one at step 2" in capsys.readouterr().err


SCHEDULE = [{"name": "redness", "weight": {0: 1.0, 10: 2.0}}]


BASIS = [
    ({"training__steps": 9}, True),
    ({"early_stopping": {"patience": 3, "restore_best": True, "max_drift": 0.5}}, True),
    ({"evaluation__batch_size": 3, "evaluation__every": 4}, True),
    ({"evaluation__rewards": []}, True),
    ({"early_stopping__mode": "min"}, False),
    ({"early_stopping__monitor": "redness"}, False),
    ({"evaluation__seed": 3}, False),
    ({"evaluation__images_per_prompt": 3}, False),
    ({"evaluation__diversity_encoder": "seeing"}, False),
]
"""Overrides, and whether evaluations measure the same with them."""


def test_the_basis_changes_only_with_what_evaluations_depend_on(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    file = tmp_path / "seeing.py"
    file.write_text(SOURCE.replace("Mine", "Seeing") + FEATURES)
    usual = {"evaluation__rewards": [SMALL, {"name": f"{file}:Seeing", "label": "seeing"}]}

    def basis(overrides: dict[str, Any]) -> Basis:
        return basis_of(Trainer(make(**usual | overrides), registry=registry()))

    plain = basis({})
    found = [(overrides, basis(overrides) == plain) for overrides, _ in BASIS]
    assert found == BASIS


def test_the_basis_has_the_last_weights_the_options_and_the_prompts_text(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def basis(**overrides: Any) -> Basis:
        return basis_of(Trainer(make(**overrides), registry=registry()))

    assert basis(rewards=SCHEDULE) != basis(rewards=SCHEDULE, training__steps=9)
    assert basis(rewards=SCHEDULE, training__steps=10) == basis(rewards=SCHEDULE, training__steps=20)
    monitored = {"early_stopping__monitor": "small"}
    assert basis(**monitored) != basis(**monitored, evaluation__rewards=[SMALL | {"options": {"gain": 3.0}}])
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    monitored |= {"evaluation__rewards": [{"name": f"{file}:Mine", "label": "small"}]}
    before = basis(**monitored)
    assert basis(**monitored) == before
    file.write_text(SOURCE + "# edited\n")
    assert basis(**monitored) != before
    before = basis()
    (tmp_path / "prompts.txt").write_text("a fox\nthree owls\n")
    assert basis() != before


def test_an_old_best_lora_that_does_not_count_is_removed(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make(**LEARNS))
    assert (folder / "lora" / "best").is_dir()
    train(make(**LEARNS, early_stopping={"max_drift": 1e-9, "restore_best": True}, training__steps=3), resume=folder)
    printed = capsys.readouterr().err
    assert f"{NEW}: at the best evaluation, of step 2, drift" in printed
    assert "no evaluation was within the limits of early_stopping; the LoRA is that of the last step" in printed
    assert not (folder / "lora" / "best").exists()


# -- the best LoRA ----------------------------------------------------------------------------------------------------


def test_a_run_resumed_in_another_folder_takes_the_best_lora_along(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    stopping = {"monitor": "small"}  # it falls, so the start stays the best
    folder = train(make(**LEARNS, early_stopping=stopping))
    other = train(
        make(**LEARNS, early_stopping=stopping, training__steps=3, output=str(tmp_path / "other")), resume=folder
    )
    name = "lora/best/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(other / name), load_file(folder / name)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert (other / "lora" / "best" / "other.safetensors").is_file()
    with safe_open(other / name, framework="pt") as file:
        assert file.metadata()["alignprop.step"] == "0"
    straight = train(make(**LEARNS, early_stopping=stopping, training__steps=3, output=str(tmp_path / "straight")))
    assert all(torch.equal(adapters(other)[key], tensor) for key, tensor in adapters(straight).items())


# -- the code that is trained on --------------------------------------------------------------------------------------


def test_a_reward_file_that_was_edited_is_refused_until_it_is_put_back(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    options: dict[str, Any] = {"rewards": [{"name": f"{file}:Mine"}], "evaluation__every": None}
    folder = train(make(**options, training__steps=1))
    file.write_text(SOURCE.replace("mean", "amax"))
    with pytest.raises(PluginError, match=r"rewards\.0\.name: .*mine\.py was changed since .*Put it back") as caught:
        train(make(**options), resume=folder)
    assert caught.value.exit_code == 2
    with pytest.raises(PluginError, match="was changed"):
        train(make(**options, output=str(tmp_path / "other")), resume=folder / "checkpoints" / "step-000001")
    file.write_text(SOURCE)
    train(make(**options, training__steps=2), resume=folder)
    assert metrics(folder, "total")[-1]["step"] == 2
    file.write_text(SOURCE.replace("mean", "amin"))
    with pytest.raises(PluginError, match="was changed"):
        Trainer(make(**options, training__steps=3), registry=registry(), resume=folder)
    edited = Trainer(make(**options, training__steps=3), registry=registry(), resume=folder, edited=True)
    assert edited.step_number == 2


def test_an_edited_file_of_an_isolated_reward_is_refused(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    file, folder = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(SOURCE)
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    plain = make().model_dump(mode="json")
    term = {"name": f"{file}:Mine", "label": "mine", "isolation": {"python": "/envs/mine/bin/python"}}
    config = RunConfig.model_validate(plain | {"rewards": [term]})
    prompts = PromptSet("mine", ("a",), ({},))
    (folder / "environment.json").write_text(
        json.dumps({"files": files_of(config, registry(), prompts, None, model=True)})
    )
    check_files(checkpoint, files_of(config, registry(), prompts, None, model=True))
    file.write_text(SOURCE + "# edited")
    with pytest.raises(PluginError, match=r"rewards\.0\.name: .*mine\.py was changed"):
        check_files(checkpoint, files_of(config, registry(), prompts, None, model=True))


class Mine(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.mean((1, 2, 3))


class Edited(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return -batch.images.mean((1, 2, 3))


def test_an_object_of_another_class_is_refused(make: Callable[..., RunConfig]) -> None:
    data = make(evaluation__every=None, rewards=[SMALL], evaluation__rewards=[])
    folder = train(data, rewards={"mine": Mine()})
    longer = make(evaluation__every=None, rewards=[SMALL], evaluation__rewards=[], training__steps=3)
    with pytest.raises(PluginError, match=r'rewards\.1: the class Edited of the object "mine" was changed since'):
        train(longer, rewards={"mine": Edited()}, resume=folder)
    train(longer, rewards={"mine": Mine()}, resume=folder)
    assert metrics(folder, "total")[-1]["step"] == 3


def test_a_class_edited_in_a_notebook_under_its_name_is_refused(make: Callable[..., RunConfig]) -> None:
    """A cell that is run again defines the class anew, without any file."""

    def cell(reduced: str) -> Reward:
        space: dict[str, Any] = {"Reward": Reward, "__name__": "__main__"}
        exec(
            f"class Mine(Reward):\n    def score(self, batch):\n        return batch.images.{reduced}((1, 2, 3))", space
        )
        mine: Reward = space["Mine"]()
        return mine

    options: dict[str, Any] = {"evaluation__every": None, "rewards": [SMALL], "evaluation__rewards": []}
    folder = train(make(**options, training__steps=1), rewards={"mine": cell("mean")})
    with pytest.raises(PluginError, match=r'rewards\.1: the class Mine of the object "mine" was changed since'):
        Trainer(make(**options), registry=registry(), rewards={"mine": cell("amax")}, resume=folder)
    Trainer(make(**options), registry=registry(), rewards={"mine": cell("mean")}, resume=folder)


# -- the files that are trained on ------------------------------------------------------------------------------------

WEIGHTED = """
from pathlib import Path
from alignprop_core import Reward
from alignprop_core.weights import load_state_dict


class Weighted(Reward):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("factor", load_state_dict(Path(__file__).with_name("factor.safetensors"))["factor"])

    def score(self, batch):
        return self.factor * batch.images.mean((1, 2, 3))
"""


def put(file: Path, **tensors: Tensor) -> None:
    save_file(tensors, file)


def test_files_that_changed_since_a_run_began_are_refused_by_key_and_name(
    make: Callable[..., RunConfig], tiny_model: Path, tmp_path: Path
) -> None:
    model, lora, factor = tmp_path / "model", tmp_path / "extra", tmp_path / "factor.safetensors"
    shutil.copytree(tiny_model, model)
    shutil.copytree(
        train(make(training__steps=1, evaluation__every=None, output=str(lora))) / "lora", tmp_path / "lora"
    )
    extra = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    put(factor, factor=torch.tensor(2.0))
    (tmp_path / "weighted.py").write_text(WEIGHTED)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("a boat\na hill\n")
    options: dict[str, Any] = {
        "model": {"base": str(model), "loras": [{"path": str(extra)}]},
        "rewards": [{"name": f"{tmp_path}/weighted.py:Weighted"}],
        "evaluation__every": None,
        "prompts__heldout": str(heldout),
    }
    folder = train(make(**options, training__steps=1))
    files = json.loads((folder / "environment.json").read_text())["files"]
    weights, extra_file = next(model.glob("unet/*.safetensors")), model / "tokenizer" / "new.json"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert files["model.base"][f"unet/{weights.name}"] == digest
    assert set(files["prompts.train"]) == {str(tmp_path / "prompts.txt")}

    def resumed(key: str = "", **more: Any) -> Inputs:
        if "weights" in key:  # known once the rewards are loaded
            Trainer(make(**options), registry=registry(), resume=folder, **more)
        return check_inputs(make(**options), registry(), resume=folder, **more)

    resumed("weights")
    (tmp_path / "prompts.txt").write_text("# only a comment\na fox\n\ntwo owls\n")
    resumed()
    prompts = tmp_path / "prompts.txt"
    for key, file, edit in (
        (r"prompts\.train: .*prompts\.txt", prompts, lambda: prompts.write_text("a fox\nthree owls\n")),
        (r"prompts\.heldout: .*heldout\.txt", heldout, lambda: heldout.write_text("a boat\na cat\n")),
        (r"model\.base: unet/.*safetensors", weights, lambda: _nudged(weights)),
        (
            r"model\.base: tokenizer/new\.json",
            extra_file,
            lambda: extra_file.write_text("{}"),
        ),
        (r"model\.loras\.0: lora/pytorch_lora_weights\.safetensors", extra, lambda: _nudged(extra)),
        (r"rewards\.0 \(weights\): .*factor\.safetensors", factor, lambda: put(factor, factor=torch.tensor(3.0))),
    ):
        before = file.read_bytes() if file.exists() else None
        edit()
        with pytest.raises(PluginError, match=f"--resume: {key} was changed since .*--edited") as caught:
            resumed(key)
        assert caught.value.exit_code == 2
        assert resumed(key, edited=True).checkpoint is not None
        file.unlink() if before is None else file.write_bytes(before)
    resumed()


@pytest.mark.parametrize(
    "cost",
    [
        {"backprop": {"checkpoint_steps": True, "checkpoint_blocks": True, "checkpoint_decoder": True}},
        {"backprop": {"sample_batch_size": 1, "decode_batch_size": 1, "cuda_graphs": False}},
        {"mix": {"offload": True, "reward_batch_size": 1}},
    ],
)
def test_what_changes_memory_and_time_alone_may_be_set_when_resuming(
    make: Callable[..., RunConfig], cost: dict[str, Any]
) -> None:
    """An out-of-memory error advises it."""
    folder = train(make(training__steps=1, evaluation__every=None))
    more = {f"{section}__{key}": value for section, values in cost.items() for key, value in values.items()}
    assert check_inputs(make(evaluation__every=None, **more), registry(), resume=folder).checkpoint is not None


def _nudged(file: Path) -> None:
    """Change one weight of a file, and neither its size nor its time of modification."""
    times = file.stat()
    tensors = load_file(file)
    name = sorted(tensors)[0]
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors | {name: tensors[name] + 1}, file, metadata)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size


def test_the_environment_lists_every_installed_distribution_and_the_revision_of_a_hub_model(
    make: Callable[..., RunConfig], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--owner--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    config = make(model__base="owner/tiny")
    found = files_of(config, registry(), PromptSet("mine", ("a",), ({},)), None, model=True)
    assert found["model.base"]["revision"] == commit
    assert any(name.startswith("unet/") for name in found["model.base"])
    listed = environment(config, registry(), torch.device("cpu"))["installed"]
    installed = {(found.metadata["Name"] or "").lower().replace("-", "_"): found.version for found in distributions()}
    assert {name.lower(): version for name, version in listed.items()} == installed
