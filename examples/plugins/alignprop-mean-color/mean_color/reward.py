"""The reward `mean_color`."""

from torch import Tensor, float32, float64

from alignprop_core import ImageBatch, Reward
from mean_color import MeanColorConfig


class MeanColor(Reward):
    """Negative Euclidean distance of an image's mean color from the target color; -1.73 to 0."""

    Config = MeanColorConfig
    config: MeanColorConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores; float32, or float64 if the images are."""
        images = batch.images.to(float64 if batch.images.dtype == float64 else float32)
        return -(images.mean((2, 3)) - images.new_tensor(self.config.color)).norm(dim=1)
