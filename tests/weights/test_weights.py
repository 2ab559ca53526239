"""Weights: four forms of one option, one message for every wrong file, atomic downloads.

The downloads run against a small server on this machine that speaks the hub's protocol (HEAD with tag, size and
commit; GET with ranges); nothing leaves the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from alignprop_core import cli, weights
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.errors import WeightsError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import RewardConfig, RewardSpec, WeightsFile, WeightsSpec
from alignprop_core.training.preflight import check_weights
from alignprop_core.weights import find_weights, load_state_dict, parse_hub_file, read_header
from tests.support import ROOT
from tests.support.fake_plugins import install, reward_spec, rewards_hook
from tests.support.processes import command_line

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 4096 * 3  # 3 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HUB_FILE = WeightsFile(repository="some/model", file="w.safetensors", sha256=DIGEST, bytes=len(CONTENT), license="MIT")


def put_in_cache(cache: Path, content: bytes, file: WeightsFile = HUB_FILE) -> Path:
    """Lay a file into a hub cache as the hub's library does."""
    folder = cache / f"models--{file.repository.replace('/', '--')}"
    path = folder / "snapshots" / COMMIT / file.file
    path.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    path.symlink_to(blob)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


# -- finding ------------------------------------------------------------------------------------------------------


def test_default_comes_from_the_hub_cache_verified(cache: Path) -> None:
    path = put_in_cache(cache, CONTENT)
    assert find_weights("default", reward="red", default=HUB_FILE) == path


def test_a_missing_file_names_repository_file_command_and_where_to_put_it(cache: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights("default", reward="red", default=HUB_FILE)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "file w.safetensors of repository some/model (3 MB)",
        "`alignprop rewards fetch red`",
        str(cache),
        "/some/model/resolve/main/w.safetensors",
        "weights: PATH",
        "MIT",
    ):
        assert part in message


def test_a_hub_file_is_found_or_its_own_command_named(cache: Path) -> None:
    with pytest.raises(WeightsError, match=r"`alignprop rewards fetch hub:some/model/deep/er/w\.bin`"):
        find_weights("hub:some/model/deep/er/w.bin", reward="red")
    path = put_in_cache(cache, b"anything", WeightsFile(repository="some/model", file="deep/er/w.bin"))
    assert find_weights("hub:some/model/deep/er/w.bin", reward="red") == path


def test_a_revision_is_found_under_its_own_name(cache: Path) -> None:
    path = put_in_cache(cache, CONTENT)
    with pytest.raises(WeightsError, match=r"some/model at v1\. .*fetch hub:some/model@v1/w.*/resolve/v1/w"):
        find_weights("hub:some/model@v1/w.safetensors", reward="red")
    assert find_weights(f"hub:some/model@{COMMIT}/w.safetensors", reward="red") == path
    (cache / "models--some--model" / "refs" / "v1").write_text(COMMIT)
    assert find_weights("hub:some/model@v1/w.safetensors", reward="red") == path
    file = HUB_FILE.model_copy(update={"revision": "v2"})
    with pytest.raises(WeightsError, match=r"file w\.safetensors of repository some/model at v2 \(3 MB\)"):
        find_weights("default", reward="red", default=file)


@pytest.mark.parametrize(
    "value",
    [
        "hub:",
        "hub:owner",
        "hub:owner/name",
        "hub:owner/name/",
        "hub:a/b/../../c",
        "hub:a/b//etc/x",
        "hub:a/b@/x",
        "hub:a/@v1/x",
    ],
)
def test_a_misspelt_hub_file_shows_how_it_is_written(value: str) -> None:
    with pytest.raises(WeightsError, match="Write hub:owner/name/file "):
        parse_hub_file(value)


