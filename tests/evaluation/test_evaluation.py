"""Evaluation: correct intervals, the same noise for every variant, image sheets, diversity and drift."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from rich.progress import Progress
from torch import Tensor

from alignprop_core.config.model import SamplingConfig
from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import ConfigError, RewardError
from alignprop_core.evaluation.diversity import BUILT_IN, built_in_features, diversity_by_prompt, encoder_of
from alignprop_core.evaluation.drift import Drift, chosen_steps
from alignprop_core.evaluation.evaluator import Evaluator
from alignprop_core.evaluation.sheet import before_after, grid
from alignprop_core.evaluation.statistics import paired, summary, t_quantile
from alignprop_core.lora import adapters as lora
from alignprop_core.mix.offload import Offload
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from tests.support.toy_rewards import Redness


def test_t_quantiles_match_the_published_table() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 100: 1.984, 1000: 1.962}
    for degrees, value in table.items():
        assert t_quantile(0.975, degrees) == pytest.approx(value, rel=0.01)


def test_paired_interval_has_its_nominal_coverage() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        base = random.normal(0, 5, 8)
        low, high = paired(list(base), list(base + random.normal(1.0, 1.0, 8)))["interval"]
        hits += low <= 1.0 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_summary_and_single_pair() -> None:
    assert summary([1.0, 3.0]) == {"n": 2, "mean": 2.0, "std": math.sqrt(2)}
    assert paired([1.0], [4.0]) == {"difference": 3.0, "interval": None}


def test_intervals_are_clustered_by_prompt() -> None:
    """Six prompts of 16 images that differ by prompt: as wide as over the six means, not as over 96 images."""
    means = [-2182.5, -1554.0, -1711.0, -2290.5, -1633.5, -1866.5]
    within = [-32.0, 32.0] * 8
    tuned = [mean + offset for mean in means for offset in within]
    clustered = paired([0.0] * 96, tuned, 16)
    assert clustered == paired([0.0] * 6, means)
    assert clustered["difference"] == pytest.approx(np.mean(tuned))
    half = 2.5706 * np.std(means, ddof=1) / math.sqrt(6)
    low, high = clustered["interval"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    naive = paired([0.0] * 96, tuned)["interval"]
    assert high - low > 3 * (naive[1] - naive[0])


def test_clustered_intervals_have_their_nominal_coverage_with_images_that_resemble_their_prompt() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        effects = np.repeat(random.normal(1.0, 1.0, 8), 4) + random.normal(0, 0.5, 32)
        low, high = paired([0.0] * 32, list(effects), 4)["interval"]
        hits += low <= 1.0 <= high
    assert hits / 1000 == pytest.approx(0.95, abs=0.02)


@pytest.fixture
def sampler(tiny_sd: Callable[..., Any]) -> Sampler:
    pipe = tiny_sd()
    lora.attach(pipe.unet, rank=4)
    with torch.no_grad():
        for parameter in lora.parameters(pipe.unet)[1::2]:
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return Sampler(pipe, SamplingConfig(steps=2, guidance_scale=2.0))


PROMPTS = PromptSet("mine", ("a fox", "two owls", "c"), ({}, {}, {}))


def test_variants_see_the_same_noise_and_batches_change_nothing(sampler: Sampler) -> None:
    term = Term("redness", Redness())
    results = []
    for batch_size in (1, 4, 6):
        config = EvaluationConfig(images_per_prompt=2, batch_size=batch_size)
        variants = {
            "base": lambda: lora.disabled(sampler.family.denoiser),
            "same": lambda: lora.disabled(sampler.family.denoiser),
        }
        result = Evaluator(sampler, [term], PROMPTS, config).evaluate(variants, drift=False)
        base, same = (result.variants[name].scores["redness"] for name in ("base", "same"))
        assert base == same
        assert len(base) == 6
        assert len(set(base)) == 6, "every image has noise of its own"
        results.append(base)
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert results[0] == pytest.approx(results[2], abs=1e-5)


def test_comparison_pairs_every_variant_with_the_first(sampler: Sampler) -> None:
    from contextlib import nullcontext

    config = EvaluationConfig(images_per_prompt=3)
    variants = {"base": lambda: lora.disabled(sampler.family.denoiser), "tuned": nullcontext}
    bar = Progress(disable=True)
    with patch.object(bar, "advance") as advance:
        result = Evaluator(sampler, [Term("redness", Redness())], PROMPTS, config).evaluate(variants, bar, drift=False)
    data = json.loads(json.dumps(result.as_json()))
    assert (data["images"], data["prompt_count"]) == (9, 3)
    base, found = (result.variants[name].scores["redness"] for name in ("base", "tuned"))
    assert data["tuned"]["redness"] | paired(base, found, 3) == data["tuned"]["redness"]
    assert sum(call.args[1] for call in advance.call_args_list) == 18
    tuned = data["tuned"]["redness"]
    assert tuned["difference"] == pytest.approx(tuned["mean"] - data["base"]["redness"]["mean"])
    low, high = tuned["interval"]
    assert low < tuned["difference"] < high
    sheet = before_after(result)
    assert sheet.width > 3 * 2 * 192


def test_grid_shortens_long_captions_and_contains_every_image() -> None:
    pictures = [torch.full((3, 32, 32), shade) for shade in (0.0, 0.5, 1.0, 0.25, 0.75)]
    sheet = np.asarray(grid(pictures, ["a very long prompt " * 9] * 5))
    for shade in (0, 128, 64, 191):
        assert (sheet == shade).all(-1).any()


def test_run_can_be_evaluated_again_from_its_folder(tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("alignprop_jpeg")
    from alignprop_core.cli import run

    tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{base: model}}
prompts: {{train: prompts.txt, heldout: prompts.txt}}
sampling: {{steps: 2, guidance_scale: 2.0}}
rewards: [{{name: jpeg_compressibility, options: {{quality: 80}}}}]
training: {{steps: 2, batch_size: 2, device: cpu}}
previews: {{every: null}}
evaluation: {{images_per_prompt: 2}}
output: {tmp_path / "run"}
"""
    )
    assert run(["train", str(tmp_path / "run.yaml")]) == 0
    first = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert run(["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "again"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    for name in ("base", "tuned"):
        for label in ("jpeg_compressibility", "jpeg_bytes"):
            assert again[name][label]["mean"] == pytest.approx(first[name][label]["mean"], rel=1e-4)
    # In its own folder: what only the training knew stays, and the page is drawn again.
    page = tmp_path / "run" / "report.html"
    before = page.read_text()
    assert run(["evaluate", str(tmp_path / "run"), "--images-per-prompt", "3", "--device", "cpu"]) == 0
    fresh = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (fresh["step"], fresh["stopped"]) == (first["step"], first["stopped"]) == (2, None)
    assert fresh["images"] == 6
    assert page.read_text() != before
    true_kilobytes = first["base"]["jpeg_bytes"]["mean"] / 1000
    assert true_kilobytes == pytest.approx(-first["base"]["jpeg_compressibility"]["mean"], rel=0.25)
    pictures = tmp_path / "pictures"
    arguments = ["--model", str(tmp_path / "model"), "--lora", str(tmp_path / "run"), "--steps", "2"]
    assert run(["sample", "a fox", *arguments, "--count", "2", "--output", str(pictures)]) == 0
    assert len(list(pictures.glob("*.png"))) == 2
    assert run(["score", *map(str, pictures.glob("*.png")), "--reward", "jpeg_bytes", "--json"]) == 0


# -- diversity --------------------------------------------------------------------------------------------------------


def test_built_in_features_are_distances_between_zero_and_one() -> None:
    random = torch.rand(6, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.zeros(1, 3, 48, 64), torch.ones(1, 3, 48, 64), random])
    features = built_in_features(images)
    assert features.shape == (8, 280)
    assert features.dtype == torch.float32
    distances = torch.cdist(features, features)
    assert distances.max() <= 1
    assert torch.equal(built_in_features(images[:1]), features[:1]), "an image's features do not depend on the batch"
    # Black and white: the whole layout and seven of eight cumulative bins differ; there are no edges.
    assert float(distances[0, 1]) == pytest.approx(math.sqrt((1 + 7 / 8) / 3), abs=1e-5)
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    near = (built_in_features(larger) - features).norm(dim=1)
    assert near[:2].max() < 1e-5


def test_built_in_features_depend_on_layout_color_and_edges() -> None:
    def square(row: int, column: int, color: tuple[float, float, float]) -> Tensor:
        image = torch.full((3, 64, 64), 0.5)
        image[:, row : row + 24, column : column + 24] = torch.tensor(color).view(3, 1, 1)
        return image

    here, there = square(4, 4, (1, 0, 0)), square(36, 36, (1, 0, 0))
    green, striped = square(4, 4, (0, 1, 0)), square(4, 4, (1, 0, 0))
    striped[:, 4:28:2, 4:28] = 0.5
    features = built_in_features(torch.stack([here, there, green, striped]))
    assert (features[1:] - features[0]).norm(dim=1).min() > 0.03
    nudged = built_in_features(square(5, 4, (1, 0, 0))[None])
    assert float((nudged - features[0]).norm()) < 0.03


def test_diversity_is_the_mean_distance_within_each_prompt() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [0, 0], [9, 9], [9, 9], [9, 9]])
    assert diversity_by_prompt(features, 3) == pytest.approx([(5 + 0 + 5) / 3, 0])


