"""Rewards in an environment of their own: the same numbers as in this one, and nothing lost when a worker is."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from torch import Tensor

from alignprop_core.config.load import load_config
from alignprop_core.config.rewards import IsolationConfig
from alignprop_core.errors import OutputError, PluginError, PromptError, RewardError, RunError
from alignprop_core.isolation.install import make_environment, python_of
from alignprop_core.isolation.lookup import IsolatedRewards
from alignprop_core.isolation.reward import IsolatedReward
from alignprop_core.registry.licenses import LicensePolicy
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.training.run import train
from alignprop_core.training.trainer import Trainer
from alignprop_core.validation import InvalidConfig

ROOT = Path(__file__).parents[1]

FILE = '''\
"""Rewards that only work where only_there is installed."""

import os
import sys
import time
from pathlib import Path

import only_there
import torch
from pydantic import Field

from alignprop_core import ImageBatch, Reward, RewardConfig
from alignprop_core.errors import PromptError


class Options(RewardConfig):
    gain: float = Field(default=only_there.GAIN, gt=0, description="Factor.")
    mark: str = Field(default="", description="A file.")


class Redness(Reward):
    """Red pictures."""

    Config = Options

    def score(self, batch):
        red, green, blue = batch.images.mean((2, 3)).unbind(1)
        return (self.config.gain * (red - (green + blue) / 2) + 0.1 * (batch.images ** 2).mean((1, 2, 3))).to(
            torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        )


class PrintsAndWrites(Redness):
    def score(self, batch):
        print("a word on standard output")
        os.write(1, b"and one from C\\n")
        scores = super().score(batch)
        with torch.no_grad():
            batch.images.zero_()
        return scores


class Prompted(Redness):
    def score(self, batch):
        if "" in batch.prompts:
            raise PromptError("the prompt is empty.")
        more = [len(p) + m.get("number", 0) for p, m in zip(batch.prompts, batch.metadata)]
        return super().score(batch) + torch.tensor(more)


class Reads(Redness):
    def check_prompt(self, prompt, metadata):
        if not any(character.isdigit() for character in prompt):
            raise PromptError(f'The prompt "{prompt}" has no number.')


class Raises(Redness):
    def score(self, batch):
        raise ValueError("three is one too many")


class Detached(Redness):
    def score(self, batch):
        return super().score(batch).detach()


class Measure(Detached):
    differentiable = False


class CrashesOnce(Redness):
    def score(self, batch):
        if not Path(self.config.mark).exists():
            Path(self.config.mark).touch()
            print("my last words", file=sys.stderr, flush=True)
            os._exit(7)
        return super().score(batch)


class Crashes(Redness):
    def score(self, batch):
        print("my last words", file=sys.stderr, flush=True)
        os._exit(7)


class Sleeps(Redness):
    def score(self, batch):
        if self.config.mark:
            Path(self.config.mark).touch()
        time.sleep(60)


class Grows(Redness):
    def score(self, batch):
        self.kept = [torch.ones(2**28) for _ in range(4)]
        time.sleep(20)
        return super().score(batch)


class Unbuilt(Redness):
    def __init__(self, config=None):
        super().__init__(config)
        raise OSError("no such weights")
'''


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has a package this one lacks."""
    folder = tmp_path_factory.mktemp("environments") / "own"
    inner = make_environment(folder, [], share=True)
    site = json.loads(
        subprocess.check_output([inner, "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))"])
    )["purelib"]
    (Path(site) / "only_there.py").write_text("GAIN = 2.0\n")
    return inner


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere.py"
    path.write_text(FILE)
    return path


Load = Callable[..., IsolatedReward]


@pytest.fixture
def load(python: Path, file: Path) -> Iterator[Load]:
    made: list[IsolatedReward] = []

    def load(name: str, options: dict[str, Any] | None = None, **isolation: Any) -> IsolatedReward:
        source = IsolatedRewards(IsolationConfig(python=str(python), **isolation), LicensePolicy())
        name = f"{file}:{name}" if name[0].isupper() else name
        reward = source.load_reward(name, source.reward_options(name, options))
        assert isinstance(reward, IsolatedReward)
        made.append(reward)
        return reward

    yield load
    for reward in made:
        reward.close()


def pictures(size: int = 3, dtype: torch.dtype = torch.float32, side: int = 16) -> Tensor:
    return torch.rand(size, 3, side, side + 1, generator=torch.Generator().manual_seed(1)).to(dtype)


