"""The command `alignprop`, with one module per command group. Heavy packages are imported only inside commands.

To add a command, import it and register it below; plugins use `alignprop_register_commands`. Commands raise
`AlignpropError`; `run` prints it as one message and returns an exit code: 0 success, 1 the run failed, 2 the user's
input is wrong, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from alignprop_core import __version__
from alignprop_core.cli import doctor, plugins, rewards, sample, schema, score, train
from alignprop_core.cli.extensions import ExtensibleGroup
from alignprop_core.errors import AlignpropError

INTERRUPTED = 130
"""Exit code of Ctrl-C."""

app = typer.Typer(
    name="alignprop",
    cls=ExtensibleGroup,
    help="Fine-tune text-to-image diffusion models on differentiable rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's help imports a Markdown parser, for 0.2 s
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("score")(score.score)
app.add_typer(rewards.app, name="rewards")
app.command("plugins")(plugins.plugins)
app.command("schema")(schema.schema)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alignprop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_print_version),
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of errors; can be given anywhere. Also ALIGNPROP_DEBUG=1."
    ),
) -> None:
    """Fine-tune text-to-image diffusion models on differentiable rewards."""
    gc.enable()


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; every error becomes one message on standard error."""
    arguments = list(arguments)
    debug = os.environ.get("ALIGNPROP_DEBUG", "") not in ("", "0")
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in words:
        debug = True
        arguments.remove("--debug")
    try:
        code = app(args=arguments, prog_name="alignprop", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has exited; buffered output must not raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, debug)
    if code == INTERRUPTED:  # typer answers Ctrl-C with this code and no word
        print("\ninterrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _report(error: Exception, debug: bool) -> int:
    """Print one message for an error and return the exit code."""
    if isinstance(error, AlignpropError):
        print(f"error: {error}", file=sys.stderr)
        # The traceback of the plugin's own code, which its author needs to fix it.
        for note in () if debug else getattr(error, "__notes__", ()):
            print(f"\n{note.rstrip()}", file=sys.stderr)
        return error.exit_code
    usage = getattr(error, "format_message", None)
    if callable(usage):
        # A usage error of click, which some versions of typer bundle under a private name.
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "alignprop"
        if message := str(usage()):  # empty if the help was printed instead
            hint = _key_hint(context, str(getattr(error, "option_name", "")).lstrip("-"))
            if hint:
                # Not click's own guess, which names an option that looks alike.
                message = message.partition(" (")[0].partition(" Did you")[0]
            end = "" if message.endswith((".", "?")) else "."
            print(f"error: {message}{end}{hint} See `{command} --help`.", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}", file=sys.stderr)
        return 1
    if type(error).__name__ == "OutOfMemoryError":
        print(
            "error: the device ran out of memory. Set backprop.checkpoint_blocks=true and "
            "backprop.checkpoint_decoder=true, and lower backprop.sample_batch_size and backprop.decode_batch_size; "
            "none of these changes the result. On a CPU, set backprop.checkpoint_steps=true as well.",
            file=sys.stderr,
        )
        return 1
    text = f"{type(error).__name__}: {error}"
    hint = "" if debug else " Run it again with --debug for the traceback."
    print(f"error: unexpected {text}\nThis is a bug in alignprop or in a plugin.{hint}", file=sys.stderr)
    return 1


def _key_hint(context: Any, option: str) -> str:
    """Return which key of the run config an unknown option means and how to set it; empty if it means none."""
    if context is None or not any(parameter.name == "overrides" for parameter in context.command.params):
        return ""
    from alignprop_core.config.sections import RunConfig
    from alignprop_core.validation import unknown_key

    hint = unknown_key(tuple(option.replace("-", "_").split(".")), RunConfig).removeprefix("unknown key.")
    keys = " Write KEY=VALUE without dashes to change a key of the run config."
    return "" if "Valid keys:" in hint or not hint else hint + keys


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print a warning as one line, without its source location."""
    name = "" if category is UserWarning else f" ({category.__name__})"
    print(f"warning{name}: {message}", file=sys.stderr)


def _open_closed_streams() -> None:
    """Open standard streams that the caller has closed, or the next files opened would get their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def main() -> None:
    """Run the command `alignprop` and exit."""
    _open_closed_streams()
    warnings.showwarning = _show_warning
    # Until a command runs: a tenth of the time of `--help` would go into collecting what imports create and keep.
    gc.disable()
    # Nothing here uses plugins of pydantic, and its search reads the metadata of every installed distribution.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))
