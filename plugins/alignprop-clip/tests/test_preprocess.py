"""Preprocessing against open_clip's own, on pictures and on tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from alignprop_clip.preprocess import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(32, 32), (48, 48), (224, 224), (33, 97), (200, 57), (640, 480), (32, 400)]


def picture(size: tuple[int, int], *, hard: bool = True) -> Image.Image:
    generator = torch.Generator().manual_seed(size[0])
    pixels = torch.rand(-(-size[1] // 5), -(-size[0] // 5), 3, generator=generator)
    pixels = (pixels > 0.5).float() if hard else pixels
    pixels = pixels.repeat_interleave(5, 0).repeat_interleave(5, 1)[: size[1], : size[0]]
    return Image.fromarray((pixels * 255).to(torch.uint8).contiguous().numpy())


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hard", [True, False])
def test_a_picture_comes_out_as_open_clip_makes_it(
    resize: Any, interpolation: Any, size: tuple[int, int], hard: bool
) -> None:
    from open_clip.transform import image_transform

    image = picture(size, hard=hard)
    theirs = image_transform(64, False, MEAN, STD, resize_mode=resize, interpolation=interpolation)(image)
    ours = Preprocess(64, MEAN, STD, resize, interpolation)(to_tensor(image)[None])[0]
    assert ours.shape == (3, 64, 64)
    # In grey levels; Pillow rounds to whole ones after each direction.
    difference = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # Where the aspect changes, Pillow's newer versions take the two directions in another order.
    if resize == "shortest" or size[0] == size[1] or interpolation == "bilinear":
        assert difference.max() <= 1.3
        assert difference.mean() <= 0.5
    assert difference.mean() <= 1.5


@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_comes_out_as_torchvision_makes_it(size: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    theirs = Compose([Resize(64, InterpolationMode.BICUBIC, antialias=True), CenterCrop(64), Normalize(MEAN, STD)])
    images = to_tensor(picture(size))[None]
    torch.testing.assert_close(Preprocess(64, MEAN, STD, clip=False)(images), theirs(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_the_gradient_is_the_derivative(resize: Any) -> None:
    prepare = Preprocess(9, MEAN, STD, resize)
    images = (
        torch.rand(2, 3, 13, 21, generator=torch.Generator().manual_seed(0)).double() * 0.3 + 0.3
    ).requires_grad_()
    assert torch.autograd.gradcheck(prepare, (images,))


def test_saturated_pixels_keep_their_gradient() -> None:
    images = (torch.rand(1, 3, 50, 50) > 0.5).double().requires_grad_()
    prepared = Preprocess(32, MEAN, STD)(images)
    (gradient,) = torch.autograd.grad((prepared * torch.rand_like(prepared)).sum(), images)
    assert (gradient != 0).double().mean() > 0.99
    pixels = prepared * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


def test_types_and_inputs() -> None:
    prepare = Preprocess(32, MEAN, STD)
    for dtype, wanted in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        images: Tensor = torch.rand(1, 3, 40, 64).to(dtype)
        kept = images.clone()
        assert prepare(images).dtype == wanted
        assert torch.equal(images, kept)
