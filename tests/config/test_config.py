# ruff: noqa: E501  (tables of cases read best as one line a case)
"""The run config: everything wrong is said at once, with the key's path and the nearest valid name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field, ValidationError

from alignprop_core.config.aliases import ALIASES
from alignprop_core.config.load import load_config, resolved_yaml
from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.schedulers import SCHEDULERS, canonical_scheduler
from alignprop_core.config.schema import json_schema
from alignprop_core.config.sections import RunConfig
from alignprop_core.config.yaml import dump_yaml, read_yaml
from alignprop_core.errors import ConfigError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import ModelSpec, PromptSpec, RewardConfig, RewardSpec
from alignprop_core.validation import InvalidConfig, keys_of


class _JpegOptions(RewardConfig):
    quality: int = Field(default=95, ge=1, le=95, description="JPEG quality.")
    weights: str | None = Field(default=None, description="A file.")


class _CountOptions(RewardConfig):
    number: int = Field(description="How many.")


class _Plugin:
    @hookimpl
    def alignprop_register_rewards(self) -> list[RewardSpec]:
        jpeg: dict[str, Any] = {"summary": "s", "factory": "a:B", "config": "fake_options:Jpeg"}
        return [
            RewardSpec(name="jpeg", **jpeg),
            RewardSpec(name="jpeg_bytes", differentiable=False, **jpeg),
            RewardSpec(name="diversity", scope="batch", **jpeg),
            RewardSpec(name="count", summary="s", factory="a:B", config="fake_options:Count"),
        ]

    @hookimpl
    def alignprop_register_models(self) -> list[ModelSpec]:
        return [ModelSpec(name="starter", summary="s", path="a:b")]

    @hookimpl
    def alignprop_register_prompts(self) -> list[PromptSpec]:
        return [PromptSpec(name="starter/animals", summary="s", path="a:b.txt")]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = ModuleType("fake_options")
    module.Jpeg, module.Count = _JpegOptions, _CountOptions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_options", module)
    return Registry.from_plugins({"alignprop-fake": _Plugin()})


MINIMAL = """\
model: {base: starter}
prompts: {train: starter/animals}
rewards:
  - {name: jpeg}
