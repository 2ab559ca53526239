"""The registry: looks up by name what plugins offer. Imports no torch.

A name offered by two distributions is an error that names both; `distribution/name` chooses. Code behind a spec is
imported only when it is used, and what a plugin raises becomes one error with the plugin's own traceback.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from alignprop_core.errors import AlignpropError, PluginError, RewardError, did_you_mean, under
from alignprop_core.registry.discovery import (
    BLOCK_VARIABLE,
    SPEC_OF_HOOK,
    Candidate,
    PluginRecord,
    installed,
    load_all,
)
from alignprop_core.registry.guard import PluginFailure, guarded_as
from alignprop_core.registry.licenses import LicensePolicy
from alignprop_core.registry.loaders import DISTRIBUTION_OF, RewardLoader, RewardSource
from alignprop_core.registry.local import LocalReward, from_file, given_reward
from alignprop_core.registry.offers import Offer, belongs, conflict, matching
from alignprop_core.specs import (
    CallbackSpec,
    CommandSpec,
    FamilySpec,
    LoaderSpec,
    ModelSpec,
    PromptSpec,
    RewardConfig,
    RewardSpec,
    WeightsSpec,
)

if TYPE_CHECKING:
    from alignprop_core.reward import Reward

__all__ = ["Offer", "PluginRecord", "Registry", "default_registry", "load_object"]

S = TypeVar("S")
T = TypeVar("T")
C = TypeVar("C")
M = TypeVar("M", bound=BaseModel)

_HOOK_OF_SPEC = {spec: hook for hook, spec in SPEC_OF_HOOK.items()}


class Registry:
    """The plugins of this environment and what they offer.

    Attributes:
        plugins: a record of every plugin found, loaded or not, in the order of their names.
        given: rewards passed from Python, by name.
        licenses: the licenses that rewards of plugins may have.
    """

    def __init__(
        self,
        plugins: Iterable[PluginRecord],
        given: Mapping[str, LocalReward] | None = None,
        *,
        licenses: LicensePolicy | None = None,
    ) -> None:
        self.plugins = tuple(sorted(plugins, key=lambda record: record.name))
        self.given = dict(given or {})
        self.licenses = licenses or LicensePolicy()

    @classmethod
    def discover(cls, environment: Mapping[str, str] | None = None) -> Registry:
        """Find and load the installed plugins.

        Args:
            environment: where `ALIGNPROP_PLUGINS`, `ALIGNPROP_BLOCK_PLUGINS` and `ALIGNPROP_ALLOW_LICENSES` are
                read; `os.environ` if None.
        """
        environment = os.environ if environment is None else environment
        return cls(load_all(installed(environment)), licenses=LicensePolicy.read(environment))

    @classmethod
    def from_plugins(cls, plugins: Mapping[str, object]) -> Registry:
        """Build a registry from objects with hooks, by distribution name; ignores what is installed. For tests."""
        return cls(load_all(Candidate(name, "0", "given", partial(_given, p)) for name, p in plugins.items()))

    def with_rewards(self, rewards: Mapping[str, object]) -> Registry:
        """Return a registry that also knows rewards passed from Python, by name: functions, classes or objects.

        Raises:
            PluginError: a name is taken by a plugin's reward or is not snake_case, or a value is not a reward.
        """
        found = dict(self.given)
        for name, code in rewards.items():
            with under(f'rewards["{name}"]'):
                if offers := matching(name, self.rewards()):
                    raise PluginError(
                        f'{offers[0].distribution} offers a reward of the name "{name}"; rename this one, or give it '
                        f'a label: {{"name": ..., "label": "my_{name}"}}.'
                    )
                found[name] = given_reward(name, code)
        return Registry(self.plugins, found, licenses=self.licenses)

    def local(self, name: str) -> LocalReward | None:
        """Return a reward passed from Python or in a Python file (which is executed); None for other names."""
        return self.given.get(name) or from_file(name)

    # -- offers -------------------------------------------------------------------------------------------------

    def offered(self, hook: str, kind: type[S]) -> tuple[Offer[S], ...]:
        """Return what all plugins returned from a hook, which a plugin may have specified.

        Args:
            hook: the hook's name.
            kind: offers of other types are left out.
        """
        return tuple(
            Offer(spec, record.distribution, record.version)
            for record in self.plugins
            for spec in record.offers.get(hook, ())
            if isinstance(spec, kind)
        )

    def rewards(self) -> tuple[Offer[RewardSpec], ...]:
        """Return the rewards of all plugins."""
        return self._all(RewardSpec)

    def models(self) -> tuple[Offer[ModelSpec], ...]:
        """Return the base models of all plugins."""
        return self._all(ModelSpec)

    def families(self) -> tuple[Offer[FamilySpec], ...]:
        """Return the pipeline families of all plugins."""
        return self._all(FamilySpec)

    def prompts(self) -> tuple[Offer[PromptSpec], ...]:
        """Return the prompt sets of all plugins."""
        return self._all(PromptSpec)

    def weights(self) -> tuple[Offer[WeightsSpec], ...]:
        """Return the named weight sets of all plugins."""
        return self._all(WeightsSpec)

    def callbacks(self) -> tuple[Offer[CallbackSpec], ...]:
        """Return the callbacks of all plugins."""
        return self._all(CallbackSpec)

    def commands(self) -> tuple[Offer[CommandSpec], ...]:
        """Return the commands of all plugins."""
        return self._all(CommandSpec)

    def loaders(self) -> tuple[Offer[LoaderSpec], ...]:
        """Return the loaders of all plugins: keys of reward entries, such as `isolation`."""
        return self._all(LoaderSpec)

    def _all(self, kind: type[S]) -> tuple[Offer[S], ...]:
        return self.offered(_HOOK_OF_SPEC[kind], kind)  # type: ignore[index]

    # -- by name ------------------------------------------------------------------------------------------------

    def reward(self, name: str) -> Offer[RewardSpec]:
        """Find a reward; `PluginError` if no plugin or more than one offers it."""
        local = self.local(name)
        return local.offer if local is not None else self._one("reward", name, self.rewards())

    def model(self, name: str) -> Offer[ModelSpec]:
        """Find a base model; `PluginError` if no plugin or more than one offers it."""
        return self._one("model", name, self.models())

    def find_model(self, name: str) -> Offer[ModelSpec] | None:
        """Find a base model, or None if no plugin offers it; `PluginError` if two do."""
        return self._one("model", name, self.models()) if matching(name, self.models()) else None

    def prompt_set(self, name: str) -> Offer[PromptSpec]:
        """Find a prompt set; `PluginError` if no plugin or more than one offers it."""
        return self._one("prompt set", name, self.prompts())

    def find_prompt_set(self, name: str) -> Offer[PromptSpec] | None:
        """Find a prompt set, or None if no plugin offers it; `PluginError` if two do."""
        return self._one("prompt set", name, self.prompts()) if matching(name, self.prompts()) else None

    def callback(self, name: str) -> Offer[CallbackSpec]:
        """Find a callback; `PluginError` if no plugin or more than one offers it."""
        return self._one("callback", name, self.callbacks())

    def weights_for(self, reward: str, name: str) -> Offer[WeightsSpec]:
        """Find the set of weights `name` for a reward; `PluginError` if no plugin or more than one offers it.

        A set's own name may be shared by several rewards; only the sets for this reward are searched.
        """
        offers = tuple(o for o in self.weights() if o.spec.reward == reward.rpartition("/")[2])
        return self._one(f'"{reward}" weights named', name, offers)

    def _one(self, what: str, name: str, offers: tuple[Offer[S], ...]) -> Offer[S]:
        found = matching(name, offers)
        if len(found) == 1:
            return found[0]
        if found:
            raise PluginError(conflict(what, name, found))
        raise PluginError(self._unknown(what, name, offers))

    def _unknown(self, what: str, name: str, offers: tuple[Offer[S], ...]) -> str:
        known = sorted({offer.name for offer in offers} | (self.given.keys() if what == "reward" else set()))
        if what == "reward" and name.endswith(".py"):
            return f"{name}: add the name of a function or class: {name}:NAME."
        message = f'No installed plugin offers the {what} "{name}".'
        nearest = did_you_mean(name.rpartition("/")[2], known) or did_you_mean(name, known)
        every = f" There are: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}."
        message += nearest or (every if known else "")
        if broken := [record for record in self.plugins if record.status != "loaded"]:
            listed = "; ".join(f"{r.distribution} ({r.status}: {r.error})" for r in broken[:5])
            message += f" It may belong to an installed plugin that is not loaded: {listed}."
        if what == "reward":
            message += " `alignprop rewards list` lists the installed rewards; `pip install` adds more."
        return message

    def missing(self, what: str, home: str) -> PluginError:
        """Return the error for a missing name whose distribution, `home`, is known."""
        record = next((record for record in self.plugins if record.distribution == home), None)
        if record is None:
            reason = f"which is not installed. Install it: pip install {home}"
        elif record.status != "loaded":
            reason = f"which is not loaded ({record.status}: {record.error})."
        else:
            reason = f"but version {record.version} does not have it. Upgrade it: pip install -U {home}"
        return PluginError(f"{what} is in the distribution {home}, {reason}")

    # -- loaders ------------------------------------------------------------------------------------------------

    def loader(self, key: str) -> Offer[LoaderSpec]:
        """Find the loader of a reward-entry key; `PluginError` if no plugin or more than one offers it."""
        found = [offer for offer in self.loaders() if offer.name == key]
        if not found and key in DISTRIBUTION_OF:
            raise self.missing(f'The key "{key}"', DISTRIBUTION_OF[key])
        if not found:
            raise PluginError(f'No installed plugin offers the key "{key}" of reward entries.')
        if len(found) > 1:
            names = " and ".join(f"{offer.distribution} {offer.version}" for offer in found)
            raise PluginError(f'The key "{key}" is offered by {names}. Keep one out with {BLOCK_VARIABLE}.')
        return found[0]

    def loader_keys(self) -> set[str]:
        """Return the keys of reward entries that loaders have, installed or well known."""
        return {offer.name for offer in self.loaders()} | DISTRIBUTION_OF.keys()

    def loader_config_class(self, key: str) -> type[BaseModel]:
        """Import the config class of a loader, and not the loader; `PluginError` if it is missing or no such class."""
        offer = self.loader(key)
        return load_class(offer, offer.spec.config, "config class", BaseModel)

    def loader_config(self, key: str, value: object) -> BaseModel:
        """Check the value under a loader's key with the loader's config class.

        Raises:
            InvalidConfig: with one problem for every wrong key.
            PluginError: the loader or its config class is not available.
        """
        kind = self.loader_config_class(key)
        return value if isinstance(value, kind) else _validate(self.loader(key), kind, value, key)

    def source(self, loader: tuple[str, BaseModel] | None) -> RewardSource:
        """Return the source of an entry's reward: its loader, or this registry if the entry has none.

        Args:
            loader: key and config, as `RewardTerm.loader` gives them.
        """
        return self if loader is None else self.reward_loader(*loader)

    def reward_loader(self, key: str, config: BaseModel) -> RewardLoader:
        """Import and build a loader; `PluginError` if that fails."""
        offer = self.loader(key)
        factory: Any = load_object(offer, offer.spec.factory, "factory")
        found = build(offer, partial(factory, config, self), PluginError)
        if not isinstance(found, RewardLoader):
            raise PluginError(
                f"{belongs(offer)}: {offer.spec.factory} returned an object {_kind(found)} that is not a "
                "`RewardLoader`. Report this to the plugin's authors."
            )
        return found

    # -- rewards ------------------------------------------------------------------------------------------------

    def reward_config_class(self, name: str) -> type[RewardConfig]:
        """Import the options class of a reward, and not the reward; `PluginError` if it is missing or no such class."""
        local = self.local(name)
        if local is not None:
            return local.kind.Config
        offer = self.reward(name)
        # A plugin may contain rewards with other licenses than its own; the spec's is checked before their code loads.
        if offer.spec.license and (problem := self.licenses.problem(offer.spec.license)):
            raise PluginError(f"{belongs(offer)} may not be used here: {problem}.")
        return load_class(offer, offer.spec.config, "options class", RewardConfig)

    def option_names(self, name: str) -> frozenset[str]:
        """Return the names of a reward's options."""
        return frozenset(self.reward_config_class(name).model_fields)

    def reward_options(
        self, name: str, options: Mapping[str, Any] | None = None, *, where: str = "options"
    ) -> RewardConfig:
        """Check options with the reward's own options class.

        Args:
            name: the reward.
            options: its options; omitted ones take their defaults.
            where: key of the options in the run config, for messages.

        Raises:
            ConfigError: with one line for every wrong key.
            PluginError: the reward or its options class is not available.
        """
        kind = self.reward_config_class(name)
        given = self.given.get(name)
        if given is not None and given.given is not None:
            return _own_options(name, given.given, options or {}, where)
        return _validate(self.reward(name), kind, dict(options or {}), where)

    def load_reward(self, name: str, options: Mapping[str, Any] | RewardConfig | None = None) -> Reward:
        """Import a reward, build it with its options and freeze it. Imports torch.

        Raises:
            PluginError: the reward is unknown or its code cannot be imported.
            ConfigError: the options are wrong.
            RewardError: building it failed (or its own error, such as `WeightsError`).
        """
        local = self.local(name)
        offer = self.reward(name)
        self.reward_config_class(name)  # it checks the license, also for options that are checked already
        config = options if isinstance(options, RewardConfig) else self.reward_options(name, options)
        if local is not None and local.given is not None:
            return local.given.freeze()
        from alignprop_core.reward import Reward

        kind = local.kind if local is not None else load_class(offer, offer.spec.factory, "class", Reward)  # type: ignore[type-abstract]
        reward = build(offer, lambda: kind(config).freeze(), RewardError)
        if not isinstance(reward, Reward):
            raise PluginError(f"{belongs(offer)}: its freeze() must return the reward itself.")
        return reward


