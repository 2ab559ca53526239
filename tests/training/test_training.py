"""The training loop: rewards rise, a resumed run equals the uninterrupted one, errors keep what was saved."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import AlignpropError, ConfigError, OutputError, PluginError, RewardError, RunError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.lora import adapters as lora
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import RewardSpec, WeightsFile
from alignprop_core.training.folder import environment
from alignprop_core.training.step import choose_prompts
from alignprop_core.training.trainer import Trainer
from tests.support.processes import train_in_processes
from tests.support.toy_rewards import Crashes, alignprop_register_rewards, registry
from tests.support.toy_runs import Interrupt, adapters, changed, metrics, toy_data


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    base = toy_data(model, tmp_path, sampling={"steps": 2, "guidance_scale": 2.0})
    return lambda **overrides: changed(base, overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Trainer(config, registry=registry(), **options).train()


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["uniform", "last_k", "full", "drtune", "refl"])
def test_reward_rises_on_held_out_noise(make: Callable[..., RunConfig], strategy: str) -> None:
    config = make(backprop__strategy=strategy, sampling__steps=4, training__steps=6, evaluation__at_end=True)
    folder = train(config)
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["tuned"]["redness"]["interval"][0] > 0, result
    assert result["base"]["redness"]["n"] == 8
    assert result["tuned"]["red_share"]["mean"] == pytest.approx(result["tuned"]["redness"]["mean"], abs=1e-6)


def test_ceiling_stops_the_gradient_of_samples_above_it(make: Callable[..., RunConfig]) -> None:
    low = [{"name": "redness", "ceiling": -100.0}]
    folder = train(make(rewards=low, training__steps=2))
    assert all(line["grad_norm"] == 0 for line in metrics(folder))
    assert all(line["terms"]["redness"]["weighted"] == -100.0 for line in metrics(folder))


def test_mix_is_the_weighted_sum_and_every_term_is_logged(make: Callable[..., RunConfig]) -> None:
    terms = [
        {"name": "redness", "weight": 2.0},
        {"name": "redness", "label": "half", "weight": -0.5, "options": {"gain": 3.0}},
    ]
    (first, *_) = metrics(train(make(rewards=terms, training__steps=1)))
    redness, half = first["terms"]["redness"], first["terms"]["half"]
    assert half["raw"] == pytest.approx(3 * redness["raw"])
    assert redness["weighted"] == pytest.approx(2 * redness["raw"])
    assert first["total"] == pytest.approx(redness["weighted"] + half["weighted"], abs=1e-6)
    assert {"step", "grad_norm", "kept_steps", "reward_queries", "seconds", "peak_memory"} <= first.keys()


def test_checkpointing_with_accumulation_gives_the_same_run(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Chunks, and accumulation alone, are in test_mix_training.py."""
    whole = adapters(train(make(training__steps=2)))
    parts = {"training__batch_size": 2, "training__gradient_accumulation_steps": 2}
    options = {"backprop__checkpoint_steps": True, "backprop__checkpoint_decoder": True, **parts}
    other = adapters(train(make(training__steps=2, **options, output=str(tmp_path / "checkpointed"))))
    for name, tensor in whole.items():
        torch.testing.assert_close(other[name], tensor, rtol=2e-3, atol=2e-5)


def test_steps_see_every_prompt_once_before_one_twice() -> None:
    drawn = choose_prompts(5, seed=3, step=9, indices=range(12))
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert choose_prompts(5, seed=3, step=9, indices=[7, 2]) == [drawn[7], drawn[2]]
    assert choose_prompts(5, seed=3, step=10, indices=range(12)) != drawn


# -- the run folder ---------------------------------------------------------------------------------------------------


