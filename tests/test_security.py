"""What docs/security.md promises: nothing is unpickled, nothing phones home, nothing leaves a run folder."""

from __future__ import annotations

import ast
import io
import pickle
import shutil
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alignprop_core._files import safe_name
from alignprop_core.config.load import load_config
from alignprop_core.config.yaml import read_yaml
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.errors import AlignpropError, ConfigError, LoraError, ModelError, OutputError
from alignprop_core.lora.formats import read_lora
from alignprop_core.registry.offers import Offer
from alignprop_core.registry.registry import default_registry
from alignprop_core.runs.folder import RunFolder
from alignprop_core.specs import RewardSpec
from alignprop_core.testing import tiny_pipeline, train_two_steps

ROOT = Path(__file__).parents[1]
SOURCES = [
    *ROOT.glob("alignprop_core/**/*.py"),
    *ROOT.glob("plugins/*/src/**/*.py"),
    *ROOT.glob("examples/**/*.py"),
    *ROOT.glob("plugins/*/scripts/*.py"),
]
OPENS_PICKLES = {"plugins/alignprop-ultralytics/src/alignprop_ultralytics/convert.py"}
"""The one command whose purpose it is, and which says so."""


# -- malicious weights ------------------------------------------------------------------------------------------


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def plant(file: Path, mark: Path, kind: str) -> Path:
    """Write a weights file that executes code when it is unpickled."""
    state = {"state_dict": {"weight": torch.zeros(2)}, "extra": Evil(mark)}
    if kind == "zip":
        torch.save(state, file)
    elif kind == "legacy":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif kind == "plain":
        file.write_bytes(pickle.dumps(state))
    elif kind == "old protocol":
        file.write_bytes(pickle.dumps(state, protocol=0))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(state))
            archive.writestr("archive/version", "3")
    return file