@pytest.mark.parametrize("value", ["hub:openai/clip vit/x", "hub:a--b/c/x", f"hub:a/{'b' * 100}/x", "hub:a/-b/w.bin"])
def test_a_name_the_hub_cannot_have_is_one_message(cache: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WeightsError, match=r"is not a file of the hub: ") as caught:
        find_weights(value, reward="red")
    assert value in str(caught.value)
    assert cli.run(["rewards", "fetch", value]) == 2
    assert "is not a file of the hub" in capsys.readouterr().err


def test_a_damaged_or_cut_file_is_refused(cache: Path) -> None:
    path = put_in_cache(cache, CONTENT[:-1])
    with pytest.raises(WeightsError, match=r"has 3,145,727 bytes and should have 3,145,728.*fetch red` replaces it"):
        find_weights("default", reward="red", default=HUB_FILE)
    path.resolve().write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(WeightsError, match=rf"its sha256 is [0-9a-f]{{64}} and should be {DIGEST}.*damaged"):
        find_weights("default", reward="red", default=HUB_FILE)


def test_the_checksum_is_taken_once_until_the_file_changes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_in_cache(cache, CONTENT)
    taken = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: taken.append(given) or digest(*given))
    for _ in range(3):
        find_weights("default", reward="red", default=HUB_FILE)
    assert len(taken) == 1
    os.utime(path, ns=(1, 1))
    find_weights("default", reward="red", default=HUB_FILE)
    assert len(taken) == 2


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert find_weights(str(file), reward="red") == file
    assert find_weights("mine.safetensors", reward="red").absolute() == file
    with pytest.raises(WeightsError, match=r"no file .*theirs.pth .*hub:owner/name/file"):
        find_weights(str(tmp_path / "theirs.pth"), reward="red")
    with pytest.raises(WeightsError, match=r"is a folder; name the file inside it \(it contains mine.safetensors\)"):
        find_weights(str(tmp_path), reward="red")


class SetPlugin:
    def __init__(self, *specs: WeightsSpec) -> None:
        self.specs = specs

    @hookimpl
    def alignprop_register_weights(self) -> list[WeightsSpec]:
        return list(self.specs)


# -- before anything loads ----------------------------------------------------------------------------------------


class PublishedConfig(RewardConfig):
    weights: str = "default"
    model: str = "small"
    size: int = 3
    half: bool = False


class Published:
    def __init__(self, *weights: WeightsFile) -> None:
        self.weights = weights

    @hookimpl
    def alignprop_register_rewards(self) -> list[RewardSpec]:
        here = f"{__name__}:PublishedConfig"
        return [RewardSpec(name="red", summary="Fake.", factory=here, config=here, weights=self.weights)]


def checked(*weights: WeightsFile, **options: object) -> None:
    """Check the weights of a reward that may load these, as a run does before it imports torch."""
    registry = Registry.from_plugins({"fake": Published(*weights)})
    filled = registry.reward_options("red", options).model_dump(mode="json")
    check_weights(RewardTerm(name="red", options=filled), registry)


OTHER_FILE = WeightsFile(repository="some/model", file="other.bin")


@pytest.mark.parametrize("options", [{}, {"size": 4, "half": True}])
def test_default_weights_that_are_not_here_are_missed_before_the_reward_is_built(
    cache: Path, options: dict[str, object]
) -> None:
    with pytest.raises(WeightsError, match=r'"red" are not on this machine: .*`alignprop rewards fetch red`'):
        checked(HUB_FILE, **options)
    with pytest.raises(WeightsError, match=HUB_FILE.file):
        checked(HUB_FILE, OTHER_FILE, **options)
    put_in_cache(cache, CONTENT)
    checked(HUB_FILE, **options)


