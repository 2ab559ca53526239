"""The sections of a page that come from settings: what was trained, versions, licenses, and how to use the LoRA."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from math import fsum
from pathlib import Path
from statistics import median
from typing import Any

from alignprop_core.config.schedulers import SCHEDULERS
from alignprop_report.axes import figure
from alignprop_report.markup import Child, Markup, code, element, facts, joined, table
from alignprop_report.run_files import Run, label_of, mapping, mappings, number, pick
from alignprop_report.summary import minutes

_NONCOMMERCIAL = re.compile(r"\bNC\b|non-?commercial|research[- ]only|OpenRAIL-?NC", re.IGNORECASE)
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_RESUMED_SHOWN = 3
_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def trained(run: Run) -> Markup:
    """Return what was trained: settings, rewards, time and place."""
    config = run.config
    pairs: list[tuple[str, Child]] = [
        ("model", model_name(config)),
        ("mix", str(pick(config, "mix", "combine") or "sum")),
        ("steps", f"{run.last_step} of {run.planned if run.planned is not None else '?'}"),
        ("batch", _batch(config)),
        ("backpropagation", _backprop(config)),
        (
            "sampling",
            _settings(config.get("sampling"), ("scheduler", "steps", "guidance_scale", "eta", "width", "height")),
        ),
        ("LoRA", _settings(config.get("lora"), ("rank", "alpha", "target_modules", "init_from"))),
        ("optimizer", _settings(config.get("optimizer"), ("learning_rate", "schedule", "weight_decay", "ema_decay"))),
        ("prompts", _settings(config.get("prompts"), ("train", "heldout"))),
        ("seed", _value(pick(config, "training", "seed"))),
        ("time", _time(run)),
        ("machine", _machine(run.environment)),
    ]
    terms = [
        [label_of(term), _value(term.get("name")), _weight(term.get("weight", 1.0)), _limits(term), _options(term)]
        for term in run.rewards
    ]
    rewards = table(["reward", "name", "weight", "limit", "options"], terms, caption="What it was trained on")
    return joined(facts([(name, value) for name, value in pairs if value]), rewards)


def in_short(run: Run) -> list[str]:
    """Return the most important settings, for one line."""
    config = run.config
    rank, seed = pick(config, "lora", "rank"), pick(config, "training", "seed")
    several = len(run.rewards) > 1
    parts = [
        f"mix {pick(config, 'mix', 'combine') or 'sum'}" if several else "",
        f"{run.last_step} steps",
        _batch(config),
        _backprop(config),
        "" if rank is None else f"LoRA rank {_value(rank)}",
        "" if seed is None else f"seed {_value(seed)}",
        f"{minutes(fsum(seconds))} of training" if (seconds := _seconds(run)) else "",
        f"on {where}" if (where := _machine(run.environment, short=True)) else "",
    ]
    return [part for part in parts if part]


def license_warnings(environment: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each missing or non-commercial license of a reward or its weights."""
    found = []
    for reward, what, license_ in _licenses(environment):
        if _NONCOMMERCIAL.search(license_):
            found.append(f"{reward}: {what} {license_}: not for commercial use. This may also apply to this LoRA.")
        elif not license_.strip():
            found.append(f"{reward}: {what} no license is stated.")
    return found


def ran_on(environment: Mapping[str, Any]) -> Markup:
    """Return versions and licenses."""
    versions = {**mapping(environment.get("versions")), **mapping(environment.get("plugins"))}
    rows = [[name, _value(version)] for name, version in versions.items()]
    rows += [[name, _value(environment.get(name))] for name in ("python", "system") if environment.get(name)]
    parts = [table(["package", "version"], rows, caption="Versions")] if rows else []
    licenses = [
        [reward, what.rstrip(":"), license_ or "not stated"] for reward, what, license_ in _licenses(environment)
    ]
    if licenses:
        parts.append(table(["reward", "of", "license"], licenses, caption="Licenses of rewards and their weights"))
    own = mapping(environment.get("local_rewards"))
    if own:
        origins = [[str(name), _settings(origin, tuple(mapping(origin)))] for name, origin in own.items()]
        parts.append(table(["reward", "from"], origins, caption="Rewards from Python"))
    return joined(parts) if parts else element("p", "environment.json has no versions.")


