"""Options, metadata and prompts give each sample's requests, or one clear error."""

from __future__ import annotations

import re
from typing import Any

import pytest
from labelled_prompts import READ, REFUSED

from alignprop_core.errors import ConfigError, PromptError
from alignprop_counting.coco import COCO_NAMES
from alignprop_counting.config import ObjectCountConfig, PresenceConfig
from alignprop_counting.requests import RequestReader
from alignprop_counting.vocabulary import Vocabulary

ANIMALS = ("cat", "dog", "fox", "bird", "mouse", "goose", "sheep", "wolf", "butterfly", "fish", "hot dog", "person")
VOCABULARY = Vocabulary(ANIMALS)


def reader(kind: type[ObjectCountConfig] | type[PresenceConfig] = ObjectCountConfig, **options: Any) -> RequestReader:
    return RequestReader(kind(**options), VOCABULARY)


def counted(reader: RequestReader, prompt: str, metadata: dict[str, Any] | None = None) -> Any:
    return reader.read(prompt, metadata or {}, counts=True)


def pairs(requests: Any) -> list[tuple[str, int | None]]:
    return [(ANIMALS[request.class_id], request.count) for request in requests]


def test_options_fix_objects_and_numbers() -> None:
    assert pairs(counted(reader(source="config", objects="cat", number=2), "")) == [("cat", 2)]
    both = reader(source="config", objects=("cats", "Bird"), number=(1, 2))
    assert pairs(counted(both, "three foxes")) == [("cat", 1), ("bird", 2)]
    assert pairs(counted(reader(source="config", objects=("cat", "bird"), number=2), "")) == [
        ("cat", 2),
        ("bird", 2),
    ]
    assert pairs(counted(reader(number=4), "a fox")) == [("fox", 4)]
    assert pairs(counted(reader(objects="fox"), "two foxes and a cat")) == [("fox", 2)]


def test_a_fixed_class_that_the_prompt_does_not_name_takes_no_number_from_it() -> None:
    # "a robin with three eggs" is not three birds.
    for prompt in ("three robins", "a robin with three eggs", "three robins and two hawks"):
        with pytest.raises(PromptError, match=rf'"{prompt}" does not say clearly how many \("bird"\)\. Write'):
            counted(reader(objects="bird"), prompt)
    assert pairs(counted(reader(objects="bird", number=3), "three robins")) == [("bird", 3)]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("over ten dogs", "over ten dogs"),
        ("2\u2019000 dogs", "2\u2019000 dogs"),
        ("two rows of three dogs", "two rows of three dogs"),
        ("a couple of dogs", "a couple of dogs"),
        ("one or two cats", "one or two cats"),
        ("a cat, not a dog", "not a dog"),
        ("no cats or dogs", "no cats or dogs"),
        ("two dog bowls", "two dog bowls"),
        ("foxes in a meadow", "foxes"),
    ],
)
def test_a_prompt_without_a_clear_count_is_one_error_that_quotes_the_words(prompt: str, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        counted(reader(), prompt)
    message = str(caught.value)
    assert f'The prompt "{prompt}" does not say clearly how many ("' in message
    assert f'with "{words}". Write one exact number' in message
    assert "in the metadata of a JSONL prompt file (source: metadata)" in message
    # Either the options or metadata give the count instead.
    assert pairs(counted(reader(objects="dog", number=2), prompt)) == [("dog", 2)]
    metadata = {"object": "dog", "number": 2}
    assert pairs(counted(reader(source="metadata"), prompt, metadata)) == [("dog", 2)]


def test_an_unclear_number_does_not_matter_where_no_number_is_needed() -> None:
    for prompt in ("one or two cats", "about five cats", "several cats", "foxes in a meadow"):
        assert reader(PresenceConfig).read(prompt, {})[0].count is None
    assert pairs(counted(reader(number=2), "2.5 cats")) == [("cat", 2)]
    assert pairs(counted(reader(objects="cat"), "a cat and 2.5 dogs")) == [("cat", 1)]
    for prompt, words in (
        ("a cat not a dog", "not a dog"),
        ("zero or one dogs", "zero or one dogs"),
        ("a cat or a dog", "a cat or a"),
        ("half a dog", "half a dog"),
        ("two dog bowls", "two dog bowls"),
    ):
        with pytest.raises(PromptError, match=f'with "{words}"'):
            reader(PresenceConfig).read(prompt, {})


def test_metadata_gives_classes_and_counts() -> None:
    animal = reader(source="metadata", object_key="animal")
    assert pairs(counted(animal, "", {"animal": "fox", "number": 3})) == [("fox", 3)]
    assert pairs(counted(animal, "", {"animal": ["fox", "cat"], "number": [3, 0]})) == [("fox", 3), ("cat", 0)]
    assert pairs(counted(reader(source="metadata", objects="dog"), "", {"number": 2})) == [("dog", 2)]


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
        counted(reader(source="metadata", object_key="animal"), "a prompt", metadata)


def test_an_unknown_class_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'^options\.objects: .* no class "foxe"\. Did you mean "fox"'):
        reader(objects="foxe")
    with pytest.raises(ConfigError, match=r'metadata "object": .* no class "brid". Did you mean "bird"'):
        counted(reader(source="metadata"), "", {"object": "brid", "number": 1})
    with pytest.raises(PromptError, match=r'"three foxxes" names no class .* Did you mean "fox"'):
        counted(reader(), "three foxxes")
    with pytest.raises(PromptError, match=r'The prompt "" names no class .* It has 12: cat, dog'):
        counted(reader(), "")


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("three foxs", None),  # COCO has no fox, and "three" is not a misspelled sheep
        ("three red foxs in the fog", None),
        ("two dozen shep", "sheep"),
        ("a photo for three girafes", "giraffe"),
        ("a bananna and two unicorns", "banana"),
        ("a bananna beside three elefants", 'banana" or "elephant'),
    ],
)
def test_misspelled_nouns_of_a_prompt_are_suggested(prompt: str, nearest: str | None) -> None:
    with pytest.raises(PromptError) as caught:
        counted(RequestReader(ObjectCountConfig(), Vocabulary(COCO_NAMES)), prompt)
    assert (f'Did you mean "{nearest}"?' if nearest else "It has 80: person") in str(caught.value)


