"""Prompts, metadata and options say what is wished for."""

from __future__ import annotations

from typing import Any

import pytest

from alignprop_core.errors import ConfigError, PromptError
from alignprop_counting.coco import COCO_NAMES, DETR_NAMES
from alignprop_counting.config import ObjectCountConfig, PresenceConfig
from alignprop_counting.wished import WishReader
from alignprop_counting.wishes import Vocabulary
from alignprop_counting.words import number_of, plurals

ANIMALS = ("cat", "dog", "fox", "bird", "mouse", "goose", "sheep", "wolf", "butterfly", "fish", "hot dog", "person")
VOCABULARY = Vocabulary(ANIMALS)


def read(prompt: str) -> dict[str, int | None]:
    return {ANIMALS[wish.kind]: wish.number for wish in VOCABULARY.read(prompt)}


@pytest.mark.parametrize(
    ("prompt", "wishes"),
    [
        ("three foxes", {"fox": 3}),
        ("3 dogs", {"dog": 3}),
        ("a cat and two birds", {"cat": 1, "bird": 2}),
        ("no dogs", {"dog": 0}),
        ("fox", {"fox": None}),
        ("foxes in a meadow", {"fox": None}),
        ("a photo of foxes", {"fox": None}),
        ("a photo of three foxes", {"fox": 3}),
        ("three flat foxes in a meadow", {"fox": 3}),
        ("Three small, red foxes; one goose.", {"fox": 3, "goose": 1}),
        ("A dog without a cat", {"dog": 1, "cat": 0}),
        ("two sheep, without any dogs", {"sheep": 2, "dog": 0}),
        ("a bird, no cats or dogs", {"bird": 1, "cat": 0, "dog": 0}),
        ("five mice and six geese", {"mouse": 5, "goose": 6}),
        ("two wolves, four butterflies, seven fish", {"wolf": 2, "butterfly": 4, "fish": 7}),
        ("two red foxes and one blue fox", {"fox": 3}),
        ("a fox chases the fox", {"fox": 1}),
        ("a pair of cats and a dozen birds", {"cat": 2, "bird": 12}),
        ("two dozen birds", {"bird": 24}),
        ("a couple of dogs", {"dog": 2}),
        ("a dog and another dog", {"dog": 2}),
        ("a cat without another cat or a dog", {"cat": 1, "dog": 0}),
        ("another pair of mice", {"mouse": 2}),
        ("a book about a dog", {"dog": 1}),
        ("a photo of the three dogs", {"dog": 3}),
        ("twenty-one birds", {"bird": 21}),
        ("two hot dogs and a dog", {"hot dog": 2, "dog": 1}),
        ("four people with a dog", {"person": 4, "dog": 1}),
        ("a forest, foxes", {"fox": None}),
        ("two trees, a fox", {"fox": 1}),
        ("a 3d fox", {"fox": 1}),
        ("12 cats", {"cat": 12}),
        ("1,000 cats", {"cat": 1000}),
        ("twenty one birds", {"bird": 21}),
        ("half a dozen birds", {"bird": 6}),
        ("a fox without a cat or a dog", {"fox": 1, "cat": 0, "dog": 0}),
        ("no cats nor dogs", {"cat": 0, "dog": 0}),
        ("a dog not far from a cat", {"dog": 1, "cat": 1}),
        ("a zoo - 3 dogs", {"dog": 3}),
        ("", {}),
        ("a car in the rain", {}),
        ("word " * 500, {}),
    ],
)
def test_a_prompt_says_which_and_how_many(prompt: str, wishes: dict[str, int | None]) -> None:
    assert read(prompt) == wishes


def test_every_starter_caption_is_read_as_the_starter_world_reads_it() -> None:
    vocabulary = pytest.importorskip("alignprop_starter.vocabulary", reason="alignprop-starter is not installed")
    names = Vocabulary(vocabulary.SPECIES)
    for kind, species in enumerate(vocabulary.SPECIES):
        for number in (1, 2, 3, 4, "1", "3"):
            for style in (None, "3d"):
                for place in (None, "meadow"):
                    text = vocabulary.caption(species, number, style, place)
                    (wish,) = names.read(text)
                    assert (wish.kind, wish.number) == (kind, int(number)), text


