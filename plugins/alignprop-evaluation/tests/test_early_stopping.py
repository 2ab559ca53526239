"""Which evaluation is the best, when a run stops, and what of it still counts in a resumed run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from alignprop_core.config.sections import EarlyStoppingConfig
from alignprop_evaluation.early_stopping import Basis, EarlyStopping


def test_patience_counts_evaluations_without_a_new_best() -> None:
    stopping = EarlyStopping(EarlyStoppingConfig(patience=2))
    for step, score, best in ((0, 1.0, True), (5, 2.0, True), (10, 1.9, False)):
        assert stopping.update(step, score, 0.0, None) is best
        assert stopping.stop_reason() is None
    assert not stopping.update(15, float("nan"), 0.0, None), "NaN is never the best"
    assert stopping.stop_reason() == "held-out total did not improve at 2 evaluations in a row (best 2 at step 5)"
    assert stopping.update(20, 3.0, 0.0, None)
    assert stopping.stop_reason() is None


def test_limits_stop_a_run_and_an_evaluation_beyond_them_is_never_the_best() -> None:
    stopping = EarlyStopping(EarlyStoppingConfig(max_drift=0.2, min_diversity=0.5, mode="min"))
    assert stopping.update(0, 5.0, 0.0, 0.4)
    assert stopping.update(1, 4.0, 0.2, 0.3)
    assert not stopping.update(2, 3.0, 0.21, 0.3)
    assert stopping.stop_reason() == "drift 0.21 is above early_stopping.max_drift 0.2"
    assert not stopping.update(3, 3.0, 0.1, 0.19)
    assert stopping.stop_reason() == "diversity 0.19 is below early_stopping.min_diversity 0.5 of its first, 0.4"
    assert stopping.state.best_step == 1


def basis(**parts: Any) -> Basis:
    usual = {"evaluation.seed": 1}, {"evaluation.diversity_encoder": None}, {"early_stopping.monitor": "a"}
    return replace(Basis(*usual), **parts)


def evaluated(config: EarlyStoppingConfig) -> EarlyStopping:
    stopping = EarlyStopping(config)
    assert stopping.rebase(basis()) is None
    for step, score in enumerate((1.0, 5.0, 4.0)):
        stopping.update(step, score, 0.1 * step, 0.4 - 0.1 * step)
    return stopping


def resumed(stopping: EarlyStopping, config: EarlyStoppingConfig | None = None) -> EarlyStopping:
    again = EarlyStopping(config or stopping.config)
    again.load(json.loads(json.dumps(stopping.as_json())))
    return again


def test_only_what_can_still_be_compared_is_kept() -> None:
    stopping = evaluated(EarlyStoppingConfig())
    again = resumed(stopping)
    assert again.rebase(basis()) is None
    assert again.as_json() == stopping.as_json()

    again = resumed(stopping)
    assert again.rebase(basis(images={"evaluation.seed": 2})) == "evaluation.seed (was 1, is 2) changed"
    assert (again.state.best, again.state.step, again.state.first_diversity) == (None, None, None)

    again = resumed(stopping)
    assert (
        again.rebase(basis(monitored={"early_stopping.monitor": "b"}))
        == 'early_stopping.monitor (was "a", is "b") changed'
    )
    assert (again.state.best, again.state.step, again.state.first_diversity) == (None, None, 0.4)

    again, both = resumed(stopping), {"images": {"evaluation.seed": 2}, "monitored": {"early_stopping.monitor": "b"}}
    assert (
        again.rebase(basis(**both))
        == 'evaluation.seed (was 1, is 2) changed and early_stopping.monitor (was "a", is "b") changed'
    )

    encoder = basis(diversity={"evaluation.diversity_encoder": "clip"})
    again = resumed(stopping)
    assert again.rebase(encoder) is None, "no limit depends on it"
    assert (again.state.best, again.state.first_diversity) == (5.0, None)
    assert not again.update(3, 4.5, 0.1, 30.0)
    floored = resumed(again, EarlyStoppingConfig(min_diversity=0.5))
    assert floored.rebase(encoder) is None
    assert floored.state.first_diversity == 30.0
    floored = resumed(stopping, EarlyStoppingConfig(min_diversity=0.5))
    assert floored.rebase(encoder) == 'evaluation.diversity_encoder (was null, is "clip") changed'
    assert (floored.state.best, floored.state.first_diversity) == (None, None)

    state = {key: value for key, value in stopping.as_json().items() if key != "basis"}
    again = EarlyStopping(EarlyStoppingConfig())
    again.load(state)
    assert again.rebase(basis()) == "the checkpoint does not record what was measured"
    assert again.state.best is None


def test_a_best_outside_the_limits_of_a_resumed_run_does_not_count() -> None:
    again = resumed(evaluated(EarlyStoppingConfig()), EarlyStoppingConfig(max_drift=0.05))
    assert (
        again.rebase(basis()) == "at the best evaluation, of step 1, drift 0.1 is above early_stopping.max_drift 0.05"
    )
    assert again.state.best is None
    again = resumed(evaluated(EarlyStoppingConfig()), EarlyStoppingConfig(min_diversity=0.7))
    assert again.rebase(basis()) is None, "0.3 is more than 0.7 of 0.4"
    assert again.state.best == 5.0
    assert again.stop_reason() == "diversity 0.2 is below early_stopping.min_diversity 0.7 of its first, 0.4"
