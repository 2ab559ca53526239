"""Commands of plugins: in the help, imported only when they run, and no conflict or fault affects another command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from alignprop_core import cli
from alignprop_core.registry.registry import Registry
from tests.support.fake_plugins import HEAD, install
from tests.support.processes import command_line

COMMANDS = '''\
import sys

import typer

print("the command module is imported", file=sys.stderr)


def shout(word: str = typer.Argument(help="What to print."), times: int = typer.Option(1, help="How often.")) -> None:
    """Print a word in capitals, or fail."""
    if word == "fail":
        raise ValueError("nothing to shout")
    typer.echo(" ".join([word.upper()] * times))
'''


def hook(*specs: str) -> str:
    """Return a hook module that offers commands: `path=package.module:function`."""
    offered = []
    for spec in specs:
        path, _, factory = spec.partition("=")
        offered.append(f'CommandSpec(path="{path}", summary="Summary of {path}.", factory="{factory}")')
    return f"{HEAD}@hookimpl\ndef alignprop_register_commands():\n    return [{', '.join(offered)}]\n"


def plugin(site: Path, name: str, *paths: str) -> None:
    """Install a distribution that offers the same function under several paths."""
    factory = f"{name.replace('-', '_')}.commands:shout"
    install(site, name, hook(*(f"{path}={factory}" for path in paths)), files={"commands.py": COMMANDS})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def alignprop(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with the fake distributions of a folder."""
    variables = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200", "NO_COLOR": "1", **environment}
    return command_line(arguments, variables, strict=True)


def test_a_plugins_commands_are_in_the_help_and_run(site: Path) -> None:
    plugin(site, "fake-shouter", "shout", "rewards shout", "zoo feed")
    for group, name, line in (
        ([], "shout", "Summary of shout."),
        ([], "zoo", "Commands of fake-shouter."),
        (["rewards"], "shout", "Summary of rewards shout."),
        (["zoo"], "feed", "Summary of zoo feed."),
    ):
        listed = alignprop(site, *group, "--help")
        assert listed.returncode == 0, listed.stderr
        assert any(name in row and line in row for row in listed.stdout.splitlines())
        assert listed.stderr == "", "no module of a command is imported for a listing"
    for words in (["shout"], ["rewards", "shout"], ["zoo", "feed"]):
        done = alignprop(site, *words, "hello", "--times", "2")
        assert (done.returncode, done.stdout) == (0, "HELLO HELLO\n")
    own = alignprop(site, "shout", "-h")
    assert "What to print." in own.stdout
    assert "alignprop shout" in own.stdout


def test_a_new_group_may_have_a_summary(site: Path) -> None:
    rest = 'summary="Go.", group_summary="The animals.", factory="fake_zoo.commands:shout"'
    specs = [f'CommandSpec(path="zoo {name}", {rest})' for name in ("feed", "wash")]
    code = f"{HEAD}@hookimpl\ndef alignprop_register_commands():\n    return [{', '.join(specs)}]\n"
    install(site, "fake-zoo", code, files={"commands.py": COMMANDS})
    assert any("zoo" in row and "The animals." in row for row in alignprop(site, "--help").stdout.splitlines())
    assert "The animals." in alignprop(site, "zoo", "--help").stdout


def test_a_command_may_be_an_app(site: Path) -> None:
    """So that a command can have a command class of its own."""
    app = "\n\napp = typer.Typer(add_completion=False)\napp.command('other')(shout)\n"
    install(site, "fake-app", hook("shout=fake_app.commands:app"), files={"commands.py": COMMANDS + app})
    assert alignprop(site, "shout", "hello", "--times", "2").stdout == "HELLO HELLO\n"
    own = alignprop(site, "shout", "--help").stdout
    assert "alignprop shout" in own
    assert "What to print." in own


def test_wrong_arguments_and_typos_are_answered_as_for_the_cores_commands(site: Path) -> None:
    plugin(site, "fake-shouter", "shout")
    wrong = alignprop(site, "shout", "hello", "--times", "many")
    assert wrong.returncode == 2
    assert "See `alignprop shout --help`." in wrong.stderr
    typo = alignprop(site, "shuot")
    assert typo.returncode == 2
    assert "Did you mean 'shout'?" in typo.stderr


def test_a_plugins_commands_are_in_the_list_of_plugins(site: Path) -> None:
    plugin(site, "fake-shouter", "shout")
    assert "commands: shout" in alignprop(site, "plugins").stdout


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("fake_broken.missing:shout", "No module named 'fake_broken.missing'"),
        ("fake_broken.commands:whisper", "has no whisper"),
        ("fake_broken.raising:shout", "RuntimeError: no license key"),
        ("fake_broken.wrong:shout", "is not a command function"),
    ],
)
def test_a_command_that_cannot_be_imported_names_its_plugin(site: Path, factory: str, message: str) -> None:
    files = {
        "commands.py": COMMANDS,
        "raising.py": "raise RuntimeError('no license key')\n",
        "wrong.py": "shout = 3\n",
    }
    install(site, "fake-broken", hook(f"shout={factory}"), files=files)
    assert alignprop(site, "--help").returncode == 0
    for arguments in (["shout", "hello"], ["shout", "--help"]):
        done = alignprop(site, *arguments)
        assert done.returncode == 2
        assert done.stderr.count("error: ") == 1
        assert 'Command "shout" of fake-broken 1.2' in done.stderr
        assert message in done.stderr