@cache
def default_registry() -> Registry:
    """Return the registry of this environment; plugins are discovered once per process."""
    return Registry.discover()


def _given(plugin: object) -> object:
    return plugin


def load_object(offer: Offer[Any], path: str, what: str) -> object:
    """Import `package.module:Name` of an offer; `PluginError` with the plugin's own traceback if that fails."""
    module_name, _, attribute = path.partition(":")
    with guarded_as(
        lambda failure: PluginError(
            f"{belongs(offer)}: its {what} {path} cannot be imported: {failure}. Repair or reinstall "
            f"{offer.distribution}, or keep it out with {BLOCK_VARIABLE}={offer.distribution}."
        )
    ):
        found: object = getattr(import_module(module_name), attribute, None)
    if found is None:
        raise PluginError(
            f"{belongs(offer)}: its {what} {path} does not exist (the module has no {attribute}). Report this to the "
            "plugin's authors."
        )
    return found


def load_class(offer: Offer[Any], path: str, what: str, base: type[C]) -> type[C]:
    """Import a subclass of `base` that an offer names."""
    found = load_object(offer, path, what)
    if isinstance(found, type) and issubclass(found, base):
        return found
    expected = f"{base.__module__.partition('.')[0]}.{base.__name__}"
    raise PluginError(
        f"{belongs(offer)}: its {what} {path} is {_kind(found)}; it must be a subclass of {expected}. Report this to "
        "the plugin's authors."
    )


