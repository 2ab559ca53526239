"""The report: one page that opens offline, shows what a run did, and escapes all text it is given."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import alignprop_report
from alignprop_core import cli
from alignprop_core.config.load import load_config
from alignprop_core.config.yaml import dump_yaml
from alignprop_core.errors import OutputError, RewardError
from alignprop_core.evaluation.sheet import grid, save_image
from alignprop_core.hookspecs import hookimpl
from alignprop_core.mix.stats import StepStats
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig, RewardSpec
from alignprop_core.testing import tiny_pipeline
from alignprop_core.training.callback import Callback
from alignprop_core.training.trainer import Trainer
from alignprop_report.chart import BUCKETS, Chart, Line, draw
from alignprop_report.comparison_page import names_of, several_page
from alignprop_report.markup import element
from alignprop_report.run_files import read_run
from alignprop_report.run_page import run_page, write_page
from alignprop_report.sheets import open_sheet
from alignprop_report.sweep_plot import write_plots

EVIL = "<script>alert(1)</script> \"two\" 'owls' & </title></style>-->"
VOID = {"meta", "img", "br"}
LOADS = {"src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href"}


class Page(HTMLParser):
    """A page as a browser's parser sees it; one that is not well-formed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # the innermost element and its text
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for name, text in self.texts if name != "style").split())

    @property
    def alts(self) -> list[str]:
        return [image["alt"] for image in self.all("img")]

    @property
    def charts(self) -> dict[str, str]:
        """Title of each chart -> what it says of its lines."""
        told = [svg["aria-label"] for svg in self.all("svg") if "aria-label" in svg]
        return {label.partition(". ")[0]: label for label in told}


class Options(RewardConfig):
    """No options."""


class Redness(Reward):
    """Mean of red minus half of green and blue."""

    Config = Options

    def score(self, batch: ImageBatch) -> Tensor:
        red, green, blue = batch.images.mean((2, 3)).unbind(1)
        return red - (green + blue) / 2


class RedShare(Redness):
    """The same as a measure, without a gradient."""

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch)


class Crashes(Redness):
    """Raises at its third batch; the trial before a run, of one image, does not count."""

    calls = 0

    def score(self, batch: ImageBatch) -> Tensor:
        type(self).calls += len(batch) > 1
        if type(self).calls > 2:
            raise ZeroDivisionError("the third call is one too many")
        return super().score(batch)


sys.modules["report_toys"] = sys.modules[__name__]  # pytest's own name for this module is not an identifier


class Plugin:
    """Rewards of a plugin."""

    @hookimpl
    def alignprop_register_rewards(self) -> list[RewardSpec]:
        measures = {"redness": "red_share"}
        return [
            RewardSpec(
                name=name,
                summary="For tests.",
                factory=f"report_toys:{kind.__name__}",
                config="report_toys:Options",
                differentiable=kind is not RedShare,
                evaluate_with=measures.get(name, ()),
            )
            for name, kind in {"redness": Redness, "red_share": RedShare, "crashes": Crashes}.items()
        ]


def registry() -> Registry:
    evaluation = pytest.importorskip("alignprop_evaluation", reason="alignprop-evaluation is not installed")
    plugins = {"alignprop-report": alignprop_report, "alignprop-evaluation": evaluation}
    return Registry.from_plugins({"toys": Plugin(), **plugins})


class Shade(Redness):
    """Dark images."""

    def score(self, batch: ImageBatch) -> Tensor:
        shade: Tensor = -(batch.images**2).flatten(1).mean(1)
        return shade


def trainer(model: Path, folder: Path, **overrides: object) -> Trainer:
    """A trainer on redness and shade that shows and evaluates at every step."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{EVIL}\ntwo owls\n")
    data = {
        "model": {"base": str(model)},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "sampling": {"steps": 2, "guidance_scale": 2.0, "scheduler": "DPM++ 2M Karras"},
        "rewards": [{"name": "redness", "ceiling": 5.0}, {"name": "shade", "weight": 0.5}],
        "mix": {"combine": "balanced"},
        "lora": {"rank": 2},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 3, "batch_size": 2, "device": "cpu", "seed": 7},
        "previews": {"every": 1, "prompts": [EVIL, "two owls"]},
        "save": {"every": 2},
        "evaluation": {"every": 1, "images_per_prompt": 2},
        "output": str(folder / "run"),
    }
    changes = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    known = registry().with_rewards({"shade": Shade()})
    return Trainer(load_config(data, registry=known, overrides=changes), registry=known)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_pipeline("stable_diffusion").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has everything; tests must not change it."""
    return trainer(tiny_model, tmp_path_factory.mktemp("whole <&'\"> name")).train()


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder from its metrics, without a run; keywords are further files' contents."""

    def make(rows: list[dict[str, Any]], name: str = "made", config: Any = None, **files: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"model": {"base": "some/model"}, "rewards": [{"name": "redness"}], "training": {"steps": 4}}
        (folder / "config.yaml").write_text(dump_yaml(config or settings))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


