"""Mistakes cost no time: what needs no torch is checked before torch, prompts before the model, each with its place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from alignprop_core.cli import main, run
from alignprop_core.config.load import load_config, resolved_yaml
from alignprop_core.config.sections import RunConfig
from alignprop_core.config.yaml import dump_yaml
from alignprop_core.devices import choose_device
from alignprop_core.errors import ConfigError, DeviceError, PromptError, UserError, under
from alignprop_core.hookspecs import hookimpl
from alignprop_core.mix.load import check_prompts, load_terms
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import WeightsSpec
from alignprop_core.training.resume import find_checkpoint
from alignprop_core.training.train import train
from alignprop_core.training.trainer import Trainer
from tests.support import toy_rewards

pytest.importorskip("alignprop_jpeg", reason="the commands are tried with real rewards")

COUNTS = """
from alignprop_core import Reward
from alignprop_core.errors import PromptError


class Counts(Reward):
    def check_prompt(self, prompt, metadata):
        if metadata.get("number") is None and not any(c.isdigit() for c in prompt):
            raise PromptError(f'The prompt "{prompt}" says no number.')

    def score(self, batch):
        return batch.images.mean((1, 2, 3))


class Fails(Counts):
    def check_prompt(self, prompt, metadata):
        return 1 / 0