def use(run: Run) -> Markup:
    """Return how to use the LoRA and how to resume the run."""
    folder, base = str(run.path), str(pick(run.config, "model", "base") or "MODEL")
    sampling = mapping(run.config.get("sampling"))
    steps, guidance = number(sampling.get("steps")) or 50, number(sampling.get("guidance_scale"))
    guidance = 7.5 if guidance is None else guidance
    resume = _resume(run)
    if not run.has_lora:
        return joined(element("p", "The final LoRA is written when the run ends; it does not exist yet."), resume)
    sample = f"alignprop sample --model {shlex.quote(base)} --lora {shlex.quote(folder + '/lora')} "
    sample += f'--steps {steps:g} --guidance-scale {guidance:g} "your prompt"'
    others = sorted(file.name for file in (run.path / "lora").glob("*.safetensors") if file.name != _DIFFUSERS)
    whole = [name for name in others if not re.search(r"-\d{6}\.safetensors$", name)]
    parts = [
        element("h3", "From the command line"),
        code(sample),
        element("h3", "With diffusers"),
        code(_snippet(run, base, steps, guidance)),
    ]
    beside = [f"the VAE {run.config['model']['vae']}"] if pick(run.config, "model", "vae") else []
    beside += [
        f"the LoRA {lora.get('path')} at {lora.get('strength', 1.0)}"
        for lora in mappings(pick(run.config, "model", "loras"))
    ]
    if beside:
        parts.append(element("p", f"It was trained with {' and '.join(beside)}: also load that."))
    if whole:
        files = [joined(", " if i else None, element("code", f"lora/{name}")) for i, name in enumerate(whole)]
        parts.append(element("h3", "In ComfyUI, A1111 and Forge"))
        parts.append(element("p", "Copy ", files, " into their folder of LoRAs (models/loras, models/Lora)."))
    along = "A strength below 1 is between the base model and this one."
    return joined(parts, element("p", along), resume)


def _resume(run: Run) -> Markup:
    """Return how to resume: a command, or Python if a reward was an object passed from Python."""
    folder = str(run.path)
    changes = [f"output={folder}"] if pick(run.config, "output") != folder else []  # the folder was moved
    if run.finished and run.planned:
        changes.append(f"training.steps={2 * run.planned}")
    text = "It resumes from its last checkpoint."
    words = code(shlex.join(["alignprop", "train", f"{folder}/config.yaml", "--resume", "latest", *changes]))
    own = mapping(run.environment.get("local_rewards"))
    given = {
        str(name): str(pick(origin, "class") or pick(origin, "function"))
        for name, origin in own.items()
        if pick(origin, "module")
    }
    if given:
        named = ", ".join(f"{name} ({kind})" for name, kind in given.items())
        text += f" Its rewards were passed from Python: replace the dots with your objects for {named}."
        objects = ", ".join(f"{_quoted(name)}: ..." for name in given)
        overrides = f" [{', '.join(map(_quoted, changes))}]," if changes else ""
        words = code(
            "from pathlib import Path\n\nimport alignprop_core\n\n"
            f"run = Path({_quoted(folder)})\n"
            f'alignprop_core.train(run / "config.yaml",{overrides} rewards={{{objects}}}, resume=run)'
        )
    return joined(element("h3", "Resume the run"), element("p", text), words)


def _snippet(run: Run, base: str, steps: float, guidance: float) -> str:
    """Return Python that generates one image with plain diffusers."""
    dtype = _DTYPES.get(str(pick(run.config, "training", "mixed_precision")))
    options = f", torch_dtype=torch.{dtype}" if dtype else ""
    registered = "/" not in base and "\\" not in base and not Path(base).exists()
    lines = ["import torch"]
    if registered:  # only alignprop knows the folder of a plugin's model
        lines += [
            "from alignprop_core.locate import find_base",
            "from alignprop_core.registry.registry import default_registry",
        ]
    single = base.endswith(".safetensors")
    kind, load = ("StableDiffusionPipeline", "from_single_file") if single else ("DiffusionPipeline", "from_pretrained")
    where = f"find_base({_quoted(base)}, default_registry())" if registered else _quoted(base)
    name = str(pick(run.config, "sampling", "scheduler") or "ddim")
    scheduler, karras = SCHEDULERS.get(name, SCHEDULERS["ddim"])[0], name.endswith("_karras")
    lines += [
        f"from diffusers import {', '.join(sorted([scheduler, kind]))}",
        "",
        f"pipe = {kind}.{load}({where}{options})",
        f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{', use_karras_sigmas=True' * karras})",
        f"pipe.load_lora_weights({_quoted(str(run.path / 'lora'))}, weight_name={_quoted(_DIFFUSERS)})",
        "noise = torch.Generator().manual_seed(0)",
        f'image = pipe("your prompt", num_inference_steps={steps:g}, guidance_scale={guidance:g}, '
        "generator=noise).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Return a Python string with double quotes."""
    return json.dumps(text, ensure_ascii=False)


