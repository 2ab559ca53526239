"""Options of `hf_classifier`. Importing this module imports no torch."""

from pydantic import Field

from alignprop_core import RewardConfig


class HfClassifierConfig(RewardConfig):
    """Options of `hf_classifier`."""

    folder: str = Field(min_length=1, description="Folder with the classifier, as save_pretrained writes it.")
    label: str = Field(min_length=1, description="The label wanted of every picture, by name.")