def test_numbers_and_plurals() -> None:
    words = ["0", "17", "zero", "nineteen", "twenty", "ninety-nine", "dog", "a", "3d", "twenty-zero"]
    assert [number_of(w) for w in words] == [0, 17, 0, 19, 20, 99, None, None, None, None]
    assert plurals("traffic light") == {"traffic lights"}
    assert plurals("knife") == {"knives", "knifes"}
    assert plurals("bus") == {"buses", "bus"}
    assert plurals("cherry") == {"cherries"}
    assert plurals("toy") == {"toys"}
    assert plurals("giraffe") == {"giraffes"}
    assert plurals("bench") == {"benches"}


def test_coco_names_are_those_of_the_two_numberings() -> None:
    assert len(COCO_NAMES) == 80
    assert len(DETR_NAMES) == 91
    assert DETR_NAMES[1] == COCO_NAMES[0] == "person"
    assert DETR_NAMES[90] == COCO_NAMES[79] == "toothbrush"
    assert Vocabulary(DETR_NAMES).read("two people, a dog and three traffic lights")[2].kind == 10


def reader(kind: type[ObjectCountConfig] | type[PresenceConfig] = ObjectCountConfig, **options: Any) -> WishReader:
    return WishReader(kind(**options), VOCABULARY)


def pairs(wishes: Any) -> list[tuple[str, int | None]]:
    return [(ANIMALS[wish.kind], wish.number) for wish in wishes]


def test_options_fix_objects_and_numbers() -> None:
    assert pairs(reader(source="config", objects="cat", number=2).counted("", {})) == [("cat", 2)]
    both = reader(source="config", objects=("cats", "Bird"), number=(1, 2))
    assert pairs(both.counted("three foxes", {})) == [("cat", 1), ("bird", 2)]
    assert pairs(reader(source="config", objects=("cat", "bird"), number=2).counted("", {})) == [
        ("cat", 2),
        ("bird", 2),
    ]
    assert pairs(reader(number=4).counted("a fox", {})) == [("fox", 4)]
    assert pairs(reader(objects="fox").counted("two foxes and a cat", {})) == [("fox", 2)]


def test_an_object_of_another_name_takes_the_prompts_only_number() -> None:
    assert pairs(reader(objects="bird").counted("three robins", {})) == [("bird", 3)]
    with pytest.raises(PromptError, match='does not say how many \\("bird"\\)'):
        reader(objects="bird").counted("three robins and two hawks", {})


@pytest.mark.parametrize(
    ("prompt", "words", "reason"),
    [
        ("2.5 dogs", "2.5", "whole number"),
        (".5 dogs", ".5", "whole number"),
        ("1/2 dogs", "1/2", "whole number"),
        ("two and a half dogs", "and a half", "whole number"),
        ("-3 dogs", "-3", "negative"),
        ("\u22123 dogs", "\u22123", "negative"),
        ("minus three dogs", "minus three", "negative"),
        ("ten thousand birds", "ten thousand", "read in digits"),
        ("two hundred and five birds", "two hundred and five", "read in digits"),
        ("1,001 cats", "1,001", "1000 is the most"),
        ("5000 cats", "5000", "1000 is the most"),
        ("10,000,000 cats", "10,000,000", "1000 is the most"),
        ("ninety dozen cats", "ninety dozen", "1000 is the most"),
        ("600 cats and 600 white cats", "600 and 600", "1000 is the most"),
        ("one or two cats", "one or two", "not clear"),
        ("two to four cats", "two to four", "not clear"),
        ("2-4 cats", "2-4", "not clear"),
        ("2 \u2013 4 cats", "2 \u2013 4", "not clear"),
        ("between two and four cats", "two and four", "not clear"),
        ("more than three cats", "more than three", "not clear"),
        ("no more than three cats", "more than three", "not clear"),
        ("at least three cats", "at least three", "not clear"),
        ("several dozen birds", "several dozen", "not clear"),
        ("one cat or two cats", "or two cats", "not clear"),
        ("a cat or a dog", "or a dog", "not clear"),
        ("about five dogs", "about five", "rough number"),
        ("nearly ten dogs", "nearly ten", "rough number"),
        ("around a dozen dogs", "around a dozen", "rough number"),
        ("almost two dozen dogs", "almost two", "rough number"),
        ("some 20 dogs", "some 20", "rough number"),
        ("two of three dogs", "two of three", "not clear"),
        ("two out of three dogs", "two out of three", "not clear"),
        ("two of the three dogs", "two of the three", "not clear"),
        ("most of five dogs", "most of five", "not clear"),
        ("half of the four dogs", "half of the four", "not clear"),
        ("none of the three dogs", "none of the three", "not clear"),
        ("a cat not a dog", "not a dog", "read as none"),
        ("a cat and not two dogs", "not two dogs", "read as none"),
        ("cats, not the dogs", "not the dogs", "read as none"),
        ("neither a dog", "neither a dog", "read as none"),
        ("a cat that isn't a dog", "isn't a dog", "read as none"),
        ("no two dogs", "no two dogs", "read as none"),
    ],
)
def test_what_a_guess_could_get_wrong_is_one_clear_error(prompt: str, words: str, reason: str) -> None:
    with pytest.raises(PromptError) as caught:
        reader().counted(prompt, {})
    message = str(caught.value)
    assert f'says "{words}" ("' in message
    assert reason in message
    assert "set the options objects and number" in message
    # Either option, or metadata, settles it.
    assert pairs(reader(objects="dog", number=2).counted(prompt, {})) == [("dog", 2)]
    metadata = {"object": "dog", "number": 2}
    assert pairs(reader(source="metadata").counted(prompt, metadata)) == [("dog", 2)]