def step(number: int, value: float | None, **further: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    row = {"step": number, "total": value, "terms": {"redness": {"raw": value, "weighted": value}}}
    return {**row, "grad_norm": 0.5, "seconds": 1.0, **further}


def page_of(folder: Path) -> Page:
    return Page(run_page(read_run(folder)))


def cell(tag: str, page: Page, text: str) -> bool:
    return any(text in found for found in page.inside(tag))


# -- the page of a run ------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_page(trained: Path) -> None:
    page = Page((trained / "report.html").read_text(encoding="utf-8"))
    assert page.inside("h1") == ["run"]
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["result", "images", "curves", "early-stopping", "use", "trained", "environment", "config"]
    assert "On 4 images of 2 held-out prompts" in page.text
    assert (
        "4 images of 2 prompts; the 95% intervals are clustered by prompt. Warning: fewer than 5 prompts" in page.text
    )
    for told in (
        "0.5 × shade",
        "1 × redness (ceiling 5)",
        "mix balanced",
        "LoRA rank 2",
        "seed 7",
        "Finished after 3 steps.",
    ):
        assert told in page.text
    comparison = json.loads((trained / "evaluation.json").read_text())
    assert set(comparison["base"]) == {"redness", "shade", "red_share"}
    assert {"redness", "shade", "red_share", "diversity", "drift"} <= set(page.inside("th"))
    assert "true measure" in page.inside("td")
    assert f"{comparison['tuned']['red_share']['mean']:.4g}" in page.inside("td")


def test_the_page_shows_what_the_mix_did(trained: Path) -> None:
    charts = page_of(trained).charts
    for title in ("share of the direction", "weighted", "gradient norm at the image"):
        assert "redness: from" in charts[title]
        assert "shade: from" in charts[title]
    assert "redness | shade: from" in charts["cosine of two gradients"]
    assert "training: from" in charts["redness"]
    assert "held out: from" in charts["redness"]
    assert {"total", "red_share", "drift from the base model", "diversity"} <= charts.keys()
    assert "gradient norm of the adapters" in charts


def test_images_before_during_and_after_training_have_their_prompts(trained: Path) -> None:
    page = page_of(trained)
    for prompt in (EVIL, "two owls"):
        assert [alt for alt in page.alts if prompt in alt] == [
            f"base: {prompt}", f"tuned: {prompt}", *(f"step {number}: {prompt}" for number in range(4)),
        ]  # fmt: skip
        assert page.inside("span").count(prompt) == 2
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.all("img"))


def test_the_page_loads_and_runs_nothing(trained: Path) -> None:
    page = page_of(trained)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    assert "unsafe" not in policy
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in LOADS & attributes.keys():
            assert attributes[name].startswith("data:image/")
    (style,) = page.inside("style")
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_is_accessible_and_fits_phones(trained: Path) -> None:
    page = page_of(trained)
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in [meta.get("content", "") for meta in page.all("meta")][2]
    levels = [int(tag[1]) for tag, _ in page.elements if tag in {"h1", "h2", "h3"}]
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(attributes["scope"] in {"row", "col"} for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("aria-hidden") == "true" or svg["aria-label"] for svg in page.all("svg"))
    assert "prefers-color-scheme:dark" in page.inside("style")[0]


def test_a_page_is_quick(trained: Path) -> None:
    started = time.process_time()
    run_page(read_run(trained))
    assert time.process_time() - started < 2


# -- text stays text --------------------------------------------------------------------------------------------