KINDS = ["zip", "legacy", "plain", "old protocol", "bare zip"]
SUFFIXES = [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_files_really_execute_when_unpickled(kind: str, tmp_path: Path) -> None:
    """Without this the tests below would prove nothing."""
    file = plant(tmp_path / "evil.pt", tmp_path / "mark", kind)
    if kind in ("zip", "legacy"):
        torch.load(file, weights_only=False)
    elif kind == "bare zip":
        with zipfile.ZipFile(file) as archive:
            pickle.load(io.BytesIO(archive.read("archive/data.pkl")))
    else:
        pickle.loads(file.read_bytes())
    assert (tmp_path / "mark").exists()


def weights_options(offer: Offer[RewardSpec]) -> list[str]:
    """The options that may name a file of weights."""
    fields = default_registry().reward_config_class(offer.full_name).model_fields
    return [name for name in fields if any(word in name for word in ("weight", "checkpoint", "model"))]


def variants(offer: Offer[RewardSpec]) -> Iterator[dict[str, Any]]:
    """Options to try each file with: every detector, every kind of network, where a reward has several."""
    fields = default_registry().reward_config_class(offer.full_name).model_fields
    if "detector" in fields:
        detectors = default_registry().offered("alignprop_counting_detectors", object)
        yield from ({"detector": detector.name} for detector in detectors)
    elif "model" in fields and offer.distribution == "alignprop-classifier":
        yield from (
            {"model": name} for name in ("efficientnet-lite0", "timm/test_efficientnet", "torchvision/resnet18")
        )
    else:
        yield {}


PLANTED = [
    pytest.param(offer, option, options, id="-".join([offer.name, option, *options.values()]))
    for offer in default_registry().rewards()
    for option in weights_options(offer)
    for options in variants(offer)
    if option not in options
]


def test_every_installed_reward_with_weights_is_tried() -> None:
    tried = {param.values[0].name for param in PLANTED}  # type: ignore[attr-defined]
    # Weights of a measure without such an option ship in its own package and are safetensors.
    assert {offer.name for offer in default_registry().rewards() if offer.spec.weights} - tried <= {"scene_accuracy"}
    assert len(tried) >= 10


@pytest.mark.parametrize(("offer", "option", "options"), PLANTED)
def test_no_weights_option_executes_what_a_file_hides(
    offer: Offer[RewardSpec], option: str, options: dict[str, Any], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    registry = default_registry()
    kind = registry.reward_config_class(offer.full_name)
    # What must be given beside the file: a folder of pictures. Other weights come from the starter set, so that the
    # reward gets as far as the planted file.
    needed = {name: str(tmp_path / "pictures") for name, field in kind.model_fields.items() if field.is_required()}
    sets = {o.spec.name for o in registry.weights() if o.spec.reward == offer.name}
    others = {
        n: "starter" for n in weights_options(offer) if n.endswith("weights") and n != option and "starter" in sets
    }
    for kind_of_file, suffix in zip([*KINDS, "zip"], SUFFIXES, strict=True):
        file = plant(tmp_path / f"evil{suffix}", mark, kind_of_file)
        with pytest.raises(AlignpropError) as caught:
            registry.load_reward(offer.full_name, {**needed, **others, **options, option: str(file)})
        assert not mark.exists(), f"{offer.name}: {option}: {file.name} ({kind_of_file}) executed code"
        if option.endswith("weights"):
            assert file.name in str(caught.value), "the file was not reached, so this proves nothing"


def test_no_classifier_folder_executes_what_its_pickle_hides(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    folder, mark = tmp_path / "classifier", tmp_path / "mark"
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin", mark, "zip")
    with pytest.raises(AlignpropError):
        default_registry().load_reward("image_classifier", {"model": f"transformers/{folder}", "target": 0})
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
def test_no_model_file_executes_what_it_hides(suffix: str, tmp_path: Path) -> None:
    file = plant(tmp_path / f"evil{suffix}", tmp_path / "mark", "zip")
    with pytest.raises(ModelError):
        load_pipeline(str(file), registry=default_registry())
    assert not (tmp_path / "mark").exists()


def test_no_pickle_inside_a_model_folder_is_opened(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    tiny_pipeline().save_pretrained(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    plant(weights.with_suffix(".bin"), mark, "zip")
    with pytest.raises(ModelError):
        load_pipeline(str(folder), registry=default_registry())
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
def test_no_lora_file_executes_what_it_hides(suffix: str, tmp_path: Path) -> None:
    file = plant(tmp_path / f"evil{suffix}", tmp_path / "mark", "zip")
    with pytest.raises(LoraError):
        read_lora(file)
    assert not (tmp_path / "mark").exists()


def test_no_checkpoint_executes_what_it_hides(tmp_path: Path) -> None:
    """Resuming reads files of a run folder, which somebody may have sent: none is unpickled."""
    from alignprop_core.training.train import train

    run, mark = train_two_steps("jpeg_compressibility", tmp_path), tmp_path / "mark"
    checkpoint = max((run / "checkpoints").iterdir())
    names = [file for file in checkpoint.rglob("*") if file.suffix not in (".json", ".txt")]
    assert names, "a checkpoint without tensors would prove nothing"
    config = load_config(run / "config.yaml", [f"output={tmp_path / 'again'}", "training.steps=3"])
    train(config, resume=checkpoint)  # whole, it goes on
    for file in names:
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        whole = file.read_bytes()
        plant(file, mark, "zip")
        with pytest.raises(Exception):  # noqa: B017 - any error will do, as long as nothing ran
            train(config, resume=checkpoint)
        assert not mark.exists(), f"{file.name} executed code"
        file.write_bytes(whole)


# -- the source itself ------------------------------------------------------------------------------------------

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system",
    "torch.hub.load", "pandas.read_pickle",
}  # fmt: skip


def unsafe_calls(path: Path) -> Iterator[str]:
    """Yield the calls in a file that execute or unpickle data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        facts = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in FORBIDDEN
            and facts.get("Loader", "") != "_Loader"
            and not (name == "yaml.load" and len(node.args) > 1)
        ):
            yield f"{name} in line {node.lineno}"
        elif name == "torch.load" and facts.get("weights_only") != "True":
            yield f"torch.load without weights_only=True in line {node.lineno}"
        elif (
            facts.get("allow_pickle") == "True"
            or facts.get("trust_remote_code") == "True"
            or facts.get("shell") == "True"
        ):
            yield f"{name} with {facts} in line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_unpickles_or_evaluates_data(path: Path) -> None:
    found = list(unsafe_calls(path))
    if str(path.relative_to(ROOT)) in OPENS_PICKLES:
        assert found, "it opens no pickle any more: take it off the list"
    else:
        assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch [MARK]",
        "!!python/object/new:pathlib.Path [MARK]",
        "!!python/name:os.system",
        "a: !!python/module:os",
    ],
)
def test_yaml_builds_no_objects(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ConfigError):
        read_yaml(text.replace("MARK", str(mark)), "a config")
    assert not mark.exists()


# -- paths ------------------------------------------------------------------------------------------------------

ESCAPES = ["../outside", "a/../../outside", "/outside", "..", "images/../../outside"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_run_folder_writes_nothing_outside_itself(name: str, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run") as folder:
        for write in (folder.write_text, folder.write_json):
            with pytest.raises(OutputError, match="outside the run folder"):
                write(name, "x")
        with pytest.raises(OutputError, match="outside the run folder"), folder.staged(name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_inside_a_run_folder_leads_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with RunFolder.create(tmp_path / "run") as folder:
        (folder.path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OutputError, match="outside the run folder"):
            folder.write_text("link/file", "x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("text", [*ESCAPES, "", ".hidden", "a\0b", "con/../x", "ümläut", "x" * 500, "\n", "C:\\x"])
def test_a_prompt_makes_a_plain_file_name(text: str) -> None:
    name = safe_name(text)
    assert name
    assert len(name) <= 80
    assert not name.startswith(".")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@pytest.mark.parametrize("label", ["../x", "a/b", "a\\b", "a\0b"])
def test_a_label_cannot_be_a_path(label: str, tmp_path: Path) -> None:
    from alignprop_core.config.load import load_config

    rewards = [{"name": "jpeg_compressibility", "label": label}]
    data = {"model": {"base": "owner/name"}, "prompts": {"train": "p.txt"}, "rewards": rewards, "output": "run"}
    with pytest.raises(ConfigError, match="label"):
        load_config(data, registry=default_registry())


@pytest.mark.parametrize("name", ["..", "a b; rm -rf", "über.lauf"])
def test_lora_files_are_named_plainly_after_any_output(name: str, tmp_path: Path) -> None:
    assert Path(safe_name(name)).name == safe_name(name)
    assert "/" not in safe_name((tmp_path / name).name)


# -- network ----------------------------------------------------------------------------------------------------


def test_a_reward_whose_weights_are_missing_asks_and_does_not_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants as hub

    tried: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: refuse(None, words))  # type: ignore[arg-type]
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    registry, missing = default_registry(), 0
    for offer in registry.rewards():
        fields = registry.reward_config_class(offer.full_name).model_fields
        needed = {name: str(tmp_path) for name, field in fields.items() if field.is_required()}
        with suppress(AlignpropError):
            registry.load_reward(offer.full_name, needed)
            continue
        missing += 1
    assert missing >= 5
    assert tried == []


def test_listing_and_describing_opens_no_socket() -> None:
    import subprocess

    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise SystemExit('opened a socket')\n"
        "socket.socket.connect = no; socket.getaddrinfo = no\n"
        "from alignprop_core.cli import run\n"
        "for words in (['plugins'], ['rewards', 'list'], ['rewards', 'show', 'jpeg_bytes'], ['schema']):\n"
        "    assert run(words) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
