"""Builds, saves and loads the starter's open_clip models.

The token embedding of open_clip has 49,408 rows, more parameters than the rest of the model, and captions of scenes use
fewer than 200 of them. The training therefore uses an embedding of the *known* tokens, plus one row at index 0 that all
other tokens share (the "rest"). The file contains this compact table, and `read_clip` expands it to the full size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CONTEXT = 32
"""Number of tokens; captions are padded or truncated to it."""

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIDE = 128
VOCABULARY = 49_408
_TABLE = "token_embedding.weight"
_TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 2, "mlp_ratio": 2.0}

TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": SIDE, "layers": [2, 2, 2, 1], "width": 16},
    "vit": {"image_size": SIDE, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "pool_type": "avg"},
}
"""Vision towers by name, as `vision_cfg` of open_clip: a ResNet with attention pooling, or a small ViT."""


def architecture(tower: str, embed_dim: int = 128) -> dict[str, Any]:
    """Return the header of a file: `open_clip` (the arguments of `open_clip.CLIP`), `image_size`, `mean`, `std`."""
    parts = {"embed_dim": embed_dim, "vision_cfg": TOWERS[tower], "text_cfg": _TEXT, "init_logit_bias": -10.0}
    return {"open_clip": parts, "image_size": SIDE, "mean": list(MEAN), "std": list(STD)}


@dataclass(frozen=True)
class StarterClip:
    """A model with the compact token embedding of training.

    Attributes:
        model: its token embedding has `len(known) + 1` rows: the rest, then the known tokens.
        known: (n,) int64 token ids of open_clip, ascending. The order matters: open_clip finds the end-of-text token as
            the largest id, and it must be the largest compact id as well.
        config: header of the file, see `architecture`.
    """

    model: CLIP
    known: Tensor
    config: dict[str, Any]

    @property
    def compact(self) -> Tensor:
        """Row of the compact embedding for each token id of open_clip, (49408,) int64."""
        rows = torch.zeros(VOCABULARY, dtype=torch.long)
        rows[self.known] = torch.arange(1, len(self.known) + 1)
        return rows

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters())


def _build(config: dict[str, Any], rows: int = VOCABULARY) -> CLIP:
    parts = config["open_clip"]
    return CLIP(**{**parts, "text_cfg": {**parts["text_cfg"], "vocab_size": rows}})


def new_clip(tower: str, known: Tensor) -> StarterClip:
    """Return an untrained model on the CPU; see `StarterClip` for `known`."""
    config = architecture(tower)
    return StarterClip(_build(config, len(known) + 1), known, config)


def save_clip(clip: StarterClip, path: Path) -> None:
    """Save as float16 safetensors, with the architecture in the header (key `config`, JSON).

    The token embedding is stored as `token_embedding.rows` (n, width), `.ids` (n,) int32 and `.rest` (width,).
    """
    state = {k: v.detach().cpu() for k, v in clip.model.state_dict().items()}
    table = state.pop(_TABLE)
    state |= {"token_embedding.rest": table[0], "token_embedding.rows": table[1:]}
    half = {k: (v.half() if v.is_floating_point() else v).clone().contiguous() for k, v in state.items()}
    half["token_embedding.ids"] = clip.known.to(torch.int32).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path, metadata={"format": "pt", "config": json.dumps(clip.config)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        script = Path(__file__).with_name("train_clip.py")
        raise FileNotFoundError(f"{path} does not exist. Train it first: python {script}")
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    return config, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def read_for_training(path: Path) -> StarterClip:
    """Load a file into a float32 model with the compact token embedding, to continue training."""
    config, state = _read(path)
    known = state.pop("token_embedding.ids").long()
    state[_TABLE] = torch.cat([state.pop("token_embedding.rest")[None], state.pop("token_embedding.rows")])
    clip = StarterClip(_build(config, len(known) + 1), known, config)
    clip.model.load_state_dict(state)
    return clip


def read_clip(path: Path, device: str = "cpu") -> CLIP:
    """Load a file into a frozen float32 `open_clip.CLIP` with the full vocabulary and the token ids of open_clip."""
    config, state = _read(path)
    table = state.pop("token_embedding.rest").repeat(VOCABULARY, 1)
    table[state.pop("token_embedding.ids").long()] = state.pop("token_embedding.rows")
    model = _build(config)
    model.load_state_dict(state | {_TABLE: table})
    return model.requires_grad_(False).eval().to(device)


def normalise(images: Tensor) -> Tensor:
    """Normalize images (B, 3, H, W) in [0, 1] to the input range of the vision tower."""
    return (images - MEAN[0]) / STD[0]
