"""Parity with the original package's `hpsv2.img_score.score`, on the same small weights and images.

The original runs unchanged, in a subprocess (importing it disables all warnings of the process). The test prepares its
environment: a copy of the package with the vocabulary file that its wheel lacks (open_clip ships the same file) and a
small ViT-H-14 config in place of the large one, and a hub cache with small files under the names that the package
requests. docs/decisions/0003-hpsv2-reference.md explains why.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from alignprop_clip.architecture import Architecture
from alignprop_clip.testing import CLIP, tiny_network
from alignprop_core.reward import ImageBatch
from alignprop_hpsv2.config import Hpsv2Config
from alignprop_hpsv2.published import WEIGHTS
from alignprop_hpsv2.reward import Hpsv2

VERSION = "1.2.0"
INSTALL = f"pip install --no-deps --target build/reference hpsv2=={VERSION} clint==0.5.1 args==0.1.0"
REFERENCE = Path(__file__).parents[3] / "build" / "reference"

# The same model sizes for both. No image has a longest side of exactly 224 and a shorter other side: the original does
# not pad such an image, and fails.
SMALL: dict[str, Any] = {
    **CLIP,
    "vision_cfg": {**CLIP["vision_cfg"], "image_size": 224, "patch_size": 32},
}
SIZES = [(224, 224), (448, 128), (32, 32), (200, 90), (61, 333), (512, 512), (640, 384), (301, 224)]
PROMPTS = [
    "three foxes on a blue background",
    "",
    "A photo of Zoë's  café &amp; 2 dogs, don't <start_of_text> ünïcode 猫",
    "very long " * 250,
]
BASE = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin")

SCRIPT = """
import json, sys
from PIL import Image
from hpsv2.img_score import score
import hpsv2
files, prompts, versions = json.load(sys.stdin)
scores = {}
for version in versions:
    for prompt in prompts:
        scores[version + prompt] = [float(value) for value in score(files, prompt, hps_version="v" + version)]
    alone = score(Image.open(files[0]), prompts[0], hps_version="v" + version)
    scores[version + "alone"] = [float(alone[0])]
print(json.dumps({"file": hpsv2.__file__, "scores": scores}))
"""


def original_package() -> Path:
    """Return the folder of the original package; fail with the install command if it is missing."""
    package = REFERENCE / "hpsv2"
    if not package.is_dir():
        spec = importlib.util.find_spec("hpsv2")
        if spec is None or not spec.submodule_search_locations:
            pytest.fail(f"the original package is missing: `make test` installs it, or run `{INSTALL}`")
        package = Path(next(iter(spec.submodule_search_locations)))
    assert package.with_name(f"hpsv2-{VERSION}.dist-info").is_dir(), f"{package} is not version {VERSION}"
    return package


def put_in_hub_cache(hub: Path, repository: str, name: str, content: object) -> None:
    """Write a file where huggingface_hub looks for it offline."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    torch.save(content, snapshot / name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with three small models: the base model that the original fetches first, and the two versions."""
    folder = tmp_path_factory.mktemp("hub")
    put_in_hub_cache(folder, *BASE, tiny_network(SMALL, seed=9, bias=None).state_dict())
    for seed, file in enumerate(WEIGHTS.values()):
        state = tiny_network(SMALL, seed=seed, bias=None).state_dict()
        put_in_hub_cache(folder, file.repository, file.file, {"state_dict": state, "epoch": 1})
    return folder


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    files = []
    for number, (width, height) in enumerate(SIZES):
        blocks = torch.rand(3, -(-height // 8), -(-width // 8), generator=generator)
        pixels = (blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width] * 255).to(torch.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(files[-1])
    return files


@pytest.fixture(scope="module")
def original(hub: Path, image_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Scores of the original for every version, prompt and image."""
    source, folder = original_package(), tmp_path_factory.mktemp("original")
    vendored = folder / "hpsv2" / "src" / "open_clip"
    shutil.copytree(source, folder / "hpsv2", ignore=shutil.ignore_patterns("assets", "__pycache__", "*.gz"))
    ours = importlib.util.find_spec("open_clip")
    assert ours is not None
    assert ours.origin is not None
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(Path(ours.origin).with_name(vocabulary), vendored / vocabulary)
    (vendored / "model_configs" / "ViT-H-14.json").write_text(json.dumps(SMALL))
    if importlib.util.find_spec("_tkinter") is None:
        # Its factory.py has an unused `from turtle import forward`, which needs Tk; not every Python includes Tk.
        (folder / "turtle.py").write_text("def forward(distance: float) -> None: ...\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(source.parent)]),
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "HPS_ROOT": str(folder / "root"),
        "CUDA_VISIBLE_DEVICES": "",  # on a GPU the original computes in float16
        "OMP_NUM_THREADS": "1",
    }
    request = json.dumps([[str(file) for file in image_files], PROMPTS, list(WEIGHTS)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=request, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    response = json.loads(done.stdout.splitlines()[-1])
    assert Path(response["file"]).is_relative_to(folder)
    scores: dict[str, list[float]] = response["scores"]
    return scores


@pytest.fixture
def small_model(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same environment for this reward: the hub cache, and small sizes under the name ViT-H-14."""
    import open_clip.factory

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", SMALL)


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("version", list(WEIGHTS))
def test_scores_equal_the_originals(version: Any, original: dict[str, list[float]], image_files: list[Path]) -> None:
    reward = Hpsv2(Hpsv2Config(version=version)).freeze()
    originals = []
    for prompt in PROMPTS:
        for file, theirs in zip(image_files, original[version + prompt], strict=True):
            with Image.open(file) as image:
                images = to_tensor(image)[None]
            if prompt is PROMPTS[-1] and file is image_files[0]:
                with pytest.warns(UserWarning, match="502 tokens"):
                    ours = reward.score(ImageBatch(images=images, prompts=[prompt])).item()
            else:
                ours = reward.score(ImageBatch(images=images, prompts=[prompt])).item()
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
            originals.append(theirs)
    # The scores differ enough for the comparison to be meaningful.
    assert max(originals) - min(originals) > 0.1
    assert original[version + "alone"][0] == pytest.approx(original[version + PROMPTS[0]][0], rel=1e-6)


def test_the_two_versions_score_differently(original: dict[str, list[float]]) -> None:
    assert original["2.0" + PROMPTS[0]] != pytest.approx(original["2.1" + PROMPTS[0]], abs=1e-2)


@pytest.mark.usefixtures("small_model")
def test_center_crop_changes_the_score_except_for_square_images() -> None:
    official, cropped = Hpsv2(), Hpsv2(Hpsv2Config(preprocessing="center_crop"))
    wide, square = torch.rand(1, 3, 100, 300), torch.rand(1, 3, 300, 300)
    for images, same in ((wide, False), (square, True)):
        batch = ImageBatch(images=images, prompts=["a fox"])
        assert (official.score(batch).item() == pytest.approx(cropped.score(batch).item(), abs=1e-6)) is same


def test_the_full_size_config_is_the_originals() -> None:
    config = Architecture.from_name("ViT-H-14").config
    theirs = json.loads((original_package() / "src/open_clip/model_configs/ViT-H-14.json").read_text())
    assert config == theirs
