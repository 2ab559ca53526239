"""`alignprop rewards check`: one result per check, and an exit code."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignprop_core import cli
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import RewardSpec
from alignprop_core.testing import CHECKS
from alignprop_core.testing.fixtures import isolated_registry  # noqa: F401
from tests.support.promise_rewards import BREAKERS, GOOD, hook_of

ROOT = Path(__file__).parents[2]
Use = Callable[[RewardSpec], Registry]


@pytest.fixture
def use(isolated_registry: Callable[..., Registry]) -> Use:  # noqa: F811
    return lambda spec: isolated_registry({"promise-rewards": hook_of(spec)})


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert cli.run(["rewards", "check", *arguments]) == code
    return capsys.readouterr()


def test_a_good_reward_passes_with_one_result_per_check(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    use(GOOD["a reward"])
    out, err = run(capsys, "subject", "gain=2.0")
    words = " ".join(out.split())
    for check in CHECKS:
        assert f"{check.name} passed {check.description[:20]}" in words
    assert out.endswith(f"subject: {len(CHECKS)} passed. The reward meets the contract.\n")
    assert err == ""


def test_a_failed_check_is_reported_and_the_exit_code_is_1(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    spec, words = BREAKERS["samples_independent"][0]
    use(spec)
    out, _ = run(capsys, "subject", code=1)
    assert words in " ".join(out.split())
    assert "The reward is not ready for runs." in out
    data = json.loads(run(capsys, "subject", "--json", code=1)[0])
    assert not data["passed"]
    assert "samples_independent" in {one["check"] for one in data["checks"] if one["status"] == "failed"}
    assert set(data["checks"][0]) == {"check", "description", "status", "message", "traceback"}


def test_options_prompts_and_skips_are_used(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    use(GOOD["a measure"])
    data = json.loads(run(capsys, "subject", "gain=0.5", "--prompt", "a fox", "--skip", "shape", "--json")[0])
    assert data["options"] == {"gain": 0.5}
    assert {one["check"] for one in data["checks"] if one["status"] == "skipped"} == {"shape"}
    assert "declared differentiable=False" in {o["check"]: o["message"] for o in data["checks"]}["gradcheck"]


def documented() -> Iterator[object]:
    """Yield the rewards that the documentation prints: the code they need, and their name."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for title, text in re.findall(r"```python( [^\n]*)?\n(.*?)```", page.read_text(), re.DOTALL):
            # A plugin's files are checked where the page runs.
            body = [] if "title" in title and "my_" not in title else ast.parse(text).body
            kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
            code = "\n".join(ast.unparse(node) for node in body if isinstance(node, kept))
            for node in body:
                function = isinstance(node, ast.FunctionDef) and ast.unparse(node.args).startswith("images")
                is_class = isinstance(node, ast.ClassDef) and "Reward" in [ast.unparse(one)[-6:] for one in node.bases]
                if function or is_class:
                    yield pytest.param(code, node.name, id=f"{page.stem}-{node.name}")


@pytest.mark.parametrize(("code", "name"), list(documented()))
def test_rewards_that_the_documentation_prints_pass(
    code: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    out, _ = run(capsys, f"./mine.py:{name}")
    assert out.endswith("The reward meets the contract.\n"), out


def test_the_documentation_prints_rewards() -> None:
    assert len(list(documented())) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["subjct"], 'Did you mean "subject"?'),
        (["subject", "gian=2"], "options.gian"),
        (["subject", "gain"], "write key.path=value"),
        (["subject", "--skip", "shap"], 'there is no check "shap". Did you mean "shape"?'),
    ],
)
def test_wrong_input_is_one_message(
    arguments: list[str], message: str, use: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    use(GOOD["a reward"])
    assert message in run(capsys, *arguments, code=2)[1]
