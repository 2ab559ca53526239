"""The structure of the core in numbers: layers, imports, lines of code, and the path of one training step.

    python -m tests.support.structure          # prints the counts
    python -m tests.support.structure --step   # also runs one step of a tiny model and counts what it passes through

`tests/test_structure.py` checks these numbers against the limits of the design.
"""

from __future__ import annotations

import ast
import io
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

CORE = Path(__file__).parents[2] / "alignprop_core"

LAYERS = [
    *("errors", "_files", "validation", "specs", "hookspecs", "reward", "images", "devices"),
    *("registry", "weights", "prompts", "locate", "config", "mix", "lora", "diffusion", "runs"),
    *("evaluation", "training", "testing", "cli"),
]
"""Bottom first. A package or module imports only from those before it, and from itself."""

HEART = ("reward", "mix", "lora", "diffusion", "training")
LIMITS = {"root modules": 13, "heart": 5000, "core": 11000, "functions of a step": 54, "modules of a step": 22}
"""The design's limits with the step-by-step engine (docs/decisions/0006-engine.md).

Lines of code are counted without comments, docstrings, data tables and model families.
"""

BLIND = {"diffusion": {"reward", "mix"}, "reward": {"diffusion"}, "mix": {"diffusion"}, "registry": {"diffusion"}}
"""What a layer must not import although it is below: sampling and scoring meet in `training` and `evaluation`."""


def modules() -> list[Path]:
    """Return all modules of the core but its public face."""
    return sorted(path for path in CORE.rglob("*.py") if path not in (CORE / "__init__.py", CORE / "__main__.py"))


def layer_of(path: Path) -> str:
    """Return the layer a module belongs to."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def public_face() -> dict[str, str]:
    """Return where the public names of `alignprop_core` come from: name -> layer."""
    for node in ast.parse((CORE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_PUBLIC":
            table = ast.literal_eval(node.value)
            return {name: module.split(".")[1] for name, module in table.items()}
    raise AssertionError("alignprop_core/__init__.py has no table _PUBLIC")


def imports(path: Path) -> set[str]:
    """Return the layers a module imports at run time, lazy imports and imports through the public face included.

    Imports for type checking alone do not count.
    """
    face = public_face()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "alignprop_core":
            # A public name stands for the layer it comes from; what is not public is a layer itself.
            names = [f"alignprop_core.{face.get(alias.name, alias.name)}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}:{node.lineno}: relative import; write it out")
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        found |= {name.split(".")[1] for name in names if name.startswith("alignprop_core.")}
    return found - {"__version__"}


def upward() -> list[str]:
    """Return imports against the order of the layers, as `module imports layer`."""
    order = {name: number for number, name in enumerate(LAYERS)}
    found = []
    for path in modules():
        layer = layer_of(path)
        for other in sorted(imports(path)):
            known = layer in order and other in order
            if not known or order[other] > order[layer] or other in BLIND.get(layer, set()):
                found.append(f"{path.relative_to(CORE)} imports {other}")
    return found


def code_lines(path: Path) -> int:
    """Return the lines of code of a module without comments, docstrings, blank lines and data tables.

    A data table is a module-level constant (upper-case name) that is a literal collection.
    """
    text = path.read_text()
    tree = ast.parse(text)
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    for statement in tree.body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        table = isinstance(statement.value, (ast.Dict, ast.List, ast.Tuple, ast.Set))
        if table and names and all(name.lstrip("_").isupper() for name in names):
            lines -= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return len(lines)


def counts() -> dict[str, int]:
    """Return the counts: root modules, lines of code of the heart, of the core and of each layer."""
    layers: dict[str, int] = {}
    for path in sorted(CORE.rglob("*.py")):
        if "families" not in path.parts:
            layer = layer_of(path)
            layers[layer] = layers.get(layer, 0) + code_lines(path)
    return {
        "root modules": len(list(CORE.glob("*.py"))),
        "heart": sum(layers[name] for name in HEART),
        "core": sum(layers.values()),
        "upward imports": len(upward()),
        **{f"  {name}": lines for name, lines in sorted(layers.items(), key=lambda item: -item[1])},
    }


def cycles() -> Iterator[tuple[str, str]]:
    """Yield pairs of layers that import each other."""
    edges = {(layer_of(path), other) for path in modules() for other in imports(path) if other != layer_of(path)}
    yield from sorted((a, b) for a, b in edges if a < b and (b, a) in edges)


def functions_of_a_step(step: Callable[[], object]) -> set[tuple[str, str]]:
    """Return (module, function) of the core's functions that run while `step` is called, each once.

    Properties, dunder methods, and the cheaper forwards that run only on a CPU do not count.
    """
    found: set[tuple[str, str]] = set()

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{CORE}/"):
            name = code.co_qualname.partition(".<locals>")[0]
            if not name.rpartition(".")[2].startswith(("__", "<")):
                found.add((str(Path(code.co_filename).relative_to(CORE)), name))

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    properties = {
        (module, f"{node.name}.{member.name}")
        for module in {module for module, _ in found}
        for node in ast.walk(ast.parse((CORE / module).read_text()))
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef) and any("property" in ast.unparse(d) for d in member.decorator_list)
    }
    return {pair for pair in found - properties if pair[0] != "diffusion/cpu.py"}


def step_counts() -> dict[str, int]:
    """Train a tiny model for one step and return how many functions and modules the next one passes through."""
    from alignprop_core.testing import tiny_pipeline
    from alignprop_core.training.trainer import Trainer
    from tests.support.toy_rewards import registry
    from tests.support.toy_runs import changed, toy_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_pipeline("stable_diffusion").save_pretrained(folder / "model")
        trainer = Trainer(changed(toy_data(folder / "model", folder), {}, registry()), registry=registry())
        trainer.step()
        found = functions_of_a_step(trainer.step)
    return {"functions of a step": len(found), "modules of a step": len({module for module, _ in found})}


def main() -> None:
    """Print the counts."""
    for name, number in (counts() | (step_counts() if "--step" in sys.argv[1:] else {})).items():
        limit = f"  (limit {LIMITS[name]:,})" if name in LIMITS else ""
        print(f"{name:20} {number:7,}{limit}")
    for line in upward():
        print("upward:", line)
    for pair in cycles():
        print("circular:", *pair)


if __name__ == "__main__":
    main()
