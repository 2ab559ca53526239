"""What the plugin registers: the model, prompt sets that match their metadata, and the judge as a measure."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from alignprop_core.config.load import load_config
from alignprop_core.errors import ConfigError, PromptError
from alignprop_core.prompts import load_prompts
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_starter import alignprop_register_prompts, model_folder
from alignprop_starter.reward import request_of
from alignprop_starter.scenes import render_scenes
from alignprop_starter.vocabulary import BACKGROUNDS, HELDOUT_ANIMALS, TRAIN_ANIMALS, Request, read_caption

SETS = [spec.name for spec in alignprop_register_prompts()]


def test_hooks_import_no_torch() -> None:
    code = "import sys, alignprop_starter, alignprop_starter.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_folder_is_a_diffusers_pipeline() -> None:
    assert (model_folder() / "model_index.json").is_file()


@pytest.mark.parametrize("name", SETS)
def test_prompts_match_their_metadata(name: str) -> None:
    registry = default_registry()
    prompts = load_prompts(name, registry)
    assert len(prompts) == registry.prompt_set(name).spec.size
    for prompt, metadata in zip(prompts.prompts, prompts.metadata, strict=True):
        seen = read_caption(prompt)
        assert seen == request_of("", metadata), prompt
    animals = HELDOUT_ANIMALS if "eval_" in name else TRAIN_ANIMALS
    shown = tuple(metadata["animal"] for metadata in prompts.metadata)
    assert shown == animals * (len(shown) // len(animals))
    assert len(set(prompts.prompts)) == len(prompts)


def test_the_held_out_scenes_are_enough_prompts_for_an_interval() -> None:
    metadata = load_prompts("starter/eval_animal_scenes", default_registry()).metadata
    assert len(metadata) >= 30
    assert [sum(m["number"] == number for m in metadata) for number in (1, 2, 3, 4)] == [9] * 4
    assert {m["background"] for m in metadata} == set(BACKGROUNDS)


def test_training_scenes_ask_for_every_number_and_place() -> None:
    metadata = load_prompts("starter/animal_scenes", default_registry()).metadata
    counts = [sum(m["number"] == number for m in metadata) for number in (1, 2, 3, 4)]
    assert max(counts) - min(counts) <= 3
    assert {m["background"] for m in metadata} == set(BACKGROUNDS)


def test_full_prompts_use_all_numbers_styles_and_places() -> None:
    metadata = load_prompts("starter/simple_animals_full", default_registry()).metadata
    assert {m["number"] for m in metadata} == {1, 2, 3, 4}
    assert len({m["style"] for m in metadata}) == 3
    assert len({m["background"] for m in metadata}) == 8


def test_scene_accuracy_is_one_for_the_right_caption_and_zero_for_a_wrong_one() -> None:
    scenes = render_scenes(32, seed=5)
    registry = default_registry()
    right = scenes.captions()
    for attribute in ("species", "number", "style", "background", "all"):
        reward = registry.load_reward("scene_accuracy", {"attribute": attribute})
        scores = reward(ImageBatch(images=scenes.images, prompts=right))
        assert scores.shape == (32,)
        assert scores.mean() >= 0.9, attribute
    reward = registry.load_reward("scene_accuracy", {"attribute": "species"})
    wrong = ["a cat" if read_caption(caption).species != "cat" else "a dog" for caption in right]
    assert reward(ImageBatch(images=scenes.images, prompts=wrong)).mean() <= 0.1
    open_request = reward(ImageBatch(images=scenes.images, prompts=["in the snow"] * 32))
    assert torch.equal(open_request, torch.ones(32)), "attributes that the prompt does not name count as correct"


@pytest.mark.parametrize("attribute", ["species", "all"])
@pytest.mark.parametrize(
    ("prompt", "metadata", "message"),
    [
        ("a unicorn", {}, r'The prompt "a unicorn" names no animal .* It knows 51: cat, dog'),
        ("two red foxxes in the snow", {}, r'names no animal .* Did you mean "fox"\? Name one'),
        ("a hipopotamus", {}, r'Did you mean "hippopotamus"'),
        ("a fox", {"animal": "lyon"}, r"""metadata key "animal" of "a fox" is 'lyon'.* Did you mean "lion"\?"""),
    ],
)
def test_an_unknown_animal_is_refused(attribute: str, prompt: str, metadata: dict[str, object], message: str) -> None:
    reward = default_registry().load_reward("scene_accuracy", {"attribute": attribute})
    with pytest.raises(PromptError, match=message):
        reward.check_prompt(prompt, metadata)  # a run checks prompts before it loads the model
    with pytest.raises(PromptError, match=message):
        reward(ImageBatch(images=torch.rand(1, 3, 128, 128), prompts=(prompt,), metadata=(metadata,)))


def test_attributes_that_a_prompt_does_not_name_are_accepted() -> None:
    for attribute in ("species", "all"):
        reward = default_registry().load_reward("scene_accuracy", {"attribute": attribute})
        for prompt in ("", "in the snow", "a 3d animal at night", "two flat", "a purple fox"):
            reward.check_prompt(prompt, {})
        reward.check_prompt("a unicorn", {"animal": "goat"})
    default_registry().load_reward("scene_accuracy", {"attribute": "number"}).check_prompt("a unicorn", {})
    style = default_registry().load_reward("scene_accuracy", {"attribute": "style"})
    with pytest.raises(PromptError, match=r"'oil', which the judge .* It knows 3: 3d, flat, noto\."):
        style.check_prompt("a fox", {"style": "oil"})


def test_metadata_take_precedence_over_words() -> None:
    assert request_of("three foxes", {"animal": "cat"}) == Request("cat", 3, None, None)


def test_unknown_attribute_is_named() -> None:
    with pytest.raises(ConfigError, match="attribute"):
        default_registry().reward_options("scene_accuracy", {"attribute": "colour"})


def test_demo_config_is_valid() -> None:
    from alignprop_starter import alignprop_register_models

    (spec,) = alignprop_register_models()
    package, _, file = spec.demo.partition(":")
    config = load_config(model_folder().parent / file, ["output=demo"])
    assert package == "alignprop_starter"
    assert config.prompts.heldout == "starter/eval_animal_scenes"
