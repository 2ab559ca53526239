"""`ap.train`: everything a run config says, as keywords; functions, objects and loaded pipelines; the same messages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import alignprop_core as ap
from alignprop_core.cli import run as command
from alignprop_core.config.model import SamplingConfig
from alignprop_core.errors import ModelError, OutputError, PluginError, UserError
from alignprop_core.lora.layers import adapter_names
from alignprop_core.validation import InvalidConfig
from tests.support.toy_rewards import NoGradient, Redness, RednessConfig, registry
from tests.support.toy_runs import adapters

SHORT: dict[str, Any] = {
    "sampling": {"steps": 2, "guidance_scale": 1.0},
    "training": {"steps": 1, "batch_size": 2, "device": "cpu"},
    "optimizer": {"learning_rate": 0.1},
    "lora": {"rank": 2},
    "previews": {"prompts": []},
}


def reddish(images: Tensor, prompts: list[str]) -> Tensor:
    """Red images."""
    assert all(isinstance(prompt, str) for prompt in prompts)
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def scored(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
    return images.mean((1, 2, 3)) * torch.tensor([float(entry["gain"]) for entry in metadata]), {"about": prompts}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(tiny_model: Path) -> Callable[..., ap.Run]:
    """Train one step of a tiny model; keyword arguments are those of `ap.train`."""

    def call(config: Any = None, **given: Any) -> ap.Run:
        sections = {"model": str(tiny_model), "prompts": ["a fox", "two owls"], "rewards": reddish, **SHORT}
        return ap.train(config, registry=registry(), **(sections | given if config is None else given))

    return call


def weights(run: ap.Run) -> list[Any]:
    return [tensor.tolist() for tensor in adapters(run.folder).values()]


# -- sections ---------------------------------------------------------------------------------------------------------


def test_keywords_a_dict_a_file_and_a_config_train_the_same(
    train: Callable[..., ap.Run], tiny_model: Path, folder: Path
) -> None:
    data = {
        "model": {"base": str(tiny_model)},
        "prompts": {"train": ["a fox", "two owls"]},
        "rewards": [{"name": "redness"}],
        **SHORT,
    }
    first = train(rewards="redness", output="keywords")
    (folder / "run.yaml").write_text(yaml.safe_dump(data | {"output": "file"}))
    others = [
        train(data | {"output": "dict"}),
        train("run.yaml"),
        train(first.config, output="config"),
        train("run.yaml", output=folder / "over", sampling=SamplingConfig(steps=2)),
        train({**data, "training": {"steps": 9, "batch_size": 2}}, training=SHORT["training"], output="merged"),
    ]
    assert [run.name for run in others] == ["dict", "file", "config", "over", "merged"]
    assert all(weights(run) == weights(first) for run in others)
    assert others[3].config.sampling.guidance_scale == 1.0, "a section replaces key by key"
    assert ap.Trainer(data | {"output": "trainer"}, registry=registry()).config == first.config.model_copy(
        update={"output": str(folder / "trainer")}
    )


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"training": {"stesp": 3}}, "training.stesp: unknown key. Did you mean training.steps?"),
    ({"training": {"steps": "3"}}, "training.steps: must be a whole number, not the text"),
    ({"training": {"num_steps": 3}}, "training.num_steps: unknown key. In alignprop this is training.steps."),
    ({"training": 3}, "training: must be a mapping (key: value), not 3."),
    ({"sampling": {"num_inference_steps": 3}}, "sampling.num_inference_steps: unknown key. In alignprop this is"),
    ({"rewards": [{"name": "redness", "weight": "x"}]}, "rewards.0.weight: must be a number"),
    ({"rewards": [{"name": "redness", "reward": 1}]}, "rewards.0.reward: unknown key. In alignprop this is name."),
    ({"rewards": [{"name": "rednes"}]}, 'rewards.0.name: No installed plugin offers the reward "rednes". Did you'),
    ({"rewards": [{"name": "redness", "options": {"gian": 1}}]}, "rewards.0.options.gian: unknown key. Did you mean"),
    ({"rewards": [{"name": "redness"}, {"name": "redness"}]}, 'rewards.1.label: "redness" is used by rewards.0'),
    ({"rewards": [{"name": "./no.py:f"}]}, "rewards.0.name: "),
    ({"rewards": [{"name": "red_share"}]}, 'rewards.0.name: "red_share" gives no gradient to train on'),
    ({"model": {"base": "./nothing"}}, "model.base: "),
    ({"prompts": {"train": "nothing.txt"}}, "prompts.train: "),
    ({"prompts": {"train": []}}, "prompts.train: must be text or a list with at least 1 entry, not an empty list."),
    ({"prompts": {"train": ["a", {"text": "b"}]}}, 'prompts.train.1: the key "prompt" is missing. Rename "text"'),
    ({"backprop": {"strategy": "last_k", "k": 9}}, "backprop.k: is 9, but sampling.steps is only 2"),
    ({"output": "taken"}, "output: "),
]


@pytest.mark.parametrize(("sections", "message"), MISTAKES, ids=[message.partition(":")[0] for _, message in MISTAKES])
def test_a_mistake_has_the_message_of_the_command_line(
    train: Callable[..., ap.Run],
    tiny_model: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("alignprop_core.registry.registry.default_registry", registry)
    (folder / "taken").mkdir()
    (folder / "taken" / "file").touch()
    data = {"model": {"base": str(tiny_model)}, "prompts": {"train": ["a fox"]}, "rewards": [{"name": "redness"}]}
    data = data | SHORT | {"output": "run"} | sections
    with pytest.raises(UserError) as caught:
        train(**data)
    assert str(caught.value).startswith(message)
    (folder / "run.yaml").write_text(yaml.safe_dump(data))
    assert command(["train", "run.yaml"]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: run.yaml:")
    assert printed.removeprefix("error: run.yaml:").partition(": ")[2] == str(caught.value)
    with pytest.raises(UserError) as over_a_file:
        train("run.yaml", **sections)
    assert "(from Python)" in str(over_a_file.value)
    assert str(over_a_file.value).endswith(str(caught.value).partition(": ")[2])


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_functions_classes_objects_names_and_entries_are_rewards(train: Callable[..., ap.Run]) -> None:
    run = train(
        rewards=[
            {"name": scored, "weight": 0.25},
            lambda images: images.mean((1, 2, 3)),
            {"name": reddish, "weight": 0.5, "ceiling": 0.9, "label": "again"},
            {"name": Redness, "options": {"gain": 2.0}, "label": "built"},
            {"name": Redness(RednessConfig(gain=3.0)), "label": "object"},
            "redness",
        ],
        evaluation={
            "rewards": [{"name": NoGradient(), "label": "flat"}, lambda images: images.detach().mean((1, 2, 3))],
            "images_per_prompt": 1,
        },
        prompts={"train": [{"prompt": "a fox", "gain": 2}], "heldout": [("an owl", {"gain": 1})]},
    )
    (row,) = run.metrics
    assert list(row["terms"]) == ["scored", "reward_2", "again", "built", "object", "redness"]
    raw = {label: term["raw"] for label, term in row["terms"].items()}
    assert raw["built"] == pytest.approx(2 * raw["redness"], rel=1e-5)
    assert raw["object"] == pytest.approx(3 * raw["redness"], rel=1e-5)
    assert raw["scored"] == pytest.approx(2 * raw["reward_2"], rel=1e-5)
    assert run.evaluation is not None
    assert {"flat", "reward_2_2", "red_share"} <= set(run.evaluation.results["tuned"])
    local = json.loads((run / "environment.json").read_text())["local_rewards"]
    assert local["scored"]["function"] == "scored"
    assert local["built"]["class"] == "Redness"
    assert run.config.rewards[2].ceiling == 0.9


def test_a_run_is_resumed_or_replaced(train: Callable[..., ap.Run]) -> None:
    run = train()
    with pytest.raises(UserError, match="overwrite replaces a run, and resume continues it"):
        train(resume=run, overwrite=True)
    assert len(train(resume=run, training={"steps": 3, "batch_size": 2}).metrics) == 3


def test_a_mapping_of_rewards_is_added_to_the_config(train: Callable[..., ap.Run], folder: Path) -> None:
    run = train(rewards={"mine": reddish, "kind": Redness})
    assert list(run.metrics[0]["terms"]) == ["mine", "kind"]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([reddish, lambda: 0], "rewards.1: the function takes (); it must take (images), (images, prompts) or"),
        ([int], "rewards.0: must be a function, or a class or object of alignprop_core.Reward, not the class int."),
        ([3], "rewards.0: must be a mapping (key: value), not 3."),
        ([], "rewards: must be a list with at least 1 entry, not an empty list."),
        ([{"name": reddish, "label": "Red"}], "rewards.0: names are snake_case"),
        ([{"name": reddish, "weight": 0.0}], "rewards.0.weight: "),
        ([{"name": NoGradient(), "label": "flat"}], 'rewards.0.name: Reward "flat" returned scores without a gradient'),
    ],
)
def test_what_is_wrong_with_a_reward_has_its_key(
    train: Callable[..., ap.Run], rewards: list[Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        train(rewards=rewards)
    assert str(caught.value).startswith(message)


def test_a_function_named_as_a_plugins_reward_needs_a_label(train: Callable[..., ap.Run]) -> None:
    def not_a_number(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    with pytest.raises(PluginError, match=r'^rewards\.0: toy-rewards offers .* give it a label: .*"my_not_a_number"'):
        train(rewards=not_a_number)
    assert list(train(rewards={"name": not_a_number, "label": "mine"}).metrics[0]["terms"]) == ["mine"]


def test_an_edited_function_is_noticed_on_resume(train: Callable[..., ap.Run]) -> None:
    def typed(factor: float) -> Any:
        names: dict[str, Any] = {"__name__": "notebook"}
        exec(f"def bright(images):\n    return {factor} * images.mean((1, 2, 3))\n", names)
        return names["bright"]

    run = train(rewards=typed(1.0))
    longer = {"training": {"steps": 2}, "resume": run, "registry": registry()}
    with pytest.raises(PluginError, match=r'^--resume: rewards\.0: the function "bright" was changed since'):
        ap.train(rewards=typed(2.0), **longer)
    again = ap.train(rewards=typed(1.0), **longer)
    assert again.folder == run.folder
    assert [row["step"] for row in again.metrics] == [1, 2]
    ap.train(rewards=typed(2.0), edited=True, **longer | {"training": {"steps": 3}})
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.name: .*\(function bright of module notebook\)"):
        ap.train(run / "config.yaml", registry=registry(), output="new")


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_function_is_drawn_from_the_seed_and_global_random_state_stays(train: Callable[..., ap.Run]) -> None:
    def prompt_fn() -> tuple[Any, dict[str, Any]]:
        return np.random.choice(["cat", "dog", "frog", "duck"]), {"n": np.int64(random.randrange(100))}

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    runs = [train(prompts=prompt_fn, training=SHORT["training"] | {"steps": 4, "seed": seed}) for seed in (0, 0, 1)]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    drawn = [run.config.prompts.train for run in runs]
    assert len(drawn[0]) == 8, "one per training image"
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(type(entry["prompt"]) is str and type(entry["n"]) is int for entry in drawn[0])
    assert yaml.safe_load((runs[0] / "config.yaml").read_text())["prompts"]["train"] == drawn[0]
    longer = train(prompts=prompt_fn, training=SHORT["training"] | {"steps": 5, "seed": 0}, resume=runs[0])
    assert longer.config.prompts.train == drawn[0], "a resumed run keeps its prompts"
    assert longer.folder == runs[0].folder
    more = train(prompts=prompt_fn, training={"steps": 6}, resume="latest", output=longer)
    assert more.config.prompts.train == drawn[0]
    assert len(more.metrics) == 6


# -- output -----------------------------------------------------------------------------------------------------------


def test_without_output_a_numbered_folder_is_printed(
    train: Callable[..., ap.Run], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs" / "reddish-brightness-009").mkdir(parents=True)
    assert [train().name, train().name] == ["reddish-001", "reddish-002"]
    assert capsys.readouterr().out.splitlines() == ["Run folder: runs/reddish-001", "Run folder: runs/reddish-002"]


def test_overwrite_replaces_a_run_and_nothing_else(train: Callable[..., ap.Run], folder: Path) -> None:
    run = train(output="run")
    with pytest.raises(OutputError, match="exists already"):
        train(output="run")
    (run / "notes.txt").write_text("kept")
    assert len(train(output="run", overwrite=True).metrics) == 1
    assert (run / "notes.txt").read_text() == "kept"
    (folder / "mine").mkdir()
    (folder / "mine" / "file").touch()
    with pytest.raises(OutputError):
        train(output="mine", overwrite=True)


# -- a loaded pipeline ------------------------------------------------------------------------------------------------


def image(pipeline: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "generator": generator}
    return np.asarray(pipeline("a cat", **options).images[0]).astype(int)


def sampled(run: ap.Run, **options: Any) -> Any:
    return np.asarray(run.sample(["a cat"], **options)[0]).astype(int)


def test_a_pipeline_is_trained_again_and_each_run_keeps_its_result(
    train: Callable[..., ap.Run], tiny_sd: Callable[..., Any]
) -> None:
    pipeline = tiny_sd()
    base = image(pipeline)
    first = train(model=pipeline)
    assert first.config.model.base == "pipeline:StableDiffusionPipeline"
    assert abs(image(pipeline) - sampled(first)).max() <= 1, "the pipeline carries the trained adapter"
    tuned = sampled(first)
    assert abs(tuned - base).max() > 1
    assert abs(sampled(first, lora=False) - base).max() <= 1
    assert abs(sampled(first, strength=0.0) - base).max() <= 1
    second = train(model=pipeline, rewards=lambda images: -images.mean((1, 2, 3)))
    assert abs(sampled(second) - image(pipeline)).max() <= 1
    assert abs(sampled(second) - tuned).max() > 1
    assert abs(sampled(first) - tuned).max() == 0, "whatever was trained since"
    assert adapter_names(pipeline.unet) == {"alignprop"}
    assert first.pipeline() is pipeline
    assert abs(image(pipeline) - tuned).max() <= 1
    assert abs(image(first.pipeline(lora=False)) - base).max() == 0
    assert not adapter_names(pipeline.unet)
    assert train(model=pipeline).metrics[0]["total"] == pytest.approx(first.metrics[0]["total"], abs=1e-6)


def wrapped(pipeline: Any) -> None:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.vae.decoder = torch.compile(pipeline.vae.decoder, backend="eager")


def in_place(pipeline: Any) -> None:
    pipeline.unet.compile(backend="eager")


@pytest.mark.parametrize("compiled", [wrapped, pytest.param(in_place, marks=pytest.mark.slow)])
def test_a_compiled_pipeline_trains_with_equal_values(
    train: Callable[..., ap.Run], tiny_sd: Callable[..., Any], compiled: Callable[[Any], None]
) -> None:
    plain, pipeline = train(model=tiny_sd()), tiny_sd()
    compiled(pipeline)
    run = train(model=pipeline)
    ours, expected = adapters(run.folder), adapters(plain.folder)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert abs(image(run.pipeline()) - sampled(plain)).max() <= 1


def test_a_lora_that_the_pipeline_had_stays_active_at_its_strength(
    train: Callable[..., ap.Run], tiny_sd: Callable[..., Any]
) -> None:
    earlier = train(model=tiny_sd())
    pipeline = tiny_sd()
    pipeline.load_lora_weights(earlier.lora.parent, weight_name=earlier.lora.name, adapter_name="mine")
    pipeline.set_adapters(["mine"], [0.7])
    base = image(pipeline)
    run = train(model=pipeline, rewards=lambda images: -images.mean((1, 2, 3)))
    tuned = sampled(run)
    assert abs(tuned - base).max() > 1
    assert abs(image(run.pipeline()) - tuned).max() <= 1
    assert pipeline.get_active_adapters() == ["mine", "alignprop"]
    assert abs(image(run.pipeline(lora=False)) - base).max() == 0


def test_a_score_without_a_gradient_is_reported_and_changes_nothing(train: Callable[..., ap.Run]) -> None:
    run = train(rewards=lambda images: (255 * images).round().mean((1, 2, 3)))
    assert "the gradient of every score is 0" in run.metrics[0]["idle"]
    assert (sampled(run) == sampled(run, lora=False)).all()


def test_a_run_on_a_nameless_pipeline_says_what_to_do_elsewhere(
    train: Callable[..., ap.Run], tiny_sd: Callable[..., Any], capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    run = train(model=tiny_sd(), rewards="redness", prompts={"train": ["a"], "heldout": ["b"]})
    for call in (ap.Run(run).sample, lambda prompts: ap.Run(run).pipeline()):
        with pytest.raises(ModelError, match=r"^model\.base: the base model was a StableDiffusionPipeline passed from"):
            call("a cat")
    assert (sampled(ap.Run(run, model=tiny_sd())) == sampled(run)).all()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("pipeline:StableDiffusionPipeline", str(tiny_model)))
    assert ap.Run(run).sample("a cat")


def test_a_pipeline_that_was_loaded_by_name_is_recorded_by_name(train: Callable[..., ap.Run], tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    run = train(model=pipeline)
    assert run.config.model.base == str(tiny_model)
    assert (sampled(ap.Run(run)) == sampled(run)).all()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"mixed_precision": "bf16", "device": "cpu"}},
            r"^training\.mixed_precision: is bf16, but .* to no",
        ),
        ({"model_vae": "./vae"}, r"^model\.vae: cannot be combined with a loaded pipeline"),
    ],
)
def test_what_does_not_go_with_a_pipeline_is_refused(
    train: Callable[..., ap.Run], tiny_sd: Callable[..., Any], sections: dict[str, Any], message: str
) -> None:
    sections = dict(sections)
    vae = sections.pop("model_vae", None)
    with pytest.raises(ModelError, match=message):
        train(model={"base": tiny_sd(), "vae": vae}, **sections)
