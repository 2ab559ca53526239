"""What people get wrong: one clear message, the right exit code, nothing saved is lost."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from alignprop_core.cli import run
from alignprop_core.config.load import load_config

pytest.importorskip("alignprop_jpeg", reason="the commands are tried with a real reward")


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a run config; keyword arguments replace whole sections."""
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")

    def write(**sections: object) -> Path:
        data: dict[str, object] = {
            "model": {"base": str(model)},
            "prompts": {"train": "prompts.txt"},
            "sampling": {"steps": 2, "guidance_scale": 1.0},
            "rewards": [{"name": "jpeg_compressibility"}],
            "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
            "previews": {"prompts": []},
            "output": str(tmp_path / "run"),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data | sections))
        return path

    return write


def refused(capsys: pytest.CaptureFixture[str], arguments: list[object], *words: str, code: int = 2) -> str:
    """Run a command, check its exit code and that its one message has the words; return the message."""
    assert run([str(argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.startswith("error: ")
    for word in words:
        assert word in message, message
    return message


def test_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["train", "nowhere.yaml"], "nowhere.yaml", "no such run config")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rewards": [{"name": "jpeg_compressability"}]}, ["rewards.0", "jpeg_compressibility"]),
        ({"sampling": {"stepps": 3}}, ["sampling.stepps", "steps"]),
        ({"training": {"steps": "many"}}, ["training.steps", "many"]),
        ({"training": {"batch_size": 0}}, ["training.batch_size"]),
        ({"rewards": [{"name": "jpeg_compressibility", "options": {"quality": 300}}]}, ["rewards.0.options.quality"]),
        ({"rewards": [{"name": "./red.py"}]}, ["add the name of a function or class: ./red.py:NAME"]),
        ({"rewards": [{"name": "jpeg_bytes"}]}, ["rewards.0", "evaluation.rewards"]),
        ({"prompts": {"train": "nowhere.txt"}}, ["nowhere.txt"]),
        ({"model": {"base": "no_such_model"}}, ["model.base", "no_such_model"]),
        ({"model": {"base": "./missing.safetensors"}}, ["missing.safetensors"]),
        ({"lora": {"target_modules": ["to_qq"]}}, ["to_qq", "to_q"]),
        ({"lora": {"init_from": "nowhere.safetensors"}}, ["nowhere.safetensors"]),
        ({"lr": 1e-3}, ["lr", "optimizer.learning_rate"]),
    ],
)
def test_config_mistakes_name_the_key(
    config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, object],
    words: list[str],
) -> None:
    refused(capsys, ["train", config(**sections)], *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.jsonl", '{"prompt": "a fox"}\n\n{"prompt": \n', ["bad.jsonl", "3"]),
        ("none.jsonl", '{"text": "a fox"}\n', ["none.jsonl", "prompt"]),
        ("blank.txt", "\n   \n", ["blank.txt"]),
    ],
)
def test_prompt_file_mistakes_name_file_and_line(
    config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    words: list[str],
) -> None:
    (tmp_path / name).write_text(text)
    refused(capsys, ["train", config(prompts={"train": name})], *words)


