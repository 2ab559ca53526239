"""Image files as people see them, and images of tensors. Imports torch only for tensors it is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core.errors import UserError

if TYPE_CHECKING:
    import torch
    from numpy import uint8
    from numpy.typing import NDArray
    from PIL import Image


def read_image(path: Path) -> NDArray[uint8]:
    """Return a picture file as (H, W, 3) RGB bytes: upright, 16-bit grey brought to 8, transparency laid on white.

    Raises:
        UserError: there is no such file, or it is no picture that can be read.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = _eight_bits(ImageOps.exif_transpose(file), path).convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture.") from None
    # ultralytics, where it is loaded, makes Pillow try another format first, whose package may be missing.
    except (UnidentifiedImageError, OSError, ValueError, ImportError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}.") from error
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(paper, picture).convert("RGB"))


def _eight_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Bring 16-bit grey to 8 bits: Pillow's own conversion cuts off at 255, so that nearly everything is white."""
    import numpy as np
    from PIL import Image

    if picture.mode == "F":
        raise UserError(f"{path} has floating-point pixels, whose range is not known. Save it with 8 bits a channel.")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype("int64")
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} has 32-bit pixels, whose range is not known. Save it with 8 bits a channel.")
    return Image.fromarray((values / 257).round().astype("uint8"))


def to_pil(image: torch.Tensor) -> Image.Image:
    """Return one image, (3, H, W), float in [0, 1] or uint8, as a PIL image."""
    from PIL import Image

    if image.is_floating_point():
        image = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
