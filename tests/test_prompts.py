"""Prompt sets: what is read, what is skipped, and the line number of what is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from alignprop_core.errors import PluginError, PromptError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.prompts import PromptSet, load_prompts, warn_about
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import PromptSpec


class _Plugin:
    @hookimpl
    def alignprop_register_prompts(self) -> list[PromptSpec]:
        return [
            PromptSpec(name="starter/animals", summary="s", path="fake_prompts:sets/animals.jsonl"),
            PromptSpec(name="starter/missing", summary="s", path="fake_prompts:sets/missing.txt"),
            PromptSpec(name="starter/no_package", summary="s", path="no_such_package_here:a.txt"),
        ]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.from_plugins({"alignprop-starter": _Plugin()})


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path, registry: Registry) -> None:
    source = write(tmp_path, "p.txt", "\ufeffa fox \n\n# animals\n  \r\nthree owls, in a meadow\r\n")
    prompts = load_prompts(source, registry)
    assert prompts.prompts == ("a fox", "three owls, in a meadow")
    assert prompts.metadata == ({}, {})
    assert (len(prompts), prompts.lines, prompts.name) == (2, (1, 5), source)


def test_other_keys_of_a_jsonl_line_are_metadata(tmp_path: Path, registry: Registry) -> None:
    lines = '{"prompt": "three foxes", "number": 3, "tags": ["x"]}\n\n{"prompt": "a\\u2028b \u2029 c"}\n'
    prompts = load_prompts(write(tmp_path, "p.jsonl", lines), registry)
    assert prompts.prompts == ("three foxes", "a\u2028b \u2029 c")
    assert prompts.metadata == ({"number": 3, "tags": ["x"]}, {})
    assert prompts.lines == (1, 3)


def test_a_registered_set_is_read_from_its_package(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_prompts" / "sets").mkdir(parents=True)
    (tmp_path / "fake_prompts" / "__init__.py").touch()
    write(tmp_path / "fake_prompts" / "sets", "animals.jsonl", '{"prompt": "a fox"}')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_prompts("starter/animals", registry).prompts == ("a fox",)
    assert load_prompts("alignprop-starter/starter/animals", registry).prompts == ("a fox",)
    with pytest.raises(PluginError, match=r"starter/missing.*the file is missing.*Reinstall alignprop-starter"):
        load_prompts("starter/missing", registry)
    with pytest.raises(PluginError, match="No module named 'no_such_package_here'"):
        load_prompts("starter/no_package", registry)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a fox"', "bad JSON at column 19"),
        ("{'prompt': 'a fox'}", "bad JSON at column 2"),
        ('"a fox"', 'a line must be an object with the key "prompt", not text. Write {"prompt": "a fox"}.'),
        ("[1]", 'a line must be an object with the key "prompt", not a list.'),
        ('{"promt": "a fox"}', 'the key "prompt" is missing. Rename "promt" to "prompt".'),
        ('{"caption": "a fox"}', 'the key "prompt" is missing. Rename "caption" to "prompt".'),
        ('{"number": 3}', 'the key "prompt" is missing.'),
        ('{"prompt": 3}', '"prompt" must be text, not a number.'),
        ('{"prompt": null}', '"prompt" must be text, not null.'),
        ('{"prompt": " "}', '"prompt" is empty'),
    ],
)
def test_a_wrong_jsonl_line_is_named_with_its_mend(tmp_path: Path, registry: Registry, line: str, message: str) -> None:
    source = write(tmp_path, "p.jsonl", f'{{"prompt": "a fox"}}\n\n{line}\n')
    with pytest.raises(PromptError) as caught:
        load_prompts(source, registry)
    assert str(caught.value).startswith(f"{source}:3: {message}")
    assert caught.value.exit_code == 2


def test_many_wrong_lines_are_reported_together_and_counted(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(write(tmp_path, "p.jsonl", "{}\n" * 8), registry)
    assert [":5:" in line for line in str(caught.value).split("\n")] == [False] * 4 + [True, False]
    assert str(caught.value).endswith("and 3 more lines.")


def test_an_empty_file_is_refused(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(PromptError, match="contains no prompts; write one prompt per line"):
        load_prompts(write(tmp_path, "p.txt", "\n# nothing\n"), registry)
    with pytest.raises(PromptError, match=r"contains no prompts; write one \{"):
        load_prompts(write(tmp_path, "p.jsonl", ""), registry)


def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path, registry: Registry) -> None:
    source = write(tmp_path, "p.txt", "a fox\nein B\xe4r\n".encode("latin-1"))
    with pytest.raises(PromptError, match=r"p\.txt:2: is not UTF-8"):
        load_prompts(source, registry)


def test_another_suffix_is_refused(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(PromptError, match=r"end in \.txt .* not \.csv"):
        load_prompts(write(tmp_path, "p.csv", "a"), registry)


def test_a_folder_is_refused(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(PromptError, match="is a folder"):
        load_prompts(str(tmp_path), registry)


@pytest.mark.parametrize("source", ["starter/animal", "animals"])
def test_a_missing_source_gets_the_nearest_registered_name(registry: Registry, source: str) -> None:
    with pytest.raises(PromptError, match=r'Did you mean "starter/animals"\?'):
        load_prompts(source, registry)


def test_a_missing_file_gets_the_nearest_file(tmp_path: Path, registry: Registry) -> None:
    write(tmp_path, "training.txt", "a")
    with pytest.raises(PromptError, match=r"Did you mean .*training\.txt\?"):
        load_prompts(str(tmp_path / "trainig.txt"), registry)


def remarks(prompts: PromptSet, heldout: PromptSet | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about(prompts, heldout)
    return [str(warning.message) for warning in caught]


def test_what_is_probably_not_meant_is_reported_once(tmp_path: Path, registry: Registry) -> None:
    text = "# animals\na (red:1.3) fox\na ( blue : .5 ) fox\nan owl <lora:ink:0.8>\n#two owls\n"
    prompts = load_prompts(write(tmp_path, "p.txt", text), registry)
    comments, weight, lora = remarks(prompts)
    assert comments.endswith("p.txt: 2 lines start with # and are no prompts (line 1, 5).")
    assert "p.txt:2: (word:1.3) is read as plain text" in weight
    assert "p.txt:4: <lora:name:1> is read as plain text: LoRAs are set with model.loras" in lora


def test_held_out_prompts_that_are_trained_on_are_reported(registry: Registry) -> None:
    train, heldout = (load_prompts(texts, registry) for texts in (["a fox", "an owl"], ["an owl", "a (small) hill"]))
    (message,) = remarks(train, heldout)
    assert message.startswith("1 of 2 held-out prompts are also training prompts ('an owl')")
    assert remarks(train, load_prompts(["a hill at 12:30 (noon)"], registry)) == []


@pytest.mark.parametrize("line", ['{"prompt": "a fox \\ud83d"}', '{"prompt": "a fox", "tags": ["\\udc00"]}'])
def test_half_a_character_is_refused_with_its_line(line: str, tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(PromptError, match=r"p\.jsonl:2: contains half of a character \(.ud"):
        load_prompts(write(tmp_path, "p.jsonl", f'{{"prompt": "an owl"}}\n{line}\n'), registry)
    with pytest.raises(PromptError, match="half of a character"):
        load_prompts([json.loads(line)], registry)
