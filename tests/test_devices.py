"""Devices and processes from plain strings and the environment."""

from __future__ import annotations

import os

import pytest
from accelerate import PartialState

from alignprop_core.devices import processes


def test_a_world_size_without_a_launcher_is_ignored_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.endswith("RANK")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    try:
        with pytest.warns(UserWarning, match="WORLD_SIZE=2 is set, but no launcher"):
            assert processes(cpu=True).num_processes == 1
        processes(cpu=True)  # reported once
    finally:
        PartialState._shared_state.update(before)