def _evil_run(made: Callable[..., Path]) -> Path:
    """A run folder in which everything that is text is an attempt at markup."""
    term = {"name": EVIL, "label": EVIL, "weight": 1.0, "options": {EVIL: EVIL, "list": [EVIL]}}
    config = {
        "model": {"base": EVIL, "vae": EVIL, "loras": [{"path": EVIL}]},
        "rewards": [term, {**term, "label": f"{EVIL}2", "weight": {EVIL: 1.0}}],
        "prompts": {"train": EVIL},
        "mix": {"combine": EVIL},
        "backprop": {"strategy": EVIL},
        "lora": {"target_modules": [EVIL]},
        "training": {"steps": 9, "seed": EVIL},
        "early_stopping": {EVIL: EVIL},
        "output": EVIL,
        EVIL: EVIL,
    }
    terms = {name: {"raw": 0.5, "weighted": 0.5, "share": 0.5, "saturated": 1.0} for name in (EVIL, f"{EVIL}2")}
    row = {"total": 0.5, "terms": terms, "cosines": {EVIL: 0.1}, "grad_norm": 1.0}
    rows = [
        {"step": 1, **row},
        {"step": 2, **row, "skipped": EVIL},
        {"step": 3, **row, "idle": EVIL},
        {"step": 3, "evaluation": {"total": 1.0, "scores": {EVIL: {"mean": 1.0}, f"{EVIL}3": {"mean": 1.0}}}},
    ]
    scores = {"n": 2, "mean": 1.0}
    point = {"strength": 1.0, "drift": 0.1, "scores": {EVIL: scores}}
    folder = made(
        rows,
        name="evil \"quoted\" & 'apart' <b>",
        config=config,
        environment={
            "started": EVIL,
            "resumed": [EVIL],
            "system": EVIL,
            "versions": {EVIL: EVIL},
            "device": {"kind": EVIL, "names": [EVIL]},
            "licenses": {EVIL: {"reward": EVIL, "weights": {EVIL: f"CC-BY-NC-4.0 {EVIL}"}}},
            "local_rewards": {EVIL: {"file": EVIL}},
            "isolated_rewards": {EVIL: {"license": EVIL}},
        },
        evaluation={"base": {EVIL: scores}, "tuned": {EVIL: scores}, "stopped": EVIL},
        strengths={"points": [point, {**point, "drift": 0.2}]},
        soup={"points": [{"share": 0.5, "scores": {EVIL: scores, f"{EVIL}2": scores}}], "soup": EVIL},
    )
    (folder / "images").mkdir()
    picture = grid([torch.rand(3, 32, 32)], [EVIL])
    save_image(picture, folder / "images" / "step-000000.png")
    save_image(picture, folder / "images" / "before_after.png")
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").touch()
    (folder / "lora" / "<b>&.safetensors").touch()
    return folder


@pytest.mark.parametrize("several", [False, True])
def test_no_text_becomes_an_element(made: Callable[..., Path], several: bool) -> None:
    folder = _evil_run(made)
    page = Page(several_page([read_run(folder), read_run(made([], name="other"))])) if several else page_of(folder)
    known = (
        "html head meta title style body header main section aside h1 h2 h3 p b strong span div br ul ol li dl dt dd"
    )
    known += " table caption thead tbody tr th td pre code details summary figure figcaption img svg path circle text"
    assert {tag for tag, _ in page.elements} <= set(known.split())
    known = (
        "class id scope role aria-label aria-hidden tabindex dir alt src width height lang charset http-equiv content"
    )
    known += " name viewbox d x y cx cy r"
    assert {name for _, attributes in page.elements for name in attributes} <= set(known.split())
    assert EVIL in "".join(text for _, text in page.texts)
    assert any(EVIL in alt for alt in page.alts)
    assert any(EVIL in attributes.get("aria-label", "") for attributes in page.all("svg"))


def test_what_html_cannot_hold_is_replaced() -> None:
    assert element("p", "a\x00b\ud800c\x1b", title='"<&') == '<p title="&quot;&lt;&amp;">a\ufffdb\ufffdc\ufffd</p>'
    element("p", "\ud800").encode("utf-8")


# -- folders that are not as expected ---------------------------------------------------------------------------