def test_what_only_the_reward_knows_of_its_weights_is_left_to_it(cache: Path) -> None:
    checked(HUB_FILE, model="large")  # whose file may be another
    checked(HUB_FILE, WeightsFile(file="package:inside.safetensors"))
    checked()
    put_in_cache(cache, b"anything", OTHER_FILE)
    checked(HUB_FILE, OTHER_FILE)  # it may be the other that is loaded


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package on the path with a weights file inside."""
    folder = tmp_path / "fake_with_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "red.safetensors").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "fake_with_weights"
    sys.modules.pop("fake_with_weights", None)


def named(package: str, file: str = "red.safetensors", **more: Any) -> Registry:
    spec = WeightsSpec(name="small", reward="red", path=f"{package}:{file}", summary="s", **more)
    return Registry.from_plugins({"fake-sets": SetPlugin(spec)})


def test_a_named_set_is_the_file_inside_its_package(package: str, tmp_path: Path) -> None:
    right = WeightsFile(file="red.safetensors", sha256=DIGEST, bytes=len(CONTENT))
    registry = named(package, weights=(right,))
    for name in ("small", "fake-sets/small"):
        found = find_weights(name, reward="red", registry=registry)
        assert found == tmp_path / package / "red.safetensors"
    wrong = named(package, weights=(WeightsFile(file="red.safetensors", sha256="0" * 64),))
    with pytest.raises(WeightsError, match=r"sha256 is .*Reinstall fake-sets"):
        find_weights("small", reward="red", registry=wrong)


def test_an_unknown_set_names_the_nearest_and_the_other_forms(package: str) -> None:
    with pytest.raises(WeightsError, match=r'"smal".*Did you mean "small"\?.*The option weights takes "default"'):
        find_weights("smal", reward="red", registry=named(package))
    with pytest.raises(WeightsError, match='"small"'):
        find_weights("small", reward="blue", registry=named(package))


def test_a_set_whose_file_or_package_is_missing_is_reported(package: str) -> None:
    with pytest.raises(WeightsError, match=r'Weights "small" of fake-sets .*lacks the weights file blue.safetensors'):
        find_weights("small", reward="red", registry=named(package, "blue.safetensors"))
    with pytest.raises(WeightsError, match="package no_such_package_here, which is not installed"):
        find_weights("small", reward="red", registry=named("no_such_package_here"))


def test_without_a_registry_the_environments_own_is_asked() -> None:
    with pytest.raises(WeightsError, match='offers the "no_such_reward" weights named "nothing"'):
        find_weights("nothing", reward="no_such_reward")


def test_a_default_may_ship_in_a_package(package: str, tmp_path: Path) -> None:
    file = WeightsFile(file=f"{package}:red.safetensors", sha256=DIGEST)
    assert find_weights("default", reward="red", default=file) == tmp_path / package / "red.safetensors"
    with pytest.raises(WeightsError, match='Reward "red" has no default weights'):
        find_weights("default", reward="red")


def test_finding_and_headers_import_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, file, metadata={"config": '{"width": 8}'})
    code = (
        "import sys, pathlib\n"
        "from alignprop_core.weights import find_weights, read_header\n"
        "path = find_weights(sys.argv[1], reward='red')\n"
        "print(read_header(path), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "{'width': 8} False\n"


# -- reading ------------------------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2, dtype=torch.float16)}


def same(found: dict[str, Any]) -> bool:
    return found.keys() == tensors().keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors().items()
    )


def test_safetensors_are_read_with_their_header(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(tensors(), file, metadata={"config": json.dumps({"width": 8, "names": ["a"]})})
    assert same(load_state_dict(file))
    assert read_header(file) == {"width": 8, "names": ["a"]}


def test_any_length_of_header_is_read(tmp_path: Path) -> None:
    """Its first byte may look like another format's: 0x80 is how a pickle begins, 0x50 how a zip does."""
    for padding in range(256):
        file = tmp_path / "w.bin"
        safetensors.torch.save_file(tensors(), file, metadata={"note": "x" * padding})
        assert same(load_state_dict(file))


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_whatever_their_name(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "w.safetensors"
    torch.save({"state_dict": tensors(), "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    found = load_state_dict(file)
    assert same(found["state_dict"])
    assert found["epoch"] == 3
    assert read_header(file) == {}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["safetensors", "nested"])
def test_weights_of_a_training_that_diverged_are_refused(tmp_path: Path, kind: str, number: float) -> None:
    file = tmp_path / "w"
    broken = tensors() | {"layer.bias": torch.full((3,), number, dtype=torch.bfloat16)}
    if kind == "safetensors":
        safetensors.torch.save_file(broken, file)
    else:
        torch.save({"epoch": 3, "state_dict": broken}, file)
    where = "layer.bias" if kind == "safetensors" else "state_dict.layer.bias"
    with pytest.raises(WeightsError, match=rf"w cannot be used: its tensor {where} contains NaN or infinity"):
        load_state_dict(file)


def test_masks_and_large_numbers_are_accepted(tmp_path: Path) -> None:
    good = {
        "mask": torch.full((4, 4), float("-inf")).triu(1),
        "large": torch.full((9,), 60000.0, dtype=torch.float16),
        "small": torch.ones(4, dtype=torch.float8_e4m3fn),
        "none": torch.zeros(0),
    }
    safetensors.torch.save_file(good, tmp_path / "w")
    assert load_state_dict(tmp_path / "w").keys() == good.keys()


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("trapped",))


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "module", "torchscript"])
def test_what_would_need_unpickling_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"a": Trap()}))
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 2), file)
    elif kind == "torchscript":
        with warnings.catch_warnings(action="ignore"):  # it is deprecated
            torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    else:
        torch.save({"a": torch.ones(1), "b": Trap()}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError, match=r"would need unpickling, which can run any code.*Convert it to safetensors"):
        load_state_dict(file)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("kept", [12, 100, -1])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_cut_file_is_called_cut_off(tmp_path: Path, kind: str, kept: int) -> None:
    file = tmp_path / "w"
    if kind == "safetensors":
        safetensors.torch.save_file(tensors(), file)
    else:
        torch.save(tensors(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"w is cut off or damaged \(.+\)\. Fetch or copy it again"):
        load_state_dict(file)
    if kind == "safetensors":
        with pytest.raises(WeightsError, match="cut off or damaged"):
            read_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<html>not found</html>", "not a weights file: it is neither safetensors nor"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_state_dict(file)
    assert read_header(file) == {}


def test_a_file_that_holds_no_names_or_is_not_there(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="contains a Tensor; a weights file contains tensors by name"):
        load_state_dict(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        load_state_dict(tmp_path / "nothing.pt")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "is a list; it must be a mapping")])
