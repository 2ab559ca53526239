"""The size model against real files: tables, coefficients, exact bit count, accuracy, decreases; and its gradient."""

from __future__ import annotations

import io
from functools import cache

import jpeg_decoder as decoder
import numpy as np
import pytest
import torch
from jpeg_accuracy import QUALITIES, Accuracy, Decrease, crops, reopened, scenes, simplified, true_size
from PIL import Image
from torch import Tensor

from alignprop_jpeg import size_model, tables
from alignprop_jpeg.size_model import jpeg_size


@cache
def photos(size: int) -> Tensor:
    """Return crops that calibration did not use."""
    return crops(size, {64: 3, 128: 2, 256: 1, 512: 1}[size], seed=1)


def saved(image: Tensor, quality: int) -> bytes:
    file = io.BytesIO()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 80, 95])
def test_quantization_tables_are_those_in_pillows_files(quality: int) -> None:
    tables_in_file = Image.open(io.BytesIO(saved(torch.rand(3, 16, 16), quality))).quantization
    assert list(tables.quantization_table(tables.LUMA_BASE, quality)) == list(tables_in_file[0])
    assert list(tables.quantization_table(tables.CHROMA_BASE, quality)) == list(tables_in_file[1])


def test_huffman_code_lengths_zigzag_and_header_are_those_of_a_real_file() -> None:
    data = saved(torch.rand(3, 16, 16), 80)
    found = decoder.decode(data)
    assert found.code_lengths == {
        0x00: tables.DC_CODES[0], 0x01: tables.DC_CODES[1], 0x10: tables.AC_CODES[0], 0x11: tables.AC_CODES[1]
    }  # fmt: skip
    assert (
        sum(tables.HEADER_BYTES if isinstance(tables.HEADER_BYTES, tuple) else (tables.HEADER_BYTES,)) == found.header
    )
    luma = tables.quantization_table(tables.LUMA_BASE, 80)
    assert [luma[i] for i in tables.zigzag()] == found.quantization[0]


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
    # libjpeg's integer DCT has an error of up to a tenth of a step; nothing else may differ.
    assert (coefficients - true).abs().max() < 0.62
    assert (coefficients.round() == true).double().mean() > 0.97


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [1, 50, 95])
@pytest.mark.parametrize("shape", [(8, 8), (37, 90), (121, 64), (64, 120)])
def test_the_exact_count_matches_libjpeg(shape: tuple[int, int], quality: int, subsampling: str) -> None:
    from alignprop_core.reward import ImageBatch
    from alignprop_jpeg.config import BytesConfig
    from alignprop_jpeg.reward import JpegBytes

    images = photos(128)[::3, :, : shape[0], : shape[1]]
    true = JpegBytes(BytesConfig(quality=quality, subsampling=subsampling)).score(ImageBatch(images=images))
    counted = jpeg_size(images, quality, subsampling, exact=True)
    # The remaining differences are ties in libjpeg's integer arithmetic: a few bytes.
    assert ((counted - true).abs() / true).max() < 0.012
    assert ((counted - true) / true).mean().abs() < 0.004


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [30, 80, 95])
def test_the_exact_count_includes_byte_stuffing_where_it_is_a_tenth_of_the_file(quality: int, subsampling: str) -> None:
    row, column = torch.arange(71)[:, None], torch.arange(90)
    for square in (1, 2, 4, 16):
        board = ((row // square + column // square) % 2).float().expand(1, 3, 71, 90)
        file = io.BytesIO()
        Image.fromarray((board[0] * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()).save(
            file, "JPEG", quality=quality, subsampling=subsampling
        )
        # Whole squares on the block grid have no ties: equal to the byte.
        assert abs(int(jpeg_size(board, quality, subsampling, exact=True)) - file.tell()) <= 2


def test_images_that_were_jpeg_files_are_as_accurate_off_their_grid_and_within_a_fifth_on_it() -> None:
    images = photos(128)[::3]
    for saved_at, quality, low, high in ((50, 30, -0.2, -0.05), (75, 50, -0.2, -0.05), (75, 80, 0.0, 0.1)):
        again, shifted = reopened(images, saved_at), reopened(images, saved_at, 3)
        assert low < Accuracy.of(jpeg_size(again, quality), true_size(again, quality)).bias < high
        assert abs(Accuracy.of(jpeg_size(shifted, quality), true_size(shifted, quality)).bias) < 0.02
        exact = jpeg_size(again, quality, exact=True)
        assert abs(Accuracy.of(exact, true_size(again, quality)).bias) < 0.005


@pytest.mark.parametrize("quality", QUALITIES)
def test_sizes_of_unseen_photographs_are_accurate_within_six_percent(quality: int) -> None:
    pairs = [(jpeg_size(photos(s), quality), true_size(photos(s), quality)) for s in (64, 128, 256, 512)]
    for pair in [*pairs, tuple(torch.cat(column) for column in zip(*pairs, strict=True))]:
        found = Accuracy.of(*pair)
        assert found.correlation >= 0.99
        assert found.median_error <= 0.06
        assert found.largest_error <= 0.12


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("size", [64, 128, 256, pytest.param(512, marks=pytest.mark.slow)])
def test_decreases_in_size_are_predicted_within_ten_percent(size: int, quality: int) -> None:
    images = photos(size)[::2]
    before = jpeg_size(images, quality), true_size(images, quality)
    for change, simple in simplified(images).items():
        decrease = Decrease.of(before, (jpeg_size(simple, quality), true_size(simple, quality)))
        assert 0.9 <= decrease.ratio <= 1.1, change
        assert decrease.median_error <= 0.1, change


@pytest.mark.parametrize("quality", QUALITIES)
def test_sizes_and_decreases_are_accurate_on_starter_scenes(quality: int) -> None:
    pytest.importorskip("alignprop_starter.scenes", reason="alignprop-starter is not installed")
    images = scenes(24, seed=11)
    assert images is not None
    before = jpeg_size(images, quality), true_size(images, quality)
    found = Accuracy.of(*before)
    assert found.correlation >= 0.99
    assert found.median_error <= 0.06
    for change, simple in simplified(images).items():
        decrease = Decrease.of(before, (jpeg_size(simple, quality), true_size(simple, quality)))
        assert 0.9 <= decrease.ratio <= 1.1, change


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_the_gradient_passes_gradcheck(subsampling: str) -> None:
    images = torch.rand(2, 3, 19, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jpeg_size(x, 80, subsampling), (images,), fast_mode=True)
    smooth = torch.linspace(0.3, 0.6, 16, dtype=torch.float64).expand(1, 3, 16, 16).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jpeg_size(x, 95, subsampling), (smooth,), fast_mode=True)


def test_the_gradient_is_finite_and_nonzero_at_every_pixel_saturated_or_not() -> None:
    images = (photos(64) * 3 - 1).clamp(0, 1).requires_grad_()
    saturated = (images == 0) | (images == 1)
    assert saturated.float().mean() > 0.2
    (gradient,) = torch.autograd.grad(jpeg_size(images).sum(), images)
    assert gradient.isfinite().all()
    # A flat block whose neighbors are just as flat cannot become smaller, so only busy blocks are checked.
    busy = (images.detach().unfold(2, 16, 16).unfold(3, 16, 16).std((1, 4, 5)) > 0.02).repeat_interleave(16, 1)
    busy = busy.repeat_interleave(16, 2)[:, None].expand_as(images)
    assert (gradient[busy & saturated] != 0).all()
    assert (gradient[busy] != 0).all()


def test_coefficients_that_round_to_zero_still_have_a_gradient() -> None:
    ramp = torch.linspace(-1, 1, 8)
    for amplitude in (
        0.25,
        0.5,
        1.0,
        2.0,
        4.0,
    ):  # in gray levels; a step at quality 50 is over ten
        scale = torch.tensor(amplitude, requires_grad=True)
        images = (0.5 + scale / 255 * ramp.repeat(2)).expand(1, 3, 16, 16)
        (slope,) = torch.autograd.grad(jpeg_size(images, 50).sum(), scale)
        assert slope > 1e-4


def test_chunked_and_unchunked_computation_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(64)[:4].double().requires_grad_()
    chunked = jpeg_size(images)
    (gradient,) = torch.autograd.grad(chunked.sum(), images)
    monkeypatch.setitem(size_model._BLOCKS_AT_ONCE, "cpu", 10**6)
    whole = jpeg_size(images)
    assert torch.allclose(whole, chunked, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(whole.sum(), images)[0], gradient, rtol=1e-9, atol=1e-12)


def test_constants_cached_in_inference_mode_work_in_a_later_backward_pass() -> None:
    size_model._component.cache_clear()
    size_model._scan_order.cache_clear()
    with torch.inference_mode():
        jpeg_size(torch.rand(1, 3, 32, 32), 77)
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    jpeg_size(images, 77).sum().backward()
    assert images.grad is not None
    assert np.isfinite(images.grad.numpy()).all()