def test_broken_lines_of_the_metrics_are_skipped_and_reported(made: Callable[..., Path]) -> None:
    folder = made([step(1, 0.1), step(2, 0.2)])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'[]\n{"step": true}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 3, "reward": 0.')
    page = page_of(folder)
    assert "5 broken lines of metrics.jsonl skipped (lines 3, 4, 5, 6, 7)." in page.text
    assert "Step 2 of 4" in page.text.replace("step 2", "Step 2")


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", '{"base": [], "tuned": {"a": 1}, "drift": 3}', '{"base": {"a": {}}}']
)
def test_any_evaluation_json_gives_a_page(made: Callable[..., Path], content: str) -> None:
    folder = made([step(1, 0.1)], evaluation=content, environment=content, strengths=content, soup=content)
    assert page_of(folder).inside("h1") == ["made"]


def test_a_run_without_anything_but_a_config_gives_a_page(made: Callable[..., Path]) -> None:
    folder = made([])
    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    assert "No step has finished yet." in page.text
    assert "There are no metrics yet." in page.text


def test_an_older_unfinished_run_gives_a_page(made: Callable[..., Path]) -> None:
    folder = made([step(n, n / 10) for n in range(1, 4)])
    (folder / "images").mkdir()
    Image.new("RGB", (200, 120), "red").save(folder / "images" / "step-000000.png")
    Image.new("RGB", (200, 120), "red").save(folder / "images" / "before_after.png")
    (folder / "images" / "step-000002.png").write_bytes(b"no picture")
    page = page_of(folder)
    assert "Not finished: step 3 of 4." in page.text
    assert "There was no evaluation on held-out prompts; the total in training rose by 200% (0.1 to 0.3)" in page.text
    assert "images/step-000002.png cannot be read" in page.text
    assert page.alts == [
        "Before and after: for each prompt, the image of the base model and of the tuned model",
        "Images at step 0, each above its prompt",
    ]
    assert "it does not exist yet" in page.text


def test_a_step_done_twice_counts_once(made: Callable[..., Path]) -> None:
    folder = made([step(1, 0.1), step(2, 0.9), step(2, 0.2), step(3, 0.3)])
    assert [row["total"] for row in read_run(folder).steps] == [0.1, 0.2, 0.3]


def test_early_stopping_and_skipped_steps_are_visible(made: Callable[..., Path]) -> None:
    rows = [
        step(1, 0.1),
        step(2, None, skipped="the gradient is not finite"),
        step(3, 0.3, idle="all at their ceiling"),
    ]
    rows += [step(4, 0.3, idle="all at their ceiling")]
    rows += [{"step": n, "evaluation": {"total": n, "scores": {}, "drift": n, "best": n == 1}} for n in range(3)]
    config = {
        "model": {"base": "m"},
        "rewards": [{"name": "redness"}],
        "training": {"steps": 40},
        "early_stopping": {"max_drift": 1.5, "patience": None},
    }
    stopped = {"base": {}, "tuned": {}, "step": 1, "stopped": "drift 2 is above early_stopping.max_drift 1.5"}
    folder = made(rows, config=config, evaluation=stopped)
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").touch()
    page = page_of(folder)
    told = "Stopped early at step 4 of 40: drift 2 is above early_stopping.max_drift 1.5. The LoRA is from step 1."
    assert told in page.text
    assert page.inside("td").count("the gradient is not finite") == 1
    assert "2 (steps 3 to 4): all at their ceiling" in page.inside("dd")
    assert "step 1" in page.inside("dd")
    classes = {path.get("class") for path in page.all("path")}
    assert {"skipped", "idle", "saved", "limit"} <= classes
    assert {"skipped step", "idle step", "step of the saved LoRA", "best evaluation"} <= set(page.inside("span"))


def test_a_reason_to_stop_is_shown_until_the_run_resumes(made: Callable[..., Path]) -> None:
    stopped = [step(1, 0.1), step(2, 0.2), {"step": 2, "stopped": "far enough"}]
    assert "Stopped early at step 2 of 4: far enough." in page_of(made(stopped)).text
    assert "far enough" in page_of(made(stopped, name="twice")).inside("dd")
    assert "far enough" not in page_of(made([*stopped, step(3, 0.3)], name="on")).text
    folder = made([step(1, 0.1), {"step": 1, "stopped": EVIL}], name="evil")
    assert EVIL in page_of(folder).text


