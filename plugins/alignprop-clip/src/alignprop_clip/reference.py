"""reference_similarity: move towards the look of a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from alignprop_clip.config import ReferenceSimilarityConfig
from alignprop_clip.reward import EncoderReward, load_model
from alignprop_core.errors import ConfigError, under
from alignprop_core.pictures import read_picture
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ReferenceSimilarity(EncoderReward):
    """Cosine of a picture's CLIP embedding to those of a folder of pictures.

    score = mean over references of cos(f(image), f(reference)), or the largest of them. With "mean" every picture is
    pulled towards the middle of the folder; with "max" each towards the one it is nearest to, which keeps variety.
    Prompts are not read. The references go through the same preprocessing as the images.
    """

    Config: ClassVar[type[RewardConfig]] = ReferenceSimilarityConfig
    config: ReferenceSimilarityConfig
    references: Tensor

    def __init__(self, config: ReferenceSimilarityConfig) -> None:
        super().__init__(config)
        files = picture_files(Path(self.config.folder).expanduser())
        self.encoder = load_model(self.config, "reference_similarity", images_only=True)
        with torch.inference_mode(False), torch.no_grad():
            embedded = [self.encoder.images(_as_batch(file)) for file in files]
        self.register_buffer("references", torch.cat(embedded))

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosines; float32, or float64 if the images are."""
        images = self.encoder.images(batch.images)
        with torch.autocast(images.device.type, enabled=False):
            cosines = images @ self.references.to(images).T
        return cosines.mean(1) if self.config.compare == "mean" else cosines.amax(1)


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files of a folder by name, folders inside it not; `ConfigError` if there are none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"reference_similarity: folder {folder} {what} (looked for at {folder.absolute()}). Name one with pictures."
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ConfigError(f"reference_similarity: folder {folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return files


def _as_batch(file: Path) -> Tensor:
    """Read a picture as (1, 3, H, W) in [0, 1]."""
    with under("reference_similarity"):
        pixels = torch.from_numpy(read_picture(file))
    return pixels.permute(2, 0, 1)[None].float() / 255