def test_a_header_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "w", metadata={"config": text})
    with pytest.raises(WeightsError, match=message):
        read_header(tmp_path / "w")


# -- fetching -----------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What the small hub serves and what it was asked."""

    content: bytes = CONTENT
    tag: str = DIGEST
    revision: str = "main"
    status: int = 200
    error_code: str = ""
    pause_at: int | None = None  # after so many bytes of an answer the connection stands still
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.command, request.path, wanted))
        path = f"/some/model/resolve/{self.revision}/w.safetensors"
        status = self.status if request.path == path else 404
        if status != 200:
            request.send_response(status)
            request.send_header("X-Error-Code", self.error_code if status == self.status else "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        body = self.content[start:]
        request.send_response(206 if wanted else 200)
        request.send_header("ETag", f'"{self.tag}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(body)))
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.end_headers()
        if request.command == "GET":
            if self.pause_at is None:
                request.wfile.write(body)
            else:
                request.wfile.write(body[: self.pause_at])
                request.wfile.flush()
                time.sleep(30)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.handle(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A client that was killed is part of the test."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Fetcher:
    """Runs `alignprop rewards fetch` in processes of their own, against the small hub."""

    hub: Hub
    folder: Path
    environment: dict[str, str]

    @property
    def cache(self) -> Path:
        return self.folder / "home" / "hub"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        code = "import sys; from alignprop_core.cli import run; sys.exit(run(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", code, "rewards", "fetch", *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        done = command_line(("rewards", "fetch", *arguments), {**self.environment, **environment})
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    def run_json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json")[0])

    def partial(self) -> list[Path]:
        return list(self.folder.rglob("*.incomplete"))


@pytest.fixture
def fetcher(hub: Hub, tmp_path: Path) -> Fetcher:
    """A plugin with two rewards: `red`, whose file the hub has, and `packaged`, whose file ships with it."""
    file = HUB_FILE.model_dump()
    inside = {"file": "fake_red:inside.safetensors", "sha256": DIGEST}
    specs = ", ".join(
        [
            reward_spec("red", "fake_red", f"weights=[{file}]"),
            reward_spec("packaged", "fake_red", f"weights=[{inside}]"),
            reward_spec("light", "fake_red"),
            reward_spec("unchecked", "fake_red", 'weights=[{"repository": "some/model", "file": "w.safetensors"}]'),
            reward_spec("missing", "fake_red", 'weights=[{"repository": "some/model", "file": "no.bin"}]'),
        ]
    )
    site = tmp_path / "site"
    site.mkdir()
    install(site, "fake-red", rewards_hook(f"return [{specs}]"))
    (site / "fake_red" / "inside.safetensors").write_bytes(CONTENT)
    return Fetcher(
        hub,
        tmp_path,
        {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "ALIGNPROP_"))},
            "PYTHONPATH": f"{site}:{ROOT}",
            "ALIGNPROP_PLUGINS": "fake-red",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "COLUMNS": "400",
        },
    )


