"""CLIP checkpoint formats, converted to open_clip's state dict; and the compact format of the starter weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_core.errors import WeightsError

_EMBEDDING = "token_embedding"
# Key prefixes added by DataParallel and torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# Integers stored as tensors beside the weights in OpenAI's files.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")

_TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # sic: transformers' spelling
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
}
_BLOCK = {
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}
_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def to_open_clip(checkpoint: Mapping[str, Any], where: str, *, vocabulary: int | None = None) -> dict[str, Tensor]:
    """Convert a checkpoint to an open_clip state dict.

    Supported are checkpoints of open_clip and HPSv2 (flat, or nested under "state_dict" or "model"; with or without the
    key prefixes of DataParallel and torch.compile), OpenAI's state dicts, transformers' CLIPModel, and the compact
    token embedding of the starter weights (see `compact_embedding`).

    Args:
        checkpoint: the contents of the file.
        where: the file, for messages.
        vocabulary: rows V of the full token embedding; required for the compact format.

    Raises:
        WeightsError: the checkpoint has no tensors, is incomplete, or its compact embedding is invalid.
    """
    state = _unwrap(checkpoint, where)
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        state = _from_transformers(state, where)
    for prefix in ("", "text."):
        if f"{prefix}{_EMBEDDING}.rows" in state:
            _expand_embedding(state, prefix + _EMBEDDING, where, vocabulary)
    return state


def compact_embedding(state: Mapping[str, Tensor], ids: Iterable[int]) -> dict[str, Tensor]:
    """Compress a token embedding to the rows of the tokens in use and one shared row for all others.

    Args:
        state: an open_clip state dict with `token_embedding.weight` (V, width), with or without the prefix "text.".
        ids: the n tokens that keep their row; all others share the mean of their rows.

    Returns:
        The state dict with `token_embedding.rows` (n, width), `.ids` (n,) int32 and `.rest` (width,) in place of
        `.weight`.
    """
    key = next(k for k in state if k.endswith(f"{_EMBEDDING}.weight"))
    table, name = state[key], key.removesuffix(".weight")
    kept = torch.tensor(sorted(set(ids)), dtype=torch.int32)
    others = torch.ones(len(table), dtype=torch.bool)
    others[kept.long()] = False
    rest = table[others].float().mean(0).to(table.dtype) if others.any() else torch.zeros_like(table[0])
    compact = {k: v for k, v in state.items() if k != key}
    return {**compact, f"{name}.rows": table[kept.long()].clone(), f"{name}.ids": kept, f"{name}.rest": rest}


def save_clip(
    path: Path,
    state: Mapping[str, Tensor],
    header: Mapping[str, Any],
    *,
    ids: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a weights file whose header stores the architecture.

    Args:
        path: the .safetensors file to write.
        state: an open_clip state dict.
        header: the header for `Architecture.from_header`; further keys are stored as well.
        ids: tokens that keep their embedding, see `compact_embedding`; None stores the full table.
        dtype: storage dtype of floating-point tensors.
    """
    from safetensors.torch import save_file

    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    if ids is not None:
        tensors = compact_embedding(tensors, ids)
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, metadata={"config": json.dumps(header)})


def _unwrap(checkpoint: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without nesting and wrapper prefixes."""
    for nest in ("state_dict", "model"):
        if isinstance(checkpoint.get(nest), Mapping):
            checkpoint = checkpoint[nest]
    state = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor) and k not in _NOT_WEIGHTS}
    if not state:
        raise WeightsError(f"{where} contains no named tensors. Choose a CLIP checkpoint with a state dict.")
    for wrapper in _WRAPPER_PREFIXES:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _from_transformers(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Convert transformers' CLIPModel: rename keys, stack query, key and value into in_proj, transpose projections."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):
            continue
        if key in _PROJECTIONS:
            result[_PROJECTIONS[key]] = value.t().contiguous()  # nn.Linear (out, in) -> matrix (in, out)
            continue
        name = key
        for old, new in _TRANSFORMERS.items():
            if key.startswith(old):
                name = new + key.removeprefix(old)
        for old, new in _BLOCK.items():
            name = name.replace(old, new)
        if ".self_attn.q_proj." in name:
            parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if missing := [part for part in parts if part not in state]:
                raise WeightsError(
                    f"{where} is incomplete: it has {key} but not {', '.join(missing)}. Fetch the file again."
                )
            kind = name.rpartition(".")[2]
            name = name.replace(f".self_attn.q_proj.{kind}", f".attn.in_proj_{kind}")
            shapes = {part: tuple(state[part].shape) for part in parts}
            if len(set(shapes.values())) > 1 or not value.ndim:
                found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
                raise WeightsError(f"{where} is damaged: the shapes do not match: {found}. Fetch the file again.")
            value = torch.cat([state[part] for part in parts])  # (3 * width, width), or (3 * width,) for the bias
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        result[name] = value
    return result


def _expand_embedding(state: dict[str, Tensor], name: str, where: str, vocabulary: int | None) -> None:
    """Replace the compact token embedding in `state` by the full table, (vocabulary, width)."""
    rows = state.pop(f"{name}.rows")
    ids, rest = state.pop(f"{name}.ids", None), state.pop(f"{name}.rest", None)
    if ids is None or rest is None:
        raise WeightsError(
            f"{where}: the compact token embedding needs rows, ids and rest; ids or rest is missing. Fetch the file "
            "again."
        )
    ids = ids.long()
    fits = rows.ndim == 2 and ids.shape == rows.shape[:1] and rest.shape == rows.shape[1:] and vocabulary is not None
    if not fits or (len(ids) > 0 and (int(ids.min()) < 0 or int(ids.max()) >= (vocabulary or 0))):
        raise WeightsError(
            f"{where}: the parts of the compact token embedding do not match: rows {tuple(rows.shape)}, ids "
            f"{tuple(ids.shape)}, rest {tuple(rest.shape)}, for a vocabulary of {vocabulary}. Fetch the file again, or "
            "choose other weights."
        )
    table = rest.expand(vocabulary or 0, -1).clone()
    table[ids] = rows
    state[f"{name}.weight"] = table
