"""LoRA file formats: read and write diffusers' format and kohya's key layout. Needs no model.

diffusers' format names a factor `unet.down_blocks.0...to_q.lora_A.weight` and stores alpha in the header;
kohya's names it `lora_unet_down_blocks_0_..._to_q.lora_down.weight` and stores alpha in a tensor of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignprop_core._files import write_atomic
from alignprop_core.errors import LoraError
from alignprop_core.locate import find_lora

DENOISER = "denoiser"
_COMPONENTS = {
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
_KOHYA_COMPONENTS = {
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PEFT = "base_model.model."  # peft's own files
_FACTOR = re.compile(r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<role>A|B|down|up)\.weight")

# Module names that contain an underscore: kohya's flattened names use it in place of dots, too.
_COMPOUNDS = re.findall(
    r"\w+",
    """down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks ff_context
    to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj proj_in proj_out proj_mlp
    conv_in conv_out conv_shortcut linear_1 linear_2 time_embedding add_embedding time_emb_proj time_text_embed
    timestep_embedder guidance_embedder text_embedder context_embedder x_embedder pos_embed norm_out norm1_context
    encoder_hid_proj text_model self_attn q_proj k_proj v_proj out_proj text_projection""",
)
_FLATTENED = re.compile(  # whole parts between dots, the longest first
    r"(?<![^.])(" + "|".join(sorted((c.replace("_", r"\.") for c in _COMPOUNDS), key=len, reverse=True)) + r")(?![^.])"
)


class Factors(NamedTuple):
    """The weight change of one layer, scale * B A.

    Attributes:
        down: A, (rank, in, *kernel).
        up: B, (out, rank, *ones).
        scale: alpha / rank, or alpha / sqrt(rank) with rank-stabilized scaling.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the change: number of rows of A."""
        return int(self.down.shape[0])

    def folded_up(self) -> Tensor:
        """Return scale * B, (out, rank, *ones), in float64."""
        return self.up.double() * self.scale

    def change(self) -> Tensor:
        """Return the weight change, (out, in, *kernel), in float64."""
        # A convolution's A contains the whole kernel and its B is 1x1, so the change is one matrix product.
        product = self.folded_up().flatten(1) @ self.down.double().flatten(1)
        return product.reshape(self.up.shape[0], *self.down.shape[1:])


def flatten_name(module: str) -> str:
    """Return kohya's name of a module: `down_blocks.0.attn1.to_q` -> `down_blocks_0_attn1_to_q`."""
    return module.replace(".", "_")


def unflatten_name(flat: str) -> str:
    """Return the inverse of `flatten_name`, for modules of diffusers' denoisers and CLIP text encoders."""
    return _FLATTENED.sub(lambda match: match[0].replace(".", "_"), flat.replace("_", "."))


def read_lora(path: str | Path) -> dict[str, dict[str, Factors]]:
    """Read a LoRA of either format.

    The scale of a layer comes from its alpha tensor, else from diffusers' header or peft's adapter_config.json, else it
    is 1.

    Args:
        path: a file, a LoRA folder or a run folder.

    Returns:
        {component: {module name: Factors}}, on the CPU in the file's dtype. Components are "denoiser", "text_encoder"
        and "text_encoder_2".

    Raises:
        LoraError: the file is missing, pickled, damaged or empty, contains NaN or infinity, or is not a plain LoRA.
    """
    file = find_lora(path)
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{file} is not a complete safetensors file ({error}). Copy or save it again.") from error

    down: dict[tuple[str, str], Tensor] = {}
    up: dict[tuple[str, str], Tensor] = {}
    alpha: dict[tuple[str, str], float] = {}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LoraError(f"{file}: {key} contains NaN or infinity: the training that wrote it diverged.")
        if match := _FACTOR.fullmatch(key):
            (down if match["role"] in ("A", "down") else up)[_place(match["module"])] = tensor
        elif key.endswith(".alpha") and tensor.numel() == 1:
            alpha[_place(key.removesuffix(".alpha"))] = float(tensor)
        else:
            raise LoraError(
                f"{file}: cannot use the key {key}. Only plain LoRA is read (pairs lora_A and lora_B, or lora_down and "
                "lora_up, with alpha), not DoRA, LoHa, LoKr or biases."
            )
    if not down or down.keys() != up.keys():
        odd = sorted(module for _, module in down.keys() ^ up.keys())
        raise LoraError(f"{file}: " + (f"{odd[0]} has one factor without the other." if odd else "no LoRA keys."))

    settings = _settings(file, header, peft=any(key.startswith(_PEFT) for key in tensors))
    parts: dict[str, dict[str, Factors]] = {}
    for place, a in down.items():
        component, module = place
        if up[place].ndim != a.ndim or up[place].shape[1] != a.shape[0] or a.shape[0] == 0:
            raise LoraError(f"{file}: the factors of {module} do not fit together: {a.shape} and {up[place].shape}.")
        if alpha.get(place):  # kohya: none or zero means alpha = rank
            scale = alpha[place] / a.shape[0]
        else:
            scale = _header_scale(settings.get(component, {}), module, a.shape[0])
        parts.setdefault(component, {})[module] = Factors(a, up[place], scale)
    return parts