def scored(reward: Reward, images: Tensor, weights: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    scores = reward(ImageBatch(images=images, **more))
    (gradient,) = torch.autograd.grad(scores, images, torch.ones_like(scores) if weights is None else weights)
    return scores.detach(), gradient


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_and_gradients_are_those_of_this_process(load: Load, dtype: torch.dtype) -> None:
    there = load("jpeg_compressibility", {"quality": 80})
    here = default_registry().load_reward("jpeg_compressibility", {"quality": 80})
    for size in (4, 1, 7):  # the shared file grows, and is larger than needed
        images = pictures(size, dtype, side=32)
        for ours, theirs in zip(scored(here, images), scored(there, images), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    # What the mix makes of the scores enters at the end there and at the start here, so that rounding differs.
    weights = torch.linspace(-1, 2, len(images), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ours, theirs = (scored(reward, images, weights)[1] for reward in (here, there))
    digits = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(theirs, ours, rtol=digits, atol=digits * float(ours.abs().max()))
    with torch.no_grad():
        assert torch.equal(here(ImageBatch(images=images)), there(ImageBatch(images=images)))


def test_prompts_and_metadata_go_along(load: Load) -> None:
    reward, images = load("Prompted"), pictures(2)
    prompts, metadata = ["a fox", "drei Füchse 🦊"], [{"number": 3}, {}]
    scores, _ = scored(reward, images, prompts=prompts, metadata=metadata)
    plain, _ = scored(reward, images, prompts=["?", "?"])
    assert torch.allclose(scores - plain, torch.tensor([7.0, 12.0]))
    with pytest.raises(PromptError, match="the prompt is empty"):
        reward(ImageBatch(images=pictures(1), prompts=[""]))
    reward(ImageBatch(images=pictures(1), prompts=["a fox"]))  # and it goes on


def test_images_are_not_changed_and_prints_are_no_answers(load: Load) -> None:
    images, reward = pictures(), load("PrintsAndWrites")
    red, green, blue = images.mean((2, 3)).unbind(1)
    expected = 2 * (red - (green + blue) / 2) + 0.1 * (images**2).mean((1, 2, 3))
    for _ in range(2):
        given = images.clone()
        with torch.no_grad():
            torch.testing.assert_close(reward(ImageBatch(images=given)), expected)
        assert torch.equal(given, images)


def test_a_second_derivative_is_refused(load: Load) -> None:
    images = pictures().requires_grad_()
    scores = load("Redness")(ImageBatch(images=images))
    (gradient,) = torch.autograd.grad((scores**2).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def config_file(folder: Path, tiny_model: Path, *rewards: dict[str, Any], **more: Any) -> Path:
    (folder / "prompts.txt").write_text("a fox\nan owl\n")
    data = {
        "model": {"base": str(tiny_model)},
        "prompts": {"train": "./prompts.txt", "heldout": "./prompts.txt"},
        "sampling": {"steps": 2, "guidance_scale": 1.0},
        "rewards": list(rewards),
        "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "samples": {"every": None},
        "output": str(folder / "run"),
        **more,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_prompts_are_checked_there_before_a_model_loads(
    python: Path, file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = config_file(tmp_path, tiny_model, {"name": f"{file}:Reads", "isolation": {"python": str(python)}})
    (tmp_path / "prompts.txt").write_text("3 foxes\nan owl\n")
    with pytest.raises(PromptError, match=r'(?s)prompts\.txt:2.*Reward "reads": The prompt "an owl" has no number'):
        train(path)


def test_a_run_with_an_isolated_term_is_the_run_without(
    python: Path, file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Weights, figures of a balanced mix and true measures: all equal, and the parent never imports the reward."""
    isolation = {"python": os.path.relpath(python, tmp_path)}  # relative to the config
    both: list[Path] = []
    for name, extra in (("here", {}), ("there", {"isolation": isolation})):
        terms = [
            {"name": "jpeg_compressibility", "options": {"quality": 80}, **extra},
            {"name": "jpeg_incompressibility", "label": "large", "weight": 0.3, "options": {"quality": 50}},
        ]
        path = config_file(tmp_path, tiny_model, *terms, mix={"combine": "balanced"})
        both.append(train(path, [f"output={tmp_path / name}"]))
    here, there = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in both)
    timing = ("seconds", "peak_memory", "memory")
    for ours, theirs in zip(here, there, strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }
    for file_name in ("here.safetensors", "there.safetensors"):
        assert any(run.joinpath("lora", file_name).exists() for run in both)
    first, second = (run / "lora" / "pytorch_lora_weights.safetensors" for run in both)
    from safetensors.torch import load_file

    ours, theirs = load_file(first), load_file(second)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    evaluations = [json.loads((run / "evaluation.json").read_text())["tuned"] for run in both]
    assert "jpeg_bytes" in evaluations[0]
    assert evaluations[0] == evaluations[1]
    known = json.loads((both[1] / "environment.json").read_text())
    assert known["isolated_rewards"]["jpeg_compressibility"]["distribution"] == "alignprop-jpeg"
    assert known["isolated_rewards"]["jpeg_compressibility"]["python"] == str(python)


def test_the_run_never_imports_the_package(python: Path, file: Path, tiny_model: Path, tmp_path: Path) -> None:
    term = {"name": f"{file}:Redness", "isolation": {"python": str(python)}}
    run = train(config_file(tmp_path, tiny_model, term))
    assert "only_there" not in sys.modules
    saved = yaml.safe_load((run / "config.yaml").read_text())["rewards"][0]
    assert saved["options"] == {"gain": 2.0, "mark": ""}  # the defaults, which only that environment knows
    assert saved["label"] == "redness"
    origin = json.loads((run / "environment.json").read_text())["isolated_rewards"]["redness"]
    assert origin["from"]["class"] == "Redness"
    assert len(origin["from"]["sha256"]) == 64


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_are_checked_there_with_the_keys_of_the_run_config(
    python: Path, file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    term = {"name": f"{file}:Redness", "isolation": {"python": str(python)}}
    wrong = {**term, "options": {"gian": 1.0, "gain": -1}}
    with pytest.raises(InvalidConfig) as caught:
        load_config(config_file(tmp_path, tiny_model, wrong))
    assert "rewards.0.options.gain" in str(caught.value)
    assert "rewards.0.options.gian: unknown key. Did you mean options.gain?" in str(caught.value)
    misspelt = {**term, "name": "jpeg_compresibility"}
    with pytest.raises(InvalidConfig, match=r'rewards\.0\.name: .*Did you mean "jpeg_compressibility".*environment of'):
        load_config(config_file(tmp_path, tiny_model, misspelt))
    for isolation, message in (
        ({"python": "nowhere/bin/python"}, r"rewards\.0\.name: .*nowhere/bin/python: no such file.*rewards isolate"),
        ({"python": str(python), "timeout": 0}, r"rewards\.0\.isolation\.timeout"),
        ({"pyhton": str(python)}, r'rewards\.0\.isolation\.pyhton.*Did you mean "python"|isolation\.python'),
        ({"python": "/bin/cat"}, r"cannot say what its rewards are"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            load_config(config_file(tmp_path, tiny_model, {**term, "isolation": isolation}))


def test_a_measure_may_be_watched_and_not_trained_on(
    python: Path, file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    isolation = {"python": str(python)}
    measure = {"name": f"{file}:Measure", "isolation": isolation}
    with pytest.raises(InvalidConfig, match="gives no gradient to train on"):
        load_config(config_file(tmp_path, tiny_model, measure))
    detached = {"name": f"{file}:Detached", "isolation": isolation}
    with pytest.raises(RewardError, match=r'Reward "detached".*returned scores without a gradient'):
        Trainer(load_config(config_file(tmp_path, tiny_model, detached)))
    path = config_file(tmp_path, tiny_model, {"name": "jpeg_compressibility"}, evaluation={"rewards": [measure]})
    run = train(path)
    assert "measure" in json.loads((run / "evaluation.json").read_text())["tuned"]


def test_the_licence_policy_holds_there_too(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = IsolatedRewards(
        IsolationConfig(python=str(python)), LicensePolicy.read({"ALIGNPROP_ALLOW_LICENSES": "MIT"})
    )
    with pytest.raises(PluginError, match=r"its licence is Apache-2\.0"):
        source.reward("jpeg_compressibility")


def test_another_core_there_is_said(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho \'{"protocol": 99, "core": "7.0"}\'\n')
    fake.chmod(0o755)
    with pytest.raises(PluginError, match=r"has alignprop-core 7\.0, which cannot work with this one"):
        IsolatedRewards(IsolationConfig(python=str(fake)), LicensePolicy()).reward("jpeg_compressibility")


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_worker_that_crashes_is_started_once_again(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = load("CrashesOnce", {"mark": str(tmp_path / "mark")})
    before = reward.worker
    with caplog.at_level(logging.WARNING):
        scores = scored(reward, pictures())
    assert all(map(torch.equal, scores, scored(load("Redness"), pictures())))
    assert "exit code 7" in caplog.text
    assert "my last words" in caplog.text
    assert reward.worker not in (None, before)


def test_a_worker_that_crashes_twice_is_an_error(load: Load) -> None:
    reward = load("Crashes")
    with pytest.raises(RewardError, match=r"(?s)exit code 7.*my last words.*second time"):
        reward(ImageBatch(images=pictures()))
    assert reward.worker is None


def test_errors_come_back_as_what_they_are(load: Load) -> None:
    with pytest.raises(RewardError, match=r"raised ValueError: three is one too many \(in its own env") as caught:
        load("Raises")(ImageBatch(images=pictures()))
    assert "elsewhere.py" in "".join(caught.value.__notes__)
    with pytest.raises(RewardError, match=r"could not be built: OSError: no such weights"):
        load("Unbuilt")


def test_a_reward_that_takes_too_long_is_ended(load: Load) -> None:
    reward = load("Sleeps", timeout=1.0)
    process = psutil.Process(reward.worker)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not score a batch within 1 s.*isolation\.timeout"):
        reward(ImageBatch(images=pictures()))
    assert time.monotonic() - start < 15
    assert not process.is_running()


def test_a_reward_that_takes_too_much_memory_is_ended(load: Load) -> None:
    reward = load("Grows", memory_limit=2.0)
    process = psutil.Process(reward.worker)
    with pytest.raises(RewardError, match=r"GiB of memory to score a batch, more than isolation\.memory_limit of 2"):
        reward(ImageBatch(images=pictures()))
    assert not process.is_running()


def test_a_failing_worker_fails_the_run_by_its_name_and_keeps_what_was_saved(
    python: Path, file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    term = {"name": f"{file}:Crashes", "label": "brittle", "isolation": {"python": str(python)}}
    path = config_file(
        tmp_path, tiny_model, {"name": "jpeg_compressibility"}, evaluation={"rewards": [term], "every": 1}
    )
    with pytest.raises(RewardError, match=r'(?s)Reward "brittle": its worker ended.*my last words'):
        train(path)
    assert (tmp_path / "run" / "config.yaml").exists()


def shared_files() -> set[str]:
    import tempfile

    from alignprop_core.isolation.pictures import shared_folder

    return {entry.name for entry in os.scandir(shared_folder() or tempfile.gettempdir()) if ".images" in entry.name}


def test_nothing_is_left_when_the_reward_is_gone(load: Load, python: Path) -> None:
    before = shared_files()
    reward = default_registry().elsewhere(IsolationConfig(python=str(python))).load_reward("jpeg_compressibility")
    assert isinstance(reward, IsolatedReward)
    assert len(shared_files() - before) == 1
    process = psutil.Process(reward.worker)
    del reward
    assert not process.is_running()
    assert not shared_files() - before


RUN = """\
import sys
from alignprop_core.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_a_run_that_is_ended_takes_its_worker_along(
    python: Path, file: Path, tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C reaches the whole process group, as in a terminal; both while the worker is busy."""
    mark = tmp_path / "busy"
    before = shared_files()
    term = {
        "name": f"{file}:Sleeps",
        "isolation": {"python": str(python)},
        "options": {"mark": str(mark)},
    }
    path = config_file(tmp_path, tiny_model, term)
    # A shell that runs the tests in the background has them ignore Ctrl-C, and so the run.
    listening = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{RUN}"
    run = subprocess.Popen(
        [sys.executable, "-c", listening, "train", str(path)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_for(mark.exists, 120)
    (worker,) = psutil.Process(run.pid).children()
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        run.kill()
    _, printed = run.communicate(timeout=30)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 15)
    wait_for(lambda: not shared_files() - before, 15)
    if number == signal.SIGINT:
        assert "Traceback" not in printed


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- making environments ----------------------------------------------------------------------------------------------


def test_a_worker_needs_no_heavy_package(tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    """Core and a plugin by wheel, and of everybody else's packages only what a worker needs and torch needs itself."""
    from tests.support.fresh import FreshEnvironment

    environment = FreshEnvironment(tmp_path / "light")
    kept = needed_by("torch", "pydantic", "pluggy", "packaging", "safetensors", "pillow", "pip")  # pillow: the plugin's
    assert not kept & {"diffusers", "transformers", "peft", "accelerate", "typer", "yaml", "rich", "huggingface_hub"}
    for link in (environment.folder / "third-party").iterdir():
        if link.name not in kept and not any(link.name.startswith(f"{name}-") for name in kept):
            link.unlink()
    environment.run(
        ["pip", "install", "--no-deps", str(wheel("alignprop-core")), str(wheel("alignprop-jpeg"))], tmp_path
    )
    source = IsolatedRewards(IsolationConfig(python=str(environment.bin / "python")), LicensePolicy())
    assert source.reward("jpeg_compressibility").version == "0.1.0"
    options = source.reward_options("jpeg_compressibility", {"quality": 80})
    reward = source.load_reward("jpeg_compressibility", options)
    here = default_registry().load_reward("jpeg_compressibility", options)
    assert all(map(torch.equal, scored(reward, pictures()), scored(here, pictures())))
    code = "import sys; from alignprop_core.isolation.describe import describe as d; d('jpeg_compressibility', {});"
    code += "print(*sys.modules)"
    loaded = set(environment.run(["python", "-I", "-c", code], tmp_path).stdout.split())
    assert not loaded & {"torch", "numpy"}
    assert isinstance(reward, IsolatedReward)
    reward.close()


def needed_by(*names: str) -> set[str]:
    """Return the top-level folders and files of distributions and everything they need, torch's libraries included."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    found, queue, done = set[str](), list(names), set[str]()
    while queue:
        name = queue.pop()
        if name in done:
            continue
        done.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found |= {Path(file).parts[0] for file in package.files or ()}
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


def test_an_environment_is_not_made_over_something(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").touch()
    with pytest.raises(OutputError, match="exists already and is not empty"):
        make_environment(tmp_path / "own", [])
    with pytest.raises(RunError, match=r"(?s)failed with exit code.*no-such-package"):
        make_environment(tmp_path / "new", [str(tmp_path / "no-such-package")], share=True)


def test_the_command_makes_an_environment_that_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignprop_core.cli import run

    monkeypatch.chdir(tmp_path)
    assert run(["rewards", "isolate", "jpeg_compressibility", "--share"]) == 0
    printed = capsys.readouterr().out
    assert "jpeg_compressibility of alignprop-jpeg" in printed
    (term,) = yaml.safe_load(printed[printed.index("rewards:") :])["rewards"]
    assert Path(term["isolation"]["python"]) == python_of(Path("isolated/jpeg_compressibility"))
    assert Path(term["isolation"]["python"]).exists()
    assert run(["rewards", "isolate", "jpeg_compresibility"]) == 2


# -- the original hpsv2, with its own pins ----------------------------------------------------------------------------


ORIGINAL = ROOT / "build" / "isolated" / "hpsv2"


def test_the_original_hpsv2_trains_a_run_from_its_own_environment(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """hpsv2 1.2.0 with protobuf<4 and pytest==7.2.0, on the starter's small weights, against our own reward."""
    inner = python_of(ORIGINAL)
    if not inner.exists():
        pytest.fail(f"{ORIGINAL} is missing: `make test` makes it")
    pins = "import google.protobuf as p, hpsv2, importlib.metadata as m; print(p.__version__, m.version('pytest'))"
    protobuf, pytest_there = subprocess.check_output([inner, "-I", "-c", pins], text=True).split()
    assert protobuf.startswith("3.")
    assert pytest_there == "7.2.0" != pytest.__version__
    source = default_registry().elsewhere(IsolationConfig(python=str(inner)))
    name = f"{ROOT / 'examples' / 'isolated' / 'original_hpsv2.py'}:OriginalHpsv2"
    theirs = source.load_reward(name, source.reward_options(name, {}))
    ours = default_registry().load_reward("hpsv2", {"weights": "starter"})
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    prompts = ["three foxes in the snow", "a cat", ""]
    for own, other in zip(scored(ours, images, prompts=prompts), scored(theirs, images, prompts=prompts), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    term = {"name": name, "isolation": {"python": str(inner)}}
    path = config_file(tmp_path, tiny_model, term, {"name": "jpeg_compressibility"}, mix={"combine": "balanced"})
    run = train(path)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(step["terms"]["original_hpsv2"]["grad_norm"] > 0 for step in steps)
    assert "hpsv2" not in sys.modules
