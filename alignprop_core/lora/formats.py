"""LoRA file formats: read and write diffusers' format and kohya's key layout. Needs no model.

diffusers' format names a factor `unet.down_blocks.0...to_q.lora_A.weight` and stores alpha in the header;
kohya's names it `lora_unet_down_blocks_0_..._to_q.lora_down.weight` and stores alpha in a tensor of its own. For a
transformer, ComfyUI does not know such names for all kinds, but diffusers' for all: both formats have the same keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from alignprop_core._files import write_atomic
from alignprop_core.errors import LoraError, complaint
from alignprop_core.locate import find_lora
from alignprop_core.lora.names import PEFT, flatten_name, locate_module
from alignprop_core.lora.originals import diffusers_layers

_KEY = re.compile(
    r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?[._](?:(?P<down>down|A(\.[^.]+)?)|(?P<up>up|B(\.[^.]+)?))\.weight"
    r"|\.(?P<alpha>alpha))"
)
_ADAPTER_NAME = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")
_OTHER_KINDS = {  # parts of keys of what is not a plain LoRA
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "lora_mid": "a LoCon with a core tensor",
    "on_input": "an IA3 adapter",
    "emb_params": "a textual inversion",
    "clip_l": "a textual inversion",
    "clip_g": "a textual inversion",
    "first_stage_model.": "a complete checkpoint",
    "cond_stage_model.": "a complete checkpoint",
    "input_blocks.": "a complete checkpoint or denoiser",
    "down_blocks.": "a complete denoiser",
    "transformer_blocks.": "a complete denoiser",
}

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
"""How peft's initializations start that change the base weights before training; true and "gaussian" do not."""


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
            keys = _by_layer(file, opened.keys())
            tensors = {key: _number(file, key, opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{file} is not a complete safetensors file ({error}). Download it again.") from error

    parts: dict[str, dict[str, Factors]] = {}
    for (component, module), roles in keys.items():
        down, up = tensors[roles["down"]], tensors[roles["up"]]
        alpha = tensors.get(roles.get("alpha", ""), torch.zeros(1))
        small = min(down.ndim, up.ndim) < 2 or not down.numel() or not up.numel() or alpha.numel() != 1
        if small or up.numel() != up.shape[0] * down.shape[0]:
            shapes = ", ".join(f"{key} is {tuple(tensors[key].shape)}" for key in roles.values())
            raise LoraError(f"{file}: the factors of {module} do not fit together: {shapes}.")
        up = up.reshape(*up.shape[:1], *down.shape[:1], *(1 for _ in down.shape[2:]))
        layers = diffusers_layers(module, up.shape[0], down.shape[1])
        # The parts of a joint layer share A and have the rows of B.
        for name, rows in zip(layers, torch.split(up, list(layers.values())), strict=True):
            parts.setdefault(component, {})[name] = Factors(down, rows, float(alpha) / down.shape[0])
    return _with_header_scales(parts, file, header, tensors)


def _by_layer(file: Path, keys: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Return the keys of a plain LoRA by layer, (component, module name), and role: "down", "up" or "alpha"."""
    layers: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key) if key.isprintable() else None
        if match is None:
            kind = next((f" of {kind}" for part, kind in _OTHER_KINDS.items() if part in key), "")
            raise LoraError(
                f"{file}: cannot use the key {ascii(key)[1:-1]}{kind}. Only plain LoRA is read (pairs lora_A and "
                "lora_B, or lora_down and lora_up, with alpha), not DoRA, LoHa, LoKr or biases."
            )
        roles = layers.setdefault(locate_module(match["module"]), {})
        if (other := roles.setdefault(str(match.lastgroup), key)) != key:
            raise LoraError(f"{file}: {other} and {key} are of one layer: separate the LoRAs that it contains.")
    if not any(roles.keys() - {"alpha"} for roles in layers.values()):
        raise LoraError(f"{file}: no LoRA keys.")
    for roles in layers.values():
        if not roles.keys() >= {"down", "up"}:
            raise LoraError(f"{file}: {next(iter(roles.values()))}: its layer has one factor without the other.")
    return layers


def _number(file: Path, key: str, tensor: Tensor) -> Tensor:
    """Return a tensor to compute with: torch has no arithmetic on 8-bit floating-point numbers."""
    whole = tensor.dtype in (torch.int32, torch.int64) and key.endswith(".alpha")
    if not (tensor.is_floating_point() or whole) or "float4" in str(tensor.dtype):
        raise LoraError(f"{file}: {key} is {tensor.dtype}; a LoRA's are floating-point numbers of 8 bits or more.")
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    if not torch.isfinite(tensor).all():
        raise LoraError(f"{file}: {key} contains NaN or infinity: the training that wrote it diverged.")
    return tensor


def _with_header_scales(
    parts: dict[str, dict[str, Factors]], file: Path, header: Mapping[str, str], keys: Iterable[str]
) -> dict[str, dict[str, Factors]]:
    """Return the layers with scales for those without alpha: from diffusers' header, peft's adapter_config.json, or 1.

    Alpha 0 means none, as in kohya's scripts.
    """
    config = file.with_name("adapter_config.json")
    # Keys with an adapter's name are from a network's own state, without settings: other programs read them at scale 1.
    peft = any(config.is_file() or not _ADAPTER_NAME.search(key) for key in keys if key.startswith(PEFT))
    settings: dict[str, dict[str, Any]] = {}
    try:
        text = config.read_text(encoding="utf-8") if peft else header.get("lora_adapter_metadata", "{}")
        for key, value in json.loads(text).items():
            component, setting = locate_module(key)
            settings.setdefault(component, {})[setting] = value
            # peft writes true here if it has converted the adapter.
            if setting == "init_lora_weights" and str(value).lower().startswith(_CHANGE_THE_BASE):
                raise LoraError(
                    f"{file}: {key} is {value}: the adapter was trained on base weights that were changed first, so it "
                    "is wrong on the model's own. Convert it with peft, where the initial adapter was saved: "
                    "model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)."
                )
        for component, layers in parts.items():
            for module, layer in layers.items():
                scale = layer.scale or _scale(settings.get(component, {}), module, layer.rank)
                layers[module] = layer._replace(scale=scale)
    except (OSError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as error:
        where = "its adapter_config.json" if peft else "lora_adapter_metadata in its header"
        raise LoraError(f"{file}: {where} cannot be read ({complaint(error)}), so its scale is unknown.") from error
    return parts


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of a layer as peft computes it."""
    # Files by transformers 5 name CLIP's layers without "text_model".
    names = (module, module.removeprefix("text_model."))
    patterns = (settings.get("alpha_pattern") or {}).items()
    own = (value for key, value in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    alpha = next(own, settings.get("lora_alpha", rank))
    if not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha}")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


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
    rank, layers = _stored(networks, dtype)
    tensors: dict[str, Tensor] = {}
    for name, module, down, up in layers:
        tensors |= {f"{name}.{module}.lora_A.weight": down, f"{name}.{module}.lora_B.weight": up}
    settings: dict[str, Any] = {}
    for name, modules in networks.items():
        settings |= {
            f"{name}.r": rank,
            f"{name}.lora_alpha": rank,
            f"{name}.use_rslora": False,
            f"{name}.rank_pattern": {},
            f"{name}.alpha_pattern": {},
            # peft compares ends of names: these fit CLIP with an outer "text_model" (transformers 4) and without.
            f"{name}.target_modules": sorted(module.removeprefix("text_model.") for module in modules),
        }
    header = {**(metadata or {}), "format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    write_atomic(file, safetensors.torch.save(tensors, metadata=header))


def write_kohya(
    file: Path,
    networks: Mapping[str, Mapping[str, Factors]],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write kohya's key layout, atomically: scale folded into B, alpha = rank as tensors, a modelspec header.

    A transformer's layers have diffusers' names and no alpha, which ComfyUI then takes as scale 1.

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
    rank, layers = _stored(networks, dtype)
    # A single text encoder has no number in this layout.
    encoders = {"text_encoder": "te1" if "text_encoder_2" in networks else "te", "text_encoder_2": "te2"}
    tensors: dict[str, Tensor] = {}
    for name, module, down, up in layers:
        if name == "transformer":  # the names that ComfyUI and diffusers both read, at scale 1
            key = f"{name}.{module}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            continue
        key = f"lora_{encoders.get(name, name)}_{flatten_name(module)}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": file.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        **(metadata or {}),
    }
    plain = safetensors.torch.save(tensors)
    # The hash covers the tensors alone: a safetensors file starts with 8 bytes, the length of the header after them.
    digest = hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    header |= {"format": "pt", "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    write_atomic(file, safetensors.torch.save(tensors, metadata=header))


def _stored(
    networks: Mapping[str, Mapping[str, Factors]], dtype: torch.dtype
) -> tuple[int, list[tuple[str, str, Tensor, Tensor]]]:
    """Return the file's rank, and (network, module name, A, scale * B) of each layer as stored.

    All layers have the largest rank, by zeros at the end of A and B: diffusers takes one alpha for all layers of a file
    in kohya's layout, so only files with one rank have the right scale in every program.
    """
    rank = max(layer.rank for layers in networks.values() for layer in layers.values())
    stored = []
    for name, layers in networks.items():
        for module, layer in layers.items():
            extra = rank - layer.rank
            down = pad(layer.down, [0] * (2 * layer.down.ndim - 1) + [extra])  # pairs, the last dimension first
            up = pad(layer.folded_up(), [0] * (2 * layer.up.ndim - 3) + [extra, 0, 0])
            factors = [factor.detach().to(device="cpu", dtype=dtype).contiguous() for factor in (down, up)]
            if not all(torch.isfinite(factor).all() for factor in factors):
                raise LoraError(f"The change of {module} is too large for {dtype}: lower the strength or weight.")
            stored.append((name, module, factors[0], factors[1]))
    return rank, stored
