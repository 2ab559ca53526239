"""Test images and accuracy measures of the size estimate; `scripts/calibrate.py` uses them too."""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from alignprop_core.reward import ImageBatch
from alignprop_jpeg.config import BytesConfig
from alignprop_jpeg.reward import JpegBytes

QUALITIES = (50, 80, 95)
SCENES = 96
#: The photographs among the images in scikit-image; the others are drawings, scanned text and masks.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
NOTICEABLE = 0.05  # the relative error of smaller decreases (below 5% of the file) means nothing


def photographs() -> dict[str, Tensor]:
    """Return photographs by name, (3, H, W) float32 in [0, 1] each."""
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    images = {Path(n).stem: np.asarray(Image.open(folder / n).convert("RGB")) for n in PHOTOGRAPHS}
    samples = load_sample_images()
    images |= {Path(n).stem: image for n, image in zip(samples.filenames, samples.images, strict=True)}
    return {name: torch.tensor(image).permute(2, 0, 1).float() / 255 for name, image in images.items()}


def crops(size: int, each: int, seed: int = 0) -> Tensor:
    """Return `each` random square crops of every photograph that is large enough: (N, 3, size, size)."""
    random = np.random.default_rng([seed, size])
    found = []
    for image in photographs().values():
        height, width = image.shape[1:]
        if min(height, width) >= size:
            for _ in range(each):
                top, left = random.integers(0, height - size + 1), random.integers(0, width - size + 1)
                found.append(image[:, top : top + size, left : left + size])
    return torch.stack(found)


def scenes(count: int = SCENES, seed: int = 7) -> Tensor | None:
    """Return starter scenes (count, 3, 128, 128), or None if alignprop-starter is not installed."""
    if find_spec("alignprop_starter") is None:
        return None
    images: Tensor = import_module("alignprop_starter.scenes").render_scenes(count, seed).images
    return images


def _blurred(images: Tensor, sigma: float) -> Tensor:
    # Separable Gaussian on (B * 3, 1, H, W).
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    flat = F.pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel), kernel.transpose(2, 3)).reshape(images.shape)


def simplified(images: Tensor) -> dict[str, Tensor]:
    """Return simplified versions of the images, by the name of the simplification.

    They are of the kind that training on a compression reward produces. The subject is an ellipse in the center; the
    blur has a sigma of 2 pixels; the flat background is the mean color of the image.
    """
    size = images.shape[-1]
    place = torch.linspace(-1, 1, size)
    subject = ((place / 0.6) ** 2 + (place[:, None] / 0.7) ** 2 < 1).float().expand(1, 1, size, size)
    subject = _blurred(subject, size / 64)
    mean = images.mean((2, 3), keepdim=True)
    # (B * 3, 9, H * W): the 3x3 neighborhood of every pixel.
    around = F.unfold(F.pad(images.flatten(0, 1)[:, None], (1,) * 4, mode="replicate"), 3)
    return {
        "background blurred": images * subject + _blurred(images, 2.0) * (1 - subject),
        "background flat": images * subject + mean * (1 - subject),
        "denoised (3x3 median)": around.median(dim=1).values.reshape(images.shape),
        "contrast halved": (images + mean) / 2,
    }


def reopened(images: Tensor, quality: int, shift: int = 0) -> Tensor:
    """Return the images after saving them as JPEG files, shifted by a number of pixels off their own block grid."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        found.append(torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1).float() / 255)
    return torch.stack(found).roll((shift, shift), (2, 3))


def true_size(images: Tensor, quality: int) -> Tensor:
    """Return the sizes of the files that Pillow writes, (B,) bytes."""
    return JpegBytes(BytesConfig(quality=quality)).score(ImageBatch(images=images))


@dataclass(frozen=True)
class Accuracy:
    """Agreement of estimated sizes (N,) with true sizes (N,)."""

    correlation: float
    median_error: float
    largest_error: float
    bias: float

    @classmethod
    def of(cls, estimated: Tensor, true: Tensor) -> Accuracy:
        """Compare estimated with true sizes."""
        relative = estimated / true - 1
        correlation = torch.corrcoef(torch.stack([estimated, true]))[0, 1]
        return cls(
            float(correlation), float(relative.abs().median()), float(relative.abs().max()), float(relative.mean())
        )


@dataclass(frozen=True)
class Decrease:
    """Predicted and true decrease in size over a set of images, after one simplification."""

    ratio: float  # sum of the predicted decreases over the sum of the true ones
    median_error: float  # per image, among images whose file becomes at least 5% smaller
    count: int  # images that the median is taken over

    @classmethod
    def of(cls, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Decrease:
        """Compare (estimated, true) sizes before and after the simplification."""
        predicted, true = before[0] - after[0], before[1] - after[1]
        clear = true > NOTICEABLE * before[1]
        error = (predicted[clear] / true[clear] - 1).abs()
        return cls(float(predicted.sum() / true.sum()), float(error.median()), int(clear.sum()))
