"""The starter's open_clip models: building, and the file they are kept in.

open_clip's token embedding has 49,408 rows, far more than everything else here together, and the starter world needs
under two hundred of them. So training uses a table of the *known* tokens alone, with one row more, at index 0, that
every other token shares ("rest"); the file keeps this table, and `read_clip` spreads it over open_clip's own size.
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
"""Tokens a caption is padded or cut to."""

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIDE = 128
VOCABULARY = 49_408
_TABLE = "token_embedding.weight"
_TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 2, "mlp_ratio": 2.0}

TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": SIDE, "layers": [2, 2, 2, 1], "width": 16},
    "vit": {"image_size": SIDE, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "pool_type": "avg"},
}
"""Vision towers by name, as open_clip's `vision_cfg`: its ResNet with attention pooling, or a small ViT."""


def architecture(tower: str, embed_dim: int = 128) -> dict[str, Any]:
    """What a file's header says: ``open_clip`` (the arguments of `open_clip.CLIP`), ``image_size``, ``mean``,
    ``std``."""
    parts = {"embed_dim": embed_dim, "vision_cfg": TOWERS[tower], "text_cfg": _TEXT, "init_logit_bias": -10.0}
    return {"open_clip": parts, "image_size": SIDE, "mean": list(MEAN), "std": list(STD)}


@dataclass(frozen=True)
class StarterClip:
    """A model with the token table of training.

    Attributes:
        model: its token table has ``len(known) + 1`` rows: the rest, then the known tokens.
        known: (n,) int64 token ids in open_clip's numbering, ascending, so that the end-of-text token, which open_clip
            finds as the largest id, is the largest here too.
        config: the header of its file, see `architecture`.
    """

    model: CLIP
    known: Tensor
    config: dict[str, Any]

    @property
    def compact(self) -> Tensor:
        """(49408,) int64: row of the model's table for each of open_clip's token ids."""
        rows = torch.zeros(VOCABULARY, dtype=torch.long)
        rows[self.known] = torch.arange(1, len(self.known) + 1)
        return rows

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters())


def _build(config: dict[str, Any], rows: int = VOCABULARY) -> CLIP:
    parts = config["open_clip"]
    return CLIP(**{**parts, "text_cfg": {**parts["text_cfg"], "vocab_size": rows}})


def new_clip(tower: str, known: Tensor) -> StarterClip:
    """An untrained model on the CPU; `known` as in `StarterClip`."""
    config = architecture(tower)
    return StarterClip(_build(config, len(known) + 1), known, config)


def save_clip(clip: StarterClip, path: Path) -> None:
    """Write float16 safetensors with the architecture in the header (key ``config``, JSON) and the token table in
    three tensors: ``token_embedding.rows`` (n, width), ``.ids`` (n,) int32 and ``.rest`` (width,)."""
    state = {k: v.detach().cpu() for k, v in clip.model.state_dict().items()}
    table = state.pop(_TABLE)
    state |= {"token_embedding.rest": table[0], "token_embedding.rows": table[1:]}
    half = {k: (v.half() if v.is_floating_point() else v).clone().contiguous() for k, v in state.items()}
    half["token_embedding.ids"] = clip.known.to(torch.int32).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path, metadata={"format": "pt", "config": json.dumps(clip.config)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; train it first: python -m alignprop_starter.make.train_clip")
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return config, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def read_for_training(path: Path) -> StarterClip:
    """Read a file into a float32 model with the short token table, ready to go on training."""
    config, state = _read(path)
    known = state.pop("token_embedding.ids").long()
    state[_TABLE] = torch.cat([state.pop("token_embedding.rest")[None], state.pop("token_embedding.rows")])
    clip = StarterClip(_build(config, len(known) + 1), known, config)
    clip.model.load_state_dict(state)
    return clip


def read_clip(path: Path, device: str = "cpu") -> CLIP:
    """Read a file into a frozen float32 `open_clip.CLIP` of full vocabulary: it takes open_clip's own token ids."""
    config, state = _read(path)
    table = state.pop("token_embedding.rest").repeat(VOCABULARY, 1)
    table[state.pop("token_embedding.ids").long()] = state.pop("token_embedding.rows")
    model = _build(config)
    model.load_state_dict(state | {_TABLE: table})
    return model.requires_grad_(False).eval().to(device)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) images in [0, 1] to what the vision tower takes."""
    return (images - MEAN[0]) / STD[0]
