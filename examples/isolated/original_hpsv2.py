"""The original hpsv2 package as a reward in its own Python environment; its pins conflict with current packages.

`alignprop rewards isolate` installs hpsv2 1.2.0 there (see original_hpsv2.yaml); the run itself never imports it.
Network, tokenizer and preprocessing are the original's; weights can have any size in open_clip's format.
"""

from __future__ import annotations

import json

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from alignprop_clip.checkpoint import to_open_clip
from alignprop_core import ImageBatch, Reward, RewardConfig
from alignprop_core.weights import find_weights


class OriginalHpsv2Config(RewardConfig):
    """Options of `OriginalHpsv2`."""

    weights: str = Field(default="starter", description="A .safetensors file with an open_clip config, or `starter`.")


class OriginalHpsv2(Reward):
    """Human Preference Score v2 as hpsv2 1.2.0 computes it: cosine similarity of image and prompt."""

    Config = OriginalHpsv2Config
    config: OriginalHpsv2Config

    def __init__(self, config: OriginalHpsv2Config | None = None) -> None:
        super().__init__(config)
        from hpsv2.src.open_clip import image_transform
        from hpsv2.src.open_clip.model import CLIP
        from hpsv2.src.open_clip.transformer import Transformer

        path = find_weights(self.config.weights, reward="hpsv2")
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["config"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a mapping
        sizes = metadata["open_clip"]
        text = {key: value for key, value in sizes["text_cfg"].items() if key != "mlp_ratio"}
        self.model = CLIP(sizes["embed_dim"], sizes["vision_cfg"], text)
        # The original uses an MLP ratio of 4 for every text tower; smaller weights declare their own.
        ratio = sizes["text_cfg"].get("mlp_ratio", 4.0)
        self.model.transformer = Transformer(text["width"], text["layers"], text["heads"], mlp_ratio=ratio)
        state = to_open_clip(state, str(path), vocabulary=text["vocab_size"])
        state.pop("logit_bias", None)  # not used by a cosine
        self.model.load_state_dict(state)
        self.context_length = text["context_length"]
        # The first two steps convert PIL images to tensors; the batch already has tensors.
        self.preprocessing = image_transform(
            metadata["image_size"],
            is_train=False,
            mean=metadata["mean"],
            std=metadata["std"],
            resize_longest_max=True,
        ).transforms[2:]

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosines, float32."""
        from hpsv2.src.open_clip import tokenize

        images = torch.stack([self._preprocess(image) for image in batch.images.float()])
        tokens = tokenize(list(batch.prompts), self.context_length).to(images.device)
        image_features = F.normalize(self.model.encode_image(images), dim=-1)
        prompt_features = F.normalize(self.model.encode_text(tokens), dim=-1)
        return (image_features * prompt_features).sum(-1)

    def _preprocess(self, image: Tensor) -> Tensor:
        for step in self.preprocessing:
            image = step(image)
        return image
