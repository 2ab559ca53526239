"""The formats CLIP weights come in, brought to open_clip's own keys; and the compact one that starter weights use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_core.errors import WeightsError

_EMBEDDING = "token_embedding"
# What training scripts put before the names: DataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
# What OpenAI's files hold beside the weights, and transformers' old ones.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")

_TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # transformers' own spelling
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


def to_open_clip(found: Mapping[str, Any], where: str, *, vocabulary: int | None = None) -> dict[str, Tensor]:
    """Bring a checkpoint to open_clip's keys.

    Taken are open_clip's checkpoints (nested under "state_dict" or "model", with "module." before the names), HPSv2's,
    OpenAI's tensors, transformers' CLIPModel, and the compact token embedding of starter weights.

    Args:
        found: what the file holds.
        where: the file, for messages.
        vocabulary: rows of the full token embedding; needed for the compact one.

    Raises:
        WeightsError: there are no tensors in it, or a compact embedding does not fit.
    """
    state = _plain(found, where)
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        state = _from_transformers(state, where)
    for prefix in ("", "text."):
        if f"{prefix}{_EMBEDDING}.rows" in state:
            _expand(state, prefix + _EMBEDDING, where, vocabulary)
    return state


def compact_embedding(state: Mapping[str, Tensor], ids: Iterable[int]) -> dict[str, Tensor]:
    """Store a token embedding as the rows of the tokens in use and one row for all others.

    Args:
        state: an open_clip state dict with `token_embedding.weight` (V, width), with or without "text." before it.
        ids: tokens that keep their own row; the others share their mean.

    Returns:
        The state dict with `token_embedding.rows` (n, width), `.ids` (n,) int32 and `.rest` (width,) in its place.
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
    """Write a weights file that says its own architecture.

    Args:
        path: a .safetensors file.
        state: an open_clip state dict.
        header: what `Architecture.from_header` takes; more keys may stand beside them.
        ids: tokens whose embeddings are kept, see `compact_embedding`; None keeps the whole table.
        dtype: floating-point tensors are stored so.
    """
    from safetensors.torch import save_file

    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    if ids is not None:
        tensors = compact_embedding(tensors, ids)
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, metadata={"config": json.dumps(header)})


def _plain(found: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Take the tensors out of what they are nested in, and wrappers' names off them."""
    for nest in ("state_dict", "model"):
        if isinstance(found.get(nest), Mapping):
            found = found[nest]
    state = {k: v for k, v in found.items() if isinstance(v, Tensor) and k not in _NO_WEIGHTS}
    if not state:
        raise WeightsError(f"{where} holds no tensors by name; a CLIP checkpoint is a state dict.")
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _from_transformers(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename transformers' CLIPModel; query, key and value become one matrix, projections are transposed."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):
            continue
        if key in _PROJECTIONS:
            result[_PROJECTIONS[key]] = value.t().contiguous()
            continue
        name = key
        for old, new in _TRANSFORMERS.items():
            if key.startswith(old):
                name = new + key.removeprefix(old)
        for old, new in _BLOCK.items():
            name = name.replace(old, new)
        if ".self_attn.q_proj." in name:
            parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if lacking := [part for part in parts if part not in state]:
                raise WeightsError(f"{where} is not whole: it has {key} but lacks {', '.join(lacking)}.")
            kind = name.rpartition(".")[2]
            name = name.replace(f".self_attn.q_proj.{kind}", f".attn.in_proj_{kind}")
            value = torch.cat([state[part] for part in parts])
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        result[name] = value
    return result


def _expand(state: dict[str, Tensor], name: str, where: str, vocabulary: int | None) -> None:
    """Write the full token embedding in place of the compact one."""
    rows = state.pop(f"{name}.rows")
    ids, rest = state.pop(f"{name}.ids", None), state.pop(f"{name}.rest", None)
    if ids is None or rest is None:
        raise WeightsError(f"{where}: a compact token embedding is rows, ids and rest; ids or rest is missing.")
    ids = ids.long()
    fits = rows.ndim == 2 and ids.shape == rows.shape[:1] and rest.shape == rows.shape[1:] and vocabulary is not None
    if not fits or (len(ids) > 0 and (int(ids.min()) < 0 or int(ids.max()) >= (vocabulary or 0))):
        raise WeightsError(
            f"{where}: its compact token embedding does not fit: rows {tuple(rows.shape)}, ids {tuple(ids.shape)}, "
            f"rest {tuple(rest.shape)}, for a vocabulary of {vocabulary}."
        )
    table = rest.expand(vocabulary or 0, -1).clone()
    table[ids] = rows
    state[f"{name}.weight"] = table
