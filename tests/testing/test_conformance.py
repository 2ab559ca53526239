"""The conformance suite: each check passes a good reward and fails a reward with exactly that fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.diffusion.families.find import BUILT_IN
from alignprop_core.errors import RewardError
from alignprop_core.mix.load import load_terms
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardSpec
from alignprop_core.testing import CHECKS, RewardConformance, Subject, natural_images, run_checks
from alignprop_core.testing.fixtures import (  # noqa: F401
    isolated_registry,
    starter_images,
    temporary_plugin,
    tiny_pipelines,
    two_step_run,
)
from alignprop_core.testing.suite import judge
from tests.support.fake_plugins import CONFIG, REWARD, install, reward_spec, rewards_hook
from tests.support.promise_rewards import BREAKERS, GOOD, registry_of

BROKEN = [
    pytest.param(check, spec, words, id=f"{check}-{i}")
    for check, cases in BREAKERS.items()
    for i, (spec, words) in enumerate(cases)
]


def subject_of(spec: RewardSpec) -> Subject:
    return Subject(spec.name, registry=registry_of(spec))


def test_every_check_has_a_reward_that_fails_it() -> None:
    assert set(BREAKERS) == {check.name for check in CHECKS}
    assert all(check.description.endswith(".") for check in CHECKS)


@pytest.mark.parametrize("spec", GOOD.values(), ids=GOOD)
def test_a_good_reward_passes_all_checks(spec: RewardSpec) -> None:
    verdicts = list(run_checks(subject_of(spec)))
    assert [v for v in verdicts if v.status == "failed"] == []
    passed = {v.check for v in verdicts if v.status == "passed"}
    if spec.differentiable:
        assert passed == {check.name for check in CHECKS}
    else:
        assert {check.name for check in CHECKS} - passed == {"gradient", "gradcheck", "saturated_pixels", "improves"}


@pytest.mark.parametrize(("check", "spec", "words"), BROKEN)
def test_a_fault_is_found_and_reported(check: str, spec: RewardSpec, words: str) -> None:
    (found,) = (one for one in CHECKS if one.name == check)
    verdict = judge(found, subject_of(spec))
    assert verdict.status == "failed"
    assert re.search(words, " ".join(verdict.message.split())), verdict.message


class Symmetry(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return -(batch.images - batch.images.flip(-1)).abs().mean((1, 2, 3))


class Variation(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return -torch.stack([batch.images.diff(dim=d).abs().mean((1, 2, 3)) for d in (-1, -2)]).sum(0)


class Peaks(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return functional.max_pool2d(batch.images, 2).mean((1, 2, 3))


class Median(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.flatten(1).median(1).values


@pytest.mark.parametrize("kind", [Symmetry, Variation, Peaks, Median])
def test_a_correct_gradient_of_a_score_with_kinks_passes(kind: type[Reward]) -> None:
    """Photographs have equal neighbors, and some step of 1e-6 in a random direction crosses a kink."""
    (check,) = (check for check in CHECKS if check.name == "gradcheck")
    verdict = judge(check, Subject("kinks", registry=Registry.from_plugins({}).with_rewards({"kinks": kind})))
    assert verdict.status == "passed", verdict.message


def test_the_message_about_a_wrong_gradient_names_kinks() -> None:
    class Steps(Reward):
        def score(self, batch: ImageBatch) -> Tensor:
            x = batch.images
            return (x + 0.1 * (x.detach() * 50).sin()).mean((1, 2, 3))

    (check,) = (check for check in CHECKS if check.name == "gradcheck")
    verdict = judge(check, Subject("steps", registry=Registry.from_plugins({}).with_rewards({"steps": Steps})))
    assert "or the score has a kink or step (abs, max, round)" in verdict.message


def test_sys_exit_in_a_reward_is_its_failure() -> None:
    class Exits(Reward):
        def score(self, batch: ImageBatch) -> Tensor:
            sys.exit("no license server")

    known = Registry.from_plugins({}).with_rewards({"exits": Exits})
    verdicts = list(run_checks(Subject("exits", registry=known)))
    assert "SystemExit: no license server" in {verdict.message for verdict in verdicts}
    (term,) = load_terms([RewardTerm(name="exits")], known)
    with pytest.raises(RewardError, match='Reward "exits" raised SystemExit: no license server'):
        term.score(ImageBatch(images=torch.rand(1, 3, 8, 8)))


def test_an_exception_of_a_reward_is_a_failure_with_its_traceback() -> None:
    class Raises(Subject):
        def scores(self, images: torch.Tensor | None = None) -> torch.Tensor:
            raise ZeroDivisionError("in the reward")

    subject = Raises("subject", registry=registry_of(next(iter(GOOD.values()))))
    verdicts = {verdict.check: verdict for verdict in run_checks(subject)}
    assert verdicts["finite"].status == "failed"
    assert verdicts["finite"].message == "ZeroDivisionError: in the reward"
    assert "in the reward" in verdicts["finite"].traceback
    assert verdicts["json_schema"].status == "passed", "one check must not stop the next"


def test_scores_that_are_not_finite_fail_one_check_which_names_the_prompt_and_the_rest_is_skipped() -> None:
    """NaN equals nothing, so all comparisons would fail as well and hide the cause."""

    def moody(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        dogs = torch.tensor(["dogs" in prompt for prompt in prompts])
        return images.mean((1, 2, 3)).masked_fill(dogs, torch.nan)

    known = registry_of(next(iter(GOOD.values()))).with_rewards({"moody": moody})
    verdicts = list(run_checks(Subject("moody", registry=known)))
    (failed,) = (verdict for verdict in verdicts if verdict.status == "failed")
    assert failed.check == "finite"
    assert 'the first for the prompt "two dogs"' in failed.message
    after = verdicts[verdicts.index(failed) + 1 :]
    assert {verdict.status for verdict in after} == {"skipped"}
    assert {verdict.message for verdict in after} == {"the scores are not finite, so nothing can be compared"}
    assert len(verdicts) == len(CHECKS)


def test_a_check_can_be_skipped_with_a_reason_and_a_misspelled_one_is_refused() -> None:
    subject = subject_of(next(iter(GOOD.values())))
    skipped = [v for v in run_checks(subject, skip={"range": "random weights"}) if v.status == "skipped"]
    assert [(v.check, v.message) for v in skipped] == [("range", "random weights")]
    with pytest.raises(ValueError, match="no check is called rnage; the checks are: spec_without_torch"):
        list(run_checks(subject, skip={"rnage": ""}))


# -- in a plugin's tests ---------------------------------------------------------------------------------


SUITE = """
from alignprop_core.testing import RewardConformance

