"""A run opened from its folder: the same as what training returned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alignprop_core as ap
from alignprop_core.errors import OutputError
from alignprop_core.evaluation.table import EvaluationTable
from tests.support.toy_rewards import registry


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ap.Run:
    """A run with evaluations along the way and at the end, on a base model with a LoRA of its own."""
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {
        "model": str(tiny_model),
        "sampling": {"steps": 2, "guidance_scale": 2.0},
        "optimizer": {"learning_rate": 0.1},
        "lora": {"rank": 2},
        "registry": registry(),
    }
    training = {"steps": 2, "batch_size": 2, "device": "cpu"}
    own = ap.train(
        prompts=["a hill"],
        rewards=lambda images: images.std((1, 2, 3)),
        output=folder / "own",
        training=training,
        previews={"prompts": []},
        **common,
    )
    model = {"base": str(tiny_model), "loras": [{"path": str(own.lora), "strength": 0.5}]}
    prompts = {"train": ["a fox", "two owls"], "heldout": ["a boat", "a hill"]}
    evaluation = {"every": 1, "images_per_prompt": 2}
    return ap.train(
        rewards="redness",
        prompts=prompts,
        evaluation=evaluation,
        output=folder / "run",
        training=training,
        **common | {"model": model},
    )


def image(images: list[Any]) -> Any:
    return np.asarray(images[0]).astype(int)


def test_an_opened_run_is_what_training_returned(run: ap.Run) -> None:
    opened = ap.Run(str(run))
    assert [row["step"] for row in opened.metrics] == [1, 2]
    assert opened.metrics == run.metrics
    assert [row["step"] for row in opened.evaluations] == [0, 1, 2]
    assert {"total", "scores", "drift", "diversity"} <= set(opened.evaluations[0])
    assert opened.config == run.config
    assert opened.lora == run.folder / "lora" / "pytorch_lora_weights.safetensors"
    assert opened.lora.is_file()
    assert opened.report == run.folder / "report.html"
    for options in ({}, {"lora": False}, {"strength": 0.5}):
        assert (image(opened.sample(["a cat"], **options)) == image(run.sample(["a cat"], **options))).all()


def test_sample_uses_a_seed_per_prompt_the_strength_and_the_models_own_loras(run: ap.Run, tiny_model: Path) -> None:
    both = run.sample(["a cat", "a dog"], seed=3)
    assert (image(both[1:]) == image(run.sample("a dog", seed=3))).all()
    assert (image(both) != image(run.sample("a cat", seed=4))).any()
    base = image(run.sample("a cat", lora=False))
    assert (base == image(run.sample("a cat", strength=0.0))).all()
    changes = [abs(image(run.sample("a cat", strength=s)) - base).sum() for s in (0.5, 1.0)]
    assert 0 < changes[0] < changes[1]
    plain = ap.Sampler.load(str(tiny_model), sampling=run.config.sampling, registry=registry())
    assert (image(plain(["a cat"], seed=0, output="pil")) != base).any(), "the base model has a LoRA"
    sampler = ap.Sampler.load(
        str(tiny_model), sampling=run.config.sampling, frozen=run.config.model.loras, lora=run, registry=registry()
    )
    assert abs(image(sampler(["a cat"], seed=0, output="pil")) - image(run.sample("a cat"))).max() <= 1


def test_pipeline_is_plain_diffusers_with_the_lora(run: ap.Run) -> None:
    def plain(pipeline: Any) -> Any:
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(0)}
        return image(pipeline("a cat", **options).images)

    pipeline = run.pipeline()
    assert pipeline is not run.pipeline()
    assert pipeline.get_list_adapters() == {"unet": ["frozen_0", "alignprop"]}
    assert abs(plain(pipeline) - image(run.sample("a cat"))).max() <= 1
    assert abs(plain(run.pipeline(lora=False)) - image(run.sample("a cat", lora=False))).max() <= 1


def test_a_run_is_the_path_of_its_folder(run: ap.Run) -> None:
    assert (run / "lora").is_dir()
    assert os.fspath(run) == str(run) == str(run.folder)
    assert Path(run) == run.folder
    assert run.name == "run"
    assert repr(run) == f"Run({str(run.folder)!r})"


def test_the_evaluation_is_a_table(run: ap.Run) -> None:
    table = run.evaluation
    assert table is not None
    assert table.columns == ["measure", "base", "tuned", "difference", "change", "95% interval"]
    assert [row[0] for row in table.rows] == ["redness", "red_share", "diversity", "drift"]
    numbers = table["redness"]["tuned"]
    assert numbers["difference"] == pytest.approx(numbers["mean"] - table["redness"]["base"]["mean"])
    lines = str(table).splitlines()
    assert len(lines) == 6
    assert lines[5].startswith(f"{table.results['images']} images of 2 prompts; 95% intervals are clustered by prompt.")
    assert "Warning: fewer than 5 prompts" in lines[5]
    assert lines[5] == table.note
    assert lines[1].split()[:3] == ["redness", f"{table['redness']['base']['mean']:.5g}", f"{numbers['mean']:.5g}"]
    assert repr(table) == str(table)
    assert table._repr_html_().count("<tr>") == 5
    assert table.note in table._repr_html_()


def test_a_table_of_one_model_has_its_spread_and_text_is_escaped() -> None:
    table = EvaluationTable({"images": 2, "model": {"<b>": {"mean": 1.5, "std": 0.25}}})
    assert table.columns == ["measure", "model", "std"]
    assert table.rows == [["<b>", "1.5", "0.25"]]
    assert "&lt;b&gt;" in table._repr_html_()


def test_the_note_of_a_table_counts_prompts_and_warns_only_of_few() -> None:
    score = {"redness": {"mean": 1.0, "std": 0.5, "difference": 0.5, "interval": [0.1, 0.9]}}
    results = {"images": 60, "images_per_prompt": 2, "base": score, "tuned": score}
    clustered = "60 images of 30 prompts; 95% intervals are clustered by prompt."
    assert EvaluationTable({**results, "prompt_count": 30}).note == clustered
    assert EvaluationTable(results).note == "60 images of 30 prompts.", "an earlier version's intervals were not"


def test_in_a_notebook_a_run_shows_the_sheet_the_table_and_the_lora(run: ap.Run) -> None:
    page = run._repr_html_()
    assert '<img alt="before_after" src="data:image/jpeg;base64,' in page
    assert "<td>redness</td>" in page
    assert str(run.lora) in page


def test_without_an_evaluation_the_newest_preview_is_shown(run: ap.Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run.folder, tmp_path / "copy")
    (tmp_path / "copy" / "evaluation.json").unlink()
    (tmp_path / "copy" / "images" / "before_after.png").unlink()
    copy = ap.Run(tmp_path / "copy")
    assert copy.evaluation is None
    assert '<img alt="step-000002"' in copy._repr_html_()
    assert "<table>" not in copy._repr_html_()
    assert copy.sample("a cat"), "a moved run works"


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no config\.yaml"):
        ap.Run(tmp_path)


def test_opening_a_run_imports_no_torch(run: ap.Run) -> None:
    code = f"import sys, alignprop_core as ap; run = ap.Run({str(run)!r}); run.metrics, run.evaluation, run.config"
    assert (
        subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False).returncode == 0
    )


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alignprop_core", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "--overwrite" in done.stdout


@pytest.mark.parametrize("names", [{"alignprop_core", "alignprop"}])
def test_the_public_names_are_exported(names: set[str]) -> None:
    import importlib

    wanted = (
        "train Run Sampler Trainer Callback StepStats Reward RewardConfig RewardSpec ImageBatch RunConfig load_config"
    )
    wanted += " load_prompts Registry default_registry hookimpl"
    for name in names:
        module = importlib.import_module(name)
        assert set(wanted.split()) <= set(module.__all__)
        assert all(getattr(module, public) is not None for public in wanted.split())


def test_detached_pipelines_are_plain_again(tiny_sd: Callable[..., Any]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from alignprop_core.lora import adapters
    from alignprop_core.lora.swapping import detach

    unet = tiny_sd().unet
    names = [name for name, _ in unet.named_modules()]
    adapters.attach(unet, rank=2)
    detach(unet)
    assert [name for name, _ in unet.named_modules()] == names
    assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())
    assert not hasattr(unet, "peft_config")
    adapters.attach(unet, rank=3)
    assert all(parameter.shape[0] == 3 or parameter.shape[1] == 3 for parameter in adapters.parameters(unet))