def test_number_words_and_the_like_are_not_a_misspelled_class() -> None:
    names = RequestReader(ObjectCountConfig(), Vocabulary(("flour", "pine", "withers", "fork")))
    for prompt in ("four unicorns", "nine unicorns", "a tree for unicorns", "unicorns with hats"):
        with pytest.raises(PromptError, match="It has 4"):
            counted(names, prompt)
    with pytest.raises(PromptError, match='Did you mean "fork"'):
        counted(names, "four forx")


def test_a_plural_without_a_number_has_no_count() -> None:
    with pytest.raises(
        PromptError, match=r'"foxes in a meadow" does not say clearly how many \("fox"\) with "foxes". Write'
    ):
        counted(reader(), "foxes in a meadow")
    assert pairs(reader().read("foxes in a meadow", {})) == [("fox", None)]
    assert pairs(reader(PresenceConfig).read("foxes in a meadow", {})) == [("fox", None)]


def test_a_class_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="name a class twice"):
        reader(objects=("fox", "foxes"))


@pytest.mark.parametrize("name", ["counting/coco_objects", "counting/eval_coco_objects"])
def test_prompts_of_the_prompt_sets_agree_with_their_metadata(name: str) -> None:
    from alignprop_core.prompts import load_prompts
    from alignprop_core.registry.registry import default_registry

    found = load_prompts(name, default_registry())
    assert len(found.prompts) == default_registry().prompt_set(name).spec.size
    vocabulary = Vocabulary(COCO_NAMES)
    by_prompt = RequestReader(ObjectCountConfig(), vocabulary)
    by_metadata = RequestReader(ObjectCountConfig(source="metadata"), vocabulary)
    for prompt, metadata in zip(found.prompts, found.metadata, strict=True):
        assert counted(by_prompt, prompt, metadata) == counted(by_metadata, prompt, metadata)


def test_labelled_prompts_are_read_rightly_or_refused_with_the_words_that_are_not_clear() -> None:
    coco = RequestReader(ObjectCountConfig(), Vocabulary(COCO_NAMES))
    for prompt, expected in READ.items():
        found = coco.read(prompt, {}, counts=True)
        assert {COCO_NAMES[request.class_id]: request.count for request in found} == expected, prompt
    for prompt in REFUSED:
        with pytest.raises(PromptError) as caught:
            coco.read(prompt, {}, counts=True)
        quoted = re.search(r'how many \(".*?"\) with "(.*?)"\. Write', str(caught.value))
        assert "names no class" in str(caught.value) or (quoted and quoted[1] and quoted[1] in prompt), prompt


def test_a_word_that_is_nearly_a_class_is_refused_beside_other_classes() -> None:
    coco = RequestReader(ObjectCountConfig(), Vocabulary(COCO_NAMES))
    with pytest.raises(PromptError, match=r'how many \("giraffe"\) with "giraffs"'):
        counted(coco, "five giraffs and a zebra")
    for prompt in ("two dogs with a bandana", "a skateboarder and two dogs", "two dogs near a brook"):
        assert [request.count for request in counted(coco, prompt)] == [2]
