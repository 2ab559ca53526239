"""A Hugging Face image classifier as a reward. Imports no torch."""

from collections.abc import Iterable

from alignprop_core import RewardSpec, hookimpl


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register `hf_classifier`."""
    return [
        RewardSpec(
            name="hf_classifier",
            summary="Log-probability of a label under a transformers image classifier.",
            factory="hf_classifier.reward:HfClassifier",
            config="hf_classifier.config:HfClassifierConfig",
            api_version=1,
            unit="log-probability",
            typical_range=(-10.0, 0.0),
            source="https://github.com/huggingface/transformers",
            license="Apache-2.0",
        )
    ]
