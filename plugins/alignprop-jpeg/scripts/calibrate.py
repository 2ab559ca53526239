"""Compares the size estimate with Pillow's files and prints the results as Markdown.

    python plugins/alignprop-jpeg/scripts/calibrate.py                      accuracy tables
    python plugins/alignprop-jpeg/scripts/calibrate.py --margins 1.0 1.25   choose ZERO_MARGIN, the calibrated constant
    python plugins/alignprop-jpeg/scripts/calibrate.py --saved              images that were JPEG files before
    python plugins/alignprop-jpeg/scripts/calibrate.py --image out.webp     optimize the pixels of a photograph

Needs `pip install -e "plugins/alignprop-jpeg[dev]"`. The images are crops of the photographs in scikit-image and
scikit-learn, and scenes of alignprop-starter if it is installed. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from alignprop_jpeg.size_model import ZERO_MARGIN, jpeg_size

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests measure accuracy with the same functions

from jpeg_accuracy import QUALITIES, Accuracy, Decrease, crops, photographs, reopened, scenes, simplified, true_size

CROPS = {64: 6, 128: 4, 256: 2, 512: 1}
"""Size in pixels -> crops per photograph that is large enough."""


def image_sets() -> Iterator[tuple[str, Tensor]]:
    """Yield named sets of images: photographs from small to large, then scenes."""
    for size, each in CROPS.items():
        yield f"photographs, {size} px", crops(size, each)
    rendered = scenes()
    if rendered is not None:
        yield f"starter scenes, {rendered.shape[-1]} px", rendered


@torch.no_grad()
def report(sets: Sequence[tuple[str, Tensor]], zero_margin: float = ZERO_MARGIN) -> Iterator[str]:
    """Yield the lines of both tables: accuracy of sizes, then of decreases in size."""
    yield "| images | n | quality | Pearson r | median error | largest error | bias |"
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
    yield "| images | simplification | quality | predicted / true decrease | median error per image | n |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, images in sets:
        for change, simple in simplified(images).items():
            for quality in QUALITIES:
                after = jpeg_size(simple, quality, zero_margin=zero_margin), true_size(simple, quality)
                d = Decrease.of(sizes[name, quality], after)
                yield f"| {name} | {change} | {quality} | {d.ratio:.3f} | {d.median_error:.1%} | {d.count} |"


@torch.no_grad()
def margins(sets: Sequence[tuple[str, Tensor]], values: Sequence[float]) -> Iterator[str]:
    """Yield a table of bias and decrease ratio for values of `ZERO_MARGIN`."""
    yield "| margin | quality | bias of size | predicted / true decrease, background flat |"
    yield "| --- | --- | --- | --- |"
    for value in values:
        for quality in QUALITIES:
            biases, ratios = [], []
            for _, images in sets:
                before = jpeg_size(images, quality, zero_margin=value), true_size(images, quality)
                simple = simplified(images)["background flat"]
                after = jpeg_size(simple, quality, zero_margin=value), true_size(simple, quality)
                biases.append(Accuracy.of(*before).bias)
                ratios.append(Decrease.of(before, after).ratio)
            yield f"| {value:.2f} | {quality} | {fmean(biases):+.2%} | {fmean(ratios):.3f} |"


@torch.no_grad()
def saved_before(qualities: Sequence[int] = (30, 50, 75, 90, 95)) -> Iterator[str]:
    """Yield a table of bias for photographs that were JPEG files, on their own block grid and shifted off it."""
    yield "| saved at | " + " | ".join(f"quality {quality}" for quality in qualities) + " | shifted by 3 px |"
    yield "| --- |" + " --- |" * (len(qualities) + 1)
    images = crops(256, 1)
    for before in qualities:
        biases = []
        for shift in (0, 3):
            again = reopened(images, before, shift)
            biases.append([Accuracy.of(jpeg_size(again, q), true_size(again, q)).bias for q in qualities])
        own, off = biases
        cells = [f"{bias:+.1%}" for bias in own]
        yield f"| {before} | {' | '.join(cells)} | {min(off):+.1%} to {max(off):+.1%} |"


def optimize(images: Tensor, sign: int, steps: int = 60, rate: float = 1.5 / 255, quality: int = 95) -> Tensor:
    """Optimize pixels (B, 3, H, W) directly with Adam: sign -1 makes the files smaller, +1 larger."""
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-sign * jpeg_size(pixels, quality)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return pixels.detach().clamp(0, 1)


def save_example(path: Path) -> list[int]:
    """Save a photograph and both optimized versions side by side; return their true bytes."""
    image = photographs()["astronaut"][None, :, 32:224, 112:304]
    row = torch.cat([image, optimize(image, -1), optimize(image, 1)])
    pixels = (torch.cat(list(row), dim=2) * 255).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, quality=88)
    return [int(size) for size in true_size(row, 95)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--margins", type=float, nargs="+", help="values of ZERO_MARGIN to compare")
    parser.add_argument("--saved", action="store_true", help="measure images that were JPEG files before")
    parser.add_argument("--image", type=Path, help="save the README's example image there and print its true bytes")
    arguments = parser.parse_args()
    if arguments.image:
        print("true bytes:", *save_example(arguments.image))
        return
    if arguments.saved:
        print(*saved_before(), sep="\n")
        return
    sets = list(image_sets())
    for line in margins(sets, arguments.margins) if arguments.margins else report(sets):
        print(line, flush=True)


if __name__ == "__main__":
    main()
