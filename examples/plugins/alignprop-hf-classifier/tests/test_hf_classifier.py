"""`hf_classifier` passes the conformance checks, with a small ViT built from its config."""

from pathlib import Path

import pytest
import torch
from hf_classifier.config import HfClassifierConfig
from hf_classifier.reward import HfClassifier
from transformers import ViTConfig, ViTForImageClassification

from alignprop_core.errors import ConfigError, WeightsError
from alignprop_core.testing import RewardConformance

NAMES = {0: "cat", 1: "dog", 2: "fox"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


class TestHfClassifier(RewardConformance):
    reward = "hf_classifier"

    @pytest.fixture
    def reward_options(self, folder: str) -> dict[str, str]:
        return {"folder": folder, "label": "fox"}


def test_a_misspelled_label_and_a_folder_without_classifier_are_reported(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'no label "fix".*Did you mean "fox"'):
        HfClassifier(HfClassifierConfig(folder=folder, label="fix"))
    with pytest.raises(WeightsError, match=r"contains no image classifier.*save_pretrained"):
        HfClassifier(HfClassifierConfig(folder=str(tmp_path), label="fox"))