output: runs/first
"""


def load(
    folder: Path, registry: Registry, more: str = "", overrides: Sequence[str] = (), base: str = MINIMAL
) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(base + dedent(more))
    return load_config(path, overrides, registry=registry)


def problems(folder: Path, registry: Registry, more: str = "", *overrides: str, base: str = MINIMAL) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        load(folder, registry, more, overrides, base=base)
    assert caught.value.exit_code == 2
    for problem in caught.value.problems:
        assert problem.message in str(caught.value)
        assert problem.key in str(caught.value)
    return {problem.key: problem.message for problem in caught.value.problems}


# -- reading ----------------------------------------------------------------------------------------------------


def test_a_minimal_config_takes_the_documented_defaults(tmp_path: Path, registry: Registry) -> None:
    config = load(tmp_path, registry)
    assert (config.sampling.steps, config.sampling.guidance_scale, config.sampling.eta) == (50, 7.5, 0)
    assert (config.backprop.strategy, config.backprop.k, config.backprop.checkpoint_steps) == ("uniform", None, "auto")
    assert (config.lora.rank, config.optimizer.learning_rate, config.optimizer.max_grad_norm) == (8, 1e-3, 1.0)
    assert (config.training.batch_size, config.previews.seeds, config.evaluation.seed) == (8, [42], 1234)
    assert config.rewards[0].label == "jpeg"
    assert config.rewards[0].options == {"quality": 95, "weights": None}


def test_a_resolved_config_loads_again_to_the_same(tmp_path: Path, registry: Registry) -> None:
    config = load(
        tmp_path,
        registry,
        """\
        backprop: {strategy: last_k, k: 1, lv_samples: 2, checkpoint_steps: false}
        training: {mixed_precision: no, trackers: [tensorboard]}
        optimizer: {epsilon: 1e-8, max_grad_norm: null}
        sampling: {negative_prompt: 'yes: "no" # 1e-3'}
        evaluation: {rewards: [{name: jpeg_bytes, label: bytes.95}]}
        """,
        ["rewards.0.options.quality=80", "model.loras.0.path=a.safetensors"],
    )
    text = resolved_yaml(config)
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "config.yaml").write_text(text)
    assert load_config(again / "config.yaml", registry=registry) == config
    assert resolved_yaml(load_config(again / "config.yaml", registry=registry)) == text
    written, _ = read_yaml(text, "text")
    assert {key for key in keys_of(RunConfig) if "." not in key} == set(written)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("0x1F", 31),
        ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"),
        ("~", None),
        ("'1e-3'", "1e-3"),
        ("{a: [1, b]}", {"a": [1, "b"]}),
    ],
)
def test_yaml_scalars_are_what_people_mean_and_survive_writing(text: str, value: object) -> None:
    assert read_yaml(text, "text")[0] == value
    assert read_yaml(dump_yaml(value), "text")[0] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "run.yaml:2:2: not valid YAML"),
        ("a:\n\t- 1\n", "run.yaml:2:1: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", 'run.yaml:3:1: not valid YAML: the key "a" appears twice'),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("a: &x [*x]\n", "nested more than 50 levels"),
        ("a: \x07\n", "unacceptable character"),
        ("{[1]: 2}\n", "not valid YAML"),
        (
            "\n".join(["a0: &a0 [1]", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))]),
            "more than 100,000 values",
        ),
        ("- 1\n", "must contain keys such as model"),
        ("just text\n", "must contain keys such as model"),
    ],
)
def test_bad_yaml_is_shown_with_its_line(tmp_path: Path, registry: Registry, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, registry, base=text)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError, match="no such run config"):
        load_config(tmp_path / "none.yaml", registry=registry)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a folder.*Did you mean .*config\.yaml"):
        load_config(tmp_path, registry=registry)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml", registry=registry)


# -- what is wrong ----------------------------------------------------------------------------------------------


def test_everything_wrong_is_reported_together_with_lines(tmp_path: Path, registry: Registry) -> None:
    base = dedent(
        """\
        model: {base: starer}
        prompts: {train: starter/animal}
        lr: 1e-3
        training:
          steps: "40"
          batch_size: 0
        rewards:
          - name: jpg
          - name: jpeg
            options: {qualty: 3}
        """
    )
    found = problems(tmp_path, registry, base=base)
    assert list(found) == [
        "training.steps",
        "training.batch_size",
        "output",
        "lr",
        "model.base",
        "prompts.train",
        "rewards.0.name",
        "rewards.1.options.qualty",
    ]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, registry, base=base)
    lines = str(caught.value).split("\n")
    assert lines[0].endswith("run.yaml: 8 problems")
    assert lines[1] == "  output: is required."
    assert lines[4] == "  line 3: lr: unknown key. In alignprop this is optimizer.learning_rate."
    assert lines[5] == '  line 5: training.steps: must be a whole number, not the text "40".'
    assert lines[-1].startswith(
        "  line 10: rewards.1.options.qualty: unknown key. Did you mean rewards.1.options.quality?"
    )


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("training: {steps: true}", "training.steps", "must be a whole number, not true."),
        ("training: {steps: 1.5}", "training.steps", "must be a whole number, not 1.5."),
        ("training: {steps: -1}", "training.steps", "must be at least 0, not -1."),
        ("training: [1]", "training", "must be a mapping (key: value), not a list."),
        ("training:", "training", "must be a mapping (key: value), not null."),
        ("training: {device: gpu}", "training.device", 'must be auto, cpu, mps, cuda or cuda:N (as in cuda:0), not the text "gpu".'),
        ("sampling: {width: 100}", "sampling.width", "must be a multiple of 8, not 100."),
        ("sampling: {guidance_scale: 0}", "sampling.guidance_scale", "must be at least 1, not 0."),
        ("sampling: {guidance_scale: .inf}", "sampling.guidance_scale", "must be a finite number, not inf."),
        ("sampling: {eta: 2}", "sampling.eta", "must be at most 1, not 2."),
        ("sampling: {eta: 0.5, scheduler: euler a}", "sampling.eta", "euler_a has no eta, only ddim has. Remove it, or set scheduler: ddim."),
        ("sampling: {scheduler: dpmp_2m}", "sampling.scheduler", 'must be ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, lcm, flow_match_euler, or the name of its class in diffusers, not "dpmp_2m". Did you mean "dpmpp_2m"?'),
        ("sampling: {scheduler: UniPCMultistepScheduler}", "sampling.scheduler", 'must be ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, lcm, flow_match_euler, or the name of its class in diffusers, not "UniPCMultistepScheduler".'),
        ("backprop: {checkpoint_steps: maybe}", "backprop.checkpoint_steps", 'must be auto or true or false, not the text "maybe".'),
        ("backprop: {strategy: lastk}", "backprop.strategy", 'must be last_k, uniform, gaussian, full, drtune, refl, bernoulli, sparse, bridge or leap, not the text "lastk". Did you mean "last_k"?'),
        ("backprop: {strategy: bernoulli, keep_probability: 0}", "backprop.keep_probability", "must be more than 0, not 0."),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate", 'must be a number, not the text "fast".'),
        ("model: {base: starter, loras: [{strength: 1}]}", "model.loras.0.path", "is required."),
        ("version: 2", "version", "must be 1, not 2."),
        ("evaluation: {rewards: [{name: jpeg_bytes, label: 'a b'}]}", "evaluation.rewards.0.label", 'must be letters, digits, dots, dashes and underscores, not the text "a b".'),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(tmp_path: Path, registry: Registry, text: str, key: str, message: str) -> None:
    base = MINIMAL if not text.startswith("model") else MINIMAL.partition("\n")[2]
    assert problems(tmp_path, registry, text, base=base) == {key: message}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("DDIMScheduler", "ddim"),
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("EulerDiscreteScheduler", "euler"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++_2m", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("LCM", "lcm"),
        ("FlowMatchEulerDiscreteScheduler", "flow_match_euler"),
    ],
)
def test_a_scheduler_has_one_name_in_the_resolved_config(given: str, name: str) -> None:
    assert SamplingConfig(scheduler=given).scheduler == name


def test_every_name_of_a_scheduler_is_written_plainly_and_means_one() -> None:
    names = [name for name, (_, aliases) in SCHEDULERS.items() for name in (name, *aliases)]
    assert len(set(names)) == len(names)
    for name, (_, aliases) in SCHEDULERS.items():
        assert {canonical_scheduler(other) for other in (name, *aliases)} == {name}


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("sampling: {step: 3}", "sampling.step", "unknown key. Did you mean sampling.steps?"),
        ("guidance_scale: 3", "guidance_scale", "unknown key. Did you mean sampling.guidance_scale?"),
        ("training: {rank: 3}", "training.rank", "unknown key. Did you mean lora.rank?"),
        ("training: {every: 3}", "training.every", "unknown key. Did you mean save.every or previews.every or evaluation.every?"),
        ("steps: 3", "steps", "unknown key. Did you mean sampling.steps or training.steps?"),
        ("optimiser: {}", "optimiser", "unknown key. Did you mean optimizer?"),
        ("lora: {network-dim: 3}", "lora.network-dim", "unknown key. In alignprop this is lora.rank."),
        ("training: {learning_rate: 3}", "training.learning_rate", "unknown key. In alignprop this is optimizer.learning_rate."),
        ("samples: {every: 3}", "samples", "unknown key. It was renamed to previews."),
        ("guards: {patience: 3}", "guards", "unknown key. It was renamed to early_stopping (and optimizer.spike_threshold)."),
        ("lora: {targets: [to_q]}", "lora.targets", "unknown key. It was renamed to lora.target_modules."),
        ("lora: {rank_stabilized: true}", "lora.rank_stabilized", "unknown key. It was renamed to lora.use_rslora."),
        ("training: {checkpoint_every: 3}", "training.checkpoint_every", "unknown key. It was renamed to save.state_every."),
        ("early_stopping: {watch: red}", "early_stopping.watch", "unknown key. It was renamed to early_stopping.monitor."),
        ("previews: {at_start: false}", "previews.at_start", "unknown key. In alignprop this is previews (always before the first step)."),
        ("mix: {targets: 1}", "mix.targets", "unknown key. Did you mean rewards.0.target?"),
        ("evaluation: {samples: 1}", "evaluation.samples", "unknown key. Did you mean backprop.lv_samples?"),
        ("1: 2", "1", "keys are text. Put it in quotes."),
        ("mix: {zzz: 1}", "mix.zzz", "unknown key. Valid keys: combine, balance_at, per_sample, decay, scale_floor, reward_batch_size, offload."),
    ],
)  # fmt: skip
def test_unknown_keys_are_answered(tmp_path: Path, registry: Registry, text: str, key: str, message: str) -> None:
    assert problems(tmp_path, registry, text) == {key: message}


@pytest.mark.parametrize("foreign", [key for key in ALIASES if "." not in key])
def test_keys_of_other_trainers_are_answered_with_ours(tmp_path: Path, registry: Registry, foreign: str) -> None:
    ours = ALIASES[foreign].split(" (")[0].replace(" with ", " and ").split(" and ")
    assert {key.split(":")[0] for key in ours} <= set(keys_of(RunConfig))
    if foreign not in RunConfig.model_fields:
        found = problems(tmp_path, registry, f"{foreign}: 1")
        assert found == {foreign: f"unknown key. In alignprop this is {ALIASES[foreign]}."}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("backprop: {strategy: last_k, k: 60}", ["backprop.k"]),
        ("backprop: {strategy: refl, refl_steps: 60}", ["backprop.refl_steps"]),
        ("backprop: {strategy: gaussian, mean: 60}", ["backprop.mean"]),
        ("backprop: {strategy: full, k: 3, mean: 1, keep_probability: 0.5}", ["backprop.k", "backprop.mean", "backprop.keep_probability"]),
        ("backprop: {strategy: uniform, lv_samples: 1}", ["backprop.lv_samples"]),
        ("backprop: {strategy: last_k, k: 2, lv_samples: 1}", ["backprop.lv_samples"]),
        ("training: {steps: 5}\noptimizer: {warmup_steps: 6}", ["optimizer.warmup_steps"]),
        ("evaluation: {rewards: [{name: jpeg}]}", ["evaluation.rewards.0.label"]),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(tmp_path: Path, registry: Registry, text: str, keys: list[str]) -> None:
    assert list(problems(tmp_path, registry, text)) == keys


@pytest.mark.parametrize(
    ("terms", "key", "message"),
    [
        ("[]", "rewards", "must be a list with at least 1 entry, not an empty list."),
        ("[{name: jpeg, weight: 0}]", "rewards.0.weight", "a weight of 0 trains nothing"),
        ("[{name: jpeg, weight: -1, ceiling: -1}]", "rewards.0.ceiling", "no further, set floor: -1;"),
        ("[{name: jpeg, weight: {0: 0, 9: -1}, ceiling: 2}]", "rewards.0.ceiling", "needs a positive weight"),
        ("[{name: jpeg, weight: .nan}]", "rewards.0.weight", "must be a finite number"),
        ("[{name: jpeg}, {name: jpeg}]", "rewards.1.label", '"jpeg" is used by rewards.0 already'),
        ("[{name: jpeg_bytes}]", "rewards.0.name", "use it under evaluation.rewards"),
        ("[{name: diversity}]", "rewards.0.name", "use it under evaluation.rewards"),
        ("[{name: jepg}]", "rewards.0.name", 'Did you mean "jpeg"?'),
        ("[{name: jpeg, options: {quality: high}}]", "rewards.0.options.quality", "must be a whole number"),
        ("[{name: jpeg, options: {quality: true}}]", "rewards.0.options.quality", "must be a whole number, not true"),
        ("[{name: jpeg, options: 3}]", "rewards.0.options", "must be a mapping"),
        ("[{name: count}]", "rewards.0.options.number", "is required."),
        ("[jpeg]", "rewards.0", "must be a mapping"),
    ],
)
def test_wrong_rewards_are_refused(tmp_path: Path, registry: Registry, terms: str, key: str, message: str) -> None:
    base = MINIMAL.replace("rewards:\n  - {name: jpeg}\n", f"rewards: {terms}\n")
    found = problems(tmp_path, registry, base=base)
    assert list(found) == [key]
    assert message in found[key]


def test_a_negative_weight_and_a_qualified_name_are_fine(tmp_path: Path, registry: Registry) -> None:
    config = load(tmp_path, registry, "", ["rewards.0={name: alignprop-fake/jpeg, weight: -2, label: null}"])
    assert (config.rewards[0].weight, config.rewards[0].label) == (-2.0, "jpeg")


def test_sections_built_in_python_are_checked_alike() -> None:
    assert BackpropConfig(strategy="last_k", k=3).k == 3
    assert RewardTerm(name="a/b").label == "b"
    with pytest.raises(ValidationError, match="strategy full does not use it"):
        BackpropConfig(strategy="full", k=3)


# -- overrides and paths ----------------------------------------------------------------------------------------


def test_overrides_set_keys_lists_and_new_sections(tmp_path: Path, registry: Registry) -> None:
    config = load(
        tmp_path,
        registry,
        overrides=[
            "training.steps=20",
            "--optimizer.learning_rate=1e-4",
            "rewards.0.weight=2",
            "rewards.1.name=count",
            "rewards.1.options.number=3",
            "sampling.negative_prompt=a=b",
            "save.every=",
        ],
    )
    assert (config.training.steps, config.optimizer.learning_rate, config.save.every) == (20, 1e-4, None)
    assert [(term.name, term.weight) for term in config.rewards] == [("jpeg", 2.0), ("count", 1.0)]
    assert config.rewards[1].options == {"number": 3}
    assert config.sampling.negative_prompt == "a=b"


def test_wrong_overrides_are_answered(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            registry,
            overrides=["training.steps", "rewards.x=1", "rewards.7=1", "output.x=1", "a..b=1", "a=["],
        )
    lines = str(caught.value).split("\n")
    assert lines[0] == 'override "training.steps": write key.path=value, such as training.steps=20.'
    assert lines[1] == 'override "rewards.x=1": rewards is a list: write an index 0, or 1 to append, where it says x.'
    assert "index 0, or 1 to append," in lines[2]
    assert "output is a single value" in lines[3]
    assert "write key.path=value" in lines[4]
    assert "not valid YAML" in lines[5]


def test_an_overridden_key_is_reported_as_such(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"training\.stpes \(from the command line\): unknown key"):
        load(tmp_path, registry, overrides=["training.stpes=3"])


def test_paths_start_at_the_configs_folder_and_the_output_where_one_stands(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (there / "my_model").mkdir(parents=True)
    (there / "w.safetensors").touch()
    monkeypatch.chdir(here)
    base = """\
