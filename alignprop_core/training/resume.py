"""Which checkpoint a run resumes from, and whether it would still be the same run. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignprop_core._files import read_table
from alignprop_core.config.load import read_run
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError, PluginError, UserError
from alignprop_core.registry.code_checksum import SCHEME, code_checksum
from alignprop_core.registry.local import LocalReward, split_file_name

STATE = "state.json"
"""The file of a checkpoint that makes a folder one."""

_MAY_DIFFER = {
    "output",
    "save",
    "previews",
    "evaluation",
    "early_stopping",
    "optimizer.spike_threshold",
    "optimizer.max_skipped_steps",
    "training.steps",
    "training.device",
    "training.trackers",
    "training.compile",
    "backprop.sample_batch_size",
    "backprop.decode_batch_size",
    "backprop.checkpoint_steps",
    "backprop.checkpoint_blocks",
    "backprop.checkpoint_decoder",
    "backprop.cuda_graphs",
    "mix.offload",
    "mix.reward_batch_size",
}
"""What a resumed run may change: sections and keys that do not affect training."""

_NOT_READ_AGAIN = {"lora.init_from"}
"""Files that may change: a resumed run takes its adapters from the checkpoint, so they have no effect after step 0."""

_SHOWN = 40
_REMEDY = (
    "Put it back as it was, or start a new run (lora.init_from starts from this run's LoRA). If the change does not "
    "matter, such as a bug fix after which scores mean the same, resume with --edited (from Python: edited=True)."
)


def find_checkpoint(where: Path, config: RunConfig) -> Path:
    """Return the newest checkpoint of a run folder, or the folder itself if it is a checkpoint.

    Args:
        where: the run folder or checkpoint.
        config: of the resumed run.

    Raises:
        UserError: there is none.
        ConfigError: its run had another config, with the keys and both values.
    """
    found = [where] if (where / STATE).is_file() else sorted((where / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(
            f"There is no checkpoint in {where}, so there is nothing to resume. Start the run without --resume, or "
            "give the folder of a run or of one checkpoint."
        )
    run = run_of(found[-1])
    if (run / "config.yaml").is_file():
        _same_run(config, run)
    return found[-1]


def run_of(where: Path) -> Path:
    """Return the run folder of a checkpoint, or the folder itself if it is none."""
    return where.parent.parent if (where / STATE).is_file() else where


def file_checksum(name: str) -> str | None:
    """Return the SHA-256 of the Python file that a reward's name means; None for other names and missing files."""
    parts = split_file_name(name)
    path = None if parts is None else Path(parts[0]).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else None


def check_objects(checkpoint: Path, given: Mapping[str, LocalReward], config: RunConfig) -> None:
    """Raise `PluginError` if the code of a reward passed from Python has changed since the run began.

    Without a checksum, or with one of another version of Python or alignprop, there is nothing to compare.
    """
    before = _environment(checkpoint, "class_sources")
    for i, term in enumerate(config.rewards):
        known, found = str(before.get(term.name)), given.get(term.name)
        if found is not None and known.startswith(SCHEME) and known != code_checksum(found.code):
            what = f'class {found.kind.__qualname__} of the object "{term.name}"'
            what = what if isinstance(found.code, type) else f'function "{term.name}"'
            raise _changed(f"rewards.{i}: the {what}", checkpoint)


def check_files(checkpoint: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `PluginError` if a file that affects training has changed since the run began.

    Args:
        checkpoint: the checkpoint.
        files: key of the run config -> name of a file -> checksum. Keys that the run did not record are not compared.
    """
    before = _environment(checkpoint, "files")
    for key, now in files.items():
        known = _mapping(before.get(key))
        # Nothing is known of a run of an earlier version, of a model that is not here yet, or of weights that this
        # process had read before. The name of a weights file may contain the hub's revision: its content counts.
        same = key.endswith("(weights)") and sorted(known.values()) == sorted(now.values())
        if key in _NOT_READ_AGAIN or not known or not now or same:
            continue
        if changed := [name for name in sorted(known.keys() | now.keys()) if known.get(name) != now.get(name)]:
            raise _changed(f"{key}: {', '.join(changed[:3])}", checkpoint)


def _changed(what: str, checkpoint: Path) -> PluginError:
    return PluginError(
        f"--resume: {what} was changed since the run in {run_of(checkpoint)} began, so this would be another run. "
        f"{_REMEDY}"
    )


def _environment(checkpoint: Path, key: str) -> Mapping[str, Any]:
    """Return a table of the environment.json of a checkpoint's run; empty if there is none."""
    return _mapping(read_table(checkpoint.parent.parent / "environment.json").get(key))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _same_run(config: RunConfig, run: Path) -> None:
    # Settings of a loader may differ as well, for example where an isolated reward's environment is.
    settings = tuple(f"rewards.{i}.{term.loader[0]}." for i, term in enumerate(config.rewards) if term.loader)
    differing = [
        f"{key} (was {_shown(old)}, is {_shown(new)})"
        for key, old, new in _differences(read_run(run), config.model_dump(mode="json"))
        if not (_MAY_DIFFER & {key, key.partition(".")[0]} or key.startswith(settings))
    ]
    if differing:
        several = len(differing) > 1
        raise ConfigError(
            f"--resume: {', '.join(differing)} {'differ' if several else 'differs'} from the run in {run}, "
            f"so this would be another run. Put {'them' if several else 'it'} back, or start a new run "
            "(lora.init_from starts from its LoRA)."
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