def test_a_term_with_image_features_can_be_the_encoder() -> None:
    class Seeing(Redness):
        def image_features(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    encoder = encoder_of("seeing", [Term("other", Redness()), Term("seeing", Seeing())])
    assert encoder.name == "seeing"
    features = encoder.features(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    with pytest.raises(ConfigError, match="has no image features"):
        encoder_of("other", [Term("other", Redness())])
    assert encoder_of(None, []) is BUILT_IN


def test_an_offloaded_encoder_is_on_its_device_during_the_call() -> None:
    there: list[bool] = []

    class Watched(Offload):
        """Offloads to the CPU itself, for want of another device here, and says when the weights are there."""

        def __enter__(self) -> Offload:
            there.append(True)
            return super().__enter__()

        def __exit__(self, *reason: Any) -> None:
            super().__exit__(*reason)
            there.append(False)

    class Seeing(Redness):
        def image_features(self, images: Tensor) -> Tensor:
            assert there == [True]
            return images.mean((2, 3))

    reward = Seeing()
    term = Term("seeing", reward, offload=Watched(reward.freeze(), torch.device("cpu")))
    encoder_of("seeing", [term]).features(torch.rand(2, 3, 32, 32))
    assert there == [True, False]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.zeros(3), r"returned shape \(3,\) from image_features for 2 images; .* shape \(2, D\)"),
        (torch.zeros(1, 3), r"returned shape \(1, 3\)"),
        ([0.0, 1.0], "returned list"),
        (None, "raised ValueError: no features today"),
    ],
)
def test_errors_for_wrong_image_features_name_the_term(found: object, words: str) -> None:
    class Seeing(Redness):
        def image_features(self, images: Tensor) -> object:
            if found is None:
                raise ValueError("no features today")
            return found

    encoder = encoder_of("seeing", [Term("seeing", Seeing())])
    with pytest.raises(RewardError, match=f'Reward "seeing" {words}'):
        encoder.features(torch.rand(2, 3, 32, 32))


