"""`alignprop sample`: prompts from the command line and a file, a model with a LoRA or a run, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

import alignprop_core as ap
from alignprop_core.cli import run
from alignprop_core.config.load import load_config
from alignprop_core.registry.registry import Registry
from alignprop_core.training.trainer import Trainer
from tests.support.toy_runs import toy_data

REWARD = '''
from alignprop_core import Reward


class Red(Reward):
    """Red images."""

    def score(self, batch):
        return batch.images[:, 0].mean((1, 2)) - batch.images[:, 2].mean((1, 2))
'''


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model, with three denoising steps and a guidance scale of 2."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "red.py").write_text(REWARD)
    known = Registry.from_plugins({})
    data = toy_data(tiny_model, folder, rewards=[{"name": f"{folder / 'red.py'}:Red"}])
    Trainer(load_config(data, registry=known), registry=known).train()
    return folder / "run"


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sample(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `alignprop sample` and return the files it printed."""

    def call(*arguments: object) -> list[Path]:
        assert run(["sample", *map(str, arguments)]) == 0, capsys.readouterr().err
        return [Path(line) for line in capsys.readouterr().out.split()]

    return call


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_a_run_gives_model_lora_and_sampling_settings(sample: Any, trained: Path, tiny_model: Path) -> None:
    (of_run,) = sample("a fox", "--run", trained, "--output", "run")
    settings = ("--steps", 3, "--guidance-scale", 2)
    (by_hand,) = sample("a fox", "--model", tiny_model, "--lora", trained / "lora", *settings, "--output", "model")
    (base,) = sample("a fox", "--model", tiny_model, *settings, "--output", "base")
    (other,) = sample("a fox", "--run", trained, "--steps", 2, "--output", "other")
    assert pixels(of_run) == pixels(by_hand)
    assert pixels(of_run) != pixels(base)
    assert pixels(of_run) != pixels(other), "an option replaces the run's setting"


def test_a_run_or_its_lora_gives_the_settings_that_are_not_given(
    sample: Any, trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (of_run,) = sample("a fox", "--run", trained, "--output", "run")
    (first,) = sample(trained, "a fox", "--output", "first")
    assert pixels(first) == pixels(of_run)
    for lora in (trained, trained / "lora", trained / "lora" / "run.safetensors"):
        assert run(["sample", "a fox", "--model", str(tiny_model), "--lora", str(lora), "--output", lora.name]) == 0
        printed = capsys.readouterr()
        assert f"note: sampling settings that are not given are those of {trained}" in printed.err
        assert pixels(Path(printed.out.strip())) == pixels(of_run)
    (other,) = sample("a fox", "--run", trained, "--model", tiny_model, "--steps", 2)
    (given,) = sample("a fox", "--model", tiny_model, "--lora", trained, "--steps", 2)
    assert pixels(other) == pixels(given) != pixels(of_run)


def test_a_run_of_a_python_function_is_sampled_without_the_function(
    sample: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bright(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    trained = ap.train(toy_data(tiny_model, Path.cwd(), rewards=[{"name": bright}]), registry=Registry.from_plugins({}))
    (image,) = sample("a fox", "--run", trained)
    assert pixels(image) == trained.sample("a fox")[0].tobytes()
    # Its rewards cannot be computed by a command.
    assert run(["evaluate", str(trained), "--prompts", "prompts.txt"]) == 2
    assert '"bright" was an object passed from Python' in capsys.readouterr().err
    config = trained.folder / "config.yaml"
    config.write_text(config.read_text().replace("sampling:", "sampling:\n  stesp: 3", 1))
    assert run(["sample", "a fox", "--run", str(trained)]) == 2
    assert "sampling.stesp: unknown key. Did you mean sampling.steps?" in capsys.readouterr().err


def test_prompts_of_a_file_follow_those_of_the_command_line(sample: Any, trained: Path) -> None:
    Path("prompts.txt").write_text("two owls\na hill\n")
    files = sample("a fox", "--prompts", "prompts.txt", "--run", trained, "--count", 2, "--seed", 5)
    words = [file.stem.replace("_", " ").replace("-", " ").split() for file in files]
    assert [(name[:2], name[2]) for name in words] == [
        (["a", "fox"], "5"), (["a", "fox"], "6"), (["two", "owls"], "5"),
        (["two", "owls"], "6"), (["a", "hill"], "5"), (["a", "hill"], "6"),
    ]  # fmt: skip
    assert len({pixels(file) for file in files}) == 6
    assert len(sample("--prompts", "prompts.txt", "--run", trained, "--output", "only")) == 2


def test_images_with_and_without_the_lora_do_not_overwrite_each_other(
    sample: Any, trained: Path, tiny_model: Path
) -> None:
    model = ("--model", tiny_model, "--steps", 3, "--guidance-scale", 2)
    with_lora = (*model, "--lora", trained / "lora")
    calls: list[tuple[object, ...]] = [model, with_lora, (*with_lora, "--strength", 0.5), (*with_lora, "--compare")]
    files = [sample("a fox", *arguments)[0] for arguments in calls]
    assert len(set(files)) == 4
    assert len({pixels(file) for file in files}) == 4


def test_compare_shows_the_base_model_beside_the_lora(sample: Any, trained: Path, tiny_model: Path) -> None:
    (both,) = sample("a fox", "--run", trained, "--compare")
    (tuned,) = sample("a fox", "--run", trained)
    (base,) = sample("a fox", "--model", tiny_model, "--steps", 3, "--guidance-scale", 2)
    with Image.open(both) as sheet, Image.open(base) as left, Image.open(tuned) as right:
        width = left.width
        assert sheet.height == left.height
        assert sheet.crop((0, 0, width, left.height)).tobytes() == left.convert("RGB").tobytes()
        assert (
            sheet.crop((sheet.width - width, 0, sheet.width, left.height)).tobytes() == right.convert("RGB").tobytes()
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a fox"], "Give a run folder before the prompts"),
        (["runs/gone", "a fox"], "runs/gone is not a run folder"),
        (["RUN"], "Give at least one prompt"),
        (["a fox", "--run", "RUN", "--model", "gone"], "--model: Unknown model"),
        (["a fox", "--run", "RUN", "--seed", str(2**63)], "--seed"),
        (["a fox", "--run", "RUN", "--seed", "-1"], "--seed"),
        (["--run", "RUN"], "Give at least one prompt, or --prompts FILE"),
        (["--run", "RUN", "--prompts", "gone.txt"], "--prompts: No prompt file"),
        (["a fox", "--model", "MODEL", "--compare"], "--compare needs a LoRA"),
        (["a fox", "--run", "nowhere"], "nowhere"),
        (["a fox", "--run", "RUN", "--lora", "gone"], "gone"),
        (["a fox", "--run", "RUN", "--width", "33"], "--width: must be a multiple of 8"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str], words: str, trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"RUN": str(trained), "MODEL": str(tiny_model)}
    assert run(["sample", *(values.get(argument, argument) for argument in arguments)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