def test_a_path_of_two_plugins_is_an_error_that_names_both(site: Path) -> None:
    plugin(site, "fake-one", "shout", "one")
    plugin(site, "fake-two", "shout", "two", "one more")
    done = alignprop(site, "shout", "hello")
    assert done.returncode == 2
    for name in ("fake-one 1.2", "fake-two 1.2", "ALIGNPROP_BLOCK_PLUGINS"):
        assert name in done.stderr
    assert alignprop(site, "two", "hello").stdout == "HELLO\n", "its other commands are unaffected"
    assert alignprop(site, "one", "hello").returncode == 2, "a command and a group cannot share a name"
    for listing in ("--help", "plugins"):
        listed = alignprop(site, listing)
        assert listed.returncode == 0
        for path in ("shout", "one"):
            assert f'error: The command "{path}" is offered by fake-one 1.2 and fake-two 1.2.' in listed.stderr
    one = alignprop(site, "shout", "hello", ALIGNPROP_BLOCK_PLUGINS="fake-two")
    assert one.stdout == "HELLO\n"


def test_a_path_of_the_core_stays_the_cores(site: Path) -> None:
    plugin(site, "fake-thief", "train", "rewards list", "doctor now", "shout")
    assert "RUN" in alignprop(site, "train", "--help").stdout.upper()
    assert alignprop(site, "rewards", "list", "--json").stdout.startswith("[")
    listed = alignprop(site, "--help")
    for path in ("train", "rewards list", "doctor now"):
        assert f'The command "{path}" of fake-thief 1.2 is not available: alignprop-core has' in listed.stderr
    assert alignprop(site, "shout", "hello").stdout == "HELLO\n"


def test_an_unexpected_error_of_a_command_is_one_message(site: Path) -> None:
    plugin(site, "fake-shouter", "shout")
    done = alignprop(site, "shout", "fail")
    assert done.returncode == 1
    assert "ValueError: nothing to shout" in done.stderr
    assert "Traceback" not in done.stderr


LORA = [["lora"], ["lora", "--help"], *(["lora", name, "x"] for name in ("info", "convert", "scale", "merge", "fuse"))]


@pytest.mark.parametrize(
    ("words", "distribution"),
    [
        (["report", "runs/x"], "alignprop-report"),
        (["evaluate", "runs/x"], "alignprop-evaluation"),
        (["rewards", "isolate"], "alignprop-isolation"),
        (["rewards", "new"], "alignprop-template"),
        (["demo", "training.steps=1"], "alignprop-starter"),
        *((words, "alignprop-lora") for words in LORA),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_well_known_command_that_is_missing_names_what_to_install(
    words: list[str], distribution: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alignprop_core.registry.registry.default_registry", lambda: Registry([]))
    assert cli.run(words) == 2
    path = " ".join(word for word in words[:2] if word.isalpha())
    assert capsys.readouterr().err == (
        f"error: The command `alignprop {path}` is in the distribution {distribution}, which is not installed. "
        f"Install it: pip install {distribution}\n"
    )


@pytest.mark.parametrize(("earlier", "today"), [("mix", "merge"), ("bake", "fuse")])
def test_an_earlier_name_is_answered_with_todays_also_where_the_group_is_not_installed(
    earlier: str, today: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alignprop_core.registry.registry.default_registry", lambda: Registry([]))
    assert cli.run(["lora", earlier, "a", "b"]) == 2
    assert capsys.readouterr().err == f"error: `alignprop lora {earlier}` is now `alignprop lora {today}`.\n"


def test_another_plugins_command_in_a_group_hides_neither_what_to_install_nor_earlier_names(site: Path) -> None:
    plugin(site, "fake-shouter", "lora shout")
    environment = {"ALIGNPROP_PLUGINS": "fake-shouter"}
    assert alignprop(site, "lora", "shout", "hello", **environment).stdout == "HELLO\n"
    missing = alignprop(site, "lora", "info", "x", **environment)
    assert missing.returncode == 2
    assert "The command `alignprop lora info` is in the distribution alignprop-lora, which is not" in missing.stderr
    assert "is now `alignprop lora merge`" in alignprop(site, "lora", "mix", "a", **environment).stderr


def test_a_well_known_command_of_a_blocked_plugin_says_that_it_is_blocked(site: Path) -> None:
    done = alignprop(site, "report", "runs/x", ALIGNPROP_BLOCK_PLUGINS="alignprop-report")
    assert done.returncode == 2
    assert "which is not loaded (blocked: listed in ALIGNPROP_BLOCK_PLUGINS)" in done.stderr