model: {base: my_model, vae: madebyollin/sdxl-vae, loras: [{path: ../a.safetensors}]}
prompts: {train: p.txt, heldout: starter/animals}
lora: {init_from: ./run}
rewards:
  - {name: jpeg, options: {weights: w.safetensors}}
output: runs/first
"""
    config = load(there, registry, base=base)
    assert config.model.base == str(there / "my_model")
    assert config.model.vae == "madebyollin/sdxl-vae"
    assert config.model.loras[0].path == str(tmp_path / "a.safetensors")
    assert (config.prompts.train, config.prompts.heldout) == (str(there / "p.txt"), "starter/animals")
    assert config.lora.init_from == str(there / "run")
    assert config.rewards[0].options["weights"] == str(there / "w.safetensors")
    assert config.output == str(here / "runs" / "first")
    (here / "runs" / "before").mkdir(parents=True)
    assert load(there, registry, base=base.replace("./run", "runs/before")).lora.init_from == str(here / "runs/before")
    given = load(there, registry, base=base, overrides=["prompts.train=q.txt", "model.base=owner/name", "output=o"])
    assert (given.prompts.train, given.output) == (str(here / "q.txt"), str(here / "o"))
    assert given.model.base == "owner/name"


def test_load_config_takes_data_and_leaves_it_alone(registry: Registry) -> None:
    data: dict[str, Any] = read_yaml(MINIMAL, "text")[0]
    before = repr(data)
    config = load_config(data, ["training.steps=1"], registry=registry)
    assert config.training.steps == 1
    assert repr(data) == before
    with pytest.raises(ConfigError, match=r"^lr: unknown key"):
        load_config({**data, "lr": 1}, registry=registry)


# -- the schema -------------------------------------------------------------------------------------------------


def test_the_schema_is_valid_and_agrees_with_loading(tmp_path: Path, registry: Registry) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(registry)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = read_yaml(MINIMAL, "text")[0]
    assert validator.is_valid(good)
    assert validator.is_valid(read_yaml(resolved_yaml(load(tmp_path, registry)), "text")[0])
    for terms in (
        [{"name": "jpeg", "options": {"quality": 96}}],
        [{"name": "alignprop-fake/jpeg", "options": {"qualty": 3}}],
        [{"name": "jpeg_bytes"}],
        [{"name": "diversity"}],
        [{"name": "no_such_reward"}],
        [{"name": "count"}],
        [{"name": "count", "options": {}}],
        [],
    ):
        assert not validator.is_valid({**good, "rewards": terms}), terms
    assert validator.is_valid({**good, "rewards": [{"name": "count", "options": {"number": 3}}]})
    assert validator.is_valid({**good, "evaluation": {"rewards": [{"name": "jpeg_bytes"}]}})
    assert not validator.is_valid({**good, "lr": 1})
    assert not validator.is_valid({**good, "sampling": {"steps": 0}})


def test_every_field_of_the_schema_is_described(registry: Registry) -> None:
    schema = json_schema(registry)
    missing = [
        f"{section}.{name}"
        for section, definition in schema["$defs"].items()
        for name, field in definition.get("properties", {}).items()
        if not field.get("description")
    ]
    assert missing == []


def test_a_broken_options_class_leaves_the_rest_of_the_schema() -> None:
    class Broken:
        @hookimpl
        def alignprop_register_rewards(self) -> list[RewardSpec]:
            return [RewardSpec(name="broken", summary="s", factory="a:B", config="no_such_module_here:Options")]

    rules = json_schema(Registry.from_plugins({"x": Broken()}))["$defs"]["RewardTerm"]["allOf"]
    assert "cannot be imported" in rules[0]["then"]["$comment"]


def test_importing_the_config_imports_no_torch() -> None:
    code = "import sys, alignprop_core.config.load, alignprop_core.prompts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
