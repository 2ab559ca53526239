"""An isolated reward gives the same scores, gradients and runs as the same reward in the run's own process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from alignprop_core.errors import PromptError
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch

jpeg = pytest.mark.skipif(find_spec("alignprop_jpeg") is None, reason="alignprop-jpeg is not installed")

Load = Callable[..., Any]
Images = Callable[..., Tensor]
Scored = Callable[..., tuple[Tensor, Tensor]]
Config = Callable[..., Path]
Train = Callable[..., Path]


@jpeg
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_and_gradients_equal_those_of_this_process(
    load_once: Load, images: Images, scored: Scored, dtype: torch.dtype
) -> None:
    there = load_once("jpeg_compressibility", {"quality": 80})
    here = default_registry().load_reward("jpeg_compressibility", {"quality": 80})
    # The worker may have served another type of numbers; the shared file grows, and is larger than needed.
    for size in (4, 1, 7):
        batch = images(size, dtype, side=32)
        for ours, theirs in zip(scored(here, batch), scored(there, batch), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    # The incoming gradient is applied after the reward's backward pass there, before it here: rounding differs.
    weights = torch.linspace(-1, 2, len(batch), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ours, theirs = (scored(reward, batch, weights)[1] for reward in (here, there))
    digits = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(theirs, ours, rtol=digits, atol=digits * float(ours.abs().max()))
    with torch.no_grad():
        assert torch.equal(here(ImageBatch(images=batch)), there(ImageBatch(images=batch)))


def test_prompts_and_metadata_are_passed_on(load: Load, images: Images, scored: Scored) -> None:
    reward = load("Prompted")
    prompts, metadata = ["a fox", "drei Füchse 🦊"], [{"number": 3}, {}]
    scores, _ = scored(reward, images(2), prompts=prompts, metadata=metadata)
    plain, _ = scored(reward, images(2), prompts=["?", "?"])
    assert torch.allclose(scores - plain, torch.tensor([7.0, 12.0]))
    with pytest.raises(PromptError, match="the prompt is empty"):
        reward(ImageBatch(images=images(1), prompts=[""]))
    reward(ImageBatch(images=images(1), prompts=["a fox"]))  # and it continues to work


def test_images_are_not_changed_and_printed_text_is_no_answer(load: Load, images: Images) -> None:
    batch, reward = images(), load("PrintsAndWrites")
    red, green, blue = batch.mean((2, 3)).unbind(1)
    expected = 2 * (red - (green + blue) / 2) + 0.1 * (batch**2).mean((1, 2, 3))
    for _ in range(2):
        given = batch.clone()
        with torch.no_grad():
            torch.testing.assert_close(reward(ImageBatch(images=given)), expected)
        assert torch.equal(given, batch)


def test_a_second_derivative_is_refused(load_once: Load, images: Images) -> None:
    batch = images().requires_grad_()
    scores = load_once("Redness")(ImageBatch(images=batch))
    (gradient,) = torch.autograd.grad((scores**2).sum(), batch, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_prompts_are_checked_there_before_a_model_loads(
    python: Path, file: Path, config_file: Config, train: Train, tmp_path: Path
) -> None:
    path = config_file(
        {"name": f"{file}:Redness", "label": "reads", "options": {"does": "read"}, "isolation": {"python": str(python)}}
    )
    (tmp_path / "prompts.txt").write_text("3 foxes\nan owl\n")
    with pytest.raises(PromptError, match=r'(?s)prompts\.txt:2.*Reward "reads": The prompt "an owl" has no number'):
        train(path)


@jpeg
def test_a_run_with_an_isolated_reward_equals_the_run_without(
    python: Path, config_file: Config, train: Train, tmp_path: Path
) -> None:
    """Weights, metrics of a balanced mix and true measures are all equal."""
    isolation = {"python": os.path.relpath(python, tmp_path)}  # relative to the config
    both: list[Path] = []
    for name, extra in (("here", {}), ("there", {"isolation": isolation})):
        terms = [
            {"name": "jpeg_compressibility", "options": {"quality": 80}, **extra},
            {"name": "jpeg_incompressibility", "label": "large", "weight": 0.3, "options": {"quality": 50}},
        ]
        path = config_file(*terms, mix={"combine": "balanced"})
        both.append(train(path, [f"output={tmp_path / name}"]))
    here, there = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in both)
    timing = ("seconds", "peak_memory", "memory")
    for ours, theirs in zip(here, there, strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }
    for file_name in ("here.safetensors", "there.safetensors"):
        assert any(run.joinpath("lora", file_name).exists() for run in both)
    ours, theirs = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in both)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    evaluations = [json.loads((run / "evaluation.json").read_text())["tuned"] for run in both]
    assert "jpeg_bytes" in evaluations[0]
    assert evaluations[0] == evaluations[1]
    known = json.loads((both[1] / "environment.json").read_text())
    assert known["isolated_rewards"]["jpeg_compressibility"]["distribution"] == "alignprop-jpeg"
    assert known["isolated_rewards"]["jpeg_compressibility"]["python"] == str(python)


def test_the_run_never_imports_the_package_and_evaluates_a_measure(
    python: Path, file: Path, config_file: Config, train: Train
) -> None:
    isolation = {"python": str(python)}
    measure = {"name": f"{file}:Measure", "isolation": isolation}
    trained = {"name": f"{file}:Redness", "isolation": isolation}
    run = train(config_file(trained, evaluation={"rewards": [measure]}))
    assert "measure" in json.loads((run / "evaluation.json").read_text())["tuned"]
    assert "only_there" not in sys.modules
    saved = yaml.safe_load((run / "config.yaml").read_text())["rewards"][0]
    assert saved["options"] == {"gain": 2.0, "does": "", "folder": ""}  # the defaults, which only that environment has
    assert saved["label"] == "redness"
    known = json.loads((run / "environment.json").read_text())
    origin = known["isolated_rewards"]["redness"]
    assert origin["from"]["class"] == "Redness"
    assert len(origin["from"]["sha256"]) == 64
    assert "alignprop-isolation" in json.dumps(known["plugins"] if "plugins" in known else known["versions"])
