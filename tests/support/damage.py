"""Random damage to the files of a model: JSON values and weights changed, renamed, removed, cut off."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
NUMBERS = [0, -1, 1, 2, 3, 5, 17, 0.0, 0.5, -2.5, 1e30, float("nan"), float("inf"), True, False]
WORDS = ["", "x", "a" * 300, "\ud83d", "\x00", "../..", "diffusers", "transformers", "torch", "os", "linear", "none"]
WORDS += ["UNet2DConditionModel", "CLIPTextModel", "CLIPTokenizer", "DDIMScheduler", "AutoencoderTiny", "system"]
ODD: list[Any] = [None, None, *NUMBERS, *WORDS, [], {}, [None], [0], [-1, 2], ["x"], [[]], [1, 2, 3, 4], {"x": 1}]
ODD += [{"0": None}, ["diffusers", "x"], [None, None], ["os", "system"], ["diffusers", "models"], [["a"], {"b": 0}]]
"""Values small enough that a network or an image of such a size takes no time."""

Weights = list[tuple[str, str, list[int], bytes]]
"""Name, dtype, shape and content of each tensor."""

Change = bytes | None
"""A file's new content; None removes it."""


def read_weights(content: bytes) -> tuple[Weights, dict[str, Any]]:
    """Return the tensors of a safetensors file, and its metadata."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__", {})
    return [(n, e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()], metadata


def written(weights: Weights, metadata: Mapping[str, Any]) -> bytes:
    """Return a safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape, data in weights:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in weights)


def change_json(draw: st.DrawFn, value: Any) -> Any:
    """Change a value somewhere inside of a parsed JSON file."""
    listed = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = list(islice(listed, 200))
    if not inner or draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(ODD))
    key, old = draw(st.sampled_from(inner))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        new = old
        key = f"{key}_" if isinstance(value, dict) else key
    elif kind == 1:
        new = draw(st.sampled_from(inner))[1]
    else:
        new = change_json(draw, old)
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != key or kind != 2}
        return kept if kind == 2 else kept | {key: new}
    return [new if k == key else v for k, v in enumerate(value) if k != key or kind != 2]


def change_weights(draw: st.DrawFn, content: bytes) -> bytes:
    """Change a tensor of a safetensors file, or its metadata."""
    weights, metadata = read_weights(content)
    if "config" in metadata and draw(st.booleans()):
        return written(weights, metadata | {"config": json.dumps(change_json(draw, json.loads(metadata["config"])))})
    place = draw(st.integers(0, len(weights) - 1))
    name, dtype, shape, data = weights[place]
    kind = draw(st.integers(0, 7))
    if kind == 0:
        del weights[place]
    elif kind == 1:
        other = draw(st.sampled_from([f"x.{name}", name[2:], name.replace("weight", "bias"), "x", ""]))
        weights[place] = (other, dtype, shape, data)
    elif kind in (2, 3, 4):
        shapes = [shape[:-1], [*shape, 1], [1, *shape], shape[::-1], [0, *shape[1:]], [n + 1 for n in shape], []]
        shape = draw(st.sampled_from(shapes))
        if kind == 3:
            dtype = draw(st.sampled_from(list(SIZES)))
        size = prod(shape) * SIZES[dtype]
        weights[place] = (name, dtype, shape, (data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\0"))
    elif kind == 5:
        dtype = draw(st.sampled_from(list(SIZES)))
        size = prod(shape) * SIZES[dtype]
        weights[place] = (name, dtype, shape, bytes([draw(st.sampled_from([0, 60, 255]))]) * size)
    elif kind == 6:  # as a file of another model has other names
        weights = weights[:place] + [(f"{name}.{n}", d, s, b) for n, d, s, b in weights[place:]]
    else:
        return content[: draw(st.sampled_from([0, 4, 9, 100, len(content) // 2, len(content) - 1]))]
    return written(weights, metadata)


@st.composite
def damage(draw: st.DrawFn, files: Mapping[str, bytes]) -> dict[str, Change]:
    """Draw changed contents of one or two of the files; None removes one."""
    changed: dict[str, Change] = {}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        content, kind = files[name], draw(st.integers(0, 19))
        if kind == 0:
            changed[name] = None
        elif kind == 1:
            changed[name] = draw(
                st.sampled_from([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"<html>", b"GGUF", b"{" * 9])
            )
        elif name.endswith(".json"):
            text = json.dumps(change_json(draw, json.loads(content)))
            changed[name] = text.encode() if kind > 2 else text.encode()[: draw(st.integers(0, 300))]
        else:
            changed[name] = change_weights(draw, content)
    return changed


def contents(folder: Path) -> dict[str, bytes]:
    """Return the JSON and weights files of a folder by name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def changed(folder: Path, files: Mapping[str, bytes], changes: Mapping[str, Change]) -> Iterator[None]:
    """Change files of a folder inside the block, and restore them."""
    try:
        for name, content in changes.items():
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        yield
    finally:
        for name in changes:
            (folder / name).write_bytes(files[name])
