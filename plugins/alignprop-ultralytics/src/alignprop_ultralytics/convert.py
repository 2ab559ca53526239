"""Converts an ultralytics checkpoint to a safetensors file that names its architecture.

    python -m alignprop_ultralytics.convert yolo11n.pt yolo11n.safetensors

A .pt checkpoint is a pickle, and opening a pickle can run arbitrary code. This command is the only place where
alignprop opens one. Convert only files you trust. The converted file needs no unpickling.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from alignprop_ultralytics.detector import head_problem
from alignprop_ultralytics.offline import DetectionModel, ultralytics


def convert(source: Path, target: Path, *, half: bool = False) -> dict[str, Any]:
    """Unpickle a checkpoint and write its weights and architecture.

    Args:
        source: the checkpoint. It must be trusted: unpickling can run code.
        target: the .safetensors file to write.
        half: store float16 weights.

    Returns:
        The header of the written file.

    Raises:
        ValueError: the file cannot be unpickled, or does not contain a detection network.
        OSError: the target cannot be written.
    """
    checkpoint = _unpickled(source)
    # Checkpoints of the trainer are dictionaries; as in ultralytics, the averaged weights (EMA) take precedence.
    model = checkpoint
    if isinstance(checkpoint, dict):
        model = next((own for key in ("ema", "model") if (own := checkpoint.get(key)) is not None), None)
    if not isinstance(model, DetectionModel):
        raise ValueError(f"{source}: contains {type(model).__name__}, not a YOLO detection network.")
    problem = head_problem(model)
    if problem:
        raise ValueError(f"{source}: {problem}.")
    yaml = {key: value for key, value in model.yaml.items() if key != "yaml_file"}
    # `args` are the training options, a dictionary or a namespace depending on the version.
    sizes = getattr(model, "args", {})
    size = sizes.get("imgsz") if isinstance(sizes, dict) else getattr(sizes, "imgsz", None)
    header: dict[str, Any] = {"ultralytics": {"yaml": yaml, "names": _names(model, source)}}
    if isinstance(size, int):
        header["image_size"] = size
    kind = torch.float16 if half else torch.float32
    state = {k: (v.to(kind) if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    # Atomic write: an interrupted conversion leaves no incomplete target.
    part = target.with_name(target.name + ".part")
    try:
        save_file(state, part, {"config": json.dumps(header)})
    except SafetensorError as error:
        raise OSError(f"{target}: cannot be written ({error}).") from error
    part.replace(target)
    return header


def _names(model: DetectionModel, source: Path) -> dict[str, str]:
    """Return the class names by index; older checkpoints have a list."""
    found, count = getattr(model, "names", None), model.model[-1].nc
    given = dict(enumerate(found)) if isinstance(found, (list, tuple)) else found
    names = {str(index): str(name) for index, name in given.items()} if isinstance(given, dict) else {}
    if set(names) != {str(index) for index in range(count)}:
        raise ValueError(f"{source}: its names are not those of its {count} classes: {repr(found)[:80]}.")
    return names


def _unpickled(source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling can run arbitrary code, which can raise anything
        what = str(error).partition("\n")[0] or "no message"
        raise ValueError(
            f"{source}: cannot be unpickled ({type(error).__name__}: {what}). It is not a checkpoint of ultralytics, "
            f"or it was saved by a version other than {ultralytics.__version__}. Nothing was written."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m alignprop_ultralytics.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, help="checkpoint to convert, such as yolo11n.pt")
    parser.add_argument("target", type=Path, help="file to write, such as yolo11n.safetensors")
    parser.add_argument("--half", action="store_true", help="store float16 weights, which halves the size")
    args = parser.parse_args(arguments)
    if args.target.suffix != ".safetensors":
        parser.error(f"{args.target}: the target must end in .safetensors")
    if not args.source.is_file():
        parser.error(f"{args.source}: no such file")
    print(
        f"Unpickling {args.source}: this runs any code that the file contains. Convert only files you trust.",
        file=sys.stderr,
    )
    try:
        header = convert(args.source, args.target, half=args.half)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"Wrote {args.target}: {len(header['ultralytics']['names'])} classes (ultralytics {ultralytics.__version__})."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
