"""Read image files as viewers display them, and convert tensors to PIL images. Imports no torch."""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core.errors import UserError, complaint

if TYPE_CHECKING:
    import torch
    from numpy import uint8
    from numpy.typing import NDArray
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""Files of a folder that are read as images."""


def read_image(path: Path) -> NDArray[uint8]:
    """Return an image file as (H, W, 3) RGB bytes: upright, 16-bit gray reduced to 8, transparency on white.

    Raises:
        UserError: there is no such file, or it is not a readable image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            with suppress(Exception):  # damaged Exif data is ignored, as in browsers
                ImageOps.exif_transpose(file, in_place=True)
            image = _eight_bits(file, path).convert("RGBA")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such image.") from None
    # Pillow's parsers raise whatever a damaged file leads them to: SyntaxError, struct.error, IndexError and others.
    except Exception as error:
        reason = getattr(error, "strerror", None) or complaint(error)
        raise UserError(f"{path} is not a readable image: {reason}.") from error
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Reduce 16-bit gray to 8 bits; Pillow's own conversion clips at 255, which makes nearly everything white."""
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise UserError(f"{path} has floating-point pixels, whose range is not known. Save it with 8 bits per channel.")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype("int64")
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} has 32-bit pixels, whose range is not known. Save it with 8 bits per channel.")
    return Image.fromarray((values / 257).round().astype("uint8"))


def to_pil(image: torch.Tensor) -> Image.Image:
    """Return one image, (3, H, W), float in [0, 1] or uint8, as a PIL image."""
    from PIL import Image

    if image.is_floating_point():
        image = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def thumbnail_uri(image: Image.Image) -> str:
    """Return a small copy of an image, at most 256 pixels wide and high, as a data URI (JPEG)."""
    small, file = image.copy(), BytesIO()
    small.thumbnail((256, 256))
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
