"""Plugin discovery: reads distribution metadata first, imports late, and isolates every failure. Imports no torch.

pluggy's own loader skips a second distribution with the same entry-point name and stops at the first plugin that
raises, so this module reads the installed distributions itself.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any, Literal

import pluggy
from packaging.specifiers import SpecifierSet

from alignprop_core import __version__, hookspecs, specs
from alignprop_core.errors import did_you_mean
from alignprop_core.registry.guard import PluginFailure, describe, guarded
from alignprop_core.registry.licenses import LicensePolicy, license_of
from alignprop_core.specs import API_VERSION, DEPRECATED_API_VERSIONS, OLDEST_API_VERSION, Spec

CORE = "alignprop-core"
ALLOW_VARIABLE = "ALIGNPROP_PLUGINS"
BLOCK_VARIABLE = "ALIGNPROP_BLOCK_PLUGINS"

SPEC_OF_HOOK: dict[str, type[Spec]] = {
    "alignprop_register_rewards": specs.RewardSpec,
    "alignprop_register_models": specs.ModelSpec,
    "alignprop_register_families": specs.FamilySpec,
    "alignprop_register_prompts": specs.PromptSpec,
    "alignprop_register_weights": specs.WeightsSpec,
    "alignprop_register_callbacks": specs.CallbackSpec,
    "alignprop_register_commands": specs.CommandSpec,
    "alignprop_register_loaders": specs.LoaderSpec,
}
SLOW_IMPORT_SECONDS = 1.0

Status = Literal["loaded", "blocked", "not allowed", "incompatible", "failed"]


@dataclass(frozen=True)
class PluginRecord:
    """One entry point of an installed distribution, and the result of loading it.

    Attributes:
        distribution: normalized distribution name, such as `alignprop-jpeg`.
        version: its version.
        entry_point: the entry point's name; `distribution:entry_point` is the plugin's name.
        status: `loaded`; `blocked` and `not allowed` by the environment, `incompatible` with this core (none of these
            three was imported, except for an API version known only from its specs), or `failed`.
        error: why it is not loaded, in one line.
        traceback: the plugin's own traceback, if it raised.
        warnings: problems of a plugin that works nevertheless.
        offers: what each hook returned, by hook name; empty unless loaded.
        seconds: duration of its import.
        license: SPDX expression from its metadata; empty if there is none.
    """

    distribution: str
    version: str
    entry_point: str
    status: Status
    error: str | None = None
    traceback: str | None = None
    warnings: tuple[str, ...] = ()
    offers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    license: str = ""

    @property
    def name(self) -> str:
        """The plugin's name, `distribution:entry_point`."""
        return f"{self.distribution}:{self.entry_point}"

    def names(self, kind: str) -> tuple[str, ...]:
        """Return the distinct names it offers of a kind such as `rewards`, the last word of a hook's name."""
        return tuple(dict.fromkeys(spec.name for spec in self.offers.get(f"alignprop_register_{kind}", ())))


@dataclass(frozen=True)
class Candidate:
    """A plugin that is not imported yet."""

    distribution: str
    version: str
    entry_point: str
    load: Callable[[], object]
    refused: tuple[Status, str] | None = None
    license: str = ""

    def record(self, status: Status, **facts: Any) -> PluginRecord:
        """Return the record of the result."""
        return PluginRecord(self.distribution, self.version, self.entry_point, status, license=self.license, **facts)


def normalized(name: str) -> str:
    """Return a distribution's normalized name (PEP 503)."""
    # packaging.utils has this too, and imports what a listing has no use for.
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(value: str | None) -> frozenset[str] | None:
    """Return the normalized distribution names of a comma-separated list; None if the variable is not set."""
    if value is None:
        return None
    return frozenset(normalized(name) for name in re.split(r"[,\s]+", value) if name)


