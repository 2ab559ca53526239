"""The training scripts of the starter's CLIP models: short runs on the CPU, and files that reproduce the models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip", reason="open_clip is not installed: alignprop-starter[scripts]")

import compositions
import train_aesthetic
import train_clip
import train_preference
from clip_captions import ATTRIBUTES, OPEN, SEVERAL, VALUES, Captions, alter, labels, matches
from clip_files import new_clip, normalise, read_clip, read_for_training, save_clip
from open_clip import CLIP, SimpleTokenizer
from safetensors import safe_open

from alignprop_starter.scenes import render_scenes, sample_layouts
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, read_caption


@pytest.fixture(scope="module")
def captions() -> Captions:
    return Captions("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, captions: Captions) -> Path:
    """The files and cards of all three scripts, after about twenty steps each."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for script in (train_clip, train_preference, train_aesthetic):
            options = {"--seconds": "0.1", "--batch": "4", "--scenes": "20", "--device": "cpu", "--out": str(out)}
            patch.setattr("sys.argv", [script.__name__, *(word for pair in options.items() for word in pair)])
            if script is not train_aesthetic:
                patch.setattr(script, "Captions", lambda device: captions)
            script.main()
    return out / "weights"


def test_the_scripts_write_files_below_eight_megabytes_in_total_and_cards(folder: Path) -> None:
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 8_000_000
    clip, hpsv2, aesthetic = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("clip", "hpsv2", "aesthetic")
    )
    assert clip["candidates"] == 100
    assert 0 <= clip["text_to_image"] <= 1
    assert set(clip["near_misses"]) == set(ATTRIBUTES)
    assert set(hpsv2["full"]) == {*ATTRIBUTES, "all"}
    assert set(aesthetic["right"]) == {*compositions.ASPECTS, "all"}
    for card in (clip, hpsv2, aesthetic):
        assert card["steps"] >= 20
        assert card["trained_on"]


@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_the_header_is_enough_for_open_clip_to_build_the_model(folder: Path, name: str) -> None:
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["config"])
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert {"open_clip", "image_size", "mean", "std"} <= header.keys()
    assert dtypes == {torch.float16, torch.int32, torch.int64}  # weights, token ids, batch counters
    model = CLIP(**header["open_clip"])
    model.load_state_dict(read_clip(folder / f"{name}.safetensors").state_dict())
    assert model.logit_bias is not None
    tokens = SimpleTokenizer(context_length=model.context_length)(["three flat foxes in the snow", "", "no such word"])
    with torch.no_grad():
        images = model.eval().encode_image(torch.zeros(2, 3, header["image_size"], header["image_size"]))
        texts = model.encode_text(tokens, normalize=True)
    assert images.shape == (2, header["open_clip"]["embed_dim"])
    assert texts.isfinite().all()


@pytest.mark.parametrize("tower", ["resnet", "vit"])
def test_a_saved_model_reproduces_the_embeddings(tmp_path: Path, captions: Captions, tower: str) -> None:
    clip = new_clip(tower, captions.known)
    clip.model.half().float().eval()  # round to float16, as the file does
    path = tmp_path / "clip.safetensors"
    save_clip(clip, path)
    full, again = read_clip(path), read_for_training(path)
    again.model.eval()
    text = ["a photo of two geese at night", "xylophone 3d octopus."]
    ids = SimpleTokenizer(context_length=32)(text)
    images = normalise(render_scenes(2, seed=0).images)
    with torch.no_grad():
        expected = clip.model.encode_image(images), clip.model.encode_text(clip.compact[ids])
        torch.testing.assert_close((full.encode_image(images), full.encode_text(ids)), expected)
        torch.testing.assert_close(
            (again.model.encode_image(images), again.model.encode_text(again.compact[ids])), expected
        )
    assert full.token_embedding.weight.shape[0] == 49_408


