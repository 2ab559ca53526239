"""The run config as a JSON Schema (draft 2020-12), with the options of the installed rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from pydantic import BaseModel

from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import PluginError
from alignprop_core.registry.offers import Offer, trainable
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import RewardSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a run config.

    Options are checked by the term's `name`. A reward whose options class cannot be imported keeps free options and
    says so in a `$comment`; a name that is not installed is refused, as `load_config` does.
    """
    schema = schema_with_loaders(registry)
    definitions: dict[str, Any] = schema["$defs"]
    term = definitions["RewardTerm"]
    rules: list[dict[str, Any]] = []
    choosable = dict(_choosable(registry))
    for name, offer in choosable.items():
        options = _options(name, offer, registry, definitions)
        rules.append({"if": {"properties": {"name": {"const": name}}, "required": ["name"]}, "then": options})
    if choosable:
        # Or a class in a Python file; which options that takes only running it can say.
        about = term["properties"]["name"]
        about.update(anyOf=[{"enum": list(choosable)}, {"pattern": r"\.py:[A-Za-z_]\w*$"}])
        term["allOf"] = rules
    # Only what has a gradient may stand under `rewards`; everything may under `evaluation.rewards`.
    watched = [name for name, offer in choosable.items() if not trainable(offer.spec)]
    if watched:
        items = schema["properties"]["rewards"]["items"]
        schema["properties"]["rewards"]["items"] = {
            "allOf": [items, {"properties": {"name": {"not": {"enum": watched}}}}],
        }
    return {"$schema": DIALECT, **schema, "title": "alignprop run config"}


def schema_with_loaders(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a run config with the keys of loaders in reward entries, and free options."""
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for definition in (schema, *definitions.values()):
        for field in definition.get("properties", {}).values():
            if "description" in field:  # docstrings, which are wrapped
                field["description"] = " ".join(field["description"].split())
    term = definitions["RewardTerm"]
    count = Counter(offer.name for offer in registry.loaders())
    loaders = {offer.name: offer for offer in registry.loaders() if count[offer.name] == 1}
    for key, offer in loaders.items():
        try:
            name = _add(f"loader__{key}", registry.loader_config_class(key), definitions)
            value: dict[str, Any] = {"$ref": f"#/$defs/{name}"}
        except PluginError as error:
            value = {"type": "object", "$comment": str(error)}
        term["properties"][key] = {
            "anyOf": [value, {"type": "null"}],
            "default": None,
            "description": offer.spec.summary,
        }
    if len(loaders) > 1:
        pairs = [{a: {"type": "object"}, b: {"type": "object"}} for a, b in combinations(sorted(loaders), 2)]
        term["not"] = {"anyOf": [{"properties": pair, "required": list(pair)} for pair in pairs]}
    return schema


def _add(key: str, kind: type[BaseModel], definitions: dict[str, Any]) -> str:
    """Add a model of a plugin, and what it refers to, to the shared definitions under a key; return the key."""
    if key not in definitions:
        own = kind.model_json_schema(ref_template=f"#/$defs/{key}__{{model}}")
        for inner, definition in own.pop("$defs", {}).items():
            definitions[f"{key}__{inner}"] = definition
        definitions[key] = own
    return key


def _choosable(registry: Registry) -> Iterator[tuple[str, Offer[RewardSpec]]]:
    """Yield every name that means exactly one reward."""
    count = Counter(offer.name for offer in registry.rewards())
    for offer in registry.rewards():
        if count[offer.name] == 1:
            yield offer.name, offer
        yield offer.full_name, offer


def _options(name: str, offer: Offer[RewardSpec], registry: Registry, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the rule for a term's options; what the options class refers to goes into the shared definitions."""
    try:
        key = _add(offer.full_name.replace("/", "__"), registry.reward_config_class(name), definitions)
    except PluginError as error:
        return {"$comment": str(error)}
    needed = {"required": ["options"]} if definitions[key].get("required") else {}
    return {"properties": {"options": {"$ref": f"#/$defs/{key}"}}, **needed}