def test_a_page_has_the_times_of_start_and_resume(trained: Path, made: Callable[..., Path]) -> None:
    began = datetime.fromisoformat(json.loads((trained / "environment.json").read_text())["started"])
    assert f"started {began.astimezone(UTC):%Y-%m-%d %H:%M} UTC; " in page_of(trained).text
    days = [f"2026-02-{day:02}T00:30:00+01:00" for day in range(2, 7)]
    page = page_of(made([step(1, 0.1)], environment={"started": "2026-02-01T23:59:59-03:00", "resumed": days[:1]}))
    assert "started 2026-02-02 02:59 UTC; resumed 2026-02-01 23:30 UTC; 1 s of training" in page.text
    page = page_of(made([step(1, 0.1)], name="often", environment={"started": None, "resumed": [*days, 3, "soon"]}))
    assert "started" not in page.text.partition("Versions")[0].partition("time")[2].partition("machine")[0]
    resumed = "2026-02-03 23:30 UTC, 2026-02-04 23:30 UTC, 2026-02-05 23:30 UTC and 2 times before"
    assert f"resumed {resumed}; 1 s of training" in page.text


def test_non_commercial_and_missing_licenses_cause_warnings(made: Callable[..., Path]) -> None:
    licenses = {
        "free": {"reward": "MIT", "weights": {"a.safetensors": "Apache-2.0"}},
        "bound": {"reward": "MIT", "weights": {"b.safetensors": "CC-BY-NC-4.0"}},
        "silent": {"reward": "", "weights": {}},
    }
    page = page_of(made([], environment={"licenses": licenses}))
    warned = [text for text in page.inside("li") if "license" in text or "commercial" in text]
    assert len(warned) == 2
    assert warned[0].startswith("bound: the weights b.safetensors: CC-BY-NC-4.0: not for commercial use.")
    assert warned[1].startswith("silent:")


def test_strength_curves_have_their_points(made: Callable[..., Path]) -> None:
    def point(strength: float, **score: Any) -> dict[str, Any]:
        return {"strength": strength, "drift": strength / 2, "scores": {"redness": {"mean": 1 + strength, **score}}}

    points = [point(0.0), point(0.5, interval=[0.4, 0.6]), point(1.0, interval=[0.8, 1.2])]
    page = page_of(made([], strengths={"points": points, "paired_with": 0.0}))
    assert "redness: from 1 at drift 0 to 2 at drift 0.5, lowest 1, highest 2.2" in page.charts["redness"]
    assert len([path for path in page.all("path") if path.get("class") == "bar"]) == 2
    assert {"0", "0.5", "1"} <= set(page.inside("text"))


def test_an_evaluation_older_than_the_run_is_reported(made: Callable[..., Path]) -> None:
    scores = {"redness": {"n": 4, "mean": 1.0}}
    page = page_of(made([step(n, 0.1) for n in range(1, 4)], evaluation={"base": scores, "tuned": scores, "step": 2}))
    assert "Not finished: step 3 of 4. evaluation.json is from step 2." in page.text


# -- run folders of older versions ------------------------------------------------------------------------------


def test_old_names_of_keys_are_translated(made: Callable[..., Path]) -> None:
    common = {"model": {"base": "m"}, "rewards": [{"name": "redness"}]}
    old = {
        **common,
        "training": {"steps": 4, "checkpoint_every": 5, "keep_checkpoints": 2},
        "lora": {"rank": 2, "targets": ["to_q"], "rank_stabilized": True},
        "samples": {"every": 2, "seed": 42},
        "guards": {
            "watch": "reward", "lower_is_better": False, "patience": 3, "drift_limit": 1.5, "diversity_floor": 0.5,
            "keep_best": True, "explosion": 100.0, "max_dropped_steps": 4,
        },
    }  # fmt: skip
    new = {
        **common,
        "training": {"steps": 4},
        "lora": {"rank": 2, "target_modules": ["to_q"], "use_rslora": True},
        "previews": {"every": 2, "seeds": [42]},
        "early_stopping": {
            "monitor": "total", "mode": "max", "patience": 3, "max_drift": 1.5, "min_diversity": 0.5,
            "restore_best": True,
        },
        "optimizer": {"spike_threshold": 100.0, "max_skipped_steps": 4},
        "save": {"state_every": 5, "state_keep": 2},
    }  # fmt: skip
    term = {"raw": 0.1, "weighted": 0.1}
    rows = [
        {"step": 1, "reward": 0.1, "terms": {"redness": {**term, "held": 0.5}}, "dropped": "not finite"},
        {"step": 1, "evaluation": {"reward": 0.3, "scores": {}, "drift": 0.1}},
    ]
    today = [
        {"step": 1, "total": 0.1, "terms": {"redness": {**term, "saturated": 0.5}}, "skipped": "not finite"},
        {"step": 1, "evaluation": {"total": 0.3, "scores": {}, "drift": 0.1}},
    ]
    before, after = read_run(made(rows, name="old", config=old)), read_run(made(today, name="new", config=new))
    assert before.config == after.config == new
    assert before.steps == after.steps
    assert before.evaluations == after.evaluations
    page = page_of(before.path)
    assert "saturated images" in page.charts
    assert "not finite" in page.inside("td")
    assert "The configs differ only in the output folder." in Page(several_page([before, after])).text


