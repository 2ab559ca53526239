"""Hold the size estimate against Pillow's files and print the result as Markdown.

    python -m alignprop_jpeg.calibrate                      the accuracy tables
    python -m alignprop_jpeg.calibrate --margins 1.0 1.25   how the one calibrated number was chosen
    python -m alignprop_jpeg.calibrate --picture out.webp   a photograph before and after climbing either reward

Pictures: the photographs that ship inside scikit-image and scikit-learn (`pip install alignprop-jpeg[calibrate]`),
cropped at several sizes, and scenes of alignprop-starter where that is installed. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
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
from alignprop_jpeg.size_model import ZERO_MARGIN, jpeg_size

QUALITIES = (50, 80, 95)
CROPS = {64: 6, 128: 4, 256: 2, 512: 1}
"""Crops a photograph gives at each size, where it is large enough."""
SCENES = 96
#: The photographs among the pictures inside scikit-image; the others are drawings, scans of text, masks.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
NOTICEABLE = 0.05  # a fall below 5% of the file is too small for its relative error to mean anything


def photographs() -> dict[str, Tensor]:
    """Return the photographs by name: (3, H, W) float32 in [0, 1]."""
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    pictures = {Path(n).stem: np.asarray(Image.open(folder / n).convert("RGB")) for n in PHOTOGRAPHS}
    samples = load_sample_images()
    pictures |= {Path(n).stem: picture for n, picture in zip(samples.filenames, samples.images, strict=True)}
    return {name: torch.tensor(picture).permute(2, 0, 1).float() / 255 for name, picture in pictures.items()}


def crops(size: int, each: int, seed: int = 0) -> Tensor:
    """Return `each` random square crops of every photograph large enough: (N, 3, size, size)."""
    random = np.random.default_rng([seed, size])
    found = []
    for picture in photographs().values():
        height, width = picture.shape[1:]
        if min(height, width) >= size:
            for _ in range(each):
                top, left = random.integers(0, height - size + 1), random.integers(0, width - size + 1)
                found.append(picture[:, top : top + size, left : left + size])
    return torch.stack(found)


def scenes(count: int = SCENES, seed: int = 7) -> Tensor | None:
    """Return starter scenes (count, 3, 128, 128), or None where alignprop-starter is not installed."""
    if find_spec("alignprop_starter") is None:
        return None
    images: Tensor = import_module("alignprop_starter.scenes").render_scenes(count, seed).images
    return images


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    flat = F.pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel), kernel.transpose(2, 3)).reshape(images.shape)


def simplified(images: Tensor) -> dict[str, Tensor]:
    """Return the pictures made simpler in the ways a compression reward may find.

    The subject is an ellipse in the middle; blur has a sigma of 2 pixels; the flat ground is the picture's mean colour.
    """
    size = images.shape[-1]
    place = torch.linspace(-1, 1, size)
    subject = ((place / 0.6) ** 2 + (place[:, None] / 0.7) ** 2 < 1).float().expand(1, 1, size, size)
    subject = _blurred(subject, size / 64)
    mean = images.mean((2, 3), keepdim=True)
    around = F.unfold(F.pad(images.flatten(0, 1)[:, None], (1,) * 4, mode="replicate"), 3)
    return {
        "background blurred": images * subject + _blurred(images, 2.0) * (1 - subject),
        "background flat": images * subject + mean * (1 - subject),
        "denoised (3x3 median)": around.median(dim=1).values.reshape(images.shape),
        "contrast halved": (images + mean) / 2,
    }


def true_size(images: Tensor, quality: int) -> Tensor:
    """Return Pillow's file sizes: (B,) bytes."""
    return JpegBytes(BytesConfig(quality=quality)).score(ImageBatch(images=images))


@dataclass(frozen=True)
class Accuracy:
    """How near the estimates (N,) are to the true sizes (N,)."""

    correlation: float
    median_error: float
    largest_error: float
    bias: float

    @classmethod
    def of(cls, estimated: Tensor, true: Tensor) -> Accuracy:
        """Compare two vectors of sizes."""
        relative = estimated / true - 1
        correlation = torch.corrcoef(torch.stack([estimated, true]))[0, 1]
        return cls(
            float(correlation), float(relative.abs().median()), float(relative.abs().max()), float(relative.mean())
        )


