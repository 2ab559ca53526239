"""The rewards through the registry, as a run config uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.errors import ConfigError, PromptError
from alignprop_core.evaluation.measures import measure_entries
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_counting.soft_count import soft_count
from alignprop_counting.testing import random_images

PROMPTS = ("three foxes", "a cat and two birds", "no dogs and 4 traffic lights")
GRADED = ("object_count", "object_presence", "object_absence")
MEASURES = ("hard_count", "hard_presence", "hard_absence")


def load(reward: str, detector: str, weights: dict[str, Path], **options: Any) -> Any:
    return default_registry().load_reward(reward, {"detector": detector, "weights": str(weights[detector]), **options})


def batch(images: Tensor, prompts: tuple[str, ...] = PROMPTS, **more: Any) -> ImageBatch:
    return ImageBatch(images=images, prompts=prompts, **more)


def wanting(reward: str) -> dict[str, Any]:
    """Options with which every reward has a request in each of `PROMPTS`."""
    return {"objects": ["fox", "bird"]} if reward.endswith("absence") else {}


def test_object_count_is_minus_the_mean_huber_distance(name: str, weights: dict[str, Path]) -> None:
    reward = load("object_count", name, weights, threshold=0.1, sharpness=3.0, delta=0.7)
    images = random_images(3).float()
    with torch.no_grad():
        found = reward.detector(images)
        scores = reward(batch(images))
    expected = []
    for sample, requests in enumerate([{2: 3}, {0: 1, 3: 2}, {1: 0, 4: 4}]):
        distances = []
        for class_id, number in requests.items():
            count = soft_count(
                found.log_odds[sample, :, class_id][None],
                found.boxes[sample][None],
                found.one_to_one,
                threshold=0.1,
                sharpness=3.0,
                overlap=0.5,
            )
            off = abs(float(count) - number)
            distances.append(off**2 / 1.4 if off < 0.7 else off - 0.35)
        expected.append(-sum(distances) / len(distances))
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def test_gradient_ascent_brings_the_count_to_the_requested_number(weights: dict[str, Path]) -> None:
    reward = load("object_count", "rtdetr", weights, source="config", objects="cat", number=3, threshold=0.2)
    images = random_images(1).float()
    samples, kinds = torch.tensor([0]), torch.tensor([0])
    before = float(reward.counts(reward.detector(images), samples, kinds))
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=0.002)
    after = before
    for step in range(200):  # how many it takes depends on the random network, and that on transformers' version
        (pixels.grad,) = torch.autograd.grad(-reward(batch(pixels, ("",))).sum(), pixels)
        optimizer.step()
        if step % 20 == 19:
            after = float(reward.counts(reward.detector(pixels.detach()), samples, kinds))
            if abs(after - 3) < 0.5 * abs(before - 3):
                break
    assert abs(after - 3) < 0.5 * abs(before - 3)


def test_presence_and_absence_are_the_log_probability_of_the_best_location(name: str, weights: dict[str, Path]) -> None:
    images = random_images(2).float()
    there = load("object_presence", name, weights)
    gone = load("object_absence", name, weights)
    given = batch(images, ("a fox and two birds", "no cats, no dogs"))
    with torch.no_grad():
        best = there.detector(images).log_odds.amax(1)
        assert there(given[:1]).item() == pytest.approx(float(F.logsigmoid(best[0, [2, 3]]).mean()), rel=1e-5)
        assert gone(given[1:]).item() == pytest.approx(float(F.logsigmoid(-best[1, [0, 1]]).mean()), rel=1e-5)
    with pytest.raises(PromptError, match="names no object that must be present"):
        there(given[1:])
    with pytest.raises(PromptError, match=r'names no object that must be absent \("no dogs"\)'):
        gone(given[:1])
    fixed = load("object_absence", name, weights, source="config", objects="dog")
    assert fixed(given).shape == (2,)


def test_hard_measures_count_the_detections(name: str, weights: dict[str, Path]) -> None:
    images = random_images(4, seed=5).float()
    given = batch(images, ("",) * 4)
    look = load("hard_count", name, weights).detector
    with torch.no_grad():
        predictions = look(images)
        # A threshold that tells the images apart: half of all locations are above it.
        threshold = float(predictions.probabilities.amax(-1).median())
        found = look.detect(predictions, threshold)
    tallies = torch.stack([(found.classes == kind).sum(1) for kind in range(5)])
    first, second = tallies.double().std(1).argsort(descending=True)[:2].tolist()
    numbers, others = tallies[first].tolist(), tallies[second].tolist()
    assert len(set(numbers)) > 1
    both = [look.names[first], look.names[second]]
    options = {"source": "config", "threshold": threshold}
    count = load("hard_count", name, weights, **options, objects=both[0], number=1, measure="count")
    assert count(given).tolist() == numbers
    error = load("hard_count", name, weights, **options, objects=both, number=[2, 0], measure="error")
    expected = [-(abs(n - 2) + d) / 2 for n, d in zip(numbers, others, strict=True)]
    assert error(given).tolist() == pytest.approx(expected)
    exact = load("hard_count", name, weights, **options, objects=both, number=[numbers[0], others[0]])
    right = [n == numbers[0] and d == others[0] for n, d in zip(numbers, others, strict=True)]
    assert exact(given).tolist() == [float(r) for r in right]
    there = load("hard_presence", name, weights, **options, objects=both)
    assert there(given).tolist() == [((n > 0) + (d > 0)) / 2 for n, d in zip(numbers, others, strict=True)]
    gone = load("hard_absence", name, weights, **options, objects=both[0])
    assert gone(given).tolist() == [float(n == 0) for n in numbers]


def test_a_measure_inherits_the_options_of_its_reward(weights: dict[str, Path]) -> None:
    options = {"detector": "rtdetr", "weights": str(weights["rtdetr"]), "threshold": 0.3, "sharpness": 4.0}
    entry = RewardTerm(name="object_count", label="object_count", options=options)
    (measure,) = measure_entries([entry], default_registry())
    assert measure.name == "hard_count"
    assert measure.options == {key: value for key, value in options.items() if key != "sharpness"}
    reward = default_registry().load_reward(measure.name, measure.options)
    assert set(reward(batch(random_images(3).float())).tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("reward_name", [*GRADED, *MEASURES])
def test_the_contract_of_rewards(reward_name: str, name: str, weights: dict[str, Path]) -> None:
    reward = load(
        reward_name, name, weights, **wanting(reward_name), **({"number": 1} if "count" in reward_name else {})
    )
    spec = default_registry().reward(reward_name).spec
    images = random_images(3).float()
    before = images.clone()
    with torch.no_grad():
        together = reward(batch(images))
        assert together.dtype == torch.float32
        assert together.shape == (3,)
        assert torch.equal(images, before)
        for i in range(3):
            alone = reward(batch(images)[i : i + 1])
            assert torch.allclose(alone, together[i : i + 1], atol=1e-4)
        assert reward(batch(images.double())).dtype == torch.float64
        for kind in (torch.bfloat16, torch.float16):
            assert reward(batch(images.to(kind))).dtype == torch.float32
        for height, width in ((32, 32), (32, 200), (90, 33)):
            assert reward(batch(random_images(1, height, width).float(), PROMPTS[1:2])).isfinite().all()
        assert reward(batch(random_images(64, 32, 32).float(), PROMPTS[:1] * 64)).shape == (64,)
    leaf = images.clone().requires_grad_()
    scores = reward(batch(leaf))
    assert scores.requires_grad == spec.differentiable
    if spec.differentiable:
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        assert gradient.isfinite().all()
        assert (gradient != 0).any(1).float().mean() > 0.9


@pytest.mark.parametrize("reward_name", [*GRADED, *MEASURES])
def test_an_empty_batch_has_no_scores(reward_name: str, weights: dict[str, Path]) -> None:
    reward = load(reward_name, "rtdetr", weights)
    for kind in (torch.float32, torch.float64):
        assert reward(batch(torch.zeros(0, 3, 32, 32, dtype=kind), ())).dtype == kind
    assert reward(batch(torch.zeros(0, 3, 32, 32), ())).shape == (0,)


def test_a_call_in_inference_mode_does_not_break_a_later_gradient(name: str, weights: dict[str, Path]) -> None:
    reward = load("object_count", name, weights)
    with torch.inference_mode():
        assert reward(batch(random_images(3, 44, 52).float())).shape == (3,)
    leaf = random_images(3, 44, 52).float().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(batch(leaf)).sum(), leaf)
    assert gradient.isfinite().all()


def test_under_autocast_scores_stay_float32(name: str, weights: dict[str, Path]) -> None:
    reward = load("object_count", name, weights)
    images = random_images(3).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = reward(batch(images))
    with torch.no_grad():
        assert torch.equal(inside, reward(batch(images)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": "foxe"}, 'has no class "foxe".*"fox"'),
        ({"objects": []}, "objects is an empty list"),
        ({"objects": ["cat", "dog"], "number": [1, 2, 3]}, "2 objects but 3 numbers"),
        ({"number": [1, 2]}, "objects must be a list of the same length"),
        ({"source": "config"}, "needs objects"),
        ({"source": "config", "objects": "cat"}, "needs number"),
        ({"number": -1}, "number"),
        ({"threshold": 0}, "threshold"),
        ({"image_size": 16}, "image_size"),
        ({"treshold": 0.3}, "threshold"),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict[str, Any], message: str, weights: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        load("object_count", "rtdetr", weights, **options)


def test_prompts_without_clear_requests_are_named(weights: dict[str, Path]) -> None:
    reward = load("object_count", "rtdetr", weights)
    for prompt, message in (
        ("", 'The prompt "" names no class'),
        ("foxes", "does not say clearly how many"),
        ("three foks", "names no class"),
        ("word " * 500, r'"word .*\.\.\." names no class'),
    ):
        with pytest.raises(PromptError, match=message):
            reward(batch(random_images(1).float(), (prompt,)))
        with pytest.raises(PromptError, match=message):
            reward.check_prompt(prompt, {})  # a run checks prompts before its model loads
    reward.check_prompt("three foxes", {})
    load("hard_count", "rtdetr", weights, measure="count").check_prompt("foxes", {})
    assert reward(batch(random_images(1).float(), ("three foxes " + "and grass " * 500,))).shape == (1,)


def test_hook_module_and_options_import_no_torch() -> None:
    code = (
        "import sys, alignprop_counting, alignprop_counting.config, alignprop_counting.requests\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