def test_captions_agree_with_their_requests_and_match_their_scenes(captions: Captions) -> None:
    torch.manual_seed(0)
    number = torch.arange(200) % 6 + 1
    truth = labels(sample_layouts(200, 3, number=number), "cpu")
    ids, requests = captions.sample(truth)
    assert matches(requests, truth).diagonal().all()
    tokenizer = SimpleTokenizer()
    for row, (species, requested, style, place) in zip(ids.tolist(), requests.T.tolist(), strict=True):
        text = tokenizer.decode(row[1 : row.index(tokenizer.eot_token_id)]).replace("3 d ", "3d ")
        # In "a photo of foxes" the article belongs to the photo.
        request = read_caption(re.sub("^an? [a-z]+ of ", "", text))
        assert request.species == SPECIES[species], text
        assert request.number == (None if requested in (OPEN, SEVERAL) else requested), text
        assert request.style == (None if style < 0 else STYLES[style]), text
        assert request.background == (None if place < 0 else BACKGROUNDS[place]), text


def test_a_caption_matches_every_scene_that_shows_what_it_names() -> None:
    fox = SPECIES.index("fox")
    truth = torch.tensor([[fox, 2, 0, 0], [fox, 1, 1, 3], [fox, 5, 1, 3], [fox, 0, 1, 3], [fox + 1, 2, 0, 0]]).T
    requests = torch.tensor(
        [[fox, OPEN, -1, -1], [fox, SEVERAL, -1, -1], [fox, 2, -1, -1], [fox, OPEN, 1, 3], [fox, 1, 0, -1]]
    ).T
    expected = [[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert matches(requests, truth).int().tolist() == expected


def test_altered_labels_differ_in_exactly_one_attribute() -> None:
    truth = labels(sample_layouts(500, 1, number=torch.arange(500) % 6 + 1), "cpu")
    other, which = alter(truth, torch.Generator().manual_seed(0))
    assert torch.equal(other != truth, which == torch.arange(4)[:, None])
    assert set(which.tolist()) == {0, 1, 2, 3}
    for row, lowest, count in zip(other, (0, 1, 0, 0), VALUES.values(), strict=True):
        assert row[which == list(VALUES.values()).index(count)].min() >= lowest
    changed = other[1][which == 1]
    assert set(changed.tolist()) == {1, 2, 3, 4}


def test_the_images_of_a_choice_differ_in_one_label() -> None:
    choices = train_preference.render_choices(60, 5, "cpu")
    first, second = choices.truth
    assert torch.equal(first != second, choices.changed == torch.arange(4)[:, None])
    assert first[1].min() >= 1
    assert first[1].max() <= 4
    assert (choices.images[0] != choices.images[1]).flatten(1).any(1).all()


def test_pairs_of_compositions_differ_and_depend_on_the_seed() -> None:
    pairs = compositions.render_pairs(20, 7, "cpu")
    again = compositions.render_pairs(20, 7, "cpu")
    assert pairs.aspect.bincount().tolist() == [4] * 5
    assert (pairs.better != pairs.worse).flatten(1).any(1).all()
    damaged = compositions.ASPECTS.index("damage")
    unhurt = (pairs.aspect != damaged).nonzero()[:, 0]
    same = (pairs.worse[unhurt] == again.worse[unhurt]).flatten(1).all(1)
    assert same.float().mean() > 0.5  # the others have pixel noise, which does not depend on the seed


def test_the_head_has_the_keys_and_the_score_range_of_the_original(folder: Path) -> None:
    with safe_open(folder / "aesthetic.safetensors", framework="pt") as file:
        keys = set(file.keys())
        assert json.loads(file.metadata()["config"]) == {"clip": "starter"}
    assert keys == {f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    card = json.loads((folder / "aesthetic.json").read_text())
    assert 1 < card["scores"][0] <= card["scores"][2] < 10


def test_a_missing_clip_file_names_the_script(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train_clip"):
        read_for_training(tmp_path / "clip.safetensors")
