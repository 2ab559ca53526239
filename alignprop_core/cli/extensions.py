"""Commands of plugins. They are listed in the help and imported only when they run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from alignprop_core.cli import common
from alignprop_core.errors import PluginError, UserError

if TYPE_CHECKING:
    from alignprop_core.registry.offers import Offer
    from alignprop_core.registry.registry import Registry
    from alignprop_core.specs import CommandSpec

DISTRIBUTION_OF = {
    "demo": "alignprop-starter",
    "evaluate": "alignprop-evaluation",
    "lora": "alignprop-lora",
    "lora info": "alignprop-lora",
    "lora convert": "alignprop-lora",
    "lora scale": "alignprop-lora",
    "lora merge": "alignprop-lora",
    "lora fuse": "alignprop-lora",
    "report": "alignprop-report",
    "rewards isolate": "alignprop-isolation",
    "rewards new": "alignprop-template",
}
"""Well-known commands of plugins: where one is missing, the error names the distribution to install."""

RENAMED = {"lora mix": "lora merge", "lora bake": "lora fuse"}
"""Earlier names of commands -> names of today."""


class ExtensibleGroup(TyperGroup):
    """A command group that plugins can extend; it looks up plugins only for its help and for unknown commands."""

    _joined = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, those of plugins last; report conflicts on standard error."""
        from alignprop_core.registry.registry import default_registry

        if ctx.parent is None and not self._joined:
            for problem in problems(default_registry(), self):
                common.note(f"error: {problem}")
        self._join(ctx)
        return super().list_commands(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their summaries in full; click's own table cuts them to one line."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in commands])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or None if there is no command of that name."""
        if cmd_name not in self.commands:
            self._join(ctx)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments name.

        Raises:
            PluginError: the command is in a well-known distribution that is not installed or not loaded.
            UserError: the command has another name today.
        """
        if self.get_command(ctx, args[0]) is None:
            from alignprop_core.registry.registry import default_registry

            before = _words(ctx)
            # With the next word first: it may be a command of a group that is missing.
            for path in (" ".join([*before, *args[:2]]), " ".join([*before, args[0]])):
                if path in RENAMED:
                    raise UserError(f"`alignprop {path}` is now `alignprop {RENAMED[path]}`.")
                if path in DISTRIBUTION_OF:
                    raise default_registry().missing(f"The command `alignprop {path}`", DISTRIBUTION_OF[path])
        return super().resolve_command(ctx, args)

    def _join(self, ctx: Any) -> None:
        """Add the plugins' commands without importing them."""
        from alignprop_core.registry.registry import default_registry

        if self._joined:
            return
        self._joined = True
        before = _words(ctx)
        found: dict[str, list[Offer[CommandSpec]]] = {}
        for offer in default_registry().commands():
            words = offer.spec.path.split()
            if words[: len(before)] == before and len(words) > len(before) and words[len(before)] not in self.commands:
                found.setdefault(words[len(before)], []).append(offer)
        for name, offers in sorted(found.items()):
            depth = {len(offer.spec.path.split()) for offer in offers}
            if depth == {len(before) + 1} or len(depth) > 1:
                self.add_command(LazyCommand(name, offers))
            else:
                text = f"Commands of {' and '.join(dict.fromkeys(offer.distribution for offer in offers))}."
                text = next((offer.spec.group_summary for offer in offers if offer.spec.group_summary), text)
                self.add_command(ExtensibleGroup(name=name, help=text, no_args_is_help=True, rich_markup_mode=None))


class LazyCommand(TyperCommand):
    """A plugin's command, imported when it runs or shows its own help.

    Args:
        name: last word of the command's path.
        offers: the plugins' commands with that path; with more than one, running the command is an error.
    """

    def __init__(self, name: str, offers: list[Offer[CommandSpec]]) -> None:
        self.offers = offers
        text = offers[0].spec.summary if len(offers) == 1 else f"Not available: {_conflict(offers)}"
        super().__init__(name, help=text)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and parse its arguments."""
        return self.load().make_context(info_name, args, parent=parent, **extra)

    def load(self) -> Any:
        """Import the command.

        Raises:
            PluginError: several plugins offer the command, it cannot be imported, or it is not a command function.
        """
        from alignprop_core.registry.guard import guarded_as
        from alignprop_core.registry.offers import belongs
        from alignprop_core.registry.registry import load_object

        if len(self.offers) > 1:
            raise PluginError(_conflict(self.offers))
        (offer,) = self.offers
        found: Any = load_object(offer, offer.spec.factory, "function")
        odd = f"{belongs(offer)}: {offer.spec.factory} is not a command function"
        with guarded_as(lambda failure: PluginError(f"{odd}: {failure}.")):
            if isinstance(found, typer.Typer):
                return typer.main.get_command(found)
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(self.name)(found)
            return typer.main.get_command(app)


def problems(registry: Registry, core: TyperGroup) -> Iterator[str]:
    """Yield one sentence per command that is not available because the core or another plugin has the same path."""
    free = []
    for offer in registry.commands():
        words = offer.spec.path.split()
        place: Any = core.commands.get(words[0])
        if isinstance(place, TyperGroup) and len(words) > 1:
            place = place.commands.get(words[1])
        if place is None:
            free.append(offer)
        else:
            name = f"{offer.distribution} {offer.version}"
            yield f'The command "{offer.spec.path}" of {name} is not available: alignprop-core has a command there.'
    for path in sorted({offer.spec.path for offer in free}):
        same = [offer for offer in free if offer.spec.path == path]
        inside = [offer for offer in free if offer.spec.path.startswith(f"{path} ")]
        if len(same) > 1 or inside:
            yield _conflict([*same, *inside])


def _conflict(offers: list[Offer[CommandSpec]]) -> str:
    from alignprop_core.registry.discovery import BLOCK_VARIABLE

    names = " and ".join(dict.fromkeys(f"{offer.distribution} {offer.version}" for offer in offers))
    path = min((offer.spec.path for offer in offers), key=len)
    return f'The command "{path}" is offered by {names}. Block one of them with {BLOCK_VARIABLE}.'


def _words(ctx: Any) -> list[str]:
    """Return the path of a group as a list of words; empty for the root."""
    words: list[str] = []
    while ctx.parent is not None:
        words.insert(0, ctx.info_name)
        ctx = ctx.parent
    return words