def test_run_folder_has_the_documented_files(make: Callable[..., RunConfig]) -> None:
    config = make(previews={"every": 2}, save__every=2, training__steps=4, evaluation__at_end=True)
    folder = train(config)
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "evaluation.json",
        "lora/pytorch_lora_weights.safetensors",
        "lora/run.safetensors",
        "lora/run-000002.safetensors",
        "lora/run-000004.safetensors",
        "checkpoints/step-000004/state.json",
        "images/step-000000.png",
        "images/step-000002.png",
        "images/before_after.png",
    ):
        assert (folder / name).is_file(), name
    with Image.open(folder / "images/step-000000.png") as image:
        assert image.size[0] > 4 * 192
    assert json.loads((folder / "environment.json").read_text())["plugins"].keys() == {"toy-rewards"}


def test_the_environment_names_versions_device_and_licenses() -> None:
    spec = RewardSpec(
        name="fox",
        summary="x",
        factory="a.b:C",
        config="a.c:D",
        license="MIT",
        weights=(WeightsFile(file="w.safetensors", license="CC-BY-4.0"),),
    )
    plugin = SimpleNamespace(alignprop_register_rewards=hookimpl(lambda: [spec]))
    data = {"model": {"base": "a/b"}, "prompts": {"train": ["a fox"]}, "rewards": [{"name": "fox"}], "output": "o"}
    known = Registry.from_plugins({"not-installed": plugin})
    found = environment(RunConfig.model_validate(data), known, torch.device("cpu"))
    assert found["versions"]["torch"]
    assert found["versions"]["alignprop-core"]
    assert found["plugins"] == {"not-installed": None}
    assert found["device"]["kind"] in ("cpu", "cuda")
    assert found["licenses"] == {"fox": {"reward": "MIT", "weights": {"w.safetensors": "CC-BY-4.0"}}}
    json.dumps(found)


