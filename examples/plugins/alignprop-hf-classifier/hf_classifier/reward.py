"""The reward `hf_classifier`."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from alignprop_core import ImageBatch, Reward
from alignprop_core.errors import ConfigError, WeightsError, complaint, did_you_mean
from hf_classifier.config import HfClassifierConfig


class HfClassifier(Reward):
    """Log-probability of a label under an image classifier: log softmax(logits)[label], at most 0.

    Args:
        config: the folder of the classifier, and the label.

    Raises:
        WeightsError: the folder contains no classifier with safetensors weights.
        ConfigError: the classifier has no such label.
    """

    Config = HfClassifierConfig
    config: HfClassifierConfig

    def __init__(self, config: HfClassifierConfig) -> None:
        super().__init__(config)
        folder = Path(config.folder).expanduser()
        try:
            # safetensors only: other formats are pickles, which can run code when they are loaded.
            self.network = AutoModelForImageClassification.from_pretrained(
                folder, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"options.folder: {folder} contains no image classifier with safetensors weights: {complaint(error)}. "
                "Set it to a folder written by save_pretrained()."
            ) from error
        names = self.network.config.label2id
        if config.label not in names:
            raise ConfigError(
                f'options.label: the classifier has no label "{config.label}".{did_you_mean(config.label, names)} '
                f"Its labels: {', '.join(list(names)[:10])}."
            )
        self.label = int(names[config.label])
        self.size = int(self.network.config.image_size)
        preprocessing = _read_preprocessing(folder)
        for name in ("mean", "std"):
            values = torch.tensor(preprocessing.get(f"image_{name}", [0.5] * 3))
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) log-probabilities; float32, or float64 if the images are."""
        out = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        images = batch.images.to(self.network.dtype)
        images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        # (B, 3, size, size) -> (B, number of labels)
        logits = self.network((images - self.mean) / self.std).logits
        return F.log_softmax(logits.to(out), dim=1)[:, self.label]


def _read_preprocessing(folder: Path) -> dict[str, list[float]]:
    """Return the folder's preprocessor_config.json; empty without the file."""
    file = folder / "preprocessor_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
