"""Reads run folders without trusting them: files may be missing, older, incomplete or edited by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignprop_core.config.yaml import read_yaml
from alignprop_core.errors import OutputError
from alignprop_core.runs.metrics import STOPPED
from alignprop_report.older_names import config_today, evaluation_today, step_today

_SHOWN = 5


@dataclass(frozen=True)
class Run:
    """A run folder's content.

    Attributes:
        path: the folder, absolute.
        config_text: config.yaml, unchanged.
        config: the same, parsed, with today's names of keys; values are not checked.
        environment: environment.json; empty if missing.
        steps: the lines of steps in metrics.jsonl, by step, with today's keys; the later one of a repeated step.
        evaluations: the lines of evaluations while training, by step, each with its `step`.
        stopped: why it stopped before its last step, from the last line of metrics.jsonl; None if it did not.
        comparison: evaluation.json; None if missing.
        curves: name -> content of strengths.json and soup.json, if present.
        problems: one sentence for each file or line that could not be read.
    """

    path: Path
    config_text: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    stopped: str | None = None
    comparison: Mapping[str, Any] | None = None
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name or str(self.path)

    @property
    def rewards(self) -> list[Mapping[str, Any]]:
        """The terms trained on, as the config has them."""
        return mappings(self.config.get("rewards"))

    @property
    def labels(self) -> list[str]:
        """Labels of the terms trained on."""
        return [label_of(term) for term in self.rewards]

    @property
    def last_step(self) -> int:
        """The last step that was done; 0 before there is one."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def best_step(self) -> float | None:
        """The step of the best evaluation while training; None before there is one."""
        found = [float(row["step"]) for row in self.evaluations if row.get("best") is True]
        return found[-1] if found else None

    @property
    def planned(self) -> int | None:
        """How many steps the config asks for."""
        steps = number(pick(self.config, "training", "steps"))
        return None if steps is None else int(steps)

    @property
    def stop_reason(self) -> str | None:
        """Why early stopping ended it, from metrics.jsonl or evaluation.json."""
        reason = self.stopped or pick(self.comparison, STOPPED)
        return reason if isinstance(reason, str) else None

    @property
    def has_lora(self) -> bool:
        """Whether the final LoRA exists; a run writes it at its end."""
        return (self.path / "lora" / "pytorch_lora_weights.safetensors").is_file()

    @property
    def finished(self) -> bool:
        """Whether the run ended as planned or by early stopping."""
        return self.has_lora and (
            self.planned is None or self.last_step >= self.planned or self.stop_reason is not None
        )


def read_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        OutputError: the folder does not exist or is not a run folder.
        ConfigError: its config.yaml is not valid YAML.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise OutputError(f"{path}: no such folder. Give the folder of a run, such as runs/first.")
    if not path.is_dir():
        raise OutputError(f"{path} is a file. Give the folder of a run, which contains its config.yaml.")
    if not (path / "config.yaml").is_file():
        inside = sorted(file.parent.name for file in path.glob("*/config.yaml"))[:_SHOWN]
        hint = f" It contains these run folders: {', '.join(inside)}." if inside else " Check the path."
        raise OutputError(f"{path} is not a run folder: it has no config.yaml.{hint}")
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path / 'config.yaml'} cannot be read: {error}.") from error
    config, _ = read_yaml(text, str(path / "config.yaml"))
    if not isinstance(config, Mapping) or not {"model", "rewards"} <= config.keys():
        raise OutputError(f"{path} is not a run folder: its config.yaml is not a run config (no model or no rewards).")
    problems: list[str] = []
    steps, evaluations, stopped = _read_metrics(path / "metrics.jsonl", problems)
    curves = {name: _read_json(path / f"{name}.json", problems) for name in ("strengths", "soup")}
    return Run(
        path=path,
        config_text=text,
        config=config_today(config),
        environment=_read_json(path / "environment.json", problems) or {},
        steps=steps,
        evaluations=evaluations,
        stopped=stopped,
        comparison=_read_json(path / "evaluation.json", problems),
        curves={name: data for name, data in curves.items() if data is not None},
        problems=problems,
    )


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def pick(data: object, *keys: str) -> Any:
    """Return the value at nested keys; None where one is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None  # what JSON and YAML give
    return data


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping unchanged, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Mapping[str, Any]]:
    """Return the mappings in a list; nothing for anything else."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def label_of(term: Mapping[str, Any]) -> str:
    """Return a term's label, or its reward's name in older configs."""
    return str(term.get("label") or term.get("name") or "reward")


def _read_json(path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read and is skipped: {error}.")
        return None
    if not isinstance(data, Mapping):
        problems.append(f"{path.name} has no results and is skipped.")
        return None
    return data


def _read_metrics(
    path: Path, problems: list[str]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], str | None]:
    """Return the lines of steps, the lines of evaluations, and why the run stopped."""
    if not path.is_file():
        return [], [], None
    steps: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    stopped: str | None = None
    broken: list[int] = []
    try:
        for place, row in _lines(path.read_bytes()):
            step = number(pick(row, "step"))
            if step is None or step < 0:
                broken.append(place)
            elif isinstance(figures := pick(row, "evaluation"), Mapping):
                evaluations[int(step)] = {**evaluation_today(figures), "step": int(step)}
            elif isinstance(reason := pick(row, STOPPED), str):
                stopped = reason
            else:
                steps[int(step)] = {**step_today(mapping(row)), "step": int(step)}
                stopped = None  # it was resumed
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}.")
    if broken:
        places = ", ".join(map(str, broken[:_SHOWN])) + (" and more" if len(broken) > _SHOWN else "")
        lines = "line" if len(broken) == 1 else "lines"
        problems.append(f"{len(broken)} broken {lines} of {path.name} skipped ({lines} {places}).")
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)], stopped


def _lines(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield each line's number, from 1, and its data; None for a line that is not JSON."""
    for place, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError):
                yield place, None