@dataclass(frozen=True)
class Fall:
    """How the predicted fall in size compares with the true one over a set of pictures, each simplified in one way."""

    ratio: float  # all predicted falls together over all true falls together
    median_error: float  # of the single picture, among those whose file falls by at least 5%
    pictures: int

    @classmethod
    def of(cls, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Fall:
        """Compare (estimated, true) sizes before with those after."""
        predicted, true = before[0] - after[0], before[1] - after[1]
        clear = true > NOTICEABLE * before[1]
        error = (predicted[clear] / true[clear] - 1).abs()
        return cls(float(predicted.sum() / true.sum()), float(error.median()), int(clear.sum()))


def picture_sets() -> Iterator[tuple[str, Tensor]]:
    """Yield the sets of pictures by name, photographs from small to large, then scenes."""
    for size, each in CROPS.items():
        yield f"photographs, {size} px", crops(size, each)
    drawn = scenes()
    if drawn is not None:
        yield f"starter scenes, {drawn.shape[-1]} px", drawn


@torch.no_grad()
def report(sets: Sequence[tuple[str, Tensor]], zero_margin: float = ZERO_MARGIN) -> Iterator[str]:
    """Yield the lines of the two tables."""
    yield "| pictures | n | quality | Pearson r | median error | largest error | bias |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    sizes: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for quality in QUALITIES:
        for name, images in sets:
            sizes[name, quality] = jpeg_size(images, quality, zero_margin=zero_margin), true_size(images, quality)
        groups = {name: [sizes[name, quality]] for name, _ in sets}
        photos = [pair for name, (pair,) in groups.items() if name.startswith("photographs")]
        for name, pairs in {**groups, "photographs, all sizes": photos, "all": [p for (p,) in groups.values()]}.items():
            estimated, true = (torch.cat(column) for column in zip(*pairs, strict=True))
            a = Accuracy.of(estimated, true)
            yield (
                f"| {name} | {len(true)} | {quality} | {a.correlation:.4f} | {a.median_error:.1%} "
                f"| {a.largest_error:.1%} | {a.bias:+.1%} |"
            )
    yield ""
    yield "| pictures | simplification | quality | predicted fall / true fall | median error, one picture | n |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, images in sets:
        for change, simple in simplified(images).items():
            for quality in QUALITIES:
                after = jpeg_size(simple, quality, zero_margin=zero_margin), true_size(simple, quality)
                f = Fall.of(sizes[name, quality], after)
                yield f"| {name} | {change} | {quality} | {f.ratio:.3f} | {f.median_error:.1%} | {f.pictures} |"


@torch.no_grad()
def margins(sets: Sequence[tuple[str, Tensor]], values: Sequence[float]) -> Iterator[str]:
    """Yield a table of bias and fall ratio against `ZERO_MARGIN`."""
    yield "| margin | quality | bias of size | fall, background flat |"
    yield "| --- | --- | --- | --- |"
    for value in values:
        for quality in QUALITIES:
            biases, ratios = [], []
            for _, images in sets:
                before = jpeg_size(images, quality, zero_margin=value), true_size(images, quality)
                simple = simplified(images)["background flat"]
                after = jpeg_size(simple, quality, zero_margin=value), true_size(simple, quality)
                biases.append(Accuracy.of(*before).bias)
                ratios.append(Fall.of(before, after).ratio)
            yield f"| {value:.2f} | {quality} | {np.mean(biases):+.2%} | {np.mean(ratios):.3f} |"


def climb(images: Tensor, sign: int, steps: int = 60, rate: float = 1.5 / 255, quality: int = 95) -> Tensor:
    """Move pixels along the estimate's gradient (Adam), no model in between: sign -1 makes files small, +1 large."""
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-sign * jpeg_size(pixels, quality)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return pixels.detach().clamp(0, 1)


def picture(path: Path) -> list[int]:
    """Draw a photograph, the same made compressible, and made incompressible, side by side; return their true bytes."""
    image = photographs()["astronaut"][None, :, 32:224, 112:304]
    row = torch.cat([image, climb(image, -1), climb(image, 1)])
    pixels = (torch.cat(list(row), dim=2) * 255).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, quality=88)
    return [int(size) for size in true_size(row, 95)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--margins", type=float, nargs="+", help="values of ZERO_MARGIN to compare")
    parser.add_argument("--picture", type=Path, help="write the README's picture there and print its true bytes")
    arguments = parser.parse_args()
    if arguments.picture:
        print("true bytes:", *picture(arguments.picture))
        return
    sets = list(picture_sets())
    for line in margins(sets, arguments.margins) if arguments.margins else report(sets):
        print(line, flush=True)


if __name__ == "__main__":
    main()
