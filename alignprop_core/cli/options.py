"""Describe a reward's options for `rewards show`: type, default, limits, description and a line of YAML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from alignprop_core.config.yaml import dump_yaml
from alignprop_core.specs import RewardConfig

_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "pattern": "matching {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}

_PAIRS = {
    ("minimum", "maximum"): "{} to {}",
    ("minLength", "maxLength"): "{} to {} characters",
    ("minItems", "maxItems"): "{} to {} items",
}
"""Limits that are written together if both are set."""


@dataclass(frozen=True)
class Option:
    """One option of a reward."""

    name: str
    type: str
    required: bool
    default: Any
    description: str
    limits: str

    @property
    def default_text(self) -> str:
        """The default as written in a run config."""
        return "(required)" if self.required else _inline(self.default)

    def yaml_line(self) -> str:
        """Return `name: default  # description`."""
        words = " ".join(part for part in (self.description, f"({self.limits})" if self.limits else "") if part)
        value = "" if self.required else f" {_inline(self.default)}"
        comment = "  # " + ("required: " if self.required else "") + words if words or self.required else ""
        return f"{self.name}:{value}{comment}"


def options_of(kind: type[RewardConfig]) -> list[Option]:
    """Return the options of a reward, from the JSON Schema of its options class."""
    schema = kind.model_json_schema()
    definitions = schema.get("$defs", {})
    required = set(schema.get("required", ()))
    return [
        Option(
            name=name,
            type=_type(field, definitions),
            required=name in required,
            default=field.get("default"),
            description=" ".join(str(field.get("description", "")).split()),
            limits=_limits(field),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        field = {**definitions.get(str(field["$ref"]).rpartition("/")[2], {})}
    if "enum" in field:
        return " or ".join(_inline(value) for value in field["enum"])
    if "const" in field:
        return _inline(field["const"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part, definitions) for part in field["anyOf"]))
    if field.get("type") == "array":
        items = field.get("items")
        return f"list of {_type(items, definitions)}" if isinstance(items, dict) else "list"
    kind = str(field.get("type", "any value"))
    return {"boolean": "true or false", "object": "mapping"}.get(kind, kind)


def _limits(field: dict[str, Any]) -> str:
    found: list[str] = []
    for part in (field, *field.get("anyOf", ())):
        paired: set[str] = set()
        for (low, high), words in _PAIRS.items():
            if low in part and high in part:
                words = words.replace("{} to {}", "exactly {}") if part[low] == part[high] else words
                found.append(words.format(_shown(part[low]), _shown(part[high])))
                paired |= {low, high}
        found += [
            words.format(_shown(part[key])) for key, words in _LIMITS.items() if key in part and key not in paired
        ]
    return ", ".join(text.replace(" 1 items", " 1 item").replace(" 1 characters", " 1 character") for text in found)


def _shown(limit: object) -> str:
    return f"{limit:g}" if isinstance(limit, (int, float)) else str(limit)


def _inline(value: object) -> str:
    """Return a value as one line of YAML; lists and mappings as JSON, which is valid YAML."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return dump_yaml(value).removesuffix("\n").removesuffix("\n...")