"""


@pytest.fixture
def data(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A run config that works, its files in `tmp_path`."""
    (tmp_path / "prompts.txt").write_text("3 foxes\n\n# animals\n2 owls\n")
    (tmp_path / "counts.py").write_text(COUNTS)
    return {
        "model": {"base": str(tiny_model)},
        "prompts": {"train": "prompts.txt"},
        "sampling": {"steps": 2, "guidance_scale": 1.0},
        "rewards": [{"name": "jpeg_compressibility"}],
        "training": {"steps": 1, "batch_size": 2, "device": "cpu"},
        "previews": {"prompts": []},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def config(data: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write that config; keyword arguments replace whole sections."""

    def write(**sections: object) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data | sections, sort_keys=False))
        return path

    return write


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """Run a command, check its exit code, and return its one message."""
    assert run([str(argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message.removeprefix("error: ").strip()


def line_of(path: Path, text: str) -> int:
    """Return the number of the one line that holds a text."""
    (found,) = (number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return found


# -- prompts before the model -----------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("alignprop_core.diffusion.sampler.load_pipeline", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("key", ["train", "heldout"])
def test_a_prompt_a_reward_cannot_use_is_found_before_the_model_loads(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, dry: bool
) -> None:
    (tmp_path / "wrong.txt").write_text("3 foxes\n\nfoxes\n2 owls\nsome owls\n")
    path = config(
        prompts={"train": "prompts.txt", "heldout": "prompts.txt"} | {key: "wrong.txt"},
        rewards=[{"name": "./counts.py:Counts"}],
    )
    message = refused(capsys, "train", path, *(["--dry-run"] if dry else []))
    assert message.split("\n") == [
        f"{path}:{line_of(path, key + ':')}: prompts.{key}: {tmp_path}/wrong.txt:3: "
        'Reward "counts": The prompt "foxes" says no number.',
        f'{tmp_path}/wrong.txt:5: Reward "counts": The prompt "some owls" says no number.',
    ]
    assert not (tmp_path / "run").exists()


def test_prompts_that_fit_pass_metadata_included(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "right.jsonl").write_text('{"prompt": "3 foxes"}\n{"prompt": "foxes", "number": 3}\n')
    path = config(prompts={"train": "right.jsonl"}, rewards=[{"name": "./counts.py:Counts"}])
    assert run(["train", str(path), "--dry-run"]) == 0


def test_a_dry_run_loads_what_only_evaluates_and_shows_it_the_held_out_prompts(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heldout.txt").write_text("foxes\n")
    path = config(
        prompts={"train": "prompts.txt", "heldout": "heldout.txt"},
        evaluation={"rewards": [{"name": "./counts.py:Counts"}]},
    )
    message = refused(capsys, "train", path, "--dry-run")
    assert "prompts.heldout: " in message
    assert 'heldout.txt:1: Reward "counts": The prompt "foxes" says no number.' in message


def test_only_the_first_wrong_prompts_are_listed_and_a_fault_in_looking_names_the_reward(tmp_path: Path) -> None:
    (tmp_path / "counts.py").write_text(COUNTS)
    (tmp_path / "p.txt").write_text("fox\n" * 9)
    data = {"model": {"base": "a/b"}, "prompts": {"train": "p.txt"}, "output": "o"}
    known = Registry.from_plugins({})

    def check(name: str) -> None:
        (tmp_path / "run.yaml").write_text(dump_yaml(data | {"rewards": [{"name": f"./counts.py:{name}"}]}))
        settings = load_config(tmp_path / "run.yaml", registry=known)
        from alignprop_core.prompts import load_prompts

        check_prompts(load_terms(settings.rewards, known), load_prompts(settings.prompts.train, known))

    with pytest.raises(PromptError) as caught:
        check("Counts")
    lines = str(caught.value).split("\n")
    assert len(lines) == 6
    assert lines[-1] == "and 4 more lines."
    with pytest.raises(Exception, match='Reward "fails" could not check a prompt: ZeroDivisionError'):
        check("Fails")


def test_a_reward_that_says_nothing_of_prompts_takes_them_all() -> None:
    class Plain(Reward):
        def score(self, batch: ImageBatch) -> torch.Tensor:
            return batch.images.mean((1, 2, 3))

    Plain().check_prompt("", {})


# -- before torch -----------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing prompts": (["train", "CONFIG", "prompts.train=gone.txt"], "prompts.train (from the command line): No pr"),
    "missing held-out prompts": (["train", "CONFIG", "prompts.heldout=gone.txt"], "prompts.heldout"),
    "output in use": (["train", "CONFIG", "output=USED"], "exists already and is not empty"),
    "missing model": (["train", "CONFIG", "model.base=./gone"], "gone does not exist"),
    "missing autoencoder": (["train", "CONFIG", "model.vae=./gone"], "gone is not a folder"),
    "missing LoRA": (["train", "CONFIG", "lora.init_from=gone.safetensors"], "lora.init_from"),
    "missing frozen LoRA": (["train", "CONFIG", "model.loras=[{path: gone.safetensors}]"], "model.loras.0.path"),
    "missing weights": (["train", "CONFIG", "rewards=[{name: seen, options: {weights: gone.pt}}]"], "no file"),
    "weights not fetched": (
        ["train", "CONFIG", "rewards=[{name: seen, options: {weights: 'hub:nobody/nothing/w.safetensors'}}]"],
        "rewards.0.options.weights (from the command line): The weights of",
    ),
    "default weights not fetched": (
        ["train", "CONFIG", "rewards=[{name: published, options: {gain: 2}}]"],
        'rewards.0.options.weights (from the command line): The weights of reward "published" are not on this machine: '
        "file w.safetensors of repository nobody/nothing. Fetch them with `alignprop rewards fetch published`",
    ),
    "default weights of a measure not fetched": (
        ["train", "CONFIG", "prompts.heldout=PROMPTS", "evaluation.rewards=[{name: published}]"],
        "evaluation.rewards.0.options.weights (from the command line): The weights of",
    ),
    "monitored score that is not measured": (
        ["train", "CONFIG", "prompts.heldout=PROMPTS", "evaluation.every=1", "early_stopping.monitor=jpeg_byte"],
        'early_stopping.monitor (from the command line): no evaluation measures "jpeg_byte". Choose one of: total, '
        'jpeg_compressibility, jpeg_bytes. Did you mean "jpeg_bytes"?',
    ),
    "nothing to resume": (["train", "CONFIG", "--resume", "latest"], "nothing to resume"),
    "sample: missing model": (["sample", "fox", "--model", "./gone"], "--model: gone does not exist."),
    "sample: missing LoRA": (["sample", "fox", "--model", "MODEL", "--lora", "gone"], "--lora: gone"),
    "sample: settings": (["sample", "fox", "--model", "MODEL", "--width", "33"], "--width: must be a multiple of 8"),
    "evaluate: missing prompts": (
        ["evaluate", "--model", "MODEL", "--prompts", "gone.txt", "--reward", "seen"],
        "--prompts: No prompt file",
    ),
    "evaluate: missing LoRA": (
        ["evaluate", "--model", "MODEL", "--lora", "gone", "--prompts", "PROMPTS", "--reward", "seen"],
        "--lora: gone",
    ),
    "evaluate: missing other LoRA": (
        ["evaluate", "--model", "MODEL", "--lora", "LORA", "--prompts", "PROMPTS", "--reward", "seen", "--soup", "x"],
        "--soup: x",
    ),
    "evaluate: missing weights": (
        ["evaluate", "--model", "MODEL", "--prompts", "PROMPTS", "--reward", "seen", "-o", "weights=gone.pt"],
        "--option seen.weights: ",
    ),
    "evaluate: default weights not fetched": (
        ["evaluate", "--model", "MODEL", "--prompts", "PROMPTS", "--reward", "published"],
        "--option published.weights: The weights of reward",
    ),
    "score: default weights not fetched": (
        ["score", "PROMPTS", "--reward", "published"],
        "--option published.weights: The weights of reward",
    ),
    "score: missing image": (["score", "gone.png", "--reward", "seen"], "gone.png: no such image"),
    "score: wrong option": (["score", "gone.png", "--reward", "seen", "-o", "qality=3"], "--option seen.qality"),
}

PLUGIN = """
from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import RewardSpec

@hookimpl
def alignprop_register_rewards():
    facts = {"summary": "Fake.", "factory": "fake_seen.reward:Seen", "config": "fake_seen.config:Config"}
    weights = [{"repository": "nobody/nothing", "file": "w.safetensors"}]
    return [RewardSpec(name="seen", **facts), RewardSpec(name="published", weights=weights, **facts)]
"""
PLUGIN_CONFIG = """
from pydantic import Field
from alignprop_core.specs import RewardConfig

class Config(RewardConfig):
    weights: str = Field(default="default", description="A file.")
    gain: float = Field(default=1.0, description="A factor.")
"""


@pytest.fixture
def places(data: dict[str, Any], config: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    from tests.support.fake_plugins import install

    install(tmp_path / "site", "fake-seen", PLUGIN)
    (tmp_path / "site" / "fake_seen" / "config.py").write_text(PLUGIN_CONFIG)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("precious")
    (tmp_path / "lora.safetensors").write_bytes(b"looked at later")
    return {
        "CONFIG": str(config()),
        "USED": str(tmp_path / "used"),
        "MODEL": data["model"]["base"],
        "PROMPTS": str(tmp_path / "prompts.txt"),
        "LORA": str(tmp_path / "lora.safetensors"),
    }


RUN_LIGHT = """\
import json
import os
import sys
import traceback
from importlib import import_module

from alignprop_core.cli import run

commands, heavy, imports = map(json.loads, sys.argv[1:])
import_module("alignprop_core.config.load")
for name in imports:
    import_module(name)
for number, arguments in enumerate(commands):
    if os.fork():
        os.wait()
        continue
    os.dup2(os.open(f"said-{number}.txt", os.O_WRONLY | os.O_CREAT), 2)
    try:
        assert run(arguments) == 2, "the command did not fail as it does for wrong input"
        assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)
"""
"""Runs each command in a process of its own, which has imported what all commands import, and keeps what it says."""


def not_said(
    commands: dict[str, tuple[list[str], str]],
    places: dict[str, str],
    cwd: Path,
    heavy: str,
    imports: tuple[str, ...] = (),
) -> dict[str, str]:
    """Return what each command said that did not say its words, or said more, or imported any of `heavy`."""

    def filled(argument: str) -> str:
        for name, place in places.items():
            argument = argument.replace(name, place)
        return argument

    words = [[filled(argument) for argument in arguments] for arguments, _ in commands.values()]
    subprocess.run(
        [sys.executable, "-c", RUN_LIGHT, json.dumps(words), json.dumps(heavy.split()), json.dumps(imports)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(cwd / "site"), "HF_HUB_OFFLINE": "1"}, check=True,
    )  # fmt: skip
    said = {name: (cwd / f"said-{number}.txt").read_text() for number, name in enumerate(commands)}
    return {name: text for name, text in said.items() if commands[name][1] not in text or "Traceback" in text}


def test_mistakes_that_need_no_torch_are_said_without_it(places: dict[str, str], tmp_path: Path) -> None:
    assert not_said(MISTAKES, places, tmp_path, "torch diffusers transformers peft accelerate") == {}


def test_a_warning_is_one_line_without_the_place_in_our_code(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["fox " * 100, "owl " * 100]
    sample = ["sample", *prompts, "--model", str(tiny_model), "--steps", "1", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["alignprop", *sample])
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.raises(SystemExit, match="0"):
            main()
    said = [line for line in capsys.readouterr().err.splitlines() if "tokens" in line]
    assert len(said) == 1
    assert re.match(r"warning: A prompt has \d+ tokens, and the base model reads 77: ", said[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here_costs_the_import_of_torch_alone(places: dict[str, str], tmp_path: Path) -> None:
    evaluate = ["evaluate", "--model", "MODEL", "--prompts", "PROMPTS", "--reward", "seen"]
    commands = {
        "run": (["train", "CONFIG", "training.device=cuda"], "training.device (from the command line): cuda is re"),
        "precision": (
            ["train", "CONFIG", "training.mixed_precision=fp16"],
            "training.mixed_precision (from the command line): fp",
        ),
        "sample": (["sample", "fox", "--model", "MODEL", "--device", "cuda"], "--device: cuda is requested"),
        "unknown": (
            ["sample", "fox", "--model", "MODEL", "--device", "gpu"],
            "--device: must be auto, cpu, mps, cuda or cuda:N",
        ),
        "evaluate": ([*evaluate, "--device", "cuda"], "--device: cuda"),
    }
    assert not_said(commands, places, tmp_path, "diffusers transformers peft", imports=("torch",)) == {}


def test_the_trainer_checks_the_same_without_the_command(data: dict[str, Any], tmp_path: Path) -> None:
    changed = data | {"model": {"base": "./gone.safetensors"}, "rewards": [{"name": "redness"}]}
    (tmp_path / "run.yaml").write_text(dump_yaml(changed))
    settings = load_config(tmp_path / "run.yaml", registry=toy_rewards.registry())
    with pytest.raises(UserError, match=r"^model\.base: .*does not exist"):
        Trainer(settings, registry=toy_rewards.registry())


# -- key and line -----------------------------------------------------------------------------------------------------


def test_errors_of_files_a_config_names_have_its_key_and_line(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a fox"}\n{"prompt"\n')
    path = config(prompts={"train": "bad.jsonl"})
    place = f"{path}:{line_of(path, 'train: bad.jsonl')}: prompts.train: {tmp_path / 'bad.jsonl'}:2: bad JSON"
    assert refused(capsys, "train", path).startswith(place)
    with pytest.raises(PromptError) as caught:
        train(path)
    assert str(caught.value).startswith(place)


def test_a_reward_that_does_not_load_has_its_key_and_line(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needy.py").write_text(
        "from alignprop_core import Reward\nfrom alignprop_core.errors import WeightsError\n"
        "class Needy(Reward):\n    def __init__(self, config=None):\n        raise WeightsError('No weights today.')\n"
        "    def score(self, batch):\n        pass\n"
    )
    path = config(rewards=[{"name": "jpeg_compressibility"}, {"name": "./needy.py:Needy"}])
    line = line_of(path, "name: ./needy.py:Needy")
    assert refused(capsys, "train", path, "--dry-run") == f"{path}:{line}: rewards.1: No weights today."
    path = config(
        prompts={"train": "prompts.txt", "heldout": "prompts.txt"},
        evaluation={"rewards": [{"name": "./needy.py:Needy"}]},
    )
    line = line_of(path, "name: ./needy.py:Needy")
    assert refused(capsys, "train", path, "--dry-run") == f"{path}:{line}: evaluation.rewards.0: No weights today."


def test_the_innermost_key_stays() -> None:
    with pytest.raises(UserError, match=r"^inner: wrong$"), under("outer"), under("inner"):
        raise UserError("wrong")


def test_devices_have_names() -> None:
    with pytest.raises(DeviceError, match=r'must be auto, cpu, mps, cuda or cuda:N .*, not "gpu"'):
        choose_device("gpu")


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["lora.rank=4"], "lora.rank (was 8, is 4) differs from the run in RUN, so this would be another run. Put it "),
        (
            ["lora.rank=4", "rewards.0.weight=2"],
            "lora.rank (was 8, is 4), rewards.0.weight (was 1.0, is 2.0) differ from the run in RUN, so this would be "
            "another run. Put them back",
        ),
        (["rewards.1.name=jpeg_incompressibility"], "rewards (was a list of 1, is a list of 2) differs from"),
        (["lora.target_modules=[to_q]"], 'lora.target_modules (was null, is ["to_q"]) differs from'),
    ],
)
def test_resume_names_what_differs_with_both_values(
    config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    words: str,
) -> None:
    path, checkpoint = config(), tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(load_config(path)))
    message = refused(capsys, "train", path, "--resume", "latest", *changes)
    assert message.startswith("--resume: " + words.replace("RUN", str(tmp_path / "run")))
    free = ["training.steps=9", "save.every=1", "backprop.decode_batch_size=1"]
    assert "checkpoint" in refused(capsys, "train", path, "--resume", "latest", *free), "these may differ"


def test_an_isolated_rewards_environment_may_be_moved_before_a_resume(data: dict[str, Any], tmp_path: Path) -> None:
    def settings(isolation: dict[str, Any] | None) -> RunConfig:
        return RunConfig.model_validate(data | {"rewards": [{"name": "redness", "isolation": isolation}]})

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(settings({"python": "/old/bin/python"})))
    moved = {"python": "/new/bin/python", "timeout": 9.0, "device": "cpu", "memory_limit": 2.0}
    assert find_checkpoint(tmp_path / "run", settings(moved)) == checkpoint
    with pytest.raises(ConfigError, match=r"rewards\.0\.isolation \(was .*, is null\) differs from"):
        find_checkpoint(tmp_path / "run", settings(None))


# -- the closing lines ------------------------------------------------------------------------------------------------


def test_train_reports_at_its_end_why_it_stopped(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"train": "prompts.txt", "heldout": "prompts.txt"}
    training = {"steps": 3, "batch_size": 2, "device": "cpu"}
    evaluation = {"every": 1, "at_end": False, "images_per_prompt": 1}
    path = config(prompts=prompts, training=training, evaluation=evaluation, early_stopping={"max_drift": 1e-9})
    assert run(["train", str(path)]) == 0
    closing = " ".join(capsys.readouterr().out.split())
    assert closing.startswith("stopped at step 1: drift ")
    assert "is above early_stopping.max_drift 1e-09 LoRA" in closing
    assert run(["train", str(path), "early_stopping.max_drift=null", f"output={tmp_path / 'free'}"]) == 0
    assert "stopped" not in capsys.readouterr().out


CRASHES = """
from alignprop_core import Reward


class Crash(Reward):
    calls = 0

    def score(self, batch):
        type(self).calls += 1
        return batch.images.mean((1, 2, 3)) if self.calls != 4 else fails(self.calls)


def fails(calls):
    return 1 / (calls - 4)
"""


def test_a_run_that_fails_says_where_how_far_it_came_and_how_to_go_on(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crash.py").write_text(CRASHES)
    training = {"steps": 4, "batch_size": 2, "device": "cpu"}
    path = config(rewards=[{"name": "./crash.py:Crash"}], training=training)
    assert run(["train", str(path)]) == 1
    # The trial is a call, and each step.
    message = capsys.readouterr().err
    made, line = tmp_path / "run", CRASHES.splitlines().index("    return 1 / (calls - 4)") + 1
    assert f"ZeroDivisionError: division by zero ({tmp_path / 'crash.py'}:{line}, in fails)" in message
    assert f"The run failed after 2 of 4 steps. That state is saved in {made}/checkpoints/step-000002." in message
    again = message.strip().splitlines()[-1]
    assert again == f"alignprop train {made}/config.yaml --resume latest"
    assert run(again.split()[1:]) == 0, "this reward fails once"
    assert len((made / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_fails_at_once_promises_no_state(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crash.py").write_text(CRASHES.replace("4", "2"))
    assert run(["train", str(config(rewards=[{"name": "./crash.py:Crash"}]))]) == 1
    assert "The run failed after 0 of 1 steps. No checkpoint was saved." in capsys.readouterr().err


def test_train_names_at_its_end_only_files_that_are_there(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(config())]) == 0
    closing = capsys.readouterr().out
    assert "pictures" not in closing
    assert str(tmp_path / "run" / "report.html") in "".join(closing.split())
    assert run(["train", str(config()), "previews.prompts=[a fox]", f"output={tmp_path / 'more'}"]) == 0
    assert str(tmp_path / "more" / "images") in "".join(capsys.readouterr().out.split())


# -- sampling options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "33"], "--width: must be a multiple of 8, not 33."),
        (["--height", "-8"], "--height: must be"),
        (["--steps", "0"], "--steps: must be at least 1, not 0."),
        (["--guidance-scale", "0.5"], "--guidance-scale: must be at least 1, not 0.5."),
        (["--guidance-scale", "nan"], "--guidance-scale: must be a finite number, not nan."),
        (["--width", "33", "--steps", "0"], "--steps: must be at least 1, not 0.\n--width: must be a multiple of 8"),
    ],
)
def test_sampling_options_are_refused_in_our_words(
    data: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    found = refused(capsys, "sample", "fox", "--model", data["model"]["base"], *arguments)
    assert found.startswith(message)
    assert "Input should" not in found


# -- rewards by option ------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of pictures in the working directory."""
    monkeypatch.chdir(tmp_path)
    random = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(random.numpy()).save(tmp_path / "noise.png")
    Image.new("RGB", (48, 32), "teal").save(tmp_path / "teal.png")
    return ["noise.png", "teal.png"]


def test_score_takes_several_rewards_a_column_each(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--reward", "jpeg_bytes", "--reward", "jpeg_compressibility"]
    options = ["-o", "jpeg_bytes.quality=30", "-o", "jpeg_compressibility.quality=90"]
    assert run(["score", *pictures, *both, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["units"] == {"jpeg_bytes": "bytes", "jpeg_compressibility": "-kB"}
    assert [entry["image"] for entry in found["images"]] == pictures
    for name, quality in (("jpeg_bytes", 30), ("jpeg_compressibility", 90)):
        assert run(["score", *pictures, "--reward", name, "-o", f"quality={quality}", "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert [e["scores"][name] for e in alone["images"]] == [e["scores"][name] for e in found["images"]]
    assert found["images"][0]["scores"]["jpeg_bytes"] > found["images"][1]["scores"]["jpeg_bytes"]
    assert run(["score", *pictures, *both]) == 0
    table = capsys.readouterr().out
    assert "jpeg_bytes (bytes)" in table
    assert "jpeg_compressibility (-kB)" in table


def test_evaluate_takes_options_of_further_rewards(
    data: dict[str, Any], config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", data["model"]["base"], "--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"]
    base += ["--guidance-scale", "1", "--images-per-prompt", "1", "--device", "cpu", "--json"]

    def kilobytes(*arguments: str) -> float:
        assert run(["evaluate", *base, "--reward", "jpeg_bytes", *arguments]) == 0
        return float(json.loads(capsys.readouterr().out)["model"]["jpeg_bytes"]["mean"])

    coarse, fine = kilobytes("-o", "quality=20"), kilobytes("--option", "jpeg_bytes.quality=95")
    assert coarse < kilobytes() <= fine


def test_evaluate_adds_no_reward_a_run_measures_already_and_labels_another_apart(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(
        prompts={"train": "prompts.txt", "heldout": "prompts.txt"},
        evaluation={"at_end": False, "images_per_prompt": 1, "rewards": [{"name": "jpeg_bytes"}]},
    )
    assert run(["train", str(path)]) == 0
    capsys.readouterr()

    def evaluated(*arguments: str) -> dict[str, Any]:
        where = ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--json", "--output", str(tmp_path / "out")]
        assert run([*where, *arguments]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["tuned"]
        return found

    own = evaluated()
    assert evaluated("--reward", "jpeg_bytes") == own
    both = evaluated("--reward", "jpeg_bytes", "-o", "quality=20")
    assert both["jpeg_bytes"] == own["jpeg_bytes"]
    assert both["jpeg_bytes.2"]["n"] == own["jpeg_bytes"]["n"]
    assert both["jpeg_bytes.2"]["mean"] < own["jpeg_bytes"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward", "jpeg_bytes", "-o", "quality"], "--option quality: write KEY=VALUE"),
        (["--reward", "jpeg_bytes", "-o", "quality=300"], "--option jpeg_bytes.quality: must be"),
        (["--reward", "jpeg_bytes", "--reward", "jpeg_bytes"], "--reward jpeg_bytes is given twice"),
        (
            ["--reward", "jpeg_bytes", "--reward", "jpeg_compressibility", "-o", "quality=3"],
            "--option quality=3: write NAME.key=value; the rewards given are: jpeg_bytes, jpeg_compressibility.",
        ),
    ],
)
def test_options_of_rewards_are_checked(
    pictures: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refused(capsys, "score", *pictures, *arguments)


# -- listings ---------------------------------------------------------------------------------------------------------


def test_a_plugin_lists_a_name_once() -> None:
    class Plugin:
        @hookimpl
        def alignprop_register_weights(self) -> list[WeightsSpec]:
            return [
                WeightsSpec(name="starter", summary="Small.", reward=name, path=f"a:{name}.safetensors")
                for name in ("one", "two")
            ]

    known = Registry.from_plugins({"mine": Plugin()})
    assert known.plugins[0].names("weights") == ("starter",)
    assert len(known.weights()) == 2