def test_a_doubt_about_the_number_alone_does_not_matter_where_no_number_is_needed() -> None:
    assert pairs(reader(PresenceConfig).read("one or two cats", {})) == [("cat", None)]
    assert pairs(reader(number=2).counted("2.5 cats", {})) == [("cat", 2)]
    assert pairs(reader(objects="cat").counted("a cat and 2.5 dogs", {})) == [("cat", 1)]
    for prompt in ("a cat not a dog", "zero or one dogs"):
        with pytest.raises(PromptError, match=r'says "(not a dog|zero or one)"'):
            reader(PresenceConfig).read(prompt, {})


def test_a_pair_is_one_object_of_what_is_called_a_pair() -> None:
    names = ("skis", "scissors", "ski", "wine glass")
    vocabulary = Vocabulary(names)
    for prompt, wishes in (
        ("a pair of skis", {"skis": 1}),
        ("a pair of scissors and two pair of skis", {"scissors": 1, "skis": 2}),
        ("a couple of scissors", {"scissors": 2}),
        ("a pair of wine glasses", {"wine glass": 2}),
    ):
        assert {names[wish.kind]: wish.number for wish in vocabulary.read(prompt)} == wishes, prompt
    assert [wish.number for wish in Vocabulary(("ski",)).read("a pair of skis")] == [2]


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [("1,000 robins", 1000), ("two dozen robins", 24), ("twenty one robins", 21), ("three small robins", 3)],
)
def test_an_object_of_another_name_takes_whole_numbers(prompt: str, outcome: int) -> None:
    assert pairs(reader(objects="bird").counted(prompt, {})) == [("bird", outcome)]


@pytest.mark.parametrize("prompt", ["2.5 robins", "-3 robins", "ten thousand robins", "one or two robins"])
def test_an_object_of_another_name_takes_no_doubtful_number(prompt: str) -> None:
    with pytest.raises(PromptError, match=f'says "{prompt.removesuffix(" robins")}" \\("bird"\\)'):
        reader(objects="bird").counted(prompt, {})


