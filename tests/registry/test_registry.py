"""The registry: one broken plugin never stops another, and every error names the plugin it belongs to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignprop_core.errors import ConfigError, PluginError, RewardError, WeightsError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.discovery import PluginRecord
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import ModelSpec, PromptSpec, RewardConfig, RewardSpec, WeightsSpec
from tests.support.fake_plugins import HEAD, install, reward_spec, rewards_hook


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where fake distributions can be installed; what they import is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ALIGNPROP_PLUGINS", raising=False)
    monkeypatch.delenv("ALIGNPROP_BLOCK_PLUGINS", raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]


def discover(**environment: str) -> Registry:
    return Registry.discover(environment)


def record(registry: Registry, distribution: str) -> PluginRecord:
    (found,) = (r for r in registry.plugins if r.distribution == distribution)
    return found


BROKEN: dict[str, tuple[dict[str, object], str, str]] = {
    "import-error": ({"module": "import no_such_module_here"}, "failed", "No module named 'no_such_module_here'"),
    "syntax-error": ({"module": "def"}, "failed", "SyntaxError"),
    "sys-exit": ({"module": "import sys; sys.exit(3)"}, "failed", "sys.exit(3)"),
    "hook-raises": ({"module": rewards_hook("raise RuntimeError('boom')")}, "failed", "RuntimeError: boom"),
    "hook-exits": ({"module": rewards_hook("raise SystemExit(4)")}, "failed", "sys.exit(4)"),
    "late-error": (
        {"module": rewards_hook(f"yield {reward_spec('late', 'fake_late')}\nraise OSError('late')")},
        "failed",
        "OSError: late",
    ),
    "wrong-type": ({"module": rewards_hook("return ['redness']")}, "failed", "returned str at index 0"),
    "one-spec": ({"module": rewards_hook(f"return {reward_spec('one', 'x')}")}, "failed", "must return a list of"),
    "nothing": ({"module": rewards_hook("return None")}, "failed", "alignprop_register_rewards returned NoneType"),
    "bad-spec": ({"module": rewards_hook("return [RewardSpec(name='Bad Name')]")}, "failed", "ValidationError"),
    "new-api": (
        {"module": rewards_hook(f"return [{reward_spec('new', 'x', 'api_version=2')}]")},
        "incompatible",
        "written for plugin API 2, this core knows 1 to 1",
    ),
    "new-core": (
        {"module": "raise AssertionError", "requires": ("torch", "alignprop_core (>=7)")},
        "incompatible",
        "it requires alignprop-core>=7, installed is",
    ),
    "bad-range": (
        {"module": "raise AssertionError", "requires": ("alignprop-core >>> 7",)},
        "incompatible",
        "cannot be read",
    ),
    "no-module": ({"entry_points": "[alignprop]\nmain = not a module!\n"}, "failed", "invalid entry point"),
    "no-value": ({"entry_points": "[alignprop]\nmain\n"}, "failed", "invalid entry point"),
    "no-attribute": ({"entry_points": "[alignprop]\nmain = fake_no_attribute:nothing\n"}, "failed", "AttributeError"),
    "hook-arguments": (
        {"module": f"{HEAD}@hookimpl\ndef alignprop_register_rewards(surprise):\n    return []\n"},
        "failed",
        "PluginValidationError",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_reported_and_stops_no_other(site: Path, kind: str) -> None:
    arguments, status, message = BROKEN[kind]
    install(site, f"fake-{kind}", **arguments)  # type: ignore[arg-type]
    install(site, "fake-works")
    registry = discover()
    broken = record(registry, f"fake-{kind}")
    assert (broken.status, broken.version) == (status, "1.2")
    assert broken.error is not None
    assert message in broken.error
    assert broken.offers == {}
    assert record(registry, "fake-works").status == "loaded"
    assert registry.reward("fake_works").distribution == "fake-works"


def test_all_broken_plugins_together_leave_the_working_one(site: Path) -> None:
    for kind, (arguments, _, _) in BROKEN.items():
        install(site, f"fake-{kind}", **arguments)  # type: ignore[arg-type]
    install(site, "fake-works")
    ours = [r for r in discover().plugins if r.distribution.startswith("fake-")]
    assert len(ours) == len(BROKEN) + 1
    assert [r.distribution for r in ours if r.status == "loaded"] == ["fake-works"]


@pytest.mark.parametrize("metadata", [None, "", "Name: fake-torn\n"])
def test_a_torn_installation_is_reported_and_not_imported(site: Path, metadata: str | None) -> None:
    install(site, "fake-torn", "raise AssertionError('imported')")
    install(site, "fake-works")
    file = site / "fake_torn-1.2.dist-info" / "METADATA"
    file.unlink()
    if metadata is not None:
        file.write_text(metadata)
    registry = discover(ALIGNPROP_PLUGINS="fake-works")
    (torn,) = (r for r in registry.plugins if "torn" in r.distribution)
    assert torn.status in ("failed", "not allowed")
    assert "fake_torn" not in sys.modules
    assert record(registry, "fake-works").status == "loaded"


def test_a_traceback_has_only_frames_of_the_plugin(site: Path) -> None:
    install(site, "fake-raises", rewards_hook("raise RuntimeError('boom')"))
    shown = record(discover(), "fake-raises").traceback or ""
    assert "fake_raises" in shown
    assert "RuntimeError: boom" in shown
    assert "discovery.py" not in shown


def test_keyboard_interrupt_is_not_caught(site: Path) -> None:
    install(site, "fake-interrupt", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


def test_the_block_list_acts_before_import(site: Path) -> None:
    install(site, "fake-blocked", "raise AssertionError('imported')")
    found = record(discover(ALIGNPROP_BLOCK_PLUGINS="other, Fake_Blocked"), "fake-blocked")
    assert found.status == "blocked"
    assert "ALIGNPROP_BLOCK_PLUGINS" in str(found.error)
    assert "fake_blocked" not in sys.modules


def test_the_allow_list_acts_before_import(site: Path) -> None:
    install(site, "fake-stranger", "raise AssertionError('imported')")
    install(site, "fake-works")
    registry = discover(ALIGNPROP_PLUGINS="FAKE.works")
    assert record(registry, "fake-stranger").status == "not allowed"
    assert record(registry, "fake-works").status == "loaded"
    assert "fake_stranger" not in sys.modules


def test_an_empty_allow_list_allows_none(site: Path) -> None:
    install(site, "fake-works")
    assert record(discover(ALIGNPROP_PLUGINS=""), "fake-works").status == "not allowed"


def test_the_block_list_wins_over_the_allow_list(site: Path) -> None:
    install(site, "fake-works")
    both = discover(ALIGNPROP_PLUGINS="fake-works", ALIGNPROP_BLOCK_PLUGINS="fake-works")
    assert record(both, "fake-works").status == "blocked"


def test_a_requirement_of_an_extra_does_not_count(site: Path) -> None:
    install(site, "fake-works", requires=('alignprop-core>=7; extra == "future"', "alignprop-core"))
    assert record(discover(), "fake-works").status == "loaded"


def test_a_distribution_on_the_path_twice_counts_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = site / "older"
    older.mkdir()
    install(older, "fake-works", version="0.9")
    install(site, "fake-works", version="1.0")
    monkeypatch.syspath_prepend(str(older))
    monkeypatch.syspath_prepend(str(site))
    assert record(discover(), "fake-works").version == "1.0"


def test_output_on_import_is_caught_and_reported(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = "print('HELLO')\n" + rewards_hook(f"print('AGAIN'); return [{reward_spec('loud', 'fake_loud')}]")
    install(site, "fake-loud", loud)
    found = record(discover(), "fake-loud")
    assert found.status == "loaded"
    assert 'prints when imported ("HELLO")' in found.warnings[0]
    assert capsys.readouterr().out == ""


def test_an_unknown_hook_is_reported_with_the_nearest_name(site: Path) -> None:
    install(site, "fake-typo", f"{HEAD}@hookimpl\ndef alignprop_register_reward():\n    return []\n")
    found = record(discover(), "fake-typo")
    assert found.status == "loaded"
    assert found.warnings == (
        'unknown hook alignprop_register_reward, not called. Did you mean "alignprop_register_rewards"?',
    )


def test_a_hook_without_hookimpl_is_reported(site: Path) -> None:
    install(site, "fake-unmarked", "def alignprop_register_rewards():\n    return []\n")
    assert "is not marked with @hookimpl" in record(discover(), "fake-unmarked").warnings[0]


def test_lazy_names_of_a_hook_module_stay_lazy(site: Path) -> None:
    lazy = "\ndef __dir__():\n    return ['Heavy', 'alignprop_register_rewards']\n"
    lazy += "\ndef __getattr__(name):\n    raise AssertionError(name + ' was touched')\n"
    install(site, "fake-lazy", rewards_hook(f"return [{reward_spec('lazy', 'fake_lazy')}]") + lazy)
    assert record(discover(), "fake-lazy").status == "loaded"


def test_a_plugin_may_specify_a_hook_that_another_implements(site: Path) -> None:
    source = "from alignprop_core.hookspecs import hookspec\n"
    source += "@hookspec\ndef alignprop_register_detectors():\n    'Detectors.'\n"
    install(site, "fake-z-specifies", source)
    install(site, "fake-a-gives", f"{HEAD}@hookimpl\ndef alignprop_register_detectors():\n    return ['eye']\n")
    registry = discover()
    assert record(registry, "fake-a-gives").warnings == ()
    (offer,) = registry.offered("alignprop_register_detectors", str)
    assert (offer.spec, offer.distribution) == ("eye", "fake-a-gives")


# -- by name ----------------------------------------------------------------------------------------------------


def test_a_name_of_two_distributions_is_a_conflict_that_names_both(site: Path) -> None:
    for name in ("fake-one", "fake-two"):
        install(site, name, rewards_hook(f"return [{reward_spec('redness', name.replace('-', '_'))}]"))
    registry = discover()
    with pytest.raises(
        PluginError, match=r"fake-one 1\.2 and fake-two 1\.2.*\"fake-one/redness\" or \"fake-two/redness\""
    ):
        registry.reward("redness")
    assert registry.reward("fake-two/redness").distribution == "fake-two"
    assert registry.reward("Fake_Two/redness").distribution == "fake-two"


def test_an_unknown_name_gets_the_nearest_and_the_broken_plugins(site: Path) -> None:
    install(site, "fake-works")
    install(site, "fake-broken", "import no_such_module_here")
    with pytest.raises(PluginError) as caught:
        discover().reward("fake_wroks")
    assert 'Did you mean "fake_works"?' in str(caught.value)
    assert "fake-broken (failed: ModuleNotFoundError: No module named 'no_such_module_here')" in str(caught.value)
    assert caught.value.exit_code == 2


class _Plugin:
    """A plugin as an object, for `Registry.from_plugins`."""

    @hookimpl
    def alignprop_register_models(self) -> list[ModelSpec]:
        return [ModelSpec(name="starter", summary="s", path="owner/name")]

    @hookimpl
    def alignprop_register_prompts(self) -> list[PromptSpec]:
        return [PromptSpec(name="starter/animals", summary="s", path="pkg:animals.txt")]

    @hookimpl
    def alignprop_register_weights(self) -> list[WeightsSpec]:
        return [
            WeightsSpec(name="starter", summary="s", reward=reward, path=f"pkg:{reward}.safetensors")
            for reward in ("hps", "aesthetic")
        ]


def test_names_with_a_slash_of_their_own_can_be_qualified() -> None:
    registry = Registry.from_plugins({"alignprop-starter": _Plugin()})
    assert registry.prompt_set("starter/animals") == registry.prompt_set("alignprop-starter/starter/animals")
    assert registry.find_prompt_set("animals") is None
    twice = Registry.from_plugins({"one": _Plugin(), "two": _Plugin()})
    with pytest.raises(PluginError, match="one/starter/animals"):
        twice.find_prompt_set("starter/animals")


def test_models_and_weights_are_found_by_name() -> None:
    registry = Registry.from_plugins({"alignprop-starter": _Plugin()})
    assert registry.model("starter").full_name == "alignprop-starter/starter"
    assert registry.find_model("runwayml/stable-diffusion-v1-5") is None
    assert registry.weights_for("hps", "starter").spec.path == "pkg:hps.safetensors"
    with pytest.raises(PluginError, match=r'offers the "hps" weights named "startr".*Did you mean "starter"'):
        registry.weights_for("hps", "startr")


# -- options and rewards ----------------------------------------------------------------------------------------


def test_options_are_checked_by_the_plugins_own_class(site: Path) -> None:
    install(site, "fake-works")
    registry = discover()
    options = registry.reward_options("fake_works", {"size": [4, 2]})
    assert options.model_dump() == {"quality": 95, "size": (4, 2), "weights": None}
    with pytest.raises(ConfigError) as caught:
        registry.reward_options(
            "fake_works", {"qualty": 3, "size": [True, 2], "quality": 200}, where="rewards.0.options"
        )
    assert str(caught.value).split("\n") == [
        "rewards.0.options.quality: must be at most 95, not 200.",
        "rewards.0.options.size.0: must be a whole number, not true.",
        "rewards.0.options.qualty: unknown key. Did you mean rewards.0.options.quality?",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "options class fake_broken.config:Options does not exist"),
        ("class Options: pass", "is the class Options; it must be a subclass of alignprop_core.RewardConfig"),
        ("Options = 3", "is of type int"),
        ("import no_such_module_here", "cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit", "cannot be imported: it called sys.exit"),
    ],
)
def test_a_bad_options_class_is_named(site: Path, config: str, message: str) -> None:
    install(site, "fake-broken", config=config)
    with pytest.raises(PluginError) as caught:
        discover().reward_config_class("fake_broken")
    assert message in str(caught.value)
    assert 'Reward "fake_broken" of fake-broken 1.2' in str(caught.value)


def test_a_reward_is_built_frozen_with_its_options(site: Path) -> None:
    torch = pytest.importorskip("torch")
    source = "import torch\nfrom alignprop_core.reward import Reward\nclass Fake(Reward):\n"
    source += "    def __init__(self, config):\n        super().__init__(config)\n        print('building')\n"
    source += "        self.layer = torch.nn.Linear(2, 2)\n    def score(self, batch):\n        return batch.images\n"
    install(site, "fake-works", reward=source)
    reward = discover().load_reward("fake_works", {"quality": 7})
    assert reward.config.model_dump()["quality"] == 7
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not reward.training
    assert isinstance(reward, torch.nn.Module)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("", PluginError, "its class fake_broken.reward:Fake does not exist"),
        ("class Fake: pass", PluginError, "must be a subclass of alignprop_core.Reward"),
        ("import no_such_module_here", PluginError, "No module named 'no_such_module_here'"),
        (
            "from alignprop_core.reward import Reward\nclass Fake(Reward):\n"
            "    def __init__(self, config): raise KeyError('weights')\n    def score(self, batch): ...",
            RewardError,
            "it could not be built: KeyError: 'weights'",
        ),
        (
            "from alignprop_core.reward import Reward\nclass Fake(Reward): pass",
            RewardError,
            "abstract class Fake",
        ),
        (
            "from alignprop_core.reward import Reward\nfrom alignprop_core.errors import WeightsError\n"
            "class Fake(Reward):\n    def __init__(self, config): raise WeightsError('no file w')\n"
            "    def score(self, batch): ...",
            WeightsError,
            "no file w",
        ),
    ],
)
def test_a_reward_that_cannot_load_is_reported(site: Path, reward: str, error: type[Exception], message: str) -> None:
    install(site, "fake-broken", reward=reward)
    registry = discover()
    with pytest.raises(error) as caught:
        registry.load_reward("fake_broken")
    assert message in str(caught.value)
    if "KeyError" in message:
        notes = "".join(caught.value.__notes__)
        assert "fake_broken" in notes
        assert "registry.py" not in notes


def test_from_plugins_looks_at_nothing_installed(site: Path) -> None:
    install(site, "fake-works")
    module = SimpleNamespace()
    registry = Registry.from_plugins({"mine": module})
    assert [r.distribution for r in registry.plugins] == ["mine"]
    assert registry.rewards() == ()


def test_discovery_and_options_import_no_torch_and_no_reward(site: Path) -> None:
    install(site, "fake-works")
    code = (
        "import sys; from alignprop_core.registry.registry import default_registry as d; r = d();"
        "r.reward_options('fake_works', {}); assert 'fake_works.reward' not in sys.modules;"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(site)}, timeout=60)


def test_an_offer_knows_its_distribution() -> None:
    class Redness:
        @hookimpl
        def alignprop_register_rewards(self) -> list[RewardSpec]:
            return [RewardSpec(name="redness", summary="s", factory="a:B", config="alignprop_core.specs:RewardConfig")]

    registry = Registry.from_plugins({"my-rewards": Redness()})
    (offer,) = registry.rewards()
    assert (offer.name, offer.full_name, offer.version) == ("redness", "my-rewards/redness", "0")
    assert registry.reward_config_class("redness") is RewardConfig
