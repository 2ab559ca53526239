"""Every example runs: each config for a step on the starter model, each script as its first lines say."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from alignprop_core.cli import run
from alignprop_core.config.load import load_config
from alignprop_core.prompts import PromptSet, load_prompts
from alignprop_core.registry.registry import default_registry

pytest.importorskip("alignprop_starter")

EXAMPLES = Path(__file__).parents[1] / "examples"
FEWEST_PROMPTS = 30
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SHORT = [
    "training.steps=1",
    "training.batch_size=2",
    "sampling.steps=2",
    "previews.prompts=[]",
    "evaluation.at_end=false",
    "training.device=cpu",
]


def test_there_are_examples() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_config_is_valid_and_says_how_to_run_it(path: Path) -> None:
    load_config(path)
    assert f"alignprop train examples/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if yaml.safe_load(path.read_text())["model"]["base"] == "starter"],
    ids=lambda path: path.stem,
)
def test_example_config_trains(path: Path, tmp_path: Path) -> None:
    assert run(["train", str(path), *SHORT, f"output={tmp_path / 'run'}"]) == 0
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (step["step"], step["idle"]) == (1, None)
    assert step["grad_norm"] > 0


def prompts_of(path: Path) -> tuple[PromptSet, PromptSet]:
    """Return the training and the held-out prompts of a config."""
    config, registry = load_config(path), default_registry()
    assert config.prompts.heldout is not None
    return load_prompts(config.prompts.train, registry), load_prompts(config.prompts.heldout, registry)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_has_many_heldout_prompts_that_are_not_trained_on(path: Path) -> None:
    train, heldout = prompts_of(path)
    assert len(set(heldout.prompts)) == len(heldout) >= FEWEST_PROMPTS
    assert set(heldout.prompts) & set(train.prompts) == set()


def test_half_of_the_heldout_prompts_of_unlearning_ask_for_spiders_and_all_for_known_animals() -> None:
    read_caption = pytest.importorskip("alignprop_starter.vocabulary").read_caption
    asked = [read_caption(prompt) for prompt in prompts_of(EXAMPLES / "object_absence.yaml")[1].prompts]
    assert None not in [request.species for request in asked]
    assert sum(request.species == "spider" for request in asked) * 2 == len(asked)


def test_every_example_of_the_starter_has_a_real_size_variant() -> None:
    large = {path.stem for path in CONFIGS if path.stem.endswith("_sd15")}
    assert large == {f"{path.stem}_sd15" for path in CONFIGS} - {f"{name}_sd15" for name in large}


@pytest.mark.parametrize("name", ["two_things.txt", "two_things_heldout.txt"])
def test_prompts_of_two_things_name_two_classes_of_coco(name: str) -> None:
    coco = pytest.importorskip("alignprop_counting.coco").COCO_NAMES
    vocabulary = pytest.importorskip("alignprop_counting.vocabulary").Vocabulary(coco)
    read_prompt = pytest.importorskip("alignprop_counting.prompt_reader").read_prompt
    prompts = (EXAMPLES / name).read_text().splitlines()
    assert [prompt for prompt in prompts if len(read_prompt(prompt, vocabulary)) != 2] == []


SCRIPTS = sorted({*EXAMPLES.glob("*.py")} - {EXAMPLES / "own_loop.py"})  # test_notebooks.py runs that one


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_script_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(EXAMPLES / "jpeg_compressibility.yaml")
    monkeypatch.setattr(sys, "argv", [str(path), config, *SHORT, f"output={tmp_path / 'run'}"])
    runpy.run_path(str(path), run_name="__main__")
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