def test_metadata_says_which_and_how_many() -> None:
    read = reader(source="metadata", object_key="animal").counted
    assert pairs(read("", {"animal": "fox", "number": 3})) == [("fox", 3)]
    assert pairs(read("", {"animal": ["fox", "cat"], "number": [3, 0]})) == [("fox", 3), ("cat", 0)]
    assert pairs(reader(source="metadata", objects="dog").counted("", {"number": 2})) == [("dog", 2)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, 'no metadata key "animal" .* its keys: none. The option object_key'),
        ({"species": "fox"}, 'no metadata key "animal" .* its keys: species'),
        ({"animal": 3, "number": 1}, 'metadata key "animal" of a prompt is 3; it must be a class name'),
        ({"animal": "fox"}, 'no metadata key "number"'),
        ({"animal": "fox", "number": "three"}, "is 'three'; it must be a whole number"),
        ({"animal": "fox", "number": True}, "is True; it must be a whole number"),
        ({"animal": "fox", "number": -1}, "is -1; it must be a whole number"),
        ({"animal": "fox", "number": 1001}, "is 1001; it must be a whole number from 0 to 1000"),
        ({"animal": "fox", "number": 10**30}, "is 1000000.*; it must be a whole number from 0 to 1000"),
        ({"animal": ["fox", "foxes"], "number": 1}, "it names a class twice"),
        ({"animal": ["fox", "cat"], "number": [1, 2, 3]}, "2 objects but 3 numbers"),
    ],
)
def test_wrong_metadata_is_one_clear_error(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        reader(source="metadata", object_key="animal").counted("a prompt", metadata)


def test_an_unknown_class_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'^options\.objects: .* no class "foxe"\. Did you mean "fox"'):
        reader(objects="foxe")
    with pytest.raises(ConfigError, match=r'metadata "object": .* no class "brid". Did you mean "bird"'):
        reader(source="metadata").counted("", {"object": "brid", "number": 1})
    with pytest.raises(PromptError, match=r'"three foxxes" names no class .* Did you mean "fox"'):
        reader().counted("three foxxes", {})
    with pytest.raises(PromptError, match=r'The prompt "" names no class .* It knows 12: cat, dog'):
        reader().counted("", {})


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("three foxs", None),  # COCO has no fox, and "three" is no misspelt sheep
        ("three red foxs in the fog", None),
        ("two dozen shep", "sheep"),
        ("a photo for three girafes", "giraffe"),
        ("a bananna and two unicorns", "banana"),
        ("a bananna beside three elefants", "elephant"),
    ],
)
def test_the_noun_of_a_prompt_is_what_a_suggestion_is_near_to(prompt: str, nearest: str | None) -> None:
    with pytest.raises(PromptError) as caught:
        WishReader(ObjectCountConfig(), Vocabulary(COCO_NAMES)).counted(prompt, {})
    assert (f'Did you mean "{nearest}"?' if nearest else "It knows 80: person") in str(caught.value)


def test_number_words_and_the_like_are_no_misspelt_class() -> None:
    vocabulary = Vocabulary(("flour", "pine", "withers", "fork"))
    for prompt in ("four unicorns", "nine unicorns", "a tree for unicorns", "unicorns with hats"):
        assert "It knows 4" in vocabulary.hint_for(prompt), prompt
    assert 'Did you mean "fork"' in vocabulary.hint_for("four forx")


def test_a_prompt_without_the_number_that_is_needed() -> None:
    with pytest.raises(PromptError, match=r'"foxes in a meadow" does not say how many \("fox"\). Write a number'):
        reader().counted("foxes in a meadow", {})
    assert pairs(reader().read("foxes in a meadow", {})) == [("fox", None)]
    assert pairs(reader(PresenceConfig).read("foxes in a meadow", {})) == [("fox", None)]


def test_a_class_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="name a class twice"):
        reader(objects=("fox", "foxes"))


@pytest.mark.parametrize("name", ["counting/coco_objects", "counting/eval_coco_objects"])
def test_the_prompt_sets_say_what_their_metadata_says(name: str) -> None:
    from alignprop_core.prompts import load_prompts
    from alignprop_core.registry import default_registry

    found = load_prompts(name, default_registry())
    assert len(found.prompts) == default_registry().prompt_set(name).spec.size
    vocabulary = Vocabulary(COCO_NAMES)
    by_prompt = WishReader(ObjectCountConfig(), vocabulary)
    by_metadata = WishReader(ObjectCountConfig(source="metadata"), vocabulary)
    for prompt, metadata in zip(found.prompts, found.metadata, strict=True):
        assert by_prompt.counted(prompt, metadata) == by_metadata.counted(prompt, metadata)