def installed(environment: Mapping[str, str]) -> Iterator[Candidate]:
    """Find the plugins among the installed distributions by their metadata; imports none.

    A distribution that is on the path twice counts once, as Python would import it. An allow list that is set and
    empty allows none.
    """
    allowed = names_in(environment.get(ALLOW_VARIABLE))
    blocked = names_in(environment.get(BLOCK_VARIABLE)) or frozenset()
    policy = LicensePolicy.read(environment)
    seen: set[str] = set()
    for distribution in distributions():
        section = _entry_points(distribution)
        if not section:
            continue
        try:
            metadata = distribution.metadata  # parsed anew at each access
            name, version = normalized(metadata["Name"]), str(metadata["Version"])
            requires = metadata.get_all("Requires-Dist") or distribution.requires or ()
            problem = _core_range_problem(metadata["Name"], requires)
            license = license_of(metadata)
            unlicensed = policy.problem(license)
        except Exception as error:
            # Without a name the lists cannot be applied, so it is not imported. A broken install raises many errors.
            broken = f"its metadata cannot be read ({describe(error)}); reinstall it"
            entry, value = section[0]
            yield Candidate(f"unknown ({value})", "?", entry, partial(_load, entry, value), ("failed", broken))
            continue
        if name in seen:
            continue
        seen.add(name)
        refused: tuple[Status, str] | None = None
        if name in blocked:
            refused = "blocked", f"listed in {BLOCK_VARIABLE}"
        elif allowed is not None and name not in allowed:
            refused = "not allowed", f"not listed in {ALLOW_VARIABLE}"
        elif unlicensed:
            refused = "not allowed", unlicensed
        elif problem:
            refused = "incompatible", problem
        for entry, value in section:
            yield Candidate(name, version, entry, partial(_load, entry, value), refused, license)


def _entry_points(distribution: Distribution) -> list[tuple[str, str]]:
    """Read the group's entry points. importlib.metadata's own reader raises at one malformed line."""
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except (OSError, UnicodeDecodeError):
        return []
    found, group = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif group == hookspecs.PROJECT and line and not line.startswith(("#", ";")):
            name, _, value = (part.strip() for part in line.partition("="))
            found.append((name, value))
    return found


def _load(name: str, value: str) -> object:
    if not re.fullmatch(r"[A-Za-z_][\w.]*(\s*:\s*[A-Za-z_][\w.]*)?(\s*\[.*\])?", value):
        raise ValueError(f'invalid entry point "{name} = {value}": it must name a module, such as "my_plugin"')
    return EntryPoint(name, value, hookspecs.PROJECT).load()


def _core_range_problem(distribution: str, requires: Iterable[str]) -> str | None:
    """Return why this core is outside the range that a distribution requires; None if it is inside."""
    for line in requires:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if normalized(name) != CORE:
            continue
        try:
            simple = not re.search(r"[;@\[(]", line)
            versions = SpecifierSet(line.removeprefix(name)) if simple else _versions_here(line)
        except ValueError:
            return f'its requirement "{line}" cannot be read'
        if not versions.contains(__version__, prereleases=True):
            return (
                f"it requires {CORE}{versions}, installed is {__version__}; "
                f"upgrade the older one: pip install -U {CORE} {distribution}"
            )
    return None


def _versions_here(line: str) -> SpecifierSet:
    """Return the versions that a requirement with a marker, an extra or an address allows in this environment."""
    # Imported for these alone: a listing would spend a tenth of its time on the import.
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    return requirement.specifier if applies else SpecifierSet()