def _validate(offer: Offer[Any], kind: type[M], value: object, where: str) -> M:
    """Check a value with a plugin's own pydantic class; `where` is its key, for messages."""
    from alignprop_core.validation import explain, invalid

    def failed(failure: PluginFailure) -> PluginError:
        return PluginError(f"{belongs(offer)}: checking its options failed: {failure}.")

    try:
        with guarded_as(failed, passes=ValidationError):
            # Strict, as the rest of the config is: true is not 1 and "95" is not 95. As JSON, because only there does
            # pydantic's strict mode accept a list for a tuple or a string for a path.
            return kind.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise invalid(explain(error, kind, where), where) from error


def build(offer: Offer[Any], factory: Callable[[], T], error: type[AlignpropError]) -> T:
    """Call a plugin's factory; its own `AlignpropError`s pass, everything else becomes `error`."""
    with guarded_as(lambda why: error(f"{belongs(offer)}: it could not be built: {why}."), passes=AlignpropError):
        return factory()


def _own_options(name: str, reward: Reward, options: Mapping[str, Any], where: str) -> RewardConfig:
    """Return the options a reward object has; a config may repeat them and not change them."""
    from alignprop_core.validation import Problem, invalid

    own = reward.config.model_dump(mode="json")
    problems = [
        Problem((key,), f'"{name}" was passed from Python with its options; there it is {own.get(key, "unknown")!r}.')
        for key, value in options.items()
        if key not in own or own[key] != value
    ]
    if problems:
        raise invalid(problems, where)
    return reward.config


def _kind(found: object) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
