"""Captions, scenes, the judge, and the size of the package."""

from __future__ import annotations

import pytest
import torch

from alignprop_starter import model_folder
from alignprop_starter.judge import ATTRIBUTES, load_judge
from alignprop_starter.scenes import Scenes, heldout_combinations, render_scenes, sample_layouts
from alignprop_starter.vocabulary import (
    BACKGROUNDS,
    MAX_NUMBER,
    SPECIES,
    STYLES,
    WORDS,
    Request,
    caption,
    plural,
    read_caption,
)

PACKAGE = model_folder().parent


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return render_scenes(96, seed=77, split="all")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (caption("fox", 3, "flat", "meadow"), "three flat foxes in a meadow"),
        (caption("octopus", 1), "an octopus"),
        (caption("ant", 1, "3d", "snow"), "a 3d ant in the snow"),
        (caption("mouse", many=True, background="night"), "mice at night"),
        (caption("fox", None, "3d"), "3d fox"),
        (caption("goose", "2"), "2 geese"),
    ],
)
def test_captions_are_grammatical(text: str, expected: str) -> None:
    assert text == expected


def test_parsing_a_full_caption_returns_its_attributes() -> None:
    for animal in SPECIES:
        for number in range(1, MAX_NUMBER + 1):
            for style in STYLES:
                for background in BACKGROUNDS:
                    assert read_caption(caption(animal, number, style, background)) == Request(
                        animal, number, style, background
                    )


def test_the_article_of_a_place_is_not_a_number() -> None:
    assert read_caption("fox in a meadow") == Request("fox", None, None, "meadow")
    assert read_caption("nothing we know") == Request()


@pytest.mark.parametrize(
    ("one", "many"), [("mouse", "mice"), ("goose", "geese"), ("sheep", "sheep"), ("wolf", "wolves"), ("fly", "flies")]
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many
    assert {one, many} <= set(WORDS)


def test_scenes_depend_only_on_the_seed() -> None:
    first, again, other = render_scenes(4, seed=1), render_scenes(4, seed=1), render_scenes(4, seed=2)
    assert torch.equal(first.images, again.images)
    assert first.captions() == again.captions()
    assert not torch.equal(first.images, other.images)


def test_scenes_are_images_with_labels(scenes: Scenes) -> None:
    assert scenes.images.shape == (96, 3, 128, 128)
    assert scenes.images.dtype == torch.float32
    assert 0 <= scenes.images.min() < scenes.images.max() <= 1
    boxes = scenes.layout.boxes
    present = (boxes[..., 2] > boxes[..., 0]).sum(1)
    assert torch.equal(present, scenes.layout.number)
    assert boxes.min() >= 0
    assert boxes.max() <= 128


def test_given_attributes_are_used_with_up_to_six_animals() -> None:
    number = torch.arange(7)
    layout = sample_layouts(7, seed=3, number=number, style=torch.full((7,), 2))
    assert torch.equal(layout.number, number)
    assert set(layout.style.tolist()) == {2}
    assert torch.equal((layout.boxes[..., 2] > 0).sum(1), number)


def test_training_scenes_contain_no_heldout_combination() -> None:
    held = heldout_combinations()
    assert held.float().mean() == pytest.approx(0.1, abs=0.002)
    for split, expected in (("train", False), ("heldout", True)):
        a = sample_layouts(2000, seed=5, split=split)
        found = held[a.species, a.style, a.number - 1, a.background]
        assert torch.equal(found, torch.full((2000,), expected))


def test_an_unknown_split_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="validation"):
        sample_layouts(1, seed=0, split="validation")


def test_the_judge_classifies_unseen_scenes(scenes: Scenes) -> None:
    judge = load_judge()
    seen = judge.read(scenes.images)
    a = scenes.layout
    for name in ATTRIBUTES:
        accuracy = (seen[name] == getattr(a, name)).float().mean()
        assert accuracy >= 0.97, (name, float(accuracy))


def test_the_package_is_below_30_megabytes_and_its_weights_for_rewards_below_13_and_a_half() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    weights = sum(path.stat().st_size for path in files if path.parent == PACKAGE / "weights")
    assert sum(path.stat().st_size for path in files) - weights <= 30_000_000
    assert weights <= 13_500_000  # 18 MB together with the 4.5 MB of alignprop-ultralytics
    assert max(path.stat().st_size for path in files) <= 16_000_000
