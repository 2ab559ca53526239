"""The size model against real files: tables, coefficients, exact count, accuracy, falls; and its gradient."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignprop_jpeg import size_model, tables
from alignprop_jpeg.calibrate import QUALITIES, Accuracy, Fall, crops, scenes, simplified, true_size
from alignprop_jpeg.size_model import jpeg_size


def _decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("jpeg_decoder", Path(__file__).with_name("jpeg_decoder.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["jpeg_decoder"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


decoder = _decoder()


@cache
def photos(size: int) -> Tensor:
    """Crops that calibration has not seen."""
    return crops(size, {64: 3, 128: 2, 256: 1, 512: 1}[size], seed=1)


def saved(image: Tensor, quality: int) -> bytes:
    file = io.BytesIO()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 80, 95])
def test_quantisation_tables_are_the_ones_in_pillows_files(quality: int) -> None:
    tables_in_file = Image.open(io.BytesIO(saved(torch.rand(3, 16, 16), quality))).quantization
    assert list(tables.quantisation_table(tables.LUMA_BASE, quality)) == list(tables_in_file[0])
    assert list(tables.quantisation_table(tables.CHROMA_BASE, quality)) == list(tables_in_file[1])


def test_huffman_code_lengths_zigzag_and_header_are_those_of_a_real_file() -> None:
    data = saved(torch.rand(3, 16, 16), 80)
    found = decoder.decode(data)
    assert found.code_lengths == {
        0x00: tables.DC_CODES[0], 0x01: tables.DC_CODES[1], 0x10: tables.AC_CODES[0], 0x11: tables.AC_CODES[1]
    }  # fmt: skip
    assert (
        sum(tables.HEADER_BYTES if isinstance(tables.HEADER_BYTES, tuple) else (tables.HEADER_BYTES,)) == found.header
    )
    luma = tables.quantisation_table(tables.LUMA_BASE, 80)
    assert [luma[i] for i in tables.zigzag()] == found.quantisation[0]


@pytest.mark.parametrize("quality", [50, 95])
def test_coefficients_round_to_those_in_the_file(quality: int) -> None:
    image = photos(64)[5]
    found = decoder.decode(saved(image, quality))
    red, green, blue = (image * 255).double()
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    part = size_model._component(0, quality, size_model.ZERO_MARGIN, torch.float64, torch.device("cpu"))
    blocks = size_model._blocks((luma - 128)[None])
    coefficients = (part.transform @ blocks.flatten(1)).reshape(64, *blocks.shape[2:])
    true = torch.tensor([[found.blocks[0][r, c] for c in range(8)] for r in range(8)]).permute(2, 0, 1)
    # libjpeg's integer DCT is off by up to a tenth of a step; nothing else may differ.
    assert (coefficients - true).abs().max() < 0.62
    assert (coefficients.round() == true).double().mean() > 0.97


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [1, 50, 95])
@pytest.mark.parametrize("shape", [(8, 8), (37, 90), (121, 64), (64, 120)])
def test_with_true_rounding_the_model_is_libjpegs_count(shape: tuple[int, int], quality: int, subsampling: str) -> None:
    from alignprop_core.reward import ImageBatch
    from alignprop_jpeg.config import BytesConfig
    from alignprop_jpeg.reward import JpegBytes

    images = photos(128)[::3, :, : shape[0], : shape[1]]
    true = JpegBytes(BytesConfig(quality=quality, subsampling=subsampling)).score(ImageBatch(images=images))
    counted = jpeg_size(images, quality, subsampling, exact=True)
    # What is left is byte stuffing, which depends on chance, and ties in libjpeg's integer arithmetic.
    assert ((counted - true).abs() / true).max() < 0.015
    assert ((counted - true) / true).mean().abs() < 0.006


@pytest.mark.parametrize("quality", QUALITIES)
def test_sizes_of_unseen_photographs_are_right_within_six_percent(quality: int) -> None:
    pairs = [(jpeg_size(photos(s), quality), true_size(photos(s), quality)) for s in (64, 128, 256, 512)]
    for pair in [*pairs, tuple(torch.cat(column) for column in zip(*pairs, strict=True))]:
        found = Accuracy.of(*pair)
        assert found.correlation >= 0.99
        assert found.median_error <= 0.06
        assert found.largest_error <= 0.12


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_fall_in_size_is_predicted_within_ten_percent(size: int, quality: int) -> None:
    images = photos(size)[::2]
    before = jpeg_size(images, quality), true_size(images, quality)
    for change, simple in simplified(images).items():
        fall = Fall.of(before, (jpeg_size(simple, quality), true_size(simple, quality)))
        assert 0.9 <= fall.ratio <= 1.1, change
        assert fall.median_error <= 0.1, change


@pytest.mark.parametrize("quality", QUALITIES)
def test_sizes_and_falls_are_right_on_starter_scenes(quality: int) -> None:
    pytest.importorskip("alignprop_starter.scenes", reason="alignprop-starter is not installed")
    images = scenes(24, seed=11)
    assert images is not None
    before = jpeg_size(images, quality), true_size(images, quality)
    found = Accuracy.of(*before)
    assert found.correlation >= 0.99
    assert found.median_error <= 0.06
    for change, simple in simplified(images).items():
        fall = Fall.of(before, (jpeg_size(simple, quality), true_size(simple, quality)))
        assert 0.9 <= fall.ratio <= 1.1, change


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_gradient_is_the_derivative(subsampling: str) -> None:
    images = torch.rand(2, 3, 19, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jpeg_size(x, 80, subsampling), (images,), fast_mode=True)
    smooth = torch.linspace(0.3, 0.6, 16, dtype=torch.float64).expand(1, 3, 16, 16).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jpeg_size(x, 95, subsampling), (smooth,), fast_mode=True)


def test_gradient_is_finite_and_reaches_every_pixel_saturated_or_not() -> None:
    images = (photos(64) * 3 - 1).clamp(0, 1).requires_grad_()
    saturated = (images == 0) | (images == 1)
    assert saturated.float().mean() > 0.2
    (gradient,) = torch.autograd.grad(jpeg_size(images).sum(), images)
    assert gradient.isfinite().all()
    # In a block that is flat all through, and whose neighbours are as flat, there is nothing left to save.
    busy = (images.detach().unfold(2, 16, 16).unfold(3, 16, 16).std((1, 4, 5)) > 0.02).repeat_interleave(16, 1)
    busy = busy.repeat_interleave(16, 2)[:, None].expand_as(images)
    assert (gradient[busy & saturated] != 0).all()
    assert (gradient[busy] != 0).all()


def test_small_coefficients_are_still_pushed_down() -> None:
    ramp = torch.linspace(-1, 1, 8)
    for amplitude in (0.25, 0.5, 1.0, 2.0, 4.0):  # grey levels; at quality 50 a step is more than ten of them
        scale = torch.tensor(amplitude, requires_grad=True)
        images = (0.5 + scale / 255 * ramp.repeat(2)).expand(1, 3, 16, 16)
        (slope,) = torch.autograd.grad(jpeg_size(images, 50).sum(), scale)
        assert slope > 1e-4


def test_a_piece_at_a_time_gives_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(64)[:4].double().requires_grad_()
    pieces = jpeg_size(images)
    (gradient,) = torch.autograd.grad(pieces.sum(), images)
    monkeypatch.setitem(size_model._BLOCKS_AT_ONCE, "cpu", 10**6)
    whole = jpeg_size(images)
    assert torch.allclose(whole, pieces, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(whole.sum(), images)[0], gradient, rtol=1e-9, atol=1e-12)


def test_constants_made_in_inference_mode_serve_a_later_backward() -> None:
    size_model._component.cache_clear()
    size_model._scan_order.cache_clear()
    with torch.inference_mode():
        jpeg_size(torch.rand(1, 3, 32, 32), 77)
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    jpeg_size(images, 77).sum().backward()
    assert images.grad is not None
    assert np.isfinite(images.grad.numpy()).all()
