"""An invalid header is one message that names the file and the key, and code in a header never runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from alignprop_core.errors import ConfigError, WeightsError
from alignprop_core.registry.registry import default_registry
from alignprop_core.weights import read_header
from alignprop_counting.config import DetectorConfig
from alignprop_counting.loading import load_detector
from alignprop_ultralytics.loading import build_detector


@pytest.fixture(scope="module")
def good(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    model = tiny.build("yolo11n")
    return model, read_header(tiny.write(model, tmp_path_factory.mktemp("good") / "w.safetensors"))


def description(header: dict[str, Any]) -> Any:
    return header["ultralytics"]


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        (lambda h: description(h).pop("yaml"), "ultralytics.yaml: field required"),
        (lambda h: description(h).pop("names"), "ultralytics.names: field required"),
        (
            lambda h: description(h).update(names={"1": "cat", "2": "dog"}),
            r'the names must be numbered "0", "1"',
        ),
        (lambda h: description(h).update(names=["cat", "dog"]), "ultralytics.names: input should be a valid dict"),
        (lambda h: description(h).update(names={"0": 5}), "ultralytics.names.0: input should be a valid string"),
        (lambda h: h.update(ultralytics=[]), "ultralytics: "),
        (lambda h: h.update(image_size="big"), r"image_size: input should be a valid integer .*\(it is 'big'\)"),
        (lambda h: h.update(image_size=8), "image_size: input should be greater than or equal to 32"),
        (lambda h: description(h)["yaml"].pop("head"), "ultralytics.yaml.head: field required"),
        (lambda h: description(h)["yaml"].update(scales=7), "ultralytics cannot build the network"),
        (lambda h: description(h)["yaml"]["head"][0].pop(), "ultralytics.yaml.head.0: "),
    ],
)
def test_an_invalid_header_is_one_message(
    good: tuple[Any, dict[str, Any]], tmp_path: Path, broken: Any, key: str
) -> None:
    model, header = good
    header = json.loads(json.dumps(header))
    broken(header)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file, {"config": json.dumps(header)})
    with pytest.raises(WeightsError, match=f"^{re.escape(str(file))}.*{key}"):
        build_detector("yolo", file, None)


def test_code_in_a_header_does_not_run(good: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    model, header = good
    ran = tmp_path / "ran"
    for change in ({"activation": f"open({str(ran)!r}, 'w')"}, {"activation": f"nn.SiLU(open({str(ran)!r}, 'w'))"}):
        own = json.loads(json.dumps(header))
        own["ultralytics"]["yaml"].update(change)
        save_file(model.state_dict(), tmp_path / "w.safetensors", {"config": json.dumps(own)})
        with pytest.raises(WeightsError, match=r"ultralytics\.yaml\.activation"):
            build_detector("yolo", tmp_path / "w.safetensors", None)
    own = json.loads(json.dumps(header))
    own["ultralytics"]["yaml"]["backbone"][0][2] = "load_checkpoint"
    save_file(model.state_dict(), tmp_path / "w.safetensors", {"config": json.dumps(own)})
    with pytest.raises(WeightsError, match="'load_checkpoint' is not a layer of ultralytics"):
        build_detector("yolo", tmp_path / "w.safetensors", None)
    assert not ran.exists()


@pytest.mark.parametrize("size", [33, 48, 50, 100, 150])
def test_an_unsupported_size_is_refused_on_loading(
    good: tuple[Any, dict[str, Any]], tiny: SimpleNamespace, tmp_path: Path, size: int
) -> None:
    file = tiny.write(good[0], tmp_path / "w.safetensors")
    options = DetectorConfig(detector="yolo", weights=str(file), image_size=size)
    with pytest.raises(ConfigError, match=rf"^options\.image_size: .*{size} x {size}\. Use a multiple of 32\."):
        load_detector(options, default_registry())
