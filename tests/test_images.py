"""Picture files are read as people see them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignprop_core.errors import UserError
from alignprop_core.images import read_image


def test_images_are_turned_upright(tmp_path: Path) -> None:
    stored = Image.new("RGB", (40, 20), "red")
    stored.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: what is stored left is seen above
    stored.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.shape == (40, 20, 3)
    assert image[0, 0].tolist() == [0, 0, 255]
    assert image[-1, 0].tolist() == [255, 0, 0]


def test_transparency_is_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 5), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_gray_keeps_its_levels(ending: str, tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / f"deep.{ending}")
    assert (read_image(tmp_path / f"deep.{ending}") == levels[:, :, None]).all()


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_pixels_of_unknown_range_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(UserError, match=r"odd\.tif has .* pixels, whose range is not known\. Save it with 8 bits"):
        read_image(tmp_path / "odd.tif")


def test_what_is_not_an_image_is_reported(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("not an image")
    with pytest.raises(UserError, match=r"no\.png is not a readable image"):
        read_image(tmp_path / "no.png")
    with pytest.raises(UserError, match=r"gone\.png: no such image"):
        read_image(tmp_path / "gone.png")


def test_damaged_exif_data_is_ignored(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(content, "PNG")
    at = content.getvalue().index(b"IDAT") - 4
    (tmp_path / "image.png").write_bytes(_with_chunk(content.getvalue(), at, b"eXIf" + b"\0\x08\0\2\1\x12\0\3"))
    assert read_image(tmp_path / "image.png").shape == (20, 40, 3)


def test_an_unknown_chunk_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(content, "PNG")
    at = content.getvalue().index(b"IDAT") - 4
    (tmp_path / "image.png").write_bytes(_with_chunk(content.getvalue(), at, b"\0\1\2\3xx"))
    with pytest.raises(UserError, match=r"image\.png is not a readable image: "):
        read_image(tmp_path / "image.png")


def _with_chunk(png: bytes, at: int, chunk: bytes) -> bytes:
    """Return a PNG file with a chunk (name and content) inserted."""
    return png[:at] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[at:]
