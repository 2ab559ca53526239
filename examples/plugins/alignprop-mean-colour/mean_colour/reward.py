"""The reward `mean_colour`."""

from torch import Tensor, float32, float64

from alignprop_core import ImageBatch, Reward
from mean_colour import MeanColourConfig


class MeanColour(Reward):
    """Negative Euclidean distance of an image's mean colour from the target colour; -1.73 to 0."""

    Config = MeanColourConfig
    config: MeanColourConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores; float32, or float64 if the images are."""
        images = batch.images.to(float64 if batch.images.dtype == float64 else float32)
        return -(images.mean((2, 3)) - images.new_tensor(self.config.colour)).norm(dim=1)