def test_fetch_downloads_verifies_and_puts_the_file_where_it_is_found(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (got,) = fetcher.run_json("red")
    assert got["status"] == "fetched"
    assert got["verified"] == "sha256"
    assert got["license"] == "MIT"
    assert Path(got["path"]).read_bytes() == CONTENT
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fetcher.cache))
    assert find_weights("default", reward="red", default=HUB_FILE) == Path(got["path"])
    asked = len(fetcher.hub.asked)
    (again,) = fetcher.run_json("red")
    assert again["status"] == "present"
    assert again["path"] == got["path"]
    assert len(fetcher.hub.asked) == asked
    assert fetcher.partial() == []


def test_fetch_prints_what_it_did(fetcher: Fetcher) -> None:
    out, _ = fetcher.run("red")
    assert "some/model/w.safetensors" in out
    assert f"  fetched: {fetcher.cache}" in out
    assert "w.safetensors (sha256 verified)" in out
    assert "MIT" in out
    out, _ = fetcher.run("red", "--to", str(fetcher.folder / "there"))
    assert (
        f"use it with the reward's option for weights: {fetcher.folder / 'there' / 'some--model' / 'w.safetensors'}"
        in out
    )
    assert "ships in an installed package" in fetcher.run("packaged")[0]
    assert fetcher.run("light")[0] == "light: no weights to fetch.\n"
    assert fetcher.run_json("light") == []


def test_a_file_without_a_checksum_is_checked_against_the_hubs_own(fetcher: Fetcher) -> None:
    (got,) = fetcher.run_json("unchecked")
    assert got["verified"] == "sha256"
    fetcher.hub.tag = "0" * 64
    _, err = fetcher.run("unchecked", "--to", str(fetcher.folder / "there"), code=2)
    assert f"its sha256 is {DIGEST} and should be {'0' * 64}" in err
    assert "It was removed; fetch it again" in err
    assert [path for path in (fetcher.folder / "there" / "some--model").iterdir() if path.is_file()] == []
    assert fetcher.partial() == []


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_killed_download_leaves_no_file_under_the_final_name(fetcher: Fetcher, where: str) -> None:
    arguments = ["unchecked"] if where == "cache" else ["unchecked", "--to", str(fetcher.folder / "there")]
    content = CONTENT * 8  # the hub's library writes in pieces of 10 MiB: two whole ones and a rest
    fetcher.hub.content, fetcher.hub.tag = content, hashlib.sha256(content).hexdigest()
    fetcher.hub.pause_at = 15_000_000
    process = fetcher.start(*arguments)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in fetcher.partial()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = fetcher.partial()
    kept = partial.stat().st_size
    assert 0 < kept < len(content)
    assert [path for path in fetcher.folder.rglob("w.safetensors") if "site" not in path.parts] == []

    fetcher.hub.pause_at = None
    (got,) = fetcher.run_json(*arguments)
    assert Path(got["path"]).read_bytes() == content
    assert got["verified"] == "sha256"


