"""A prompt gives the right count, or none and the words that are not clear."""

from __future__ import annotations

import pytest

from alignprop_counting.coco import COCO_NAMES, DETR_NAMES
from alignprop_counting.phrases import read_number
from alignprop_counting.prompt_reader import read_prompt
from alignprop_counting.vocabulary import Vocabulary, plurals

ANIMALS = Vocabulary(
    ("cat", "dog", "fox", "bird", "mouse", "goose", "sheep", "wolf", "butterfly", "fish", "hot dog", "person")
)
COCO = Vocabulary(COCO_NAMES)


def read(prompt: str, vocabulary: Vocabulary = ANIMALS) -> dict[str, int | None]:
    return {vocabulary.names[request.class_id]: request.count for request in read_prompt(prompt, vocabulary)}


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        ("three foxes", {"fox": 3}),
        ("3 dogs", {"dog": 3}),
        ("12 cats", {"cat": 12}),
        ("1,000 cats", {"cat": 1000}),
        ("twenty birds", {"bird": 20}),
        ("1 dogs", {"dog": 1}),
        ("no dogs", {"dog": 0}),
        ("0 dogs", {"dog": 0}),
        ("a cat and two birds", {"cat": 1, "bird": 2}),
        ("two cats and a dog", {"cat": 2, "dog": 1}),
        ("fox", {"fox": None}),
        ("foxes in a meadow", {"fox": None}),
        ("a photo of foxes", {"fox": None}),
        ("a forest, foxes", {"fox": None}),
        ("a photo of three foxes", {"fox": 3}),
        ("a photo of 5 dogs, 4k, highly detailed", {"dog": 5}),
        ("DSLR photo of four cats, 35mm, f/1.8", {"cat": 4}),
        ("three flat foxes in a meadow", {"fox": 3}),
        ("Three small foxes; one goose.", {"fox": 3, "goose": 1}),
        ("A dog without a cat", {"dog": 1, "cat": 0}),
        ("two sheep, without any dogs", {"sheep": 2, "dog": 0}),
        ("a bird, no cats, no dogs", {"bird": 1, "cat": 0, "dog": 0}),
        ("no cats and two dogs", {"cat": 0, "dog": 2}),
        ("five mice and six geese", {"mouse": 5, "goose": 6}),
        ("two wolves, four butterflies, seven fish", {"wolf": 2, "butterfly": 4, "fish": 7}),
        ("two red foxes and one blue fox", {"fox": 3}),
        ("a fox chases the fox", {"fox": 1}),
        ("two dogs, the dogs are asleep", {"dog": 2}),
        ("a pair of cats", {"cat": 2}),
        ("a pair of small cats", {"cat": 2}),
        ("a dog and another dog", {"dog": 2}),
        ("a book about a dog", {"dog": 1}),
        ("a photo of the three dogs", {"dog": 3}),
        ("exactly three dogs", {"dog": 3}),
        ("a group of seven people", {"person": 7}),
        ("two hot dogs and a dog", {"hot dog": 2, "dog": 1}),
        ("four people with a dog", {"person": 4, "dog": 1}),
        ("a dog chases two cats", {"dog": 1, "cat": 2}),
        ("a dog next to two cats", {"dog": 1, "cat": 2}),
        ("a dog sitting on a mat", {"dog": 1}),
        ("a dog chased by three cats", {"dog": 1, "cat": 3}),
        ("a cat under a dog", {"cat": 1, "dog": 1}),
        ("two trees, a fox", {"fox": 1}),
        ("a 3d fox", {"fox": 1}),
        ("two two-headed dogs", {"dog": 2}),
        ("a zoo - 3 dogs", {"dog": 3}),
        ("a dog - a cat", {"dog": 1, "cat": 1}),
        ("a person's two dogs", {"dog": 2}),
        ("", {}),
        ("a car in the rain", {}),
        ("word " * 500, {}),
    ],
)
def test_a_prompt_gives_classes_and_counts(prompt: str, counts: dict[str, int | None]) -> None:
    assert read(prompt) == counts
    assert all(request.problem == "" for request in read_prompt(prompt, ANIMALS))


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        ("an orange cow", {"cow": 1}),
        ("three orange cars", {"car": 3}),
        ("a bird bath with two birds", {"bird": 2}),
        ("a car park with ten cars", {"car": 10}),
        ("a carrot cake", {"cake": 1}),
        ("a dog's bowl and two cats", {"bowl": 1, "cat": 2}),
        ("a dog\u2019s bowl and two cats", {"bowl": 1, "cat": 2}),
        ("two sheep dogs", {"dog": 2}),
        ("a bear rug and two bears", {"bear": 2}),
        ("a bird feeding station with two birds", {"bird": 2}),
        ("a horse painting with three dogs", {"dog": 3}),
        ("a dining table with four chairs", {"dining table": 1, "chair": 4}),
        ("12 eggs and a bowl", {"bowl": 1}),
    ],
)
def test_a_class_name_before_another_noun_is_not_an_object(prompt: str, counts: dict[str, int | None]) -> None:
    assert read(prompt, COCO) == counts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        # A class name that may describe another noun.
        ("two car tires", "two car tires"),
        ("a dog house", "a dog house"),
        ("two dogs' bowls and a cat", "two dogs'"),
        ("two cow bells", "two cow bells"),
        ("two dog", "two dog"),
        # A number that counts something else.
        ("two rows of three cars", "two rows of three cars"),
        ("two photos of a dog", "two photos of a dog"),
        ("two pairs of dogs", "two pairs of dogs"),
        ("three men watch dogs", "three men watch dogs"),
        ("three girls riding horses", "three girls riding horses"),
        ("a man eating pizza", "a man eating pizza"),
        ("2 year old dogs", "2 year old dogs"),
        ("three legged dogs", "three legged dogs"),
        ("one photo dogs", "one photo dogs"),
        ("two dogs each with a cat", "two dogs each"),
        # Numbers that are not read.
        ("2.5 dogs", "2.5 dogs"),
        (".5 dogs", ".5 dogs"),
        ("1/2 dogs", "1/2 dogs"),
        ("\u00bd dogs", "\u00bd dogs"),
        ("\uff12 dogs", "\uff12 dogs"),
        ("half a dog", "half a dog"),
        ("two and a half dogs", "two and a half dogs"),
        ("-3 dogs", "-3 dogs"),
        ("\u22123 dogs", "\u22123 dogs"),
        ("minus three dogs", "minus three dogs"),
        ("2\u2019000 dogs", "2\u2019000 dogs"),
        ("2'000 dogs", "2'000 dogs"),
        ("1 000 birds", "1 000 birds"),
        ("1.000 birds", "1.000 birds"),
        ("twenty-one birds", "twenty-one birds"),
        ("twenty one birds", "twenty one birds"),
        ("a dozen birds", "a dozen birds"),
        ("a dozen sheep", "a dozen sheep"),
        ("two dozen birds", "two dozen birds"),
        ("half a dozen birds", "half a dozen birds"),
        ("a couple of dogs", "a couple of dogs"),
        ("another pair of mice", "another pair of mice"),
        ("ten thousand birds", "ten thousand birds"),
        ("two hundred and five birds", "two hundred and five birds"),
        ("1,001 cats", "1,001 cats"),
        ("5000 cats", "5000 cats"),
        ("10,000,000 cats", "10,000,000 cats"),
        ("9" * 5000 + " cats", "9" * 5000 + " cats"),
        ("600 cats and 600 white cats", "600 cats and 600 white cats"),
        ("the first dog", "the first dog"),
        ("a dog and a second dog", "a second dog"),
        ("2nd dog", "2nd dog"),
        # Ranges and rough numbers.
        ("one or two cats", "one or two cats"),
        ("zero or one cats", "zero or one cats"),
        ("two to four cats", "two to four cats"),
        ("2-4 cats", "2-4 cats"),
        ("2 \u2013 4 cats", "2 \u2013 4 cats"),
        ("2\u20134 cats", "2\u20134 cats"),
        ("2 x 4 cats", "2 x 4 cats"),
        ("between two and four cats", "between two and four cats"),
        ("more than three cats", "more than three cats"),
        ("no more than three cats", "no more than three cats"),
        ("more than a cat", "more than a cat"),
        ("at least three cats", "at least three cats"),
        ("up to two cats", "up to two cats"),
        ("over ten dogs", "over ten dogs"),
        ("about five dogs", "about five dogs"),
        ("nearly ten dogs", "nearly ten dogs"),
        ("around a dozen dogs", "around a dozen dogs"),
        ("some 20 dogs", "some 20 dogs"),
        ("about a pair of dogs", "about a pair of dogs"),
        ("several dozen birds", "several dozen birds"),
        ("a few sheep", "a few sheep"),
        ("both dogs", "both dogs"),
        ("one cat or two", "one cat or two"),
        ("a dog x3", "a dog x3"),
        ("a dog (3)", "a dog (3"),
        ("two of three dogs", "two of three dogs"),
        ("two out of three dogs", "two out of three dogs"),
        ("two of the three dogs", "two of the three dogs"),
        ("most of five dogs", "most of five dogs"),
        ("half of the four dogs", "half of the four dogs"),
        ("none of the three dogs", "none of the three dogs"),
        # Mentions that may or may not add up.
        ("five dogs including two black dogs", "including two black dogs"),
        ("two dogs, a black dog and a white dog", "two dogs, a black dog"),
        ("a dog surrounded by dogs", "a dog surrounded by dogs"),
        ("dogs and a dog", "dogs and a dog"),
        # Alternatives and exclusions other than "no" and "without".
        ("one cat or two cats", "one cat or two"),
        ("a cat or a dog", "a cat or a"),
        ("a cat, not a dog", "not a dog"),
        ("a cat and not two dogs", "not two dogs"),
        ("cats, not the dogs", "not the dogs"),
        ("a dog not far from a cat", "not far from a cat"),
        ("neither a dog", "neither a dog"),
        ("a cat that isn't a dog", "that isn't a dog"),
        ("no two dogs", "no two dogs"),
        ("without two dogs", "without two dogs"),
        ("no riders on two horses", "no riders on two horses"),
        ("no cats or dogs", "no cats or dogs"),
        ("no cats nor dogs", "nor dogs"),
        ("a fox without a cat or a dog", "without a cat or a"),
        ("without a cat and a dog", "a dog"),
        ("without cats, dogs", "dogs"),
        ("a cat dressed as a bird", "dressed as a bird"),
        ("a cake shaped like a car", "shaped like a car"),
    ],
)
def test_words_that_are_not_clear_give_no_count_and_are_quoted(prompt: str, words: str) -> None:
    vocabulary = Vocabulary((*COCO_NAMES, "fox", "mouse"))
    unclear = [request for request in read_prompt(prompt, vocabulary) if request.problem]
    assert words in [request.words for request in unclear]
    assert all(request.count is None for request in unclear)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("three small, red foxes", "three small, red foxes"),  # the comma may end the phrase: "two deer, red foxes"
        ("a flock of sheep", "a flock of sheep"),
        ("5+ foxes", "5+ foxes"),
        ("two (2) foxes", "2) foxes"),
        ("5k foxes", "5k foxes"),
        ("a black and white cat", "a black and white cat"),
    ],
)
def test_a_noun_without_a_number_directly_before_it_has_no_count(prompt: str, words: str) -> None:
    (request,) = read_prompt(prompt, ANIMALS)
    assert (request.count, request.problem, request.words) == (None, "", words)