# -- drift ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m"])
def test_drift_is_the_relative_change_of_the_guided_prediction(tiny_sd: Callable[..., Any], scheduler: str) -> None:
    pipe = tiny_sd()
    lora.attach(pipe.unet, rank=4)
    with torch.no_grad():
        for parameter in lora.parameters(pipe.unet)[1::2]:
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    sampler = Sampler(pipe, SamplingConfig(steps=6, guidance_scale=2.0, scheduler=scheduler))

    def base() -> Any:
        return lora.disabled(pipe.unet)

    prompts = ["a fox", "two owls", "c"]
    drift = Drift(sampler, prompts, base, seed=9, batch_size=2)
    moved, whole = 0.0, 0.0
    with base():
        noise = sampler.noise(PROMPTS, seed=9, step=0)
        latents, state = sampler.scheduler.initial_scale * noise.initial, sampler.scheduler.initial_state
        inputs = []
        for i in range(6):
            prediction = sampler.predict(latents, i, prompts)
            if i in (0, 2, 3, 5):
                inputs.append((i, latents, prediction))
            latents, state = sampler.scheduler.step(latents, prediction, i, state, None)
    assert drift.steps == (0, 2, 3, 5)
    torch.testing.assert_close(drift._inputs[0][2], inputs[0][1][:2])
    for i, seen, prediction in inputs:
        moved += float((sampler.predict(seen, i, prompts) - prediction).square().sum())
        whole += float(prediction.square().sum())
    assert drift.measure() == pytest.approx(math.sqrt(moved / whole), rel=1e-4)
    with base():
        assert drift.measure() == pytest.approx(0, abs=1e-6)


def test_drift_steps_are_the_middle_of_each_quarter() -> None:
    assert chosen_steps(1) == (0,)
    assert chosen_steps(3) == (0, 1, 2)
    assert chosen_steps(12) == (1, 4, 7, 10)
    assert chosen_steps(50) == (6, 18, 31, 43)


def test_comparison_reports_diversity_and_drift_of_every_variant(sampler: Sampler) -> None:
    from contextlib import nullcontext

    def base() -> Any:
        return lora.disabled(sampler.family.denoiser)

    drift = Drift(sampler, PROMPTS.prompts, base, seed=1)
    config = EvaluationConfig(images_per_prompt=3)
    variants = {"base": base, "tuned": nullcontext}
    term = Term("redness", Redness())
    data = Evaluator(sampler, [term], PROMPTS, config).evaluate(variants, drift=drift).as_json()
    assert data["drift"]["base"] == pytest.approx(0, abs=1e-6)
    assert data["drift"]["tuned"] > 0.01
    assert data["diversity"]["encoder"] == "layout, color and edges"
    tuned = data["diversity"]["tuned"]
    assert tuned["n"] == 3
    assert tuned["difference"] == pytest.approx(tuned["mean"] - data["diversity"]["base"]["mean"])
    single = Evaluator(sampler, [term], PROMPTS, EvaluationConfig(images_per_prompt=1)).evaluate(variants, drift=False)
    assert "diversity" not in single.as_json(), "one picture of a prompt has no neighbour"