def test_two_fetches_at_once_bring_the_file_once(fetcher: Fetcher) -> None:
    both = [fetcher.start("red", "--json") for _ in range(2)]
    results = [json.loads(process.communicate(timeout=60)[0])[0] for process in both]
    assert {result["verified"] for result in results} == {"sha256"}
    assert all(Path(result["path"]).read_bytes() == CONTENT for result in results)
    assert len([asked for asked in fetcher.hub.asked if asked[0] == "GET"]) == 1


def test_a_damaged_file_in_the_cache_is_replaced(fetcher: Fetcher) -> None:
    (got,) = fetcher.run_json("red")
    Path(got["path"]).resolve().write_bytes(CONTENT[:-5] + b"wrong")
    (again,) = fetcher.run_json("red")
    assert again["status"] == "fetched"
    assert Path(again["path"]).read_bytes() == CONTENT


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_damaged_file_without_a_declared_checksum_is_replaced(fetcher: Fetcher, where: str) -> None:
    """The hub's cache names a large file by its checksum; for another folder the hub is asked."""
    arguments = ["unchecked"] if where == "cache" else ["unchecked", "--to", str(fetcher.folder / "there")]
    (got,) = fetcher.run_json(*arguments)
    (again,) = fetcher.run_json(*arguments)
    assert (again["status"], again["verified"]) == ("present", "sha256")
    Path(got["path"]).resolve().write_bytes(CONTENT[:-5] + b"wrong")
    (again,) = fetcher.run_json(*arguments)
    assert (again["status"], again["verified"]) == ("fetched", "sha256")
    assert Path(again["path"]).read_bytes() == CONTENT
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        (alone,) = json.loads(fetcher.run(*arguments, "--json", **environment)[0])
        assert (alone["status"], alone["verified"]) == ("present", "sha256" if where == "cache" else "")


def test_files_of_one_name_are_not_taken_for_each_other(fetcher: Fetcher) -> None:
    there = fetcher.folder / "there"
    for other in (there / "w.safetensors", there / "other--model" / "w.safetensors"):
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(b"of another reward")
    (got,) = fetcher.run_json("unchecked", "--to", str(there))
    assert got["status"] == "fetched"
    assert Path(got["path"]) == there / "some--model" / "w.safetensors"
    assert Path(got["path"]).read_bytes() == CONTENT
    assert other.read_bytes() == (there / "w.safetensors").read_bytes() == b"of another reward"


def test_a_revision_is_downloaded_and_kept_apart(fetcher: Fetcher) -> None:
    there = fetcher.folder / "there"
    fetcher.run("hub:some/model/w.safetensors", "--to", str(there))
    fetcher.hub.revision = "v1"
    other = CONTENT[::-1]
    fetcher.hub.content, fetcher.hub.tag = other, hashlib.sha256(other).hexdigest()
    (got,) = fetcher.run_json("hub:some/model@v1/w.safetensors", "--to", str(there))
    assert (got["revision"], Path(got["path"])) == ("v1", there / "some--model@v1" / "w.safetensors")
    assert Path(got["path"]).read_bytes() == other
    assert (there / "some--model" / "w.safetensors").read_bytes() == CONTENT
    (got,) = fetcher.run_json("hub:some/model@v1/w.safetensors")
    assert Path(got["path"]).read_bytes() == other
    fetcher.hub.status, fetcher.hub.error_code, fetcher.hub.revision = 404, "RevisionNotFound", "v3"
    assert "some/model has no revision v3: see " in fetcher.run("hub:some/model@v3/w.safetensors", code=2)[1]


