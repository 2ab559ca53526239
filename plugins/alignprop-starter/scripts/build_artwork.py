"""Builds the artwork: sprites of all animals and props in three styles, and a panorama per place.

    python plugins/alignprop-starter/scripts/build_artwork.py [--tarballs DIR] [--out DIR]

Writes two WebP files and an index. Without `--tarballs`, `npm pack` downloads the three npm packages. Needs resvg-py,
which is part of the extra `scripts`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from panoramas import draw_panoramas
from PIL import Image
from training_common import PACKAGE

from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES

SPRITE = 96
COLUMNS = 16
PACKAGES = {
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz"),
    "flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "iconify-json-fluent-emoji-flat-1.2.6.tgz"),
    "noto": ("@iconify-json/noto@1.2.9", "iconify-json-noto-1.2.9.tgz"),
}
SHA256 = {
    "3d": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "flat": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "noto": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
}

#: Unicode code points of the animals, in the order of `SPECIES`.
_ANIMAL_CODES = (
    "1f408",
    "1f415",
    "1f40e",
    "1f412",
    "1f407",
    "1f993",
    "1f577",
    "1f426",
    "1f411",
    "1f98c",
    "1f404",
    "1f410",
    "1f981",
    "1f405",
    "1f43b",
    "1f99d",
    "1f98a",
    "1f43a",
    "1f98e",
    "1f41e",
    "1f41c",
    "1f98b",
    "1f41f",
    "1f988",
    "1f40b",
    "1f42c",
    "1f43f",
    "1f401",
    "1f400",
    "1f40d",
    "1f422",
    "1f438",
    "1f414",
    "1f986",
    "1fabf",
    "1f41d",
    "1f416",
    "1f983",
    "1fab0",
    "1f999",
    "1f42a",
    "1f987",
    "1f98d",
    "1f994",
    "1f998",
    "1f40c",
    "1f99b",
    "1f406",
    "1f40a",
    "1f99e",
    "1f419",
)
PROPS = {
    "tree": "1f333",
    "fir": "1f332",
    "palm": "1f334",
    "cactus": "1f335",
    "tulip": "1f337",
    "sunflower": "1f33b",
    "blossom": "1f33c",
    "herb": "1f33f",
    "hyacinth": "1fabb",
    "house": "1f3e0",
    "rock": "1faa8",
    "hut": "1f6d6",
    "log": "1fab5",
    "shell": "1f41a",
    "parasol": "26f1",
    "coral": "1fab8",
    "snowman": "26c4",
    "mushroom": "1f344",
    "tent": "26fa",
    "pumpkin": "1f383",
    "maple leaf": "1f341",
    "fallen leaf": "1f342",
    "chestnut": "1f330",
    "sheaf": "1f33e",
    "cloud": "2601",
    "sun": "2600",
    "moon": "1f319",
    "star": "2b50",
    "snowflake": "2744",
}


def _fetch(style: str, tarballs: Path | None, scratch: Path) -> Path:
    spec, filename = PACKAGES[style]
    folder = tarballs or scratch
    if tarballs is None:
        subprocess.run(["npm", "pack", "--silent", spec], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    path = folder / filename
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[style]:
        raise SystemExit(
            f"{path}: sha256 is {found}, not {SHA256[style]}. It differs from the published {spec}; download it again."
        )
    return path


def _draw_fluent_3d(archive: tarfile.TarFile, code: str) -> Image.Image:
    names = archive.getnames()
    name = next(n for n in (f"package/assets/{code}.webp", f"package/assets/{code}-fe0f.webp") if n in names)
    member = archive.extractfile(name)
    assert member is not None
    return Image.open(io.BytesIO(member.read())).convert("RGBA")


def _draw_svg(icons: dict[str, Any], chars: dict[str, str], code: str) -> Image.Image:
    import resvg_py

    unit = icons["height"]
    body = icons["icons"][chars.get(code) or chars[f"{code}-fe0f"]]["body"]
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="0 0 {unit} {unit}">{body}</svg>'
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))).convert("RGBA")


def _fit(image: Image.Image) -> Image.Image:
    """Crop to the visible part and center it in a square, so that the size in a scene is the visible size."""
    box = image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    assert box is not None
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Resize premultiplied colors: otherwise the black of transparent pixels would bleed into the edges.
    inner = square.convert("RGBa").resize((SPRITE - 2, SPRITE - 2), Image.Resampling.LANCZOS).convert("RGBA")
    framed = Image.new("RGBA", (SPRITE, SPRITE))
    framed.paste(inner, (1, 1))
    return framed


def main() -> None:
    """Write `sprites.webp`, `panoramas.webp` and `index.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tarballs", type=Path, help="folder with the .tgz files of the three packages")
    parser.add_argument("--out", type=Path, default=PACKAGE / "artwork")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    codes = dict(zip(SPECIES, _ANIMAL_CODES, strict=True)) | PROPS
    sprites: list[Image.Image] = []
    names: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for style in STYLES:
            with tarfile.open(_fetch(style, args.tarballs, Path(scratch))) as archive:
                if style != "3d":
                    files = [archive.extractfile(f"package/{name}.json") for name in ("icons", "chars")]
                    icons, chars = (json.load(f) for f in files if f is not None)
                for name, code in codes.items():
                    sprites.append(
                        _fit(_draw_fluent_3d(archive, code) if style == "3d" else _draw_svg(icons, chars, code))
                    )
                    names.append(f"{style}/{name}")

    rows = -(-len(sprites) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE))
    for i, sprite in enumerate(sprites):
        sheet.paste(sprite, ((i % COLUMNS) * SPRITE, (i // COLUMNS) * SPRITE))
    sheet.save(args.out / "sprites.webp", quality=90, method=6, alpha_quality=95)
    draw_panoramas().save(args.out / "panoramas.webp", quality=92, method=6)
    index = {"sprite": SPRITE, "columns": COLUMNS, "sprites": names, "panoramas": list(BACKGROUNDS)}
    (args.out / "index.json").write_text(json.dumps(index, indent=0) + "\n")
    for path in sorted(args.out.glob("*.webp")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
