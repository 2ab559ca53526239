"""Weights load without unpickling, the converter warns before it unpickles, and nothing accesses the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_core.errors import PromptError, WeightsError
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_core.weights import read_header
from alignprop_counting import DETECTORS_HOOK, DetectorSpec
from alignprop_counting.config import DetectorConfig
from alignprop_counting.loading import load_detector
from alignprop_counting.testing import random_images
from alignprop_ultralytics import ARCHITECTURES
from alignprop_ultralytics.convert import main
from alignprop_ultralytics.loading import build_detector
from alignprop_ultralytics.offline import DetectionModel, yaml_model_load


def test_the_file_provides_architecture_names_and_size(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.build("yolo26n")
    file = tiny.write(model, tmp_path / "w.safetensors")
    detector: Any = load_detector(DetectorConfig(detector="yolo", weights=str(file)), default_registry())
    assert detector.names == tiny.names
    assert (detector.image_size, detector.one_to_one) == (64, True)
    images = random_images(1, 64, 64).float()
    with torch.no_grad():
        expected = model(images)[1]["one2one"]["scores"].sigmoid().transpose(1, 2)
        assert torch.allclose(detector(images).probabilities, expected, rtol=1e-5, atol=0)
    assert build_detector("yolo", tiny.write(model, tmp_path / "n.safetensors", None), None).image_size == 640
    assert build_detector("yolo", file, 96).image_size == 96


def test_every_registered_architecture_exists_in_ultralytics() -> None:
    offers = {o.name: o.spec for o in default_registry().offered(DETECTORS_HOOK, DetectorSpec)}
    assert {"yolo", *ARCHITECTURES} <= set(offers)
    assert offers["yolo11n"].license == "AGPL-3.0-only"
    for name in ARCHITECTURES:
        assert yaml_model_load(f"{name}.yaml")["scale"] in name


def test_a_file_without_a_header_loads_by_the_architecture_s_name(tmp_path: Path) -> None:
    model = DetectionModel(yaml_model_load("yolo11n.yaml"), nc=80, verbose=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "yolo11n.safetensors")
    detector = build_detector("yolo11n", tmp_path / "yolo11n.safetensors", None)
    assert len(detector.names) == 80
    assert detector.names[0] == "person"
    with pytest.raises(WeightsError, match=r"does not name the architecture\. Set it .* detector: yolo11n"):
        build_detector("yolo", tmp_path / "yolo11n.safetensors", None)
    with pytest.raises(WeightsError, match=r"does not match the architecture \(80 classes\): .* and \d+ more"):
        build_detector("yolov8n", tmp_path / "yolo11n.safetensors", None)


def test_a_head_of_the_wrong_size_is_one_clear_error(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.build()
    model.names = {**model.names, 5: "bear"}
    with pytest.raises(WeightsError, match=r"\(6 classes\): .*cv3.* is \(5, .*\), not \(6, "):
        build_detector("yolo", tiny.write(model, tmp_path / "w.safetensors"), None)


def test_a_network_for_another_task_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    yaml = yaml_model_load("yolo11n-seg.yaml")
    model = tiny.build()
    model.yaml = {**yaml, "nc": 5}
    with pytest.raises(WeightsError, match="its head is Segment; a detection head"):
        build_detector("yolo", tiny.write(model, tmp_path / "w.safetensors"), None)


def test_a_checkpoint_is_not_opened_and_the_converter_is_named(tmp_path: Path) -> None:
    torch.save({"model": 1}, tmp_path / "yolo11n.pt")
    with pytest.raises(
        WeightsError, match=r"python -m alignprop_ultralytics.convert .*yolo11n.pt .*yolo11n.safetensors"
    ):
        load_detector(DetectorConfig(detector="yolo", weights=str(tmp_path / "yolo11n.pt")), default_registry())


def test_missing_weights_name_the_way_to_get_them() -> None:
    with pytest.raises(
        WeightsError, match=r'detector "yolo11n" has no default weights file. Ultralytics publishes pickles'
    ):
        load_detector(DetectorConfig(detector="yolo11n"), default_registry())


def test_the_converter_reads_a_list_of_names(
    tmp_path: Path, tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.build("yolo11n")
    model.names = list(tiny.names)
    torch.save({"model": model}, tmp_path / "in.pt")
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 0
    assert build_detector("yolo", tmp_path / "out.safetensors", None).names == tiny.names
    for names in (list(tiny.names[:3]), None):
        model.names = names
        torch.save({"model": model}, tmp_path / "in.pt")
        assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 2
        assert "its names are not those of its 5 classes" in capsys.readouterr().err


@pytest.mark.parametrize("half", [False, True])
def test_the_converter_keeps_weights_names_and_size(
    tmp_path: Path, tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str], half: bool
) -> None:
    model = tiny.build("yolo26n")
    model.args = {"imgsz": 96}
    torch.save({"model": model.half(), "ema": None}, tmp_path / "in.pt")
    target = tmp_path / "out.safetensors"
    assert main([str(tmp_path / "in.pt"), str(target), *(["--half"] if half else [])]) == 0
    printed = capsys.readouterr()
    assert "this runs any code that the file contains" in printed.err
    assert "5 classes" in printed.out
    assert not list(tmp_path.glob("*.part"))
    assert read_header(target)["image_size"] == 96
    assert {v.dtype for v in load_file(target).values()} - {torch.int64} == {torch.float16 if half else torch.float32}
    detector = build_detector("yolo", target, None)
    assert detector.names == tiny.names
    images = random_images(1, 96, 96).float()
    with torch.no_grad():
        expected = model.float()(images)[1]["one2one"]["scores"].sigmoid().transpose(1, 2)
        assert torch.allclose(detector(images).probabilities, expected, rtol=1e-5, atol=1e-7)


def test_the_converter_refuses_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "in.pt")
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "contains Linear, not a YOLO detection network" in capsys.readouterr().err
    for arguments in (["missing.pt", "out.safetensors"], [str(tmp_path / "in.pt"), "out.pt"]):
        with pytest.raises(SystemExit):
            main(arguments)


class Vanishing:
    """A class that does not exist when the pickle is opened."""


@pytest.mark.parametrize("content", ["class", "module", "text", "empty"])
def test_other_pickles_are_one_message_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"
    if content in ("class", "module"):
        if content == "module":
            monkeypatch.setattr(Vanishing, "__module__", "vanishing")
            monkeypatch.setitem(sys.modules, "vanishing", SimpleNamespace(Vanishing=Vanishing))
        torch.save({"model": Vanishing()}, source)
        monkeypatch.undo()
        if content == "class":
            monkeypatch.delattr(sys.modules[__name__], "Vanishing")
    else:
        source.write_text("not a pickle" if content == "text" else "")
    capsys.readouterr()
    assert main([str(source), str(target)]) == 2
    printed = capsys.readouterr()
    warning, *message = printed.err.strip().split("\n")
    assert "this runs any code" in warning
    assert len(message) == 1
    assert f"{source}: cannot be unpickled (" in message[0]
    assert {"class": "Can't get attribute 'Vanishing'", "module": "No module named 'vanishing'"}.get(
        content, "Error: "
    ) in message[0]
    assert printed.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["in.pt"]


def test_a_checkpoint_of_bare_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": torch.zeros(3)}, tmp_path / "in.pt")
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "contains Tensor, not a YOLO detection network" in capsys.readouterr().err


def test_an_unwritable_target_is_one_message(
    tmp_path: Path, tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": tiny.build()}, tmp_path / "in.pt")
    target = tmp_path / "missing" / "out.safetensors"
    assert main([str(tmp_path / "in.pt"), str(target)]) == 2
    assert f"{target}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["yolo11n", "yolo26n"])
def test_the_counting_rewards_work_with_yolo(tmp_path: Path, tiny: SimpleNamespace, architecture: str) -> None:
    file = tiny.write(tiny.build(architecture), tmp_path / "w.safetensors")
    options = {"detector": "yolo", "weights": str(file)}
    images = random_images(3).float()
    given = ImageBatch(
        images=images.requires_grad_(), prompts=("three foxes", "a cat and two birds", "4 traffic lights")
    )
    reward = default_registry().load_reward("object_count", options)
    scores = reward(given)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient != 0).any(1).float().mean() > 0.9
    with torch.no_grad():
        assert torch.allclose(reward(given[1:2]), scores[1:2], atol=1e-4)
        for kind in (torch.bfloat16, torch.float16):
            assert reward(ImageBatch(images=images.to(kind), prompts=given.prompts)).dtype == torch.float32
        many = ImageBatch(images=random_images(64, 32, 32).float(), prompts=("three foxes",) * 64)
        assert reward(many).shape == (64,)
    hard = default_registry().load_reward("hard_count", options)
    assert set(hard(given).tolist()) <= {0.0, 1.0}
    with torch.inference_mode():
        reward(ImageBatch(images=random_images(1, 40, 72).float(), prompts=("a fox",)))
    with pytest.raises(PromptError, match=r'no class of the detector. Did you mean "fox"'):
        reward(ImageBatch(images=images[:1], prompts=("three foxxes",)))


def test_there_is_no_network_access_and_no_settings_are_written(tmp_path: Path) -> None:
    code = (
        "import os, socket\n"
        "def refuse(*a, **k): raise AssertionError('network access')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from alignprop_ultralytics.offline import yaml_model_load\n"
        "from ultralytics.utils import ONLINE, USER_CONFIG_DIR\n"
        "assert not ONLINE\n"
        "assert 'OMP_NUM_THREADS' not in os.environ\n"
        "yaml_model_load('yolo11n.yaml')\n"
        "print(USER_CONFIG_DIR)\n"
    )
    hidden = ("YOLO_", "OMP_NUM_THREADS", "XDG_", "MPLCONFIGDIR")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert not [path for path in tmp_path.rglob("*") if "ltralytics" in path.name]
    assert not Path(done.stdout.strip()).exists()


def test_the_hook_module_imports_neither_torch_nor_ultralytics() -> None:
    code = "import sys, alignprop_ultralytics\nassert not {'torch', 'ultralytics'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_this_distribution_imports_ultralytics() -> None:
    plugins = Path(__file__).parents[2]
    offenders = [
        path
        for path in (*plugins.glob("*/src/**/*.py"), *(plugins.parent / "alignprop_core").rglob("*.py"))
        if "alignprop_ultralytics" not in path.parts
        and any(
            line.lstrip().startswith(("import ultralytics", "from ultralytics"))
            for line in path.read_text().splitlines()
        )
    ]
    assert offenders == []


def test_the_license_is_named_first() -> None:
    folder = Path(__file__).parents[1]
    assert "AGPL-3.0" in (folder / "README.md").read_text().splitlines()[0]
    assert 'license = "AGPL-3.0-only"' in (folder / "pyproject.toml").read_text()
    assert "GNU AFFERO GENERAL PUBLIC LICENSE" in (folder / "LICENSE").read_text()