def test_another_version_on_the_hub_is_refused_before_it_is_downloaded(fetcher: Fetcher) -> None:
    fetcher.hub.tag = "1" * 64
    assert f"sha256 {'1' * 64} where {DIGEST} is expected. Nothing was fetched" in fetcher.run("red", code=2)[1]
    fetcher.hub.content = CONTENT[:-9]
    assert "3,145,719 bytes where 3,145,728 are expected" in fetcher.run("red", code=2)[1]
    assert [asked for asked in fetcher.hub.asked if asked[0] == "GET"] == []


@pytest.mark.parametrize(
    ("status", "error_code", "message"),
    [
        (404, "RepoNotFound", "There is no repository some/model at"),
        (404, "EntryNotFound", "some/model has no file w.safetensors: see "),
        (403, "GatedRepo", "is gated: ask for access on"),
        (503, "", "failed: "),
    ],
)
def test_what_the_hub_refuses_is_one_clear_message(
    fetcher: Fetcher, status: int, error_code: str, message: str
) -> None:
    fetcher.hub.status, fetcher.hub.error_code = status, error_code
    out, err = fetcher.run("red", code=2)
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_offline_and_unreachable_are_told_apart(fetcher: Fetcher) -> None:
    _, err = fetcher.run("red", code=2, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids fetching it" in err
    assert "/some/model/resolve/main/w.safetensors" in err
    _, err = fetcher.run("red", code=2, HF_ENDPOINT="http://127.0.0.1:9")
    assert "Fetching w.safetensors of some/model from http://127.0.0.1:9 failed" in err


def test_a_full_disk_is_reported_and_leaves_no_file(fetcher: Fetcher) -> None:
    """A limit on the size of files stands for the disk: the same refusal in the middle of a write."""
    there = fetcher.folder / "there" / "some--model"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from alignprop_core.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "rewards", "fetch", "red", "--to", str(there.parent)]
    done = subprocess.run(command, env=fetcher.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Not enough disk space for w.safetensors of some/model" in done.stderr
    assert "Nothing incomplete was kept" in done.stderr
    assert [path for path in there.rglob("*") if path.stat().st_size >= 1_000_000] == []
    assert not (there / "w.safetensors").exists()
    (got,) = fetcher.run_json("red", "--to", str(there.parent))
    assert Path(got["path"]).read_bytes() == CONTENT


def test_one_file_of_several_and_a_hub_file_by_itself(fetcher: Fetcher) -> None:
    assert len(fetcher.run_json("red", "--file", "w.safetensors")) == 1
    _, err = fetcher.run("red", "--file", "w.safetensor", code=2)
    assert 'no weights file "w.safetensor". Did you mean "w.safetensors"?' in err
    (got,) = fetcher.run_json("hub:some/model/w.safetensors", "--to", str(fetcher.folder / "there"))
    assert Path(got["path"]) == fetcher.folder / "there" / "some--model" / "w.safetensors"
    assert "has no file no.bin" in fetcher.run("missing", code=2)[1]
    assert "Write hub:owner/name/file" in fetcher.run("hub:some/model", code=2)[1]


def test_an_unknown_reward_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    default_registry.cache_clear()
    assert cli.run(["rewards", "fetch", "no_such_reward"]) == 2
    assert 'No installed plugin offers the reward "no_such_reward"' in capsys.readouterr().err


def test_public_names() -> None:
    assert all(hasattr(weights, name) for name in weights.__all__)