@pytest.mark.parametrize("content", [None, 3, [], "text", {"seed": None}, {"watch": []}, {"lower_is_better": "no"}])
def test_old_sections_of_any_content_give_a_page(made: Callable[..., Path], content: object) -> None:
    sections = dict.fromkeys(("samples", "guards", "lora", "training", "optimizer", "save"), content)
    assert page_of(made([], config={"model": {}, "rewards": [], **sections})).inside("h1") == ["made"]


# -- plots of curves --------------------------------------------------------------------------------------------


def test_new_curves_are_plotted(made: Callable[..., Path]) -> None:
    def point(strength: float, **score: Any) -> dict[str, Any]:
        scores = {"red$ness_{": {"mean": 1 + strength, **score}, "same": {"mean": 2.0}}
        return {"strength": strength, "drift": strength / 2, "scores": scores}

    curve = {"points": [point(0.0), point(0.5, interval=[0.4, 0.6])], "paired_with": 0.0}
    folder = made([], strengths=curve, soup={"points": []})
    write_plots(folder)
    path = folder / "images" / "strengths.png"
    with Image.open(path) as image:
        assert image.width > image.height
    assert not (folder / "images" / "soup.png").exists(), "it has no points"
    before = path.stat().st_mtime_ns
    write_plots(folder)
    assert path.stat().st_mtime_ns == before
    (folder / "strengths.json").write_text(json.dumps({**curve, "points": [point(0.0)]}))
    os.utime(folder / "strengths.json", ns=(before + 10**9, before + 10**9))
    write_plots(folder)
    assert path.stat().st_mtime_ns != before


# -- sizes ------------------------------------------------------------------------------------------------------


def test_ten_thousand_steps_make_a_small_page_quickly(made: Callable[..., Path]) -> None:
    labels = ("redness", "shade", "third")
    random = np.random.default_rng(0)
    rows = []
    for number in range(1, 10_001):
        terms = {
            label: {
                "raw": value,
                "weighted": value,
                "share": 1 / 3,
                "grad_norm": value + 4,
                "saturated": 0.0,
                "factor": 1.0,
            }
            for label, value in zip(labels, random.random(3).tolist(), strict=True)
        }
        cosines = {f"{a} | {b}": -0.1 for a in labels for b in labels if a < b}
        rows.append(step(number, 0.5, terms=terms, cosines=cosines, idle="resting" if number % 2 else None))
    folder = made(rows)
    started = time.process_time()
    text = run_page(read_run(folder))
    assert time.process_time() - started < 2
    assert len(text) < 600_000
    assert "redness: from" in Page(text).charts["share of the direction"]


def test_a_line_has_few_points_and_keeps_its_extremes() -> None:
    values = [0.0] * 10_000
    values[1234] = 7.0
    drawn = Page(str(draw(Chart("spike", [Line("one", list(range(10_000)), values)]))))
    paths = [path["d"] for path in drawn.all("path") if "c0" in path["class"]]
    assert max(map(len, paths)) < 2 * BUCKETS * 14
    assert "highest 7" in drawn.charts["spike"]


def test_missing_values_are_gaps() -> None:
    drawn = Page(str(draw(Chart("gap", [Line("one", [1, 2, 3, 4, 5], [1.0, 2.0, None, 3.0, 4.0])]))))
    (line,) = [path["d"] for path in drawn.all("path") if "line" in path["class"]]
    assert line.count("M") == 2
    assert draw(Chart("nothing", [Line("one", [1, 2], [None, None])])) is None
    assert draw(Chart("no logarithm", [Line("one", [1, 2], [0.0, -1.0])], log=True)) is None


