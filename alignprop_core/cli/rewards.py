"""`alignprop rewards`: list, show and fetch the rewards of the installed plugins."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alignprop_core.cli import common, reward_check
from alignprop_core.cli.extensions import ExtensibleGroup
from alignprop_core.errors import RewardError, UserError, WeightsError, did_you_mean

if TYPE_CHECKING:
    from alignprop_core.cli.options import Option
    from alignprop_core.registry.offers import Offer
    from alignprop_core.specs import RewardSpec, WeightsFile

_OPTIONS_HELP = "An option; can be repeated. Loads the reward with these options and prints its image preprocessing."

app = typer.Typer(cls=ExtensibleGroup, help="List, show, check, create and fetch rewards.", no_args_is_help=True)
app.command("check")(reward_check.check)


@app.command("list")
def list_rewards(json: bool = common.JSON_OPTION) -> None:
    """List the installed rewards."""
    from alignprop_core.registry.offers import trainable
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    offers = sorted(registry.rewards(), key=lambda offer: offer.full_name.rpartition("/")[::-1])
    count = Counter(offer.name for offer in offers)
    if json:
        common.print_json([_as_json(offer, count[offer.name] > 1) for offer in offers])
    elif not offers:
        typer.echo("No rewards are installed. Rewards are plugins: pip install alignprop-jpeg")
    else:
        rows = []
        for offer in offers:
            # If two distributions offer the same name, only the full name is unambiguous.
            name = offer.full_name if count[offer.name] > 1 else offer.name
            spec = offer.spec
            summary = spec.summary if trainable(spec) else f"{spec.summary} (evaluation only)"
            rows.append([name, offer.distribution, _range(spec), summary])
        common.print_table(["reward", "plugin", "typical range", "description"], rows)
    common.note_broken_plugins(registry)


@app.command("show")
def show(
    name: str = typer.Argument(help="A reward's name."),
    given: list[str] = typer.Option([], "--options", "--option", "-o", metavar="KEY=VALUE", help=_OPTIONS_HELP),
    json: bool = common.JSON_OPTION,
) -> None:
    """Show a reward: what it measures, its options, weights and licenses, and YAML to paste into a run config."""
    from alignprop_core.cli.options import options_of
    from alignprop_core.config.input import apply_overrides
    from alignprop_core.registry.registry import build, default_registry

    registry = default_registry()
    offer = registry.reward(name)
    kind = registry.reward_config_class(name)
    options = options_of(kind)
    preprocessing: dict[str, Any] = {}
    if given:
        common.quiet_libraries()
        reward = registry.load_reward(name, apply_overrides({}, given)[0])
        described = build(offer, lambda: dict(reward.describe_preprocessing()), RewardError)
        preprocessing = described or {"images": "not described by this reward"}
    if json:
        data = _as_json(offer, False) | ({"preprocessing": preprocessing} if given else {})
        del data["conflict"]
        data["options"] = [asdict(option) for option in options]
        common.print_json({**data, "options_schema": kind.model_json_schema(), "yaml": snippet(name, offer, options)})
        return
    spec = offer.spec
    sets = [offered.name for offered in registry.weights() if offered.spec.reward == spec.name]
    facts = [
        ("plugin", f"{offer.distribution} {offer.version}"),
        ("typical range", _range(spec)),
        ("gradient", "yes" if spec.differentiable else "no: for evaluation only"),
        ("reads prompts", "yes" if spec.needs_prompts else "no"),
        ("scope", "batch: for evaluation only" if spec.scope == "batch" else ""),
        ("evaluated with", ", ".join(spec.evaluate_with)),
        ("license", spec.license),
        ("source", spec.source),
        ("citation", spec.citation),
        *(("weights", _weights(file)) for file in spec.weights),
        ("weight sets", ", ".join(sets)),
        *((f"preprocessing: {label}", str(value)) for label, value in preprocessing.items()),
    ]
    out = common.console()
    out.print(spec.name, style="bold", end="")
    out.print(f": {spec.summary}\n")
    common.print_facts([(label, text) for label, text in facts if text])
    if options:
        rows = [[o.name, o.type, o.default_text, o.limits, o.description] for o in options]
        common.print_table(["option", "type", "default", "range", "description"], rows)
    else:
        out.print("\n  No options.")
    out.print("\nIn a run config:\n")
    typer.echo(snippet(name, offer, options))


@app.command("fetch")
def fetch(
    names: list[str] = typer.Argument(
        None,
        metavar="NAME",
        help="Rewards' names, or files on the hub: hub:owner/name/file or hub:owner/name@REVISION/file.",
    ),
    config: Path | None = typer.Option(None, help="A run config: fetch what its rewards need."),
    file: str = typer.Option("", help="Fetch only this file of the reward."),
    to: Path | None = typer.Option(
        None, help="Folder for the files, as OWNER--NAME/FILE; the default is the hub cache."
    ),
    json: bool = common.JSON_OPTION,
) -> None:
    """Download the weights of rewards and verify their checksums.

    Incomplete or damaged files are never stored under a file's final name.
    """
    from alignprop_core.weights import fetch_weights

    wanted = [*(names or []), *(_names_in(config) if config else [])]
    if not (names or config):
        raise UserError("Give the name of a reward, or --config RUN.yaml.")
    fetched = [fetch_weights(one, folder=to) for name in dict.fromkeys(wanted) for one in _files_of(name, file)]
    if json:
        facts = [{"path": one.path, "status": one.status, "verified": one.verified} for one in fetched]
        common.print_json([one.file.model_dump(mode="json") | more for one, more in zip(fetched, facts, strict=True)])
        return
    if not fetched:
        typer.echo(f"{', '.join(wanted) or config}: no weights to fetch.")
    words = {"fetched": "fetched", "present": "already present", "packaged": "ships in an installed package"}
    checks = {"": "not verified: the hub gives no checksum or size"}
    for one in fetched:
        # Not a table: a wrapped path cannot be copied.
        typer.echo(_weights(one.file))
        typer.echo(f"  {words[one.status]}: {one.path} ({checks.get(one.verified, f'{one.verified} verified')})")
        if to is not None and one.status != "packaged":
            typer.echo(f"  use it with the reward's option for weights: {one.path}")


def _names_in(path: Path) -> list[str]:
    """Return the rewards of a run config that use their default weights, and the hub files that its options name."""
    from alignprop_core.config.load import load_config
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.weights.find import HUB

    registry = default_registry()
    settings = load_config(path, registry=registry)
    entries = [entry for entry in (*settings.rewards, *settings.evaluation.rewards) if entry.loader is None]
    entries = [entry for entry in entries if registry.local(entry.name) is None]
    own = [entry.name for entry in entries if entry.options.get("weights", "default") == "default"]
    chosen = [str(entry.options.get("weights")) for entry in entries]
    return [*own, *(name for name in chosen if name.startswith(HUB))]


def _files_of(name: str, only: str) -> list[WeightsFile]:
    """Return the weight files of a reward, or the file of a hub: name."""
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.weights import parse_hub_file

    if name.startswith("hub:"):
        return [parse_hub_file(name)]
    files = list(default_registry().reward(name).spec.weights)
    if not only:
        return files
    found = [file for file in files if file.file == only]
    if not found:
        known = ", ".join(file.file for file in files) or "none"
        hint = did_you_mean(only, (file.file for file in files))
        raise WeightsError(f'Reward "{name}" has no weights file "{only}".{hint} The files are: {known}.')
    return found


def snippet(name: str, offer: Offer[RewardSpec], options: list[Option]) -> str:
    """Return YAML that uses a reward with its default options, to paste into a run config."""
    from alignprop_core.registry.offers import trainable

    trains = trainable(offer.spec)
    indent = "" if trains else "  "
    lines = ["rewards:", f"  - name: {name}", *(["    weight: 1.0"] if trains else [])]
    if options:
        lines += ["    options:", *(f"      {option.yaml_line()}" for option in options)]
    return ("evaluation:\n" if indent else "") + "\n".join(indent + line for line in lines)


def _range(spec: RewardSpec) -> str:
    if spec.typical_range is None:
        return spec.unit
    low, high = spec.typical_range
    return f"{low:g} to {high:g} {spec.unit}".rstrip()


def _weights(file: WeightsFile) -> str:
    size = "" if file.bytes is None else f", {file.bytes / 1e6:,.1f} MB"
    license = f", {file.license}" if file.license else ""
    digest = f", sha256 {file.sha256}" if file.sha256 else ""
    return f"{file.repository + '/' if file.repository else ''}{file.file}{size}{license}{digest}"


def _as_json(offer: Offer[RewardSpec], conflict: bool) -> dict[str, Any]:
    spec = offer.spec.model_dump(mode="json")
    source = {"distribution": offer.distribution, "version": offer.version, "full_name": offer.full_name}
    return {"name": spec.pop("name"), **source, "conflict": conflict, **spec}
