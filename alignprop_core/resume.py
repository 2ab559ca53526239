"""Which checkpoint a run goes on from, and whether it would still be the same run. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignprop_core.config import RunConfig
from alignprop_core.config_yaml import read_yaml
from alignprop_core.errors import ConfigError, UserError

STATE = "state.json"
"""The file of a checkpoint that makes a folder one."""

_MAY_DIFFER = {
    "output",
    "save",
    "samples",
    "evaluation",
    "guards",
    "training.steps",
    "training.device",
    "training.trackers",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "backprop.sample_batch_size",
    "backprop.decode_batch_size",
}
"""What a resumed run may change: sections and keys that do not touch what is trained."""

_ISOLATION = re.compile(r"rewards\.\d+\.isolation\.\w+")
"""And where an isolated reward's environment lies, and what its worker may take: an environment may be moved."""

_SHOWN = 40


def find_checkpoint(where: Path, config: RunConfig) -> Path:
    """Return the newest checkpoint of a run folder, or the folder itself if it is a checkpoint.

    Raises:
        UserError: there is none.
        ConfigError: its run had another config, with the keys and both values.
    """
    found = [where] if (where / STATE).is_file() else sorted((where / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(
            f"There is no checkpoint in {where}: nothing to resume. Start the run without --resume, or give the folder "
            "of a run or of one checkpoint."
        )
    stored = found[-1].parent.parent / "config.yaml"
    if stored.is_file():
        _same_run(config, stored)
    return found[-1]


def _same_run(config: RunConfig, stored: Path) -> None:
    before, _ = read_yaml(stored.read_text(encoding="utf-8"), str(stored))
    differing = [
        f"{key} (was {_shown(old)}, is {_shown(new)})"
        for key, old, new in _differences(before, config.model_dump(mode="json"))
        if not (_MAY_DIFFER & {key, key.partition(".")[0]} or _ISOLATION.fullmatch(key))
    ]
    if differing:
        several = len(differing) > 1
        raise ConfigError(
            f"--resume: {', '.join(differing)} {'differ' if several else 'differs'} from the run in {stored.parent}, "
            f"so this would be another run. Put {'them' if several else 'it'} back, or start a new run "
            "(lora.init_from goes on from its LoRA)."
        )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys in which two configs differ, with both values; a key that is missing counts as null."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(str(name), old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys(), key=str)]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(str(i), one, other) for i, (one, other) in enumerate(zip(old, new, strict=True))]
    else:
        if old != new:
            yield key, old, new
        return
    for name, one, other in parts:
        yield from _differences(one, other, f"{key}.{name}" if key else name)


def _shown(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