def _place(module: str) -> tuple[str, str]:
    """Return the (component, module name) of a key."""
    for prefix, component in _KOHYA_COMPONENTS.items():
        if module.startswith(prefix):
            return component, unflatten_name(module.removeprefix(prefix))
    component, module = DENOISER, module.removeprefix(_PEFT)  # no component: saved from the denoiser alone
    for prefix, named in _COMPONENTS.items():
        if module.startswith(prefix):
            component, module = named, module.removeprefix(prefix)
            break
    if ".processor." in module:  # diffusers before 0.22: attn1.processor.to_q_lora.down
        module = re.sub(r"\.to_out$", ".to_out.0", module.replace(".processor.", "."))
    return component, module


def _settings(file: Path, header: Mapping[str, str], *, peft: bool) -> dict[str, dict[str, Any]]:
    """Return {"denoiser": {"lora_alpha": 16, ...}, ...} from the header, or from peft's adapter_config.json."""
    try:
        if peft:
            return {DENOISER: json.loads(file.with_name("adapter_config.json").read_text(encoding="utf-8"))}
        settings: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(header.get("lora_adapter_metadata", "{}")).items():
            component, setting = _place(key)
            settings.setdefault(component, {})[setting] = value
        return settings
    except (OSError, ValueError, AttributeError) as error:
        where = "its adapter_config.json" if peft else "lora_adapter_metadata in its header"
        raise LoraError(f"{file}: {where} cannot be read ({error}), so its scale is unknown.") from error


def _header_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of a layer as peft computes it from its settings; 1 if there are none."""
    if "lora_alpha" not in settings:
        return 1.0
    alpha = float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def write_diffusers(
    file: Path,
    networks: Mapping[str, Mapping[str, Factors]],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write diffusers' format, atomically: scale folded into B, alpha = rank in the header.

    The header contains only settings that every version of peft knows, so that older ones read the file too.

    Args:
        file: the file.
        networks: network -> module name -> factors; networks have their names in the pipeline: "unet" or "transformer",
            "text_encoder", "text_encoder_2".
        metadata: further entries of the header.
        dtype: dtype of the stored tensors.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, layers in networks.items():
        for module, layer in layers.items():
            tensors[f"{name}.{module}.lora_A.weight"] = _stored(layer.down, dtype)
            tensors[f"{name}.{module}.lora_B.weight"] = _stored(layer.folded_up(), dtype)
        # peft's settings name the most frequent rank; layers with another one are listed as patterns.
        rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
        others = {f"^{re.escape(module)}": layer.rank for module, layer in layers.items() if layer.rank != rank}
        settings |= {
            f"{name}.r": rank,
            f"{name}.lora_alpha": rank,
            f"{name}.use_rslora": False,
            f"{name}.rank_pattern": others,
            f"{name}.alpha_pattern": others,
            f"{name}.target_modules": sorted(layers),
        }
    packed = json.dumps(settings, sort_keys=True)
    header = {**(metadata or {}), "format": "pt", "lora_adapter_metadata": packed}
    write_atomic(file, safetensors.torch.save(tensors, metadata=header))


def write_kohya(
    file: Path,
    networks: Mapping[str, Mapping[str, Factors]],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write kohya's key layout, atomically: scale folded into B, alpha = rank as tensors, a modelspec header.

    The header follows https://github.com/Stability-AI/ModelSpec; ComfyUI, A1111 and Forge read such files.

    Args:
        file: the file.
        networks: network -> module name -> factors; networks have their names in the pipeline: "unet" or "transformer",
            "text_encoder", "text_encoder_2".
        metadata: entries that override the header's (`modelspec.title`, `modelspec.architecture`, ...).
        dtype: dtype of the stored tensors.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    # A single text encoder has no number in this layout.
    encoders = {"text_encoder": "te1" if "text_encoder_2" in networks else "te", "text_encoder_2": "te2"}
    ranks: set[int] = set()
    for name, layers in networks.items():
        for module, layer in layers.items():
            key = f"lora_{encoders.get(name, name)}_{flatten_name(module)}"
            tensors[f"{key}.lora_down.weight"] = _stored(layer.down, dtype)
            tensors[f"{key}.lora_up.weight"] = _stored(layer.folded_up(), dtype)
            tensors[f"{key}.alpha"] = torch.tensor(float(layer.rank), dtype=dtype)
            ranks.add(layer.rank)
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": file.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        **(metadata or {}),
    }
    plain = safetensors.torch.save(tensors)
    # The hash covers the tensors alone: a safetensors file starts with 8 bytes, the length of the header after them.
    digest = hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    header |= {"format": "pt", "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    write_atomic(file, safetensors.torch.save(tensors, metadata=header))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()
