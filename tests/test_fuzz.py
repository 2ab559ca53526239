"""Whatever a run config, a prompt file or an image file contains, it is read or refused with an error of alignprop."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from alignprop_core.config.input import apply_overrides
from alignprop_core.config.load import load_config, resolved_yaml
from alignprop_core.config.sections import RunConfig
from alignprop_core.config.yaml import dump_yaml, read_yaml
from alignprop_core.errors import ConfigError, PromptError, UserError
from alignprop_core.images import read_image
from alignprop_core.prompts import parse_prompts
from alignprop_core.validation import keys_of
from tests.support import toy_rewards

KEYS = sorted(keys_of(RunConfig))
WORDS = ["", "~", "~nobody/x", "$HOME/x", "$nothing", "../..", "\ud83d", "\x00", "x.txt", "./x.py:A", "pipeline:x"]
WORDS += ["hub:a/b/c", "nan", "redness", "a" * 5000, "x.safetensors", "inf", "owner/name"]
TEXTS = st.sampled_from(WORDS) | st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, 2**63, -1]) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers() | st.none(), inner, max_size=3),
    max_leaves=6,
)
BASE: dict[str, Any] = {
    "model": {"base": "owner/name", "loras": [{"path": "a.safetensors"}]},
    "prompts": {"train": ["a fox"], "heldout": [{"prompt": "an owl"}]},
    "rewards": [{"name": "redness", "weight": {0: 1.0}, "options": {"gain": 2.0}}],
    "output": "run",
}
REGISTRY = toy_rewards.registry()
PROPERTIES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}


def holds_for(*strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a property of all values of these strategies."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        PROPERTIES[function.__name__] = function, strategies
        return function

    return register


def put(data: Any, path: list[str], value: object) -> Any:
    """Return data with a value at a path; an index means the first item."""
    if not path:
        return value
    if path[0] == "0":
        return [put(data[0] if isinstance(data, list) and data else {}, path[1:], value)]
    inner = data if isinstance(data, dict) else {}
    return {**inner, path[0]: put(inner.get(path[0]), path[1:], value)}


@holds_for(st.sampled_from(KEYS), VALUES, st.none() | TEXTS)
def config_values(key: str, value: object, extra: str | None) -> None:
    with suppress(UserError):
        config = load_config(put(BASE, [*key.split("."), *([extra] if extra else [])], value), registry=REGISTRY)
        assert load_config(read_yaml(resolved_yaml(config), "written")[0], registry=REGISTRY) == config


@holds_for(VALUES)
def whole_configs(data: Any) -> None:
    with pytest.raises(ConfigError):
        load_config(data if isinstance(data, dict) else {"model": data}, registry=REGISTRY)


@holds_for(
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from(list("{}[]&*!|>%@:-\"'#,? \t\n0<~\ud83d\0é"))), max_size=4)
)
def yaml_texts(changes: list[tuple[int, str]]) -> None:
    text = dump_yaml(BASE)
    for place, character in changes:
        text = text[: place % len(text)] + character + text[place % len(text) :]
    with suppress(UserError):
        load_config(read_yaml(text, "run.yaml")[0] or {}, registry=REGISTRY)


@holds_for(st.sampled_from(KEYS) | TEXTS, TEXTS | st.text("{}[]:,&*!|>'\"- 01.e\n", max_size=12))
def overrides(key: str, value: str) -> None:
    with suppress(UserError):
        changed, _ = apply_overrides(BASE, [f"{key}={value}"])
        load_config(changed, registry=REGISTRY)


LINES = st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value, default=str).encode(errors="replace"))
LINES |= st.dictionaries(st.sampled_from(["prompt", "number"]), VALUES).map(lambda value: json.dumps(value).encode())


@holds_for(
    st.sampled_from(["p.txt", "p.jsonl", "p"]), st.lists(LINES, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\r"])
)
def prompt_files(name: str, lines: list[bytes], ends: bytes) -> None:
    with suppress(PromptError):
        prompts = parse_prompts(name, name, ends.join(lines))
        assert all(prompts.prompts)
        json.dumps([prompts.prompts, prompts.metadata], ensure_ascii=False).encode()


def encoded(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


IMAGES = [encoded("PNG"), encoded("JPEG"), encoded("JPEG", progressive=True), encoded("WEBP"), encoded("TIFF")]
BYTES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6)


@holds_for(st.sampled_from(IMAGES), BYTES, st.none() | st.integers(0, 10_000))
def image_files(content: bytes, changes: list[tuple[int, int]], end: int | None) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        # Headers are short, and where parsers fail.
        damaged[place % (len(content) if place % 2 else min(len(content), 120))] = value
    path = Path(tempfile.gettempdir()) / "alignprop-fuzz.img"
    path.write_bytes(damaged if end is None else damaged[: end % len(damaged)])
    with suppress(UserError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged parts that it skips
        assert read_image(path).shape[2] == 3


@pytest.mark.parametrize("cases", [34, pytest.param(340, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROPERTIES)
def test_input_is_read_or_refused(name: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run = settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
    function, strategies = PROPERTIES[name]
    run(given(*strategies)(function))()
