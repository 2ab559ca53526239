"""Words find their classes: names, plurals, groups; what has no class is said with the nearest that has."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

import alignprop_classifier
from alignprop_classifier.names import ClassNames, imagenet_words, plurals
from alignprop_classifier.network import imagenet_names
from alignprop_core.errors import ConfigError, PromptError


@pytest.fixture(scope="module")
def names() -> ClassNames:
    return ClassNames(imagenet_names(), imagenet_words())


def shown(names: ClassNames, prompt: str) -> set[str]:
    return {names.names[index] for index in names.read(prompt).indices}


def test_the_table_of_classes_is_imagenets(names: ClassNames) -> None:
    """Against the list inside torchvision, which is another source."""
    from torchvision.models import ResNet18_Weights

    other = ResNet18_Weights.DEFAULT.meta["categories"]
    differ = [(a, b) for a, b in zip(names.names, other, strict=True) if a.lower() != b.lower()]
    # torchvision tells the three pairs apart that have one name in ImageNet.
    assert len(differ) < 20
    assert ("crane", "crane bird") in differ


@pytest.mark.parametrize(
    ("prompt", "classes"),
    [
        ("a photo of a zebra", {"zebra"}),
        ("three foxes in a meadow", {"red fox", "kit fox", "Arctic fox", "grey fox"}),
        ("a red fox", {"red fox"}),
        ("Two RED FOXES, at night", {"red fox"}),
        ("wolves", {"timber wolf", "white wolf", "red wolf"}),
        ("a wolf spider", {"wolf spider"}),
        ("a tiger cat and a tiger", {"tiger cat"}),
        ("a tiger and a lion", {"tiger"}),
        ("Shih-Tzus", {"Shih-Tzu"}),
        ("geese on the beach", {"goose"}),
        ("flat goldfish", {"goldfish"}),
        ("a computer mouse", {"mouse"}),
        ("crane", {"crane"}),
    ],
)
def test_a_prompt_names_its_longest_class_the_first_of_equals(
    names: ClassNames, prompt: str, classes: set[str]
) -> None:
    assert shown(names, prompt) == classes


def test_a_name_that_several_classes_have_means_any_of_them(names: ClassNames) -> None:
    assert len(names.read("a crane").indices) == 2  # the bird and the machine
    assert len(names.read("a dog").indices) == 118
    assert len(names.read("birds").indices) == 59
    assert names.find(134).indices == (134,)


@pytest.mark.parametrize("prompt", ["two mice", "a deer in the snow", "octopus", "Raccoons", "a bat", "turkeys"])
def test_animals_imagenet_lacks_are_refused_by_name(names: ClassNames, prompt: str) -> None:
    with pytest.raises(PromptError, match=r'ImageNet has no class for ".*" \(.+\)\. Choose another, or say in'):
        names.read(prompt)
    with pytest.raises(ConfigError, match="ImageNet has no class for"):
        names.find(prompt.rpartition(" ")[2] if prompt != "a deer in the snow" else "deer")


def test_a_prompt_without_a_class_gets_the_nearest_name_and_what_to_do(names: ClassNames) -> None:
    with pytest.raises(PromptError, match=r'"an elefant" names no class.*Did you mean "elephant"\?.*options.target'):
        names.read("an elefant")
    with pytest.raises(PromptError, match="The prompt is empty: it names no class"):
        names.read("")
    with pytest.raises(PromptError, match="The prompt is empty"):
        names.read(" ... ")
    with pytest.raises(PromptError) as caught:
        names.read("qwzx " * 500)
    assert len(str(caught.value)) < 400


def test_an_unknown_name_gets_the_nearest(names: ClassNames) -> None:
    with pytest.raises(ConfigError, match=r'no class "hipopotamus"\. Did you mean "hippopotamus"\?'):
        names.find("hipopotamus")
    with pytest.raises(ConfigError, match="numbered 0 to 999; there is no 1000"):
        names.find(1000)


def test_synonyms_come_before_everything() -> None:
    own = {"reynard": "red fox", "big cat": ["lion", "tiger", 293], "deer": ["hartebeest"], "cat": 281, "dog": "boxer"}
    names = ClassNames(imagenet_names(), imagenet_words(), own)
    assert shown(names, "three reynards") == {"red fox"}
    assert shown(names, "big cats in the snow") == {"lion", "tiger", "cheetah"}
    assert shown(names, "two deer") == {"hartebeest"}
    assert shown(names, "a cat") == {"tabby"}
    assert shown(names, "dogs") == {"boxer"}
    with pytest.raises(ConfigError, match=r'options\.synonyms\.x: .*no class "red foz"\. Did you mean "red fox"'):
        ClassNames(imagenet_names(), None, {"x": ["red foz"]})
    with pytest.raises(ConfigError, match="names no class; give it at least one"):
        ClassNames(imagenet_names(), None, {"x": []})
    with pytest.raises(ConfigError, match="is no word"):
        ClassNames(imagenet_names(), None, {"!": "lion"})


def test_classes_of_a_users_own() -> None:
    names = ClassNames(["happy robot, glad robot", "sad robot"])
    assert names.read("a sad robot").indices == (1,)
    assert names.read("glad robots").indices == (0,)
    with pytest.raises(PromptError, match="names no class"):
        names.read("a dog")


@pytest.mark.parametrize(
    ("word", "many"),
    [
        ("fox", {"foxes"}),
        ("fly", {"flies"}),
        ("monkey", {"monkeys"}),
        ("mouse", {"mice"}),
        ("mongoose", {"mongooses"}),
        ("fish", {"fish", "fishes"}),
        ("buffalo", {"buffalos", "buffaloes"}),
        ("finch", {"finches"}),
        ("sheep", {"sheep"}),
    ],
)
def test_plurals(word: str, many: set[str]) -> None:
    assert plurals(word) == many


def test_starter_animals_are_read_or_refused_by_name(names: ClassNames) -> None:
    vocabulary = pytest.importorskip("alignprop_starter.vocabulary")
    lacking = set()
    for animal in vocabulary.SPECIES:
        if animal in imagenet_words().lacking:
            lacking.add(animal)
            with pytest.raises(PromptError, match=f'ImageNet has no class for "{animal}"'):
                names.read(f"a {animal} in a meadow")
        else:
            single = names.read(f"a {animal} in a meadow")
            assert names.read(f"three {vocabulary.plural(animal)} on the beach").indices == single.indices
    assert lacking == {"bat", "deer", "dolphin", "mouse", "octopus", "raccoon", "rat", "turkey"}
    for spec in alignprop_classifier.alignprop_register_prompts():
        package, _, relative = spec.path.partition(":")
        rows = [json.loads(line) for line in files(package).joinpath(relative).read_text().splitlines()]
        animals = vocabulary.HELDOUT_ANIMALS if "eval" in spec.name else vocabulary.TRAIN_ANIMALS
        assert [row["animal"] for row in rows] == [animal for animal in animals if animal not in lacking]
        assert spec.size == len(rows)
