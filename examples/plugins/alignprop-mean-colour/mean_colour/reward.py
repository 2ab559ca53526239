"""The reward `mean_colour`."""

from torch import Tensor, float32, float64

from alignprop_core import ImageBatch, Reward
from mean_colour import MeanColourConfig


class MeanColour(Reward):
    """Minus the distance of the mean colour from the one wished for; -1.7 to 0."""

    Config = MeanColourConfig
    config: MeanColourConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores."""
        images = batch.images.to(float64 if batch.images.dtype == float64 else float32)
        return -(images.mean((2, 3)) - images.new_tensor(self.config.colour)).norm(dim=1)