def test_resolved_config_gives_the_same_run(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    from alignprop_core.config.load import load_config

    first = train(make(training__steps=2))
    again = train(load_config(first / "config.yaml", [f"output={tmp_path / 'again'}"], registry=registry()))
    for name, tensor in adapters(first).items():
        assert torch.equal(adapters(again)[name], tensor)


def test_trained_lora_gives_identical_images_in_plain_diffusers(make: Callable[..., RunConfig], model: Path) -> None:
    trainer = Trainer(make(lora__alpha=2.0, lora__use_rslora=True, training__steps=3), registry=registry())
    folder = trainer.train()
    with torch.no_grad():
        ours = trainer.sampler(["a fox"], generator=torch.Generator().manual_seed(1))
        with lora.disabled(trainer.denoiser):
            base = trainer.sampler(["a fox"], generator=torch.Generator().manual_seed(1))
    assert (ours - base).abs().max() > 1e-3
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    theirs = pipe(
        "a fox", num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(1), output_type="pt"
    ).images
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_existing_run_is_not_overwritten(make: Callable[..., RunConfig]) -> None:
    config = make(training__steps=1)
    folder = train(config)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        train(config)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_that_failed_before_its_first_step_blocks_nothing(make: Callable[..., RunConfig]) -> None:
    config = make(training__steps=1)
    folder = train(config)
    shutil.rmtree(folder / "lora")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("evaluation.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(OutputError, match="not empty"):
        train(config)  # there are metrics of a step
    (folder / "metrics.jsonl").unlink()
    assert (train(config) / "metrics.jsonl").stat().st_size > 0


# -- resume -----------------------------------------------------------------------------------------------------------


def test_resumed_run_is_the_run(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = {"optimizer__schedule": "cosine", "optimizer__warmup_steps": 2, "sampling__eta": 0.4}
    options["training__steps"] = 5
    straight = train(make(**options))
    config = make(**options, output=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    resumed = train(config, resume=tmp_path / "broken")
    expected = adapters(straight)
    for name, tensor in adapters(resumed).items():
        assert torch.equal(tensor, expected[name]), name

    def statistics(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in metrics(folder)]

    assert statistics(resumed) == statistics(straight)


def test_a_resumed_run_keeps_its_start_time_and_records_when_it_resumed(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def times(folder: Path) -> tuple[Any, Any]:
        told = json.loads((folder / "environment.json").read_text())
        return told["started"], told["resumed"]

    def begun(day: object) -> None:
        told = json.loads((folder / "environment.json").read_text())
        (folder / "environment.json").write_text(json.dumps(told | {"started": day}))

    before = datetime.now(UTC).replace(microsecond=0)
    folder = train(make(training__steps=1))
    started, resumed = times(folder)
    assert before <= datetime.fromisoformat(started) <= datetime.now(UTC)
    assert resumed == []
    begun("2026-02-01T10:00:00+02:00")
    train(make(training__steps=2), resume=folder)
    started, once = times(folder)
    assert started == "2026-02-01T10:00:00+02:00"
    assert [before <= datetime.fromisoformat(time) <= datetime.now(UTC) for time in once] == [True]
    checkpoint = folder / "checkpoints" / "step-000002"
    other = train(make(training__steps=3, output=str(tmp_path / "other")), resume=checkpoint)
    assert times(other)[0] == started
    assert times(other)[1][:1] == once
    assert len(times(other)[1]) == 2
    (folder / "environment.json").unlink()
    train(make(training__steps=3), resume=folder)
    assert times(folder)[0] is None, "nobody knows any more"


def test_resume_refuses_another_run(make: Callable[..., RunConfig]) -> None:
    folder = train(make(training__steps=1))
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        train(make(training__steps=2, lora__rank=8), resume=folder)
    train(make(training__steps=2), resume=folder)
    assert [line["step"] for line in metrics(folder)] == [1, 2]


def test_resume_without_a_checkpoint_is_refused(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(AlignpropError, match="nothing to resume"):
        train(make(), resume=tmp_path / "nowhere")


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    one = adapters(train(make(training__steps=2)))
    late = (  # one process checks the folder when the other has long been ready to create it
        "import os, time\n"
        "from alignprop_core.runs.folder import RunFolder\n"
        "check = RunFolder.check_free\n"
        "def late(*arguments, **options):\n"
        "    time.sleep(5 * int(os.environ['RANK']))\n"
        "    check(*arguments, **options)\n"
        "RunFolder.check_free = late\n"
    )
    two = adapters(train_in_processes(make(training__steps=2, output=str(tmp_path / "two")), before=late))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-5)


# -- broken rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch_mean", r'"batch_mean" returned shape \(\) for a batch of 1'),
        ("not_a_number", '"not_a_number" returned a score that is not finite'),
        ("no_gradient", '"no_gradient" returned scores without a gradient'),
        ("python_list", '"python_list" returned list'),
    ],
)
def test_broken_reward_is_named(make: Callable[..., RunConfig], name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        train(make(rewards=[{"name": name}]))


def test_infinite_slope_does_not_reach_the_adapters(make: Callable[..., RunConfig]) -> None:
    trainer = Trainer(make(rewards=[{"name": "nan_gradient"}]), registry=registry())
    before = lora.state(trainer.denoiser)
    with pytest.raises(
        RunError, match=r'the gradient of "nan_gradient" at the images is not\. This step and the 2 before it'
    ):
        trainer.train()
    for name, tensor in lora.state(trainer.denoiser).items():
        assert torch.equal(tensor, before[name])


def test_reward_that_crashes_mid_run_leaves_a_checkpoint(make: Callable[..., RunConfig]) -> None:
    Crashes.calls = 0
    config = make(rewards=[{"name": "crashes"}])
    with pytest.raises(RewardError, match=r'"crashes" raised ZeroDivisionError: the third call'):
        train(config)
    folder = Path(config.output)
    assert len(metrics(folder)) == 2
    assert json.loads((folder / "checkpoints/step-000002/state.json").read_text())["step"] == 2


def test_two_trainers_with_other_settings_in_one_process(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(make(training__steps=1))
    train(make(training__steps=1, training__mixed_precision="bf16", output=str(tmp_path / "bf16")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tensorboard",
            'The tracker "tensorboard" is in the distribution alignprop-trackers, .*pip install alignprop-',
        ),
        ("x", 'No installed plugin offers the callback "x"'),
    ],
)
def test_an_unknown_tracker_is_reported_before_anything_is_written(
    make: Callable[..., RunConfig], name: str, message: str
) -> None:
    """The toy registry has no trackers."""
    config = make(training__trackers=[name])
    with pytest.raises(PluginError, match=rf"training\.trackers\.0: {message}"):
        train(config)
    assert not Path(config.output).exists()


def test_evaluating_while_training_names_its_distribution_before_anything_loads(make: Callable[..., RunConfig]) -> None:
    toys = SimpleNamespace(alignprop_register_rewards=alignprop_register_rewards)
    alone = Registry.from_plugins({"toy-rewards": toys})
    config = make(prompts__heldout=["a fox"], evaluation__every=1, model__base="owner/name")
    missing = "evaluation.every: Evaluation while training is in the distribution alignprop-evaluation, which is not"
    with pytest.raises(PluginError, match=rf"{missing} installed. Install it: pip install alignprop-evaluation"):
        Trainer(config, registry=alone)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu_raises_the_reward(make: Callable[..., RunConfig], precision: str) -> None:
    config = make(
        training__device="cuda", training__mixed_precision=precision, training__steps=20, evaluation__at_end=True
    )
    result = json.loads((train(config) / "evaluation.json").read_text())
    assert result["tuned"]["redness"]["interval"][0] > 0, result


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("place", ["image", "latent"])
def test_a_balanced_mix_with_offload_on_a_gpu_raises_the_reward(
    make: Callable[..., RunConfig], precision: str, place: str
) -> None:
    config = make(
        mix={"combine": "balanced", "balance_at": place, "offload": True},
        training__device="cuda",
        training__mixed_precision=precision,
        training__steps=20,
        evaluation__at_end=True,
    )
    result = json.loads((train(config) / "evaluation.json").read_text())
    assert result["tuned"]["redness"]["interval"][0] > 0, result


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("precision", "syncs"), [("no", 1), ("bf16", 1), ("fp16", 3)])
def test_a_captured_step_waits_for_the_gpu_once(make: Callable[..., RunConfig], precision: str, syncs: int) -> None:
    """The step's statistics are its only transfer to the host."""
    config = make(training__device="cuda", training__mixed_precision=precision, sampling__eta=0.5)
    trainer = Trainer(config, registry=registry())
    trainer.step()
    trainer.step()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.step()
        torch.cuda.set_sync_debug_mode("default")
    waits = [
        str(warning.filename) + ":" + str(warning.lineno) for warning in shown if "synchroniz" in str(warning.message)
    ]
    assert len(waits) <= syncs, waits


@pytest.mark.gpu
def test_a_run_on_a_gpu_predicts_its_costs(make: Callable[..., RunConfig]) -> None:
    folder = train(make(training__device="cuda", training__mixed_precision="bf16"))
    first, second, *_ = metrics(folder)
    assert first["predicted"]["seconds"] > 0
    assert 0.75 < first["predicted"]["peak_memory"] / first["peak_memory"] < 1.25
    assert "predicted" not in second


@pytest.mark.gpu
def test_out_of_memory_names_the_settings_that_help(make: Callable[..., RunConfig]) -> None:
    trainer = Trainer(make(training__device="cuda", training__batch_size=64), registry=registry())
    try:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**23) / total)
        with pytest.raises(RunError, match=r"Out of memory in step 1, with 64 samples.*backprop\.\w+=.* less"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_gpu_gives_the_run_of_the_cpu(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    cpu = metrics(train(make(training__steps=3)))
    gpu = metrics(train(make(training__steps=3, training__device="cuda", output=str(tmp_path / "gpu"))))
    for a, b in zip(cpu, gpu, strict=True):
        assert b["total"] == pytest.approx(a["total"], abs=2e-3)