def test_every_starter_caption_is_read_as_the_starter_world_reads_it() -> None:
    vocabulary = pytest.importorskip("alignprop_starter.vocabulary", reason="alignprop-starter is not installed")
    names = Vocabulary(vocabulary.SPECIES)
    for class_id, species in enumerate(vocabulary.SPECIES):
        for number in (1, 2, 3, 4, "1", "3"):
            for style in (None, "3d"):
                for place in (None, "meadow"):
                    text = vocabulary.caption(species, number, style, place)
                    (request,) = read_prompt(text, names)
                    assert (request.class_id, request.count) == (class_id, int(number)), text


def test_a_pair_is_one_object_of_what_is_called_a_pair() -> None:
    vocabulary = Vocabulary(("skis", "scissors", "ski", "wine glass"))
    for prompt, counts in (
        ("a pair of skis", {"skis": 1}),
        ("a pair of scissors and two skis", {"scissors": 1, "skis": 2}),
        ("a pair of wine glasses", {"wine glass": 2}),
        ("two pairs of skis", {"skis": None}),
        ("two pair of skis", {"skis": None}),
    ):
        assert read(prompt, vocabulary) == counts, prompt
    assert read("a pair of skis", Vocabulary(("ski",))) == {"ski": 2}


def test_numbers_and_plurals() -> None:
    words = ["0", "17", "1,000", "zero", "nineteen", "twenty", "thirty", "twenty-one", "dog", "a", "3d", "1,00"]
    assert [read_number(w) for w in words] == [0, 17, 1000, 0, 19, 20, *[None] * 6]
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
    assert read_prompt("two people, a dog and three traffic lights", Vocabulary(DETR_NAMES))[2].class_id == 10