def test_images_that_are_hard_to_compress_stay_within_three_megabytes(made: Callable[..., Path]) -> None:
    folder = made([step(1, 0.1)])
    (folder / "images").mkdir()
    random = torch.Generator().manual_seed(0)
    noise = list(torch.rand(8, 3, 320, 320, generator=random))
    save_image(grid(noise, [f"prompt {n}" for n in range(8)]), folder / "images" / "step-000000.png")
    for number in range(1, 8):
        shutil.copy(folder / "images" / "step-000000.png", folder / "images" / f"step-{number:06d}.png")
    started = time.process_time()
    text = run_page(read_run(folder))
    assert time.process_time() - started < 5
    assert len(text) < 3_000_000
    assert len(Page(text).all("img")) == 7 * 8


def test_a_sheet_returns_its_images_and_complete_prompts(tmp_path: Path) -> None:
    pictures = [torch.rand(3, 200, 256) for _ in range(5)]
    prompts = [f"{EVIL} {'and a long way to go ' * 9}{n} 猫" for n in range(5)]
    save_image(grid(pictures, prompts), tmp_path / "sheet.png")
    problems: list[str] = []
    sheet = open_sheet(tmp_path / "sheet.png", problems)
    assert sheet is not None
    assert not problems
    assert [found.prompt for found in sheet.cells] == prompts
    for picture, found in zip(pictures, sheet.cells, strict=True):
        pixels = np.asarray(found.images[""])
        assert np.abs(pixels / 255 - picture.permute(1, 2, 0).numpy()).max() < 0.01


@pytest.mark.parametrize(
    "told",
    ["{", "[]", '{"cells": [{"boxes": [[0, 0, 9999, 9]], "lines": ["a"]}]}', '{"cells": [{"boxes": 3, "lines": 4}]}'],
)
def test_a_sheet_with_an_invalid_layout_is_shown_complete(tmp_path: Path, told: str) -> None:
    picture = Image.new("RGB", (40, 40))
    picture.info["alignprop"] = told
    save_image(picture, tmp_path / "sheet.png")
    sheet = open_sheet(tmp_path / "sheet.png", [])
    assert sheet is not None
    assert sheet.cells == ()


