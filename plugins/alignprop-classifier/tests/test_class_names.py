"""Words map to classes: names, plurals, groups; a word without a class is reported with the nearest name."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

import alignprop_classifier
from alignprop_classifier.class_names import ClassNames, imagenet_words, plurals
from alignprop_classifier.network import imagenet_names
from alignprop_core.errors import ConfigError, PromptError
from alignprop_core.prompts import load_prompts
from alignprop_core.registry.registry import default_registry


@pytest.fixture(scope="module")
def names() -> ClassNames:
    return ClassNames(imagenet_names(), imagenet_words())


def classes_in(names: ClassNames, prompt: str) -> set[str]:
    return {names.names[index] for index in names.find_in_prompt(prompt).indices}


def test_the_class_names_are_imagenets(names: ClassNames) -> None:
    """Compared with torchvision's list, an independent source."""
    from torchvision.models import ResNet18_Weights

    other = ResNet18_Weights.DEFAULT.meta["categories"]
    differ = [(a, b) for a, b in zip(names.names, other, strict=True) if a.lower() != b.lower()]
    # torchvision distinguishes the three pairs of classes that share a name in ImageNet.
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
def test_the_longest_class_name_in_a_prompt_counts_and_the_first_of_equal_length(
    names: ClassNames, prompt: str, classes: set[str]
) -> None:
    assert classes_in(names, prompt) == classes


def test_every_registered_prompt_names_the_class_of_its_animal(names: ClassNames) -> None:
    registry = default_registry()
    for spec in alignprop_classifier.alignprop_register_prompts():
        found = load_prompts(spec.name, registry)
        assert len(set(found.prompts)) == spec.size, spec.name
        for prompt, metadata in zip(found.prompts, found.metadata, strict=True):
            assert classes_in(names, prompt) == classes_in(names, metadata["animal"]), prompt


def test_a_name_shared_by_several_classes_means_any_of_them(names: ClassNames) -> None:
    assert len(names.find_in_prompt("a crane").indices) == 2  # the bird and the machine
    assert len(names.find_in_prompt("a dog").indices) == 118
    assert len(names.find_in_prompt("birds").indices) == 59
    assert names.find(134).indices == (134,)


@pytest.mark.parametrize("prompt", ["two mice", "a deer in the snow", "octopus", "Raccoons", "a bat", "turkeys"])
def test_animals_without_an_imagenet_class_are_refused_by_name(names: ClassNames, prompt: str) -> None:
    with pytest.raises(
        PromptError, match=r'ImageNet has no class for ".*" \(.+\)\. Choose another class, or map the word'
    ):
        names.find_in_prompt(prompt)
    with pytest.raises(ConfigError, match="ImageNet has no class for"):
        names.find(prompt.rpartition(" ")[2] if prompt != "a deer in the snow" else "deer")


def test_a_prompt_without_a_class_is_reported_with_the_nearest_name_and_a_remedy(names: ClassNames) -> None:
    with pytest.raises(PromptError, match=r'"an elefant" names no class.*Did you mean "elephant"\?.*options.target'):
        names.find_in_prompt("an elefant")
    with pytest.raises(PromptError, match="The prompt is empty: it names no class"):
        names.find_in_prompt("")
    with pytest.raises(PromptError, match="The prompt is empty"):
        names.find_in_prompt(" ... ")
    with pytest.raises(PromptError) as caught:
        names.find_in_prompt("qwzx " * 500)
    assert len(str(caught.value)) < 400


def test_an_unknown_name_is_reported_with_the_nearest(names: ClassNames) -> None:
    with pytest.raises(ConfigError, match=r'no class "hipopotamus"\. Did you mean "hippopotamus"\?'):
        names.find("hipopotamus")
    with pytest.raises(ConfigError, match=r"There is no class 1000: .* numbered 0 to 999"):
        names.find(1000)


def test_synonyms_take_precedence() -> None:
    synonyms = {
        "reynard": "red fox",
        "big cat": ["lion", "tiger", 293],
        "deer": ["hartebeest"],
        "cat": 281,
        "dog": "boxer",
    }
    names = ClassNames(imagenet_names(), imagenet_words(), synonyms)
    assert classes_in(names, "three reynards") == {"red fox"}
    assert classes_in(names, "big cats in the snow") == {"lion", "tiger", "cheetah"}
    assert classes_in(names, "two deer") == {"hartebeest"}
    assert classes_in(names, "a cat") == {"tabby"}
    assert classes_in(names, "dogs") == {"boxer"}
    with pytest.raises(ConfigError, match=r'options\.synonyms\.x: .*no class "red foz"\. Did you mean "red fox"'):
        ClassNames(imagenet_names(), None, {"x": ["red foz"]})
    with pytest.raises(ConfigError, match=r"lists no class\. List at least one"):
        ClassNames(imagenet_names(), None, {"x": []})
    with pytest.raises(ConfigError, match="contains no letters or digits"):
        ClassNames(imagenet_names(), None, {"!": "lion"})


def test_custom_classes() -> None:
    names = ClassNames(["happy robot, glad robot", "sad robot"])
    assert names.find_in_prompt("a sad robot").indices == (1,)
    assert names.find_in_prompt("glad robots").indices == (0,)
    with pytest.raises(PromptError, match="names no class"):
        names.find_in_prompt("a dog")


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


def test_starter_animals_have_a_class_or_are_refused_by_name(names: ClassNames) -> None:
    vocabulary = pytest.importorskip("alignprop_starter.vocabulary")
    missing = set()
    for animal in vocabulary.SPECIES:
        if animal in imagenet_words().missing:
            missing.add(animal)
            with pytest.raises(PromptError, match=f'ImageNet has no class for "{animal}"'):
                names.find_in_prompt(f"a {animal} in a meadow")
        else:
            single = names.find_in_prompt(f"a {animal} in a meadow")
            assert names.find_in_prompt(f"three {vocabulary.plural(animal)} on the beach").indices == single.indices
    assert missing == {"bat", "deer", "dolphin", "mouse", "octopus", "raccoon", "rat", "turkey"}
    for spec in alignprop_classifier.alignprop_register_prompts():
        package, _, relative = spec.path.partition(":")
        rows = [json.loads(line) for line in files(package).joinpath(relative).read_text().splitlines()]
        animals = vocabulary.HELDOUT_ANIMALS if "eval" in spec.name else vocabulary.TRAIN_ANIMALS
        # A set can ask for an animal several times, with other backgrounds.
        assert [*dict.fromkeys(row["animal"] for row in rows)] == [a for a in animals if a not in missing]
        assert spec.size == len(rows)
