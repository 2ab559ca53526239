"""`alignprop rewards`: the rewards of the installed plugins, and how each is used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alignprop_core.cli import common, reward_check, reward_new
from alignprop_core.cli.extensions import ExtensibleGroup

if TYPE_CHECKING:
    from alignprop_core.cli.options import Option
    from alignprop_core.registry.offers import Offer
    from alignprop_core.specs import RewardSpec, WeightsFile
    from alignprop_core.weights import Fetched

app = typer.Typer(cls=ExtensibleGroup, help="The installed rewards.", no_args_is_help=True)
app.command("check")(reward_check.check)
app.command("new")(reward_new.new)


@app.command("list")
def list_rewards(json: bool = common.JSON_OPTION) -> None:
    """List the installed rewards."""
    from alignprop_core.registry.registry import default_registry

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
    from alignprop_core.registry.registry import default_registry

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


@app.command("fetch")
def fetch(
    name: str = typer.Argument(help="A reward's name, or one file of the hub: hub:owner/name/file."),
    file: str = typer.Option("", help="Only this one of the reward's files."),
    to: Path | None = typer.Option(
        None, help="Folder to put them in, as OWNER--NAME/FILE, instead of the hub's cache."
    ),
    json: bool = common.JSON_OPTION,
) -> None:
    """Download and verify a reward's weights.

    A broken download is gone on with, and nothing incomplete or damaged ever stands under a file's name.
    """
    common.quiet_libraries()
    wanted = _files_of(name, file)
    got = [_fetch_one(wanted_file, to) for wanted_file in wanted]
    if json:
        common.print_json([_fetched_json(one) for one in got])
        return
    if not got:
        typer.echo(f"{name} has no weights of its own: nothing to fetch.")
        return
    words = {"fetched": "fetched", "present": "here already", "packaged": "ships in an installed package"}
    checks = {
        "sha256": "sha256 verified",
        "size": "size verified",
        "": "not verified: the hub did not say what it should be",
    }
    for one in got:
        # Plain lines: a path that is folded into a table cannot be copied.
        typer.echo(_weights(one.file))
        typer.echo(f"  {words[one.status]}: {one.path} ({checks[one.verified]})")
        if to is not None and one.status != "packaged":
            typer.echo(f"  name it in the option: {one.path}")


def _files_of(name: str, only: str) -> list[WeightsFile]:
    """Return the files a reward may load, or the one a hub: name means."""
    from alignprop_core.errors import WeightsError, did_you_mean
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
        raise WeightsError(f'Reward "{name}" has no weights file "{only}".{hint} It has: {known}.')
    return found


def _fetch_one(file: WeightsFile, to: Path | None) -> Fetched:
    """Fetch one file; a progress bar stands on standard error where that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from alignprop_core.weights import fetch_weights

    out = common.console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(file.file, total=file.bytes)
        return fetch_weights(
            file, folder=to, progress=lambda done, total: bar.update(task, completed=done, total=total or file.bytes)
        )


def _fetched_json(fetched: Fetched) -> dict[str, Any]:
    known = fetched.file.model_dump(mode="json")
    return {**known, "path": str(fetched.path), "status": fetched.status, "verified": fetched.verified}


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
