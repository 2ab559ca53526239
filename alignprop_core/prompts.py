"""Prompt sets: registered ones, text files, JSONL files and lists. No torch."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_core.errors import PluginError, PromptError, did_you_mean
from alignprop_core.registry.guard import PluginFailure, guarded

if TYPE_CHECKING:
    from alignprop_core.registry.offers import Offer
    from alignprop_core.registry.registry import Registry
    from alignprop_core.specs import PromptSpec

SUFFIXES = (".txt", ".jsonl")
_SHOWN_PROBLEMS = 5
_OTHER_SYNTAX = (
    (re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)"), "(word:1.3)", "weights of words are not supported"),
    (re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>"), "<lora:name:1>", "LoRAs are set with model.loras or --lora"),
)
"""Syntax of other programs' prompts: a pattern, an example and what to write or know."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file or list.

    Attributes:
        name: the registered name, or the file's path.
        prompts: N texts, none empty.
        metadata: N mappings: the other keys of a JSONL line, empty for text files.
        lines: the line of each prompt in its file, from 1.
        comments: the lines of a file that were skipped because they start with `#`.
    """

    name: str
    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]
    lines: tuple[int, ...] = ()
    comments: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def checksum(self) -> str:
        """SHA-256 of the prompts and their metadata, in order; comments and blank lines of a file do not count."""
        content = [[*pair] for pair in zip(self.prompts, self.metadata, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def problem(self, index: int, message: object) -> str:
        """Return a message about a prompt, with its file and line, or its number in the list."""
        return f"{self.name}{f':{self.lines[index]}' if self.lines else f', prompt {index + 1}'}: {message}"


def load_prompts(source: str | Sequence[str | Mapping[str, Any]], registry: Registry) -> PromptSet:
    """Load prompts.

    Args:
        source: a registered set such as `starter/simple_animals`, a .txt file (one prompt per line; blank lines and
            lines that start with `#` are skipped), a .jsonl file (`{"prompt": "three foxes", "number": 3}` per line),
            or a list of texts and of such mappings.
        registry: where registered sets are looked up; a registered name wins over a file.

    Raises:
        PromptError: the file is missing, is not UTF-8, contains no prompts, or has an invalid line (with its number).
        PluginError: two plugins offer the name, or the plugin's file cannot be read.
    """
    if not isinstance(source, str):
        return _listed(source)
    offer = registry.find_prompt_set(source)
    if offer is not None:
        return parse_prompts(source, offer.spec.path, _packaged(offer))
    path = Path(source).expanduser()
    if path.is_file():
        try:
            return parse_prompts(str(path), path.name, path.read_bytes())
        except OSError as error:
            raise PromptError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if path.is_dir():
        raise PromptError(f"{path}: is a folder; give a .txt or .jsonl file inside it.")
    raise PromptError(_missing(source, path, registry))


def _listed(entries: Sequence[str | Mapping[str, Any]]) -> PromptSet:
    name = f"a list of {len(entries)} prompts"
    try:
        parsed = [prompt_entry(entry) for entry in entries]
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from None
    if not parsed:
        raise PromptError("the list of prompts is empty; write at least one.")
    return PromptSet(name, tuple(prompt for prompt, _ in parsed), tuple(extra for _, extra in parsed))


def parse_prompts(name: str, file: str, content: bytes) -> PromptSet:
    """Parse the content of a prompt file.

    Args:
        name: what to call the set, also in errors.
        file: the file's name; its suffix (.txt or .jsonl) says the format.
        content: UTF-8 bytes.

    Raises:
        PromptError: with the line numbers of the problems.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        raise PromptError(f"{name}: prompt files end in .txt (a prompt per line) or .jsonl, not {suffix or 'nothing'}.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = content[: error.start].count(b"\n") + 1
        raise PromptError(f"{name}:{at}: is not UTF-8 text; save the file as UTF-8.") from None
    entries: list[tuple[int, tuple[str, Mapping[str, Any]]]] = []
    problems: list[str] = []
    comments: list[int] = []
    # Not splitlines(): that also breaks at characters (such as U+2028) that JSON strings may hold.
    for number, raw in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"), 1):
        line = raw.strip()
        if line.startswith("#"):
            comments.append(number)
        if not line or line.startswith("#"):
            continue
        try:
            entries.append((number, (line, {}) if suffix == ".txt" else _entry(line)))
        except ValueError as error:
            problems.append(f"{name}:{number}: {error}")
    if problems:
        raise PromptError(listed(problems))
    if not entries:
        wanted = "one prompt per line" if suffix == ".txt" else 'one {"prompt": "..."} per line'
        raise PromptError(f"{name}: contains no prompts; write {wanted}.")
    lines, pairs = zip(*entries, strict=True)
    prompts, metadata = zip(*pairs, strict=True)
    return PromptSet(name, prompts, metadata, lines, tuple(comments))


def warn_about(prompts: PromptSet, heldout: PromptSet | None = None) -> None:
    """Warn, once each, about prompts that are probably not meant as they are read.

    Args:
        prompts: the prompts.
        heldout: prompts that should not be among them.
    """
    remarks = []
    for found in filter(None, (prompts, heldout)):
        if found.comments:
            where = ", ".join(map(str, found.comments[:_SHOWN_PROBLEMS]))
            remarks.append(f"{found.name}: {len(found.comments)} lines start with # and are no prompts (line {where}).")
        for syntax, example, meaning in _OTHER_SYNTAX:
            number = next((i for i, text in enumerate(found.prompts) if syntax.search(text)), None)
            if number is not None:
                remarks.append(found.problem(number, f"{example} is read as plain text: {meaning}."))
    if heldout is not None and (same := set(heldout.prompts) & set(prompts.prompts)):
        remarks.append(
            f"{len(same)} of {len(set(heldout.prompts))} held-out prompts are also training prompts ({min(same)!r}): "
            "the evaluation says little about new prompts."
        )
    for remark in dict.fromkeys(remarks):
        warnings.warn(remark, stacklevel=3)


def listed(problems: Sequence[str]) -> str:
    """Return the first few problems with prompts, one per line, and the number of others."""
    more = len(problems) - _SHOWN_PROBLEMS
    return "\n".join([*problems[:_SHOWN_PROBLEMS], *([f"and {more} more lines."] if more > 0 else [])])


def _entry(line: str) -> tuple[str, dict[str, Any]]:
    """Parse one JSONL line; `ValueError` says what to fix."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"bad JSON at column {error.colno}: {error.msg}. Each line is one complete object, such as "
            '{"prompt": "a fox"}.'
        ) from None
    except RecursionError:
        raise ValueError("bad JSON: nested too deeply.") from None
    if not isinstance(data, dict):
        hint = f" Write {json.dumps({'prompt': data}, ensure_ascii=False)}." if isinstance(data, str) else ""
        raise ValueError(f'a line must be an object with the key "prompt", not {_json_kind(data)}.{hint}')
    return prompt_entry(data)


def prompt_entry(data: object) -> tuple[str, dict[str, Any]]:
    """Return the prompt and the metadata of an entry: a text, or a mapping with the key `prompt` and JSON values.

    Raises:
        ValueError: with what to write instead.
    """
    if isinstance(data, str):
        data = {"prompt": data}
    if not isinstance(data, Mapping):
        raise ValueError(f'a prompt must be text or a mapping with the key "prompt", not {_json_kind(data)}.')
    if "prompt" not in data:
        nearest = get_close_matches("prompt", map(str, data), n=1) or [
            key for key in ("text", "caption") if key in data
        ]
        hint = f' Rename "{nearest[0]}" to "prompt".' if nearest else ""
        raise ValueError(f'the key "prompt" is missing.{hint}')
    prompt = data["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f'"prompt" must be text, not {_json_kind(prompt)}.')
    if not prompt.strip():
        raise ValueError('"prompt" is empty; write a text or remove the line.')
    try:
        metadata = json.loads(json.dumps({key: value for key, value in data.items() if key != "prompt"}, default=_item))
        json.dumps([prompt, metadata], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ValueError(f"contains half of a character ({half}), such as an emoji cut in two.") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the metadata of a prompt must be JSON values: {error}.") from None
    return str(prompt).strip(), metadata


def _item(value: Any) -> Any:
    """Return the Python number of a NumPy one."""
    if callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"{value!r} is not")


def _json_kind(value: object) -> str:
    kinds = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object")


def _packaged(offer: Offer[PromptSpec]) -> bytes:
    """Read a file that ships in a plugin's package."""
    package, _, relative = offer.spec.path.partition(":")
    where = f'Prompt set "{offer.name}" of {offer.distribution} {offer.version}'
    try:
        with guarded():
            return files(package).joinpath(relative).read_bytes()
    except PluginFailure as failure:
        cause = failure.__cause__
        why = "the file is missing" if isinstance(cause, FileNotFoundError) else str(failure)
        error = PluginError(f"{where}: {offer.spec.path} cannot be read ({why}). Reinstall {offer.distribution}.")
        if not isinstance(cause, OSError):
            error.add_note(failure.traceback)
        raise error from cause


def _missing(source: str, path: Path, registry: Registry) -> str:
    known = sorted({offer.name for offer in registry.prompts()})
    message = f'No prompt file {path}, and no installed plugin offers a prompt set "{source}".'
    # "simple_animals" for "starter/simple_animals"
    alike = [name for name in known if name.rpartition("/")[2] == source.rpartition("/")[2]]
    if hint := did_you_mean(source, known) or did_you_mean(alike[0] if alike else "", alike):
        return message + hint
    beside = sorted(found.name for found in path.parent.glob("*") if found.suffix in SUFFIXES)
    if near := get_close_matches(path.name, beside, n=1):
        return f"{message} Did you mean {path.parent / near[0]}?"
    return f"{message} There are: {', '.join(known)}." if known else message
