"""Renames keys of run folders that older versions wrote, so that everything else knows only today's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SECTIONS = {"samples": "previews", "guards": "early_stopping"}
_KEYS = {
    "lora": {"targets": "target_modules", "rank_stabilized": "use_rslora"},
    "early_stopping": {
        "watch": "monitor",
        "drift_limit": "max_drift",
        "diversity_floor": "min_diversity",
        "keep_best": "restore_best",
    },
}
_MOVED = {
    ("early_stopping", "explosion"): ("optimizer", "spike_threshold"),
    ("early_stopping", "max_dropped_steps"): ("optimizer", "max_skipped_steps"),
    ("training", "checkpoint_every"): ("save", "state_every"),
    ("training", "keep_checkpoints"): ("save", "state_keep"),
}
_STEP = {"reward": "total", "dropped": "skipped"}
_TERM = {"held": "saturated"}


def config_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run config with today's names of sections and keys; values are not checked."""
    found = renamed(config, _SECTIONS)
    for section, names in _KEYS.items():
        if isinstance(known := found.get(section), Mapping):
            found[section] = renamed(known, names)
    for (section, key), (other, name) in _MOVED.items():
        source, target = found.get(section), found.get(other, {})
        if isinstance(source, Mapping) and key in source and isinstance(target, Mapping):
            found[section] = {known: value for known, value in source.items() if known != key}
            found[other] = {name: source[key], **target}
    previews = found.get("previews")
    if isinstance(previews, Mapping) and "seed" in previews:
        previews = dict(previews)
        previews.setdefault("seeds", [previews.pop("seed")])
        found["previews"] = previews
    stopping = found.get("early_stopping")
    if isinstance(stopping, Mapping):
        stopping = dict(stopping)
        if stopping.get("monitor") == "reward":
            stopping["monitor"] = "total"
        if isinstance(lower := stopping.pop("lower_is_better", None), bool):
            stopping.setdefault("mode", "min" if lower else "max")
        found["early_stopping"] = stopping
    return found


def step_today(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's line of metrics.jsonl with today's keys."""
    found = renamed(row, _STEP)
    if isinstance(terms := found.get("terms"), Mapping):
        found["terms"] = {
            label: renamed(term, _TERM) if isinstance(term, Mapping) else term for label, term in terms.items()
        }
    return found


def evaluation_today(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's statistics, from a line of metrics.jsonl, with today's keys."""
    return renamed(row, {"reward": "total"})


def renamed(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy with keys renamed, in their order; where both names are present, today's wins."""
    if not any(key in data for key in names):
        return dict(data)
    return {names.get(key, key): value for key, value in data.items() if names.get(key) not in data}
