"""Published weights get open_clip's own preprocessing and activation; other weights get those stored beside them."""

from __future__ import annotations

import gc
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize
from torchvision.transforms.functional import to_tensor

from alignprop_clip.architecture import Architecture
from alignprop_clip.config import ClipScoreConfig
from alignprop_clip.encoder import load_clip
from alignprop_clip.preprocess import Preprocess
from alignprop_clip.published import hub_files, settings
from alignprop_clip.reward import ClipScore, load_encoder
from alignprop_clip.testing import CLIP, random_state
from alignprop_core.errors import ConfigError, WeightsError

PAIRS = list_pretrained()
HALF = (0.5, 0.5, 0.5)
LAION = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"


def transform(model: str, tag: str) -> Any:
    """open_clip's transform of a published model, as `create_model_from_pretrained` makes it without the weights."""
    config = merge_preprocess_dict(PreprocessCfg(), get_pretrained_cfg(model, tag))
    config["size"] = open_clip.get_model_config(model)["vision_cfg"]["image_size"]
    return image_transform_v2(PreprocessCfg(**config), is_train=False)


def described(preprocess: Preprocess) -> tuple[Any, ...]:
    size = preprocess.size if preprocess.resize == "shortest" else (preprocess.size, preprocess.size)
    return size, preprocess.interpolation, preprocess.resize == "shortest", preprocess.mean, preprocess.std


def described_transform(given: Any) -> tuple[Any, ...]:
    """What `described` returns, read from open_clip's transform."""
    resize, normalize = given.transforms[0], given.transforms[-1]
    assert isinstance(resize, Resize)
    assert isinstance(normalize, Normalize)
    cropped = any(isinstance(one, CenterCrop) for one in given.transforms)
    names = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}
    return resize.size, names[resize.interpolation], cropped, tuple(normalize.mean), tuple(normalize.std)


def supported(model: str) -> bool:
    config = open_clip.get_model_config(model)
    return "multimodal_cfg" not in config and "hf_model_name" not in config["text_cfg"]


def test_every_published_pair_has_open_clips_preprocessing_and_activation() -> None:
    assert len(PAIRS) > 190
    for model, tag in PAIRS:
        if not supported(model):
            with pytest.raises(ConfigError, match=rf"{model} (is a captioning model|has a text tower from)"):
                Architecture.from_name(model, pretrained=tag)
            continue
        published = get_pretrained_cfg(model, tag)
        repository, file = published["hf_hub"].split("/")[:2], hub_files(model, tag)[0]
        for recognized_by in (
            {"pretrained": tag},
            {"weights": file},
            {"weights": file.replace("/" + file.rpartition("/")[2], "@main/model.bin")},
            {"weights": f"/data/{'--'.join(repository)}/model.bin"},
            {"weights": f"/cache/models--{'--'.join(repository)}/snapshots/0123/model.bin"},
        ):
            architecture = Architecture.from_name(model, **recognized_by)
            assert architecture.settings is not None
            assert architecture.settings.recognized
            ours = described(architecture.preprocess)
            assert ours == described_transform(transform(model, tag)), (model, tag, recognized_by)
            assert architecture.config.get("quick_gelu", False) is published.get("quick_gelu", False), (model, tag)


def test_a_file_is_recognized_by_its_name_unless_the_name_is_generic() -> None:
    assert settings("ViT-B-32", weights="vit_b_32-quickgelu-laion400m_e31-d867053b.pt").quick_gelu
    assert settings("ViT-L-14", weights="/weights/l14_fullcc2.5b.pt").quick_gelu
    assert not settings("ViT-B-32", weights="vit_b_32-laion2b_e16-af8dbd0c.pth").quick_gelu
    assert not settings("ViT-L-14", weights="/weights/ViT-L-14.pt").recognized  # OpenAI's own is TorchScript: refused


def test_copies_in_transformers_layout_are_recognized() -> None:
    assert settings("ViT-B-32", weights="hub:openai/clip-vit-base-patch32/model.safetensors").quick_gelu
    assert settings("ViT-L-14", weights="/w/openai--clip-vit-large-patch14/model.safetensors").quick_gelu
    assert settings("ViT-H-14", weights="hub:facebook/metaclip-h14-fullcc2.5b/model.safetensors").quick_gelu
    assert not settings("ViT-L-14", weights="openai/clip-vit-large-patch14/model.safetensors").recognized


def test_the_normalization_of_laions_vit_l_14_is_not_openais() -> None:
    found = settings("ViT-L-14", weights=f"hub:{LAION}/open_clip_pytorch_model.bin")
    assert (found.mean, found.std, found.quick_gelu) == (HALF, HALF, False)
    assert settings("ViT-L-14", pretrained="laion2B-s32B-b82K") == found