def model_name(config: Mapping[str, Any]) -> str:
    """Name the model, and the VAE and LoRAs beside it."""
    parts = [str(pick(config, "model", "base") or "?")]
    if vae := pick(config, "model", "vae"):
        parts.append(f"with the VAE {vae}")
    loras = mappings(pick(config, "model", "loras"))
    parts += [f"with the LoRA {lora.get('path')} at {lora.get('strength', 1.0)}" for lora in loras]
    return " ".join(parts)


def term_text(term: Mapping[str, Any]) -> str:
    """Name a term with its weight, and its limit if it has one."""
    limit = _limits(term)
    return f"{_weight(term.get('weight', 1.0))} × {label_of(term)}" + (f" ({limit})" if limit else "")


def _batch(config: Mapping[str, Any]) -> str:
    size = number(pick(config, "training", "batch_size"))
    times = number(pick(config, "training", "gradient_accumulation_steps")) or 1
    if size is None:
        return ""
    return f"{size * times:g} images per step" + (f" ({times:g} batches of {size:g})" if times > 1 else "")


def _backprop(config: Mapping[str, Any]) -> str:
    keys = ("strategy", "k", "mean", "std", "keep_probability", "refl_steps")
    samples = number(pick(config, "backprop", "lv_samples"))
    return _settings(config.get("backprop"), (*keys, "lv_samples") if samples else keys)


def _seconds(run: Run) -> list[float]:
    return [value for row in run.steps if (value := number(row.get("seconds"))) is not None]


def _time(run: Run) -> str:
    seconds = _seconds(run)
    parts = [f"started {started}"] if (started := _moment(run.environment.get("started"))) else []
    again = run.environment.get("resumed")
    resumed = [moment for time in (again if isinstance(again, list) else []) if (moment := _moment(time))]
    if resumed:
        parts.append(f"resumed {', '.join(resumed[-_RESUMED_SHOWN:])}")
        if (more := len(resumed) - _RESUMED_SHOWN) > 0:
            parts[-1] += f" and {more} {'time' if more == 1 else 'times'} before"
    if seconds:
        parts.append(f"{minutes(fsum(seconds))} of training, {median(seconds):.2g} s per step")
    try:
        written = datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime, UTC)
    except OSError:
        pass  # no metrics, no last step
    else:
        parts.append(f"last step written {written:%Y-%m-%d %H:%M} UTC")
    return "; ".join(parts)


def _moment(text: object) -> str:
    """Return a time of environment.json in UTC; empty if it is invalid or has no offset."""
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
        return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment is not None and moment.tzinfo else ""
    except (ValueError, OverflowError):
        return ""


def _machine(environment: Mapping[str, Any], *, short: bool = False) -> str:
    names = pick(environment, "device", "names")
    used = environment.get("training_device") or pick(environment, "device", "kind")
    parts = [str(used)] if used else []
    if isinstance(names, list) and names and str(used) != "cpu":
        parts.append(", ".join(map(str, names)))
    if environment.get("system") and not short:
        parts.append(str(environment["system"]))
    return "; ".join(parts)


def _licenses(environment: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the reward, what the license applies to, and the license."""
    for name, known in mapping(environment.get("licenses")).items():
        yield str(name), "the reward:", _text(pick(known, "reward"))
        for file, license_ in mapping(pick(known, "weights")).items():
            yield str(name), f"the weights {file}:", _text(license_)
    for name, known in mapping(environment.get("isolated_rewards")).items():
        yield str(name), "the reward:", _text(pick(known, "license"))
        for file, license_ in mapping(pick(known, "weights")).items():
            yield str(name), f"the weights {file}:", _text(license_)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _settings(section: object, keys: tuple[str, ...]) -> str:
    """Return the keys of a section that are set: `uniform`, `rank 8, alpha 4`."""
    known = [(key, pick(section, key)) for key in keys]
    shown = [(key, value) for key, value in known if value is not None and value != ""]
    return ", ".join(
        _value(value) if key == "strategy" else f"{key.replace('_', ' ')} {_value(value)}" for key, value in shown
    )


def _value(value: object) -> str:
    if value is None:
        return ""
    known = number(value)
    if known is not None:
        return str(value) if isinstance(value, int) else f"{known:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _weight(weight: object) -> str:
    """Return a weight, or its schedule over the steps."""
    if isinstance(weight, Mapping):
        return " → ".join(f"{_value(value)} (step {step})" for step, value in weight.items())
    return _value(weight)


def _limits(term: Mapping[str, Any]) -> str:
    known = [(kind, number(term.get(kind))) for kind in ("ceiling", "floor", "target")]
    return ", ".join(f"{kind} {figure(value)}" for kind, value in known if value is not None)


def _options(term: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {_value(value)}" for key, value in mapping(term.get("options")).items() if value is not None
    )