# -- what can be copied from it ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch, with numpy 2
def test_its_code_generates_an_image(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = [text for text in page_of(trained).inside("code") if "load_lora_weights" in text]
    assert "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)" in snippet
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    with Image.open(tmp_path / "image.png") as picture:
        assert picture.size == (32, 32)


def test_its_commands_take_the_folder_they_name(trained: Path, made: Callable[..., Path]) -> None:
    commands = [shlex.split(text) for text in page_of(trained).inside("code") if text.startswith("alignprop ")]
    (sample,) = commands  # none to go on: one of its rewards was an object from Python
    assert sample[1] == "sample"
    assert sample[5] == str(trained / "lora")
    assert "lora/run.safetensors" in page_of(trained).inside("code")
    plain = made([step(1, 0.1)])
    (train,) = [shlex.split(text) for text in page_of(plain).inside("code") if text.startswith("alignprop ")]
    assert train[1:] == ["train", f"{plain}/config.yaml", "--resume", "latest", f"output={plain}"]


def test_a_function_reward_is_named_in_what_resumes_the_run(made: Callable[..., Path]) -> None:
    origin = {"function": "redness", "module": "__main__", "type": "function"}
    page = page_of(made([step(1, 0.1), step(2, 0.3)], environment={"local_rewards": {"redness": origin}}))
    assert "replace the dots with your objects for redness (redness)." in page.text
    assert "(first and last step)." in page.text


# -- several runs -----------------------------------------------------------------------------------------------


def test_several_runs_are_side_by_side(trained: Path, made: Callable[..., Path]) -> None:
    other = made([step(1, 0.1), step(2, 0.2)], environment={"licenses": {"x": {"reward": "CC-BY-NC-4.0"}}})
    page = Page(several_page([read_run(trained), read_run(other)]))
    assert page.inside("h1") == ["2 runs compared"]
    assert "run: from" in page.charts["redness"]
    assert "made: from" in page.charts["redness"]
    assert {"redness", "shade", "red_share", "drift"} <= set(page.inside("th"))
    assert {"model.base", "mix.combine"} <= set(page.inside("th"))
    assert {"some/model", "balanced"} <= set(page.inside("td"))
    assert [alt for alt in page.alts if "owls" in alt and EVIL not in alt] == ["base: two owls", "run: two owls"]
    assert "differ in model or sampling" in page.text
    assert "made: x: the reward: CC-BY-NC-4.0" in page.text


def test_runs_of_one_name_are_distinguished(tmp_path: Path, made: Callable[..., Path]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [read_run(made([], name=f"{folder}/same")) for folder in "ab"]
    assert names_of(runs) == ["a/same", "b/same"]


# -- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_run_and_for_several_here(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(made([step(1, 0.1)], name="one")), str(made([step(1, 0.1)], name="two"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.run(["report", one]) == 0
    assert Page((Path(one) / "report.html").read_text()).inside("h1") == ["one"]
    assert not list(here.iterdir())
    assert cli.run(["report", one, two]) == 0
    assert cli.run(["report", one, two]) == 0  # over its own page
    assert cli.run(["report", one, "--output", "new/one.html"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["new", "report.html"]
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["nowhere"], "no such folder"),
        (["some/notes.txt"], "notes.txt is a file. Give the folder of a run"),
        (
            ["some"],
            "some is not a run folder: it has no config.yaml. It contains these run folders: broken, other, run.",
        ),
        (["some/empty"], "is not a run folder: it has no config.yaml. Check the path."),
        (["some/other"], "is not a run folder: its config.yaml is not a run config"),
        (["some/broken"], "not valid YAML"),
        (["some/run", "some/../some/run"], "is given twice"),
        (["some/run", "--output", "some"], "some is a folder"),
        (["some/run", "--output", "some/notes.txt"], "notes.txt exists and is not a report; it is not overwritten."),
        (["some/run", "--output", "some/notes.txt/x.html"], "Cannot write"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "some" / "empty").mkdir(parents=True)
    (tmp_path / "some" / "notes.txt").write_text("mine")
    made([step(1, 0.1)], name="some/run")
    made([], name="some/other", config={"a": 1})
    (tmp_path / "some" / "broken").mkdir()
    (tmp_path / "some" / "broken" / "config.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert message in err
    assert "Traceback" not in err
    assert (tmp_path / "some" / "notes.txt").read_text() == "mine"


def test_the_command_imports_no_torch(trained: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from alignprop_core.cli import run;"
        f"assert run(['report', {str(trained)!r}, '--output', 'r.html']) == 0;"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- at the end of a run ----------------------------------------------------------------------------------------


class InTheWay(Callback):
    """Puts a folder where the page would go."""

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        (trainer.folder.path / "report.html" / "something").mkdir(parents=True, exist_ok=True)


def test_a_page_that_cannot_be_written_costs_no_run(tiny_model: Path, tmp_path: Path) -> None:
    going = trainer(tiny_model, tmp_path, training__steps=1, previews__every=None, evaluation__every=None)
    going.callbacks.append(InTheWay())
    with pytest.warns(UserWarning, match="report.html is not written") as caught:
        folder = going.train()
    told = str(caught[0].message)
    assert "report.html is not written: " in told
    assert f"`alignprop report {folder}` tries again" in told
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((folder / "evaluation.json").read_text())["step"] == 1


def test_a_run_that_fails_leaves_a_page_of_what_it_did(tiny_model: Path, tmp_path: Path) -> None:
    Crashes.calls = 0
    rewards = [{"name": "crashes"}, {"name": "shade"}]
    going = trainer(
        tiny_model, tmp_path, rewards=rewards, training__steps=5, previews__every=None, evaluation__every=None, mix={}
    )
    with pytest.raises(RewardError, match="the third call"):
        going.train()
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "Not finished: step 2 of 5." in page.text


def test_only_a_page_is_replaced_by_a_page(tmp_path: Path, trained: Path) -> None:
    page = run_page(read_run(trained))
    target = tmp_path / "page.html"
    write_page(target, page)
    write_page(target, page)
    target.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="it is not overwritten"):
        write_page(target, page)
