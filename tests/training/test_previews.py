"""Previews: fixed prompts and seeds before the first step, along the way, and after the last step."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from alignprop_core.config.sections import RunConfig
from alignprop_core.evaluation.sheet import grid
from alignprop_core.images import to_pil
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import registry
from tests.support.toy_runs import Interrupt, changed, toy_data


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    sampling = {"steps": 1, "guidance_scale": 2.0}
    base = toy_data(tiny_model, tmp_path, sampling=sampling, previews={"prompts": ["a fox"]})
    return lambda **overrides: changed(base, {"training__steps": 3} | overrides, registry())


def previews(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output) / "images").glob("step-*.png"))


def shown(config: RunConfig, name: str) -> Image.Image:
    with Image.open(Path(config.output) / "images" / name) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [0, 3]), (2, [0, 2, 3]), (3, [0, 3]), (1, [0, 1, 2, 3]), (50, [0, 3])]
)
def test_previews_are_generated_before_the_first_and_after_the_last_step(
    make: Callable[..., RunConfig], every: int | None, steps: list[int]
) -> None:
    config = make(previews__every=every)
    Trainer(config, registry=registry()).train()
    assert previews(config) == [f"step-{step:06d}.png" for step in steps]


def test_the_lora_file_shows_the_first_preview_after_the_last_step(make: Callable[..., RunConfig]) -> None:
    trainer = Trainer(make(), registry=registry())
    trainer.train()
    file = Path(trainer.config.output) / "lora" / f"{Path(trainer.config.output).name}.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    kind, _, data = header["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    noise = trainer.sampler.noise(["a fox"], seed=trainer.config.previews.seeds[0], step=0, indices=[0])
    with torch.no_grad():
        expected = to_pil(trainer.sampler.decode(trainer.sampler.sample(["a fox"], noise).latents)[0])
    assert header["modelspec.resolution"] == f"{expected.width}x{expected.height}"
    jpeg = BytesIO()
    expected.save(jpeg, "JPEG", quality=85)
    with Image.open(BytesIO(b64decode(data))) as found, Image.open(jpeg) as same:
        assert np.abs(np.asarray(found, float) - np.asarray(same, float)).mean() < 1
    assert header["modelspec.usage_hint"].startswith("Trained with 1 denoising steps and a guidance scale of 2.")


def test_no_preview_prompts_generate_no_previews(make: Callable[..., RunConfig]) -> None:
    config = make(previews__prompts=[], previews__every=1)
    trainer = Trainer(config, registry=registry())

    def generate(*_: object) -> None:
        assert torch.is_grad_enabled(), "a preview was generated"

    trainer.pipeline.vae.decoder.register_forward_pre_hook(generate)
    trainer.train()
    assert previews(config) == []


def test_previews_are_the_images_of_their_prompts_and_seeds(make: Callable[..., RunConfig]) -> None:
    prompts, negative = ["a fox", "two owls"], "blurry"
    config = make(previews={"prompts": prompts, "seeds": [3, 8], "negative_prompt": negative})
    trainer = Trainer(config, registry=registry())
    trainer.train()
    captions, images = [], []
    for seed in (3, 8):
        with torch.no_grad():
            noise = trainer.sampler.noise(prompts, seed=seed, step=0)
            out = trainer.sampler.sample(prompts, noise, negative_prompt=negative)
            images += list(trainer.sampler.decode(out.latents))
        captions += [f"{prompt} (seed {seed})" for prompt in prompts]
    expected, found = torch_of(grid(images, captions)), torch_of(shown(config, "step-000003.png"))
    # Images are rounded to 8 bits, and a batch of one may differ from a batch of two by rounding.
    assert (found - expected).abs().max() <= 1


def torch_of(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_a_preview_changes_with_seed_negative_prompt_and_training(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def image(name: str, step: int = 0, **options: object) -> Image.Image:
        config = make(**options, training__steps=step, output=str(tmp_path / name))
        Trainer(config, registry=registry()).train()
        return shown(config, f"step-{step:06d}.png")

    usual = image("usual")
    assert image("again") == usual
    assert image("seed", previews__seeds=[43]) != usual
    assert image("negative", previews__negative_prompt="red") != usual
    assert image("trained", step=2) != usual


def test_the_default_prompts_are_the_first_four_held_out_ones(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text("a hill\ntwo owls\na boat\na fox\na cat\n")
    first = ["a hill", "two owls", "a boat", "a fox"]
    for name, prompts in (("default", None), ("named", first)):
        options = {"prompts__heldout": str(tmp_path / "heldout.txt"), "previews__prompts": prompts}
        Trainer(make(**options, training__steps=0, output=str(tmp_path / name)), registry=registry()).train()
    one, two = (tmp_path / name / "images" / "step-000000.png" for name in ("default", "named"))
    assert one.read_bytes() == two.read_bytes()


def test_a_resumed_run_repeats_no_preview_of_the_start(make: Callable[..., RunConfig]) -> None:
    config = make(previews__every=None)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, registry=registry(), callbacks=[Interrupt(1)]).train()
    first = Path(config.output) / "images" / "step-000000.png"
    first.unlink()
    Trainer(config, registry=registry(), resume=Path(config.output)).train()
    assert previews(config) == ["step-000003.png"]
