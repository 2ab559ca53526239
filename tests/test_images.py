"""Picture files are read as people see them."""

from __future__ import annotations

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