class TestFake(RewardConformance):
    reward = "{name}"
    options = {{"quality": 7}}
    skip = {{"dtype": "no float64", "gradcheck": "likewise"}}
"""


def fake_files() -> dict[str, str]:
    spec = reward_spec("fake_red", "fake_red", 'license="MIT"')
    return {
        "fake_red/__init__.py": rewards_hook(f"return [{spec}]"),
        "fake_red/config.py": CONFIG,
        "fake_red/reward.py": REWARD.replace("{package}", "fake_red"),
    }


def run_pytest(folder: Path, *paths: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(folder)],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_class_has_one_test_per_check_and_reports_failures(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "tests").mkdir()
    broken = REWARD.replace(".mean(dim=(1, 2, 3)).float()", ".mean(dim=(1, 2, 3)).float().detach()")
    for name, reward in (("good", REWARD), ("broken", broken)):
        hook = rewards_hook("return [" + reward_spec(name, name, 'license="MIT"') + "]")
        install(tmp_path / "site", name, hook, reward=reward)
        (tmp_path / "tests" / f"test_{name}.py").write_text(SUITE.format(name=name))
    done = run_pytest(tmp_path / "tests", str(tmp_path / "site"))
    assert "broken: The spec declares correctly whether the reward has a gradient." in done.stdout
    assert "Remove .detach()" in done.stdout
    failed = set(re.findall(r"FAILED test_(\w+).py::TestFake::test_contract\[(\w+)\]", done.stdout))
    assert {name for name, _ in failed} == {"broken"}, done.stdout
    assert {"differentiable", "gradient"} <= {check for _, check in failed}


def test_nothing_is_loaded_into_other_tests(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys\ndef test_plain():\n    assert not [m for m in sys.modules if m.startswith('alignprop')]\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout
    from importlib.metadata import entry_points

    assert not [point for point in entry_points(group="pytest11") if point.value.startswith("alignprop")]


# -- fixtures ---------------------------------------------------------------------------------------------------


def test_the_isolated_registry_refuses_discovery(isolated_registry: Callable[..., Registry]) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match="installed plugins were looked up"):
        default_registry()
    made = isolated_registry({})
    assert default_registry() is made
    assert made.rewards() == ()


def test_a_temporary_plugin_is_really_installed_and_trains(
    temporary_plugin: Callable[..., str],  # noqa: F811
    two_step_run: Callable[..., Path],  # noqa: F811
) -> None:
    temporary_plugin("fake-red", fake_files(), version="3.1")
    assert default_registry().reward("fake_red").version == "3.1"
    folder = two_step_run("fake_red", {"quality": 3})
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_temporary_plugin_is_gone_afterwards() -> None:
    assert "fake_red" not in sys.modules
    assert not [offer for offer in default_registry().rewards() if offer.name == "fake_red"]


def test_there_is_a_tiny_pipeline_for_each_family(tiny_pipelines: Any) -> None:  # noqa: F811
    assert type(tiny_pipelines).__name__ in {name for spec in BUILT_IN for name in spec.pipelines}
    from alignprop_core.testing.pipelines import TINY_PIPELINES, tiny_pipeline

    assert set(TINY_PIPELINES) == {spec.name for spec in BUILT_IN}
    with pytest.raises(ValueError, match="the families are: stable_diffusion"):
        tiny_pipeline("no_such_family")


def test_images_are_photographs_inside_the_range(
    starter_images: tuple[torch.Tensor, list[str]],  # noqa: F811
) -> None:
    for count, height, width in ((3, 64, 64), (1, 32, 200), (6, 300, 33)):
        images = natural_images(count, height, width)
        assert images.shape == (count, 3, height, width)
        assert 0.01 < float(images.min()) < float(images.max()) < 0.99
        assert torch.equal(images, natural_images(count, height, width))
    assert float(natural_images().std()) > 0.15
    scenes, captions = starter_images
    assert scenes.shape == (3, 3, 128, 128)
    assert len(captions) == 3


def test_the_public_names_are_available() -> None:
    import alignprop_core.testing as testing

    assert all(getattr(testing, name) is not None for name in testing.__all__)
    assert RewardConformance in (testing.RewardConformance,)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = testing.no_such_name