class _Hooks(pluggy.PluginManager):
    """pluggy that reads only `alignprop_*` names; reading every name would trigger a module's lazy imports."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name.startswith("alignprop_") else None

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        return super().parse_hookspec_opts(module_or_class, name) if name.startswith("alignprop_") else None


def load_all(candidates: Iterable[Candidate]) -> tuple[PluginRecord, ...]:
    """Import the candidates that are not refused, call their hooks one plugin at a time, and record what happened."""
    hooks = _Hooks(hookspecs.PROJECT)
    hooks.add_hookspecs(hookspecs)
    # All are imported before hooks are called: a plugin may implement a hook that another one specifies.
    imported = [(candidate, _import(hooks, candidate)) for candidate in candidates]
    return tuple(
        found if isinstance(found, PluginRecord) else _call_hooks(hooks, candidate, *found)
        for candidate, found in imported
    )


def _import(hooks: _Hooks, candidate: Candidate) -> PluginRecord | tuple[object, float, list[str]]:
    """Import a plugin; return it with the seconds that took and warnings, or the record of a plugin that fails."""
    if candidate.refused:
        status, error = candidate.refused
        return candidate.record(status, error=error)
    start, had_torch = time.perf_counter(), "torch" in sys.modules
    try:
        with guarded() as printed:
            plugin = candidate.load()
            if any(hooks.parse_hookspec_opts(plugin, name) is not None for name in dir(plugin)):
                hooks.add_hookspecs(plugin)  # type: ignore[arg-type]  # any object with attributes
    except PluginFailure as failure:
        return candidate.record("failed", error=str(failure), traceback=failure.traceback)
    seconds = time.perf_counter() - start
    return plugin, seconds, _import_warnings(printed.getvalue(), seconds, not had_torch and "torch" in sys.modules)


def _import_warnings(printed: str, seconds: float, imported_torch: bool) -> list[str]:
    warnings = []
    if printed.strip():
        warnings.append(f'prints when imported ("{" ".join(printed.split())[:60]}"); the output was suppressed')
    if imported_torch:
        warnings.append("its hook module imports torch; keep torch in the modules that factories name")
    if seconds > SLOW_IMPORT_SECONDS:
        warnings.append(f"its hook module took {seconds:.1f} s to import; keep heavy imports in factory modules")
    return warnings


def _call_hooks(
    hooks: _Hooks, candidate: Candidate, plugin: object, seconds: float, warnings: list[str]
) -> PluginRecord:
    offers: dict[str, tuple[Any, ...]] = {}
    try:
        with guarded():
            hooks.register(plugin, f"{candidate.distribution}:{candidate.entry_point}")
        for caller in hooks.get_hookcallers(plugin) or ():
            implementations = [impl for impl in caller.get_hookimpls() if impl.plugin is plugin]
            if caller.spec is None:
                if not all(impl.optionalhook for impl in implementations):
                    warnings.append(_unknown_hook(caller.name, hooks))
                continue
            for implementation in implementations:
                # _checked() runs inside the guard, because a generator may fail while it is read.
                with guarded():
                    offered = _checked(caller.name, implementation.function())
                offers[caller.name] = offers.get(caller.name, ()) + offered
    except PluginFailure as failure:
        cause = failure.__cause__
        known = isinstance(cause, _WrongOffer)
        return candidate.record(
            "incompatible" if isinstance(cause, _WrongApi) else "failed",
            error=str(cause) if known else str(failure),
            traceback=None if known else failure.traceback,
            warnings=tuple(warnings),
            seconds=seconds,
        )
    versions = {offer.api_version for offered in offers.values() for offer in offered if isinstance(offer, Spec)}
    warnings += [
        f"written for plugin API {version}, which is deprecated: {DEPRECATED_API_VERSIONS[version]}"
        for version in sorted(versions & DEPRECATED_API_VERSIONS.keys())
    ]
    warnings += [
        f"{hook} is not marked with @hookimpl, so it is not called"
        for hook in SPEC_OF_HOOK
        if hook not in offers and hook in dir(plugin) and callable(getattr(plugin, hook))
    ]
    return candidate.record("loaded", warnings=tuple(warnings), offers=offers, seconds=seconds)


class _WrongOffer(Exception):
    """A hook returned something other than specs."""


class _WrongApi(_WrongOffer):
    """A spec was written for another version of the plugin contract."""


def _unknown_hook(name: str, hooks: _Hooks) -> str:
    known = [caller for caller, hook in vars(hooks.hook).items() if getattr(hook, "spec", None) is not None]
    return f"unknown hook {name}, not called.{did_you_mean(name, known)}"


def _checked(hook: str, returned: object) -> tuple[Any, ...]:
    """Return what a hook returned as a tuple, checked against the hook's spec class."""
    kind = SPEC_OF_HOOK.get(hook)
    if returned is None or isinstance(returned, (str, bytes, Mapping, Spec)) or not isinstance(returned, Iterable):
        wanted = kind.__name__ if kind else "offers"
        raise _WrongOffer(f"{hook} returned {type(returned).__name__}; it must return a list of {wanted}")
    offers = tuple(returned)
    if kind is None:
        return offers
    for i, offer in enumerate(offers):
        if not isinstance(offer, kind):
            raise _WrongOffer(f"{hook} returned {type(offer).__name__} at index {i}; it must return {kind.__name__}")
        if not OLDEST_API_VERSION <= offer.api_version <= API_VERSION:
            older = "plugin" if offer.api_version < OLDEST_API_VERSION else "core"
            package = "NAME" if older == "plugin" else CORE
            raise _WrongApi(
                f'{kind.__name__} "{getattr(offer, "name", "?")}" is written for plugin API {offer.api_version}, '
                f"this core knows {OLDEST_API_VERSION} to {API_VERSION}; upgrade the {older}: pip install -U {package}"
            )
    return offers
