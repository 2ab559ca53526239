"""`alignprop rewards`: the rewards of the installed plugins, and how each is used."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import typer

from alignprop_core.cli import common

if TYPE_CHECKING:
    from alignprop_core.cli.options import Option
    from alignprop_core.registry import Offer
    from alignprop_core.specs import RewardSpec, WeightsFile

app = typer.Typer(help="The installed rewards.", no_args_is_help=True)


@app.command("list")
def list_rewards(json: bool = common.JSON_OPTION) -> None:
    """List the installed rewards."""
    from alignprop_core.registry import default_registry

    registry = default_registry()
    offers = sorted(registry.rewards(), key=lambda offer: offer.full_name.rpartition("/")[::-1])
    count = Counter(offer.name for offer in offers)
    if json:
        common.print_json([_as_json(offer, count[offer.name] > 1) for offer in offers])
    elif not offers:
        typer.echo("No plugin that offers rewards is installed. Try: pip install alignprop-jpeg")
    else:
        rows = []
        for offer in offers:
            # Where two distributions offer a name, only the full name means one of them.
            name = offer.full_name if count[offer.name] > 1 else offer.name
            spec = offer.spec
            summary = spec.summary if _trains(spec) else f"{spec.summary} (evaluation only)"
            rows.append([name, offer.distribution, _range(spec), summary])
        common.print_table(["reward", "plugin", "usual scores", "what it measures"], rows)
    common.note_broken_plugins(registry)


@app.command("show")
def show(name: str = typer.Argument(help="A reward's name."), json: bool = common.JSON_OPTION) -> None:
    """Show a reward: what it measures, its options, weights and licences, and YAML to paste into a run config."""
    from alignprop_core.cli.options import options_of
    from alignprop_core.registry import default_registry

    registry = default_registry()
    offer = registry.reward(name)
    kind = registry.reward_config_class(name)
    options = options_of(kind)
    if json:
        data = _as_json(offer, False)
        del data["conflict"]
        data["options"] = [option.as_json() for option in options]
        common.print_json({**data, "options_schema": kind.model_json_schema(), "yaml": snippet(name, offer, options)})
        return
    spec = offer.spec
    sets = [offered.name for offered in registry.weights() if offered.spec.reward == spec.name]
    facts = [
        ("plugin", f"{offer.distribution} {offer.version}"),
        ("usual scores", _range(spec)),
        ("gradient", "yes" if spec.differentiable else "no: for evaluation only"),
        ("reads prompts", "yes" if spec.needs_prompts else "no"),
        ("compares", "the samples of a batch: for evaluation only" if spec.scope == "batch" else ""),
        ("evaluated with", ", ".join(spec.evaluate_with)),
        ("licence", spec.license),
        ("source", spec.source),
        ("citation", spec.citation),
        *(("weights", _weights(file)) for file in spec.weights),
        ("weight sets", ", ".join(sets)),
    ]
    out = common.console()
    out.print(spec.name, style="bold", end="")
    out.print(f": {spec.summary}\n")
    common.print_facts([(label, text) for label, text in facts if text])
    if options:
        rows = [[o.name, o.type, o.default_text, o.limits, o.description] for o in options]
        common.print_table(["option", "type", "default", "range", "what it does"], rows)
    else:
        out.print("\n  It has no options.")
    out.print("\nIn a run config:\n")
    typer.echo(snippet(name, offer, options))


def snippet(name: str, offer: Offer[RewardSpec], options: list[Option]) -> str:
    """Return YAML that uses a reward with its defaults, ready to paste into a run config."""
    indent = "" if _trains(offer.spec) else "  "
    lines = ["rewards:", f"  - name: {name}"]
    if _trains(offer.spec):
        lines.append("    weight: 1.0")
    if options:
        lines.append("    options:")
        lines += [f"      {option.yaml_line()}" for option in options]
    head = [] if _trains(offer.spec) else ["evaluation:"]
    return "\n".join([*head, *(indent + line for line in lines)])


def _trains(spec: RewardSpec) -> bool:
    return spec.differentiable and spec.scope == "sample"


def _range(spec: RewardSpec) -> str:
    if spec.typical_range is None:
        return spec.unit
    low, high = spec.typical_range
    return f"{low:g} to {high:g} {spec.unit}".rstrip()


def _weights(file: WeightsFile) -> str:
    size = "" if file.bytes is None else f", {file.bytes / 1e6:,.1f} MB"
    licence = f", {file.license}" if file.license else ""
    digest = f", sha256 {file.sha256}" if file.sha256 else ""
    return f"{file.repository + '/' if file.repository else ''}{file.file}{size}{licence}{digest}"


def _as_json(offer: Offer[RewardSpec], conflict: bool) -> dict[str, Any]:
    spec = offer.spec.model_dump(mode="json")
    source = {"distribution": offer.distribution, "version": offer.version, "full_name": offer.full_name}
    return {"name": spec.pop("name"), **source, "conflict": conflict, **spec}
