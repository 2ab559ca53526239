"""Options of `hf_classifier`. Importing this module imports no torch."""

from pydantic import Field

from alignprop_core import RewardConfig


class HfClassifierConfig(RewardConfig):
    """Options of `hf_classifier`."""

    folder: str = Field(min_length=1, description="Folder of the classifier, written by save_pretrained().")
    label: str = Field(min_length=1, description="Target label of every image, by name.")
