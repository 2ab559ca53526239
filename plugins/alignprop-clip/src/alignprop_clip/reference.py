"""The reward reference_similarity: similarity to a folder of reference images."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from alignprop_clip.config import ReferenceSimilarityConfig
from alignprop_clip.reward import EncoderReward, load_encoder
from alignprop_core.errors import ConfigError, under
from alignprop_core.images import read_image
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ReferenceSimilarity(EncoderReward):
    """Cosine similarity of CLIP image embeddings to a folder of reference images (CLIP-I, arXiv:2208.12242).

    score = mean over the references r of cos(f(image), f(r)), or their maximum. "mean" pulls every image toward the
    mean of the folder; "max" pulls each image toward its nearest reference, which preserves diversity. Prompts are not
    used. References and images share the same preprocessing.

    Args:
        config: the options; `folder` is required.

    Raises:
        ConfigError: the folder does not exist or contains no images, or the model is not available.
        WeightsError: the weights are not on this machine, or belong to another model.
        UserError: a reference image cannot be read.

    Attributes:
        references: (N, D) unit embeddings of the reference images.
    """

    Config: ClassVar[type[RewardConfig]] = ReferenceSimilarityConfig
    config: ReferenceSimilarityConfig
    references: Tensor

    def __init__(self, config: ReferenceSimilarityConfig) -> None:
        super().__init__(config)
        files = image_files(Path(self.config.folder).expanduser())
        self.encoder = load_encoder(self.config, "reference_similarity", images_only=True)
        with torch.inference_mode(False), torch.no_grad():
            embedded = [self.encoder.images(_as_batch(file)) for file in files]
        self.register_buffer("references", torch.cat(embedded))

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosine similarities; float32, or float64 if the images are."""
        images = self.encoder.images(batch.images)  # (B, D)
        with torch.autocast(images.device.type, enabled=False):
            cosines = images @ self.references.to(images).T  # (B, N)
        return cosines.mean(1) if self.config.compare == "mean" else cosines.amax(1)


def image_files(folder: Path) -> list[Path]:
    """Return the image files directly inside a folder, sorted by name.

    Raises:
        ConfigError: the folder does not exist, is a file, or contains no images.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"reference_similarity: folder {folder} {what} (resolved to {folder.absolute()}). Set folder to a "
            "folder of images."
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ConfigError(
            f"reference_similarity: folder {folder} contains no images. Add files that end in {', '.join(SUFFIXES)}."
        )
    return files


def _as_batch(file: Path) -> Tensor:
    """Read an image file as a (1, 3, H, W) float32 tensor in [0, 1]."""
    with under("reference_similarity"):
        pixels = torch.from_numpy(read_image(file))
    return pixels.permute(2, 0, 1)[None].float() / 255