def test_an_unknown_tag_is_refused_with_the_tags_of_the_model() -> None:
    with pytest.raises(ConfigError, match=r'no weights "laion2b" of ViT-L-14\..* Its tags: openai, laion400m_e31, '):
        Architecture.from_name("ViT-L-14", pretrained="laion2b")
    with pytest.raises(ConfigError, match=r'weights "opnai" of ViT-B-32\. Did you mean "openai"\?'):
        Architecture.from_name("ViT-B-32", pretrained="opnai")
    with pytest.raises(ConfigError, match=r"of ViT-S-16\. It publishes none\."):
        Architecture.from_name("ViT-S-16", pretrained="openai")


def photograph() -> Image.Image:
    """A smooth image with edges, so that filters and rounding matter, whose sides are not multiples of one another."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 20, 29, generator=generator)
    smooth = F.interpolate(coarse, (401, 577), mode="bicubic").clamp(0, 1)[0]
    smooth[:, 120:260, 200:330] = torch.rand(3, 1, 1, generator=generator)
    return Image.fromarray((smooth * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def test_every_distinct_preprocessing_gives_open_clips_pixels() -> None:
    image = photograph()
    distinct = {Architecture.from_name(m, pretrained=t).preprocess: (m, t) for m, t in PAIRS if supported(m)}
    assert len({(p.mean, p.std, p.resize, p.interpolation) for p in distinct}) == 8
    for preprocess, pair in distinct.items():
        theirs, ours = transform(*pair)(image), preprocess(to_tensor(image)[None])[0]
        assert ours.shape == theirs.shape
        levels = (ours - theirs).abs() * torch.tensor(preprocess.std).view(3, 1, 1) * 255
        assert levels.max() < 4, pair
        assert levels.mean() < 0.5, pair
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 1 - 1e-3, pair


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model among those of open_clip, published with two settings; returns a file with its weights."""
    published = {
        "first": get_pretrained_cfg("ViT-L-14", "openai") | {"url": "", "hf_hub": "lab/tiny-first/"},
        "second": get_pretrained_cfg("ViT-L-14", "laion2b_s32b_b82k") | {"url": "", "hf_hub": "lab/tiny-second/"},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", published)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "own" / "clip.safetensors"
    path.parent.mkdir()
    save_file(random_state(Architecture("tiny", CLIP, Preprocess(32, HALF, HALF))), path)
    return path


def loaded(**options: Any) -> tuple[tuple[float, ...], str]:
    """Mean, and the activation of the network, of the model that options select."""
    encoder = load_encoder(ClipScoreConfig(model="tiny", **options), "clip_score")
    return encoder.preprocess.mean, type(encoder.network.visual.transformer.resblocks[0].mlp[1]).__name__


def test_weights_in_a_folder_with_the_name_of_a_repository_are_that_repositorys(tiny: Path) -> None:
    for name, expected in (("first", (pytest.approx(0.4815, abs=1e-4), "QuickGELU")), ("second", (0.5, "GELU"))):
        path = tiny.parent.parent / f"lab--tiny-{name}" / "clip.safetensors"
        path.parent.mkdir()
        path.write_bytes(tiny.read_bytes())
        mean, activation = loaded(weights=str(path))
        assert (mean[0], activation) == expected


def test_a_tag_selects_the_file_and_its_settings(tiny: Path) -> None:
    with pytest.raises(WeightsError, match=r"hub:lab/tiny-second/open_clip_pytorch_model\.bin"):
        loaded(pretrained="second")
    with pytest.raises(ConfigError, match=r"set pretrained to one of open_clip's tags \(first, second\)"):
        loaded()
    for file in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        snapshot = tiny.parent.parent / "cache" / "models--lab--tiny-second" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot.parent.parent / "refs").mkdir(exist_ok=True)
        (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
        if file.endswith(".bin"):
            torch.save(random_state(Architecture("tiny", CLIP, Preprocess(32, HALF, HALF))), snapshot / file)
        else:
            (snapshot / file).write_bytes(tiny.read_bytes())
        assert loaded(pretrained="second") == (HALF, "GELU")
    assert loaded(pretrained="second", weights=str(tiny)) == (HALF, "GELU")
    assert loaded(pretrained="first", weights=str(tiny))[1] == "QuickGELU"


def test_a_file_that_is_not_known_shows_a_warning_where_the_published_weights_differ(tiny: Path) -> None:
    with pytest.warns(UserWarning, match=r"clip\.safetensors: .* of tiny that differ in preprocessing and activation"):
        assert loaded(weights=str(tiny))[1] == "GELU"
    with pytest.warns(UserWarning, match=r"differ in preprocessing, and .* option pretrained .*\(first, second\)\."):
        assert loaded(weights=str(tiny), quick_gelu=True)[1] == "QuickGELU"


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_settings_that_are_stored_beside_the_weights_are_used(tiny: Path, act: str) -> None:
    layer = {"gelu": "GELU", "quick_gelu": "QuickGELU"}[act]
    stored = {"model_cfg": {"quick_gelu": act == "quick_gelu"}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    beside = tiny.parent / "open_clip_config.json"
    beside.write_text(json.dumps(stored))
    assert loaded(weights=str(tiny)) == ((0.1, 0.2, 0.3), layer)
    beside.unlink()
    transformers = {"model_type": "clip", "vision_config": {"hidden_act": act}, "text_config": {"hidden_act": act}}
    (tiny.parent / "config.json").write_text(json.dumps(transformers))
    (tiny.parent / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.3, 0.2, 0.1], "resample": 2}))
    assert loaded(weights=str(tiny)) == ((0.3, 0.2, 0.1), layer)
    encoder = load_encoder(ClipScoreConfig(model="tiny", weights=str(tiny)), "clip_score")
    assert encoder.preprocess.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("open_clip_config.json", {"model_cfg": {}, "preprocess_cfg": {"fill_color": 9}}, "preprocess_cfg.fill_color"),
        ("open_clip_config.json", {"model_cfg": {}, "preprocess_cfg": {"mean": [1]}}, "preprocess_cfg.mean is [1]"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is False"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("preprocessor_config.json", {"resample": 0}, "resample is 0"),
        ("config.json", {"model_type": "clip", "text_config": {"hidden_act": "relu"}}, "text_config.hidden_act is"),
        ("config.json", {"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "hidden_act differs"),
    ],
)
def test_a_stored_setting_that_is_not_supported_is_refused_by_its_key(
    tiny: Path, file: str, content: dict[str, Any], message: str
) -> None:
    (tiny.parent / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tiny.parent / file).write_text(json.dumps(content))
    with pytest.raises(WeightsError) as caught:
        loaded(weights=str(tiny))
    assert f"{tiny.parent / file}: {message}" in str(caught.value)


# Larger towers are of the same kinds.
LARGE = (
    *("-L", "-E-14", "-H-", "-g", "-e-14", "bigG", "SO400M", "XL", "large", "_w", "RN50x16", "RN50x64"),
    *("336", "384", "512"),
)
SMALL = [name for name in open_clip.list_models() if supported(name) and not any(part in name for part in LARGE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_an_architecture_computes_what_open_clip_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignprop_clip.encoder.Tokenizer", lambda config, name: None)  # some are on the hub
    config = deepcopy(open_clip.get_model_config(name))
    custom = config.pop("custom_text", False)
    torch.manual_seed(0)
    network = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval().requires_grad_(False)
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    architecture = Architecture.from_name(name, quick_gelu=config.get("quick_gelu", False))
    encoder = load_clip(tmp_path / "clip.pt", architecture)
    (tmp_path / "clip.pt").unlink()  # pytest keeps the folders of a session, half a gigabyte for each model
    size = architecture.preprocess.size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    pixels = architecture.preprocess(images)
    tokens = torch.randint(1, 1000, (1, config["text_cfg"].get("context_length", 77)))
    tokens[0, -1] = config["text_cfg"].get("vocab_size", 49408) - 1
    with torch.no_grad():
        torch.testing.assert_close(encoder.images(images), network.encode_image(pixels, normalize=True))
        theirs = network.encode_text(tokens, normalize=True)
        torch.testing.assert_close(F.normalize(encoder.network.encode_text(tokens), dim=-1), theirs)
    gc.collect()


def test_the_preprocessing_is_described_with_the_values_in_use(tiny: Path) -> None:
    described = ClipScore(
        ClipScoreConfig(model="tiny", weights=str(tiny), pretrained="second")
    ).describe_preprocessing()
    assert described == {
        "resize": "shorter side to 32, bicubic, antialiased", "crop": "center, 32 x 32",
        "mean": [0.5] * 3, "std": [0.5] * 3, "activation": "GELU",
    }  # fmt: skip
    assert Preprocess(9, HALF, HALF, "longest").describe()["pad"] == "black, to 9 x 9"
    assert Preprocess(9, HALF, HALF, "squash").describe()["resize"] == "to 9 x 9, bicubic, antialiased"
