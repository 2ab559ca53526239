"""The warning for terms that have no part in a run's direction."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from alignprop_core.config.load import load_config
from alignprop_core.training.trainer import Trainer
from tests.support import toy_rewards
from tests.support.toy_rewards import Redness
from tests.support.toy_runs import toy_data


class Shade(Redness):
    """Dark images."""

    def score(self, batch: Any) -> Tensor:
        shade: Tensor = -self.config.gain * (batch.images**2).flatten(1).mean(1)
        return shade


def train(model: Path, folder: Path, gain: float, steps: int, **sections: object) -> list[str]:
    """Train on redness with a gain, and on shade; return the warnings."""
    known = toy_rewards.registry().with_rewards({"shade": Shade()})
    rewards = [{"name": "redness", "options": {"gain": gain}}, {"name": "shade"}]
    training = {"steps": steps, "batch_size": 1, "device": "cpu"}
    data = toy_data(model, folder, rewards=rewards, training=training, sampling={"steps": 1}, **sections)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(load_config(data, registry=known), registry=known).train()
    return [str(warning.message) for warning in caught if "0%" in str(warning.message)]


def test_a_term_without_influence_is_reported_once(tiny_model: Path, tmp_path: Path) -> None:
    (message,) = train(tiny_model, tmp_path, 1e4, 7)
    assert "each of the first 5 steps" in message
    assert '"shade" (its gradient is ' in message
    assert "times smaller)" in message
    assert "mix: {combine: balanced}" in message
    ratio = float(message.partition("its gradient is ")[2].partition(" times")[0].replace(",", ""))
    assert 2_000 < ratio < 50_000


@pytest.mark.parametrize("sections", [{}, {"mix": {"combine": "balanced"}}])
def test_terms_with_influence_are_not(tiny_model: Path, tmp_path: Path, sections: dict[str, object]) -> None:
    assert train(tiny_model, tmp_path, 1e4 if sections else 1.0, 3, **sections) == []
