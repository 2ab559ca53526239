"""The rewards: specs without torch, bounded options, independent scores, and true bytes that follow the gradient."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from jpeg_accuracy import crops, true_size
from pydantic import ValidationError

import alignprop_jpeg
from alignprop_core.reward import ImageBatch, check_scores
from alignprop_jpeg.config import BytesConfig, CompressibilityConfig, IncompressibilityConfig, JpegConfig
from alignprop_jpeg.reward import JpegBytes, JpegCompressibility, JpegIncompressibility


def test_the_entry_point_is_the_hook_module() -> None:
    assert "alignprop_jpeg" in {point.value for point in entry_points(group="alignprop")}


def test_specs_and_options_load_without_torch() -> None:
    code = (
        "import sys, alignprop_jpeg, alignprop_jpeg.config\n"
        "specs = list(alignprop_jpeg.alignprop_register_rewards())\n"
        "print(','.join(s.name for s in specs), 'torch' in sys.modules, 'PIL' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["jpeg_compressibility,jpeg_incompressibility,jpeg_bytes", "False", "False"]


def test_specs_name_the_classes_and_the_true_measure() -> None:
    specs = {spec.name: spec for spec in alignprop_jpeg.alignprop_register_rewards()}
    rewards = {
        "jpeg_compressibility": JpegCompressibility,
        "jpeg_incompressibility": JpegIncompressibility,
        "jpeg_bytes": JpegBytes,
    }
    for name, kind in rewards.items():
        assert specs[name].factory == f"{kind.__module__}:{kind.__name__}"
        assert specs[name].config == f"{kind.Config.__module__}:{kind.Config.__name__}"
    assert (
        specs["jpeg_compressibility"].evaluate_with == specs["jpeg_incompressibility"].evaluate_with == ("jpeg_bytes",)
    )
    assert [specs[name].differentiable for name in rewards] == [True, True, False]


def test_every_option_has_a_description_and_is_shared_with_the_measure() -> None:
    for config in (CompressibilityConfig, IncompressibilityConfig, BytesConfig):
        assert set(config.model_fields) == {"quality", "subsampling"}
        assert all(field.description for field in config.model_fields.values())
        assert config().model_dump() == {"quality": 95, "subsampling": "4:2:0"}


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"quality": 0}, "quality", "greater than or equal to 1"),
        ({"quality": 96}, "quality", "less than or equal to 95"),
        ({"quality": True}, "quality", "valid integer"),
        ({"quality": 80.5}, "quality", "valid integer"),
        ({"quality": "high"}, "quality", "valid integer"),
        ({"subsampling": "4:2:2"}, "subsampling", "'4:2:0' or '4:4:4'"),
        ({"qualty": 80}, "qualty", "not permitted"),
    ],
)
def test_invalid_options_are_refused_with_key_and_reason(options: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JpegConfig.model_validate(options)
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert message in error["msg"]


def test_units_and_signs() -> None:
    batch = ImageBatch(images=crops(64, 1)[:4])
    small, large, true = (
        JpegCompressibility().score(batch),
        JpegIncompressibility().score(batch),
        JpegBytes().score(batch),
    )
    assert torch.equal(small, -large)
    assert torch.allclose(large * 1000, true, rtol=0.1)
    coarse = JpegCompressibility(CompressibilityConfig(quality=50)).score(batch)
    assert (coarse > small).all()
    full_chroma = JpegCompressibility(CompressibilityConfig(subsampling="4:4:4")).score(batch)
    assert (full_chroma <= small).all()


@pytest.mark.parametrize("kind", [JpegCompressibility, JpegIncompressibility, JpegBytes])
def test_the_score_of_a_sample_does_not_depend_on_the_batch(kind: type[JpegCompressibility] | type[JpegBytes]) -> None:
    reward = kind()
    batch = ImageBatch(images=crops(64, 1)[:5].double())
    kept = batch.images.clone()
    together = check_scores("jpeg", reward.score(batch), 5, differentiable=False)
    alone = torch.cat([reward.score(batch[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, rtol=1e-12)
    assert together.dtype == torch.float64
    assert torch.equal(batch.images, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [JpegCompressibility, JpegBytes])
def test_half_precision_images_are_scored_in_float32(
    kind: type[JpegCompressibility] | type[JpegBytes], dtype: torch.dtype
) -> None:
    images = crops(64, 1)[:2].to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = kind().score(ImageBatch(images=images))
    assert scores.dtype == torch.float32
    exact = kind().score(ImageBatch(images=images.detach().float()))
    assert torch.equal(scores.detach(), exact)
    if kind is JpegCompressibility:
        scores.sum().backward()
        assert images.grad is not None
        assert images.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (9, 33), (32, 200), (50, 17)])
def test_any_size_and_aspect_ratio(shape: tuple[int, int]) -> None:
    images = crops(256, 1)[:3, :, : shape[0], : shape[1]].requires_grad_()
    batch = ImageBatch(images=images)
    scores = check_scores("jpeg", JpegIncompressibility().score(batch), 3, differentiable=True)
    assert torch.allclose(scores.detach() * 1000, JpegBytes().score(batch), rtol=0.1)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "sign", "quality"),
    [
        (JpegCompressibility, -1, 50),
        (JpegIncompressibility, 1, 95),
        pytest.param(JpegCompressibility, -1, 95, marks=pytest.mark.slow),
        pytest.param(JpegIncompressibility, 1, 50, marks=pytest.mark.slow),
    ],
)
def test_ten_gradient_steps_move_the_true_bytes_in_the_right_direction(
    kind: type[JpegCompressibility], sign: int, quality: int
) -> None:
    images = crops(128, 1)
    reward = kind(JpegConfig(quality=quality))
    better = images
    for _ in range(10):
        better = better.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(ImageBatch(images=better)).sum(), better)
        step = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        better = (better + step * 0.5 / 255).clamp(0, 1)
    before, after = true_size(images, quality), true_size(better.detach(), quality)
    assert (sign * (after - before) > 0).all()
    change = ((after - before) / before).mean() * sign
    assert change > 0.15  # with a total change below two gray levels (root mean square)