def test_blank_lines_between_prompts_are_fine(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n\n\nan owl\n")
    assert run(["train", str(config()), "--dry-run"]) == 0
    assert "Everything loads, and an image was generated." in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_on_a_machine_without(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["train", config(), "training.device=cuda"], "training.device", "Choose auto")


def test_fp16_on_a_cpu(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["train", config(), "training.mixed_precision=fp16"], "fp16", "bf16")


def test_existing_output_is_kept(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    refused(capsys, ["train", config()], "not empty", "--resume latest", "--overwrite")
    assert (tmp_path / "run" / "mine.txt").read_text() == "precious"


def test_pickled_model_is_refused_unopened(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"not even a pickle")
    refused(capsys, ["train", config(model={"base": str(tmp_path / "model.ckpt")})], "pickle", ".safetensors")


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit on file size stands for the disk: the LoRA files fit, the optimizer's state does not."""
    path = config(save={"every": 1, "state_every": 2}, training={"steps": 3, "batch_size": 2, "device": "cpu"})
    limit, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, highest))
    try:
        code = run(["train", str(path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))
    printed = capsys.readouterr().err
    assert code in (1, 2), printed
    assert "Traceback" not in printed
    assert "Not enough disk space for" in printed
    run_folder = tmp_path / "run"
    assert (run_folder / "config.yaml").is_file()
    assert not list(run_folder.rglob("*.tmp")), "no half-written file is left"


def test_score_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.png").write_text("not an image")
    refused(capsys, ["score", tmp_path / "no.png", "--reward", "jpeg_bytes"], "no.png", "not a readable image")
    refused(capsys, ["score", tmp_path / "gone.png", "--reward", "jpeg_bytes"], "gone.png")
    refused(capsys, ["score", tmp_path / "gone.png", "--reward", "jpeg_byte"], "jpeg_bytes")
    refused(capsys, ["score", tmp_path / "gone.png", "--reward", "jpeg_bytes", "-o", "quality=x"], "quality")


def test_a_folder_is_scored_image_by_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert run(["score", str(tmp_path), "--reward", "jpeg_bytes", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["images"]
    assert [Path(one["image"]).name for one in scored] == ["a.JPG", "b.png"]
    refused(capsys, ["score", tmp_path / "empty", "--reward", "jpeg_bytes"], "empty is a folder without images (.png")


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--lr", "optimizer.learning_rate"),
        ("--lr=1e-3", "optimizer.learning_rate"),
        ("--batch-size", "training.batch_size"),
        ("--steps", "training.steps"),
        ("--training.steps=3", "training.steps"),
        ("--cfg-scale", "sampling.guidance_scale"),
    ],
)
def test_a_key_given_as_an_option_is_named(option: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["train", "run.yaml", option], key, "Write KEY=VALUE without dashes to change a key of the run")


def test_other_unknown_options_are_not_taken_for_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "run.yaml", "--xyzzy"], ["train", "run.yaml", "--resum"], ["sample", "--lr", "1"]):
        assert "KEY=VALUE" not in refused(capsys, list(arguments), "No such option")


def test_variables_in_paths(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    home = os.environ["HOME"]
    written = config(output="$HOME/runs/x", model={"base": "${HOME}/no_such_model.safetensors"})
    refused(capsys, ["train", written], f"model.base: {home}/no_such_model.safetensors does not exist")
    assert load_config(written).output == f"{home}/runs/x"
    refused(capsys, ["train", config(output="$NO_SUCH/x")], "output: the environment variable $NO_SUCH is not set")


def test_a_score_that_is_no_number_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "        return batch.images.mean((1, 2, 3)) / 0 * 0"
    (tmp_path / "odd.py").write_text(
        f"from alignprop_core.reward import Reward\n\n\nclass Odd(Reward):\n    def score(self, batch):\n{code}\n"
    )
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    assert run(["score", "red.png", "--reward", "./odd.py:Odd"]) == 1
    assert 'error: Reward "odd" scores red.png as nan.' in capsys.readouterr().err


def test_evaluate_mistakes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["evaluate"], "--model")
    refused(capsys, ["evaluate", tmp_path, "--model", model], "--model with a run needs --output FOLDER")
    refused(capsys, ["evaluate", tmp_path, "--seed", 2**64], "--seed")
    refused(capsys, ["evaluate", tmp_path], f"{tmp_path} is not a run folder: it has no config.yaml")
    refused(capsys, ["evaluate", "--model", model], "--prompts")


def test_sample_mistakes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["sample", "fox", "--model", model, "--steps", "0"], "steps")
    refused(capsys, ["sample", "fox", "--model", model, "--lora", "gone"], "gone")
    refused(capsys, ["sample", "fox", "--run", "runs/thre"], "runs/thre is not a run folder")
