"""Random LoRA files: each is read, or refused with one of alignprop's errors, and never with another."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from alignprop_core.errors import AlignpropError
from alignprop_core.lora.files import LoraFile, write_files
from alignprop_core.lora.formats import read_lora
from alignprop_core.lora.layers import fit
from alignprop_core.lora.names import DENOISER
from tests.support.tiny import tiny_sd

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75}
SIZES |= {"I64": 8, "I32": 4, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8, "F99": 4}
STARTS = ["", "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "base_model.model.", "diffusion_model."]
STARTS += ["lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_"]
MODULES = ["mid_block.attentions.0.proj_in", "mid_block_attentions_0_proj_in", "encoder.layers.0.self_attn.to_q"]
MODULES += ["middle_block_1_proj_in", "input_blocks.99.1.proj_in", "attn1.processor.to_out", "conv_in", "a", ".", "_"]
PAIRS = [(".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight")]
PAIRS += [(".lora.down.weight", ".lora.up.weight"), (".lora_down.weight", ".lora_up.weight")]
ENDS = [*(end for pair in PAIRS for end in pair), ".alpha", ".dora_scale", ".hada_w1_a", ".weight"]
SHAPES = [((2, 32), (32, 2)), ((2, 32), (32, 2, 1, 1)), ((2, 32, 1, 1), (32, 2, 1, 1)), ((2, 32, 3, 3), (32, 2, 1, 1))]
SHAPES += [((2, 288), (32, 2)), ((1, 1), (1, 1)), ((2, 32), (32, 3)), ((0, 32), (32, 0)), ((2,), (2, 2))]
ALPHAS = [None, None, ("F32", ()), ("BF16", (1,)), ("I64", ()), ("F8_E4M3", ()), ("C64", ()), ("F32", (2,))]
LAYERS = list(
    product(STARTS, MODULES, PAIRS, SHAPES, ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "F4"], ALPHAS)
)
NUMBERS = ["1", "0", "-3.5", "true", "null", '"x"', "[]", "{}", "NaN", "1e999", "1" + "0" * 400]
SETTINGS = [f'{{"{start}lora_alpha": {number}}}' for start, number in product(STARTS, NUMBERS)]
SETTINGS += [
    f'{{"{start}lora_alpha": 2, "{start}use_rslora": 1, "{start}alpha_pattern": {{"{pattern}": {number}}}}}'
    for start, pattern, number in product(STARTS, [".*", "(", "(?i)a", "proj_in"], NUMBERS)
]
SETTINGS += ["[" * 50_000, *NUMBERS]

# By number: `sampled_from` hashes a long list again and again.
layers = st.lists(st.integers(0, len(LAYERS) - 1).map(LAYERS.__getitem__), min_size=1, max_size=2)
texts = st.one_of(st.integers(0, len(SETTINGS) - 1).map(SETTINGS.__getitem__), st.text(max_size=20))
odd = st.tuples(
    st.builds(str.__add__, st.text(max_size=8), st.sampled_from(ENDS)),
    st.sampled_from(list(SIZES)),
    st.lists(st.sampled_from([0, 1, 2, 3]), max_size=5),
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file with layers that mostly fit together and now and then an odd key, damaged, or random bytes."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.binary(max_size=200))
    tensors: dict[str, tuple[str, Sequence[int]]] = {}
    for start, module, ends, (down, up), dtype, alpha in draw(layers):
        tensors |= {f"{start}{module}{ends[0]}": (dtype, down), f"{start}{module}{ends[1]}": (dtype, up)}
        if alpha is not None:
            tensors[f"{start}{module}.alpha"] = alpha
    if kind in (1, 2):
        key, dtype, shape = draw(odd)
        tensors[key] = dtype, shape
    entries: dict[str, Any] = {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        size = int(math.prod(shape) * SIZES[dtype])
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if kind > 14:
        entries["__metadata__"] = {"lora_adapter_metadata": draw(texts)}
    header = json.dumps(entries).encode()
    # One byte in all places makes all kinds of numbers: below 64 ordinary ones, above also NaN and infinity.
    fill = draw(st.integers(0, 63 if kind > 5 else 255))
    content = struct.pack("<Q", len(header)) + header + bytes([fill]) * end
    return content[: draw(st.integers(0, len(content)))] if kind == 3 else content


UNET = tiny_sd().unet


def check(folder: Path, content: bytes, config: str | None) -> bool:
    """Read a file, fit it to a model and write it again in both formats; returns whether it was read."""
    file = folder / "odd.safetensors"
    file.write_bytes(content)
    (folder / "adapter_config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(config, encoding="utf-8", errors="surrogatepass")
    with suppressed(file):
        parts = read_lora(file)
        for part in parts.values():
            for layer in part.values():
                assert layer.change().shape == (layer.up.shape[0], *layer.down.shape[1:])
        with suppressed(file):
            fit(parts.get(DENOISER, {}), UNET, file)
        if DENOISER in parts:
            with suppressed("is too large for"):
                for path in write_files(LoraFile(parts), folder / "written", "again"):
                    read_lora(path)
        return True
    return False


@contextmanager
def suppressed(words: str | Path) -> Iterator[None]:
    """Allow alignprop's errors whose one line contains the words."""
    try:
        yield
    except AlignpropError as error:
        message = str(error)
        if str(words) not in message or "\n" in message:
            raise AssertionError(f"unclear: {message}") from error


def fuzz(folder: Path, examples: int) -> int:
    read = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=files(), config=st.one_of(st.none(), texts))
    def one(content: bytes, config: str | None) -> None:
        nonlocal read
        read += check(folder, content, config)

    one()
    return read


def test_random_files_are_read_or_refused(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 200) > 40, "some of them are LoRAs"


@pytest.mark.slow
def test_thousands_of_random_files_are_read_or_refused(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 2000) > 400
